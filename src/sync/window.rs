//! The window through which one answer is collected: one for the whole answer, and one for each room in it.

use std::{
    cell::{Cell, OnceCell},
    sync::Arc,
};

use crate::{
    accounts::{Caller, ignored::Ignored, invites::Permissions, presence::Change},
    ids::{Order, Position, RoomNum},
    push::{self, Push},
    rooms::{erased::Erased, event::StoredEvent, show::Viewer, view::RoomView, visibility::Reader},
    schema::rooms::{RoomRow, UserRoomRow},
    store::{Fault, Snapshot},
    sync::{Ephemeral, SyncToken, ask::Ask, filter::OfRooms, sent::SentMembers},
};

/// The timelines of one answer have at most this many bytes together, because the answer is held in memory; once they
/// are spent, further timelines are empty and `limited`.
const TIMELINES_BYTES_MAX: usize = 16 << 20;
/// Look at no more than this many events for the timelines of one answer, because a filter may leave out most; once
/// they are spent, further timelines end early.
const LOOKED_AT_MAX: usize = 100_000;

/// The span of one answer, the client it is for, and everything needed to collect it.
pub(crate) struct Window<'a> {
    /// The one snapshot that all news is read from.
    pub(crate) read: &'a Snapshot,
    /// The client's request, with its filter and its token.
    pub(crate) ask: &'a Ask,
    /// Where the client stands; none when it begins.
    pub(crate) since: Option<SyncToken>,
    /// The position of `since`; zero when the client begins.
    pub(crate) from: Position,
    /// The position up to which news is told.
    pub(crate) upto: Position,
    /// The ephemeral changes since the client asked last, taken at one moment.
    pub(crate) moment: Moment,
    /// Typing and presence of now, for rooms and users that are new to the client.
    pub(crate) ephemeral: &'a Ephemeral,
    /// The wall clock in milliseconds since the epoch.
    pub(crate) now_ms: u64,
    /// The members that devices have been told of, for lazy loading.
    pub(crate) sent: &'a SentMembers,
    /// The users whose events are shown redacted to everybody who was not in the room at the time.
    pub(crate) erased: Erased,
    ignored: OnceCell<Arc<Ignored>>,
    invites: OnceCell<Permissions>,
    push: &'a Push,
    counts: OnceCell<push::Reader<'a>>,
    timeline_bytes: Cell<usize>,
    looked_at: Cell<usize>,
    receipts_told_upto: Cell<Option<Position>>,
    sticky_told_upto: Cell<Option<Position>>,
}

/// The parts of the server with which an answer is collected, beside the snapshot and the request.
pub(crate) struct Around<'a> {
    /// Typing and presence, as they are now.
    pub(crate) ephemeral: &'a Ephemeral,
    /// The rules of what counts as unread.
    pub(crate) push: &'a Push,
    /// The members that devices have been told of.
    pub(crate) sent: &'a SentMembers,
    /// The wall clock in milliseconds since the epoch.
    pub(crate) now_ms: u64,
}

/// The ephemeral changes since the client asked last, taken at one moment.
#[derive(Debug, Default)]
pub(crate) struct Moment {
    /// The number of the last change that is taken into account.
    pub(crate) number: u64,
    /// The rooms in which the typing users changed since the client asked last, each with those who type now.
    pub(crate) typing: Vec<(RoomNum, Vec<String>)>,
    /// The changes of presence since the client asked last, the oldest first.
    pub(crate) presence: Vec<Change>,
}

impl Moment {
    /// Takes the changes after the number that the client knows.
    pub(crate) fn since(ephemeral: &Ephemeral, since: Option<SyncToken>) -> Self {
        let known = since.map_or(0, |token| token.ephemeral);
        ephemeral.read(|board| {
            let elsewhere = board.elsewhere.changed_since(known);
            let mut presence: Vec<Change> = board.presence.changed_since(known).chain(elsewhere).collect();
            presence.sort_unstable_by_key(|change| change.number);
            let typing = board.typing.changed_since(known);
            let typing = typing.map(|room| (room, board.typing.list(room))).collect();
            Self { number: board.number(), typing, presence }
        })
    }
}

