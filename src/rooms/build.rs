//! Building our own events: canonical JSON, content hash, signature, id.
//!
//! An event is written three times, each time with its fields in canonical order: without `hashes` and `signatures` for the
//! content hash; redacted for the signature, of which the event's id is the hash; and whole, to be kept. In room versions 1 and 2 this
//! server chooses the id before, and the event says it.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use ruma::{
    CanonicalJsonObject, EventId, OwnedEventId, OwnedServerName, OwnedUserId, RoomId, UserId,
    room_version_rules::RoomVersionRules,
    signatures::{Ed25519KeyPair, KeyPair as _},
};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use crate::{
    error::Refusal,
    ids::RoomNum,
    json::{JsonRef, JsonText, Object},
    rooms::{
        event::{self, Event},
        redact,
        reference::{self, Hashes},
    },
    schema::{
        event_types::{MEMBER, STICKY},
        rooms::{EventHash, EventKey},
        state::DERIVED,
    },
};

/// An event has at most this many bytes as canonical JSON, signatures included.
pub const EVENT_BYTES_MAX: usize = 65_536;
/// Ids, types and state keys have at most this many bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// The ids that this server chooses are made of this many bytes of a hash: an id has at most 255 bytes, and the name of its server
/// up to 230.
const CHOSEN_BYTES: usize = 15;

/// Signs events in the name of this server.
#[derive(Clone)]
pub struct Signer {
    server: OwnedServerName,
    key: Arc<Ed25519KeyPair>,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Signer({} {})", self.server, self.key.version())
    }
}

impl Signer {
    /// Signs as `server` with this key.
    pub fn new(server: OwnedServerName, key: Arc<Ed25519KeyPair>) -> Self {
        Self { server, key }
    }

    /// The server in whose name it signs.
    pub fn server(&self) -> &OwnedServerName {
        &self.server
    }

    /// Adds this server's signature to an event that another server has built, because this one vouches for its sender. Nothing
    /// of the event is checked here. Refuses bytes that are not canonical JSON with an object of signatures: 400 `M_BAD_JSON`.
    pub fn countersign(&self, json: &[u8], rules: &RoomVersionRules) -> Result<Bytes, Refusal> {
        let odd =
            || Refusal::bad_json("The event is not in the form of an event that another server signed.");
        let mut event: CanonicalJsonObject = serde_json::from_slice(json).map_err(|_| odd())?;
        event.remove("unsigned");
        let mut signed = redact::cut(event.clone(), rules).ok_or_else(odd)?;
        signed.remove("signatures");
        let write = |event: &CanonicalJsonObject| serde_json::to_vec(event).map_err(|_| odd());
        self.cosign(&write(&signed)?, &write(&event)?).ok_or_else(odd)
    }

    /// Adds our signature to an event of another server. `signed` is the part of it that is signed, `json` the whole event, both as
    /// canonical JSON. `None` where that is no event.
    pub(in crate::rooms) fn cosign(&self, signed: &[u8], json: &[u8]) -> Option<Bytes> {
        let mut fields: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_slice(json).ok()?;
        let signatures = fields.get("signatures")?;
        let mut all: BTreeMap<String, BTreeMap<String, Box<RawValue>>> =
            serde_json::from_str(signatures.get()).ok()?;
        let signature = self.key.sign(signed);
        let own = serde_json::value::to_raw_value(&signature.base64()).ok()?;
        all.entry(self.server.to_string()).or_default().insert(signature.id(), own);
        let all = serde_json::value::to_raw_value(&all).ok()?;
        fields.insert(Cow::Borrowed("signatures"), &all);
        let mut event = Object::with_capacity(json.len() + 200);
        for (name, value) in &fields {
            event.json(name, JsonRef::from(*value));
        }
        Some(event.finish().into())
    }

    /// Gives the `signatures` of an event: ours, over these bytes.
    fn signatures(&self, signed: &[u8]) -> JsonText {
        let signature = self.key.sign(signed);
        let (mut own, mut all) = (Object::new(), Object::new());
        own.text(&signature.id(), &signature.base64());
        all.json(self.server.as_str(), &own.finish());
        all.finish()
    }
}

/// A draft says what an event is to contain. The events it cites, those that allow it and its depth are worked out when
/// it is built.
#[derive(Clone, Debug)]
pub struct Draft {
    /// The sender, a user of this server.
    pub sender: OwnedUserId,
    /// The event's type, of at most [`NAME_BYTES_MAX`] bytes.
    pub event_type: String,
    /// The state key, of at most [`NAME_BYTES_MAX`] bytes, if it is a state event.
    pub state_key: Option<String>,
    /// The event's content. Canonical JSON has no floats and no integers beyond 2^53 - 1.
    pub content: CanonicalJsonObject,
    /// The event that a redaction redacts.
    pub redacts: Option<OwnedEventId>,
    /// The time of sending, in milliseconds since the epoch.
    pub sent_ms: u64,
    /// For how many milliseconds the event stays sticky, if it is a sticky event (MSC4354).
    pub sticky_ms: Option<u64>,
}

