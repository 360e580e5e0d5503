//! `[media.s3]`: a bucket of an S3-compatible store, in which files of media lie in place of the local disk.

use std::{fmt, fs, io, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use url::Url;

/// A secret in a file has at most this many bytes.
const SECRET_BYTES_MAX: u64 = 4096;

/// `[media.s3]`: where the bucket is, and who may read and write it.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct S3 {
    /// The name of the bucket; empty where there is none.
    pub bucket: String,
    /// Whether new files go there; otherwise only those that lie there already are read from it.
    pub stores_new: bool,
    /// The URL of the store; empty for Amazon's in the region.
    pub endpoint: String,
    /// The region that requests are signed for.
    pub region: String,
    /// The beginning of the names of all objects, as in `media`.
    pub prefix: String,
    /// Whether the bucket stands in the path of URLs, and not before the host.
    pub path_style: bool,
    /// The id of the key with which requests are signed.
    pub access_key_id: String,
    /// The secret of that key.
    pub secret_access_key: String,
    /// A file with the secret of that key; not together with `secret_access_key`.
    pub secret_access_key_file: PathBuf,
    /// A PEM file with certificates that are trusted besides those of the system.
    pub trusted_ca_file: PathBuf,
    /// Whether those who allow it are sent to the store for a file, by a URL that is valid for a while.
    pub redirect: bool,
    /// The URL of the store as clients and other servers reach it; empty for `endpoint`.
    pub redirect_endpoint: String,
    /// For how many seconds such a URL is valid.
    pub redirect_lifetime_s: u32,
}

impl Default for S3 {
    fn default() -> Self {
        Self {
            bucket: String::new(),
            stores_new: true,
            endpoint: String::new(),
            region: "us-east-1".to_owned(),
            prefix: String::new(),
            path_style: true,
            access_key_id: String::new(),
            secret_access_key: String::new(),
            secret_access_key_file: PathBuf::new(),
            trusted_ca_file: PathBuf::new(),
            redirect: false,
            redirect_endpoint: String::new(),
            redirect_lifetime_s: 300,
        }
    }
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3")
            .field("bucket", &self.bucket)
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("prefix", &self.prefix)
            .field("secret_access_key", &if self.secret_access_key.is_empty() { "" } else { "(set)" })
            .finish_non_exhaustive()
    }
}

impl S3 {
    /// Whether there is a bucket.
    pub fn is_used(&self) -> bool {
        !self.bucket.is_empty()
    }

    /// The URL of the bucket for the server itself. None where the settings give none.
    pub fn bucket_url(&self) -> Option<Url> {
        self.bucket_at(&self.endpoint)
    }

    /// The URL of the bucket for clients and other servers. None where the settings give none.
    pub fn redirect_url(&self) -> Option<Url> {
        let given = Some(&self.redirect_endpoint).filter(|given| !given.is_empty());
        self.bucket_at(given.unwrap_or(&self.endpoint))
    }

    /// For how long a URL is valid to which somebody is sent.
    pub fn redirect_lifetime(&self) -> Duration {
        Duration::from_secs(self.redirect_lifetime_s.into())
    }

    fn bucket_at(&self, endpoint: &str) -> Option<Url> {
        let amazons;
        let endpoint = if endpoint.is_empty() {
            amazons = format!("https://s3.{}.amazonaws.com", self.region);
            amazons.as_str()
        } else {
            endpoint
        };
        let mut url = Url::parse(endpoint).ok()?;
        let is_plain = matches!(url.scheme(), "http" | "https")
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none();
        if !is_plain {
            return None;
        }
        if self.path_style {
            url.path_segments_mut().ok()?.pop_if_empty().push(&self.bucket);
        } else {
            let host = format!("{}.{}", self.bucket, url.host_str()?);
            url.set_host(Some(&host)).ok()?;
        }
        Some(url)
    }

    /// The secret of the key, wherever it stands. Errors: as of the file system.
    pub fn secret(&self) -> io::Result<String> {
        if self.secret_access_key_file.as_os_str().is_empty() {
            return Ok(self.secret_access_key.clone());
        }
        let bytes = fs::metadata(&self.secret_access_key_file)?.len();
        if bytes > SECRET_BYTES_MAX {
            return Err(io::Error::other("the file is too large for a secret"));
        }
        Ok(fs::read_to_string(&self.secret_access_key_file)?.trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url_of(endpoint: &str, path_style: bool) -> Option<String> {
        let bucket = "files".to_owned();
        let it = S3 { bucket, endpoint: endpoint.to_owned(), path_style, ..S3::default() };
        it.bucket_url().map(|url| url.to_string())
    }

    #[test]
    fn the_bucket_stands_in_the_path_or_before_the_host() {
        for (endpoint, path_style, expected) in [
            ("http://127.0.0.1:9000", true, "http://127.0.0.1:9000/files"),
            ("https://s3.example/below/", true, "https://s3.example/below/files"),
            ("https://s3.example:8443", false, "https://files.s3.example:8443/"),
            ("", true, "https://s3.us-east-1.amazonaws.com/files"),
            ("", false, "https://files.s3.us-east-1.amazonaws.com/"),
        ] {
            assert_eq!(url_of(endpoint, path_style).as_deref(), Some(expected), "{endpoint}");
        }
        for wrong in ["ftp://a.example", "a.example", "https://a:b@c.example", "https://a.example/?x"] {
            assert_eq!(url_of(wrong, true), None, "{wrong}");
        }
    }

    #[test]
    fn a_secret_is_read_from_its_file_and_never_printed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        fs::write(&file, "from the file\n").unwrap();
        let given = S3 { secret_access_key: "hidden".to_owned(), ..S3::default() };
        assert_eq!(given.secret().unwrap(), "hidden");
        assert!(!format!("{given:?}").contains("hidden"));
        let in_file = S3 { secret_access_key_file: file.clone(), ..S3::default() };
        assert_eq!(in_file.secret().unwrap(), "from the file");
        fs::write(&file, "x".repeat(5000)).unwrap();
        assert!(in_file.secret().is_err());
    }
}
