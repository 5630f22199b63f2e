//! Trace: W3C trace context, which a change carries from its request to its message and on to whoever handles it.
//!
//! Promise: what parses is a trace and a span, and cannot be anything else.

use std::{fmt, str::FromStr};

use uuid::Uuid;

/// W3C trace context, version 00: which trace a change belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traceparent {
    trace_id: u128,
    span_id: u64,
    sampled: bool,
}

impl Traceparent {
    /// A new trace, for a request that brought none.
    pub fn new_root() -> Self {
        Self { trace_id: random(), span_id: span_id(), sampled: false }
    }

    /// A span of this service within the caller's trace.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span_id: span_id(), ..self }
    }
}

/// Random UUIDs have 122 random bits and are never zero, which the W3C format forbids.
fn random() -> u128 {
    Uuid::new_v4().as_u128()
}

fn span_id() -> u64 {
    // The upper half holds the version digit, so it is never zero either.
    Uuid::new_v4().as_u64_pair().0
}

/// Digit by digit, as every message carries one: formatting macros take ten times as long.
impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        write_hex(&mut text[3..35], self.trace_id);
        write_hex(&mut text[36..52], self.span_id.into());
        text[54] += u8::from(self.sampled);
        f.write_str(std::str::from_utf8(&text).expect("digits are ASCII"))
    }
}

fn write_hex(digits: &mut [u8], mut number: u128) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 0xf) as usize];
        number >>= 4;
    }
}

/// Not a traceparent; the header is then ignored, as the standard asks.
#[derive(Debug, PartialEq, Eq)]
pub struct InvalidTraceparent;

impl FromStr for Traceparent {
    type Err = InvalidTraceparent;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or(InvalidTraceparent)
    }
}

fn parse(text: &str) -> Option<Traceparent> {
    let mut parts = text.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    // Later versions may append parts; version 00 has exactly four.
    if version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    hex(version, 2)?;
    let (upper, lower) = (hex(trace.get(..16)?, 16)?, hex(trace.get(16..)?, 16)?);
    let context = Traceparent {
        trace_id: u128::from(upper) << 64 | u128::from(lower),
        span_id: hex(span, 16)?,
        sampled: hex(flags, 2)? & 1 == 1,
    };
    (context.trace_id != 0 && context.span_id != 0).then_some(context)
}

/// A number of so many digits, none of them in upper case.
fn hex(text: &str, digits: usize) -> Option<u64> {
    if text.len() != digits {
        return None;
    }
    let value = |digit| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    text.bytes().try_fold(0, |number, digit| Some(number << 4 | u64::from(value(digit)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_trace_goes_on_in_a_span_of_ours() {
        let callers: Traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap();
        let ours = callers.child().to_string();
        assert!(ours.starts_with("00-0af7651916cd43dd8448eb211c80319c-") && ours.ends_with("-01"), "{ours}");
        assert!(!ours.contains("b7ad6b7169203331"), "{ours}");
        let root = Traceparent::new_root();
        assert_eq!(root.to_string().parse(), Ok(root));
    }

    #[test]
    fn a_malformed_trace_is_no_trace() {
        for wrong in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        ] {
            assert_eq!(wrong.parse::<Traceparent>(), Err(InvalidTraceparent), "{wrong}");
        }
    }
}
