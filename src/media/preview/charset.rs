//! The encoding of a page: its bytes become text, whatever they are
//! ([HTML, "determining the character encoding"](https://html.spec.whatwg.org/multipage/parsing.html#determining-the-character-encoding)).

use encoding_rs::{Encoding, REPLACEMENT, UTF_8, UTF_16BE, UTF_16LE, WINDOWS_1252, X_USER_DEFINED};

/// A page says its encoding within this many bytes, where it says it at all: pages that say it late are many.
const SAID_WITHIN_BYTES: usize = 4_096;

/// Makes text of the bytes of a page, by `charset` of its `Content-Type` if it has one. A mark at the beginning counts first, then the
/// header, then what the page says of itself. Where one of them lies, so that bytes make no sense, the next is tried; in the end
/// what makes no sense is replaced, and nothing fails.
pub fn decode(bytes: &[u8], charset: Option<&str>) -> String {
    if let Some((encoding, mark)) = Encoding::for_bom(bytes) {
        let (text, _) = encoding.decode_without_bom_handling(bytes.get(mark..).unwrap_or_default());
        return text.into_owned();
    }
    let by_header = charset.and_then(|label| find(label.as_bytes()));
    let by_page = said(bytes).and_then(find).map(of_page);
    let candidates = [by_header, by_page, Some(UTF_8)];
    for encoding in candidates.into_iter().flatten() {
        if let Some(text) = decode_whole(encoding, bytes) {
            return text;
        }
    }
    // An error says of encodings in which every second byte of a tag would be zero that it is another one.
    let stated = by_header.filter(|it| it.is_ascii_compatible()).or(by_page);
    // Bytes that say nothing and are no UTF-8 are most likely of the western encoding that all others are mistaken for.
    let (text, _) = stated.unwrap_or(WINDOWS_1252).decode_without_bom_handling(bytes);
    text.into_owned()
}

/// The text, if all of the bytes make sense in this encoding; the last character may be cut off, because pages are.
fn decode_whole(encoding: &'static Encoding, bytes: &[u8]) -> Option<String> {
    if encoding == UTF_8 {
        return match std::str::from_utf8(bytes) {
            Ok(text) => Some(text.to_owned()),
            Err(error) if error.error_len().is_none() => {
                let whole = bytes.get(..error.valid_up_to())?;
                std::str::from_utf8(whole).ok().map(str::to_owned)
            }
            Err(_) => None,
        };
    }
    encoding.decode_without_bom_handling_and_without_replacement(bytes).map(std::borrow::Cow::into_owned)
}

fn find(label: &[u8]) -> Option<&'static Encoding> {
    // The replacement encoding stands for those that are not safe, and decodes to nothing.
    Encoding::for_label(label).filter(|it| *it != REPLACEMENT)
}

/// A page that says in ASCII that it is UTF-16 is none, and one of its own is not of the web.
fn of_page(encoding: &'static Encoding) -> &'static Encoding {
    if encoding == UTF_16LE || encoding == UTF_16BE {
        UTF_8
    } else if encoding == X_USER_DEFINED {
        WINDOWS_1252
    } else {
        encoding
    }
}

/// The encoding as the page says it: in a `meta` of HTML, or in the first line of XML.
fn said(bytes: &[u8]) -> Option<&[u8]> {
    let bytes = bytes.get(..SAID_WITHIN_BYTES).unwrap_or(bytes);
    if let Some(rest) = bytes.strip_prefix(b"<?xml") {
        let end = find_bytes(rest, b"?>").unwrap_or(rest.len());
        let label = value_after(rest.get(..end)?, b"encoding");
        if label.is_some() {
            return label;
        }
    }
    let mut rest = bytes;
    while let Some(at) = find_bytes(rest, b"<meta") {
        rest = rest.get(at + b"<meta".len()..)?;
        let end = rest.iter().position(|byte| *byte == b'>').unwrap_or(rest.len());
        let label = value_after(rest.get(..end)?, b"charset");
        if label.is_some() {
            return label;
        }
    }
    None
}

/// The word after `name=`, with or without quotes.
fn value_after<'a>(bytes: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let at = find_bytes(bytes, name)?;
    let rest = bytes.get(at + name.len()..)?.trim_ascii_start().strip_prefix(b"=")?.trim_ascii_start();
    let rest = rest.strip_prefix(b"\"").or_else(|| rest.strip_prefix(b"'")).unwrap_or(rest);
    let is_of_label = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_:.".contains(byte);
    let end = rest.iter().position(|byte| !is_of_label(byte)).unwrap_or(rest.len());
    rest.get(..end).filter(|label| !label.is_empty())
}

