//! The gate through which events of other servers come in. A [`Received`] can be made nowhere else, so that whatever
//! judges and stores an event may rely on its form. Specification: "Size limits" (client-server API) and "PDUs"
//! (server-server API).

use std::borrow::Cow;

use bytes::Bytes;
use ruma::{EventId, OwnedEventId, room_version_rules::RoomVersionRules};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    error::Refusal,
    ids::RoomNum,
    rooms::{
        admit::Why,
        build::{EVENT_BYTES_MAX, NAME_BYTES_MAX},
        event::{self, Event},
        policy_server::PolicyServer,
        reference, versions,
    },
    schema::event_types::CREATE,
    schema::rooms::{EventHash, EventKey, EventRow, RoomRow, SentBy},
};

/// An event cites at most this many events.
const PREV_MAX: usize = 20;
/// An event names at most this many events that allow it.
const AUTH_MAX: usize = 10;

/// An event of another server whose form was checked: it is one of this room, of its version's form, and no larger than
/// events may be.
#[derive(Clone, Debug)]
pub struct Received {
    /// The reference hash, which is the event's name since room version 3.
    hash: EventHash,
    version: u8,
    json: Bytes,
    event: Event,
    depth: u64,
    let_in: bool,
    by_us: Option<ByUs>,
    is_cut: bool,
    /// The policy server that does not recommend the event, and why.
    opposed: Option<(PolicyServer, Why)>,
}

/// The part that only events of our own users have.
#[derive(Clone, Debug, Default)]
struct ByUs {
    /// The device and the transaction id with which it was sent, if it was.
    sent_by: Option<SentBy>,
}

/// The fields of an event that only the gate looks at.
#[derive(Deserialize)]
struct Form<'a> {
    #[serde(borrow, default)]
    event_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    depth: &'a RawValue,
    #[serde(borrow)]
    prev_events: Vec<&'a RawValue>,
    #[serde(borrow)]
    auth_events: Vec<&'a RawValue>,
}

impl Received {
    /// Checks the form of an event that comes into this room. `json` is the event as canonical JSON, signatures
    /// included, and `hash` its reference hash, which names the event since room version 3, and tells it from others of its id
    /// before. Errors: 413 `M_TOO_LARGE`
    /// for more bytes than events and names may have; 400 `M_BAD_JSON` for everything else, with the field at fault.
    pub fn check(num: RoomNum, room: &RoomRow, hash: EventHash, json: Bytes) -> Result<Self, Refusal> {
        let checked = check(room, hash, json);
        if let Err(refusal) = &checked {
            tracing::debug!(room = %num, why = %refusal.message, "an event of another server is refused");
        }
        checked
    }

    /// The key by which the event is found in a room: its hash, or the id that a server chose.
    pub fn key(&self, room: RoomNum) -> EventKey {
        event::key(self.hash, &self.event.id, room, self.version)
    }

    /// The event's reference hash.
    pub fn hash(&self) -> EventHash {
        self.hash
    }

    /// Whether a row that was found by the event's key holds this event, be it redacted. Where servers choose ids, another event may have
    /// the same one.
    pub fn is_in(&self, row: &EventRow, rules: &RoomVersionRules) -> bool {
        !event::are_ids_chosen(self.version) || reference::hash(&row.json, rules) == Some(self.hash)
    }

    /// The event as canonical JSON, as it was signed.
    pub fn json(&self) -> &Bytes {
        &self.json
    }

    /// The event of that JSON, parsed.
    pub fn event(&self) -> &Event {
        &self.event
    }

    /// The event's id, as its room's version writes ids.
    pub fn id(&self) -> &EventId {
        &self.event.id
    }

    /// The same event, of which this server tells others: its sender came, left or knocked by way of this server, and nobody
    /// else in the room has heard of it.
    #[must_use]
    pub fn let_in(self) -> Self {
        Self { let_in: true, ..self }
    }

    /// Whether the event's sender came, left or knocked by way of this server, which tells others of it.
    pub fn is_let_in(&self) -> bool {
        self.let_in
    }

    /// The same event, which one of our own users sends, be it with a transaction id.
    #[must_use]
    pub(in crate::rooms) fn sent_by(self, sent_by: Option<SentBy>) -> Self {
        Self { by_us: Some(ByUs { sent_by }), ..self }
    }

