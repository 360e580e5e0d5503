//! The authorization rules of a room version at one state of a room (specification: "Authorization rules" of each room version).
//!
//! ruma judges, but for two points in which it goes beyond the specification, so that a room would be split between us and others:
//!
//! - It takes a field of power levels that is added or removed for one that changes from or to its default. The rules compare the
//!   levels that are there: one that is removed has no new value, and one that is added no old one.
//! - It refuses all who would join or knock where the room has no `m.room.join_rules`. No rule lets anybody in then but those whom
//!   the rule `invite` lets in.
//!
//! Where one of them comes into play, ruma is shown a shadow of the event in question, and the rest is judged here.

use ruma::{
    Int, MilliSecondsSinceUnixEpoch, RoomId, UserId,
    events::{StateEventType, TimelineEventType, room::power_levels::UserPowerLevel},
    room_version_rules::AuthorizationRules,
    state_res::{
        Event, check_state_dependent_auth_rules,
        events::{RoomCreateEvent, RoomPowerLevelsEvent, RoomPowerLevelsIntField},
    },
};
use serde_json::{Map, Value, value::RawValue};

/// The fields of power levels that hold one level.
const FIELDS: [RoomPowerLevelsIntField; 7] = [
    RoomPowerLevelsIntField::UsersDefault,
    RoomPowerLevelsIntField::EventsDefault,
    RoomPowerLevelsIntField::StateDefault,
    RoomPowerLevelsIntField::Ban,
    RoomPowerLevelsIntField::Redact,
    RoomPowerLevelsIntField::Kick,
    RoomPowerLevelsIntField::Invite,
];
/// The content that stands for that of a room without `m.room.join_rules`.
const NO_JOIN_RULES: &str = r#"{"join_rule":"invite"}"#;

/// Judges an event by the rules that depend on the state of its room, of which `find` gives the events. Errors: the rule that forbids
/// the event.
pub fn check<E: Event>(
    rules: &AuthorizationRules,
    event: impl Event,
    find: impl Fn(&StateEventType, &str) -> Option<E>,
) -> Result<(), String> {
    let shadow = match *event.event_type() {
        TimelineEventType::RoomPowerLevels => shadow_of_levels(rules, &event, &find)?,
        _ => None,
    };
    let event = Shadow { of: &event, content: shadow };
    check_state_dependent_auth_rules(rules, event, |event_type, key| match find(event_type, key) {
        Some(found) => Some(Shadow { of: found, content: None }),
        None if *event_type == StateEventType::RoomJoinRules && key.is_empty() => {
            let content = RawValue::from_string(NO_JOIN_RULES.to_owned()).ok()?;
            // Nothing but its content is looked at.
            Some(Shadow { of: find(&StateEventType::RoomCreate, "")?, content: Some(content) })
        }
        None => None,
    })
}

/// Judges the fields of new power levels that are added or removed, and gives the levels without these differences; `None` where there
/// are none, or where ruma refuses the levels in any case.
fn shadow_of_levels<E: Event>(
    rules: &AuthorizationRules,
    event: &impl Event,
    find: &impl Fn(&StateEventType, &str) -> Option<E>,
) -> Result<Option<Box<RawValue>>, String> {
    if event.state_key() != Some("") {
        return Ok(None);
    }
    let Some(current) = find(&StateEventType::RoomPowerLevels, "") else { return Ok(None) };
    let Some(create) = find(&StateEventType::RoomCreate, "") else { return Ok(None) };
    let parse = |content: &RawValue| serde_json::from_str::<Map<String, Value>>(content.get());
    let (Ok(mut levels), Ok(before)) = (parse(event.content()), parse(current.content())) else {
        return Ok(None);
    };
    let (new, old) = (RoomPowerLevelsEvent::new(event), RoomPowerLevelsEvent::new(current));
    let creators = RoomCreateEvent::new(create).creators(rules)?;
    let sender = match creators.contains(event.sender()) && rules.explicitly_privilege_room_creators {
        true => UserPowerLevel::Infinite,
        false => old.user_power_level(event.sender(), rules)?.into(),
    };
    let mut is_shadowed = false;
    for field in FIELDS {
        let (was, is): (Option<Int>, Option<Int>) =
            (old.get_as_int(field, rules)?, new.get_as_int(field, rules)?);
        let too_high = |level: Int| {
            format!(
                "sender does not have enough power for the level {level} of `{field}`, which is added or removed"
            )
        };
        match (was, is) {
            (None, Some(level)) | (Some(level), None) if sender < level => return Err(too_high(level)),
            (None, Some(_)) => {
                levels.remove(field.as_str());
            }
            (Some(_), None) => {
                let same = before.get(field.as_str()).cloned().unwrap_or_default();
                levels.insert(field.as_str().to_owned(), same);
            }
            (None, None) | (Some(_), Some(_)) => continue,
        }
        is_shadowed = true;
    }
    Ok(if is_shadowed { serde_json::value::to_raw_value(&levels).ok() } else { None })
}

