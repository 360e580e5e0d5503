//! Reads the `multipart/mixed` answers in which other servers give files, piece by piece: what is known of the file, then the file, or the
//! place where it is ([RFC 2046, section 5.1](https://www.rfc-editor.org/rfc/rfc2046#section-5.1)).
//!
//! Specification: server-server API, "Content repository".

use std::fmt;

use bytes::{Buf, Bytes, BytesMut};

use crate::media::kinds;

/// A boundary has at most this many characters.
const BOUNDARY_BYTES_MAX: usize = 70;
/// This many bytes may come before the first part, and as many of what is known of the file.
const BESIDES_BYTES_MAX: usize = 64 << 10;
/// The head of a part has at most this many bytes.
const HEAD_BYTES_MAX: usize = 8 << 10;

/// The head of the part that holds the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// The content type, if it says one.
    pub content_type: Option<String>,
    /// The name of the file, if it says one.
    pub name: Option<String>,
    /// The URL where the file is, if it is not here.
    pub location: Option<String>,
}

/// A step of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// More of the answer is needed.
    More,
    /// The head of the file.
    Head(Head),
    /// Bytes of the file.
    Data(Bytes),
    /// The file is whole.
    End,
}

/// An answer that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong(&'static str);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first part, behind so many bytes up to here.
    Before(usize),
    /// In the head of the part of this number.
    Head(u8),
    /// In the first part, of so many bytes up to here.
    Known(usize),
    /// The reader is in the file.
    File,
    Ended,
}

/// Reads an answer, of which at most a piece and a head are in memory.
#[derive(Debug)]
pub struct Multipart {
    /// A line break, two dashes and the boundary.
    delimiter: Vec<u8>,
    state: State,
    unread: BytesMut,
}

impl Multipart {
    /// Begins to read an answer of this content type. Errors: it is no `multipart/mixed` with a boundary.
    pub fn of(content_type: &str) -> Result<Self, Wrong> {
        const NONE: Wrong = Wrong("the answer is not multipart/mixed with a boundary");
        if kinds::essence(content_type) != "multipart/mixed" {
            return Err(NONE);
        }
        let boundary = content_type.split(';').skip(1).find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.trim().eq_ignore_ascii_case("boundary").then(|| value.trim().trim_matches('"'))
        });
        let boundary = boundary.filter(|it| (1..=BOUNDARY_BYTES_MAX).contains(&it.len())).ok_or(NONE)?;
        let delimiter = [b"\r\n--", boundary.as_bytes()].concat();
        // The first part may begin without a line break before it.
        Ok(Self { delimiter, state: State::Before(0), unread: BytesMut::from(&b"\r\n"[..]) })
    }

    /// Adds bytes that have come. They are taken out by [`Self::step`], until it asks for more.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.unread.extend_from_slice(bytes);
    }

    /// The next step. Errors: the answer is no such one.
    pub fn step(&mut self) -> Result<Step, Wrong> {
        loop {
            match self.state {
                State::Before(before) => match self.skip_to_delimiter() {
                    Ok(_) => self.state = State::Head(1),
                    Err(skipped) if before + skipped > BESIDES_BYTES_MAX => {
                        return Err(Wrong("nothing begins in the answer"));
                    }
                    Err(skipped) => {
                        self.state = State::Before(before + skipped);
                        return Ok(Step::More);
                    }
                },
                State::Head(number) => {
                    let Some(head) = self.take_head()? else { return Ok(Step::More) };
                    if number == 1 {
                        self.state = State::Known(0);
                    } else {
                        self.state = State::File;
                        return Ok(Step::Head(head));
                    }
                }
                State::Known(before) => match self.skip_to_delimiter() {
                    Ok(_) => self.state = State::Head(2),
                    Err(skipped) if before + skipped > BESIDES_BYTES_MAX => {
                        return Err(Wrong("too much is said of the file"));
                    }
                    Err(skipped) => {
                        self.state = State::Known(before + skipped);
                        return Ok(Step::More);
                    }
                },
                State::File => {
                    let (end, is_end) = match find(&self.unread, &self.delimiter) {
                        Some(at) => (at, true),
                        None => (self.unread.len().saturating_sub(self.delimiter.len() - 1), false),
                    };
                    if end > 0 {
                        return Ok(Step::Data(self.unread.split_to(end).freeze()));
                    }
                    if !is_end {
                        return Ok(Step::More);
                    }
                    self.state = State::Ended;
                    self.unread.clear();
                }
                State::Ended => return Ok(Step::End),
            }
        }
    }

    /// Skips what comes before the next delimiter, and the delimiter. Where it has not come yet, gives the number of bytes that were
    /// skipped.
    fn skip_to_delimiter(&mut self) -> Result<usize, usize> {
        match find(&self.unread, &self.delimiter) {
            Some(at) => {
                self.unread.advance(at + self.delimiter.len());
                Ok(at)
            }
            None => {
                let skipped = self.unread.len().saturating_sub(self.delimiter.len() - 1);
                self.unread.advance(skipped);
                Err(skipped)
            }
        }
    }

    /// Takes the head of a part, once it is there.
    fn take_head(&mut self) -> Result<Option<Head>, Wrong> {
        let end = find(&self.unread, b"\r\n\r\n");
        let Some(end) = end else {
            return match self.unread.len() > HEAD_BYTES_MAX {
                true => Err(Wrong("the head of a part is too long")),
                false => Ok(None),
            };
        };
        if end > HEAD_BYTES_MAX {
            return Err(Wrong("the head of a part is too long"));
        }
        let head = self.unread.split_to(end);
        self.unread.advance(4);
        if head.starts_with(b"--") {
            return Err(Wrong("the answer has no file"));
        }
        let mut found = Head::default();
        for line in head.as_ref().split(|byte| *byte == b'\n') {
            let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
            let (name, value) = line.split_at(colon);
            let value = value.get(1..).unwrap_or_default().trim_ascii();
            let text = || std::str::from_utf8(value).ok().map(str::to_owned);
            if name.trim_ascii().eq_ignore_ascii_case(b"content-type") {
                found.content_type = text();
            } else if name.trim_ascii().eq_ignore_ascii_case(b"content-disposition") {
                found.name = kinds::name_in(value);
            } else if name.trim_ascii().eq_ignore_ascii_case(b"location") {
                found.location = text();
            }
        }
        Ok(Some(found))
    }
}

