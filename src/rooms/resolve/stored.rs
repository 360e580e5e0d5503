//! A room's events as the store holds them.

use super::{Header, NEWCOMER, Newcomer, Source};
use crate::{
    ids::{EventNum, RoomNum},
    rooms::event::{self, Event},
    store::{Fault, Read},
};

/// The events of a room, read from the store, and one that is not in it yet.
pub struct StoredEvents<'r, R: Read + ?Sized> {
    read: &'r R,
    num: RoomNum,
    version: u8,
    newcomer: Option<&'r Newcomer>,
}

impl<'r, R: Read + ?Sized> StoredEvents<'r, R> {
    /// The events of this room, which is of this version.
    pub fn new(read: &'r R, num: RoomNum, version: u8, newcomer: Option<&'r Newcomer>) -> Self {
        Self { read, num, version, newcomer }
    }
}

impl<R: Read + ?Sized> Source for StoredEvents<'_, R> {
    type Event = Event;

    fn find_header(&self, event: EventNum) -> Result<Option<Header>, Fault> {
        if event == NEWCOMER {
            return Ok(self.newcomer.map(|newcomer| newcomer.header.clone()));
        }
        let Some(stored) = event::find_anywhere(self.read, self.num, event)? else { return Ok(None) };
        let header = stored.row.header;
        let key = header.state_key;
        Ok(key.map(|key| Header { key, auth_depth: header.auth_depth, auth: header.auth }))
    }

    fn find_event(&self, event: EventNum) -> Result<Option<Event>, Fault> {
        if event == NEWCOMER {
            return Ok(self.newcomer.map(|newcomer| newcomer.event.clone()));
        }
        let Some(stored) = event::find_anywhere(self.read, self.num, event)? else { return Ok(None) };
        let parsed = Event::parse(event::event_id(&stored.row.header.hash, self.version), &stored.row.json);
        parsed.map(Some).map_err(|_| Fault::Corrupt("an event is not the JSON of an event"))
    }
}
