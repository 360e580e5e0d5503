//! The bounds of a request's head. The HTTP library has bounds of its own beyond these, which it enforces with an empty answer that
//! a browser does not show to its script. So they are set higher where that is possible (`server/listen.rs`), and what is between
//! is refused here, as everything else is.

use axum::body::HttpBody;
use http::{HeaderMap, HeaderName, Request, Uri, Version, header};
use ruma::api::error::ErrorKind;

use crate::error::{Exception, Refusal};

/// The path and the query of a request have at most this many bytes, because each request that is under way holds them.
pub(crate) const URI_BYTES_MAX: usize = 16 << 10;
/// The header fields of a request have at most this many bytes, names and values together, for the same reason.
pub(crate) const FIELDS_BYTES_MAX: usize = 16 << 10;
/// A request has at most this many header fields.
pub(crate) const FIELDS_MAX: usize = 100;

/// Marks a request that came over HTTP/1.1 without one `Host` field, so that it is refused with the headers that all answers have.
#[derive(Clone, Copy)]
struct WithoutHost;

/// Notes whether a request names its host as it must. Only the listener can tell, because a request that came over no connection
/// needs none.
///
/// Specification: [RFC 9112, section 3.2](https://www.rfc-editor.org/rfc/rfc9112#section-3.2).
pub(crate) fn note_host<B>(request: &mut Request<B>) {
    if request.version() == Version::HTTP_11 && request.headers().get_all(header::HOST).iter().count() != 1 {
        request.extensions_mut().insert(WithoutHost);
    }
}

/// Refuses a head that is too large (414 or 431 `M_TOO_LARGE`), that names no host (400 `M_UNKNOWN`), or whose body has a coding
/// that nobody here reads (415 or 501 `M_UNKNOWN`).
pub(crate) fn check<B: HttpBody>(request: &Request<B>) -> Result<(), Refusal> {
    check_size(request.uri(), request.headers())?;
    if request.extensions().get::<WithoutHost>().is_some() {
        let why = "A request has one header field `Host`.";
        return Err(Refusal::new(ErrorKind::Unknown, why));
    }
    if request.body().is_end_stream() {
        return Ok(());
    }
    check_coding(request.headers(), &header::CONTENT_ENCODING, "identity", Exception::ContentCoding)?;
    check_coding(request.headers(), &header::TRANSFER_ENCODING, "chunked", Exception::TransferCoding)
}

/// Refuses any other coding than this in a field.
fn check_coding(
    fields: &HeaderMap,
    name: &HeaderName,
    known: &str,
    exception: Exception,
) -> Result<(), Refusal> {
    let is_known = |coding: &[u8]| {
        let coding = coding.trim_ascii();
        coding.is_empty() || coding.eq_ignore_ascii_case(known.as_bytes())
    };
    if fields.get_all(name).iter().all(|value| value.as_bytes().split(|byte| *byte == b',').all(is_known)) {
        return Ok(());
    }
    let why = format!("The header field `{name}` may only name `{known}`; send the body as it is.");
    Err(Refusal::new(ErrorKind::Unknown, why).exception(exception))
}

fn check_size(uri: &Uri, fields: &HeaderMap) -> Result<(), Refusal> {
    let uri_bytes = uri.path_and_query().map_or(0, |it| it.as_str().len());
    if uri_bytes > URI_BYTES_MAX {
        let why =
            format!("The path and query have {uri_bytes} bytes; a request may have at most {URI_BYTES_MAX}.");
        return Err(Refusal::new(ErrorKind::TooLarge, why).exception(Exception::LongUri));
    }
    let fields_bytes: usize = fields.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if fields.len() > FIELDS_MAX || fields_bytes > FIELDS_BYTES_MAX {
        let count = fields.len();
        let why = format!(
            "The request has {count} header fields of {fields_bytes} bytes; it may have at most {FIELDS_MAX} of \
             {FIELDS_BYTES_MAX}."
        );
        return Err(Refusal::new(ErrorKind::TooLarge, why).exception(Exception::LargeFields));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_refused_beyond_its_bounds_and_not_at_them() {
        let refused = |path_bytes: usize, count: usize, value_bytes: usize| {
            let uri = Uri::try_from(format!("/{}", "a".repeat(path_bytes - 1))).unwrap();
            let mut fields = HeaderMap::new();
            for _ in 0..count {
                fields.append("x-a", "v".repeat(value_bytes).parse().unwrap());
            }
            check_size(&uri, &fields).err().map(|refusal| refusal.exception.unwrap())
        };
        assert_eq!(refused(URI_BYTES_MAX, FIELDS_MAX, 1), None);
        assert_eq!(refused(1, 1, FIELDS_BYTES_MAX - "x-a".len()), None);
        assert_eq!(refused(URI_BYTES_MAX + 1, 1, 1), Some(Exception::LongUri));
        assert_eq!(refused(1, FIELDS_MAX + 1, 1), Some(Exception::LargeFields));
        assert_eq!(refused(1, 2, FIELDS_BYTES_MAX / 2), Some(Exception::LargeFields));
    }
}