    /// Whether one of our own users sends the event now.
    pub(super) fn is_by_us(&self) -> bool {
        self.by_us.is_some()
    }

    /// The device and the transaction id with which one of our own users sends it.
    pub(in crate::rooms::change) fn sender_device(&self) -> Option<SentBy> {
        self.by_us.as_ref().and_then(|by_us| by_us.sent_by.clone())
    }

    /// The same event with the signature of a policy server. `None` if the signature is wrong, and if the event has no place for
    /// it.
    pub fn signed_by(
        &self,
        server: &PolicyServer,
        rules: &RoomVersionRules,
        signature: &str,
    ) -> Option<Self> {
        let json = server.add_signature(&self.json, rules, signature)?;
        (json.len() <= EVENT_BYTES_MAX).then(|| Self { json, ..self.clone() })
    }

    /// The same event with the signature that another copy of it has of a policy server. `None` as for [`Self::signed_by`].
    pub fn with_signature_of(
        &self,
        server: &PolicyServer,
        rules: &RoomVersionRules,
        copy: &Self,
    ) -> Option<Self> {
        self.signed_by(server, rules, &server.find_signature(&copy.json)?)
    }

    /// The same event, which a policy server does not recommend for this reason.
    #[must_use]
    pub fn opposed_by(self, server: PolicyServer, why: Why) -> Self {
        Self { opposed: Some((server, why)), ..self }
    }

    /// The reason for which this policy server does not recommend the event, if it was asked.
    pub(super) fn opposed(&self, server: &PolicyServer) -> Option<&Why> {
        self.opposed.as_ref().filter(|(by, _)| by == server).map(|(_, why)| why)
    }

    /// The same event, of which only the redacted form came.
    #[must_use]
    pub(super) fn cut(self) -> Self {
        Self { is_cut: true, ..self }
    }

    /// Whether only the redacted form of the event came, because somebody redacted it or because whoever gave it does not
    /// show us the rest.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// The same event with other bytes that are kept of it. Errors: as of [`Self::check`].
    pub(super) fn with_json(&self, num: RoomNum, room: &RoomRow, json: Bytes) -> Result<Self, Refusal> {
        Ok(Self { let_in: self.let_in, ..Self::check(num, room, self.hash, json)? })
    }

    /// The event's depth, as its sender's server says.
    pub fn depth(&self) -> u64 {
        self.depth
    }
}

fn check(room: &RoomRow, hash: EventHash, json: Bytes) -> Result<Received, Refusal> {
    if json.len() > EVENT_BYTES_MAX {
        return Err(Refusal::too_large("The event has more than 65,536 bytes."));
    }
    let version = room.version;
    let rules = versions::find_rules(version)
        .ok_or_else(|| Refusal::forbidden("This server does not know the room's version."))?;
    let form: Form<'_> = serde_json::from_slice(&json)
        .map_err(|error| Refusal::bad_json(format!("The event is not in the form of an event: {error}.")))?;
    let id = named(version, hash, form.event_id.as_deref())?;
    if form.prev_events.len() > PREV_MAX {
        return Err(Refusal::bad_json("`prev_events` names more than 20 events."));
    }
    if form.auth_events.len() > AUTH_MAX {
        return Err(Refusal::bad_json("`auth_events` names more than 10 events."));
    }
    for (field, cited) in [("prev_events", &form.prev_events), ("auth_events", &form.auth_events)] {
        if !cited.iter().all(|cited| is_cited_as_in(version, cited)) {
            return Err(Refusal::bad_json(format!("`{field}` is not in the form of the room's version.")));
        }
    }
    let depth = depth(form.depth, version)?;
    let event = Event::parse(id, &json)
        .map_err(|error| Refusal::bad_json(format!("The event is not in the form of an event: {error}.")))?;
    let is_create = event.event_type.to_string() == CREATE && event.state_key.as_deref() == Some("");
    // A room begins with its create event: whatever else stands on nothing has no state before it by which it could be judged.
    if event.prev.is_empty() && !is_create {
        return Err(Refusal::bad_json("`prev_events` is empty, as only that of a create event may be."));
    }
    let has_room_id = !(is_create && rules.authorization.room_create_event_id_as_room_id);
    if event.room_id.as_ref() != has_room_id.then_some(&room.id) {
        return Err(Refusal::bad_json("`room_id` is not that of the room."));
    }
    names(version, &event)?;
    Ok(Received {
        hash,
        version,
        json,
        event,
        depth,
        let_in: false,
        is_cut: false,
        by_us: None,
        opposed: None,
    })
}

