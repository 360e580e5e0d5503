//! Policy servers: a server that a room names, and that signs the events which it recommends for the room (server-server API,
//! "Policy Servers"). Here is what the room says of it, and its signature: whether an event has it, and how it is added.
//!
//! The signature stands beside those of the event's senders and is made with a key of its own, which nothing but the room's state
//! publishes. No id or hash of an event covers signatures, so that adding one changes neither.

use std::{borrow::Cow, collections::BTreeMap};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::Bytes;
use ed25519_dalek::{Signature, VerifyingKey};
use ruma::{OwnedServerName, room_version_rules::RoomVersionRules};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    json::{JsonRef, JsonText, Object},
    rooms::redact,
    schema::event_types::POLICY,
};

/// The id under which a policy server's signature by ed25519 stands, whichever key the room names.
pub const KEY_ID: &str = "ed25519:policy_server";

/// Base64 is read with and without padding.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
/// The alphabet of keys and signatures.
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
/// The alphabet of the key in the specification's own example of `m.room.policy`.
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// The policy server that a room names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyServer {
    name: OwnedServerName,
    /// None where the room names a text that is no key, so that no signature is ever right.
    key: Option<VerifyingKey>,
}

/// Whether events of this type and state key need the signature. The event that names the policy server does not, so that a room
/// can always get rid of it.
pub fn needs_signature(event_type: &str, state_key: Option<&str>) -> bool {
    event_type != POLICY || state_key != Some("")
}

fn decode(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).or_else(|_| URL_SAFE.decode(text)).ok()
}

impl PolicyServer {
    /// Reads the content of `m.room.policy`. `None` if it lacks a required field, so that the room uses no policy server.
    pub fn of_content(content: &str) -> Option<Self> {
        #[derive(Deserialize)]
        struct Content<'a> {
            via: OwnedServerName,
            #[serde(borrow)]
            public_keys: PublicKeys<'a>,
        }
        #[derive(Deserialize)]
        struct PublicKeys<'a> {
            #[serde(borrow)]
            ed25519: Cow<'a, str>,
        }
        let content: Content<'_> = serde_json::from_str(content).ok()?;
        let key = decode(&content.public_keys.ed25519).and_then(|key| key.try_into().ok());
        let key = key.and_then(|key| VerifyingKey::from_bytes(&key).ok());
        Some(Self { name: content.via, key })
    }

    /// The name of the server.
    pub fn name(&self) -> &OwnedServerName {
        &self.name
    }

    /// Whether the room names a key by which a signature can be right.
    pub fn has_key(&self) -> bool {
        self.key.is_some()
    }

    /// Whether an event has a signature of this server that is right. `json` is the whole event.
    pub fn has_signed(&self, json: &[u8], rules: &RoomVersionRules) -> bool {
        let verify = |signature: String| self.verify(&signed_part(json, rules)?, &signature);
        self.has_key() && self.find_signature(json).and_then(verify).is_some()
    }

    /// Finds this server's signature of an event, be it right or wrong. `json` is the whole event.
    pub fn find_signature(&self, json: &[u8]) -> Option<String> {
        let signatures = signatures(json)?;
        serde_json::from_str(signatures.get(self.name.as_str())?.get(KEY_ID)?.get()).ok()
    }

    fn verify(&self, signed: &JsonText, signature: &str) -> Option<()> {
        let signature = Signature::from_slice(&decode(signature)?).ok()?;
        self.key?.verify_strict(signed.as_str().as_bytes(), &signature).ok()
    }

    /// Adds this server's signature to an event, and leaves all others as they are. `json` is the whole event as canonical JSON.
    /// `None` if the signature is wrong, and if it would take the place of the only one by which the server vouches for its own
    /// user.
    pub fn add_signature(&self, json: &[u8], rules: &RoomVersionRules, signature: &str) -> Option<Bytes> {
        self.verify(&signed_part(json, rules)?, signature)?;
        let mut all = signatures(json)?;
        let mut fields: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(json).ok()?;
        let sender: Cow<'_, str> = serde_json::from_str(fields.get("sender")?.get()).ok()?;
        let is_of_sender = sender.split_once(':').is_some_and(|(_, server)| server == self.name.as_str());
        let of_server = all.entry(Cow::Borrowed(self.name.as_str())).or_default();
        if is_of_sender && !of_server.keys().any(|id| id != KEY_ID) {
            return None;
        }
        let text = serde_json::value::to_raw_value(signature).ok()?;
        of_server.insert(Cow::Borrowed(KEY_ID), &text);
        let mut written = Object::new();
        for (server, of_server) in &all {
            written.object(server, |object| {
                for (id, signature) in of_server {
                    object.json(id, JsonRef::from(*signature));
                }
            });
        }
        let written = RawValue::from_string(written.finish().into()).ok()?;
        fields.insert(Cow::Borrowed("signatures"), &written);
        let mut event = Object::with_capacity(json.len() + 200);
        for (name, value) in &fields {
            event.json(name, JsonRef::from(*value));
        }
        Some(event.finish().into())
    }
}

