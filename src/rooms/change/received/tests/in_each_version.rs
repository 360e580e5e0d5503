//! Events of other servers in rooms of each version from 1 to 12: whatever the order in which a forked history comes in,
//! the room ends in one state.

use std::collections::BTreeSet;

use super::*;

/// Gives the value of `prev_events` and `auth_events` as this version writes them.
fn cited(version: u8, ids: &[OwnedEventId]) -> serde_json::Value {
    let with_hash = event::are_ids_chosen(version);
    ids.iter().map(|id| if with_hash { json!([id, { "sha256": "x" }]) } else { json!(id) }).collect()
}

/// The reference hash of an event, by which events of one id are told apart.
pub(super) fn reference_of(json: &serde_json::Value) -> crate::schema::rooms::EventHash {
    crate::rooms::reference::hash(json.to_string().as_bytes(), versions::find_rules(1).unwrap()).unwrap()
}

/// A room that another server made, of one version.
pub(super) struct Elsewhere {
    pub(super) fixture: Fixture,
    version: u8,
    /// The events so far, in the order in which they were made.
    pub(super) events: Vec<Received>,
    /// The next events state a depth that is this much greater.
    deeper: u64,
}

impl Elsewhere {
    /// A room without any event yet; `id` is given where the create event is known.
    fn empty(version: u8, id: &str) -> Self {
        let fixture = Fixture::without_room();
        let id = RoomId::parse(id).unwrap();
        let mut change =
            Change::begin_room(&fixture.store, fixture.rooms.sit(ROOM), ROOM, id, version).unwrap();
        change.put_room();
        drop(change.enqueue(&fixture.store).unwrap());
        fixture.store.flush().unwrap();
        Self { fixture, version, events: Vec::new(), deeper: 0 }
    }

    /// The beginning of a public room of Alice's, in which Bob is, too.
    pub(super) fn new(version: u8) -> Self {
        let mut room = Self::empty(version, "!room:a.example");
        if version >= 12 {
            let create = room.make(&alice(), "m.room.create", "", json!({ "room_version": "12" }), &[], &[]);
            room = Self::empty(version, &create.id().as_str().replacen('$', "!", 1));
        }
        let users = match version {
            12.. => json!({ "@bob:b.example": 50 }),
            _ => json!({ "@alice:a.example": 100, "@bob:b.example": 50 }),
        };
        let joins = json!({ "membership": "join" });
        for (sender, event_type, key, content) in [
            (
                alice(),
                "m.room.create",
                "",
                json!({ "creator": alice(), "room_version": version.to_string() }),
            ),
            (alice(), "m.room.member", "@alice:a.example", joins.clone()),
            (alice(), "m.room.power_levels", "", json!({ "users": users, "events": { "x": 0 } })),
            (alice(), "m.room.join_rules", "", json!({ "join_rule": "public" })),
            (bob(), "m.room.member", "@bob:b.example", joins),
        ] {
            let content = if version >= 12 && event_type == "m.room.create" {
                json!({ "room_version": "12" })
            } else {
                content
            };
            let prev: Vec<_> = room.events.last().map(|last| last.id().to_owned()).into_iter().collect();
            room.add(&sender, event_type, key, content, &prev);
        }
        room
    }

