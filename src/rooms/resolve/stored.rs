//! A room's events as the store holds them.

use super::{Header, HeaderAndEvent, NEWCOMER, Newcomer, Source};
use crate::{
    ids::{EventNum, RoomNum},
    rooms::event::{self, Event},
    schema,
    schema::rooms::{EventHeader, EventRow, Place},
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

impl<R: Read + ?Sized> StoredEvents<'_, R> {
    fn parse(&self, row: &EventRow) -> Result<Event, Fault> {
        Event::parse(event::event_id(&row.header.hash, self.version), &row.json)
            .map_err(|_| Fault::Corrupt("an event is not the JSON of an event"))
    }
}

fn header(row: &EventRow) -> Option<Header> {
    let EventHeader { state_key, auth_depth, auth, .. } = &row.header;
    state_key.map(|key| Header { key, auth_depth: *auth_depth, auth: auth.clone() })
}

impl<R: Read + ?Sized> Source for StoredEvents<'_, R> {
    type Event = Event;

    fn find_header(&self, event: EventNum) -> Result<Option<Header>, Fault> {
        if event == NEWCOMER {
            return Ok(self.newcomer.map(|newcomer| newcomer.header.clone()));
        }
        let stored = event::find_anywhere(self.read, self.num, event)?;
        Ok(stored.and_then(|stored| header(&stored.row)))
    }

    fn find_event(&self, event: EventNum) -> Result<Option<Event>, Fault> {
        if event == NEWCOMER {
            return Ok(self.newcomer.map(|newcomer| newcomer.event.clone()));
        }
        let stored = event::find_anywhere(self.read, self.num, event)?;
        stored.map(|stored| self.parse(&stored.row)).transpose()
    }

    /// Each row is read once, and those of the timeline together.
    fn find_many(&self, events: &[EventNum]) -> Result<Vec<HeaderAndEvent<Event>>, Fault> {
        let places = schema::PLACE.get_many(self.read, events.iter().map(|event| (self.num, *event)))?;
        let order = |place: &Option<Place>| match place {
            Some(Place::Timeline(order)) => Some(*order),
            _ => None,
        };
        let in_timeline = places.iter().filter_map(order).map(|order| (self.num, order));
        let mut rows = schema::TIMELINE.get_many(self.read, in_timeline)?.into_iter();
        let mut found = Vec::with_capacity(events.len());
        for (event, place) in events.iter().zip(&places) {
            found.push(match order(place) {
                Some(_) => match rows.next().flatten() {
                    Some(row) => (header(&row), Some(self.parse(&row)?)),
                    None => (None, None),
                },
                None => (self.find_header(*event)?, self.find_event(*event)?),
            });
        }
        Ok(found)
    }
}
