//! Content types and names of files, as clients and other servers send them, and as they are shown so that nothing of them runs.
//!
//! Specification: client-server API, "Serving inline content".

use ruma::http_headers::{ContentDisposition, ContentDispositionType};

use crate::error::{Refusal, Result};

/// The type of bytes of which nobody has said another one.
pub const OCTET_STREAM: &str = "application/octet-stream";
/// A content type has at most this many bytes.
pub const TYPE_BYTES_MAX: usize = 255;
/// The name of a file has at most this many bytes.
pub const NAME_BYTES_MAX: usize = 1024;

/// The types that a browser may show in place, because nothing of them runs where the type is believed.
const INLINE: [&str; 26] = [
    "text/css",
    "text/plain",
    "text/csv",
    "application/json",
    "application/ld+json",
    "image/jpeg",
    "image/gif",
    "image/png",
    "image/apng",
    "image/webp",
    "image/avif",
    "video/mp4",
    "video/webm",
    "video/ogg",
    "video/quicktime",
    "audio/mp4",
    "audio/webm",
    "audio/aac",
    "audio/mpeg",
    "audio/ogg",
    "audio/wave",
    "audio/wav",
    "audio/x-wav",
    "audio/x-pn-wav",
    "audio/flac",
    "audio/x-flac",
];

/// The type without its parameters, in small letters.
pub fn essence(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Whether a browser may show bytes of this type in place.
pub fn is_inline(content_type: &str) -> bool {
    INLINE.contains(&essence(content_type).as_str())
}

/// The content type to keep: what was sent, if that is one, or that of bytes of any kind.
pub fn kept_type(sent: Option<&str>) -> String {
    sent.filter(|sent| is_type(sent)).unwrap_or(OCTET_STREAM).to_owned()
}

/// Whether a text is one content type and nothing else. Browsers read a list of types behind a comma, and believe its last one, so that
/// parameters are held to their grammar, too ([RFC 9110, section 8.3.1](https://www.rfc-editor.org/rfc/rfc9110#section-8.3.1)).
fn is_type(text: &str) -> bool {
    let (essence, parameters) = text.split_once(';').map_or((text, None), |(it, rest)| (it, Some(rest)));
    text.len() <= TYPE_BYTES_MAX
        && essence.trim().split_once('/').is_some_and(|(kind, rest)| is_token(kind) && is_token(rest))
        && parameters.is_none_or(are_parameters)
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|it| it.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&it))
}

/// Whether a text is a list of parameters, such as `charset=utf-8; a="b"`. A quoted value may have none of the characters that end it
/// elsewhere, because not everybody reads quotes.
fn are_parameters(text: &str) -> bool {
    let is_quoted = |value: &str| {
        let inner = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        let is_plain = |it: u8| (b' '..=b'~').contains(&it) && !b"\"\\,;".contains(&it);
        inner.is_some_and(|inner| inner.bytes().all(is_plain))
    };
    text.split(';').map(str::trim).all(|parameter| {
        parameter.is_empty()
            || parameter
                .split_once('=')
                .is_some_and(|(name, value)| is_token(name) && (is_token(value) || is_quoted(value)))
    })
}

/// The name of a file to keep; none for an empty one. Errors: 400 `M_INVALID_PARAM` for a name that is too long.
pub fn kept_name(sent: Option<String>) -> Result<Option<String>> {
    let Some(name) = sent.filter(|name| !name.is_empty()) else { return Ok(None) };
    if name.len() > NAME_BYTES_MAX {
        let why = format!("`filename` has {} bytes; at most {NAME_BYTES_MAX} are kept.", name.len());
        return Err(Refusal::invalid_param(why).into());
    }
    Ok(Some(name))
}

/// The name in a `Content-Disposition` of another server; none where there is no name, or none that is kept here.
pub fn name_in(disposition: &[u8]) -> Option<String> {
    let disposition = ContentDisposition::try_from(disposition).ok()?;
    disposition.filename.filter(|name| !name.is_empty() && name.len() <= NAME_BYTES_MAX)
}

/// The `Content-Disposition` of bytes of this type: they are shown in place only where nothing of them runs.
pub fn disposition(content_type: &str, name: Option<&str>) -> String {
    let kind = match is_inline(content_type) {
        true => ContentDispositionType::Inline,
        false => ContentDispositionType::Attachment,
    };
    // A client that saves the file by its name alone must not leave the folder that it saves it in.
    let name = name.map(|name| name.rsplit(['/', '\\']).next().unwrap_or_default());
    let name = name.filter(|name| !matches!(*name, "" | "." | ".."));
    ContentDisposition::new(kind).with_filename(name.map(str::to_owned)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_specification_lists_is_shown_in_place() {
        for inline in ["image/png", "Text/Plain; charset=utf-8", "audio/x-flac ;a=b"] {
            assert!(disposition(inline, None).starts_with("inline"), "{inline}");
        }
        for inert in
            ["text/html", "image/svg+xml", "application/xhtml+xml", "application/pdf", "text/xml", ""]
        {
            assert!(disposition(inert, None).starts_with("attachment"), "{inert}");
        }
    }

    #[test]
    fn names_break_out_of_no_header() {
        assert_eq!(disposition("image/png", Some("a.png")), "inline; filename=a.png");
        assert_eq!(
            disposition("x/y", Some("a\"\r\nSet-Cookie: b")),
            "attachment; filename=\"a\\\"Set-Cookie: b\""
        );
        for path in ["../../a.html", "..\\a.html", "/a.html"] {
            assert_eq!(disposition("x/y", Some(path)), "attachment; filename=a.html", "{path}");
        }
        for none in ["..", "a/", "a/.", ""] {
            assert_eq!(disposition("x/y", Some(none)), "attachment", "{none}");
        }
        let odd = disposition("x/y", Some("é\r\n\".txt"));
        assert!(odd.starts_with("attachment; filename*=utf-8''%C3%A9%0D%0A%22"), "{odd}");
        assert!(http::HeaderValue::from_str(&odd).is_ok());
        assert_eq!(name_in(odd.as_bytes()).as_deref(), Some("é\r\n\".txt"));
        assert_eq!(name_in(b"attachment"), None);
        assert_eq!(name_in(b"\xff\xfe"), None);
    }

    #[test]
    fn a_type_that_is_none_is_not_kept() {
        for right in ["image/png", "text/plain; charset=\"utf-8\"", "application/vnd.a+b"] {
            assert_eq!(kept_type(Some(right)), right);
        }
        let long = format!("a/{}", "b".repeat(TYPE_BYTES_MAX));
        for wrong in ["", "png", "/", "a/", "image/png\r\nX: y", "a b/c", "é/x", &long]
            .into_iter()
            // A browser believes the last one of a list.
            .chain([
                "text/plain;,text/html",
                "text/plain;a=\",text/html\"",
                "text/plain, text/html",
                "a/b; c",
                "a/b; c=\"",
            ])
        {
            assert_eq!(kept_type(Some(wrong)), OCTET_STREAM, "{wrong:?}");
        }
        assert_eq!(kept_type(None), OCTET_STREAM);
        assert!(kept_name(Some("a".repeat(NAME_BYTES_MAX + 1))).is_err());
        assert_eq!(kept_name(Some(String::new())).unwrap(), None);
    }
}
