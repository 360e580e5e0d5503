//! Signatures of keys by ed25519: whether one object was signed by a key that a device or a user has
//! ([signing JSON](https://spec.matrix.org/v1.19/appendices/#signing-json)).

use federation::{
    json::{Canonical, Json},
    keys::{PublicKey, is_signed},
};
use ruma::serde::{Base64, base64::Standard};

/// A public key has 43 characters of base64, or 44 with padding.
const KEY_CHARS_MAX: usize = 44;

/// The algorithm of all keys that sign keys.
const ED25519: &str = "ed25519";

/// The id of a key that signs, from the id of its device, or from the public key where it is a user's.
pub fn key_id(name: &str) -> String {
    format!("{ED25519}:{name}")
}

/// An object that may hold signatures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signable(Json);

impl Signable {
    /// Reads an object. None where the bytes are something else, or JSON that cannot be signed.
    pub fn parse(json: &[u8]) -> Option<Self> {
        Json::parse(json).ok().filter(|json| json.as_object().is_some()).map(Self)
    }

    /// The part that signatures cover: everything but `signatures` and `unsigned`. Two objects with the same part are the same thing,
    /// signed by one or the other.
    pub fn signed_part(&self) -> Canonical {
        self.0.signed_part()
    }

    /// The whole object, with its signatures.
    pub fn json(&self) -> Canonical {
        self.0.canonical()
    }

    /// The object with these signatures of one user alone, and without what is not signed.
    #[must_use]
    pub fn with_signatures<'s>(
        mut self,
        user_id: &str,
        signatures: impl IntoIterator<Item = (&'s str, &'s str)>,
    ) -> Self {
        if let Json::Object(fields) = &mut self.0 {
            fields.remove("signatures");
            fields.remove("unsigned");
        }
        for (key_id, signature) in signatures {
            self.add_signature(user_id, key_id, signature);
        }
        self
    }

    /// Adds a signature that a user's key of this id has made.
    pub fn add_signature(&mut self, user_id: &str, key_id: &str, signature: &str) {
        if let Some(of_user) = object_in(&mut self.0, "signatures").and_then(|all| object_in(all, user_id)) {
            let Json::Object(of_user) = of_user else { return };
            of_user.insert(key_id.to_owned(), Json::text(signature));
        }
    }

    /// The text of a field; none where there is no such field or it is no text.
    pub fn text(&self, field: &str) -> Option<&str> {
        self.0.field(field)?.as_text()
    }

    /// The texts of a field that is a list; those items are left out that are no text.
    pub fn texts(&self, field: &str) -> impl Iterator<Item = &str> {
        let items = self.0.field(field).and_then(Json::as_list).unwrap_or_default();
        items.iter().filter_map(Json::as_text)
    }

    /// The keys of the field `keys`, by their ids; those are left out that are no text.
    pub fn keys(&self) -> impl Iterator<Item = (&str, &str)> {
        texts_of(self.0.field("keys"))
    }

    /// The ed25519 key of this name in the field `keys`; none where it is no such key.
    pub fn find_key(&self, name: &str) -> Option<PublicKey> {
        let key_id = key_id(name);
        self.keys().find(|(id, _)| *id == key_id).and_then(|(_, key)| public_key(key))
    }

    /// The signatures of a user, by the ids of the keys that made them.
    pub fn signatures(&self, user_id: &str) -> impl Iterator<Item = (&str, &str)> {
        texts_of(self.0.field("signatures").and_then(|all| all.field(user_id)))
    }

    /// The signature that a user's key of this id is said to have made.
    pub fn find_signature(&self, user_id: &str, key_id: &str) -> Option<&str> {
        self.signatures(user_id).find(|(id, _)| *id == key_id).map(|(_, signature)| signature)
    }

    /// Whether a signature of this key over the object stands under this user and this id of a key.
    pub fn is_signed_by(&self, user_id: &str, key_id: &str, key: &PublicKey) -> bool {
        let signature = self.find_signature(user_id, key_id);
        signature.is_some_and(|signature| is_signed(&self.signed_part(), key, signature))
    }
}

/// The object under a name in another one, made where there is none. None where `json` is no object.
fn object_in<'j>(json: &'j mut Json, name: &str) -> Option<&'j mut Json> {
    let Json::Object(fields) = json else { return None };
    let inner = fields.entry(name.to_owned()).or_insert(Json::Null);
    if inner.as_object().is_none() {
        *inner = Json::object::<String>([]);
    }
    Some(inner)
}

fn texts_of(object: Option<&Json>) -> impl Iterator<Item = (&str, &str)> {
    let fields = object.and_then(Json::as_object).into_iter().flatten();
    fields.filter_map(|(id, text)| Some((id.as_str(), text.as_text()?)))
}

/// Reads an ed25519 key from base64, with padding or without.
pub fn public_key(text: &str) -> Option<PublicKey> {
    if text.len() > KEY_CHARS_MAX {
        return None;
    }
    Base64::<Standard>::parse(text).ok()?.as_bytes().try_into().ok()
}

#[cfg(test)]
pub(crate) mod testing {
    //! Keys made from a number, and what they sign.

