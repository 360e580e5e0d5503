//! A user who came and went ten thousand times sees the right events, and finding them out reads little.

use proptest::prelude::*;
use ruma::{CanonicalJsonObject, OwnedUserId, RoomId};
use serde_json::json;

use super::{history::CHANGES_READ, *};
use crate::{
    accounts::users,
    env::Env,
    metrics::Metrics,
    rooms::{
        Rooms,
        build::Draft,
        change::Change,
        erased::Erased,
        resolve::Resolver,
        show::{self, Viewer},
        state,
        timeline::{self, PageToken},
        view::RoomView,
    },
    schema::{self, state::StateRef},
    store::{Counting, Direction, Durability, Engine, Guard, Snapshot, Store, engine::Memory},
};

const ROOM: RoomNum = RoomNum(1);
/// Bob comes and goes this many times. He speaks each time while he is in the room, and Alice while he is not.
const STAYS: usize = 2_500;

/// The room begins with this many positions; until its visibility is set, everything is shared.
const BEGINNING: u64 = 5;

struct Fixture {
    store: Store,
    rooms: Rooms,
    bob: UserNum,
}

fn user(name: &str) -> OwnedUserId {
    format!("@{name}:a.example").try_into().unwrap()
}

fn content(json: serde_json::Value) -> CanonicalJsonObject {
    serde_json::from_value(json).unwrap()
}

impl Fixture {
    fn new(history_visibility: &str) -> Self {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
        let server: ruma::OwnedServerName = "a.example".try_into().unwrap();
        let mut batch = store.batch(&Guard::alone());
        let new = users::NewUser { user_id: user("bob"), is_admin: false, is_guest: false, now_ms: 0 };
        let bob = UserNum(1);
        users::create(&mut batch, bob, &new);
        drop(store.enqueue(batch).unwrap());
        let key = crate::rooms::build::tests::a_key();
        let resolver = Resolver::new(Env::simulated(1, 0), Metrics::new());
        let rooms = Rooms::open(&*store.snapshot(), server, key, resolver).unwrap();
        let id = RoomId::parse("!room:a.example").unwrap();
        let seat = rooms.sit(ROOM);
        let mut change = Change::begin_room(&store, seat, ROOM, id, 11).unwrap();
        for (kind, key, json) in [
            ("m.room.create", "", json!({ "room_version": "11" })),
            ("m.room.member", "@alice:a.example", json!({ "membership": "join" })),
            ("m.room.join_rules", "", json!({ "join_rule": "public" })),
            ("m.room.history_visibility", "", json!({ "history_visibility": history_visibility })),
        ] {
            let draft = Draft::state(user("alice"), kind, key, content(json), 0);
            change.add(rooms.signer(), &draft, None).unwrap();
        }
        drop(change.enqueue(&store).unwrap());
        store.flush().unwrap();
        Self { store, rooms, bob }
    }

    fn add(&self, drafts: &[Draft]) {
        for drafts in drafts.chunks(200) {
            let seat = self.rooms.sit(ROOM);
            let mut change = Change::begin(&self.store, seat, ROOM).unwrap();
            for draft in drafts {
                change.add(self.rooms.signer(), draft, None).unwrap();
            }
            drop(change.enqueue(&self.store).unwrap());
            self.store.flush().unwrap();
        }
    }

    /// Bob forgets the room, in which he was or to which he was invited.
    fn forget(&self) {
        let mut change = Change::begin(&self.store, self.rooms.sit(ROOM), ROOM).unwrap();
        let row = members::find(&change.batch, self.bob, ROOM).unwrap().unwrap();
        members::forget(&mut change.batch, self.bob, ROOM, &row);
        drop(change.enqueue(&self.store).unwrap());
        self.store.flush().unwrap();
    }

    fn sight(&self, read: &impl Read) -> Sight {
        Sight::of(read, ROOM, self.bob, &user("bob")).unwrap()
    }
}

fn member(membership: &str, count: usize) -> Draft {
    let json = json!({ "membership": membership, "displayname": format!("Bob {count}") });
    Draft::state(user("bob"), "m.room.member", "@bob:a.example", content(json), 0)
}

fn message(sender: &str) -> Draft {
    let draft = Draft::state(user(sender), "m.room.message", "", content(json!({ "body": "x" })), 0);
    Draft { state_key: None, ..draft }
}

