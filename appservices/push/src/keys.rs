//! Private keys in files: read once at the start, and never printed.

use std::path::Path;

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD},
};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use p256::{SecretKey, elliptic_curve::sec1::ToSec1Point, pkcs8::EncodePrivateKey};
use serde_json::json;

/// A file of a key has at most this many bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// A key that cannot be used. It says nothing of what the file holds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {why}")]
pub(crate) struct BadKey {
    file: String,
    why: String,
}

impl BadKey {
    pub(crate) fn new(file: &Path, why: impl ToString) -> Self {
        Self { file: file.display().to_string(), why: why.to_string() }
    }
}

/// Reads a file of bounded size. It is called once at the start.
pub(crate) fn read(file: &Path) -> Result<String, BadKey> {
    let size = std::fs::metadata(file).map_err(|error| BadKey::new(file, error))?.len();
    if size > FILE_BYTES_MAX {
        return Err(BadKey::new(file, "the file is too large for a key"));
    }
    std::fs::read_to_string(file).map_err(|error| BadKey::new(file, error))
}

/// A private key that signs by ES256, with its public key.
#[derive(Clone)]
pub(crate) struct Es256 {
    signing: EncodingKey,
    /// The public key as an uncompressed point: 65 bytes.
    public: Vec<u8>,
}

impl Es256 {
    /// Reads a private key of the curve P-256: PEM (PKCS #8, or as `openssl ecparam` writes it), or the 32 bytes in
    /// base64 for the web, as tools for Web Push print it.
    pub(crate) fn load(file: &Path) -> Result<Self, BadKey> {
        let expected = || {
            BadKey::new(
                file,
                "expected a private key of the curve P-256 in PEM format (\"BEGIN PRIVATE KEY\")",
            )
        };
        let text = read(file)?;
        // Tools write the parameters of the curve before the key.
        let key = text.find("-----BEGIN PRIVATE KEY").or_else(|| text.find("-----BEGIN EC PRIVATE KEY"));
        let secret = match key.and_then(|at| text.get(at..)) {
            Some(pem) => SecretKey::from_pem(pem.trim()).map_err(|_| expected())?,
            None => {
                let bytes =
                    URL_SAFE_NO_PAD.decode(text.trim().trim_end_matches('=')).map_err(|_| expected())?;
                SecretKey::from_slice(&bytes).map_err(|_| expected())?
            }
        };
        Self::of(&secret).ok_or_else(expected)
    }

    fn of(secret: &SecretKey) -> Option<Self> {
        let der = secret.to_pkcs8_der().ok()?;
        let public = secret.public_key().to_sec1_point(false).as_bytes().to_vec();
        let key = Self { signing: EncodingKey::from_ec_der(der.as_bytes()), public };
        // A key that cannot sign is found at the start.
        key.sign(None, &json!({})).map(|_| key)
    }

    /// The public key as the web writes it.
    pub(crate) fn public_text(&self) -> String {
        URL_SAFE_NO_PAD.encode(&self.public)
    }

    /// A token with these claims, and the id of the key where it has one.
    pub(crate) fn sign(&self, key_id: Option<&str>, claims: &serde_json::Value) -> Option<String> {
        let header = Header { kid: key_id.map(str::to_owned), ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, claims, &self.signing).ok()
    }
}

/// Base64 in any of its forms: apps write both alphabets, with padding and without.
pub(crate) fn decode_any(text: &str) -> Option<Vec<u8>> {
    let padded = text.ends_with('=');
    let is_web = text.contains(['-', '_']);
    match (is_web, padded) {
        (true, true) => URL_SAFE.decode(text),
        (true, false) => URL_SAFE_NO_PAD.decode(text),
        (false, true) => STANDARD.decode(text),
        (false, false) => STANDARD_NO_PAD.decode(text),
    }
    .ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use p256::pkcs8::LineEnding;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn a_key_is_read_in_each_form_in_which_tools_write_it() {
        let secret = SecretKey::from_slice(&[7; 32]).unwrap();
        let pkcs8 = secret.to_pkcs8_pem(LineEnding::LF).unwrap().to_string();
        let sec1 = secret.to_sec1_pem(LineEnding::LF).unwrap().to_string();
        let with_parameters =
            format!("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n{sec1}");
        let bare = format!("{}\n", URL_SAFE_NO_PAD.encode([7; 32]));
        let mut public = Vec::new();
        for text in [pkcs8, sec1, with_parameters, bare] {
            let file = file(&text);
            public.push(Es256::load(file.path()).unwrap_or_else(|error| panic!("{error}")).public_text());
        }
        assert!(public.iter().all(|it| *it == public[0] && it.len() == 87), "{public:?}");
    }

    #[test]
    fn a_bad_key_is_told_by_its_file_and_not_by_what_is_in_it() {
        let secret = "SECRET-SECRET-SECRET-SECRET-SECRET-SECRET-S";
        let wrong = file(secret);
        let told = Es256::load(wrong.path()).err().unwrap().to_string();
        assert!(told.contains("P-256") && told.contains(&wrong.path().display().to_string()), "{told}");
        assert!(!told.contains("SECRET"), "{told}");
        let large = file(&"x".repeat(65 << 10));
        assert!(Es256::load(large.path()).is_err());
        assert!(Es256::load(Path::new("/none")).is_err());
    }

    #[test]
    fn base64_is_read_in_each_form() {
        for text in ["-_8", "-_8=", "+/8", "+/8="] {
            assert_eq!(decode_any(text), Some(vec![0xfb, 0xff]), "{text}");
        }
        assert_eq!(decode_any("a b"), None);
    }
}