/// Whether another event is cited in the form of this room version: by its id and its hash in versions 1 and 2, and later by its id
/// alone. The hash decides nothing, and may be any object.
fn is_cited_as_in(version: u8, cited: &RawValue) -> bool {
    if !event::are_ids_chosen(version) {
        return cited.get().starts_with('"');
    }
    let pair = serde_json::from_str::<(&RawValue, &RawValue)>(cited.get());
    pair.is_ok_and(|(id, hash)| id.get().starts_with('"') && hash.get().starts_with('{'))
}

/// Gives the id of an event: its hash, or in room versions 1 and 2 the id that it states.
fn named(version: u8, hash: EventHash, stated: Option<&str>) -> Result<OwnedEventId, Refusal> {
    if !event::are_ids_chosen(version) {
        let key = EventKey::of_hash(hash)
            .ok_or_else(|| Refusal::bad_json("An event whose reference hash has only zeros is not taken."))?;
        return Ok(event::event_id(&key, version));
    }
    let stated = stated.ok_or_else(|| Refusal::bad_json("`event_id` is missing."))?;
    if stated.len() > NAME_BYTES_MAX {
        return Err(Refusal::too_large("`event_id` has more than 255 bytes."));
    }
    let id = OwnedEventId::try_from(stated).ok().filter(|id| id.server_name().is_some());
    id.ok_or_else(|| Refusal::bad_json("`event_id` is not an id of the room's version."))
}

fn depth(depth: &RawValue, version: u8) -> Result<u64, Refusal> {
    let depth_max = versions::depth_max(version);
    let number: Option<u64> = depth.get().parse().ok();
    number
        .filter(|depth| *depth <= depth_max)
        .ok_or_else(|| Refusal::bad_json(format!("`depth` is not an integer from 0 to {depth_max}.")))
}

