//! Looks at the world at rest.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use aqueduct::{
    flows::App,
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    rooms::{self, event, state, timeline},
    schema::{self, events::Place, state::StateValue},
    store::{Direction, Snapshot},
};
use http::{Method, StatusCode};
use ruma::{EventId, RoomId};
use serde_json::Value;
use tokio::time::sleep;

use super::{
    follower::Standing,
    liar,
    people::{People, Person, Room, path},
    report::{self, Disagreement},
    wire::name,
    world::{SERVERS, World},
};
use crate::accounts::text;

/// All servers have brought each other up to date after this time without faults.
const SETTLES_WITHIN: Duration = Duration::from_secs(600);
/// After so many rounds of messages that cite all heads, all servers agree.
const ROUNDS_MAX: u64 = 4;

/// State by type and state key: the ids of its events.
type State = BTreeMap<(String, String), String>;

/// Waits until all servers agree. Each server holds some events that others may not take for heads of the room, because they
/// were soft-failed there; so that all resolve the same states, somebody on each server says something, which cites all heads. What is
/// said while they do not agree may not be told to all, and comes to them by what is said when they do.
pub(crate) async fn settle(world: &World, people: &People) {
    people.open_again(world).await;
    let mut did_agree = false;
    for round in 0..=ROUNDS_MAX {
        sleep(SETTLES_WITHIN).await;
        move_again(world, people).await;
        let found = find_disagreement(world, people).await;
        let what = found.as_ref().map(|found| &found.what);
        world.wire.note(|| format!("after {round} rounds: {what:?}"));
        if did_agree && found.is_none() {
            return;
        }
        did_agree = found.is_none();
        assert!(round < ROUNDS_MAX, "the servers do not agree: {}", explain(world, found));
        world.counts.borrow_mut().rounds += u64::from(found.is_some());
        let rooms = people.rooms.borrow().clone();
        for room in &rooms {
            for place in 0..SERVERS {
                for person in people.persons.iter().filter(|person| person.place() == place) {
                    if list_joined(world, person).await.contains(&room.id) {
                        people.say(world, person, room).await;
                        break;
                    }
                }
            }
        }
    }
}

/// Describes what servers do not agree on; in a replay also with all that they have of the room.
fn explain(world: &World, found: Option<Disagreement>) -> String {
    let Some(found) = found else { return String::new() };
    note_graphs(world, &found.room, &found.keys);
    report::describe(world, &found)
}

/// Prints in a replay all that the servers have of a room, with what they have under these keys of its state.
fn note_graphs(world: &World, room: &str, keys: &[(String, String)]) {
    for place in 0..SERVERS {
        for line in world.app(place).iter().flat_map(|app| report::list_graph(app, room, keys)) {
            world.wire.note(|| format!("s{place} has {line}"));
        }
    }
}

/// Describes where each server keeps an event that somebody misses; in a replay also all that they have of the room.
fn explain_missed(world: &World, room: &str, event_id: &str) -> String {
    note_graphs(world, room, &[]);
    let found = Disagreement {
        what: String::new(),
        room: room.to_owned(),
        keys: Vec::new(),
        events: vec![event_id.to_owned()],
    };
    report::describe(world, &found)
}

/// Has people join again whose join came into the room and was not answered, so that their own server does not know of it. No
/// server can find that out by itself: its users see that they are not in, and try again. In the same way nobody tells a server
/// of a removal while the room shuts the server out, so that those who were removed leave; and so do those whose join all others
/// soft-failed, of whom nobody who could say so is in the room any more.
async fn move_again(world: &World, people: &People) {
    let rooms = people.rooms.borrow().clone();
    for room in &rooms {
        let owner = &people.persons[room.owner];
        let (_, joined) = read_state(world, owner, &room.id).await;
        for person in people.persons.iter().filter(|person| joined.contains(&person.user_id)) {
            if !list_joined(world, person).await.contains(&room.id) {
                let at = format!("/_matrix/client/v3/join/{}?via={}", room.id, name(owner.place()));
                let (status, json) = person.insist(world, Method::POST, &at, serde_json::json!({})).await;
                let who = &person.user_id;
                world.wire.note(|| format!("{who} joins {} again: {status} {json}", room.id));
            }
        }
        for person in people.persons.iter().filter(|person| !joined.contains(&person.user_id)) {
            let is_in = list_joined(world, person).await.contains(&room.id);
            if is_in
                && (people.was_closed(room) || is_soft_failed_for_all(world, person, &room.id, &joined).await)
            {
                let at = path(&room.id, "leave");
                let (status, json) = person.insist(world, Method::POST, &at, serde_json::json!({})).await;
                let who = &person.user_id;
                world.wire.note(|| format!("{who} leaves {}, being removed: {status} {json}", room.id));
            }
        }
    }
}

