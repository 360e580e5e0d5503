//! Reads a room for a caller: its state, members and events, as far as the caller may see them.
//!
//! Each request reads one snapshot, off the async threads, and splices its answer from stored bytes.

mod found;
mod pages;
mod relations;
mod time;
mod whole;

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use ruma::{EventId, OwnedEventId, OwnedUserId, RoomId};

pub(crate) use found::{Around, FoundText};
pub(crate) use pages::{PageWanted, context, read_messages};
pub(crate) use relations::{RelationsWanted, ThreadsWanted, relations, threads};
pub(crate) use time::{event_at_time, nearest, nothing_near};
pub(crate) use whole::{Whole, joined_members, members, state};

use crate::{
    accounts::{Caller, ignored::Ignored},
    error::{Error, Refusal, Result},
    flows::{App, commit, room::completing},
    ids::{DeviceNum, EventNum, Order, RoomNum},
    json::JsonText,
    rooms::{
        self,
        change::left_out,
        erased::Erased,
        event::{self, StoredEvent},
        power::{Action, Power},
        redact, show,
        show::Viewer,
        state,
        timeline::{self, PageToken},
        view::RoomView,
        visibility::{self, HistoryVisibility, Reader},
    },
    schema::event_types::MEMBER,
    schema::{
        rooms::{Membership, Resident, RoomRow},
        state::StateRef,
    },
    store::{Direction, Snapshot},
    sync::{Pos, SyncToken},
};

/// At most this many events are read for one page, so that a filter or visibility that lets hardly anything through makes
/// several short pages and not one long read.
const SCANNED_MAX: usize = 5_000;
/// A page has at most this many events.
const PAGE_MAX: usize = 1_000;

/// A room as one caller sees it, in one snapshot for the whole answer.
pub(crate) struct Look {
    snapshot: Arc<Snapshot>,
    num: RoomNum,
    room: RoomRow,
    user: OwnedUserId,
    device: DeviceNum,
    now_ms: u64,
    reader: Reader,
    erased: Erased,
}

/// The point in time at which the caller sees the room's state.
#[derive(Clone, Copy, Debug)]
enum Standpoint {
    /// The caller sees the current state.
    Now,
    /// The caller sees the state as it was when they left.
    Left(Order),
}

impl Look {
    fn at(app: &App, caller: &Caller, room: &RoomId) -> Result<Self> {
        let snapshot = app.store.snapshot();
        let num = rooms::find_room(&*snapshot, room)?.ok_or_else(commit::not_in_room)?;
        let row = rooms::require_row(&*snapshot, num)?;
        if !row.resident.has_history() {
            return Err(commit::not_in_room().into());
        }
        let ignored = Arc::new(Ignored::of(&*snapshot, caller.user, &caller.user_id)?);
        Self::in_snapshot(snapshot, caller, (num, row), ignored, app.env.now_ms())
    }

    fn in_snapshot(
        snapshot: Arc<Snapshot>,
        caller: &Caller,
        (num, room): (RoomNum, RoomRow),
        ignored: Arc<Ignored>,
        now_ms: u64,
    ) -> Result<Self> {
        let reader = Reader::of(&*snapshot, num, caller.user, &caller.user_id, ignored)?;
        let (user, device) = (caller.user_id.clone(), caller.device);
        Ok(Self { snapshot, num, room, user, device, now_ms, reader, erased: Erased::default() })
    }

