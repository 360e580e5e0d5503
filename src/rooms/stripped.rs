//! The state that tells somebody outside a room which room it is (client-server API, "Stripped state"). Other servers send it with
//! invitations and knocks, and anybody can, so that no more is kept or shown of it than the specification recommends, and that
//! within a bound.

use std::{borrow::Cow, collections::BTreeSet};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    json::Object,
    schema::event_types::{AVATAR, CANONICAL_ALIAS, CREATE, ENCRYPTION, JOIN_RULES, MEMBER, NAME, TOPIC},
};

/// The types of events, without a state key, that tell which room it is. Where there is not room for all of them, the first ones
/// are kept.
pub(crate) const TELLING: [&str; 7] = [CREATE, ENCRYPTION, JOIN_RULES, NAME, CANONICAL_ALIAS, AVATAR, TOPIC];

/// The events that are told to one user of one room have at most this many bytes together.
const BYTES_MAX: usize = 64 << 10;
/// The member event itself is told with nothing but its membership where it has more bytes than this.
const OWN_BYTES_MAX: usize = 16 << 10;

#[derive(Deserialize)]
struct Stripped<'a> {
    #[serde(borrow)]
    content: &'a RawValue,
    #[serde(borrow)]
    sender: &'a RawValue,
    #[serde(borrow)]
    state_key: Cow<'a, str>,
    #[serde(borrow, rename = "type")]
    event_type: Cow<'a, str>,
}

/// Leaves out what is not needed to tell a room, and what is too much of it. The last of the events is the member event of the
/// user itself; `sender` has sent it.
pub(crate) fn bound(mut state: Vec<String>, sender: &str) -> Vec<String> {
    let Some(own) = state.pop() else { return state };
    let own = if own.len() > OWN_BYTES_MAX { shorten(&own) } else { own };
    let mut seen = BTreeSet::new();
    let mut ranked = Vec::new();
    for (at, event) in state.iter().enumerate() {
        // A list would be read as the fields of the object in their order.
        let object = Some(event).filter(|event| event.starts_with('{'));
        let parsed = object.and_then(|event| serde_json::from_str(event).ok());
        let rank = parsed.and_then(|event| rank(&event, sender));
        if let Some(rank) = rank.filter(|rank| seen.insert(*rank)) {
            ranked.push((rank, at, event.len()));
        }
    }
    ranked.sort_unstable();
    let mut left = BYTES_MAX.saturating_sub(own.len());
    let mut kept = BTreeSet::new();
    for (_, at, bytes) in ranked {
        if bytes <= left {
            left -= bytes;
            kept.insert(at);
        }
    }
    let state = state.into_iter().enumerate().filter(|(at, _)| kept.contains(at));
    state.map(|(_, event)| event).chain([own]).collect()
}

/// The place of an event among those that tell a room. `None` for one that does not.
fn rank(event: &Stripped<'_>, sender: &str) -> Option<usize> {
    match (&*event.event_type, &*event.state_key) {
        (MEMBER, user_id) => (user_id == sender).then_some(TELLING.len()),
        (event_type, "") => TELLING.iter().position(|telling| *telling == event_type),
        _ => None,
    }
}

/// The member event with nothing but its membership.
fn shorten(own: &str) -> String {
    #[derive(Default, Deserialize)]
    struct Content<'a> {
        #[serde(borrow, default)]
        membership: Cow<'a, str>,
    }
    let Ok(event) = serde_json::from_str::<Stripped<'_>>(own) else { return "{}".to_owned() };
    let content: Content<'_> = serde_json::from_str(event.content.get()).unwrap_or_default();
    let mut short = Object::new();
    short.object("content", |json| json.text("membership", &content.membership));
    short.json("sender", event.sender);
    short.text("state_key", &event.state_key);
    short.text("type", &event.event_type);
    short.finish().into()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const SENDER: &str = "@m:b.example";

    fn event(event_type: &str, state_key: &str, content: Value) -> String {
        let event =
            json!({ "type": event_type, "state_key": state_key, "sender": SENDER, "content": content });
        event.to_string()
    }

    fn own(reason: &str) -> String {
        event(MEMBER, "@alice:a.example", json!({ "membership": "invite", "reason": reason }))
    }

    #[test]
    fn what_does_not_tell_a_room_is_left_out() {
        let telling = [
            event(NAME, "", json!({ "name": "Kitchen" })),
            event(CREATE, "", json!({})),
            event(MEMBER, SENDER, json!({ "membership": "join" })),
        ];
        let mut state = telling.to_vec();
        state.insert(1, event(NAME, "", json!({ "name": "A second name" })));
        state.insert(0, event("m.t1", "", json!({ "a": "b".repeat(2_300) })));
        state.insert(0, event(TOPIC, "x", json!({})));
        state.insert(0, event(MEMBER, "@somebody:b.example", json!({ "membership": "join" })));
        state.insert(0, r#"[{},"@m:b.example","","m.room.encryption"]"#.to_owned());
        state.push(own("hello"));
        let expected: Vec<String> = telling.into_iter().chain([own("hello")]).collect();
        let bounded = bound(state, SENDER);
        assert_eq!(bounded, expected);
        assert_eq!(bound(bounded, SENDER), expected, "it is bounded already");
        assert_eq!(bound(Vec::new(), SENDER), [""; 0]);
    }

    #[test]
    fn large_events_make_room_for_those_that_matter_more() {
        let large = |event_type| event(event_type, "", json!({ "a": "b".repeat(40_000) }));
        let create = event(CREATE, "", json!({ "a": "b".repeat(20_000) }));
        let name = event(NAME, "", json!({ "name": "Kitchen" }));
        let state = vec![large(TOPIC), name.clone(), large(AVATAR), create.clone(), own(&"c".repeat(60_000))];
        let bounded = bound(state, SENDER);
        assert!(bounded.iter().map(String::len).sum::<usize>() <= BYTES_MAX);
        assert_eq!(bounded.get(..3).unwrap(), [name, large(AVATAR), create]);
        let short: Value = serde_json::from_str(bounded.last().unwrap()).unwrap();
        let member = json!({ "membership": "invite" });
        let expected =
            json!({ "type": MEMBER, "state_key": "@alice:a.example", "sender": SENDER, "content": member });
        assert_eq!(short, expected);
    }
}
