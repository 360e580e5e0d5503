//! URLs by which anybody may read one object of a bucket for a while, signed with the server's key
//! ([AWS Signature Version 4, query parameters](https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html)).
//!
//! The store answers such a request with the header fields that the URL names, and the signature covers them: whoever is given the URL
//! cannot have the file shown as something else.

use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest as _, Sha256};
use url::Url;

/// Signs URLs of the objects of a bucket.
pub struct Presigner {
    bucket: Url,
    region: String,
    key_id: String,
    secret: String,
    lifetime: Duration,
}

/// The header fields with which the store answers.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    /// The content type of the file.
    pub content_type: &'a str,
    /// Says whether it is shown in place, and its name.
    pub disposition: &'a str,
    /// Says who may keep a copy, and for how long.
    pub cached: &'a str,
}

impl Presigner {
    /// Signs URLs below that of the bucket with this key: its id and its secret. They are valid for this long.
    pub fn new(bucket: Url, region: &str, (key_id, secret): (&str, &str), lifetime: Duration) -> Self {
        Self {
            bucket,
            region: region.to_owned(),
            key_id: key_id.to_owned(),
            secret: secret.to_owned(),
            lifetime,
        }
    }

    /// The URL of the object of this name, from now on: milliseconds since the epoch. The name must need no escapes.
    pub fn url(&self, name: &str, shown: Shown<'_>, now_ms: u64) -> String {
        let fields = [
            ("response-cache-control", shown.cached),
            ("response-content-disposition", shown.disposition),
            ("response-content-type", shown.content_type),
        ];
        self.sign(name, &fields, now_ms)
    }

    fn sign(&self, name: &str, fields: &[(&str, &str)], now_ms: u64) -> String {
        let (day, time) = date(now_ms);
        let scope = format!("{day}/{}/s3/aws4_request", self.region);
        let lifetime_s = self.lifetime.as_secs().to_string();
        let credential = format!("{}/{scope}", self.key_id);
        // Names in capitals come before those in small letters, so that this is the order that is signed.
        let own = [
            ("X-Amz-Algorithm", "AWS4-HMAC-SHA256"),
            ("X-Amz-Credential", credential.as_str()),
            ("X-Amz-Date", time.as_str()),
            ("X-Amz-Expires", lifetime_s.as_str()),
            ("X-Amz-SignedHeaders", "host"),
        ];
        let pairs = own.iter().chain(fields).map(|(name, value)| format!("{name}={}", escaped(value)));
        let query = pairs.collect::<Vec<_>>().join("&");
        let base = self.bucket.as_str().trim_end_matches('/');
        let path = format!("{}/{name}", self.bucket.path().trim_end_matches('/'));
        let host = self.bucket.host_str().unwrap_or_default();
        let host = self.bucket.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
        let request = format!("GET\n{path}\n{query}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD");
        let digest = hex(&Sha256::digest(request.as_bytes()));
        let signed = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{digest}");
        let secret = format!("AWS4{}", self.secret);
        let parts = [day.as_str(), self.region.as_str(), "s3", "aws4_request", signed.as_str()];
        let signature = parts.iter().fold(secret.into_bytes(), |key, part| mac(&key, part));
        format!("{base}/{name}?{query}&X-Amz-Signature={}", hex(&signature))
    }
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else {
        debug_assert!(false, "keys of any length are taken");
        return Vec::new();
    };
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A text as it stands in a query that is signed: each byte but letters, digits and four signs is escaped.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

/// The day as `20130524`, and the time as `20130524T000000Z`.
fn date(now_ms: u64) -> (String, String) {
    let seconds = now_ms / 1000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let day = format!("{year:04}{month:02}{day:02}");
    let time = format!("{day}T{:02}{:02}{:02}Z", second / 3600, second / 60 % 60, second % 60);
    (day, time)
}

/// The year, month and day of a day that is counted since the epoch.
fn civil(days: u64) -> (u64, u64, u64) {
    // A year that begins in March has its leap day at its end; 400 of them have 146,097 days, and the epoch is day 719,468 of them.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn presigner(bucket: &str) -> Presigner {
        let key = ("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY");
        Presigner::new(bucket.parse().unwrap(), "us-east-1", key, Duration::from_secs(86_400))
    }

    /// The example of Amazon's own documentation.
    #[test]
    fn a_url_is_signed_as_the_store_checks_it() {
        let url =
            presigner("https://examplebucket.s3.amazonaws.com/").sign("test.txt", &[], 1_369_353_600_000);
        let expected = "https://examplebucket.s3.amazonaws.com/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256\
             &X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3%2Faws4_request\
             &X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host\
             &X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404";
        assert_eq!(url, expected);
    }

    #[test]
    fn the_fields_of_the_answer_are_signed_with_the_url() {
        let at = |content_type| {
            let shown =
                Shown { content_type, disposition: "inline; filename=\"a b.png\"", cached: "private" };
            presigner("http://127.0.0.1:9000/files").url("ab/cd/abcd", shown, 0)
        };
        let (png, html) = (at("image/png"), at("text/html"));
        assert!(png.starts_with("http://127.0.0.1:9000/files/ab/cd/abcd?X-Amz-Algorithm="), "{png}");
        assert!(
            png.contains("&response-content-disposition=inline%3B%20filename%3D%22a%20b.png%22&"),
            "{png}"
        );
        assert!(png.contains("&response-content-type=image%2Fpng&X-Amz-Signature="), "{png}");
        assert!(!png.contains(' ') && !png.contains('"'));
        let signature = |url: &str| url.rsplit_once('=').unwrap().1.to_owned();
        assert_ne!(signature(&png), signature(&html));
    }

    #[test]
    fn days_are_those_of_the_calendar() {
        for (ms, expected) in [
            (0, "19700101T000000Z"),
            (951_782_399_000, "20000228T235959Z"),
            (951_782_400_000, "20000229T000000Z"),
            (1_709_251_199_000, "20240229T235959Z"),
            (1_709_251_200_000, "20240301T000000Z"),
            (4_102_444_799_000, "20991231T235959Z"),
        ] {
            assert_eq!(date(ms).1, expected);
        }
    }
}
