//! Rooms that other servers made, for tests of joins.

use std::collections::{BTreeMap, BTreeSet};

use ruma::{CanonicalJsonObject, OwnedEventId, OwnedUserId, RoomId};
use serde_json::json;

use super::{
    super::{Before, Older},
    Brought, Received, list_allowing, order_by_auth,
};
use crate::{
    ids::RoomNum,
    rooms::{
        admit,
        build::{self, Draft, Setting, Signer},
        event, versions,
    },
    schema::event_types::{CREATE, JOIN_RULES, MEMBER, MESSAGE, POWER_LEVELS},
    schema::rooms::{Membership, Resident, RoomRow},
};

/// The number that the room gets here.
pub(crate) const ROOM: RoomNum = RoomNum(1);
pub(crate) const VERSION: u8 = 11;

pub(crate) type Key = (String, String);

pub(crate) fn user(name: &str) -> OwnedUserId {
    OwnedUserId::try_from(format!("@{name}")).unwrap()
}

pub(crate) fn alice() -> OwnedUserId {
    user("alice:a.example")
}

pub(crate) fn bob() -> OwnedUserId {
    user("bob:here.example")
}

pub(crate) fn content(json: serde_json::Value) -> CanonicalJsonObject {
    serde_json::from_value(json).unwrap()
}

pub(crate) fn signer() -> Signer {
    Signer::new("a.example".try_into().unwrap(), build::tests::a_key())
}

/// A room on other servers: its events, and its state as a full map.
#[derive(Clone)]
pub(crate) struct Elsewhere {
    pub(crate) row: RoomRow,
    version: u8,
    /// All state events, oldest first.
    pub(crate) events: Vec<Received>,
    pub(crate) state: BTreeMap<Key, Received>,
    /// The events that the next one cites.
    pub(crate) heads: Vec<OwnedEventId>,
    /// All events, oldest first, each with the state before it.
    pub(crate) timeline: Vec<(Received, BTreeMap<Key, Received>)>,
    depth: u64,
}

impl Elsewhere {
    /// A public room of Alice's.
    pub(crate) fn new(version: u8) -> Self {
        let row = RoomRow::new(RoomId::parse("!room:a.example").unwrap(), version, Resident::Yes);
        let (events, state) = (Vec::new(), BTreeMap::new());
        let mut room =
            Self { row, version, events, state, heads: Vec::new(), timeline: Vec::new(), depth: 0 };
        let create = match version {
            11.. => json!({ "room_version": version.to_string() }),
            _ => json!({ "room_version": version.to_string(), "creator": alice() }),
        };
        if version >= 12 {
            let draft = Draft::state(alice(), CREATE, "", content(create.clone()), 1_000);
            let rules = versions::find_rules(version).unwrap();
            let setting = Setting {
                room_id: None,
                rules,
                prev: &[],
                auth: &[],
                hashes: crate::rooms::reference::NO_HASHES,
                depth: 1,
            };
            let built = build::build(&signer(), &draft, &setting, version).unwrap();
            room.row.id = RoomId::parse(built.event.id.as_str().replacen('$', "!", 1)).unwrap();
        }
        room.set(&alice(), CREATE, "", create);
        room.join(&alice());
        let users = if version >= 12 { json!({}) } else { json!({ alice().as_str(): 100 }) };
        room.set(&alice(), POWER_LEVELS, "", json!({ "users": users, "events": { "x": 0 } }));
        room.set(&alice(), JOIN_RULES, "", json!({ "join_rule": "public" }));
        room
    }

    /// A room with so many members of several servers, some of whom left, and some of whom are users of ours.
    pub(crate) fn with_members(count: usize) -> Self {
        let mut room = Self::new(VERSION);
        for number in 0..count {
            let server = ["a", "b", "here", "c"][number % 4];
            let member = user(&format!("user{number}:{server}.example"));
            room.join(&member);
            if number % 7 == 3 {
                room.set(&member, MEMBER, member.as_str(), json!({ "membership": "leave" }));
            }
            if number % 9 == 4 {
                room.set(
                    &alice(),
                    MEMBER,
                    &format!("@invited{number}:here.example"),
                    json!({ "membership": "invite" }),
                );
            }
        }
        room
    }

