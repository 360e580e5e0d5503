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
    flows::{App, own_events},
    ids::{DeviceNum, EventNum, Position, RoomNum, UserNum},
    rooms::{
        build::Draft,
        change::txn::{self, Txn},
        event, members,
        membership::without_profile,
        policy::{self, Author},
        state,
    },
    schema,
    schema::event_types::{GUEST_ACCESS, MEMBER},
    schema::rooms::Membership,
    store::{LogEntry, Read},
};

/// The name of this reader of the log.
pub(crate) const READER: &str = "guests";

/// One look reads at most this many members of a room: nothing lists guests by themselves, because there are few of them.
const MEMBERS_AT_ONCE: usize = if cfg!(test) { 3 } else { 1_000 };

/// A room that closed to guests, with the position of the log at which it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Closed {
    room: RoomNum,
    at: Position,
}

/// Reads these entries of the log and lets each guest leave the rooms that they close to guests.
pub(crate) async fn follow(app: &App, entries: Vec<(Position, LogEntry)>) -> Result<()> {
    let store = app.store.clone();
    let find = move || list_closed(&*store.snapshot(), &entries);
    for closed in app.env.blocking_long(Long::Maintenance, find).await? {
        empty_of_guests(app, closed).await?;
    }
    Ok(())
}

/// Lets all guests of a room leave, page by page, so that a room of many members holds nobody up.
async fn empty_of_guests(app: &App, closed: Closed) -> Result<()> {
    let mut after = None;
    loop {
        let store = app.store.clone();
        let find = move || list_guests(&*store.snapshot(), closed.room, after);
        let page = app.env.blocking_long(Long::Maintenance, find).await?;
        for guest in page.guests {
            match take_out(app, closed, guest).await {
                // If the room does not allow one guest to leave, the others leave all the same.
                Err(Error::Refused(why)) => {
                    let (room, reason) = (closed.room, why.message);
                    tracing::debug!(%room, reason, "a guest cannot leave a room that closed");
                }
                // The guests of other rooms do not wait for the policy server of this one.
                Err(Error::Remote { server, cause }) => {
                    let room = closed.room;
                    tracing::info!(%room, server, cause, "a guest stays in a room that closed: its policy server cannot be asked");
                }
                other => other?,
            }
        }
        if page.next.is_none() {
            return Ok(());
        }
        after = page.next;
    }
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
            | LogEntry::Server
            | LogEntry::OtherDeviceList
            | LogEntry::Filled { .. }
            | LogEntry::Expired { .. } => {}
        }
    }
    let mut closed = Vec::new();
    for (room, (events, state_changed)) in changed {
        let Some(key) = state::find_key(read, room, GUEST_ACCESS, "")? else { continue };
        let current = state::current(read, room, key)?;
        let mut at = current.and_then(|event| events.get(&event).copied()).or(state_changed);
        if let (None, Some(current)) = (at, current) {
            // A redaction takes out of the event what it allowed, so that the room closes though its state stays the same.
            let redaction = event::require(read, room, current)?.row.header.redacted_by;
            at = redaction.and_then(|redaction| events.get(&redaction).copied());
        }
        if let Some(at) = at
            && !policy::is_open_to_guests(read, room)?
        {
            closed.push(Closed { room, at });
        }
    }
    Ok(closed)
}

/// Some of the guests in a room.
#[derive(Debug)]
struct Page {
    guests: Vec<Author>,
    /// The member after whom the next page begins; none after the last page.
    next: Option<UserNum>,
}

/// Lists the guests among some members of a room, those after `after`. A room reads its members of this server so at most once a
/// second: the reader of the log looks no more often, and a room that opens and closes many times in between is closed once.
fn list_guests(read: &impl Read, room: RoomNum, after: Option<UserNum>) -> Result<Page> {
    let users = members::list_joined_local_users_after(read, room, after, MEMBERS_AT_ONCE)?;
    let rows = schema::USERS.get_many(read, users.iter().copied())?;
    let mut guests = Vec::new();
    for (user, row) in users.iter().zip(rows) {
        if row.is_some_and(|row| row.is_guest) {
            guests.push(Author::of(read, *user)?);
        }
    }
    Ok(Page { guests, next: users.last().copied().filter(|_| users.len() == MEMBERS_AT_ONCE) })
}

/// Lets a guest leave, once for each time that the room closed.
async fn take_out(app: &App, closed: Closed, guest: Author) -> Result<()> {
    let (signer, sent_ms) = (app.rooms.signer().clone(), app.env.event_ms());
    own_events::in_room_unasked(app, closed.room, move |change| {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        accounts::users::NewUser,
        store::{Durability, Engine, Guard, Store, engine::Memory},
    };

    #[test]
    fn guests_are_found_page_by_page_wherever_they_stand_among_the_members() {
        let (store, room) =
            (Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap(), RoomNum(1));
        let mut batch = store.batch(&Guard::alone());
        for number in 1..=9 {
            let user_id = format!("@user{number}:a.example").try_into().unwrap();
            let is_guest = [1, 3, 6, 7, 9].contains(&number);
            let new = NewUser { user_id, is_admin: false, is_guest, now_ms: 0 };
            users::create(&mut batch, UserNum(number), &new);
            let membership = if number == 6 { Membership::Invite } else { Membership::Join };
            schema::ROOM_USER.put(&mut batch, (room, UserNum(number)), &membership.into());
            schema::ROOM_USER.put(&mut batch, (RoomNum(2), UserNum(number)), &membership.into());
        }
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        let Engine::Memory(memory) = store.engine() else { panic!("tests run in memory") };
        let snapshot = store.snapshot();
        let (mut found, mut after, mut pages) = (Vec::new(), None, 0);
        loop {
            let before = memory.reads();
            let page = list_guests(&*snapshot, room, after).unwrap();
            // A page reads its members, an account of each, what makes a guest an author, and not the whole room.
            assert!(
                memory.reads() - before <= 5 * MEMBERS_AT_ONCE as u64,
                "{} rows",
                memory.reads() - before
            );
            found.extend(page.guests.iter().map(|guest| guest.user.0));
            pages += 1;
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert_eq!((found, pages), (vec![1, 3, 7, 9], 3));
    }
}
