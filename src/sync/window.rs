//! The window through which one answer is collected: the whole of it, and that of one room.

use std::{
    cell::{Cell, OnceCell},
    sync::Arc,
};

use crate::{
    accounts::{ignored::Ignored, presence::Change},
    ids::{Order, Position, RoomNum},
    push::{self, Push},
    rooms::{erased::Erased, event::Stored, show::Viewer, view::RoomView, visibility::Reader},
    schema::rooms::{RoomRow, UserRoomRow},
    store::{Fault, Snapshot},
    sync::{Ephemeral, SyncToken, ask::Ask, sent::SentMembers},
};

/// Bytes of timelines in one answer: once they are spent, the timelines of further rooms are empty and `limited`.
const TIMELINES_BYTES_MAX: usize = 16 << 20;
/// Events looked at for the timelines of one answer; once they are spent, further timelines end early.
const LOOKED_AT_MAX: usize = 100_000;

/// From where to where one answer reaches, for whom, and how.
pub(crate) struct Window<'a> {
    /// The one snapshot that all news is read from.
    pub(crate) read: &'a Snapshot,
    /// The request.
    pub(crate) ask: &'a Ask,
    /// Where the client stands; none when it begins.
    pub(crate) since: Option<SyncToken>,
    /// The position of `since`; zero when the client begins.
    pub(crate) from: Position,
    /// The position up to which news is told.
    pub(crate) upto: Position,
    /// The changes of what is ephemeral, at one moment.
    pub(crate) moment: Moment,
    /// Everything ephemeral, for rooms and users that are new to the client.
    pub(crate) ephemeral: &'a Ephemeral,
    /// The wall clock in milliseconds since the epoch.
    pub(crate) now_ms: u64,
    /// The members that devices have been told of.
    pub(crate) sent: &'a SentMembers,
    /// The users whose events are shown redacted to whoever was not there.
    pub(crate) erased: Erased,
    ignored: OnceCell<Arc<Ignored>>,
    push: &'a Push,
    counts: OnceCell<push::Reader<'a>>,
    timeline_bytes: Cell<usize>,
    looked_at: Cell<usize>,
}

/// What an answer is collected with, beside the snapshot and the request.
pub(crate) struct Around<'a> {
    /// Everything ephemeral.
    pub(crate) ephemeral: &'a Ephemeral,
    /// The rules of what counts as unread.
    pub(crate) push: &'a Push,
    /// The members that devices have been told of.
    pub(crate) sent: &'a SentMembers,
    /// The wall clock in milliseconds since the epoch.
    pub(crate) now_ms: u64,
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

impl Moment {
    /// The changes after the number that the client knows.
    pub(crate) fn since(ephemeral: &Ephemeral, since: Option<SyncToken>) -> Self {
        let known = since.map_or(0, |token| token.ephemeral);
        ephemeral.read(|board| Self {
            number: board.number(),
            typing: board.typing.changed_since(known).map(|room| (room, board.typing.list(room))).collect(),
            presence: board.presence.changed_since(known).collect(),
        })
    }
}

impl<'a> Window<'a> {
    /// The window from where the client stands up to `upto`.
    pub(crate) fn new(
        read: &'a Snapshot,
        ask: &'a Ask,
        upto: Position,
        moment: Moment,
        around: Around<'a>,
    ) -> Self {
        Self {
            read,
            ask,
            since: ask.since,
            from: ask.since.map(|token| token.position).unwrap_or_default(),
            upto,
            moment,
            ephemeral: around.ephemeral,
            now_ms: around.now_ms,
            sent: around.sent,
            erased: Erased::default(),
            ignored: OnceCell::new(),
            push: around.push,
            counts: OnceCell::new(),
            timeline_bytes: Cell::new(0),
            looked_at: Cell::new(0),
        }
    }

    /// Whether the client comes from another run of the server: what it knows of typing and presence no longer holds.
    pub(crate) fn is_other_run(&self) -> bool {
        self.since.is_some_and(|token| token.boot != self.ephemeral.boot())
    }

    /// The users whose messages and invitations the client does not want.
    pub(crate) fn ignored(&self) -> Result<&Arc<Ignored>, Fault> {
        if let Some(known) = self.ignored.get() {
            return Ok(known);
        }
        let found = Ignored::of(self.read, self.ask.caller.user)?;
        Ok(self.ignored.get_or_init(|| Arc::new(found)))
    }

