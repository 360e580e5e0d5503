//! Follows the log, and gives what is ours to tell to the queues of the servers that are told. The cursor stands where nothing is
//! lost by a crash: before it everything was taken, or is marked as missed.
//!
//! The devices of a user of ours who joins a room are announced to servers that are new to the user. Of a room that was joined without its
//! members, one server names the others, however many it likes, so that this waits until the room's state is whole and shows who is in the
//! room. Servers whose users turn out to be in it are told at once, then, of changes of devices that they may have missed, and of our events
//! there if they were not told of them.
//!
//! A server may have been in a room for a while before this one learns that: its user came while this server heard nothing, came in by a
//! state that was fetched for a gap, or is back because forks were resolved. It asked for the lists of those in the room as soon as it was there, and was told
//! of no change since. So it is told of the last changes when it turns out to be there ([`list_late`]).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use ruma::{OwnedServerName, UserId};
use tokio::sync::watch;

use crate::{
    accounts::users,
    delivery::servers::{
        edus::{self, Edu},
        fan_out::{List, Planner},
        shared::{People, READER, Shared},
        subject::Subject,
    },
    encryption::device_lists,
    error::Result,
    ids::{Order, Position, RoomNum, UserNum},
    rooms::{
        self,
        event::{self, StoredEvent},
        members, sticky,
    },
    schema::{
        self,
        receipts::ReceiptKind,
        rooms::{Membership, UserRoomRow},
    },
    store::{Direction, Fault, Guard, LogEntry, Read, Snapshot, cursor, key::Json, tail},
};

/// One page has at most this many entries.
const PAGE_MAX: usize = 128;
/// The cursor is noted no more often than this.
const NOTED_EVERY: Duration = Duration::from_secs(1);
/// After a failure the log is read again after this time.
const FAILED_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// Devices are announced this long after the state of a room became whole. It is no hurry, because whoever wants to know asks, and users
/// who have left by then are announced to nobody.
const ANNOUNCED_AFTER: Duration = Duration::from_secs(3);
/// Servers that turn out to be in a room are told at most this many events of ours that they missed: the newest, from which they find
/// the others.
const MISSED_MAX: usize = 20;
/// Look at most at this many events of a room for those.
const LOOKED_AT_MAX: usize = 1_000;
/// A server that comes into a room is told of the presence of at most this many users of ours there.
const GREETED_MAX: usize = 50;
/// Look at no more than this many members of a room that somebody of ours is the first to come into.
const MET_MAX: usize = 1_000;
/// A server whose user came into a room longer ago than this may have missed changes of devices that came since.
const CAME_LATE_MS: u64 = 1_000;
/// At most this many such servers are told for one event.
const CAME_LATE_MAX: usize = 50;
/// Look at no more than this many changes of a room's state for servers that came with an event.
const CHANGES_LOOKED_AT_MAX: usize = 20_000;
/// Look for what such a server has missed among this many users, of all servers, whose devices changed last.
const CHANGED_LATELY_MAX: usize = 1_000;
/// It is told of at most this many users.
const CHANGED_LATELY_TOLD_MAX: usize = 100;
/// A receipt that is older than this is not told any more.
const RECEIPT_MS_MAX: u64 = 60 * 60 * 1000;
/// A receipt waits at least this long for what else comes, and longer the more servers are told.
const RECEIPT_WAITS_MS: u64 = 500;
/// A receipt waits this long for each server that is told.
const RECEIPT_WAITS_A_SERVER_MS: u64 = 20;
/// A receipt waits at most this long.
const RECEIPT_WAITS_MS_MAX: u64 = 30_000;

/// Something that is told to servers.
enum News {
    /// An event, or a change of somebody's devices, by its place.
    Kept {
        subject: Subject,
        at: Position,
    },
    Receipt(Edu),
    /// How present a user is, whom the servers did not see until now.
    Presence(Edu),
}