/// The signatures of an event by server and key id.
type Signatures<'a> = BTreeMap<Cow<'a, str>, BTreeMap<Cow<'a, str>, &'a RawValue>>;

fn signatures(json: &[u8]) -> Option<Signatures<'_>> {
    #[derive(Deserialize)]
    struct Signed<'a> {
        #[serde(borrow)]
        signatures: Signatures<'a>,
    }
    serde_json::from_slice::<Signed<'_>>(json).ok().map(|event| event.signatures)
}

/// The part of an event that its signatures are over.
fn signed_part(json: &[u8], rules: &RoomVersionRules) -> Option<JsonText> {
    let redacted = redact::redacted(json, rules)?;
    let fields: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(&redacted).ok()?;
    let mut signed = Object::with_capacity(redacted.len());
    for (name, value) in fields.iter().filter(|(name, _)| !matches!(&***name, "signatures" | "unsigned")) {
        signed.json(name, JsonRef::from(*value));
    }
    Some(signed.finish())
}

#[cfg(test)]
mod tests {
    use ruma::{
        CanonicalJsonObject,
        signatures::{content_hash, reference_hash},
    };
    use serde_json::{Value, json};

    use super::*;
    use crate::rooms::{
        build::{
            Draft, Setting, Signer, build,
            tests::{a_key, an_id, hashes},
        },
        versions,
    };

    const KEY: [u8; 32] = [3; 32];

    fn server(name: &str) -> PolicyServer {
        let key = ed25519_dalek::SigningKey::from_bytes(&KEY).verifying_key();
        let content = json!({ "via": name, "public_keys": { "ed25519": STANDARD.encode(key.as_bytes()) } });
        PolicyServer::of_content(&content.to_string()).unwrap()
    }

    fn signature(json: &[u8], rules: &RoomVersionRules, key: [u8; 32]) -> String {
        use ed25519_dalek::Signer as _;
        let signed = signed_part(json, rules).unwrap();
        let signature = ed25519_dalek::SigningKey::from_bytes(&key).sign(signed.as_str().as_bytes());
        STANDARD.encode(signature.to_bytes())
    }

    fn an_event(version: u8) -> Bytes {
        let rules = versions::find_rules(version).unwrap();
        let draft = Draft {
            sender: "@bob:b.example".try_into().unwrap(),
            event_type: "m.room.message".to_owned(),
            state_key: None,
            content: serde_json::from_value(json!({ "body": "h\u{e9} \u{2028} \"", "n": 7 })).unwrap(),
            redacts: None,
            sent_ms: 1_700_000_000_000,
            sticky_ms: None,
        };
        let (prev, auth) = ([an_id(2, version)], [an_id(3, version)]);
        let hashes = hashes(&[&prev, &auth]);
        let room = ruma::RoomId::parse("!room:a.example").unwrap();
        let setting =
            Setting { room_id: Some(&room), rules, prev: &prev, auth: &auth, hashes: &hashes, depth: 5 };
        let signer = Signer::new("b.example".try_into().unwrap(), a_key());
        build(&signer, &draft, &setting, version).unwrap().json
    }

    #[test]
    fn a_room_names_its_policy_server_by_a_server_and_a_text_for_the_key() {
        let read = |content: Value| PolicyServer::of_content(&content.to_string());
        for incomplete in [
            json!({}),
            json!({ "via": "p.example" }),
            json!({ "via": 5, "public_keys": { "ed25519": "x" } }),
            json!({ "via": "no server", "public_keys": { "ed25519": "x" } }),
            json!({ "via": "p.example", "public_keys": {} }),
            json!({ "via": "p.example", "public_keys": { "ed25519": 5 } }),
            json!({ "via": "p.example", "public_keys": "x" }),
            json!({ "public_keys": { "ed25519": "x" } }),
        ] {
            assert_eq!(read(incomplete.clone()), None, "{incomplete}");
        }
        let named = read(json!({ "via": "p.example", "public_keys": { "ed25519": "no key" } })).unwrap();
        assert!(!named.has_key(), "the room uses a server whose signature is never right");
        let example = "6yhHGKhCiXTSEN2ksjV7kX_N6rBQZ3Xb-M7LlC6NS-s";
        let named =
            read(json!({ "via": "policy.example.org", "public_keys": { "ed25519": example, "x": "y" } }))
                .unwrap();
        assert!(named.has_key(), "the example of the specification is read");
        assert_eq!(named.name(), "policy.example.org");
    }

