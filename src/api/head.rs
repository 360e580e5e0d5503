//! The bounds of a request's head. The HTTP library has bounds of its own beyond these, which it enforces with an empty answer that
//! a browser does not show to its script. So they are set higher where that is possible (`server/listen.rs`), and what is between
//! is refused here, as everything else is.

use http::{HeaderMap, Uri};
use ruma::api::error::ErrorKind;

use crate::error::{Exception, Refusal};

/// The path and the query of a request have at most this many bytes, because each request that is under way holds them.
pub(crate) const URI_BYTES_MAX: usize = 16 << 10;
/// The header fields of a request have at most this many bytes, names and values together, for the same reason.
pub(crate) const FIELDS_BYTES_MAX: usize = 16 << 10;
/// A request has at most this many header fields.
pub(crate) const FIELDS_MAX: usize = 100;

/// Refuses a head that is too large: 414 or 431 `M_TOO_LARGE`.
pub(crate) fn check(uri: &Uri, fields: &HeaderMap) -> Result<(), Refusal> {
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
            check(&uri, &fields).err().map(|refusal| refusal.exception.unwrap())
        };
        assert_eq!(refused(URI_BYTES_MAX, FIELDS_MAX, 1), None);
        assert_eq!(refused(1, 1, FIELDS_BYTES_MAX - "x-a".len()), None);
        assert_eq!(refused(URI_BYTES_MAX + 1, 1, 1), Some(Exception::LongUri));
        assert_eq!(refused(1, FIELDS_MAX + 1, 1), Some(Exception::LargeFields));
        assert_eq!(refused(1, 2, FIELDS_BYTES_MAX / 2), Some(Exception::LargeFields));
    }
}