/// Whether the event by which a person is in a room is soft-failed at all servers of those who are in it for its maker, or else what their
/// server said last there. Then no event of theirs cites it, and nobody tells the person's server of the state without it: a fork that
/// sets aside who came may leave out somebody whose server goes on from an event of its own, which the others have not for a head.
async fn is_soft_failed_for_all(
    world: &World,
    person: &Person,
    room: &str,
    joined: &BTreeSet<String>,
) -> bool {
    let (state, _) = read_state(world, person, room).await;
    let Some(event_id) = state.get(&("m.room.member".to_owned(), person.user_id.clone())) else {
        return false;
    };
    let last = list_own_heads(&world.app(person.place()).unwrap(), room);
    is_aside_for_all(world, room, event_id, joined)
        || (!last.is_empty() && last.iter().all(|said| is_aside_for_all(world, room, said, joined)))
}

/// The ids of the events of a room that a server made itself and that no event which it knows cites.
fn list_own_heads(app: &App, room: &str) -> Vec<String> {
    let snapshot = app.store.snapshot();
    let (num, row) = rooms::require_room(&*snapshot, <&RoomId>::try_from(room).unwrap()).unwrap();
    let own = row.heads.iter().filter(|head| head.is_own);
    own.map(|head| event::require(&*snapshot, num, head.event).unwrap().id(&row).to_string()).collect()
}

/// Whether an event is soft-failed at all servers of those who are in a room for its maker.
fn is_aside_for_all(world: &World, room: &str, event_id: &str, joined: &BTreeSet<String>) -> bool {
    let is_there = |place: usize| joined.iter().any(|user| user.ends_with(&format!(":{}", name(place))));
    (0..SERVERS).filter(|place| is_there(*place)).all(|place| {
        let found = find_stored(&world.app(place).unwrap(), room, event_id);
        found.is_some_and(|(snapshot, room, event)| {
            schema::ASIDE.get(&*snapshot, (room, event)).unwrap().is_some_and(|aside| !aside.rejected)
                && schema::PLACE.get(&*snapshot, (room, event)).unwrap() == Some(Place::Aside)
        })
    })
}

async fn list_joined(world: &World, person: &Person) -> BTreeSet<String> {
    let path = "/_matrix/client/v3/joined_rooms";
    let (status, json) = person.insist(world, Method::GET, path, Value::Null).await;
    assert_eq!(status, StatusCode::OK, "{json}");
    json["joined_rooms"].as_array().unwrap().iter().map(|room| room.as_str().unwrap().to_owned()).collect()
}

/// Reads the state of a room, and who has joined it by that.
async fn read_state(world: &World, person: &Person, room: &str) -> (State, BTreeSet<String>) {
    let (status, json) = person.insist(world, Method::GET, &path(room, "state"), Value::Null).await;
    if status != StatusCode::OK {
        note_graphs(world, room, &[]);
    }
    assert_eq!(status, StatusCode::OK, "{} in {room}: {json}", person.user_id);
    let (mut state, mut joined) = (State::new(), BTreeSet::new());
    for event in json.as_array().unwrap() {
        if event["type"] == "m.room.member" && event["content"]["membership"] == "join" {
            joined.insert(text(event, "state_key"));
        }
        state.insert((text(event, "type"), text(event, "state_key")), text(event, "event_id"));
    }
    (state, joined)
}