/// An event, perhaps with another content than its own.
struct Shadow<E> {
    of: E,
    content: Option<Box<RawValue>>,
}

impl<E: Event> Event for Shadow<E> {
    type Id = E::Id;

    fn event_id(&self) -> &Self::Id {
        self.of.event_id()
    }
    fn room_id(&self) -> Option<&RoomId> {
        self.of.room_id()
    }
    fn sender(&self) -> &UserId {
        self.of.sender()
    }
    fn origin_server_ts(&self) -> MilliSecondsSinceUnixEpoch {
        self.of.origin_server_ts()
    }
    fn event_type(&self) -> &TimelineEventType {
        self.of.event_type()
    }
    fn content(&self) -> &RawValue {
        self.content.as_deref().unwrap_or_else(|| self.of.content())
    }
    fn state_key(&self) -> Option<&str> {
        self.of.state_key()
    }
    fn prev_events(&self) -> Box<dyn DoubleEndedIterator<Item = &Self::Id> + '_> {
        self.of.prev_events()
    }
    fn auth_events(&self) -> Box<dyn DoubleEndedIterator<Item = &Self::Id> + '_> {
        self.of.auth_events()
    }
    fn redacts(&self) -> Option<&Self::Id> {
        self.of.redacts()
    }
    fn rejected(&self) -> bool {
        self.of.rejected()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ruma::{EventId, OwnedEventId};
    use serde_json::json;

    use super::*;
    use crate::rooms::{event::Event as Parsed, versions};

    const ALICE: &str = "@alice:a.example";
    const BOB: &str = "@bob:b.example";
    const CAROL: &str = "@carol:c.example";

    fn id(name: &str) -> OwnedEventId {
        EventId::parse(format!("${name}")).unwrap()
    }

    fn event(sender: &str, kind: &str, key: &str, content: &Value) -> Parsed {
        let json = json!({
            "room_id": "!room:a.example", "sender": sender, "type": kind, "state_key": key, "content": content,
            "origin_server_ts": 1, "auth_events": [], "prev_events": [],
        });
        Parsed::parse(id("event"), json.to_string().as_bytes()).unwrap()
    }

    /// Whether the rules allow an event in alice's room, in which bob is, at these power levels and with this rule for joining.
    fn allows(version: u8, incoming: &Parsed, levels: Option<&Value>, rule: Option<&str>) -> bool {
        let rules = &versions::find_rules(version).unwrap().authorization;
        let mut create = json!({ "room_version": version.to_string() });
        if version < 11 {
            create["creator"] = json!(ALICE);
        }
        let mut state = BTreeMap::new();
        let mut add = |event: Parsed| {
            let kind = StateEventType::from(event.event_type.to_string());
            state.insert((kind, event.state_key.clone().unwrap()), event);
        };
        add(event(ALICE, "m.room.create", "", &create));
        for user in [ALICE, BOB] {
            add(event(user, "m.room.member", user, &json!({ "membership": "join" })));
        }
        add(event(ALICE, "m.room.member", CAROL, &json!({ "membership": "invite" })));
        levels.into_iter().for_each(|levels| add(event(ALICE, "m.room.power_levels", "", levels)));
        rule.into_iter()
            .for_each(|rule| add(event(ALICE, "m.room.join_rules", "", &json!({ "join_rule": rule }))));
        check(rules, incoming, |kind, key| state.get(&(kind.clone(), key.to_owned()))).is_ok()
    }

    #[test]
    fn a_level_is_judged_by_its_values_before_and_after_and_not_by_its_default() {
        let with = |field: &str, level: Option<i64>, users: &Value| {
            let mut levels = json!({ "users": users, "events": { "m.room.power_levels": 0 } });
            if let Some(level) = level {
                levels[field] = json!(level);
            }
            levels
        };
        for version in versions::LOWEST..=versions::HIGHEST {
            let users = if version < 12 { json!({ ALICE: 100, BOB: 30 }) } else { json!({ BOB: 30 }) };
            for field in
                ["users_default", "events_default", "state_default", "ban", "redact", "kick", "invite"]
            {
                for (before, after, is_allowed) in [
                    (None, None, true),
                    (Some(30), None, true),
                    (Some(31), None, false),
                    (None, Some(30), true),
                    (None, Some(31), false),
                    (Some(10), Some(30), true),
                    (Some(30), Some(31), false),
                    (Some(31), Some(30), false),
                    (Some(40), Some(40), true),
                ] {
                    let (old, new) = (with(field, before, &users), with(field, after, &users));
                    // A default that is too high for bob to send anything at all says nothing of these rules.
                    if field == "users_default" || before.is_none_or(|_| field != "events_default") {
                        let incoming = event(BOB, "m.room.power_levels", "", &new);
                        let found = allows(version, &incoming, Some(&old), Some("invite"));
                        assert_eq!(found, is_allowed, "{version} {field} {before:?} {after:?}");
                    }
                    let by_creator = event(ALICE, "m.room.power_levels", "", &new);
                    assert!(allows(version, &by_creator, Some(&old), Some("invite")));
                }
            }
        }
    }

    #[test]
    fn levels_of_a_wrong_form_are_refused_also_where_they_are_added() {
        for (field, level) in [("ban", json!("x")), ("kick", json!([])), ("users_default", json!({}))] {
            let (old, mut new) = (json!({ "users": { ALICE: 100 } }), json!({ "users": { ALICE: 100 } }));
            new[field] = level;
            let incoming = event(ALICE, "m.room.power_levels", "", &new);
            assert!(!allows(11, &incoming, Some(&old), Some("invite")), "{field}");
            assert!(!allows(9, &incoming, Some(&old), Some("invite")), "{field}");
        }
        let (old, new) =
            (json!({ "users": { ALICE: 100 } }), json!({ "users": { ALICE: 100 }, "ban": "60" }));
        let incoming = event(ALICE, "m.room.power_levels", "", &new);
        assert!(allows(9, &incoming, Some(&old), None) && !allows(10, &incoming, Some(&old), None));
    }

    #[test]
    fn a_room_without_join_rules_lets_in_whom_it_invited() {
        for version in versions::LOWEST..=versions::HIGHEST {
            let joins = |user| event(user, "m.room.member", user, &json!({ "membership": "join" }));
            for rule in [None, Some("invite")] {
                assert!(allows(version, &joins(CAROL), None, rule), "{version}: invited");
                assert!(allows(version, &joins(BOB), None, rule), "{version}: already there");
                assert!(!allows(version, &joins("@dan:d.example"), None, rule), "{version}: a stranger");
            }
            let knocks =
                event("@dan:d.example", "m.room.member", "@dan:d.example", &json!({ "membership": "knock" }));
            assert!(!allows(version, &knocks, None, None), "{version}");
        }
    }
}
