//! Our own keys: signing, and the document that tells others of them
//! ([`GET /_matrix/key/v2/server`](https://spec.matrix.org/v1.19/server-server-api/#get_matrixkeyv2server)).

use std::{fmt, sync::Arc};

use parking_lot::Mutex;
use ruma::{
    OwnedServerName, OwnedServerSigningKeyId, ServerName, ServerSigningKeyId,
    serde::{Base64, base64::Standard},
    signatures::{Ed25519KeyPair, KeyPair},
};

use crate::{
    json::{Canonical, Json},
    keys::PublicKey,
};

/// A document is valid for a day: shorter, and others would ask often; longer, and a stolen key would be believed longer.
const VALID_MS: u64 = 24 * 3_600_000;
/// A document is given out for an hour before a new one is signed, so that nobody can make us sign at each request.
const GIVEN_MS: u64 = 3_600_000;

/// A key of ours that signs nothing new.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OldKey {
    /// Its id.
    pub key_id: OwnedServerSigningKeyId,
    /// Its public half.
    pub public_key: PublicKey,
    /// We stopped using it then.
    pub expired_ms: u64,
}

/// The id of a key is not `ed25519:` and letters, digits or underscores.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the id of the signing key is {0:?}; expected ed25519: and letters, digits and underscores")]
pub struct BadKey(String);

/// Our keys.
pub struct OwnKeys {
    server: OwnedServerName,
    key_id: OwnedServerSigningKeyId,
    current: Ed25519KeyPair,
    old: Vec<OldKey>,
    /// The document that is given out, and when it was signed.
    document: Mutex<Option<(u64, Arc<str>)>>,
}

impl fmt::Debug for OwnKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnKeys")
            .field("server", &self.server)
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

impl OwnKeys {
    /// The keys of the server of this name. Errors: [`BadKey`].
    pub fn new(server: OwnedServerName, current: Ed25519KeyPair, old: Vec<OldKey>) -> Result<Self, BadKey> {
        let key_id = format!("ed25519:{}", current.version());
        let is_known = current.version().bytes().all(|it| it.is_ascii_alphanumeric() || it == b'_');
        let parsed = OwnedServerSigningKeyId::try_from(key_id.as_str()).ok().filter(|_| is_known);
        let key_id = parsed.ok_or(BadKey(key_id))?;
        Ok(Self { server, key_id, current, old, document: Mutex::new(None) })
    }

    /// Our name.
    pub fn server(&self) -> &ServerName {
        &self.server
    }

    /// The id of the key that signs.
    pub fn key_id(&self) -> &ServerSigningKeyId {
        &self.key_id
    }

    /// Our signature of a text, in unpadded base64.
    pub fn sign(&self, text: &Canonical) -> String {
        self.current.sign(text.as_str().as_bytes()).base64()
    }

    /// Adds our signature to an object ([signing JSON](https://spec.matrix.org/v1.19/appendices/#signing-json)).
    pub fn sign_object(&self, json: Json) -> Json {
        let signature = self.sign(&json.signed_part());
        let Json::Object(mut fields) = json else { return json };
        let mut signatures = match fields.remove("signatures") {
            Some(Json::Object(signatures)) => signatures,
            // What is no object holds no signatures.
            Some(_) | None => Default::default(),
        };
        let mut ours = match signatures.remove(self.server.as_str()) {
            Some(Json::Object(ours)) => ours,
            Some(_) | None => Default::default(),
        };
        ours.insert(self.key_id.to_string(), Json::Text(signature));
        signatures.insert(self.server.to_string(), Json::Object(ours));
        fields.insert("signatures".to_owned(), Json::Object(signatures));
        Json::Object(fields)
    }

    /// The document with our keys. It is valid for 23 hours or more.
    pub fn document(&self, now_ms: u64) -> Arc<str> {
        let mut document = self.document.lock();
        if let Some((signed_ms, document)) = &*document
            && (*signed_ms..signed_ms.saturating_add(GIVEN_MS)).contains(&now_ms)
        {
            return Arc::clone(document);
        }
        let made: Arc<str> = String::from(self.sign_object(self.unsigned(now_ms)).canonical()).into();
        *document = Some((now_ms, Arc::clone(&made)));
        made
    }

    fn unsigned(&self, now_ms: u64) -> Json {
        let encode = |key: &PublicKey| Json::text(Base64::<Standard, _>::new(key.as_slice()).encode());
        let current = (self.key_id.to_string(), Json::object([("key", encode(&self.current.public_key()))]));
        let old = self.old.iter().map(|it| {
            let fields = [("key", encode(&it.public_key)), ("expired_ts", Json::number(it.expired_ms))];
            (it.key_id.to_string(), Json::object(fields))
        });
        Json::object([
            ("server_name", Json::text(self.server.as_str())),
            ("valid_until_ts", Json::number(now_ms.saturating_add(VALID_MS))),
            ("verify_keys", Json::object([current])),
            ("old_verify_keys", Json::object(old)),
        ])
    }

    /// One of our own keys, if it was in use at this time.
    pub(super) fn find(&self, key_id: &ServerSigningKeyId, at_ms: Option<u64>) -> Option<PublicKey> {
        if *key_id == *self.key_id {
            return Some(self.current.public_key());
        }
        let at_ms = at_ms?;
        self.old.iter().find(|it| *it.key_id == *key_id && at_ms <= it.expired_ms).map(|it| it.public_key)
    }
}