/// Looks whether everybody who is in a room by the state that its maker sees is in it by their own server, and sees the same.
async fn find_disagreement(world: &World, people: &People) -> Option<Disagreement> {
    let rooms = people.rooms.borrow().clone();
    let mut joined_rooms = Vec::new();
    for person in &people.persons {
        joined_rooms.push(list_joined(world, person).await);
    }
    for room in &rooms {
        let owner = &people.persons[room.owner];
        let (state, joined) = read_state(world, owner, &room.id).await;
        for person in &people.persons {
            let (is_in, should) =
                (joined_rooms[person.number].contains(&room.id), joined.contains(&person.user_id));
            if is_in != should {
                let key = ("m.room.member".to_owned(), person.user_id.clone());
                let what = format!(
                    "{} is in {} by their own server: {is_in}, by that of its maker {}: {should}",
                    person.user_id, room.id, owner.user_id
                );
                let events = state.get(&key).cloned().into_iter().collect();
                return Some(Disagreement { what, room: room.id.clone(), keys: vec![key], events });
            }
            if is_in {
                let (theirs, _) = read_state(world, person, &room.id).await;
                if theirs != state {
                    let keys: BTreeSet<_> = theirs.keys().chain(state.keys()).collect();
                    let differ = keys.into_iter().filter(|key| theirs.get(*key) != state.get(*key));
                    let differ: Vec<_> = differ.map(|key| (key, theirs.get(key), state.get(key))).collect();
                    let what = format!(
                        "{} sees another state of {} than its maker {}: {differ:?}",
                        person.user_id, room.id, owner.user_id
                    );
                    let events = differ.iter().flat_map(|(_, one, other)| [*one, *other]).flatten();
                    let events = events.cloned().collect();
                    let keys = differ.iter().map(|(key, ..)| (*key).clone()).collect();
                    return Some(Disagreement { what, room: room.id.clone(), keys, events });
                }
            }
        }
    }
    None
}

/// Checks all that must hold at rest.
pub(crate) async fn all(world: &World, people: &People) {
    let found = find_disagreement(world, people).await;
    assert!(found.is_none(), "after a crash: {}", explain(world, found));
    for person in &people.persons {
        while person.sync(world, people, 0).await {}
    }
    let rooms = people.rooms.borrow().clone();
    for room in &rooms {
        for person in &people.persons {
            let is_in = list_joined(world, person).await.contains(&room.id);
            let standing = person.follower.borrow().rooms.get(&room.id).map(|learnt| learnt.standing);
            let is_shown_in = standing == Some(Standing::Joined);
            assert_eq!(is_shown_in, is_in, "{} in {} by the chain of syncs", person.user_id, room.id);
            if is_in {
                check_room(world, people, person, room).await;
            }
        }
        for place in 0..SERVERS {
            count(world, place, &room.id);
        }
    }
    let mut arrived = 0;
    for person in &people.persons {
        let follower = person.follower.borrow();
        let owed = person.owed.borrow();
        let missing: Vec<_> = owed.difference(&follower.inbox).collect();
        assert!(missing.is_empty(), "{} misses the messages {missing:?}", person.user_id);
        let sent = people.count_messages();
        let forged: Vec<_> = follower.inbox.iter().filter(|number| **number > sent).collect();
        assert!(forged.is_empty(), "{} got forged messages: {forged:?}", person.user_id);
        arrived += follower.inbox.len() as u64;
    }
    world.counts.borrow_mut().to_device += arrived;
}

/// Lists all events of a room that a person may see, the newest first.
async fn list_events(world: &World, person: &Person, room: &str) -> Vec<Value> {
    let (mut events, mut from) = (Vec::new(), String::new());
    loop {
        let page = path(room, &format!("messages?dir=b&limit=50{from}"));
        let (status, json) = person.insist(world, Method::GET, &page, Value::Null).await;
        assert_eq!(status, StatusCode::OK, "{json}");
        events.extend(json["chunk"].as_array().unwrap().iter().cloned());
        match json["end"].as_str() {
            Some(end) => from = format!("&from={end}"),
            None => break,
        }
    }
    events
}