/// Finds where some bytes begin in others.
fn find(within: &[u8], wanted: &[u8]) -> Option<usize> {
    let first = *wanted.first()?;
    let mut from = 0;
    loop {
        let at = from + within.get(from..)?.iter().position(|byte| *byte == first)?;
        if within.get(at..)?.starts_with(wanted) {
            return Some(at);
        }
        from = at + 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TYPE: &str = "multipart/mixed; boundary=gc0p4Jq0M2Yt08jU534c0p";

    fn answer(file: &[u8]) -> Vec<u8> {
        [
            b"--gc0p4Jq0M2Yt08jU534c0p\r\nContent-Type: application/json\r\n\r\n{}\r\n--gc0p4Jq0M2Yt08jU534c0p\r\n",
            &b"content-type: text/plain\r\nContent-Disposition: attachment; filename=\"a b\"\r\n\r\n"[..],
            file,
            b"\r\n--gc0p4Jq0M2Yt08jU534c0p--\r\n",
        ]
        .concat()
    }

    /// Reads an answer in pieces of this many bytes: the head, the file, and whether it is whole.
    fn read(
        content_type: &str,
        answer: &[u8],
        at_once: usize,
    ) -> Result<(Option<Head>, Vec<u8>, bool), Wrong> {
        let mut reader = Multipart::of(content_type)?;
        let (mut head, mut file) = (None, Vec::new());
        for piece in answer.chunks(at_once) {
            reader.feed(piece);
            loop {
                match reader.step()? {
                    Step::More => break,
                    Step::Head(found) => head = Some(found),
                    Step::Data(bytes) => file.extend(bytes),
                    Step::End => return Ok((head, file, true)),
                }
            }
        }
        Ok((head, file, false))
    }

    #[test]
    fn a_file_is_read_in_whatever_pieces_it_comes() {
        let whole = answer(b"some text\r\n--gc0p4Jq0M2Yt08jU534c0");
        for at_once in [1, 2, 3, 7, 50, 10_000] {
            let (head, file, is_whole) = read(TYPE, &whole, at_once).unwrap();
            let head = head.unwrap();
            assert_eq!(
                (head.content_type.as_deref(), head.name.as_deref()),
                (Some("text/plain"), Some("a b"))
            );
            assert_eq!(file, b"some text\r\n--gc0p4Jq0M2Yt08jU534c0");
            assert!(is_whole && head.location.is_none());
        }
        let cut = &whole[..whole.len() - 30];
        assert!(!read(TYPE, cut, 9).unwrap().2, "it ends in the middle of the file");
    }

    #[test]
    fn a_place_is_read_where_there_is_no_file() {
        let text = "preamble\r\n--x\r\nContent-Type: application/json\r\n\r\n{}\r\n--x\r\nLocation: https://cdn.example/a\r\n\r\n\r\n--x--";
        let (head, file, is_whole) =
            read("Multipart/Mixed; a=b; Boundary=\"x\"", text.as_bytes(), 4).unwrap();
        assert_eq!(head.unwrap().location.as_deref(), Some("https://cdn.example/a"));
        assert!(file.is_empty() && is_whole);
    }

    #[test]
    fn what_never_begins_or_ends_is_given_up() {
        for wrong in
            ["text/plain", "multipart/mixed", "multipart/mixed; boundary=", "multipart/form-data; boundary=x"]
        {
            assert!(Multipart::of(wrong).is_err(), "{wrong}");
        }
        assert!(Multipart::of(&format!("multipart/mixed; boundary={}", "x".repeat(71))).is_err());
        let x = "multipart/mixed; boundary=x";
        assert!(read(x, &b"a".repeat(BESIDES_BYTES_MAX * 2), 999).is_err());
        let head = [b"--x\r\nA: ".to_vec(), b"a".repeat(HEAD_BYTES_MAX * 2)].concat();
        assert!(read(x, &head, 999).is_err());
        let known = [b"--x\r\nA: a\r\n\r\n".to_vec(), b"a".repeat(BESIDES_BYTES_MAX * 2)].concat();
        assert!(read(x, &known, 999).is_err());
        assert!(read(x, b"--x--\r\n\r\n", 99).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_come_through(file: Vec<u8>, at_once in 1_usize..64) {
            prop_assume!(find(&file, b"gc0p4Jq0M2Yt08jU534c0p").is_none());
            let (_, read, is_whole) = read(TYPE, &answer(&file), at_once).unwrap();
            prop_assert!(is_whole);
            prop_assert_eq!(read, file);
        }

        #[test]
        fn arbitrary_answers_never_panic(bytes: Vec<u8>, at_once in 1_usize..64) {
            let _ = read("multipart/mixed; boundary=a", &bytes, at_once);
        }
    }
}