/// Follows the log until the server ends.
pub(super) async fn follow(shared: Arc<Shared>, people: Arc<dyn People>, mut written: watch::Receiver<()>) {
    let mut noted = Position::ZERO;
    let mut noted_at = shared.env.instant();
    loop {
        written.mark_unchanged();
        let is_all = match read_page(&shared, &people).await {
            Ok(is_all) => is_all,
            Err(error) => {
                tracing::warn!(%error, "the log could not be read for other servers; it is tried again");
                shared.env.sleep(FAILED_AGAIN_AFTER).await;
                continue;
            }
        };
        let owned = Arc::clone(&shared);
        if let Err(error) = shared.env.blocking(move || announce(&owned)).await {
            tracing::warn!(%error, "other servers were not told of the devices of users who joined; it is tried again");
        }
        let told = shared.told_upto();
        if told > noted && shared.env.instant().saturating_duration_since(noted_at) >= NOTED_EVERY {
            noted = told;
            noted_at = shared.env.instant();
            if let Err(error) = note_cursor(&shared, told).await {
                tracing::warn!(%error, "it could not be noted how far other servers were told");
            }
        }
        if !is_all {
            continue;
        }
        let is_behind = noted < shared.board.lock().read;
        if is_behind {
            tokio::select! {
                biased;
                changed = written.changed() => if changed.is_err() { return },
                () = shared.env.sleep(NOTED_EVERY) => {}
            }
        } else if written.changed().await.is_err() {
            return;
        }
    }
}

async fn note_cursor(shared: &Arc<Shared>, told: Position) -> Result<()> {
    let owned = Arc::clone(shared);
    let note = move || {
        let mut note = owned.store.note(&Guard::own_tables());
        cursor::advance(&mut note, READER, told);
        drop(owned.store.enqueue_note(note)?);
        Ok(())
    };
    shared.env.blocking(note).await
}

/// Reads a page of the log and gives what it says to the queues. Tells whether everything has been read.
async fn read_page(shared: &Arc<Shared>, people: &Arc<dyn People>) -> Result<bool> {
    let (owned, people) = (Arc::clone(shared), Arc::clone(people));
    let page = move || {
        let snapshot = owned.store.snapshot();
        let after = owned.board.lock().read;
        let upto = snapshot.upto();
        if after >= upto {
            return Ok((false, true));
        }
        let entries = tail::read_kept_after(&*snapshot, after, PAGE_MAX)?;
        let is_all = entries.len() < PAGE_MAX;
        let reached = entries.last().map_or(upto, |(last, _)| if is_all { upto } else { *last });
        let news = list_news((&owned, &*people), &snapshot, &entries)?;
        let has_news = !news.is_empty();
        let now_ms = owned.env.now_ms();
        for (servers, news) in news {
            // One event at a time, so that others come to the board in between.
            let mut board = owned.board.lock();
            match news {
                News::Kept { subject, at } => {
                    board.read = board.read.max(at.before());
                    for server in servers.iter() {
                        board.offer(server, subject, at);
                    }
                    owned.write_marks(&mut board);
                }
                News::Presence(edu) => servers.iter().for_each(|server| {
                    board.offer_edu(server, edu.clone(), None);
                }),
                News::Receipt(edu) => {
                    let for_all = RECEIPT_WAITS_A_SERVER_MS.saturating_mul(servers.len() as u64);
                    let at_ms = now_ms + for_all.clamp(RECEIPT_WAITS_MS, RECEIPT_WAITS_MS_MAX);
                    for server in servers.iter() {
                        board.offer_edu(server, edu.clone(), Some(at_ms));
                    }
                }
            }
        }
        owned.board.lock().read = reached;
        Ok((has_news, is_all))
    };
    let (has_news, is_all) = shared.env.blocking(page).await?;
    if has_news {
        shared.turns.notify_one();
    }
    Ok(is_all)
}

