//! Lines of a file, or of standard input.
//!
//! Promise: memory is bounded however long a line is; each line comes with its number and where it ends.
//! Not here, on purpose: JSON.

use std::io::{self, BufRead, ErrorKind};

/// A body has at most 64 KiB; spelt with escapes and blanks it may take four times as much.
pub const LIMIT_BYTES: usize = 256 * 1024;
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// How far a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Lines before it.
    pub line: u64,
    /// Bytes before it.
    pub offset: u64,
}

/// A line that was read. No Debug: it holds values.
pub struct Piece {
    pub text: Text,
    /// The place behind it; its `line` is this line's number, counted from 1.
    pub end: Place,
}

pub enum Text {
    Line(Vec<u8>),
    Blank,
    TooLong,
}

/// Reads lines from where `input` stands, which is `place`.
pub struct Lines<R> {
    input: R,
    place: Place,
    size_bytes: Option<u64>,
}

impl<R: BufRead> Lines<R> {
    /// `size_bytes` is that of a file when it was begun, and unknown for standard input.
    pub fn new(input: R, place: Place, size_bytes: Option<u64>) -> Self {
        Self { input, place, size_bytes }
    }

    /// Passes over lines until `line` were passed. False when there are not so many.
    pub fn skip_to(&mut self, line: u64) -> io::Result<bool> {
        while self.place.line < line {
            if self.next()?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub fn place(&self) -> Place {
        self.place
    }

    /// The next line; `None` at the end.
    pub fn next(&mut self) -> io::Result<Option<Piece>> {
        let (mut line, mut too_long) = (Vec::new(), false);
        let began = self.place.offset;
        // What is appended meanwhile is left alone; a line that was half there is read to its end.
        if self.size_bytes.is_some_and(|size_bytes| began >= size_bytes) {
            return Ok(None);
        }
        let is_whole = loop {
            let read = match self.input.fill_buf() {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                read => read?,
            };
            let ends = read.iter().position(|byte| *byte == b'\n');
            let taken = ends.map_or(read.len(), |at| at + 1);
            // What is too long is passed over, not held.
            too_long |= line.len() + taken > LIMIT_BYTES;
            if too_long {
                line = Vec::new();
            } else {
                line.extend_from_slice(&read[..taken]);
            }
            self.input.consume(taken);
            self.place.offset += taken as u64;
            if taken == 0 || ends.is_some() {
                break ends.is_some();
            }
        };
        // The file became shorter, in the middle of a line: there may be more of it later.
        if !is_whole && self.size_bytes.is_some_and(|size_bytes| self.place.offset < size_bytes) {
            self.place.offset = began;
        }
        if self.place.offset == began {
            return Ok(None);
        }
        if began == 0 && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        self.place.line += 1;
        let text = match line {
            _ if too_long => Text::TooLong,
            line if line.iter().all(u8::is_ascii_whitespace) => Text::Blank,
            line => Text::Line(line),
        };
        Ok(Some(Piece { text, end: self.place }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8], buffer_bytes: usize) -> Vec<(String, u64, u64)> {
        let mut lines = Lines::new(io::BufReader::with_capacity(buffer_bytes, text), Place::default(), None);
        let mut found = vec![];
        while let Some(Piece { text, end }) = lines.next().unwrap() {
            let text = match text {
                Text::Line(line) => String::from_utf8(line).unwrap().trim_end().to_owned(),
                Text::Blank => "(blank)".to_owned(),
                Text::TooLong => "(too long)".to_owned(),
            };
            found.push((text, end.line, end.offset));
        }
        found
    }

    fn line(text: &str, number: u64, offset: u64) -> (String, u64, u64) {
        (text.to_owned(), number, offset)
    }

    #[test]
    fn lines_end_with_and_without_carriage_return_and_the_last_without_either() {
        for buffer_bytes in [1, 2, 3, 64] {
            let found = read(b"\xef\xbb\xbfa\r\n\r\n  \nb\xc3\xa9\nc", buffer_bytes);
            let expected = [line("a", 1, 6), line("(blank)", 2, 8), line("(blank)", 3, 11), line("bé", 4, 15)];
            assert_eq!(found, [&expected[..], &[line("c", 5, 16)]].concat(), "{buffer_bytes}");
        }
        assert_eq!(read(b"", 8), []);
    }

    #[test]
    fn a_line_without_end_is_passed_over() {
        let text = [&vec![b'x'; LIMIT_BYTES * 3][..], b"\nb\n"].concat();
        let offset = LIMIT_BYTES as u64 * 3 + 1;
        assert_eq!(read(&text, 4096), [line("(too long)", 1, offset), line("b", 2, offset + 2)]);
    }

    #[test]
    fn one_may_begin_further_on() {
        let mut lines = Lines::new(&b"a\nb\nc\n"[..], Place::default(), None);
        assert!(lines.skip_to(2).unwrap());
        assert_eq!(lines.place(), Place { line: 2, offset: 4 });
        assert!(!lines.skip_to(9).unwrap());
    }

    #[test]
    fn the_half_line_of_a_file_that_became_shorter_is_none() {
        for (text, line) in [("a\nb\nc", 2), ("a\nb\n", 2), ("a", 0), ("", 0)] {
            let mut lines = Lines::new(text.as_bytes(), Place::default(), Some(9));
            while lines.next().unwrap().is_some() {}
            assert_eq!(lines.place(), Place { line, offset: line * 2 }, "{text:?}");
        }
    }

    #[test]
    fn what_was_appended_is_left_alone_and_no_line_is_torn() {
        for (size_bytes, end) in [(0, 0), (1, 2), (2, 2), (3, 4), (4, 4), (9, 6)] {
            let mut lines = Lines::new(&b"a\nb\nc\n"[..], Place::default(), Some(size_bytes));
            while lines.next().unwrap().is_some() {}
            assert_eq!(lines.place(), Place { line: end / 2, offset: end }, "{size_bytes}");
        }
    }
}