/// Where these bytes stand first; letters of ASCII are the same in both cases.
fn find_bytes(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window.eq_ignore_ascii_case(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_mark_and_page_say_the_encoding() {
        let latin = b"<title>caf\xe9</title>";
        let with = |meta: &str| [meta.as_bytes(), latin].concat();
        for (bytes, charset, end) in [
            (latin.to_vec(), Some("iso-8859-1"), "café</title>"),
            (latin.to_vec(), Some("nonsense"), "café</title>"),
            (latin.to_vec(), None, "café</title>"),
            (with("<META CHARSET='ISO-8859-2'>"), None, "café</title>"),
            (
                with("<meta http-equiv=Content-Type content=\"text/html; charset=koi8-r\">"),
                None,
                "cafИ</title>",
            ),
            (with("<?xml version=\"1.0\" encoding='windows-1251'?>"), None, "cafй</title>"),
            ("<meta charset=koi8-r>é".into(), Some("utf-8"), "é"),
            (b"\xef\xbb\xbf<meta charset=koi8-r>\xc3\xa9".to_vec(), Some("koi8-r"), "é"),
            (b"\xff\xfea\0\xe9\0".to_vec(), Some("utf-8"), "aé"),
            (b"\xfe\xff\0a\0\xe9".to_vec(), None, "aé"),
            (b"a\0\xe9\0".to_vec(), Some("utf-16le"), "aé"),
            (b"<meta charset=utf-16>\xc3\xa9".to_vec(), None, "é"),
            (b"\x82\xa0".to_vec(), Some("shift_jis"), "あ"),
        ] {
            let text = decode(&bytes, charset);
            assert!(text.ends_with(end), "{charset:?}: {text}");
        }
    }

    #[test]
    fn an_encoding_that_is_a_lie_does_not_spoil_the_text() {
        // The header lies, and the page says the truth.
        assert!(decode(b"<meta charset=iso-8859-1>caf\xe9 au lait", Some("utf-8")).ends_with("café au lait"));
        // The header names an encoding in which such bytes cannot be.
        assert_eq!(decode(b"abc", Some("utf-16le")), "abc");
        assert_eq!(decode(b"ab\xff", Some("utf-16le")), "abÿ");
        // Nobody says anything that is true.
        assert_eq!(decode(b"caf\xe9 \xff", Some("utf-8")), "caf\u{fffd} \u{fffd}");
        // Encodings that are not safe are not used.
        assert_eq!(decode(b"<script>", Some("iso-2022-kr")), "<script>");
        assert_eq!(decode(b"+ADw-script+AD4-", Some("utf-7")), "+ADw-script+AD4-");
    }

    #[test]
    fn bytes_of_any_kind_become_text() {
        for bytes in [
            &b""[..],
            b"\xff",
            b"\xfe\xff\xd8",
            b"<meta charset=",
            b"<meta charset=\"\">",
            b"<?xml encoding",
            b"\xc3",
        ] {
            for charset in [None, Some(""), Some("utf-8"), Some("utf-16be"), Some("gb18030"), Some("\u{0}")] {
                decode(bytes, charset);
            }
        }
        // A page that was cut within a character is of its encoding all the same.
        assert_eq!(decode("aé".as_bytes().split_last().unwrap().1, Some("utf-8")), "a");
        let text = decode(&vec![0xe9; 1 << 20], Some("windows-1252"));
        assert_eq!(text.len(), 2 << 20);
    }
}
