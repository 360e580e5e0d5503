//! Takes guests out of rooms that close to them: "If the `m.room.guest_access` event is changed to stop this from being the
//! case, the server MUST set those users' `m.room.member` state to `leave`"
//! (<https://spec.matrix.org/v1.19/client-server-api/#guest-access>).
//!
//! This reads the log, so that a room that another server closes is treated in the same way, and a crash loses nothing. The
//! position at which the room closed is the transaction id of the guests' leaving, so a repetition does nothing.

use std::collections::BTreeMap;

use crate::{
    accounts::users,
    env::Long,
    error::{Error, Result},
    flows::{App, commit},
    ids::{DeviceNum, EventNum, Position, RoomNum},
    rooms::{
        build::Draft,
        change::txn::{self, Txn},
        members,
        membership::without_profile,
        policy::{self, Author},
        state,
    },
    schema::event_types::{GUEST_ACCESS, MEMBER},
    schema::rooms::Membership,
    store::{LogEntry, Read},
};

/// The name of this reader of the log.
pub(crate) const READER: &str = "guests";

/// A room that closed to guests, with the position of the log at which it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Closed {
    room: RoomNum,
    at: Position,
}

/// Reads these entries of the log and lets each guest leave the rooms that they close to guests.
pub(crate) async fn follow(app: &App, entries: Vec<(Position, LogEntry)>) -> Result<()> {
    let owned = app.clone();
    let find = move || {
        let snapshot = owned.store.snapshot();
        let mut found = Vec::new();
        for closed in list_closed(&*snapshot, &entries)? {
            for guest in list_guests(&*snapshot, closed.room)? {
                found.push((closed, guest));
            }
        }
        Ok(found)
    };
    for (closed, guest) in app.env.blocking_long(Long::Maintenance, find).await? {
        match take_out(app, closed, guest).await {
            // If the room does not allow one guest to leave, the others leave all the same.
            Err(Error::Refused(why)) => {
                tracing::debug!(room = %closed.room, reason = why.message, "a guest cannot leave a room that closed");
            }
            other => other?,
        }
    }
    Ok(())
}

/// The rooms whose guest access these entries changed, and which are now closed.
fn list_closed(read: &impl Read, entries: &[(Position, LogEntry)]) -> Result<Vec<Closed>> {
    let mut changed = BTreeMap::<RoomNum, (BTreeMap<EventNum, Position>, Option<Position>)>::new();
    for (position, entry) in entries {
        match entry {
            LogEntry::Event { room, event } => {
                changed.entry(*room).or_default().0.insert(*event, *position);
            }
            // A state may become current again without a new event.
            LogEntry::RoomState { room } => changed.entry(*room).or_default().1 = Some(*position),
            LogEntry::Receipts { .. }
            | LogEntry::Account { .. }
            | LogEntry::AccountData { .. }
            | LogEntry::Device { .. }
            | LogEntry::ToDevice { .. }
            | LogEntry::DeviceList { .. }
            | LogEntry::Server => {}
        }
    }
    let mut closed = Vec::new();
    for (room, (events, state_changed)) in changed {
        let Some(key) = state::find_key(read, room, GUEST_ACCESS, "")? else { continue };
        let current = state::current(read, room, key)?;
        let at = current.and_then(|event| events.get(&event).copied()).or(state_changed);
        if let Some(at) = at
            && !policy::is_open_to_guests(read, room)?
        {
            closed.push(Closed { room, at });
        }
    }
    Ok(closed)
}

/// The guests in a room. This reads every member of ours, at most once a second for each room: the reader of the log looks no more
/// often, and a room that opens and closes many times in between is closed once.
fn list_guests(read: &impl Read, room: RoomNum) -> Result<Vec<Author>> {
    let mut guests = Vec::new();
    for user in members::joined_local_users(read, room)? {
        let user = user?;
        if users::require(read, user)?.is_guest {
            guests.push(Author::of(read, user)?);
        }
    }
    Ok(guests)
}

/// Lets a guest leave, once for each time that the room closed.
async fn take_out(app: &App, closed: Closed, guest: Author) -> Result<()> {
    let (signer, sent_ms) = (app.rooms.signer().clone(), app.env.event_ms());
    commit::in_room(app, closed.room, move |change| {
        let once = Txn {
            user: guest.user,
            device: DeviceNum(0),
            endpoint: txn::GUESTS.to_owned(),
            id: closed.at.number().to_string(),
            now_ms: sent_ms,
        };
        let is_done = once.find(&change.batch, closed.room)?.is_some();
        let is_in = change.membership(guest.user_id.as_str())? == Membership::Join;
        // The guest may have become a user meanwhile, and the room may have opened again.
        let is_guest = users::require(&change.batch, guest.user)?.is_guest;
        if is_done || !is_in || !is_guest || policy::guests_may_join(change)? {
            return Ok(());
        }
        let content = without_profile("leave", Some("This room is closed to guests."));
        let draft = Draft::state(guest.user_id.clone(), MEMBER, guest.user_id.as_str(), content, sent_ms);
        policy::approve(change, signer.server(), &guest, draft)?.add_once(change, &signer, &once).map(drop)
    })
    .await
}