/// Where a server keeps an event of a room.
fn find_place(app: &App, room: &str, event_id: &str) -> Option<Place> {
    let (snapshot, room, event) = find_stored(app, room, event_id)?;
    schema::PLACE.get(&*snapshot, (room, event)).unwrap()
}

/// The numbers of a room and of an event of it at a server, in a snapshot of what the server has.
fn find_stored(app: &App, room: &str, event_id: &str) -> Option<(Arc<Snapshot>, RoomNum, EventNum)> {
    let snapshot = app.store.snapshot();
    let room = rooms::find_room(&*snapshot, <&RoomId>::try_from(room).unwrap()).unwrap()?;
    let event_id = <&EventId>::try_from(event_id).unwrap();
    let event = event::find_num(&*snapshot, room, event_id).unwrap()?;
    Some((snapshot, room, event))
}

async fn check_room(world: &World, people: &People, person: &Person, room: &Room) {
    let who = format!("{} in {}", person.user_id, room.id);
    let events = list_events(world, person, &room.id).await;
    let ids: BTreeSet<_> = events.iter().map(|event| text(event, "event_id")).collect();
    // A redaction is withheld until the event is here that it redacts, and no sync tells it then: it tells what is left of that.
    let others = events.iter().filter(|event| event["type"] != "m.room.redaction");
    let told: BTreeSet<_> = others.map(|event| text(event, "event_id")).collect();
    assert_eq!(ids.len(), events.len(), "{who} is shown an event twice");
    let (state, joined) = read_state(world, person, &room.id).await;
    let app = world.app(person.place()).unwrap();
    let servers: BTreeSet<_> = joined.iter().filter_map(|user| user.split_once(':')).collect();
    let servers: BTreeSet<_> = servers.into_iter().map(|(_, server)| server.to_owned()).collect();
    let mut bodies = BTreeMap::<&str, u64>::new();
    for event in &events {
        if let Some(body) = event["content"]["body"].as_str() {
            assert_ne!(body, liar::FORGED, "{who} is shown {event}");
            *bodies.entry(body).or_default() += 1;
        }
    }
    let sees_all = room.visibility != "joined" || room.owner == person.number;
    let (said, redacted) = (people.said.borrow(), people.redacted.borrow());
    for (event_id, said) in said.iter().filter(|(_, said)| said.room == room.id) {
        let sender = &people.persons[said.sender];
        let times = bodies.get(said.body.as_str()).copied().unwrap_or(0);
        assert!(times <= 1, "{who} is shown {} {times} times", said.body);
        let is_own = sender.place() == person.place();
        if !ids.contains(event_id) && sees_all {
            let place = find_place(&app, &room.id, event_id);
            // Events of a server that is no longer in the room may have come too late to be taken in.
            let may_miss = !is_own && !servers.contains(&name(sender.place()));
            let is_aside = !is_own && place == Some(Place::Aside);
            assert!(
                may_miss || is_aside,
                "{who} misses {event_id} ({}): {}",
                said.body,
                explain_missed(world, &room.id, event_id)
            );
        }
        if is_own && redacted.contains(event_id) {
            assert_eq!(times, 0, "{who} sees {} unredacted", said.body);
        }
    }
    if room.visibility == "joined" && room.owner != person.number {
        check_unseen(&app, person, room, &events);
    }
    check_follower(world, &app, person, room, &told, &state);
}

/// The events that clients see, by their order, as the store of a server has them.
fn list_stored(app: &App, room: &str) -> Vec<(String, Order)> {
    let snapshot = app.store.snapshot();
    let (num, row) = rooms::require_room(&*snapshot, <&RoomId>::try_from(room).unwrap()).unwrap();
    let from = timeline::PageToken(Order::MIN);
    timeline::page(&*snapshot, num, from, None, Direction::Up)
        .unwrap()
        .map(|stored| stored.unwrap())
        .map(|stored| (stored.id(&row).to_string(), stored.order))
        .collect()
}