impl Draft {
    /// Whether by this a user ends their own part in the room: they leave, refuse an invitation or withdraw a knock.
    pub(in crate::rooms) fn ends_own_part(&self) -> bool {
        self.event_type == MEMBER
            && self.state_key.as_deref() == Some(self.sender.as_str())
            && self.content.get("membership").and_then(|it| it.as_str()) == Some("leave")
    }

    /// Whether another draft says the same, be it at another time.
    pub(in crate::rooms) fn says_same(&self, other: &Self) -> bool {
        let Self { sender, event_type, state_key, content, redacts, sent_ms: _, sticky_ms } = self;
        *sender == other.sender
            && *event_type == other.event_type
            && *state_key == other.state_key
            && *content == other.content
            && *redacts == other.redacts
            && *sticky_ms == other.sticky_ms
    }

    /// Gives the content as JSON. Refuses content that cannot be written: 400 `M_BAD_JSON`.
    pub fn raw_content(&self) -> Result<Box<RawValue>, Refusal> {
        raw(&self.content)
    }

    /// Drafts a state event, which redacts nothing.
    pub fn state(
        sender: OwnedUserId,
        event_type: &str,
        state_key: &str,
        content: CanonicalJsonObject,
        sent_ms: u64,
    ) -> Self {
        let state_key = Some(state_key.to_owned());
        let event_type = event_type.to_owned();
        Self { sender, event_type, state_key, content, redacts: None, sent_ms, sticky_ms: None }
    }
}

/// The place in a room's graph at which an event is built.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// The room's id; `None` for a create event whose hash will be the room's id.
    pub room_id: Option<&'a RoomId>,
    /// The rules of the room's version.
    pub rules: &'a RoomVersionRules,
    /// The ids of the events it cites.
    pub prev: &'a [OwnedEventId],
    /// The ids of the events that allow it.
    pub auth: &'a [OwnedEventId],
    /// The hashes of all these events, in room versions in which events are cited with them.
    pub hashes: &'a Hashes,
    /// The event's depth: one more than the deepest event that it cites has.
    pub depth: u64,
}

/// An event that is built and signed.
#[derive(Clone, Debug)]
pub struct Built {
    /// The event's reference hash, which its id is written from since room version 3.
    pub hash: EventHash,
    /// The event as canonical JSON, signatures included.
    pub json: Bytes,
    /// The event of that JSON, parsed.
    pub event: Event,
}

impl Built {
    /// The key by which the event is found in its room, which is of this version.
    pub fn key(&self, room: RoomNum, version: u8) -> EventKey {
        event::key(self.hash, &self.event.id, room, version)
    }
}

