//! Gives state resolution a room's events as the store holds them.

use std::sync::Arc;

use super::{Header, HeaderAndEvent, Loaded, Newcomer, Source};
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
    loaded: Option<&'r Loaded>,
}

impl<'r, R: Read + ?Sized> StoredEvents<'r, R> {
    /// The events of this room, which is of this version.
    pub fn new(read: &'r R, num: RoomNum, version: u8) -> Self {
        Self { read, num, version, newcomer: None, loaded: None }
    }

    /// The same source with an event that the store does not have yet.
    #[must_use]
    pub(super) fn with_newcomer(self, newcomer: Option<&'r Newcomer>) -> Self {
        Self { newcomer, ..self }
    }

    /// The same source with a memory that outlives it: events in there are not read, and events that are read go there.
    #[must_use]
    pub(super) fn with_loaded(self, loaded: Option<&'r Loaded>) -> Self {
        Self { loaded, ..self }
    }
}

impl<R: Read + ?Sized> StoredEvents<'_, R> {
    fn parse(&self, row: &EventRow) -> Result<Arc<Event>, Fault> {
        let parsed = Event::parse(event::event_id(&row.header.key, self.version), &row.json);
        let mut parsed = parsed.map_err(|_| Fault::Corrupt("an event is not the JSON of an event"))?;
        parsed.rejected = row.header.rejected;
        Ok(Arc::new(parsed))
    }

    /// Finds an event that is at hand without reading the store.
    fn at_hand(&self, event: EventNum) -> Option<HeaderAndEvent<Arc<Event>>> {
        let newcomer = self.newcomer.filter(|newcomer| newcomer.num == event);
        match newcomer {
            Some(Newcomer { header, event, .. }) => Some((Some(header.clone()), Some(Arc::clone(event)))),
            None => self.loaded.and_then(|loaded| loaded.find(event)),
        }
    }

    fn read_one(&self, event: EventNum) -> Result<HeaderAndEvent<Arc<Event>>, Fault> {
        let found = match event::find_anywhere(self.read, self.num, event)? {
            Some(stored) => (header(&stored.row), Some(self.parse(&stored.row)?)),
            None => (None, None),
        };
        if let Some(loaded) = self.loaded {
            loaded.keep(event, found.clone());
        }
        Ok(found)
    }
}

fn header(row: &EventRow) -> Option<Header> {
    let EventHeader { state_key, depth, auth_depth, auth, .. } = &row.header;
    state_key.map(|key| Header { key, depth: *depth, auth_depth: *auth_depth, auth: auth.clone() })
}

impl<R: Read + ?Sized> Source for StoredEvents<'_, R> {
    type Event = Arc<Event>;

    fn find_header(&self, event: EventNum) -> Result<Option<Header>, Fault> {
        if let Some((header, _)) = self.at_hand(event) {
            return Ok(header);
        }
        if self.loaded.is_some() {
            return Ok(self.read_one(event)?.0);
        }
        let stored = event::find_anywhere(self.read, self.num, event)?;
        Ok(stored.and_then(|stored| header(&stored.row)))
    }

    fn find_event(&self, event: EventNum) -> Result<Option<Arc<Event>>, Fault> {
        match self.at_hand(event) {
            Some((_, found)) => Ok(found),
            None => Ok(self.read_one(event)?.1),
        }
    }

    /// Reads each row once, and those of the timeline together.
    fn find_many(&self, events: &[EventNum]) -> Result<Vec<HeaderAndEvent<Arc<Event>>>, Fault> {
        let at_hand: Vec<_> = events.iter().map(|event| self.at_hand(*event)).collect();
        let missing =
            events.iter().zip(&at_hand).filter(|(_, found)| found.is_none()).map(|(event, _)| *event);
        let missing: Vec<EventNum> = missing.collect();
        let places = schema::PLACE.get_many(self.read, missing.iter().map(|event| (self.num, *event)))?;
        let order = |place: &Option<Place>| match place {
            Some(Place::Timeline(order)) => Some(*order),
            _ => None,
        };
        let in_timeline = places.iter().filter_map(order).map(|order| (self.num, order));
        let mut rows = schema::TIMELINE.get_many(self.read, in_timeline)?.into_iter();
        let mut read = missing.iter().zip(&places);
        let mut found = Vec::with_capacity(events.len());
        for at_hand in at_hand {
            let one = match at_hand {
                Some(at_hand) => at_hand,
                None => match read.next() {
                    Some((event, place)) if order(place).is_some() => {
                        let one = match rows.next().flatten() {
                            Some(row) => (header(&row), Some(self.parse(&row)?)),
                            None => (None, None),
                        };
                        if let Some(loaded) = self.loaded {
                            loaded.keep(*event, one.clone());
                        }
                        one
                    }
                    Some((event, _)) => self.read_one(*event)?,
                    None => (None, None),
                },
            };
            found.push(one);
        }
        Ok(found)
    }
}