impl<'a> Window<'a> {
    /// Opens the window from where the client stands up to `upto`.
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
            invites: OnceCell::new(),
            push: around.push,
            counts: OnceCell::new(),
            timeline_bytes: Cell::new(0),
            looked_at: Cell::new(0),
            receipts_told_upto: Cell::new(None),
            sticky_told_upto: Cell::new(None),
        }
    }

    /// A window of the same moment for another request of the same user: what is ephemeral is not told again.
    pub(crate) fn of<'b>(&'b self, ask: &'b Ask) -> Window<'b> {
        let (ephemeral, push, sent, now_ms) = (self.ephemeral, self.push, self.sent, self.now_ms);
        Window::new(self.read, ask, self.upto, Moment::default(), Around { ephemeral, push, sent, now_ms })
    }

    /// Whether the client comes from another run of the server, so that what it knows of typing and presence no longer
    /// holds.
    pub(crate) fn is_other_run(&self) -> bool {
        self.since.is_some_and(|token| token.boot != self.ephemeral.boot())
    }

    /// The users whom the user ignores: their messages and invitations are left out. They are read at the first use.
    pub(crate) fn ignored(&self) -> Result<&Arc<Ignored>, Fault> {
        if let Some(known) = self.ignored.get() {
            return Ok(known);
        }
        let found = Ignored::of(self.read, self.ask.caller.user, &self.ask.caller.user_id)?;
        Ok(self.ignored.get_or_init(|| Arc::new(found)))
    }

    /// The words of the user on inviters. They are read at the first use.
    pub(crate) fn invites(&self) -> Result<&Permissions, Fault> {
        if let Some(known) = self.invites.get() {
            return Ok(known);
        }
        let ignored = Arc::clone(self.ignored()?);
        let found = Permissions::of(self.read, self.ask.caller.user, ignored)?;
        Ok(self.invites.get_or_init(|| found))
    }

    /// The push rules that say what counts as unread for the user. They are compiled at the first use.
    pub(crate) fn counts(&self) -> Result<&push::Reader<'a>, Fault> {
        if let Some(known) = self.counts.get() {
            return Ok(known);
        }
        let caller = &self.ask.caller;
        let found = self.push.reader(self.read, caller.user, &caller.user_id)?;
        Ok(self.counts.get_or_init(|| found))
    }

    /// Whether the rest of a room's members became known since the client asked last.
    pub(crate) fn saw_whole(&self, row: &RoomRow) -> bool {
        self.since.is_some() && row.filled_at.is_some_and(|position| position > self.from)
    }

    /// The user and device who ask.
    pub(crate) fn caller(&self) -> &'a Caller {
        &self.ask.caller
    }

    /// The highest order that the client knows: everything at or below it was told.
    pub(crate) fn known_order(&self) -> Order {
        Order::upto(self.from)
    }

    /// The position up to which the client was told receipts in every room that it knows.
    pub(crate) fn receipts_from(&self) -> Position {
        self.since.map(|token| token.receipts_position()).unwrap_or_default()
    }

    /// The position up to which the client was told invitations and knocks.
    pub(crate) fn invites_from(&self) -> Position {
        self.since.map(|token| token.invites_position()).unwrap_or_default()
    }

    /// Notes that this answer tells the receipts of some room only up to a position, so that the next one goes on there.
    pub(crate) fn leave_receipts_after(&self, position: Position) {
        debug_assert!(position < self.upto, "receipts are left above what is told");
        let before = self.receipts_told_upto.get().unwrap_or(position);
        self.receipts_told_upto.set(Some(before.min(position)));
    }

    /// The position up to which this answer tells the receipts of every room, if some are left.
    pub(crate) fn receipts_told_upto(&self) -> Option<Position> {
        self.receipts_told_upto.get()
    }

    /// The position up to which the client was told sticky events in every room that it knows.
    pub(crate) fn sticky_from(&self) -> Position {
        self.since.map(|token| token.sticky_position()).unwrap_or_default()
    }

    /// Notes that this answer tells the sticky events of some room only up to a position, so that the next one goes on there.
    pub(crate) fn leave_sticky_after(&self, position: Position) {
        debug_assert!(position < self.upto, "sticky events are left above what is told");
        let before = self.sticky_told_upto.get().unwrap_or(position);
        self.sticky_told_upto.set(Some(before.min(position)));
    }

    /// The position up to which this answer tells the sticky events of every room, if some are left.
    pub(crate) fn sticky_told_upto(&self) -> Option<Position> {
        self.sticky_told_upto.get()
    }

    /// How many bytes the timeline of the next room may still have, and how many events may be looked at for it.
    pub(crate) fn timeline_left(&self) -> (usize, usize) {
        let bytes = TIMELINES_BYTES_MAX.saturating_sub(self.timeline_bytes.get());
        (bytes, LOOKED_AT_MAX.saturating_sub(self.looked_at.get()))
    }

    /// Notes how many bytes a timeline took, and how many events were looked at for it.
    pub(crate) fn spend_timeline(&self, bytes: usize, looked_at: usize) {
        self.timeline_bytes.set(self.timeline_bytes.get().saturating_add(bytes));
        self.looked_at.set(self.looked_at.get().saturating_add(looked_at));
    }
}