    /// Makes an event in the form of the room's version, which nobody has received yet.
    pub(super) fn make(
        &mut self,
        sender: &OwnedUserId,
        event_type: &str,
        key: &str,
        content: serde_json::Value,
        prev: &[OwnedEventId],
        auth: &[OwnedEventId],
    ) -> Received {
        let number = self.events.len() as u64;
        let row = self.fixture.row();
        let mut json = json!({
            "sender": sender, "type": event_type, "state_key": key, "content": content,
            // Every other event has an earlier time than the one before it.
            "origin_server_ts": 1_000 + (number ^ 1), "depth": number + 1 + self.deeper,
            "prev_events": cited(self.version, prev), "auth_events": cited(self.version, auth),
        });
        if self.version < 12 || event_type != "m.room.create" {
            json["room_id"] = json!(row.id);
        }
        let mut hash = [0; 32];
        hash[..8].copy_from_slice(&(number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
        if event::are_ids_chosen(self.version) {
            json["event_id"] = json!(format!("$event{number}:a.example"));
            hash = reference_of(&json);
        }
        Received::check(ROOM, &row, hash, json.to_string().into()).unwrap()
    }

    /// Makes an event on these, allowed by the state before the first of them, and takes it in.
    pub(super) fn add(
        &mut self,
        sender: &OwnedUserId,
        event_type: &str,
        key: &str,
        content: serde_json::Value,
        prev: &[OwnedEventId],
    ) {
        let rules = versions::find_rules(self.version).unwrap();
        let mut auth = Vec::new();
        if let Some(first) = prev.first() {
            let raw = serde_json::value::to_raw_value(&content).unwrap();
            let needed =
                admit::needed_keys(&event_type.into(), sender, Some(key), &raw, &rules.authorization)
                    .unwrap();
            let change = Change::begin(&self.fixture.store, self.fixture.rooms.sit(ROOM), ROOM).unwrap();
            let at = change.state_after(change.find_num(first).unwrap().unwrap()).unwrap();
            for (event_type, key) in needed {
                let event_type = event_type.to_string();
                if self.version >= 12 && event_type == "m.room.create" {
                    continue;
                }
                let key = state::find_key(&change.batch, ROOM, &event_type, &key).unwrap();
                let num = key.and_then(|key| state::at(&change.batch, ROOM, at, key).unwrap().event());
                auth.extend(num.map(|num| event::require(&change.batch, ROOM, num).unwrap().id(&change.row)));
            }
        }
        let received = self.make(sender, event_type, key, content, prev, &auth);
        let outcome = self.fixture.receive(received.clone()).1;
        assert!(matches!(outcome, Outcome::Accepted(_) | Outcome::Aside(..)), "{outcome:?}");
        self.events.push(received);
    }

    /// Takes in these events in another order, in which each comes after those that it cites.
    fn received_as(&self, mut picks: impl FnMut(usize) -> usize) -> Fixture {
        let mut other = Self::empty(self.version, self.fixture.row().id.as_str());
        let (mut left, mut known) = (self.events.clone(), BTreeSet::new());
        while !left.is_empty() {
            let is_ready = |event: &&Received| {
                let mut cited = event.event().prev.iter().chain(&event.event().auth);
                cited.all(|id| known.contains(id))
            };
            let ready: Vec<_> = left.iter().filter(is_ready).map(|event| event.id().to_owned()).collect();
            let picked = ready[picks(ready.len())].clone();
            let index = left.iter().position(|event| *event.id() == *picked).unwrap();
            other.fixture.receive(left.remove(index));
            other.fixture.check_state();
            known.insert(picked);
        }
        other.fixture
    }
}

type Tries = Vec<(u8, u8, Vec<prop::sample::Index>)>;

fn run(version: u8, tries: &Tries, orders: &[Vec<prop::sample::Index>]) {
    let mut room = Elsewhere::new(version);
    let begun = room.events.len();
    for (what, value, prevs) in tries {
        let (what, value) = (*what, *value);
        let mut prev: Vec<usize> =
            prevs.iter().map(|at| begun - 1 + at.index(room.events.len() - begun + 1)).collect();
        prev.sort_unstable();
        prev.dedup();
        let prev: Vec<_> = prev.into_iter().map(|at| room.events[at].id().to_owned()).collect();
        let member = |membership: &str| json!({ "membership": membership });
        let levels = || {
            let mut users = json!({ "@bob:b.example": value * 20 });
            if version < 12 {
                users["@alice:a.example"] = json!(100);
            }
            json!({ "users": users, "events": { "x": 0 } })
        };
        let (sender, event_type, key, content) = match what {
            0 => (alice(), "m.room.member", "@bob:b.example", member("ban")),
            1 => (bob(), "m.room.member", "@bob:b.example", member("join")),
            2 => (alice(), "m.room.member", "@bob:b.example", member("leave")),
            3 => (alice(), "m.room.power_levels", "", levels()),
            4 => (
                alice(),
                "m.room.join_rules",
                "",
                json!({ "join_rule": if value < 3 { "invite" } else { "public" } }),
            ),
            5 | 6 => (bob(), "x", "k", json!({ "n": value })),
            7 => (bob(), "m.room.topic", "", json!({ "topic": value })),
            _ => (alice(), "x", "", json!({ "n": value })),
        };
        room.add(&sender, event_type, key, content, &prev);
    }
    // Whether an event soft-fails depends on when it comes. A last event cites all that no other cites, soft-failed ones
    // among them, so that the state before it does not.
    let cited: BTreeSet<_> = room.events.iter().flat_map(|event| event.event().prev.clone()).collect();
    let ends = room.events.iter().map(|event| event.id().to_owned()).filter(|id| !cited.contains(id));
    let ends: Vec<_> = ends.collect();
    room.add(&alice(), "x", "end", json!({}), &ends);
    let expected = room.fixture.current();
    assert_eq!(room.fixture.heads().len(), 1);
    for picks in orders {
        let mut at = 0;
        let other = room.received_as(|count| {
            at += 1;
            picks[at % picks.len()].index(count)
        });
        assert_eq!(other.current(), expected, "version {version}");
        assert_eq!(other.heads(), room.fixture.heads());
    }
}

#[test]
fn a_forked_history_ends_in_one_state_in_every_version_and_whatever_order_it_comes_in() {
    for version in versions::LOWEST..=versions::HIGHEST {
        let config = ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() };
        let index = || any::<prop::sample::Index>();
        let tries = prop::collection::vec((0_u8..10, 0_u8..6, prop::collection::vec(index(), 1..3)), 1..14);
        let orders = prop::collection::vec(prop::collection::vec(index(), 7), 2);
        let mut runner = proptest::test_runner::TestRunner::new(config);
        let checked = runner.run(&(tries, orders), |(tries, orders)| {
            run(version, &tries, &orders);
            Ok(())
        });
        checked.unwrap_or_else(|error| panic!("room version {version}: {error}"));
    }
}

#[test]
fn an_event_of_ours_is_one_deeper_than_the_deepest_that_it_cites_up_to_the_limit_of_the_version() {
    for version in versions::LOWEST..=versions::HIGHEST {
        let limit: u64 = if version < 6 { (1 << 63) - 1 } else { (1 << 53) - 1 };
        let mut room = Elsewhere::new(version);
        let base = room.fixture.heads();
        let say = |room: &mut Elsewhere| {
            let (signer, draft) = (room.fixture.rooms.signer().clone(), text(&alice(), "ours"));
            let stored = room.fixture.change(|change| change.add(&signer, &draft, None).unwrap());
            let json: serde_json::Value = serde_json::from_slice(&stored.row.json).unwrap();
            assert_eq!(json["depth"], stored.row.header.depth, "version {version}");
            stored.row.header.depth
        };
        // The heads are a deep event and a shallow one, in either order.
        for (first, second) in [(40, 10), (50, 90)] {
            for deeper in [first, second] {
                room.deeper = deeper;
                room.add(&bob(), "x", &deeper.to_string(), json!({}), &base);
            }
            let deepest = room.events.iter().rev().take(2).map(Received::depth).max().unwrap();
            assert_eq!(say(&mut room), deepest + 1, "version {version}");
        }
        room.deeper = limit - 2 - room.events.len() as u64;
        room.add(&bob(), "x", "deep", json!({}), &base);
        assert_eq!(room.events.last().unwrap().depth(), limit - 1);
        assert_eq!([say(&mut room), say(&mut room)], [limit; 2], "version {version}");
    }
}
