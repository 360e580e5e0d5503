//! Says what each server has of a room on which they do not agree: so that a failure names the server that lacks something, what
//! that is, and why it has it not.

use aqueduct::{
    flows::App,
    ids::{EventNum, Order, RoomNum},
    rooms::{
        self,
        event::{self, StoredEvent},
        state,
    },
    schema::{
        self,
        events::Place,
        rooms::RoomRow,
        state::{StateRef, StateValue},
    },
    store::{Direction, Snapshot},
};
use ruma::{EventId, RoomId};

use super::world::{SERVERS, World};

/// Something that servers do not agree on.
#[derive(Clone, Debug)]
pub(crate) struct Disagreement {
    /// Who sees what, in words.
    pub(crate) what: String,
    /// The id of the room.
    pub(crate) room: String,
    /// The keys of the room's state that differ: type and state key.
    pub(crate) keys: Vec<(String, String)>,
    /// The ids of the events that some have under these keys.
    pub(crate) events: Vec<String>,
}

/// One room, as a server has it.
struct View<'a> {
    snapshot: &'a Snapshot,
    room: RoomNum,
    row: RoomRow,
}

impl View<'_> {
    fn id(&self, event: EventNum) -> String {
        let stored = event::find_anywhere(self.snapshot, self.room, event).unwrap();
        stored.map_or_else(|| format!("event {event}"), |stored| stored.id(&self.row).to_string())
    }

    /// The value of a key after an event or now.
    fn value(&self, at: StateRef, (event_type, state_key): &(String, String)) -> String {
        let key = state::find_key(self.snapshot, self.room, event_type, state_key).unwrap();
        match key.map(|key| state::at(self.snapshot, self.room, at, key).unwrap()) {
            Some(StateValue::Event(event)) => self.id(event),
            _ => "nothing".to_owned(),
        }
    }

    /// Where an event is kept, and why it is no part of the room.
    fn place(&self, event_id: &str) -> String {
        let event_id = <&EventId>::try_from(event_id).unwrap();
        let Some(event) = event::find_num(self.snapshot, self.room, event_id).unwrap() else {
            return "not here".to_owned();
        };
        let aside = schema::ASIDE.get(self.snapshot, (self.room, event)).unwrap();
        match (schema::PLACE.get(self.snapshot, (self.room, event)).unwrap(), aside) {
            (Some(Place::Timeline(order)), _) => {
                let row = schema::TIMELINE.get(self.snapshot, (self.room, order)).unwrap();
                let is_withdrawn = row.is_some_and(|row| row.header.rejected);
                format!("in the timeline at {order:?}{}", if is_withdrawn { ", withdrawn" } else { "" })
            }
            (_, Some(aside)) if aside.rejected => format!("rejected: {}", aside.why),
            (_, Some(aside)) => format!("aside: {}", aside.why),
            (place, None) => format!("{place:?}"),
        }
    }
}

/// Describes what each server has of it.
pub(crate) fn describe(world: &World, found: &Disagreement) -> String {
    let mut lines = vec![found.what.clone()];
    for place in 0..SERVERS {
        let Some(app) = world.app(place) else { continue };
        lines.push(format!("s{place}: {}", describe_one(&app, found)));
    }
    lines.join("\n")
}

fn describe_one(app: &App, found: &Disagreement) -> String {
    let snapshot = app.store.snapshot();
    let id = <&RoomId>::try_from(found.room.as_str()).unwrap();
    let Some(room) = rooms::find_room(&*snapshot, id).unwrap() else {
        return "knows no such room".to_owned();
    };
    let Some(row) = rooms::find_row(&*snapshot, room).unwrap() else { return "has nothing of it".to_owned() };
    let view = View { snapshot: &snapshot, room, row };
    let left_out = rooms::change::left_out::list(&*snapshot, room).unwrap().len();
    let waiting = schema::INBOUND_EVENT.prefix::<(RoomNum,)>(&*snapshot, (room,), Direction::Up).unwrap();
    let waiting: Vec<String> = waiting.map(|row| row.unwrap().1.id.to_string()).collect();
    let resident = view.row.resident;
    let mut text = format!("{resident:?}, {left_out} left out by the join, waiting: {waiting:?}");
    for key in &found.keys {
        let now = StateRef::Main(view.row.state_tip);
        text += &format!("\n    {key:?} is {} now", view.value(now, key));
        for head in &view.row.heads {
            text += &format!(", {} after {}", view.value(head.after, key), view.id(head.event));
        }
    }
    for event_id in &found.events {
        text += &format!("\n    {event_id} is {}", view.place(event_id));
    }
    text
}

/// Lists all events that a server has of a room, as a replay prints them: with what these keys of the state were before and after.
pub(crate) fn list_graph(app: &App, room: &str, keys: &[(String, String)]) -> Vec<String> {
    let snapshot = app.store.snapshot();
    let Some(room) = rooms::find_room(&*snapshot, <&RoomId>::try_from(room).unwrap()).unwrap() else {
        return Vec::new();
    };
    let Some(row) = rooms::find_row(&*snapshot, room).unwrap() else { return Vec::new() };
    let view = View { snapshot: &snapshot, room, row };
    let events = (0..view.row.next_event).map(EventNum);
    let events = events.filter_map(|event| event::find_anywhere(&*snapshot, room, event).unwrap());
    events.map(|stored| list_one(&view, &stored, keys)).collect()
}

fn list_one(view: &View<'_>, stored: &StoredEvent, keys: &[(String, String)]) -> String {
    let json: serde_json::Value = serde_json::from_slice(&stored.row.json).unwrap();
    let id = stored.id(&view.row).to_string();
    let header = &stored.row.header;
    let is_placed = stored.order != Order::MIN;
    let before = header.before.or_else(|| is_placed.then(|| StateRef::Main(stored.order.before())));
    let main = if header.state_key.is_some() { Some(StateRef::Main(stored.order)) } else { before };
    let after = header.after.or(if header.rejected { before } else { main }).filter(|_| before.is_some());
    let mut values = String::new();
    for key in keys {
        let [before, after] = [before, after].map(|at| at.map(|at| view.value(at, key)));
        values += &format!(" | {key:?} {before:?}->{after:?}");
        if is_placed {
            values += &format!(", main line then {}", view.value(StateRef::Main(stored.order), key));
        }
    }
    format!(
        "{id} {} {} {} depth {} on {} allowed by {} {:?}->{:?}: {} | {}{values}",
        json["sender"].as_str().unwrap_or_default(),
        json["type"].as_str().unwrap_or_default(),
        json["state_key"].as_str().unwrap_or_default(),
        json["depth"],
        json["prev_events"],
        json["auth_events"],
        header.before,
        header.after,
        json["content"],
        view.place(&id),
    )
}