    /// Makes an event on the newest one, which is not part of the room yet.
    pub(crate) fn make(
        &self,
        sender: &OwnedUserId,
        event_type: &str,
        key: Option<&str>,
        json: serde_json::Value,
    ) -> Received {
        let mut draft = Draft::state(
            sender.clone(),
            event_type,
            key.unwrap_or_default(),
            content(json),
            1_000 + self.depth,
        );
        draft.state_key = key.map(ToOwned::to_owned);
        let rules = versions::find_rules(self.version).unwrap();
        let raw = draft.raw_content().unwrap();
        let needed = admit::needed_keys(&event_type.into(), sender, key, &raw, &rules.authorization).unwrap();
        let implied = |kind: &str| kind == CREATE && rules.authorization.room_create_event_id_as_room_id;
        let auth = needed.into_iter().filter_map(|(kind, key)| {
            let kind = kind.to_string();
            if implied(&kind) || event_type == CREATE { None } else { self.state.get(&(kind, key)) }
        });
        let auth: Vec<_> = auth.map(|event| event.id().to_owned()).collect();
        let is_hashed = rules.authorization.room_create_event_id_as_room_id && event_type == CREATE;
        let prev = self.heads.clone();
        let setting = Setting {
            room_id: (!is_hashed).then_some(&self.row.id),
            rules,
            prev: &prev,
            auth: &auth,
            hashes: crate::rooms::reference::NO_HASHES,
            depth: self.depth + 1,
        };
        let built = build::build(&signer(), &draft, &setting, self.version).unwrap();
        Received::check(ROOM, &self.row, built.hash, built.json).unwrap()
    }

    pub(crate) fn add(&mut self, received: &Received) {
        self.timeline.push((received.clone(), self.state.clone()));
        (self.heads, self.depth) = (vec![received.id().to_owned()], received.depth());
        if let Some(key) = &received.event().state_key {
            self.events.push(received.clone());
            self.state.insert((received.event().event_type.to_string(), key.clone()), received.clone());
        }
    }

    pub(crate) fn set(&mut self, sender: &OwnedUserId, event_type: &str, key: &str, json: serde_json::Value) {
        let made = self.make(sender, event_type, Some(key), json);
        self.add(&made);
    }

    pub(crate) fn join(&mut self, member: &OwnedUserId) -> Received {
        let join = self.make(member, MEMBER, Some(member.as_str()), json!({ "membership": "join" }));
        self.add(&join);
        join
    }

    /// The state and all that allows it, as a server that we join by sends it, in an order in which it can be taken in.
    pub(crate) fn brought(&self) -> Vec<Brought> {
        // Everything that was ever part of the state is sent, the newest first.
        let all: Vec<_> = self.events.iter().rev().collect();
        let named: Vec<_> = all
            .iter()
            .map(|event| (event.id().to_owned(), list_allowing(&self.row, event.event()).unwrap()))
            .collect();
        let current: BTreeSet<_> = self.state.values().map(|event| event.id().to_owned()).collect();
        let order = order_by_auth(&named);
        assert_eq!(order.len(), all.len());
        let brought = order
            .into_iter()
            .map(|place| Brought { event: all[place].clone(), is_state: current.contains(all[place].id()) });
        brought.collect()
    }

    pub(crate) fn say(&mut self, sender: &OwnedUserId, json: serde_json::Value) -> Received {
        let said = self.make(sender, MESSAGE, None, json);
        self.add(&said);
        said
    }

    /// Some events of the room, oldest first, as another server gives them to fill a hole: the state before the first of
    /// them is fetched.
    pub(crate) fn older(&self, range: std::ops::Range<usize>) -> Vec<Older> {
        let older = self.timeline[range].iter().enumerate().map(|(place, (event, before))| Older {
            event: event.clone(),
            state_before: (place == 0)
                .then(|| Before::Ids(before.values().map(|event| event.id().to_owned()).collect())),
        });
        older.collect()
    }

    pub(crate) fn ids(&self) -> BTreeMap<Key, OwnedEventId> {
        self.state.iter().map(|(key, event)| (key.clone(), event.id().to_owned())).collect()
    }

    pub(crate) fn members(&self, membership: &str) -> BTreeSet<String> {
        let wanted = Membership::parse(membership);
        let is_it = |event: &Received| event::membership_of(event.event().content.get()) == wanted;
        let members = self.state.iter().filter(|((kind, _), event)| kind == MEMBER && is_it(event));
        members.map(|((_, user), _)| user.clone()).collect()
    }
}