/// Decides by the rules of visibility from the whole state before each event, one lookup at a time.
fn naive(read: &Snapshot, stored: &StoredEvent) -> (Membership, bool) {
    let key = state::find_key(read, ROOM, "m.room.member", "@bob:a.example").unwrap().unwrap();
    let before = state::at(read, ROOM, StateRef::Main(stored.order.before()), key).unwrap();
    let of = |val: StateValue| {
        let stored = event::require(read, ROOM, val.event()?).unwrap();
        stored.membership()
    };
    let before = of(before).unwrap_or(Membership::Leave);
    let is_own = stored.row.state_key().as_deref() == Some("@bob:a.example");
    let after = if is_own { stored.membership().unwrap() } else { before };
    (after, before == Membership::Join || after == Membership::Join)
}

#[test]
fn a_page_of_a_room_that_the_reader_joined_ten_thousand_times_reads_little_more_than_its_events() {
    let fixture = Fixture::new("joined");
    let stay = |count| {
        [
            member("join", count),
            member("join", count + 1),
            message("bob"),
            member("leave", count),
            message("alice"),
        ]
    };
    fixture.add(&(0..STAYS).flat_map(stay).chain([member("join", 0)]).collect::<Vec<_>>());
    fixture.add(&(0..STAYS).map(|count| member("join", count)).collect::<Vec<_>>());
    let snapshot = fixture.store.snapshot();
    let changes =
        schema::STATE_UNDO.prefix::<(RoomNum,)>(&*snapshot, (ROOM,), Direction::Up).unwrap().count();
    assert!(changes >= 10_000, "{changes}");
    let read = Counting::new(&snapshot);
    let mut sight = fixture.sight(&read);
    assert_eq!(sight.joined_until(), Some(Order::MAX));
    assert!(read.rows() <= CHANGES_READ + 16, "{}", read.rows());
    for direction in [Direction::Down, Direction::Up] {
        let from = if direction == Direction::Down { Order::MAX } else { Order::MIN };
        let all = timeline::page(&*snapshot, ROOM, PageToken(from), None, direction).unwrap();
        let all: Vec<_> = all.map(Result::unwrap).collect();
        for page in all.chunks(100) {
            let before = read.rows();
            sight.memberships.clear();
            for stored in page {
                let seen = sight.look(&read, stored).unwrap();
                if stored.order.anchor.number() <= BEGINNING {
                    continue;
                }
                assert_eq!(seen, naive(&snapshot, stored), "{:?} {}", stored.order, stored.row.content());
            }
            // Each event takes two reads for its member event, and the changes are read in parts.
            let rows = read.rows() - before;
            assert!(rows <= 2 * (page.len() + 1) + page.len() + 2 * (CHANGES_READ + 1), "{rows}");
        }
    }
    // Pages begin anywhere, one after the other.
    let all = timeline::page(&*snapshot, ROOM, PageToken(Order::MIN), None, Direction::Up).unwrap();
    let all: Vec<_> = all.map(Result::unwrap).collect();
    let (mut at, mut sight) = (17, fixture.sight(&read));
    for _ in 0..300 {
        at = BEGINNING as usize + (at * 31 + 7) % (all.len() - BEGINNING as usize);
        assert_eq!(sight.look(&read, &all[at]).unwrap(), naive(&snapshot, &all[at]));
    }
}

#[test]
fn who_left_sees_what_was_shared_until_then_however_often_they_were_invited_since() {
    let fixture = Fixture::new("shared");
    let invite = |count| {
        let draft = |membership: &str| Draft { sender: user("alice"), ..member(membership, count) };
        [draft("invite"), draft("leave")]
    };
    let snapshot = fixture.store.snapshot();
    assert_eq!(fixture.sight(&*snapshot).joined_until(), None);
    fixture.add(&[invite(0), invite(1)].concat());
    let snapshot = fixture.store.snapshot();
    assert_eq!(fixture.sight(&*snapshot).joined_until(), None, "invited is not joined");
    fixture.add(&[message("alice"), member("join", 0), message("alice"), member("leave", 0)]);
    fixture.add(&(0..100).flat_map(invite).chain([message("alice")]).collect::<Vec<_>>());
    let snapshot = fixture.store.snapshot();
    let read = Counting::new(&snapshot);
    let mut sight = fixture.sight(&read);
    assert!(read.rows() <= CHANGES_READ + 16, "{}", read.rows());
    let messages = timeline::page(&*snapshot, ROOM, PageToken(Order::MIN), None, Direction::Up).unwrap();
    let messages = messages.map(Result::unwrap).filter(|stored| stored.row.event_type() == "m.room.message");
    let seen: Vec<_> = messages.map(|stored| sight.look(&read, &stored).unwrap()).collect();
    let (leave, join) = (Membership::Leave, Membership::Join);
    assert_eq!(seen, [(leave, true), (join, true), (leave, false)]);
}

