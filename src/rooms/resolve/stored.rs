//! A room's events as the store holds them.

use super::{Header, Source};
use crate::{
    ids::{EventNum, RoomNum},
    rooms::event::{self, Event},
    store::{Fault, Read, schema::rooms::RoomRow},
};

/// The events of a room, read from the store.
pub struct StoredEvents<'r, R: Read + ?Sized> {
    read: &'r R,
    num: RoomNum,
    room: &'r RoomRow,
}

impl<'r, R: Read + ?Sized> StoredEvents<'r, R> {
    /// The events of this room.
    pub fn new(read: &'r R, num: RoomNum, room: &'r RoomRow) -> Self {
        Self { read, num, room }
    }
}

impl<R: Read + ?Sized> Source for StoredEvents<'_, R> {
    type Event = Event;

    fn find_header(&self, event: EventNum) -> Result<Option<Header>, Fault> {
        let Some(stored) = event::find(self.read, self.num, event)? else { return Ok(None) };
        let header = stored.row.header;
        let key = header.state_key;
        Ok(key.map(|key| Header { key, auth_depth: header.auth_depth, auth: header.auth }))
    }

    fn find_event(&self, event: EventNum) -> Result<Option<Event>, Fault> {
        let Some(stored) = event::find(self.read, self.num, event)? else { return Ok(None) };
        let parsed = Event::parse(stored.id(self.room), &stored.row.json);
        parsed.map(Some).map_err(|_| Fault::Corrupt("an event is not the JSON of an event"))
    }
}