    fn view(&self) -> RoomView<'_, Snapshot> {
        RoomView { read: &*self.snapshot, num: self.num, row: &self.room }
    }

    fn viewer(&self) -> Viewer<'_> {
        Viewer {
            user: &self.user,
            device: Some(self.device),
            now_ms: self.now_ms,
            with_room_id: true,
            reader: &self.reader,
            erased: &self.erased,
        }
    }

    /// From where the caller sees the room's state. Somebody who left sees it as it was then, as `/sync` told them, even
    /// where everybody may look in from outside: see `docs/decisions/the-state-when-they-left.md`. Refuses a user who
    /// never was in the room, or has forgotten it, and may not look in from outside: 403 `M_FORBIDDEN`.
    fn standpoint(&self) -> Result<Standpoint> {
        if self.reader.is_joined() {
            return Ok(Standpoint::Now);
        }
        if let Some(left) = self.reader.joined_until() {
            return Ok(Standpoint::Left(left));
        }
        match visibility::current(&*self.snapshot, self.num)? {
            HistoryVisibility::WorldReadable => Ok(Standpoint::Now),
            HistoryVisibility::Shared | HistoryVisibility::Invited | HistoryVisibility::Joined => {
                tracing::debug!(room = %self.num, reason = "never in the room", "the state of a room is withheld");
                Err(commit::not_in_room().into())
            }
        }
    }

    /// The last place up to which the caller may see events. Errors: 403 `M_FORBIDDEN` for a caller who may see none.
    fn end(&self) -> Result<Order> {
        Ok(self.reader.end(&*self.snapshot)?.ok_or_else(commit::not_in_room)?)
    }

    fn show(&self, stored: &StoredEvent, membership: Membership) -> Result<JsonText> {
        Ok(show::show(self.view(), stored, &self.viewer(), Some(membership))?)
    }

    fn show_all(&self, events: &[(StoredEvent, Membership)]) -> Result<Vec<JsonText>> {
        Ok(show::show_all(self.view(), events, &self.viewer())?)
    }

    /// The event as it was before it was redacted, or as it is if it was not. Errors: 403 for a caller who may not redact in the
    /// room, 404 if the original is no longer kept.
    fn require_original(&self, stored: StoredEvent, kept_ms: u64) -> Result<StoredEvent> {
        let is_joined = self.reader.is_joined();
        let power = Power::read(self.view())?;
        if !is_joined || !power.may(&self.user, Action::Redact)? {
            return Err(Refusal::forbidden(
                "Only members who may redact can see the content of redacted events.",
            )
            .into());
        }
        if !stored.row.is_redacted() {
            return Ok(stored);
        }
        redact::find_original(&*self.snapshot, self.num, &stored)?
            .ok_or_else(|| content_deleted(kept_ms).into())
    }

    fn show_state(&self, stored: &StoredEvent) -> Result<JsonText> {
        Ok(show::show_plain(self.view(), stored, &self.viewer())?)
    }

    /// The state event of a key at the point in time at which the caller sees the room.
    fn find_state(&self, at: Standpoint, event_type: &str, state_key: &str) -> Result<Option<StoredEvent>> {
        let read = &*self.snapshot;
        let Some(key) = state::find_key(read, self.num, event_type, state_key)? else { return Ok(None) };
        let event = match at {
            Standpoint::Now => state::current(read, self.num, key)?,
            Standpoint::Left(order) => state::at(read, self.num, StateRef::Main(order), key)?.event(),
        };
        Ok(event.map(|event| event::require(read, self.num, event)).transpose()?)
    }

    /// Moves a place before the beginning of the room (such as the start of its timeline) to the moment after its creator
    /// joined, for nobody can be in a room before that.
    fn not_before_the_maker(&self, at: PageToken) -> Result<PageToken> {
        let joined = event::find(&*self.snapshot, self.num, EventNum(1))?;
        let joined = joined.filter(|stored| stored.membership() == Some(Membership::Join));
        Ok(joined.map_or(at, |joined| at.max(PageToken::above(joined.order))))
    }

    /// Moves a place at which the caller may see nothing of the room to the first one after it at which they do: the moment
    /// before the next event that is visible to them, whose state `/sync` tells them too. `None` if no event after it is
    /// visible, or the first is too far away; then the caller sees the room only as from where they stand.
    fn not_before_sight(&self, at: PageToken) -> Result<Option<PageToken>> {
        let read = &*self.snapshot;
        let last = timeline::page(read, self.num, at, None, Direction::Down)?.next().transpose()?;
        if let Some(last) = last
            && self.reader.may_see(read, &last)?
        {
            return Ok(Some(at));
        }
        for stored in timeline::page(read, self.num, at, None, Direction::Up)?.take(SCANNED_MAX) {
            let stored = stored?;
            if self.reader.may_see(read, &stored)? {
                return Ok(Some(at.max(PageToken::below(stored.order))));
            }
        }
        tracing::debug!(room = %self.num, reason = "history visibility", "the state at a place is withheld");
        Ok(None)
    }

    /// The member events of the senders of these events, as of an order.
    fn members_of(&self, events: &[&StoredEvent], at: Order) -> Result<Vec<JsonText>> {
        let senders: BTreeSet<_> = events.iter().map(|stored| stored.row.sender().into_owned()).collect();
        let mut shown = Vec::with_capacity(senders.len());
        for sender in senders {
            if let Some(member) = self.find_state(Standpoint::Left(at), MEMBER, &sender)? {
                shown.push(self.show_state(&member)?);
            }
        }
        Ok(shown)
    }
}