#[test]
fn a_thread_that_goes_on_after_the_reader_left_is_read_up_to_there() {
    let fixture = Fixture::new("shared");
    fixture.add(&[member("join", 0), message("alice")]);
    let newest = |snapshot: &Snapshot| {
        let mut page = timeline::page(snapshot, ROOM, PageToken(Order::MAX), None, Direction::Down).unwrap();
        page.next().unwrap().unwrap()
    };
    let row = crate::rooms::require_row(&*fixture.store.snapshot(), ROOM).unwrap();
    let root = newest(&fixture.store.snapshot());
    let relation = json!({ "rel_type": "m.thread", "event_id": root.id(&row) });
    let reply =
        Draft { content: content(json!({ "body": "x", "m.relates_to": relation })), ..message("alice") };
    fixture.add(&[reply.clone(), reply.clone()]);
    let last_seen = newest(&fixture.store.snapshot()).order;
    fixture.add(&[vec![member("leave", 0)], vec![reply; 1_100]].concat());
    let snapshot = fixture.store.snapshot();
    let read = Counting::new(&snapshot);
    let reader = Reader::of(&read, ROOM, fixture.bob, &user("bob"), Arc::default()).unwrap();
    let end = reader.end(&read).unwrap().unwrap();
    let view = RoomView { read: &read, num: ROOM, row: &row };
    let (user, erased) = (user("bob"), Erased::default());
    let viewer =
        Viewer { user: &user, device: None, now_ms: 0, with_room_id: true, reader: &reader, erased: &erased };
    assert_eq!(show::newest_in_thread(view, root.event(), &viewer, end).unwrap(), Some(last_seen));
    let shown = show::show(view, &root, &viewer, None).unwrap();
    let shown: serde_json::Value = serde_json::from_str(shown.as_str()).unwrap();
    assert_eq!(shown["unsigned"]["m.relations"]["m.thread"]["count"], 2, "{shown}");
    assert!(read.rows() < 60, "{}", read.rows());
}

/// Makes the next event of a random history: Bob's membership changes in a way that may be, the room's visibility
/// changes, or Alice speaks.
fn draft(step: usize, membership: &mut Membership) -> Draft {
    let by_alice = |draft| Draft { sender: user("alice"), ..draft };
    let visibility = ["world_readable", "shared", "invited", "joined"];
    match step {
        0..4 => {
            let json = json!({ "history_visibility": visibility[step] });
            Draft::state(user("alice"), "m.room.history_visibility", "", content(json), 0)
        }
        4..6 => message("alice"),
        _ => {
            let ways: &[(&str, Membership)] = match membership {
                Membership::Join => &[
                    ("leave", Membership::Leave),
                    ("join", Membership::Join),
                    ("ban", Membership::Ban),
                    ("leave", Membership::Leave),
                ],
                Membership::Invite => &[("join", Membership::Join), ("leave", Membership::Leave)],
                Membership::Leave | Membership::Knock => &[
                    ("invite", Membership::Invite),
                    ("join", Membership::Join),
                    ("invite", Membership::Invite),
                ],
                Membership::Ban => &[("leave", Membership::Leave)],
            };
            let (name, next) = ways[step % ways.len()];
            let is_alices = matches!(name, "invite" | "ban") || *membership == Membership::Ban;
            *membership = next;
            if is_alices { by_alice(member(name, step)) } else { member(name, step) }
        }
    }
}

/// The step at which Bob forgets the room, if he may.
const FORGET: usize = 10;
/// The events of the room before the first step.
const EVENTS_BEFORE: usize = 4;

