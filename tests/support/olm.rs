//! Keys of devices that sign what they upload.

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use ed25519_dalek::{Signer as _, SigningKey};
use federation::json::Json;
use serde_json::{Value, json};

use super::TestClient;

/// An ed25519 key.
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
        let (user, device) = (&*client.user_id, &*client.device_id);
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
}