/// How much a client knows of one room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The client begins and knows nothing.
    New,
    /// The client is told of the room anew, because the user has come back or joined since. It may still hold what it
    /// was told in earlier stays; how much of them that was is not known. The order is where the user first came, if
    /// they were there before.
    Returns(Option<Order>),
    /// The client knows everything up to and including this order.
    Knows(Order),
}

/// From where one room is told, and how much of it. `/sync` has one such place for all rooms; sliding sync has one for
/// each room.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RoomPlace {
    /// How much the client knows of the room.
    pub(crate) standing: Standing,
    /// The client asked for the whole state, whether it knows it or not.
    pub(crate) whole_state: bool,
    /// The timeline has at most this many events.
    pub(crate) timeline_limit: usize,
    /// The room is told up to and including this order.
    pub(crate) end: Order,
}

impl RoomPlace {
    /// Whether the whole state is told, and not only its changes.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole_state || !matches!(self.standing, Standing::Knows(_))
    }

    /// The order above which everything is news. None if the client does not know the room.
    pub(crate) fn known(&self) -> Option<Order> {
        match self.standing {
            Standing::Knows(order) => Some(order),
            Standing::New | Standing::Returns(_) => None,
        }
    }
}

/// One room in an answer, and the place from which it is told.
#[derive(Clone, Copy)]
pub(crate) struct RoomWindow<'a, 'w> {
    /// The window of the answer that the room stands in.
    pub(crate) window: &'a Window<'w>,
    /// The number of the room.
    pub(crate) num: RoomNum,
    /// The row of the room in the table `ROOM`.
    pub(crate) row: &'a RoomRow,
    /// The row that says what the user is to the room.
    pub(crate) user_row: &'a UserRoomRow,
    /// Where the client stands in the room, and how much of it is told.
    pub(crate) place: RoomPlace,
    /// The user as a reader of this room, which decides what they may see.
    pub(crate) reader: &'a Reader,
}

impl RoomWindow<'_, '_> {
    /// The position up to which the client knows everything of the room, or knew everything when it asked last.
    pub(crate) fn from(&self) -> Position {
        self.place.known().map_or(self.window.from, |known| known.anchor)
    }

    /// Whether the rest of the room's members became known since the client knew the room.
    pub(crate) fn saw_whole(&self) -> bool {
        self.window.since.is_some() && self.row.filled_at.is_some_and(|position| position > self.from())
    }

    /// The same room, told from another place.
    pub(crate) fn at(self, place: RoomPlace) -> Self {
        Self { place, ..self }
    }

    /// The room in the form in which events are shown.
    pub(crate) fn view(&self) -> RoomView<'_, Snapshot> {
        RoomView { read: self.window.read, num: self.num, row: self.row }
    }

    /// Whether a part of the client's filter wants an event of this room, as the user sees it.
    pub(crate) fn wants(&self, filter: &OfRooms, stored: &StoredEvent) -> Result<bool, Fault> {
        filter.wants(self.view(), stored, &self.viewer())
    }

    /// The user and device to whom the events of this room are shown.
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
}