/// Carries out these steps. Answers how many events the room had each time that Bob forgot it.
fn carry_out(fixture: &Fixture, steps: &[usize]) -> Vec<usize> {
    let (mut membership, mut is_known) = (Membership::Leave, false);
    let (mut drafts, mut count, mut forgets) = (Vec::new(), EVENTS_BEFORE, Vec::new());
    for step in steps {
        if *step == FORGET {
            if is_known && matches!(membership, Membership::Leave | Membership::Ban) {
                fixture.add(&std::mem::take(&mut drafts));
                fixture.forget();
                forgets.push(count);
            }
            continue;
        }
        let draft = draft(*step, &mut membership);
        is_known |= draft.event_type == MEMBER;
        drafts.push(draft);
        count += 1;
    }
    fixture.add(&drafts);
    forgets
}

/// Compares what Bob is shown after these steps with the rules, applied to the whole history.
fn check(steps: &[usize]) {
    let fixture = Fixture::new("shared");
    let forgets = carry_out(&fixture, steps);
    let snapshot = fixture.store.snapshot();
    let events = timeline::page(&*snapshot, ROOM, PageToken(Order::MIN), None, Direction::Up).unwrap();
    let (mut now, mut around) = ((Membership::Leave, HistoryVisibility::Shared), Vec::new());
    for stored in events.map(Result::unwrap) {
        let before = now;
        if stored.row.state_key().as_deref() == Some("@bob:a.example") {
            now.0 = stored.membership().unwrap();
        } else if stored.row.event_type() == HISTORY_VISIBILITY {
            now.1 = HistoryVisibility::of_content(stored.row.content());
        }
        around.push((stored, before, now));
    }
    let ended = |(_, before, after): &&(StoredEvent, (Membership, _), (Membership, _))| {
        before.0 == Membership::Join && after.0 != Membership::Join
    };
    let is_own = |stored: &StoredEvent| stored.row.state_key().as_deref() == Some("@bob:a.example");
    let joined = around.iter().rposition(|(stored, _, after)| is_own(stored) && after.0 == Membership::Join);
    // Nothing that Bob forgot counts before he joins again.
    let forgotten = forgets.into_iter().rfind(|count| joined.is_none_or(|joined| joined < *count));
    let until = match now.0 {
        Membership::Join => Some(Order::MAX),
        _ if forgotten.is_some() => None,
        _ => around.iter().rev().find(ended).map(|(stored, ..)| stored.order),
    };
    let invited_from = forgotten.map_or(Order::MIN, |count| {
        let next = around.iter().skip(count).find(|(stored, ..)| is_own(stored));
        next.map_or(Order::MAX, |(stored, ..)| stored.order)
    });
    let sees = |order: Order, states: [(Membership, HistoryVisibility); 2]| {
        let was = |is: Membership| states.iter().any(|(membership, _)| *membership == is);
        let is_of_stay = until.is_some_and(|until| order <= until);
        (is_of_stay && was(Membership::Join))
            || states.iter().any(|(_, visibility)| match visibility {
                HistoryVisibility::WorldReadable => true,
                HistoryVisibility::Shared => is_of_stay,
                HistoryVisibility::Invited => {
                    was(Membership::Invite) && (is_of_stay || order >= invited_from)
                }
                HistoryVisibility::Joined => false,
            })
    };
    let mut sight = fixture.sight(&*snapshot);
    assert_eq!((sight.user(), sight.joined_until()), ("@bob:a.example", until));
    let mut last_seen = None;
    for (stored, before, after) in &around {
        let expected = (after.0, sees(stored.order, [*before, *after]));
        assert_eq!(sight.look(&*snapshot, stored).unwrap(), expected, "{steps:?} at {:?}", stored.order);
        last_seen = if expected.1 { Some(stored.order) } else { last_seen };
    }
    for (stored, before, after) in around.iter().rev() {
        let expected = (after.0, sees(stored.order, [*before, *after]));
        assert_eq!(sight.look(&*snapshot, stored).unwrap(), expected, "{steps:?} at {:?}", stored.order);
    }
    let ranges = fixture.sight(&*snapshot).seen(&*snapshot).unwrap();
    let is_change = |stored: &StoredEvent| is_own(stored) || stored.row.event_type() == HISTORY_VISIBILITY;
    for (stored, before, after) in around.iter().filter(|(stored, ..)| !is_change(stored)) {
        let anchor = stored.order.anchor;
        let is_in = ranges.iter().any(|(first, last)| (*first..=*last).contains(&anchor));
        assert_eq!(is_in, sees(stored.order, [*before, *after]), "{steps:?} at {anchor}: {ranges:?}");
    }
    // A message that comes next is seen or not as the room is now.
    let end = if sees(Order::MAX, [now, now]) { Some(Order::MAX) } else { last_seen };
    let is_open = |(.., (_, visibility)): &(_, _, (_, HistoryVisibility))| {
        matches!(visibility, HistoryVisibility::Shared | HistoryVisibility::WorldReadable)
    };
    let sees_everything = now.0 == Membership::Join && around.iter().all(is_open);
    let first_end = around.iter().find(|event| ended(event)).map(|(stored, ..)| stored.order);
    let first_join = around.iter().find(|(_, _, after)| after.0 == Membership::Join);
    let first_join = first_join.map(|(stored, ..)| stored.order);
    // No answer depends on the events that were asked for before.
    for mut sight in [fixture.sight(&*snapshot), sight] {
        assert!(!sight.sees_everything(&*snapshot).unwrap() || sees_everything, "{steps:?}");
        for below in [Order::MIN, Order::MAX].into_iter().chain(first_end) {
            let expected = first_join.filter(|_| first_end.is_some_and(|end| end < below));
            assert_eq!(sight.first_stay(&*snapshot, below).unwrap(), expected, "{steps:?}");
        }
        assert_eq!(sight.end(&*snapshot).unwrap(), end, "{steps:?}");
    }
    if steps.len() < CHANGES_READ {
        let found = fixture.sight(&*snapshot).sees_everything(&*snapshot).unwrap();
        assert_eq!(
            found, sees_everything,
            "{steps:?}: a member of an open room is asked nothing for each event"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn what_is_seen_follows_from_the_room_before_and_after_each_event(
        steps in proptest::collection::vec(0..=FORGET, 1..30)
    ) {
        check(&steps);
    }
}

#[test]
fn what_was_open_before_many_changes_of_visibility_is_still_seen() {
    // The room is open to everybody for one message, and then its visibility changes more often than is read at once.
    let closed = [2, 3].repeat(CHANGES_READ);
    check(&[&[0, 4][..], &closed, &[4]].concat());
    // The same for somebody who came and went before, and for a member.
    check(&[&[7, 6, 0, 4][..], &closed, &[4]].concat());
    check(&[&[7, 0, 4][..], &closed, &[4]].concat());
    // A newcomer is not shown what was said while the room was closed, although it was open long before and since.
    let open = [0, 1].repeat(CHANGES_READ);
    check(&[&open[..], &[3, 4], &open, &[7]].concat());
    // Stays that are longer ago than what is read at once count, too.
    let stays = [7, 6].repeat(CHANGES_READ);
    check(&[&[3][..], &stays, &[4]].concat());
}

#[test]
fn a_server_sees_what_its_users_may_see() {
    for (visibility, expected) in [
        ("shared", [true, true, true, true, true]),
        ("invited", [false, false, true, false, true]),
        ("joined", [false, false, false, false, true]),
    ] {
        let fixture = Fixture::new(visibility);
        let zed = |sender: &str, membership: &str| {
            let json = json!({ "membership": membership });
            let sender: OwnedUserId = sender.try_into().unwrap();
            Draft::state(sender, "m.room.member", "@zed:b.example", content(json), 0)
        };
        let alice = "@alice:a.example";
        fixture.add(&[message("alice")]);
        let other = Draft { state_key: Some("@zoe:b.exampleother".to_owned()), ..zed(alice, "invite") };
        fixture.add(&[other, message("alice")]);
        fixture.add(&[zed(alice, "invite"), message("alice")]);
        fixture.add(&[zed(alice, "leave"), message("alice")]);
        fixture.add(&[zed("@zed:b.example", "join"), message("alice")]);
        let read = fixture.store.snapshot();
        let mut sight = ServerSight::of_resident(ROOM, "b.example");
        let events = schema::TIMELINE.prefix::<(RoomNum,)>(&*read, (ROOM,), Direction::Up).unwrap();
        let mut sees = Vec::new();
        for event in events {
            let ((_, order), row) = event.unwrap();
            if row.event_type() == "m.room.message" {
                sees.push(sight.sees(&*read, &StoredEvent { order, row }).unwrap());
            }
        }
        assert_eq!(sees, expected, "{visibility}");
    }
}