/// Checks that a chain of syncs has shown all live events that its user may see, in their order, and the state.
fn check_follower(
    world: &World,
    app: &App,
    person: &Person,
    room: &Room,
    told: &BTreeSet<String>,
    state: &State,
) {
    let who = format!("{} in {}", person.user_id, room.id);
    let follower = person.follower.borrow();
    let learnt = &follower.rooms[&room.id];
    let stored = list_stored(app, &room.id);
    let order: BTreeMap<_, _> = stored.iter().map(|(event_id, order)| (event_id, *order)).collect();
    let live = stored.iter().filter(|(event_id, order)| order.minor == 0 && told.contains(event_id));
    let live: Vec<_> = live.map(|(event_id, order)| (*order, event_id)).collect();
    let mut newest = None;
    for part in learnt.stays.iter().flatten() {
        let orders: Vec<_> = part
            .iter()
            .map(|event_id| {
                *order.get(event_id).unwrap_or_else(|| panic!("{who}: {event_id} was shown and is not there"))
            })
            .collect();
        assert!(orders.is_sorted_by(|one, other| one < other), "{who}: shown out of order: {orders:?}");
        let (Some(first), Some(last)) = (orders.first(), orders.last()) else { continue };
        let between = live.iter().filter(|(order, _)| first <= order && order <= last);
        let missed: Vec<_> = between.filter(|(_, event_id)| !part.contains(*event_id)).collect();
        assert!(missed.is_empty(), "{who} was not shown {missed:?}");
        newest = newest.max(Some(*last));
    }
    let end = live.last().map(|(order, _)| *order);
    assert!(
        newest >= end,
        "{who}: the chain misses the newest events: it ends at {newest:?}, the room at {end:?}"
    );
    let differ: Vec<_> = {
        let keys: BTreeSet<_> = learnt.state.keys().chain(state.keys()).collect();
        let differ = keys.into_iter().filter(|key| learnt.state.get(*key) != state.get(*key));
        let differ = differ.map(|key| (key, learnt.state.get(key), state.get(key)));
        // No sync can tell that the room's state has nothing under a key any more, as forks may resolve to.
        let is_told = |key, event: Option<&String>, now: Option<&String>| match (event, now) {
            (Some(event), None) => was_before(app, &room.id, key).as_ref() == Some(event),
            _ => false,
        };
        differ.filter(|(key, event, now)| !is_told(*key, *event, *now)).collect()
    };
    let changes = |key| list_changes(app, &room.id, key);
    let changes: Vec<_> = differ.iter().map(|(key, ..)| changes(key)).collect();
    if !differ.is_empty() {
        let keys: Vec<_> = differ.iter().map(|(key, ..)| (*key).clone()).collect();
        note_graphs(world, &room.id, &keys);
    }
    assert!(
        differ.is_empty(),
        "{who}: the chain knows another state: {differ:?}; changes, and values before them: {changes:?}"
    );
}

/// Lists the orders at which a key of a room's state changed, each with the value before it.
fn list_changes(
    app: &App,
    room: &str,
    (event_type, state_key): &(String, String),
) -> Vec<(Order, StateValue)> {
    let snapshot = app.store.snapshot();
    let (num, _) = rooms::require_room(&*snapshot, <&RoomId>::try_from(room).unwrap()).unwrap();
    let key = state::find_key(&*snapshot, num, event_type, state_key).unwrap();
    let undo = key.map(|key| {
        schema::STATE_UNDO.prefix::<(RoomNum, StateKeyNum)>(&*snapshot, (num, key), Direction::Up).unwrap()
    });
    undo.into_iter().flatten().map(|row| row.unwrap()).map(|((.., order), before)| (order, before)).collect()
}

/// The id of the event that was under a key of a room's state before that was changed last.
fn was_before(app: &App, room: &str, (event_type, state_key): &(String, String)) -> Option<String> {
    let snapshot = app.store.snapshot();
    let (num, row) = rooms::require_room(&*snapshot, <&RoomId>::try_from(room).unwrap()).unwrap();
    let key = state::find_key(&*snapshot, num, event_type, state_key).unwrap()?;
    let mut undo =
        schema::STATE_UNDO.prefix::<(RoomNum, StateKeyNum)>(&*snapshot, (num, key), Direction::Down);
    let (_, before) = undo.as_mut().unwrap().next()?.unwrap();
    let stored = event::find_anywhere(&*snapshot, num, before.event()?).unwrap()?;
    Some(stored.id(&row).to_string())
}

