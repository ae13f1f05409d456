//! The last line of defence for logs: whatever a library prints, digits that look like a phone number or an address
//! of WhatsApp do not reach the output. Our own types mask themselves; this is for text we did not write.

use std::io::{self, Write};

/// Fewest digits taken for a phone number.
const PHONE_DIGITS_MIN: usize = 7;
/// Digits that stay readable, for people who compare with a number they know.
const DIGITS_SHOWN: usize = 2;

/// A writer that masks phone numbers. Expects whole lines, which is how the log layers write.
#[derive(Debug)]
pub(super) struct Redacted<W>(pub(super) W);

impl<W: Write> Write for Redacted<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match masked(line) {
            Some(masked) => self.0.write_all(&masked)?,
            None => self.0.write_all(line)?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// The line with phone numbers masked, or `None` when there is none in it.
fn masked(line: &[u8]) -> Option<Vec<u8>> {
    let mut copy: Option<Vec<u8>> = None;
    let mut at = 0;
    while at < line.len() {
        if !line[at].is_ascii_digit() {
            at += 1;
            continue;
        }
        let digits = line[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let end = at + digits;
        if digits >= PHONE_DIGITS_MIN && is_address(line, at, end) {
            let copy = copy.get_or_insert_with(|| line.to_vec());
            copy[at..end - DIGITS_SHOWN].fill(b'*');
        }
        at = end;
    }
    copy
}

/// A plus before, or an `@` behind (with a device such as `:12` or an agent such as `.1` in between).
fn is_address(line: &[u8], start: usize, end: usize) -> bool {
    if start > 0 && line[start - 1] == b'+' {
        return true;
    }
    let behind = line[end..].iter().position(|byte| !(byte.is_ascii_digit() || matches!(byte, b':' | b'.' | b'_')));
    behind.is_some_and(|offset| line[end + offset] == b'@')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: &str) {
        let mut out = Vec::new();
        Redacted(&mut out).write_all(line.as_bytes()).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn addresses_and_phone_numbers_are_masked_and_nothing_else() {
        check("from 5511999990001@s.whatsapp.net", "from ***********01@s.whatsapp.net");
        check("to 5511999990001:12@s.whatsapp.net", "to ***********01:12@s.whatsapp.net");
        check("lid 123456789012345.1:3@lid done", "lid *************45.1:3@lid done");
        check("call +4915112345678 now", "call +***********78 now");
        check(
            "took 123456789 ns at 2026-11-22T15:00:00.123456789Z",
            "took 123456789 ns at 2026-11-22T15:00:00.123456789Z",
        );
        check("id 3EB0123456789 count=12345678", "id 3EB0123456789 count=12345678");
    }
}
