//! One fuzzer for all targets: TIDINGS_FUZZ names the one, so that everything is built once.
#![no_main]

mod properties;

use std::sync::LazyLock;

static PROPERTY: LazyLock<properties::Property> = LazyLock::new(|| {
    let wanted = std::env::var("TIDINGS_FUZZ").unwrap_or_default();
    let found = properties::ALL.iter().find(|(target, _)| *target == wanted);
    let names = properties::ALL.map(|(target, _)| target).join(", ");
    found.unwrap_or_else(|| panic!("TIDINGS_FUZZ names none of {names}")).1
});

libfuzzer_sys::fuzz_target!(|input: &[u8]| PROPERTY(input));