/// Lists what these entries say that is ours to tell, in their order, each with the servers that are told.
fn list_news(
    (shared, people): (&Shared, &dyn People),
    snapshot: &Snapshot,
    entries: &[(Position, LogEntry)],
) -> Result<Vec<(List, News)>> {
    let mut planner = shared.planner.lock();
    let places = entries.iter().filter_map(|(position, entry)| {
        let LogEntry::Event { room, .. } = entry else { return None };
        Some((*room, Order::live(*position)))
    });
    let mut rows = schema::TIMELINE.get_many(snapshot, places)?.into_iter();
    let (mut news, mut of_users) = (Vec::new(), BTreeMap::<(UserNum, usize), List>::new());
    for (position, entry) in entries {
        match entry {
            LogEntry::Event { room, .. } => {
                // An event that was purged since is told to nobody.
                let Some(row) = rows.next().flatten() else { continue };
                let stored = StoredEvent { order: Order::live(*position), row };
                if planner.is_ours(&stored) {
                    let servers = planner.of_event(snapshot, *room, &stored)?;
                    if !servers.is_empty() {
                        news.push((servers, News::Kept { subject: Subject::Room(*room), at: *position }));
                    }
                }
                if let Some(server) = planner.newcomer(snapshot, *room, &stored)? {
                    let server = List::from([server]);
                    for at in list_own_sticky(shared, snapshot, *room, *position)? {
                        news.push((List::clone(&server), News::Kept { subject: Subject::Room(*room), at }));
                    }
                    for user in members::joined_local_users(snapshot, *room)?.take(GREETED_MAX) {
                        let edu = find_presence(people, snapshot, user?)?;
                        news.extend(edu.map(|edu| (List::clone(&server), News::Presence(edu))));
                    }
                }
                list_late((shared, &*planner), snapshot, (*room, *position), Some(&stored), &mut news)?;
                note_met((shared, people), snapshot, *room, &stored)?;
                // The devices are ours to tell also where another server tells of the join.
                if let Some(user) = find_joined(shared, snapshot, *room, &stored)? {
                    let servers = planner.announce_to(snapshot, user, *room)?;
                    if !servers.is_empty() {
                        news.push((servers, News::Kept { subject: Subject::Devices(user), at: *position }));
                    }
                    if let Some(edu) = find_presence(people, snapshot, user)? {
                        news.push((planner.of_room(snapshot, *room)?, News::Presence(edu)));
                    }
                }
            }
            LogEntry::DeviceList { user } => {
                let Some(account) = users::find(snapshot, *user)? else { continue };
                if !device_lists::is_to_tell(snapshot, (*user, &account.user_id), *position)? {
                    continue;
                }
                let rooms = list_shared_at(snapshot, *user, *position)?;
                let servers = match of_users.get(&(*user, rooms.len())) {
                    Some(servers) => List::clone(servers),
                    None => planner.of_rooms(snapshot, &rooms)?.into_iter().collect(),
                };
                of_users.insert((*user, rooms.len()), List::clone(&servers));
                if !servers.is_empty() {
                    news.push((servers, News::Kept { subject: Subject::Devices(*user), at: *position }));
                }
            }
            LogEntry::Receipts { room } => {
                let Some(edu) = find_receipt(shared, snapshot, *room, *position)? else { continue };
                let servers = planner.of_room(snapshot, *room)?;
                if !servers.is_empty() {
                    news.push((servers, News::Receipt(edu)));
                }
            }
            LogEntry::RoomState { room } => {
                list_late((shared, &*planner), snapshot, (*room, *position), None, &mut news)?;
                let row = rooms::find_row(snapshot, *room)?;
                if row.is_none_or(|row| row.filled_at != Some(*position)) {
                    continue;
                }
                let due = shared.env.uptime().saturating_add(ANNOUNCED_AFTER);
                shared.announcing.lock().insert((due, *room), *position);
                let missed = list_own_since_join(shared, snapshot, *room)?;
                if let Some(first) = missed.first() {
                    let servers = planner.list_untold(snapshot, *room, *first)?;
                    let newest = missed.iter().skip(missed.len().saturating_sub(MISSED_MAX));
                    let subject = Subject::Room(*room);
                    let told = newest.map(|at| (List::clone(&servers), News::Kept { subject, at: *at }));
                    news.extend(told.filter(|(servers, _)| !servers.is_empty()));
                }
                let mut once_in = None;
                for user in members::joined_local_users(snapshot, *room)? {
                    let user = user?;
                    if !has_changed_since_join(snapshot, user, *room)? {
                        continue;
                    }
                    let once_in = match &mut once_in {
                        Some(known) => known,
                        None => once_in.insert(members::list_servers_ever(snapshot, *room)?),
                    };
                    let servers = planner.of_rooms(snapshot, &members::list_joined_rooms(snapshot, user)?)?;
                    let servers = servers.into_iter().filter(|server| once_in.contains(server.as_str()));
                    let servers: List = servers.collect();
                    if !servers.is_empty() {
                        news.push((servers, News::Kept { subject: Subject::Devices(user), at: *position }));
                    }
                }
            }
            LogEntry::Account { .. }
            | LogEntry::AccountData { .. }
            | LogEntry::Device { .. }
            | LogEntry::ToDevice { .. }
            | LogEntry::OtherDeviceList
            | LogEntry::Filled { .. }
            | LogEntry::Expired { .. }
            | LogEntry::Server => {}
        }
    }
    Ok(news)
}

/// Lists the places of the sticky events of our users from before a position. A server that comes into the room then is told all of
/// them, for no other server may tell it those (MSC4354).
fn list_own_sticky(
    shared: &Shared,
    snapshot: &Snapshot,
    room: RoomNum,
    before: Position,
) -> Result<Vec<Position>, Fault> {
    let mut own = Vec::new();
    let span = (Position::ZERO, before.before());
    for (position, row) in sticky::list(snapshot, room, span, shared.env.now_ms(), usize::MAX)? {
        if event::is_of(&row.sender, shared.us.as_str()) {
            own.push(position);
        }
    }
    Ok(own)
}