/// The refusal for a redacted event whose original content is no longer kept (MSC2815).
fn content_deleted(kept_ms: u64) -> Refusal {
    let message = "The content that this event had before it was redacted is no longer kept.";
    let mut refusal = Refusal::not_found(message);
    refusal.body = Some(serde_json::json!({
        "errcode": "FI.MAU.MSC2815_UNREDACTED_CONTENT_DELETED",
        "error": message,
        "fi.mau.msc2815.content_keep_ms": kept_ms,
    }));
    refusal
}

async fn looking<T: Send + 'static>(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    work: impl FnOnce(Look, &Caller) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (owned, caller, room) = (app.clone(), caller.clone(), room.to_owned());
    app.env.blocking(move || work(Look::at(&owned, &caller, &room)?, &caller)).await
}

/// Answers one piece of a room's state: its content, or the whole event. Errors: 404 `M_NOT_FOUND` if it is not set; [`Error::Busy`] if a
/// join left it out.
pub(crate) async fn state_event(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    event_type: String,
    state_key: String,
    whole_event: bool,
) -> Result<Bytes> {
    let asked = (event_type.clone(), state_key.clone());
    let is_unknown = move |look: Look, _: &Caller| {
        let is_member = asked.0 == MEMBER && look.room.resident == Resident::Partial;
        Ok(is_member && look.find_state(look.standpoint()?, &asked.0, &asked.1)?.is_none())
    };
    // A member of whom nothing is known yet may be there all the same.
    if event_type == MEMBER && looking(app, caller, room, is_unknown).await? {
        completing::whole(app, caller, room).await?;
    }
    looking(app, caller, room, move |look, _| {
        let at = look.standpoint()?;
        let stored = look.find_state(at, &event_type, &state_key)?;
        if stored.is_none() && left_out::is_open(&*look.snapshot, look.num, &event_type, &state_key)? {
            return Err(Error::Busy { retry_after: completing::AGAIN });
        }
        let stored = stored.ok_or_else(|| Refusal::not_found("The room has no such state."))?;
        if whole_event {
            return Ok(look.show_state(&stored)?.into());
        }
        let seen = look.viewer().seen(look.view(), &stored)?;
        Ok(seen.row.content().to_owned().into())
    })
    .await
}

/// The choice of member events that a request asks for.
#[derive(Debug)]
pub(crate) struct MembersWanted {
    /// The token of `/sync` or `/messages` at which the members are asked for; now, if none.
    pub(crate) at: Option<String>,
    /// The only membership to list, if one is named.
    pub(crate) only: Option<String>,
    /// The membership to leave out, if one is named.
    pub(crate) not: Option<String>,
}

