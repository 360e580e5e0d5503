//! How long a well-known answer may be kept, from its headers
//! ([server discovery](https://spec.matrix.org/v1.19/server-server-api/#server-discovery), step 3, and RFC 9111).

use http::{
    HeaderMap,
    header::{AGE, CACHE_CONTROL, DATE, EXPIRES},
};

const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 60 * MINUTE_MS;
/// What the specification recommends where the headers say nothing.
const DEFAULT_MS: u64 = 24 * HOUR_MS;
/// What it recommends as the longest.
pub(super) const MOST_MS: u64 = 48 * HOUR_MS;
/// An answer is kept at least this long, also where it says that it may not be: a request each time would cost both sides.
const LEAST_MS: u64 = 5 * MINUTE_MS;

/// The time for which an answer may be kept, in milliseconds, between five minutes and 48 hours.
pub(super) fn kept_ms(headers: &HeaderMap, now_ms: u64) -> u64 {
    told_ms(headers, now_ms).unwrap_or(DEFAULT_MS).clamp(LEAST_MS, MOST_MS)
}

/// What the headers say, if they do: `Cache-Control` counts before `Expires`.
fn told_ms(headers: &HeaderMap, now_ms: u64) -> Option<u64> {
    let mut max_age_ms = None;
    for value in headers.get_all(CACHE_CONTROL).iter().filter_map(|it| it.to_str().ok()) {
        for directive in value.split(',') {
            let (name, value) = directive.split_once('=').unwrap_or((directive, ""));
            let name = name.trim().to_ascii_lowercase();
            if name == "no-store" || name == "no-cache" {
                return Some(0);
            }
            if name == "max-age" {
                let seconds = value.trim().trim_matches('"');
                // Digits that are too many for a number mean "very long"; anything else means nothing.
                let is_number = !seconds.is_empty() && seconds.bytes().all(|it| it.is_ascii_digit());
                max_age_ms =
                    is_number.then(|| seconds.parse::<u64>().unwrap_or(u64::MAX).saturating_mul(1000));
            }
        }
    }
    if let Some(max_age_ms) = max_age_ms {
        let age_s: u64 = text(headers, &AGE).and_then(|it| it.trim().parse().ok()).unwrap_or(0);
        return Some(max_age_ms.saturating_sub(age_s.saturating_mul(1000)));
    }
    let expires = text(headers, &EXPIRES)?;
    // A date that is none means that the answer has expired (RFC 9111, section 5.3).
    let Some(expires_ms) = date_ms(expires) else { return Some(0) };
    let sent_ms = text(headers, &DATE).and_then(date_ms).unwrap_or(now_ms);
    Some(expires_ms.saturating_sub(sent_ms))
}

fn text<'h>(headers: &'h HeaderMap, name: &http::HeaderName) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn date_ms(text: &str) -> Option<u64> {
    let since = httpdate::parse_http_date(text).ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    u64::try_from(since.as_millis()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(headers: &[(&'static str, &str)]) -> u64 {
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        kept_ms(&headers.collect(), 784_111_777_000) / MINUTE_MS
    }

    #[test]
    fn headers_say_how_long_an_answer_is_kept() {
        let day = 24 * 60;
        assert_eq!(kept(&[]), day);
        assert_eq!(kept(&[("cache-control", "public, Max-Age=3600")]), 60);
        assert_eq!(kept(&[("cache-control", "max-age=\"3600\""), ("age", "1800")]), 30);
        assert_eq!(kept(&[("cache-control", "max-age=3600, no-store")]), 5);
        assert_eq!(kept(&[("cache-control", "private"), ("cache-control", "no-cache")]), 5);
        assert_eq!(kept(&[("cache-control", "max-age=1")]), 5);
        assert_eq!(kept(&[("cache-control", "max-age=99999999999999999999999")]), 2 * day);
        assert_eq!(kept(&[("cache-control", "max-age=-5")]), day);
        assert_eq!(kept(&[("cache-control", "max-age")]), day);
        assert_eq!(kept(&[("cache-control", "max-age=3600"), ("age", "1e400")]), 60);
    }

    #[test]
    fn expires_counts_where_cache_control_says_nothing() {
        let date = ("date", "Sun, 06 Nov 1994 08:49:37 GMT");
        let expires = ("expires", "Sun, 06 Nov 1994 09:49:37 GMT");
        assert_eq!(kept(&[date, expires]), 60);
        assert_eq!(kept(&[expires]), 60);
        assert_eq!(kept(&[expires, ("cache-control", "max-age=600")]), 10);
        assert_eq!(kept(&[("expires", "0")]), 5);
        assert_eq!(kept(&[("expires", "Sun, 06 Nov 1950 09:49:37 GMT")]), 5);
    }
}