/// Lists changes of devices for servers that this one learns late to be in a room: by a step of its state that an event made, or none.
fn list_late(
    (shared, planner): (&Shared, &Planner),
    snapshot: &Snapshot,
    (room, position): (RoomNum, Position),
    stored: Option<&StoredEvent>,
    news: &mut Vec<(List, News)>,
) -> Result<(), Fault> {
    let is_plain = |stored: &StoredEvent| {
        let header = &stored.row.header;
        header.state_key.is_none() && header.prev.len() <= 1 && header.before.is_none()
    };
    // A message on the newest event changes nothing of the state, and costs no look at it.
    if stored.is_some_and(is_plain) {
        return Ok(());
    }
    let came = members::list_servers_came_at(snapshot, room, Order::live(position), CHANGES_LOOKED_AT_MAX)?;
    // A server whose user came just now has asked for nothing yet.
    let came_now = stored.filter(|stored| {
        let age_ms = shared.env.now_ms().saturating_sub(stored.row.header.sent_ms);
        stored.membership() == Some(Membership::Join) && age_ms < CAME_LATE_MS
    });
    let newcomer = came_now.and_then(|stored| stored.row.state_key()).unwrap_or_default();
    let late = came.iter().filter(|server| !event::is_of(&newcomer, server));
    let late = late.filter_map(|server| OwnedServerName::try_from(server.as_str()).ok());
    let servers: List = late.filter(|server| planner.may_tell(server)).take(CAME_LATE_MAX).collect();
    if servers.is_empty() {
        return Ok(());
    }
    let mut told = 0;
    for user_id in device_lists::list_latest(snapshot, position, CHANGED_LATELY_MAX)? {
        let Some(user_id) =
            <&UserId>::try_from(user_id.as_str()).ok().filter(|it| *it.server_name() == *shared.us)
        else {
            continue;
        };
        if let Some(user) = users::find_num(snapshot, user_id)?
            && members::is_joined(snapshot, user, room)?
        {
            news.push((List::clone(&servers), News::Kept { subject: Subject::Devices(user), at: position }));
            told += 1;
            if told == CHANGED_LATELY_TOLD_MAX {
                break;
            }
        }
    }
    Ok(())
}

/// Lists the rooms that a user of ours is in and was in at a position. Whoever came to share a room with the user after a change of devices
/// is told of the devices for that.
fn list_shared_at(snapshot: &Snapshot, user: UserNum, at: Position) -> Result<Vec<RoomNum>, Fault> {
    let rooms = members::list_joined_rooms(snapshot, user)?;
    let rows = members::find_many(snapshot, user, rooms.iter().copied())?;
    let was_in = |row: &Option<UserRoomRow>| row.as_ref().is_some_and(|row| row.since <= at);
    Ok(rooms.into_iter().zip(rows).filter(|(_, row)| was_in(row)).map(|(room, _)| room).collect())
}

/// Lists the newest events of ours in a room since it was joined by way of another server, rising.
fn list_own_since_join(shared: &Shared, snapshot: &Snapshot, room: RoomNum) -> Result<Vec<Position>, Fault> {
    let mut own = Vec::new();
    let rows = schema::TIMELINE.prefix::<(RoomNum,)>(snapshot, (room,), Direction::Down)?;
    for row in rows.take(LOOKED_AT_MAX) {
        let ((_, order), row) = row?;
        let stored = StoredEvent { order, row };
        if event::is_ours_to_tell(&stored.row, &shared.us) {
            own.push(order.anchor);
        } else if stored.row.header.let_in && stored.membership() == Some(Membership::Join) {
            // A user of ours came by way of another server, before which we were not in the room.
            break;
        }
    }
    own.reverse();
    Ok(own)
}

/// Whether the devices of a user of ours changed since the user joined a room.
fn has_changed_since_join(snapshot: &Snapshot, user: UserNum, room: RoomNum) -> Result<bool, Fault> {
    let Some(account) = users::find(snapshot, user)? else { return Ok(false) };
    let changed = device_lists::find_changed(snapshot, &account.user_id)?;
    Ok(members::find(snapshot, user, room)?.is_some_and(|row| changed > Some(row.since)))
}