impl MembersWanted {
    /// Whether a member event with this membership is asked for. Of two conditions one need hold: the specification joins
    /// them by "or".
    fn includes(&self, membership: Option<&str>) -> bool {
        match (self.only.as_deref(), self.not.as_deref()) {
            (None, None) => true,
            (only, not) => {
                only.is_some_and(|only| membership == Some(only))
                    || not.is_some_and(|not| membership != Some(not))
            }
        }
    }
}

/// Answers one event. Errors: 404 `M_NOT_FOUND` for an event that does not exist or that the caller may not see.
///
/// With `unredacted`, the event is answered as it was before it was redacted (MSC2815). Errors: 403 `M_FORBIDDEN` for a caller who
/// may not redact in the room, 404 `FI.MAU.MSC2815_UNREDACTED_CONTENT_DELETED` for an original that is no longer kept.
pub(crate) async fn event(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    id: &EventId,
    unredacted: bool,
) -> Result<Bytes> {
    let (id, kept_ms) = (id.to_owned(), app.config.rooms.redacted_events_kept_ms());
    looking(app, caller, room, move |look, _| {
        let (stored, membership) = require_visible(&look, &id)?;
        let stored = if unredacted { look.require_original(stored, kept_ms)? } else { stored };
        Ok(look.show(&stored, membership)?.into())
    })
    .await
}

/// Answers one event, whatever room it is in. Errors: 404 `M_NOT_FOUND` for an event that does not exist or that the caller may not
/// see.
pub(crate) async fn event_anywhere(app: &App, caller: &Caller, id: OwnedEventId) -> Result<Bytes> {
    let (app, caller) = (app.clone(), caller.clone());
    let env = app.env.clone();
    env.blocking(move || {
        let snapshot = app.store.snapshot();
        // An id says nothing of its room. Where servers choose ids, several rooms may have an event of it.
        for (num, _) in event::list_anywhere_by_id(&*snapshot, &id)? {
            let room = rooms::require_row(&*snapshot, num)?;
            let Ok(look) = Look::at(&app, &caller, &room.id) else { continue };
            let Ok((stored, membership)) = require_visible(&look, &id) else { continue };
            return Ok(look.show(&stored, membership)?.into());
        }
        Err(unknown_event())
    })
    .await
}

/// Whether the caller is in a room and sees this event of it. Errors: 403 `M_FORBIDDEN` for a room that they know nothing of, 404
/// `M_NOT_FOUND` for an event that they do not see.
pub(crate) async fn sees_inside(app: &App, caller: &Caller, room: &RoomId, id: &EventId) -> Result<bool> {
    let id = id.to_owned();
    looking(app, caller, room, move |look, _| {
        require_visible(&look, &id)?;
        Ok(look.reader.is_joined())
    })
    .await
}

fn unknown_event() -> Error {
    Refusal::not_found("There is no such event, or you may not see it.").into()
}

fn require_visible(look: &Look, id: &EventId) -> Result<(StoredEvent, Membership)> {
    let snapshot = Arc::clone(&look.snapshot);
    let stored = event::find_by_id(&*snapshot, look.num, id)?.filter(|stored| !stored.row.header.unseen);
    let stored = stored.ok_or_else(unknown_event)?;
    match look.reader.look(&*snapshot, &stored)? {
        (membership, true) => Ok((stored, membership)),
        _ => Err(unknown_event()),
    }
}

/// Reads a token of `/messages` or of `/sync`, or a position of sliding sync: each names a place in the room.
pub(crate) fn place(token: &str) -> Result<PageToken, Refusal> {
    if let Some(order) = Pos::order(token) {
        return Ok(PageToken(order));
    }
    if token.starts_with('s') {
        return SyncToken::parse(token).map(|token| PageToken(token.order()));
    }
    PageToken::parse(token)
}

fn bounded(limit: u64) -> usize {
    usize::try_from(limit).unwrap_or(PAGE_MAX).min(PAGE_MAX)
}

#[cfg(test)]
mod tests;