/// Builds and signs an event. Refuses an event that is too large (413 `M_TOO_LARGE`), and a type of derived state (400
/// `M_INVALID_PARAM`).
pub fn build(signer: &Signer, draft: &Draft, setting: &Setting<'_>, version: u8) -> Result<Built, Refusal> {
    let names = [Some(&draft.event_type), draft.state_key.as_ref()];
    if names.into_iter().flatten().any(|name| name.len() > NAME_BYTES_MAX) {
        return Err(Refusal::too_large("An event's type and state key have at most 255 bytes."));
    }
    if draft.event_type.starts_with(DERIVED) {
        return Err(Refusal::invalid_param(
            "Clients cannot send events of this type: the server keeps it for itself.",
        ));
    }
    let rules = setting.rules;
    let mut content = draft.content.clone();
    let redacts_in_content = rules.redaction.content_field_redacts;
    if let Some(redacts) = &draft.redacts
        && redacts_in_content
    {
        content.insert("redacts".to_owned(), redacts.as_str().into());
    }
    let whole_content = raw(&content)?;
    redact::cut_content(&mut content, rules, &draft.event_type);
    let redacted_content = raw(&content)?;

    let cited = |ids| reference::cited(ids, version, setting.hashes);
    let (auth, prev) = cited(setting.auth)
        .zip(cited(setting.prev))
        .ok_or_else(|| Refusal::bad_json("The event cites another one whose hash is not known."))?;
    let redacts = draft.redacts.as_deref().filter(|_| !redacts_in_content);
    let mut fields = Fields { id: None, auth, prev, redacts, draft, setting };
    if event::are_ids_chosen(version) {
        fields.id = Some(choose_id(&draft.sender, &fields.write(&whole_content, true, None, None))?);
    }
    let content_hash = Sha256::digest(fields.write(&whole_content, true, None, None).as_str());
    let mut hashes = Object::new();
    hashes.text("sha256", &STANDARD_NO_PAD.encode(content_hash));
    let hashes = hashes.finish();
    let redacted = fields.write(&redacted_content, false, Some(&hashes), None);
    let hash: EventHash = Sha256::digest(redacted.as_str()).into();
    let signatures = signer.signatures(redacted.as_str().as_bytes());
    let json: Bytes = fields.write(&whole_content, true, Some(&hashes), Some(&signatures)).into();
    if json.len() > EVENT_BYTES_MAX {
        return Err(Refusal::too_large("An event has at most 65,536 bytes."));
    }
    let id = fields.id.unwrap_or_else(|| event::event_id(&hash.into(), version));
    let event = Event {
        id,
        room_id: setting.room_id.map(ToOwned::to_owned),
        sender: draft.sender.clone(),
        sent: ruma::MilliSecondsSinceUnixEpoch(ruma::UInt::new_saturating(draft.sent_ms)),
        event_type: draft.event_type.as_str().into(),
        content: whole_content,
        state_key: draft.state_key.clone(),
        prev: setting.prev.to_vec(),
        auth: setting.auth.to_vec(),
        redacts: draft.redacts.clone(),
        rejected: false,
    };
    Ok(Built { hash, json, event })
}

/// Chooses the id of an event for rooms in whose version servers choose ids: a part of the hash of all that the event says, so that
/// no two events of ours get the same one.
fn choose_id(sender: &UserId, event: &JsonText) -> Result<OwnedEventId, Refusal> {
    let hash: EventHash = Sha256::digest(event.as_str()).into();
    let opaque = hash.first_chunk::<CHOSEN_BYTES>().map(|part| URL_SAFE_NO_PAD.encode(part));
    let id = OwnedEventId::try_from(format!("${}:{}", opaque.unwrap_or_default(), sender.server_name()));
    id.map_err(|_| Refusal::bad_json("The event's sender has no server that an id could name."))
}

/// The fields that an event has in each of the three forms in which it is written.
struct Fields<'a> {
    /// The id that this server chose, in room versions in which an event says it.
    id: Option<OwnedEventId>,
    auth: JsonText,
    prev: JsonText,
    /// The event that it redacts, in room versions where that stands beside the content.
    redacts: Option<&'a EventId>,
    draft: &'a Draft,
    setting: &'a Setting<'a>,
}

impl Fields<'_> {
    /// Writes the event in canonical order. `redacts` and what makes it sticky are left out where it is not whole, because its content
    /// is redacted.
    fn write(
        &self,
        content: &RawValue,
        is_whole: bool,
        hashes: Option<&JsonText>,
        signatures: Option<&JsonText>,
    ) -> JsonText {
        let mut event = Object::with_capacity(content.get().len() + 1_024);
        event.json("auth_events", &self.auth);
        event.json("content", content);
        event.number("depth", self.setting.depth);
        if let Some(id) = &self.id {
            event.text("event_id", id.as_str());
        }
        if let Some(hashes) = hashes {
            event.json("hashes", hashes);
        }
        if let Some(sticky_ms) = self.draft.sticky_ms.filter(|_| is_whole) {
            event.object(STICKY, |sticky| sticky.number("duration_ms", sticky_ms));
        }
        event.number("origin_server_ts", self.draft.sent_ms);
        event.json("prev_events", &self.prev);
        if let Some(redacts) = self.redacts.filter(|_| is_whole) {
            event.text("redacts", redacts.as_str());
        }
        if let Some(room_id) = self.setting.room_id {
            event.text("room_id", room_id.as_str());
        }
        event.text("sender", self.draft.sender.as_str());
        if let Some(signatures) = signatures {
            event.json("signatures", signatures);
        }
        if let Some(state_key) = &self.draft.state_key {
            event.text("state_key", state_key);
        }
        event.text("type", &self.draft.event_type);
        event.finish()
    }
}

