//! The endpoints that told of rooms before `/sync` did: `/initialSync`, `/rooms/{roomId}/initialSync` and `/events`
//! (<https://spec.matrix.org/v1.19/client-server-api/#room-previews>). They tell what `collect` and `streams` find, as `/sync` does,
//! in another form; `/events` also tells somebody outside of a room that everybody may look into.

mod form;
mod initial;
mod stream;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::select_all;
use ruma::{OwnedRoomId, RoomId, UInt, api::client::filter::FilterDefinition};

use crate::{
    accounts::{Caller, tokens},
    env::payer,
    error::{Refusal, Result},
    ids::{EventNum, Order, Position, RoomNum, UserNum},
    json::Object,
    rooms::{
        self, members,
        visibility::{self, HistoryVisibility, Reader},
    },
    schema::rooms::{Membership, RoomRow, UserRoomRow},
    store::{Fault, Read, Snapshot},
    sync::{Ask, POLL_MAX, Polls, SyncToken, window::Window},
};

/// A client that asks for no number of messages gets at most this many of each room.
pub const MESSAGES_DEFAULT: usize = 10;
/// One request goes over the log in at most this many steps; then it answers, and the client goes on from there.
const STEPS_MAX: usize = 50;
/// Somebody who looks into a room is woken with the first members of this server in it, because news of the room wakes all members.
const WATCHED_MAX: usize = 4;

/// The wish of a client of `/events`.
#[derive(Debug)]
pub struct StreamWanted {
    /// The user who asks, and the device they ask with.
    pub caller: Caller,
    /// Where the client stands, settled ([`Polls::settle`]); now, if none.
    pub from: Option<SyncToken>,
    /// The only room that is told of, which the user need not be in. All rooms of the user, if none.
    pub room: Option<OwnedRoomId>,
    /// One answer has at most this many events of rooms.
    pub limit: usize,
    /// How long the client waits for news.
    pub timeout: Duration,
}

impl Polls {
    /// Answers `/initialSync` with everything that the user's rooms are now, each with at most `limit` messages. Rooms that
    /// the user has left are told only if they are asked for.
    pub async fn initial(&self, caller: Caller, limit: usize, archived: bool) -> Result<Bytes> {
        let parts = Arc::clone(&self.0);
        self.0.env.blocking(move || parts.initial(caller, limit, archived)).await
    }

    /// Answers `/rooms/{roomId}/initialSync`. Errors: 403 `M_FORBIDDEN` for somebody who is not and never was in the room, unless
    /// everybody may look into it.
    pub async fn initial_of_room(&self, caller: Caller, room: OwnedRoomId, limit: usize) -> Result<Bytes> {
        let parts = Arc::clone(&self.0);
        self.0.env.blocking(move || parts.initial_of_room(caller, &room, limit)).await
    }

    /// Answers `/events` as soon as something happens, or when the time is up. Errors: as of [`Polls::initial_of_room`], for a
    /// room that the client names.
    pub async fn stream(&self, wanted: StreamWanted) -> Result<Bytes> {
        let StreamWanted { caller, from, room, limit, timeout } = wanted;
        let mut subscriptions = vec![self.0.notifier.subscribe(caller.user)];
        let deadline = self.0.env.instant() + timeout.min(POLL_MAX);
        let start = from.unwrap_or_else(|| self.now());
        let (mut since, mut watched, mut steps, mut place) = (start, Vec::new(), 0, None);
        loop {
            let (parts, caller, room) = (Arc::clone(&self.0), caller.clone(), room.clone());
            let (user, device, has_waited) = (caller.user, caller.device, place.is_some());
            let look = move || {
                let found = parts.look_at_stream(caller.clone(), since, room.as_deref(), limit)?;
                // The look may be newer than what woke the poll, so that the session is looked at after it.
                if has_waited {
                    tokens::require_still(&*parts.store.snapshot(), &caller)?;
                }
                Ok(found)
            };
            let found = self.0.env.blocking(look).await?;
            since = found.end;
            steps += 1;
            let left = deadline.saturating_duration_since(self.0.env.instant());
            let is_done = !found.events.is_empty() || steps == STEPS_MAX;
            if is_done || (left.is_zero() && !found.is_behind) {
                let mut answer = Object::new();
                answer.text("start", &start.to_string());
                answer.text("end", &since.to_string());
                answer.list("chunk", &found.events);
                return Ok(answer.finish().into());
            }
            if found.is_behind {
                continue;
            }
            if found.watched != watched {
                // News between that look and this subscription is seen by the next look.
                watched = found.watched;
                subscriptions.truncate(1);
                subscriptions.extend(watched.iter().map(|user| self.0.notifier.subscribe(*user)));
                continue;
            }
            steps = 0;
            payer::rest();
            let place = place.get_or_insert_with(|| self.0.places.take(user, device));
            let woken =
                select_all(subscriptions.iter_mut().map(|subscription| Box::pin(subscription.woken())));
            tokio::select! {
                biased;
                () = place.lost() => return Ok(nothing(start, since)),
                _ = woken => {}
                () = self.0.stopping.cancelled() => return Ok(nothing(start, since)),
                () = self.0.env.sleep(left) => return Ok(nothing(start, since)),
            }
        }
    }