fn names(version: u8, event: &Event) -> Result<(), Refusal> {
    let event_type = event.event_type.to_string();
    let is_long = |name: &str| match versions::are_names_in_bytes(version) {
        true => name.len() > NAME_BYTES_MAX,
        false => name.chars().count() > NAME_BYTES_MAX,
    };
    for (field, name) in [("type", Some(event_type.as_str())), ("state_key", event.state_key.as_deref())] {
        if name.is_some_and(is_long) {
            return Err(Refusal::too_large(format!("`{field}` is longer than 255.")));
        }
    }
    let named =
        [("sender", Some(event.sender.as_str())), ("redacts", event.redacts.as_deref().map(EventId::as_str))];
    let cited = event.prev.iter().map(|id| ("prev_events", Some(id.as_str())));
    let allowing = event.auth.iter().map(|id| ("auth_events", Some(id.as_str())));
    for (field, name) in named.into_iter().chain(cited).chain(allowing) {
        if name.is_some_and(|name| name.len() > NAME_BYTES_MAX) {
            return Err(Refusal::too_large(format!("`{field}` has more than 255 bytes.")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ruma::{RoomId, api::error::ErrorKind};
    use serde_json::{Value, json};

    use super::*;
    use crate::{ids::Order, rooms::tip::tests::row};

    const ROOM: RoomNum = RoomNum(1);
    const VERSIONS: std::ops::RangeInclusive<u8> = 1..=12;

    fn room(version: u8) -> RoomRow {
        let id = if version >= 12 { "!aHashOfSomeLength" } else { "!room:a.example" };
        RoomRow { id: RoomId::parse(id).unwrap(), version, ..row(Order::MIN) }
    }

    /// The id of an event, and the form in which another one cites it.
    fn cited(version: u8, number: u8) -> Value {
        if version < 3 {
            return json!([format!("${number}:b.example"), { "sha256": "x" }]);
        }
        json!(event::event_id(&[number; 32].into(), version))
    }

    /// A state event in the form of this version.
    fn an_event(version: u8) -> Value {
        let mut event = json!({
            "type": "x", "state_key": "", "sender": "@bob:b.example", "room_id": room(version).id,
            "origin_server_ts": 1, "depth": 7, "content": {},
            "prev_events": [cited(version, 1)], "auth_events": [cited(version, 2)],
        });
        if version < 3 {
            event["event_id"] = json!("$it:b.example");
        }
        event
    }

    fn check_value(version: u8, event: &Value) -> Result<Received, Refusal> {
        Received::check(ROOM, &room(version), [9; 32], event.to_string().into())
    }

    /// Checks that the event passes as it is, and not with this value of a field, for a reason that names the field.
    fn refuses(field: &str, value: impl Fn(u8) -> Value, kind: &ErrorKind) {
        for version in VERSIONS {
            let mut event = an_event(version);
            assert!(check_value(version, &event).is_ok());
            event[field] = value(version);
            let refusal = check_value(version, &event).unwrap_err();
            assert_eq!(&refusal.kind, kind, "{version} {field}: {}", refusal.message);
            assert!(refusal.message.contains(field), "{}", refusal.message);
        }
    }

    #[test]
    fn nothing_but_a_create_event_stands_on_nothing() {
        refuses("prev_events", |_| json!([]), &ErrorKind::BadJson);
        for version in VERSIONS {
            let mut create = an_event(version);
            create["type"] = "m.room.create".into();
            create["prev_events"] = json!([]);
            if version >= 12 {
                create.as_object_mut().unwrap().remove("room_id");
            }
            assert!(check_value(version, &create).is_ok(), "{version}");
        }
    }

    #[test]
    fn an_event_of_each_version_passes_with_its_own_name() {
        for version in VERSIONS {
            let received = check_value(version, &an_event(version)).unwrap();
            assert_eq!(received.depth(), 7);
            assert_eq!((received.event().prev.len(), received.event().auth.len()), (1, 1));
            match received.key(ROOM) {
                EventKey::Chosen(room, id) => {
                    assert_eq!((room, &*id, version < 3), (ROOM, "$it:b.example", true));
                }
                EventKey::Hash(hash) => assert_eq!((hash, version > 2), ([9; 32], true)),
            }
        }
    }

    #[test]
    fn the_zeros_that_stand_before_chosen_ids_are_the_hash_of_no_event() {
        for version in VERSIONS {
            let json = an_event(version).to_string();
            let received = Received::check(ROOM, &room(version), [0; 32], json.into());
            assert_eq!(received.is_err(), version > 2, "{version}");
        }
    }

    #[test]
    fn an_event_of_another_room_is_refused() {
        refuses("room_id", |_| json!("!other:a.example"), &ErrorKind::BadJson);
        for version in VERSIONS {
            let mut event = an_event(version);
            event.as_object_mut().unwrap().remove("room_id");
            assert!(check_value(version, &event).is_err(), "{version}");
            // Only the create event of a room whose id is that event's hash has no room id.
            event["type"] = json!("m.room.create");
            assert_eq!(check_value(version, &event).is_ok(), version >= 12, "{version}");
            event["room_id"] = json!(room(version).id);
            assert_eq!(check_value(version, &event).is_ok(), version < 12, "{version}");
        }
    }

    #[test]
    fn an_event_cites_at_most_twenty_events_and_names_ten_that_allow_it() {
        let many = |count: u8| move |version| (1..=count).map(|it| cited(version, it)).collect::<Value>();
        for version in VERSIONS {
            let mut event = an_event(version);
            (event["prev_events"], event["auth_events"]) = (many(20)(version), many(10)(version));
            assert!(check_value(version, &event).is_ok(), "{version}");
        }
        refuses("prev_events", many(21), &ErrorKind::BadJson);
        refuses("auth_events", many(11), &ErrorKind::BadJson);
    }

    #[test]
    fn events_are_cited_in_the_form_of_the_version() {
        let other = |version: u8| json!([cited(if version < 3 { 4 } else { 2 }, 1)]);
        refuses("prev_events", other, &ErrorKind::BadJson);
        refuses("auth_events", other, &ErrorKind::BadJson);
        // The hash beside an id decides nothing, so that any object will do.
        for (pair, passes) in [
            (json!(["$x:y", {}]), true),
            (json!(["$x:y", { "sha256": 7, "md5": "x" }]), true),
            (json!(["$x:y"]), false),
            (json!(["$x:y", "hash"]), false),
            (json!(["$x:y", {}, {}]), false),
            (json!([{}, "$x:y"]), false),
            (json!(["x:y", {}]), false),
            (json!([]), false),
        ] {
            for version in [1, 2] {
                let mut event = an_event(version);
                event["prev_events"] = json!([pair]);
                assert_eq!(check_value(version, &event).is_ok(), passes, "{pair}");
            }
        }
    }

    #[test]
    fn names_have_at_most_255_bytes_and_in_the_older_versions_characters() {
        for field in ["type", "state_key"] {
            for version in VERSIONS {
                let mut event = an_event(version);
                event[field] = json!("é".repeat(if version <= 10 { 255 } else { 127 }));
                assert!(check_value(version, &event).is_ok());
            }
            let longer = |version| json!("é".repeat(if version <= 10 { 256 } else { 128 }));
            refuses(field, longer, &ErrorKind::TooLarge);
        }
        let long = |sigil: &str| format!("{sigil}{}:b.example", "a".repeat(255));
        for version in VERSIONS {
            let mut event = an_event(version);
            event["sender"] = json!(long("@"));
            assert!(check_value(version, &event).is_err(), "{version}");
            let mut event = an_event(version);
            event["prev_events"] = if version < 3 { json!([[long("$"), {}]]) } else { json!([long("$")]) };
            assert!(check_value(version, &event).is_err(), "{version}");
        }
    }

    #[test]
    fn an_id_that_a_server_chose_is_one_of_a_server_and_has_at_most_255_bytes() {
        for version in [1, 2] {
            let with = |id: Value| {
                let mut event = an_event(version);
                event["event_id"] = id;
                check_value(version, &event)
            };
            let longest = format!("${}:b.example", "a".repeat(244));
            for right in ["$a:b.example", "$:b.example", "$/ \u{0}%?#é\n:[::1]:80", "$a:b:1", &longest] {
                let received = with(json!(right)).unwrap();
                assert_eq!(received.id().as_str(), right);
                assert_eq!(received.key(ROOM), EventKey::Chosen(ROOM, right.into()));
            }
            assert_eq!(with(json!(format!("${longest}"))).unwrap_err().kind, ErrorKind::TooLarge);
            for wrong in ["", "$", "$a", "a:b.example", "@a:b.example", "$a:", "$a:b c", "$a: b"] {
                assert!(with(json!(wrong)).is_err(), "{wrong}");
            }
            for wrong in [json!(null), json!(7), json!([])] {
                assert!(with(wrong).is_err());
            }
            let mut event = an_event(version);
            event.as_object_mut().unwrap().remove("event_id");
            assert!(check_value(version, &event).is_err());
        }
    }

    #[test]
    fn an_event_has_at_most_65536_bytes() {
        for version in VERSIONS {
            let mut event = an_event(version);
            event["content"]["body"] = json!("");
            let padding = EVENT_BYTES_MAX - event.to_string().len();
            event["content"]["body"] = json!("a".repeat(padding));
            assert!(check_value(version, &event).is_ok());
            event["content"]["body"] = json!("a".repeat(padding + 1));
            assert_eq!(check_value(version, &event).unwrap_err().kind, ErrorKind::TooLarge);
        }
    }

    #[test]
    fn a_depth_is_an_integer_of_the_version() {
        for wrong in [json!(-1), json!(1.5), json!("7"), json!(null), json!(u64::MAX)] {
            refuses("depth", |_| wrong.clone(), &ErrorKind::BadJson);
        }
        for version in VERSIONS {
            let mut event = an_event(version);
            event["depth"] = json!((1_u64 << 53) - 1);
            assert!(check_value(version, &event).is_ok());
            event["depth"] = json!(1_u64 << 53);
            assert_eq!(check_value(version, &event).is_ok(), version <= 5);
        }
    }

    #[test]
    fn what_is_no_event_is_refused() {
        for json in ["", "[]", "{}", r#"{"depth":1,"prev_events":[],"auth_events":[]}"#] {
            let refusal = Received::check(ROOM, &room(11), [9; 32], json.into()).unwrap_err();
            assert_eq!(refusal.kind, ErrorKind::BadJson);
        }
    }
}