    /// What counts as unread for the user.
    pub(crate) fn counts(&self) -> Result<&push::Reader<'a>, Fault> {
        if let Some(known) = self.counts.get() {
            return Ok(known);
        }
        let caller = &self.ask.caller;
        let found = self.push.reader(self.read, caller.user, &caller.user_id)?;
        Ok(self.counts.get_or_init(|| found))
    }

    /// Everything at or before where the client stands.
    pub(crate) fn known_order(&self) -> Order {
        Order::upto(self.from)
    }

    /// How many bytes the timeline of the next room may have, and how many events may be looked at for it.
    pub(crate) fn timeline_left(&self) -> (usize, usize) {
        let bytes = TIMELINES_BYTES_MAX.saturating_sub(self.timeline_bytes.get());
        (bytes, LOOKED_AT_MAX.saturating_sub(self.looked_at.get()))
    }

    /// Notes how many bytes a timeline has, and how many events were looked at for it.
    pub(crate) fn spend_timeline(&self, bytes: usize, looked_at: usize) {
        self.timeline_bytes.set(self.timeline_bytes.get().saturating_add(bytes));
        self.looked_at.set(self.looked_at.get().saturating_add(looked_at));
    }
}

/// What a client knows of one room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The client begins: it knows nothing.
    New,
    /// The client is told of the room anew. If the user was there before, the client may still hold what it was told at any
    /// time since they first came, which was here: how much of the stays since then it was told is not known.
    Returns(Option<Order>),
    /// The client knows everything up to here.
    Knows(Order),
}

/// From where one room is told, and how much of it. `/sync` has one such place for all rooms; sliding sync has one for
/// each room.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RoomPlace {
    /// What the client knows of the room.
    pub(crate) standing: Standing,
    /// The whole state is wanted, whether the client knows it or not.
    pub(crate) whole_state: bool,
    /// Events of the timeline, at most.
    pub(crate) timeline_limit: usize,
    /// The last order that the room is told up to.
    pub(crate) end: Order,
}

impl RoomPlace {
    /// Whether the whole state is told.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole_state || !matches!(self.standing, Standing::Knows(_))
    }

    /// The order above which everything is news.
    pub(crate) fn known(&self) -> Option<Order> {
        match self.standing {
            Standing::Knows(order) => Some(order),
            Standing::New | Standing::Returns(_) => None,
        }
    }

    /// The position after which what has no order (receipts) is news.
    pub(crate) fn known_position(&self) -> Position {
        self.known().map_or(Position::ZERO, |order| order.anchor)
    }
}

/// One room in an answer.
#[derive(Clone, Copy)]
pub(crate) struct RoomWindow<'a, 'w> {
    /// The answer that the room stands in.
    pub(crate) window: &'a Window<'w>,
    /// The number of the room.
    pub(crate) num: RoomNum,
    /// The room.
    pub(crate) row: &'a RoomRow,
    /// What the user is to the room.
    pub(crate) user_row: &'a UserRoomRow,
    /// Where the client stands in it.
    pub(crate) place: RoomPlace,
    /// The user, as one who reads this room.
    pub(crate) reader: &'a Reader,
}

impl RoomWindow<'_, '_> {
    /// The same room, told from another place.
    pub(crate) fn at(self, place: RoomPlace) -> Self {
        Self { place, ..self }
    }

    /// The room, as functions that show events read it.
    pub(crate) fn view(&self) -> RoomView<'_, Snapshot> {
        RoomView { read: self.window.read, num: self.num, row: self.row }
    }

    /// The user, as events are shown to.
    pub(crate) fn viewer(&self) -> Viewer<'_> {
        Viewer {
            user: &self.window.ask.caller.user_id,
            device: Some(self.window.ask.caller.device),
            now_ms: self.window.now_ms,
            with_room_id: false,
            reader: self.reader,
            erased: &self.window.erased,
        }
    }

    /// Whether an event is one of the user's own membership.
    pub(crate) fn is_own_member(&self, stored: &Stored) -> bool {
        self.reader.is_own_member(stored)
    }
}