    /// The token of a client that knows everything up to now.
    fn now(&self) -> SyncToken {
        let ephemeral = self.0.ephemeral.read(|board| board.number());
        let snapshot = self.0.store.snapshot();
        token(snapshot.upto(), self.0.ephemeral.boot(), ephemeral)
    }
}

fn nothing(start: SyncToken, end: SyncToken) -> Bytes {
    let mut answer = Object::new();
    answer.text("start", &start.to_string());
    answer.text("end", &end.to_string());
    answer.list_with("chunk", |_| {});
    answer.finish().into()
}

/// Makes a token that confirms no messages to devices, because these endpoints tell of none.
fn token(position: Position, boot: u32, ephemeral: u64) -> SyncToken {
    SyncToken {
        position,
        boot,
        ephemeral,
        inbox: None,
        receipts: None,
        sticky: None,
        invites: None,
        device: None,
    }
}

/// Makes the request by which news is collected for these endpoints: everything, and the state as it is after the timeline.
fn ask(caller: Caller, since: Option<SyncToken>, limit: usize) -> Result<Ask, Refusal> {
    let mut filter = FilterDefinition::default();
    filter.room.timeline.limit = UInt::try_from(limit).ok();
    let mut ask = Ask::new(caller, since, &filter)?;
    ask.use_state_after = true;
    Ok(ask)
}

/// A room that the caller may read: because they are or were in it, or because everybody may.
struct Open {
    num: RoomNum,
    row: RoomRow,
    user_row: UserRoomRow,
    reader: Reader,
    /// The caller sees the room up to here.
    end: Order,
}

impl Open {
    /// Opens the room for the one who asks. Errors: 403 `M_FORBIDDEN`.
    fn of(window: &Window<'_>, room: &RoomId) -> Result<Self> {
        let (read, caller): (&Snapshot, &Caller) = (window.read, &window.ask.caller);
        let num = rooms::find_room(read, room)?.ok_or_else(closed)?;
        let row = rooms::require_row(read, num)?;
        if !row.resident.has_history() {
            return Err(closed().into());
        }
        let user_row = members::find(read, caller.user, num)?;
        let reader = Reader::of(read, num, caller.user, &caller.user_id, window.ignored()?.clone())?;
        let end = match reader.joined_until() {
            Some(left) => left,
            None if visibility::current(read, num)? == HistoryVisibility::WorldReadable => Order::MAX,
            None => return Err(closed().into()),
        };
        let end = end.min(Order::upto(window.upto));
        Ok(Self { num, row, user_row: user_row.unwrap_or(STRANGER), reader, end })
    }

    /// Whether the caller is in the room, or looks in from outside: they are told what goes on there.
    fn is_present(&self) -> bool {
        self.user_row.membership == Membership::Join || self.reader.joined_until().is_none()
    }
}

/// The row of somebody who never had anything to do with a room.
const STRANGER: UserRoomRow = UserRoomRow {
    membership: Membership::Leave,
    since: Position::ZERO,
    event: EventNum(0),
    forgotten: false,
    left: None,
    forgotten_below: None,
};

fn closed() -> Refusal {
    Refusal::forbidden("You are not in this room, and it is not open to be looked into.")
}

/// Lists those with whom somebody who looks into a room is woken.
fn list_watched(read: &(impl Read + ?Sized), caller: UserNum, room: &Open) -> Result<Vec<UserNum>, Fault> {
    if room.user_row.membership == Membership::Join {
        return Ok(Vec::new());
    }
    let members = members::joined_local_users(read, room.num)?;
    members.filter(|user| user.as_ref().map_or(true, |user| *user != caller)).take(WATCHED_MAX).collect()
}