    use ed25519_dalek::{Signer as _, SigningKey};
    use ruma::serde::{Base64, base64::Standard};
    use serde_json::{Value, json};

    use super::Signable;

    /// A key that signs, made from a number.
    pub(crate) struct Pair(SigningKey);

    impl Pair {
        /// The key of this number.
        pub(crate) fn new(seed: u8) -> Self {
            Self(SigningKey::from_bytes(&[seed; 32]))
        }

        /// The public half, in base64 without padding.
        pub(crate) fn public(&self) -> String {
            Base64::<Standard, _>::new(self.0.verifying_key().to_bytes()).encode()
        }

        /// Adds the signature of this key to an object.
        pub(crate) fn sign(&self, user_id: &str, name: &str, object: &mut Value) {
            let part = Signable::parse(object.to_string().as_bytes()).unwrap().signed_part();
            let signature = self.0.sign(part.as_str().as_bytes()).to_bytes();
            let signature = Base64::<Standard, _>::new(signature).encode();
            if object["signatures"].is_null() {
                object["signatures"] = json!({});
            }
            object["signatures"][user_id][super::key_id(name)] = signature.into();
        }

        /// This key as one with which a user signs, which nobody has signed.
        pub(crate) fn signing_key(&self, user_id: &str, usage: &str) -> Value {
            let public = self.public();
            json!({ "user_id": user_id, "usage": [usage], "keys": { super::key_id(&public): public } })
        }

        /// The keys of a device, signed by this one.
        pub(crate) fn device_keys(&self, user_id: &str, device_id: &str) -> Value {
            let mut keys = json!({
                "user_id": user_id, "device_id": device_id,
                "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
                "keys": {
                    super::key_id(device_id): self.public(),
                    format!("curve25519:{device_id}"): "JGLn/yafz74HB2AbPLYJWIVGnKAtqECOBf11yyXac2Y",
                },
            });
            self.sign(user_id, device_id, &mut keys);
            keys
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{testing::Pair, *};

    const ALICE: &str = "@alice:a.example";

    fn read(value: &serde_json::Value) -> Signable {
        Signable::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_signature_counts_for_its_key_its_user_and_its_text_alone() {
        let (pair, other) = (Pair::new(1), Pair::new(2));
        let mut keys = pair.device_keys(ALICE, "D");
        keys["unsigned"] = json!({ "device_display_name": "not signed" });
        let signed = read(&keys);
        let key = signed.find_key("D").unwrap();
        assert!(signed.is_signed_by(ALICE, "ed25519:D", &key));
        assert!(!signed.is_signed_by("@bob:a.example", "ed25519:D", &key));
        assert!(!signed.is_signed_by(ALICE, "ed25519:E", &key));
        assert!(!signed.is_signed_by(ALICE, "ed25519:D", &public_key(&other.public()).unwrap()));
        keys["algorithms"] = json!([]);
        assert!(!read(&keys).is_signed_by(ALICE, "ed25519:D", &key));
        for wrong in [json!("AAAA"), json!(1), json!("A".repeat(1_000)), json!(null), json!({})] {
            keys["signatures"][ALICE]["ed25519:D"] = wrong;
            assert!(!read(&keys).is_signed_by(ALICE, "ed25519:D", &key));
        }
        for wrong in [json!([]), json!(1), json!({ ALICE: [] }), json!({ ALICE: 1 })] {
            keys["signatures"] = wrong;
            assert_eq!(read(&keys).signatures(ALICE).count(), 0);
        }
    }

    #[test]
    fn signatures_are_replaced_and_added() {
        let signatures =
            json!({ ALICE: { "ed25519:A": "a", "ed25519:B": "b" }, "@bob:a.example": { "ed25519:C": "c" } });
        let key = json!({ "usage": ["master"], "signatures": signatures, "unsigned": {} });
        let mut key = read(&key).with_signatures(ALICE, [("ed25519:B", "b")]);
        let expected = json!({ "usage": ["master"], "signatures": { ALICE: { "ed25519:B": "b" } } });
        assert_eq!(key, read(&expected));
        key.add_signature("@eve:a.example", "ed25519:E", "e");
        assert_eq!(key.find_signature("@eve:a.example", "ed25519:E"), Some("e"));
        assert_eq!(key.signatures(ALICE).count(), 1);
        assert_eq!(key.with_signatures(ALICE, []), read(&json!({ "usage": ["master"] })));
        let mut odd = read(&json!({ "signatures": { ALICE: 1 } }));
        odd.add_signature(ALICE, "ed25519:A", "a");
        assert_eq!(odd, read(&json!({ "signatures": { ALICE: { "ed25519:A": "a" } } })));
    }

    #[test]
    fn keys_have_thirty_two_bytes() {
        let good = Pair::new(1).public();
        assert!(public_key(&good).is_some() && public_key(&format!("{good}=")).is_some());
        for wrong in ["", "ed25519+key", "base64publicidentitykey2", "!", &"A".repeat(42), &"A".repeat(86)] {
            assert_eq!(public_key(wrong), None, "{wrong}");
        }
        assert_eq!(Signable::parse(b"[]"), None);
        assert_eq!(Signable::parse(b"{"), None);
    }
}