fn raw(content: &CanonicalJsonObject) -> Result<Box<RawValue>, Refusal> {
    serde_json::value::to_raw_value(content)
        .map_err(|_| Refusal::bad_json("The event's content cannot be written as JSON."))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use ruma::{
        CanonicalJsonValue,
        serde::Base64,
        signatures::{PublicKeyMap, Verified, reference_hash, verify_event},
    };

    use super::*;
    use crate::rooms::{event::event_id, redact::redacted, versions};

    pub(crate) fn a_key() -> Arc<Ed25519KeyPair> {
        // RFC 8410 puts these bytes before the seed in the exchanged form of a key.
        let mut document = vec![
            0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20,
        ];
        document.extend([7; 32]);
        Arc::new(Ed25519KeyPair::from_der(&document, "k".to_owned()).unwrap())
    }

    /// Some hash for each of these events, for versions that cite events with their hashes.
    pub(crate) fn hashes(of: &[&[OwnedEventId]]) -> Hashes {
        of.iter().copied().flatten().map(|id| (id.clone(), Some("x".to_owned()))).collect()
    }

    /// The id of some event, as the room version has ids.
    pub(crate) fn an_id(number: u8, version: u8) -> OwnedEventId {
        if event::are_ids_chosen(version) {
            return OwnedEventId::try_from(format!("${number}:b.example")).unwrap();
        }
        event_id(&[number; 32].into(), version)
    }

    fn signer() -> Signer {
        Signer::new("example.org".try_into().unwrap(), a_key())
    }

    fn public_keys() -> PublicKeyMap {
        let keys = BTreeMap::from([("ed25519:k".to_owned(), Base64::new(a_key().public_key().to_vec()))]);
        BTreeMap::from([("example.org".to_owned(), keys)])
    }

    fn content(text: &str, number: i32) -> CanonicalJsonObject {
        let json = serde_json::json!({
            "body": text, "membership": "join", "n": number, "users": { text: 3 }, "displayname": text, "ban": 50,
        });
        serde_json::from_value(json).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn built_events_verify_and_have_the_id_ruma_gives_them(
            version in versions::LOWEST..=versions::HIGHEST,
            text in any::<String>(),
            number: i32,
            event_type in prop::sample::select(vec![
                "m.room.message", "m.room.member", "m.room.power_levels", "m.room.redaction", "odd \"type\" \u{7f}\n",
            ]),
            state_key in prop::option::of("\\PC{0,20}"),
            redacts: bool,
            // Other servers may choose room ids like these.
            room in prop::sample::select(vec!["!room:example.org", "!a\"b\\:evil.example", "!\u{2028}\n:x"]),
        ) {
            let rules = versions::find_rules(version).unwrap();
            let draft = Draft {
                sender: "@alice:example.org".try_into().unwrap(),
                event_type: event_type.to_owned(),
                state_key,
                content: content(&text, number),
                redacts: redacts.then(|| an_id(1, version)),
                sent_ms: 1_700_000_000_000,
                sticky_ms: None,
            };
            let (prev, auth) = ([an_id(2, version)], [an_id(3, version), an_id(4, version)]);
            let room = RoomId::parse(room).unwrap();
            let hashes = hashes(&[&prev, &auth]);
            let setting = Setting { room_id: Some(&room), rules, prev: &prev, auth: &auth, hashes: &hashes, depth: 5 };
            let built = build(&signer(), &draft, &setting, version).unwrap();
            let is_named = |object: &CanonicalJsonObject| match object.get("event_id") {
                Some(id) => version < 3 && id.as_str() == Some(built.event.id.as_str()),
                None => version >= 3 && format!("${}", reference_hash(object, rules).unwrap()) == built.event.id.as_str(),
            };

            let object: CanonicalJsonObject = serde_json::from_slice(&built.json).unwrap();
            let canonical = serde_json::to_vec(&object).unwrap();
            prop_assert_eq!(&canonical[..], &built.json[..]);
            prop_assert_eq!(verify_event(&public_keys(), &object, rules).unwrap(), Verified::All);
            prop_assert!(is_named(&object));
            let parsed = Event::parse(built.event.id.clone(), &built.json).unwrap();
            prop_assert_eq!(parsed.content.get(), built.event.content.get());
            prop_assert_eq!(parsed.prev, built.event.prev);
            prop_assert_eq!(reference::hash(&built.json, rules), Some(built.hash));

            // The redacted form still has the event's id and signature.
            let json = redacted(&built.json, rules).unwrap();
            let object: CanonicalJsonObject = serde_json::from_slice(&json).unwrap();
            prop_assert!(is_named(&object));
            prop_assert!(verify_event(&public_keys(), &object, rules).is_ok());
        }
    }

    #[test]
    fn an_event_that_is_countersigned_keeps_its_id_and_gets_our_signature() {
        for version in 8..=versions::HIGHEST {
            let rules = versions::find_rules(version).unwrap();
            let draft = Draft {
                sender: "@bob:b.example".try_into().unwrap(),
                event_type: "m.room.member".to_owned(),
                state_key: Some("@bob:b.example".to_owned()),
                content: content("Bob", 7),
                redacts: None,
                sent_ms: 1_700_000_000_000,
                sticky_ms: None,
            };
            let (prev, room) =
                ([event_id(&[2; 32].into(), version)], RoomId::parse("!room:example.org").unwrap());
            let setting = Setting {
                room_id: Some(&room),
                rules,
                prev: &prev,
                auth: &[],
                hashes: reference::NO_HASHES,
                depth: 5,
            };
            let theirs = Signer::new("b.example".try_into().unwrap(), a_key());
            let built = build(&theirs, &draft, &setting, version).unwrap();
            let json = signer().countersign(&built.json, rules).unwrap();
            let object: CanonicalJsonObject = serde_json::from_slice(&json).unwrap();
            assert_eq!(format!("${}", reference_hash(&object, rules).unwrap()), built.event.id.as_str());
            let mut keys = public_keys();
            keys.insert("b.example".to_owned(), keys["example.org"].clone());
            assert_eq!(verify_event(&keys, &object, rules).unwrap(), Verified::All);
            let signatures = object["signatures"].as_object().unwrap();
            assert_eq!(signatures.keys().collect::<Vec<_>>(), ["b.example", "example.org"]);
            assert_eq!(signer().countersign(&json, rules).unwrap(), json, "once more changes nothing");
        }
        let rules = versions::find_rules(11).unwrap();
        for odd in ["", "[]", "{}", r#"{"type":"m.room.member","content":{},"signatures":[]}"#] {
            assert!(signer().countersign(odd.as_bytes(), rules).is_err(), "{odd}");
        }
    }

    #[test]
    fn an_id_that_this_server_chooses_is_that_of_no_other_event() {
        let room = RoomId::parse("!room:example.org").unwrap();
        let prev = [an_id(2, 1)];
        let hashes = Hashes::from([(prev[0].clone(), Some("x".to_owned()))]);
        let draft = Draft {
            sender: "@alice:example.org".try_into().unwrap(),
            event_type: "m.room.message".to_owned(),
            state_key: None,
            content: content("same", 1),
            redacts: None,
            sent_ms: 7,
            sticky_ms: None,
        };
        let mut ids = std::collections::BTreeSet::new();
        for version in [1, 2] {
            let rules = versions::find_rules(version).unwrap();
            let make = |draft: &Draft, depth| {
                let setting =
                    Setting { room_id: Some(&room), rules, prev: &prev, auth: &[], hashes: &hashes, depth };
                build(&signer(), draft, &setting, version).unwrap()
            };
            let built = make(&draft, 5);
            let id = built.event.id.as_str();
            assert!(id.starts_with('$') && id.ends_with(":example.org") && id.len() == 33, "{id}");
            assert_eq!(built.key(RoomNum(3), version), EventKey::Chosen(RoomNum(3), id.into()));
            assert_eq!(make(&draft, 5).json, built.json, "the same event has the same id");
            assert_ne!(make(&draft, 6).event.id, built.event.id);
            assert_ne!(make(&Draft { sent_ms: 8, ..draft.clone() }, 5).event.id, built.event.id);
            ids.insert(built.event.id);
            let object: serde_json::Value = serde_json::from_slice(&built.json).unwrap();
            assert_eq!(object["prev_events"], serde_json::json!([["$2:b.example", { "sha256": "x" }]]));
            // Without the hash of an event that is cited nothing is built.
            let none = reference::NO_HASHES;
            let setting =
                Setting { room_id: Some(&room), rules, prev: &prev, auth: &[], hashes: none, depth: 5 };
            assert!(build(&signer(), &draft, &setting, version).is_err());
        }
    }

    #[test]
    fn an_event_above_65536_bytes_is_refused() {
        let body: CanonicalJsonValue = "x".repeat(EVENT_BYTES_MAX).into();
        let draft = Draft {
            sender: "@alice:example.org".try_into().unwrap(),
            event_type: "m.room.message".to_owned(),
            state_key: None,
            content: [("body".to_owned(), body)].into(),
            redacts: None,
            sent_ms: 0,
            sticky_ms: None,
        };
        let rules = versions::find_rules(11).unwrap();
        let setting =
            Setting { room_id: None, rules, prev: &[], auth: &[], hashes: reference::NO_HASHES, depth: 1 };
        let refusal = build(&signer(), &draft, &setting, 11).unwrap_err();
        assert_eq!(refusal.kind, ruma::api::error::ErrorKind::TooLarge);
    }
}