/// Announces the devices of our users to the servers of rooms whose state became whole a while ago. Those whose devices changed since they
/// joined were told of then.
fn announce(shared: &Shared) -> Result<()> {
    let now = shared.env.uptime();
    loop {
        let next = shared.announcing.lock().first_key_value().map(|(key, place)| (*key, *place));
        let Some(((due, room), place)) = next.filter(|((due, _), _)| *due <= now) else { return Ok(()) };
        let snapshot = shared.store.snapshot();
        let mut news = Vec::new();
        for user in members::joined_local_users(&*snapshot, room)? {
            let user = user?;
            if !has_changed_since_join(&snapshot, user, room)? {
                news.push((user, shared.planner.lock().announce_to(&snapshot, user, room)?));
            }
        }
        for (user, servers) in news {
            let mut board = shared.board.lock();
            for server in servers.iter() {
                board.offer(server, Subject::Devices(user), place);
            }
            shared.write_marks(&mut board);
        }
        shared.announcing.lock().remove(&(due, room));
        shared.turns.notify_one();
    }
}

/// The user of ours whom an event brought into a room, who had not been in it before.
fn find_joined(
    shared: &Shared,
    snapshot: &Snapshot,
    room: RoomNum,
    stored: &StoredEvent,
) -> Result<Option<UserNum>, Fault> {
    if stored.membership() != Some(Membership::Join) {
        return Ok(None);
    }
    let user_id = stored.row.state_key();
    let user_id = user_id.as_deref().and_then(|user| <&UserId>::try_from(user).ok());
    let Some(user_id) = user_id.filter(|user_id| *user_id.server_name() == *shared.us) else {
        return Ok(None);
    };
    let Some(user) = users::find_num(snapshot, user_id)? else { return Ok(None) };
    let was_in = match stored.row.header.replaces {
        Some(replaced) => members::membership_of_event(snapshot, room, replaced)? == Membership::Join,
        None => false,
    };
    // A join whose answer was lost counts for the other servers and not here, so that they were told of no devices while the room took the
    // user for a member. The join that counts here is the next one.
    let counts_from_here =
        members::find(snapshot, user, room)?.is_some_and(|row| row.since == stored.order.anchor);
    Ok((counts_from_here || !was_in).then_some(user))
}

/// The presence of a user of ours, as it is told to servers that see it from now on; `None` where there is nothing to tell.
fn find_presence(people: &dyn People, snapshot: &Snapshot, user: UserNum) -> Result<Option<Edu>, Fault> {
    let Some(told) = people.presence(user) else { return Ok(None) };
    let account = users::find(snapshot, user)?;
    Ok(account.map(|account| edus::presence(&account.user_id, &told)))
}

/// Notes which users of other servers ours come to share a room with by an event.
fn note_met(
    (shared, people): (&Shared, &dyn People),
    snapshot: &Snapshot,
    room: RoomNum,
    stored: &StoredEvent,
) -> Result<(), Fault> {
    if stored.membership() != Some(Membership::Join) {
        return Ok(());
    }
    let user_id = stored.row.state_key();
    let Some(user_id) = user_id.as_deref().and_then(|user| <&UserId>::try_from(user).ok()) else {
        return Ok(());
    };
    if *user_id.server_name() != *shared.us {
        people.met(user_id, room);
    } else if members::joined_local_users(snapshot, room)?.take(2).count() == 1 {
        // Nobody of ours was there before.
        for row in members::list_keys(snapshot, room)?.take(MET_MAX) {
            let (user, _) = row?;
            if let Some(other) = <&UserId>::try_from(&*user).ok().filter(|it| *it.server_name() != *shared.us)
            {
                people.met(other, room);
            }
        }
    }
    Ok(())
}

/// The public receipt of one of our users that was stored at this position, unless a newer one stands in its place.
fn find_receipt(
    shared: &Shared,
    snapshot: &Snapshot,
    room: RoomNum,
    position: Position,
) -> Result<Option<Edu>> {
    let Some(Json(key)) = schema::RECEIPT_LOG.get(snapshot, (room, position))? else { return Ok(None) };
    if key.kind != ReceiptKind::Public || !event::is_of(key.user.as_str(), shared.us.as_str()) {
        return Ok(None);
    }
    let row = schema::RECEIPTS.get(snapshot, (room, key.user.as_str(), key.kind, key.thread.as_str()))?;
    let oldest_ms = shared.env.now_ms().saturating_sub(RECEIPT_MS_MAX);
    let Some(row) = row.filter(|row| row.position == position && row.sent_ms >= oldest_ms) else {
        return Ok(None);
    };
    let Some(room_row) = rooms::find_row(snapshot, room)? else { return Ok(None) };
    Ok(Some(edus::receipt(room, room_row.id.as_str(), &key, &row)))
}
