//! The streams: one kind of news a file. Each answers "what is new from here to there" over one snapshot.

pub(crate) mod account_data;
pub(crate) mod device_lists;
pub(crate) mod members;
pub(crate) mod presence;
pub(crate) mod receipts;
pub(crate) mod state;
pub(crate) mod timeline;
pub(crate) mod to_device;
pub(crate) mod typing;
pub(crate) mod unread;

use std::{cell::OnceCell, collections::BTreeSet};

use crate::{
    accounts::presence::Change,
    ids::{EventNum, Order, Position, RoomNum},
    push::{Push, Reader},
    rooms::{
        erased::Erased,
        event::Stored,
        show::{self, Extras, Viewer},
        view::RoomView,
    },
    schema,
    schema::rooms::{Place, RoomRow},
    store::{Fault, Snapshot},
    sync::{Ephemeral, SyncToken, filter, sent::SentMembers, v3::Ask},
};

/// From where to where one look reaches, for whom, and how.
pub(crate) struct Window<'a> {
    /// The one snapshot.
    pub(crate) read: &'a Snapshot,
    /// What the client asks for.
    pub(crate) ask: &'a Ask,
    /// Where the client stands; none when it begins.
    pub(crate) since: Option<SyncToken>,
    /// The position of that; zero when it begins.
    pub(crate) from: Position,
    /// The snapshot's position.
    pub(crate) upto: Position,
    /// What changed of the ephemeral, at one moment.
    pub(crate) moment: Moment,
    /// Everything ephemeral, for rooms and users that are new to the client.
    pub(crate) ephemeral: &'a Ephemeral,
    /// Users whose messages and invites the client does not want.
    pub(crate) ignored: BTreeSet<String>,
    /// The wall clock in milliseconds since the epoch.
    pub(crate) now_ms: u64,
    /// Which members the device has been told of.
    pub(crate) sent: &'a SentMembers,
    /// Knows what counts for whom.
    pub(crate) push: &'a Push,
    /// What counts for the user, once a room asked for that.
    pub(crate) reader: OnceCell<Reader<'a>>,
    /// Whose events are shown redacted to whoever was not there.
    pub(crate) erased: Erased,
}

/// What is ephemeral, at one moment.
#[derive(Debug, Default)]
pub(crate) struct Moment {
    /// The number of the last change in it.
    pub(crate) number: u64,
    /// Rooms whose typists changed since the client asked last, and who they are now.
    pub(crate) typing: Vec<(RoomNum, Vec<String>)>,
    /// Whose presence changed since the client asked last, the oldest change first.
    pub(crate) presence: Vec<Change>,
}

impl<'a> Window<'a> {
    /// The viewer, as events are shown to.
    pub(crate) fn viewer(&self) -> Viewer<'_> {
        Viewer {
            user: &self.ask.caller.user_id,
            device: Some(self.ask.caller.device),
            now_ms: self.now_ms,
            with_room_id: false,
            until: Order::MAX,
            erased: &self.erased,
        }
    }

    /// Whether a user's messages are not wanted.
    pub(crate) fn ignores(&self, user_id: &str) -> bool {
        !self.ignored.is_empty() && self.ignored.contains(user_id)
    }

    /// What counts for the user.
    pub(crate) fn reader(&self) -> Result<&Reader<'a>, Fault> {
        if let Some(known) = self.reader.get() {
            return Ok(known);
        }
        let caller = &self.ask.caller;
        let found = self.push.reader(self.read, caller.user, &caller.user_id)?;
        Ok(self.reader.get_or_init(|| found))
    }

    /// Everything at or before where the client stands.
    pub(crate) fn known_order(&self) -> Order {
        Order::upto(self.from)
    }

    /// A state event in the form that the client asked for.
    pub(crate) fn show_state(
        &self,
        num: RoomNum,
        row: &RoomRow,
        stored: &Stored,
        whole: bool,
    ) -> Result<String, Fault> {
        let viewer = self.viewer();
        let view = RoomView { read: self.read, num, row };
        let json = if whole || stored.row.is_redacted() {
            show::show_plain(view, stored, &viewer)?
        } else {
            let seen = viewer.seen_in_state(view, stored)?;
            show::client_json(row, &seen, &viewer, &Extras::default())
        };
        Ok(self.shaped(&*viewer.seen_in_state(view, stored)?, json.into()))
    }

    /// The event as servers see it, or with some of its fields, if the client asked for that.
    pub(crate) fn shaped(&self, stored: &Stored, json: String) -> String {
        if self.ask.filter.federation_format {
            return String::from_utf8_lossy(&stored.row.json).into_owned();
        }
        match &self.ask.filter.fields {
            Some(fields) => filter::only_fields(&json, fields),
            None => json,
        }
    }
}

/// The events of these numbers that stand in the timeline, in the order of the numbers given.
pub(crate) fn load_events(read: &Snapshot, num: RoomNum, events: &[EventNum]) -> Result<Vec<Stored>, Fault> {
    let places = schema::PLACE.get_many(read, events.iter().map(|event| (num, *event)))?;
    let orders: Vec<Order> = places
        .into_iter()
        .filter_map(|place| match place {
            Some(Place::Timeline(order)) => Some(order),
            _ => None,
        })
        .collect();
    let rows = schema::TIMELINE.get_many(read, orders.iter().map(|order| (num, *order)))?;
    Ok(orders.into_iter().zip(rows).filter_map(|(order, row)| Some(Stored { order, row: row? })).collect())
}