    #[test]
    fn the_event_that_names_the_policy_server_is_the_only_one_that_needs_no_signature() {
        assert!(!needs_signature(POLICY, Some("")));
        assert!(needs_signature(POLICY, Some("x")) && needs_signature(POLICY, None));
        assert!(needs_signature("m.room.message", None) && needs_signature("m.room.member", Some("")));
    }

    #[test]
    fn a_signature_that_is_added_changes_neither_id_nor_hash_and_survives_redaction() {
        for version in versions::LOWEST..=versions::HIGHEST {
            let rules = versions::find_rules(version).unwrap();
            let (event, named) = (an_event(version), server("p.example"));
            assert!(!named.has_signed(&event, rules));
            let signed =
                named.add_signature(&event, rules, &signature(&event, rules, KEY)).unwrap_or_default();
            assert!(named.has_signed(&signed, rules), "{version}");
            let object = |json: &[u8]| serde_json::from_slice::<CanonicalJsonObject>(json).unwrap();
            let (before, after) = (object(&event), object(&signed));
            assert_eq!(reference_hash(&before, rules).unwrap(), reference_hash(&after, rules).unwrap());
            assert_eq!(content_hash(&before).unwrap(), content_hash(&after).unwrap());
            assert_eq!(serde_json::to_vec(&after).unwrap(), signed, "it is canonical JSON");
            let value: Value = serde_json::from_slice(&signed).unwrap();
            let before: Value = serde_json::from_slice(&event).unwrap();
            assert_eq!(value["signatures"]["b.example"], before["signatures"]["b.example"]);
            let redacted = redact::redacted(&signed, rules).unwrap();
            assert!(named.has_signed(&redacted, rules));
            assert_eq!(redact::redacted(&redacted, rules).unwrap(), redacted);
            // Who has another key has signed nothing.
            let other = server("other.example");
            assert!(!other.has_signed(&signed, rules));
            let wrong = signature(&event, rules, [4; 32]);
            assert_eq!(named.add_signature(&event, rules, &wrong), None);
            assert_eq!(named.add_signature(&event, rules, "no signature"), None);
        }
    }

    #[test]
    fn signatures_of_the_senders_server_stay() {
        let rules = versions::find_rules(11).unwrap();
        let (event, named) = (an_event(11), server("b.example"));
        let signed = named.add_signature(&event, rules, &signature(&event, rules, KEY)).unwrap();
        let value: Value = serde_json::from_slice(&signed).unwrap();
        let ids: Vec<_> = value["signatures"]["b.example"].as_object().unwrap().keys().collect();
        assert_eq!(ids, ["ed25519:k", KEY_ID]);
        // An older signature of the policy server gives way to a newer one.
        let mut old = value.clone();
        old["signatures"]["b.example"][KEY_ID] = json!("x");
        let again = old.to_string();
        assert!(!named.has_signed(again.as_bytes(), rules));
        let again = named.add_signature(again.as_bytes(), rules, &signature(&event, rules, KEY)).unwrap();
        assert_eq!(again, signed);
        // The only signature of the sender's server is not replaced, whatever its name.
        let mut only: Value = serde_json::from_slice(&event).unwrap();
        let own = only["signatures"]["b.example"]["ed25519:k"].clone();
        only["signatures"]["b.example"] = json!({ KEY_ID: own });
        let text = only.to_string();
        assert_eq!(named.add_signature(text.as_bytes(), rules, &signature(&event, rules, KEY)), None);
    }

    #[test]
    fn what_is_no_event_has_no_signature() {
        let rules = versions::find_rules(11).unwrap();
        let named = server("p.example");
        for odd in ["", "[]", "{}", r#"{"type":"x","content":{},"signatures":[]}"#, "{\"signatures\":{}}"] {
            assert!(!named.has_signed(odd.as_bytes(), rules), "{odd}");
            assert_eq!(named.add_signature(odd.as_bytes(), rules, "x"), None, "{odd}");
        }
    }
}
