//! Redacted events: the form that is left of one, and its original content, which moderators may see for a while.
//!
//! A redacted event keeps its place; its bytes are replaced by the redacted form, which its id and signatures still
//! fit. `rooms/change/redaction.rs` decides who may redact which event.

use std::{collections::BTreeMap, ops::Bound};

use bytes::Bytes;
use ruma::{
    CanonicalJsonObject, CanonicalJsonValue, canonical_json::redact_content_in_place,
    room_version_rules::RoomVersionRules,
};
use serde_json::value::RawValue;

use crate::{
    ids::{EventNum, Order, RoomNum},
    json::{JsonText, Object},
    rooms::{
        event::{self, StoredEvent},
        rules,
    },
    schema,
    schema::{event_types::MEMBER, jobs::Job, rooms::RoomRow},
    store::{Batch, Fault, Read, timer},
};

/// Redaction looks at an event's fields, at those of its content, and at those of one more level.
const LEVELS: usize = 3;

/// The field of member events of which a part is left.
const THIRD_PARTY_INVITE: &str = "third_party_invite";

/// Gives the redacted form of an event, which its id and signatures still fit. `None` if the bytes are not those of an
/// event.
///
/// The fields that remain are copied as they were signed: in room versions 3 to 5 events may hold numbers that
/// canonical JSON does not have and that another writer would write in another way.
pub fn redacted(json: &[u8], rules: &RoomVersionRules) -> Option<Bytes> {
    let event: &RawValue = serde_json::from_slice(json).ok()?;
    let CanonicalJsonValue::Object(outline) = outline(event, LEVELS) else { return None };
    keep(event, &cut(outline, rules)?).map(Bytes::from)
}

/// Gives what the redacted form of an event has of its fields. `None` where they are not those of an event.
pub(super) fn cut(event: CanonicalJsonObject, rules: &RoomVersionRules) -> Option<CanonicalJsonObject> {
    let mut left = ruma::canonical_json::redact(event, &rules.redaction, None).ok()?;
    let is_member = left.get("type").and_then(CanonicalJsonValue::as_str) == Some(MEMBER);
    if let Some(CanonicalJsonValue::Object(content)) = left.get_mut("content").filter(|_| is_member) {
        cut_invitation(content);
    }
    Some(left)
}

/// Leaves of the content of an event what its redacted form has.
pub(super) fn cut_content(content: &mut CanonicalJsonObject, rules: &RoomVersionRules, event_type: &str) {
    redact_content_in_place(content, &rules.redaction, event_type);
    if event_type == MEMBER {
        cut_invitation(content);
    }
}

/// An invitation by way of a third party keeps only `signed`, and so nothing of what is no object. ruma leaves that as it is.
fn cut_invitation(content: &mut CanonicalJsonObject) {
    content
        .retain(|field, value| field != THIRD_PARTY_INVITE || matches!(value, CanonicalJsonValue::Object(_)));
}

/// Gives the names of the fields, nested down to this many levels, and of the values only strings.
fn outline(json: &RawValue, levels: usize) -> CanonicalJsonValue {
    let fields = if levels > 0 { serde_json::from_str(json.get()).ok() } else { None };
    let fields: Option<BTreeMap<String, &RawValue>> = fields;
    match fields {
        Some(fields) => {
            let outlined = fields.into_iter().map(|(name, value)| (name, outline(value, levels - 1)));
            CanonicalJsonValue::Object(outlined.collect())
        }
        None => serde_json::from_str(json.get()).map_or(CanonicalJsonValue::Null, CanonicalJsonValue::String),
    }
}

/// Gives those fields of an object that an outline has, with their values as they are.
fn keep(json: &RawValue, outline: &CanonicalJsonObject) -> Option<JsonText> {
    let fields: BTreeMap<String, &RawValue> = serde_json::from_str(json.get()).ok()?;
    let mut left = Object::with_capacity(json.get().len());
    for (name, outline) in outline {
        let value = fields.get(name)?;
        match outline {
            CanonicalJsonValue::Object(outline) => left.json(name, &keep(value, outline)?),
            _ => left.json(name, *value),
        }
    }
    Some(left.finish())
}

/// Gives the event in its redacted form, for a reader who is not to see more of it though nobody redacted it.
pub(crate) fn hidden(room: &RoomRow, stored: &StoredEvent) -> Result<StoredEvent, Fault> {
    let json = redacted(&stored.row.json, rules(room)?);
    with_json(stored, &json.ok_or(Fault::Corrupt("an event is not the JSON of an event"))?)
}

/// Gives the event with other bytes of the same event.
pub(crate) fn with_json(stored: &StoredEvent, json: &Bytes) -> Result<StoredEvent, Fault> {
    let mut other = stored.clone();
    other.row.header.spans = event::locate(json).ok_or(Fault::Corrupt("an event has no fields"))?;
    other.row.json = json.clone();
    Ok(other)
}

/// Keeps the original content of an event that is redacted, for moderators, until this time: milliseconds since the
/// epoch.
pub fn keep_original(batch: &mut Batch, room: RoomNum, original: &StoredEvent, until_ms: u64) {
    let event = original.event();
    schema::REDACTED_ORIGINAL.put(batch, (room, event), &original.row.json);
    timer::set(batch, &Job::ForgetOriginal { room, event }.timer(until_ms));
}

