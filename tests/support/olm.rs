//! Keys of clients that sign what they upload: those of a device, and those with which a user signs.

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use ed25519_dalek::{Signer as _, SigningKey};
use federation::json::Json;
use serde_json::{Value, json};

use super::TestClient;

/// A key of ed25519 that signs.
pub(crate) struct Pair(SigningKey);

impl Pair {
    /// The key that is made from this text.
    pub(crate) fn new(text: &str) -> Self {
        let mut seed = [0; 32];
        for (at, byte) in text.bytes().enumerate() {
            seed[at % 32] ^= byte.wrapping_add(at as u8);
        }
        Self(SigningKey::from_bytes(&seed))
    }

    /// The public half, in base64.
    pub(crate) fn public(&self) -> String {
        STANDARD_NO_PAD.encode(self.0.verifying_key().as_bytes())
    }

    /// The object with a signature of this key, under this user and the id of this name.
    pub(crate) fn signed(&self, user_id: &str, name: &str, mut object: Value) -> Value {
        let part = Json::parse(object.to_string().as_bytes()).unwrap().signed_part();
        let signature = STANDARD_NO_PAD.encode(self.0.sign(part.as_str().as_bytes()).to_bytes());
        if object["signatures"].is_null() {
            object["signatures"] = json!({});
        }
        object["signatures"][user_id][format!("ed25519:{name}")] = signature.into();
        object
    }

    /// The identity keys of a device, signed by this key.
    pub(crate) fn device_keys(&self, client: &TestClient) -> Value {
        self.device_keys_of(&client.user_id, &client.device_id)
    }

    /// The identity keys of the device with this id, signed by this key.
    pub(crate) fn device_keys_of(&self, user: &str, device: &str) -> Value {
        let keys = json!({
            "user_id": user, "device_id": device,
            "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
            "keys": {
                format!("ed25519:{device}"): self.public(),
                format!("curve25519:{device}"): "JGLn/yafz74HB2AbPLYJWIVGnKAtqECOBf11yyXac2Y",
            },
        });
        self.signed(user, device, keys)
    }

    /// One-time keys with these names, signed by the key of a device.
    pub(crate) fn one_time<'n>(
        &self,
        client: &TestClient,
        names: impl IntoIterator<Item = &'n str>,
    ) -> Value {
        let key = |name: &str| self.signed(&client.user_id, &client.device_id, json!({ "key": name }));
        let keys = names.into_iter().map(|name| (format!("signed_curve25519:{name}"), key(name)));
        Value::Object(keys.collect())
    }

    /// This key as one with which a user signs, without signatures.
    pub(crate) fn signing_key(&self, user_id: &str, usage: &str) -> Value {
        let public = self.public();
        json!({ "user_id": user_id, "usage": [usage], "keys": { format!("ed25519:{public}"): public } })
    }
}

/// The keys with which a user signs.
pub(crate) struct Identity {
    /// The user whose keys they are.
    pub(crate) user_id: String,
    /// The key that stands for the user.
    pub(crate) master: Pair,
    /// The key that signs the user's devices.
    pub(crate) self_signing: Pair,
    /// The key that signs the master keys of others.
    pub(crate) user_signing: Pair,
}

impl Identity {
    /// The keys of a client's user that are made from this text.
    pub(crate) fn new(client: &TestClient, text: &str) -> Self {
        let pair = |kind: &str| Pair::new(&format!("{kind} {text}"));
        let user_id = client.user_id.clone();
        Self { user_id, master: pair("m"), self_signing: pair("s"), user_signing: pair("u") }
    }

    /// The object with a signature of one of these keys.
    pub(crate) fn signed(&self, by: &Pair, object: Value) -> Value {
        by.signed(&self.user_id, &by.public(), object)
    }

    /// The master key of the user.
    pub(crate) fn master_key(&self) -> Value {
        self.master.signing_key(&self.user_id, "master")
    }

    /// The self-signing key, signed by the master key.
    pub(crate) fn self_signing_key(&self) -> Value {
        self.signed(&self.master, self.self_signing.signing_key(&self.user_id, "self_signing"))
    }

    /// The user-signing key, signed by the master key.
    pub(crate) fn user_signing_key(&self) -> Value {
        self.signed(&self.master, self.user_signing.signing_key(&self.user_id, "user_signing"))
    }

    /// The body that uploads all three.
    pub(crate) fn all(&self) -> Value {
        json!({
            "master_key": self.master_key(), "self_signing_key": self.self_signing_key(),
            "user_signing_key": self.user_signing_key(),
        })
    }
}

/// The body with the password of [`TestServer::register`](super::TestServer::register).
pub(crate) fn confirmed(client: &TestClient, mut body: Value) -> Value {
    let name = client.user_id.trim_start_matches('@').split(':').next().unwrap();
    body["auth"] = json!({
        "type": "m.login.password", "password": format!("password of {name}"),
        "identifier": { "type": "m.id.user", "user": client.user_id },
    });
    body
}
