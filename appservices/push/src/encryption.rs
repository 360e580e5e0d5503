//! Encrypts a message so that only the device reads it, and not the push service
//! ([RFC 8291](https://www.rfc-editor.org/rfc/rfc8291.html), in the form of [RFC 8188](https://www.rfc-editor.org/rfc/rfc8188.html)).

use aes_gcm::{
    Aes128Gcm, Nonce,
    aead::{Aead, KeyInit},
};
use hkdf::Hkdf;
use p256::{PublicKey, SecretKey, elliptic_curve::sec1::ToSec1Point};
use sha2::Sha256;

use crate::{keys, ports::Secrets};

/// A message has one record of this size, which every push service takes (RFC 8030, section 7.2).
const RECORD_BYTES: u32 = 4096;
/// Salt, size of the record, length of the key and the key itself stand before the record.
const HEADER_BYTES: usize = 16 + 4 + 1 + POINT_BYTES;
/// A public key as an uncompressed point.
const POINT_BYTES: usize = 65;
/// The authentication tag and the delimiter of the padding.
const OVERHEAD_BYTES: usize = 16 + 1;
/// A message may have this many bytes before it is encrypted, so that header and record have 4096 in all.
pub(crate) const PLAIN_BYTES_MAX: usize = RECORD_BYTES as usize - HEADER_BYTES - OVERHEAD_BYTES;
/// Messages are padded to a multiple of this many bytes, so that their length says little of a text.
const PADDED_TO_BYTES: usize = 256;
/// A secret is drawn again where it is no key, which happens once in 2^32 times.
const DRAWS_MAX: usize = 8;

/// The keys of a subscription: the public key and the authentication secret of the device.
pub(crate) struct Subscriber {
    public: PublicKey,
    auth: [u8; 16],
}

impl Subscriber {
    /// Reads both as apps write them, in base64. Errors: a sentence that names the field.
    pub(crate) fn read(p256dh: &str, auth: &str) -> Result<Self, &'static str> {
        const KEY: &str =
            "The public key of a subscription is a point of the curve P-256 (65 bytes) in base64.";
        let public = keys::decode_any(p256dh).filter(|it| it.len() == POINT_BYTES).ok_or(KEY)?;
        let public = PublicKey::from_sec1_bytes(&public).map_err(|_| KEY)?;
        let auth = keys::decode_any(auth).and_then(|it| it.try_into().ok());
        Ok(Self { public, auth: auth.ok_or("`data.auth` must be 16 bytes in base64.")? })
    }

    /// The encrypted message, as the body of a request with `Content-Encoding: aes128gcm`. None for a message that is too long.
    pub(crate) fn encrypt(&self, plain: &[u8], secrets: &dyn Secrets) -> Option<Vec<u8>> {
        let mut salt = [0; 16];
        secrets.fill(&mut salt);
        let own = draw(secrets)?;
        self.encrypt_with(plain, &own, salt)
    }

    fn encrypt_with(&self, plain: &[u8], own: &SecretKey, salt: [u8; 16]) -> Option<Vec<u8>> {
        if plain.len() > PLAIN_BYTES_MAX {
            return None;
        }
        let own_public = own.public_key().to_sec1_point(false);
        let their_public = self.public.to_sec1_point(false);
        let shared = own.diffie_hellman(&self.public);
        // RFC 8291, section 3.4.
        let info = [b"WebPush: info\0".as_slice(), their_public.as_bytes(), own_public.as_bytes()];
        let mut keying = [0; 32];
        Hkdf::<Sha256>::new(Some(&self.auth), shared.raw_secret_bytes())
            .expand_multi_info(&info, &mut keying)
            .ok()?;
        // RFC 8188, sections 2.2 and 2.3.
        let derived = Hkdf::<Sha256>::new(Some(&salt), &keying);
        let (mut key, mut nonce) = ([0; 16], [0; 12]);
        derived.expand(b"Content-Encoding: aes128gcm\0", &mut key).ok()?;
        derived.expand(b"Content-Encoding: nonce\0", &mut nonce).ok()?;
        let padded = (plain.len() + 1).next_multiple_of(PADDED_TO_BYTES).min(PLAIN_BYTES_MAX + 1);
        let mut record = Vec::with_capacity(padded + 16);
        record.extend_from_slice(plain);
        // The delimiter of the last record; zeros follow.
        record.push(2);
        record.resize(padded, 0);
        let sealed = Aes128Gcm::new(&key.into()).encrypt(&Nonce::from(nonce), record.as_slice()).ok()?;
        let mut message = Vec::with_capacity(HEADER_BYTES + sealed.len());
        message.extend_from_slice(&salt);
        message.extend_from_slice(&RECORD_BYTES.to_be_bytes());
        message.push(u8::try_from(POINT_BYTES).ok()?);
        message.extend_from_slice(own_public.as_bytes());
        message.extend_from_slice(&sealed);
        Some(message)
    }
}

fn draw(secrets: &dyn Secrets) -> Option<SecretKey> {
    (0..DRAWS_MAX).find_map(|_| {
        let mut bytes = [0; 32];
        secrets.fill(&mut bytes);
        SecretKey::from_slice(&bytes).ok()
    })
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

    use super::*;

    /// The example of RFC 8291, section 5 and appendix A.
    #[test]
    fn the_keys_are_those_of_the_example_of_the_rfc() {
        let decode = |text: &str| URL_SAFE_NO_PAD.decode(text).unwrap();
        let own = SecretKey::from_slice(&decode("yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw")).unwrap();
        let p256dh =
            "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4";
        let subscriber = Subscriber::read(p256dh, "BTBZMqHH6r4Tts7J_aSIgg").unwrap();
        let salt = decode("DGv6ra1nlYgDCS1FRnbzlw").try_into().unwrap();
        let plain = b"When I grow up, I want to be a watermelon";
        let message = subscriber.encrypt_with(plain, &own, salt).unwrap();
        // The example is not padded; the key stream is the same up to the delimiter, and so is all before it.
        let expected = decode(
            "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A_yl95bQpu6cVPTpK4Mqgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN",
        );
        let until = HEADER_BYTES + plain.len() + 1;
        assert_eq!(message[..until], expected[..until]);
        assert_eq!(message.len(), HEADER_BYTES + PADDED_TO_BYTES + 16);
    }

    #[test]
    fn a_message_has_at_most_4096_bytes_and_no_key_is_off_the_curve() {
        let own = SecretKey::from_slice(&[9; 32]).unwrap();
        let point = own.public_key().to_sec1_point(false);
        let p256dh = URL_SAFE_NO_PAD.encode(point.as_bytes());
        let auth = URL_SAFE_NO_PAD.encode([1; 16]);
        let subscriber = Subscriber::read(&p256dh, &auth).unwrap();
        let message = subscriber.encrypt_with(&[b'x'; PLAIN_BYTES_MAX], &own, [3; 16]).unwrap();
        assert_eq!(message.len(), 4096);
        assert!(subscriber.encrypt_with(&[b'x'; PLAIN_BYTES_MAX + 1], &own, [3; 16]).is_none());
        let mut off = point.as_bytes().to_vec();
        off[64] ^= 1;
        assert!(Subscriber::read(&URL_SAFE_NO_PAD.encode(off), &auth).is_err());
        let compressed = URL_SAFE_NO_PAD.encode(own.public_key().to_sec1_point(true).as_bytes());
        for (key, auth) in
            [(compressed.as_str(), auth.as_str()), ("", &auth), (&p256dh, "AAAA"), (&p256dh, "")]
        {
            assert!(Subscriber::read(key, auth).is_err(), "{key} {auth}");
        }
    }
}