/// Checks in a room whose history is for those who were in it: nothing is shown that has no join of the user above it in the
/// graph, because the user cannot have been in the room then. What the room's maker wrote before the visibility, and the
/// visibility itself, are open to all who come later.
fn check_unseen(app: &App, person: &Person, room: &Room, events: &[Value]) {
    let snapshot = app.store.snapshot();
    let (num, _) = rooms::require_room(&*snapshot, <&RoomId>::try_from(room.id.as_str()).unwrap()).unwrap();
    let mut known = BTreeMap::new();
    for event in events.iter().filter(|event| event["state_key"] != person.user_id.as_str()) {
        let event_id = text(event, "event_id");
        let found =
            event::find_num(&*snapshot, num, <&EventId>::try_from(event_id.as_str()).unwrap()).unwrap();
        let above = look_above(app, num, found.unwrap(), &person.user_id, &mut known);
        let may_see = above.has_join || !above.is_closed;
        let stored = event::find_anywhere(&*snapshot, num, found.unwrap()).unwrap().map(|stored| {
            let (header, json) = (stored.row.header, String::from_utf8_lossy(&stored.row.json).into_owned());
            (stored.order, header.before, header.prev, json)
        });
        let who = &person.user_id;
        assert!(may_see, "{who} is shown {event_id} of {} from before the join: {stored:?}", room.id);
    }
}

/// Facts about the events on which an event stands.
#[derive(Clone, Copy, Default)]
struct Above {
    /// A join of the user is among them, or an event may be that this server does not hold.
    has_join: bool,
    /// The visibility of the room's history is among them.
    is_closed: bool,
}

fn look_above(
    app: &App,
    room: RoomNum,
    event: EventNum,
    user_id: &str,
    known: &mut BTreeMap<EventNum, Above>,
) -> Above {
    if let Some(known) = known.get(&event) {
        return *known;
    }
    let stored = event::find_anywhere(&*app.store.snapshot(), room, event).unwrap();
    let Some(stored) = stored else { return Above { has_join: true, is_closed: true } };
    let json: Value = serde_json::from_slice(&stored.row.json).unwrap();
    let prev = &stored.row.header.prev;
    let is_cut = prev.len() < json["prev_events"].as_array().unwrap().len();
    let mut above = Above { has_join: is_cut, is_closed: is_cut };
    for prev in prev {
        let of_prev = look_above(app, room, *prev, user_id, known);
        let stored = event::find_anywhere(&*app.store.snapshot(), room, *prev).unwrap();
        let json: Value = stored.map_or(Value::Null, |it| serde_json::from_slice(&it.row.json).unwrap());
        let is_join = json["type"] == "m.room.member"
            && json["state_key"] == user_id
            && json["content"]["membership"] == "join";
        above.has_join |= of_prev.has_join || is_join;
        above.is_closed |= of_prev.is_closed || json["type"] == "m.room.history_visibility";
    }
    known.insert(event, above);
    above
}

/// Counts what a server holds of a room.
fn count(world: &World, place: usize, room: &str) {
    let app = world.app(place).unwrap();
    let snapshot = app.store.snapshot();
    // A server may know a room that it is not in, because somebody is invited there.
    let Ok((num, _)) = rooms::require_room(&*snapshot, <&RoomId>::try_from(room).unwrap()) else { return };
    let mut counts = world.counts.borrow_mut();
    for (event_id, _) in list_stored(&app, room) {
        let event_id = <&EventId>::try_from(event_id.as_str()).unwrap();
        let event = event::find_num(&*snapshot, num, event_id).unwrap().unwrap();
        let stored = event::require(&*snapshot, num, event).unwrap();
        counts.events += 1;
        counts.forks += u64::from(stored.row.header.prev.len() > 1);
    }
    let aside = schema::ASIDE_COUNT.get(&*snapshot, num).unwrap();
    counts.aside += aside.map_or(0, |aside| aside.count);
}