/// Forgets the original content of a redacted event, once its time is over.
pub fn forget_original(batch: &mut Batch, room: RoomNum, event: EventNum) {
    schema::REDACTED_ORIGINAL.delete(batch, (room, event));
}

/// Keeps that a state event was redacted by the redaction at this place of the timeline.
pub fn keep_place(batch: &mut Batch, room: RoomNum, redacted: EventNum, order: Order) {
    schema::REDACTED_STATE.put(batch, (room, order), &redacted);
}

/// Lists the state events that were redacted above `after` and up to `upto`, rising, each with the order of its redaction.
pub fn list_redacted_state<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    after: Order,
    upto: Order,
) -> Result<impl Iterator<Item = Result<(Order, EventNum), Fault>> + 'r, Fault> {
    let (low, high) = (Bound::Excluded((room, after)), Bound::Included((room, upto)));
    let rows = schema::REDACTED_STATE.range_mostly_empty::<(RoomNum, Order)>(read, low, high)?;
    Ok(rows.map(|row| row.map(|((_, order), event)| (order, event))))
}

/// Finds a redacted event as it was before; `None` where that was not kept, or is kept no longer.
pub fn find_original(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    redacted: &StoredEvent,
) -> Result<Option<StoredEvent>, Fault> {
    let json = schema::REDACTED_ORIGINAL.get(read, (room, redacted.event()))?;
    json.map(|json| with_json(redacted, &json)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rooms::versions;

    #[test]
    fn numbers_that_canonical_json_does_not_have_are_left_as_they_were_signed() {
        let levels = r#"{"ban":5e1,"users":{"@a:b":99999999999999999999,"@c:d":1.50},"x":1.5}"#;
        let json = format!(
            r#"{{"auth_events":[],"content":{levels},"depth":1.0,"sender":"@a:b","type":"m.room.power_levels","x":1}}"#
        );
        let left = redacted(json.as_bytes(), versions::find_rules(5).unwrap()).unwrap();
        let expected = r#"{"auth_events":[],"content":{"ban":5e1,"users":{"@a:b":99999999999999999999,"@c:d":1.50}},"depth":1.0,"sender":"@a:b","type":"m.room.power_levels"}"#;
        assert_eq!(std::str::from_utf8(&left).unwrap(), expected);
    }

    #[test]
    fn another_server_leaves_the_same_of_events_with_fields_of_odd_types() {
        // Made by Synapse 1.163.2. A create event of version 12 that names its room is refused before it is redacted, so there is none.
        let mut differ = Vec::new();
        for case in include_str!("redact/by_another_server.jsonl").lines() {
            #[derive(serde::Deserialize)]
            struct Case<'a> {
                version: u8,
                #[serde(borrow)]
                event: &'a RawValue,
                left: serde_json::Value,
            }
            let case: Case<'_> = serde_json::from_str(case).unwrap();
            let left = redacted(case.event.get().as_bytes(), versions::find_rules(case.version).unwrap());
            let left: Option<serde_json::Value> = left.map(|left| serde_json::from_slice(&left).unwrap());
            if left.as_ref() != Some(&case.left) {
                differ
                    .push(format!("{}: {} leaves {} and not {left:?}", case.version, case.event, case.left));
            }
        }
        assert!(differ.is_empty(), "{} differ:\n{}", differ.len(), differ.join("\n"));
    }

    #[test]
    fn what_is_kept_of_a_part_is_kept_whole() {
        let json = br#"{"content":{"membership":"invite","third_party_invite":{"display_name":"x","signed":{"mxid":"@a:b","n":1.5}}},"sender":"@a:b","state_key":"@a:b","type":"m.room.member"}"#;
        let left = redacted(json, versions::find_rules(11).unwrap()).unwrap();
        let expected = r#"{"content":{"membership":"invite","third_party_invite":{"signed":{"mxid":"@a:b","n":1.5}}},"sender":"@a:b","state_key":"@a:b","type":"m.room.member"}"#;
        assert_eq!(std::str::from_utf8(&left).unwrap(), expected);
        assert!(redacted(b"[]", versions::find_rules(11).unwrap()).is_none());
    }

    #[test]
    fn an_invitation_by_way_of_a_third_party_that_is_no_object_goes_from_member_events_alone() {
        let rules = versions::find_rules(11).unwrap();
        for odd in [r#""x""#, "5", "[]", "null"] {
            let of = |kind: &str| {
                format!(
                    r#"{{"content":{{"third_party_invite":{odd}}},"sender":"@a:b","state_key":"","type":"{kind}"}}"#
                )
            };
            let left = |kind: &str| redacted(of(kind).as_bytes(), rules).unwrap();
            assert_eq!(
                &left("m.room.create")[..],
                of("m.room.create").as_bytes(),
                "it keeps its whole content"
            );
            let member = of(MEMBER).replace(&format!(r#""third_party_invite":{odd}"#), "");
            assert_eq!(&left(MEMBER)[..], member.as_bytes());
        }
    }
}
