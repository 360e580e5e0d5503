//! Memberships of users of ours by events that stand nowhere in the room as this server knows it: other servers invite them,
//! they knock at rooms of other servers, and they refuse or withdraw that. The event itself, and what was told of the room
//! with it, stand in a row of `OUTSIDE`; the user's row in `USER_ROOM` says what they are, and names the row by a number that
//! no event of the room has. Once the room's state says something of the user, their row names an event, and the other one says
//! nothing any more.
//!
//! Anybody may say that they invite somebody to a room of which this server knows nothing. So nobody's word touches another's: the
//! invitation of one server neither replaces nor ends that of another. The first stays shown until it is answered or withdrawn, and
//! a few others stand behind it meanwhile ([`Standing`]).

use std::sync::Arc;

use ruma::{OwnedEventId, OwnedRoomId, UserId};
use serde_json::value::RawValue;

use super::{Change, Signed, invited, staged};
use crate::{
    accounts::{
        self,
        ignored::Ignored,
        invites::{Permissions, Verdict},
    },
    error::{Error, Result},
    ids::{EventNum, Order, RoomNum, UserNum},
    json::{JsonText, Object},
    rooms::{
        self,
        event::{self, Event},
        members::{self, Since},
        redact, stripped,
        turns::Seat,
        versions,
    },
    schema::{
        self,
        event_types::MEMBER,
        jobs::Job,
        remote::{OutsideRow, Standing},
        rooms::{Membership, Resident, RoomRow, UserRoomRow},
    },
    store::{Direction, Fault, LogEntry, Read, Store, key::Json, tail, timer},
};

/// Settle what at most this many users were told of a room when it is joined, because that is part of one batch.
const SETTLED_MAX: usize = 400;

/// Keep at most this many invitations and knocks behind the one that is shown.
const OTHERS_MAX: usize = 4;
/// They have at most this many bytes together, so that they fit into one batch with the one that is shown.
const OTHERS_BYTES_MAX: usize = 120 << 10;
/// Keep as much of what one of them tells of the room as fits into this many bytes.
const OTHER_BYTES_MAX: usize = 40 << 10;

/// An event by which others end what a user is to a room is kept redacted where it has more bytes than this, and not at all where that has
/// more, too: anybody may invite and withdraw as often as they like.
const END_BYTES_MAX: usize = 2 << 10;
/// Such an end is forgotten after this many milliseconds, and not before the log has forgotten it.
const ENDED_KEPT_MS: u64 = 3 * 24 * 60 * 60 * 1000;

/// A membership that a user of ours gets from outside a room.
#[derive(Clone, Debug)]
pub struct Told {
    /// The membership: an invitation, a knock, or the end of either.
    pub membership: Membership,
    /// The version that the room has by the word of whoever tells of it.
    pub version: u8,
    /// The server by whose word it is.
    pub via: String,
    /// The user id of the sender of the member event.
    pub sender: String,
    /// The member event as JSON; empty where no other server was told of it.
    pub event: String,
    /// The events that tell which room this is, as clients see them. The member event is the last of them.
    pub state: Vec<String>,
}

/// Finds what was told of a room to a user of ours who is not in it, of whom this is the row.
pub fn find(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    user: UserNum,
    row: &UserRoomRow,
) -> Result<Option<OutsideRow>, Fault> {
    let found = schema::OUTSIDE.get(read, (room, user))?;
    Ok(found.map(|Json(found)| found).filter(|found| found.number == row.event.0))
}

/// The member event as clients see it; `None` where no event was made.
pub fn shown(told: &OutsideRow, version: u8) -> Option<JsonText> {
    #[derive(serde::Deserialize)]
    struct Fields<'a> {
        #[serde(borrow)]
        content: &'a RawValue,
        #[serde(borrow)]
        origin_server_ts: &'a RawValue,
        #[serde(borrow)]
        sender: &'a RawValue,
        #[serde(borrow)]
        state_key: &'a RawValue,
    }
    let told = &told.shown;
    let id = Signed::find_id(told.version_or(version), told.event.as_bytes())?;
    let fields: Fields<'_> = serde_json::from_str(&told.event).ok()?;
    let mut event = Object::with_capacity(told.event.len());
    event.json("content", fields.content);
    event.text("event_id", id.as_str());
    event.json("origin_server_ts", fields.origin_server_ts);
    event.json("sender", fields.sender);
    event.json("state_key", fields.state_key);
    event.text("type", MEMBER);
    Some(event.finish())
}

/// An event by which another server ends what a user of ours is to a room from outside.
#[derive(Clone, Debug)]
pub struct End {
    /// The membership as it is then, if nothing else stands.
    pub told: Told,
    /// The ids of the events that allow the event.
    pub names: Vec<OwnedEventId>,
}

/// Lists what stands for a user: what is shown first, then the others, the oldest first.
pub fn list_standing(row: &OutsideRow) -> Vec<Standing> {
    std::iter::once(&row.shown).chain(&row.others).cloned().collect()
}

impl Standing {
    /// Whether it is for this server to say what becomes of it: the server whose user made the invitation, or for a knock those that
    /// its answer showed to be in the room.
    fn is_up_to(&self, user: &UserId, server: &str) -> bool {
        if self.sender != *user {
            return event::server_of(&self.sender) == Some(server);
        }
        self.via == server
            || list_senders(&self.state).any(|sender| event::server_of(&sender) == Some(server))
    }

    /// Whether this user may end it: an invitation who made it, a knock anybody of the servers that were seen to be in the room.
    fn may_end(&self, user: &UserId, by: &str) -> bool {
        self.sender == by
            || (self.sender == *user
                && event::server_of(by).is_some_and(|server| self.is_up_to(user, server)))
    }

    /// Whether an event names this one among those that allow it. Rows of before go by `version`.
    fn is_named(&self, names: &[OwnedEventId], version: u8) -> bool {
        Signed::find_id(self.version_or(version), self.event.as_bytes()).is_some_and(|id| names.contains(&id))
    }

    /// The version of the room; rows of before go by the one given.
    pub fn version_or(&self, version: u8) -> u8 {
        if self.version == 0 { version } else { self.version }
    }
}

/// Whether this user may end something of what stands for the invited one by an event that names these. They name what they end, or
/// something else that stands, which only those know who are told of it.
pub fn may_end(row: &OutsideRow, user: &UserId, by: &str, names: &[OwnedEventId], version: u8) -> bool {
    let standing = list_standing(row);
    standing.iter().any(|it| it.is_named(names, version)) && standing.iter().any(|it| it.may_end(user, by))
}

/// The senders of events as clients see them.
pub fn list_senders(events: &[String]) -> impl Iterator<Item = String> {
    #[derive(serde::Deserialize)]
    struct Sent {
        sender: String,
    }
    events.iter().filter_map(|event| serde_json::from_str::<Sent>(event).ok()).map(|event| event.sender)
}

/// Whether a new invitation takes the place of what stands: it is by a user of the same server, or it answers a knock.
fn replaces(invited_by: &str, names: &[OwnedEventId], version: u8, user: &UserId, old: &Standing) -> bool {
    let server = event::server_of(invited_by).unwrap_or_default();
    old.is_up_to(user, server) || (old.sender == *user && old.is_named(names, version))
}

/// Keeps of an invitation or a knock what there is space for behind the one that is shown.
fn behind(mut it: Standing) -> Standing {
    it.state = stripped::bound(it.state, &it.sender);
    let mut bytes = it.event.len() + it.state.last().map_or(0, String::len);
    let mut left = it.state.len();
    it.state.retain(|event| {
        left -= 1;
        bytes += event.len();
        left == 0 || bytes <= OTHER_BYTES_MAX
    });
    it
}

/// Leaves out the oldest of what is too much.
fn bounded(mut others: Vec<Standing>) -> Vec<Standing> {
    let bytes = |it: &Standing| it.event.len() + it.state.iter().map(String::len).sum::<usize>();
    while others.len() > OTHERS_MAX || others.iter().map(bytes).sum::<usize>() > OTHERS_BYTES_MAX {
        others.remove(0);
    }
    others
}

impl Change {
    /// Begins a change of what users of ours are to a room from outside. A room of which nothing is known gets a row, so that
    /// it has a number; the batch is refused if somebody else makes one meanwhile. `version` is what the one who tells of the room says,
    /// and nobody else is bound by it. Errors: [`Error::Remote`] by `via` if this server was in the room, and knows it in another
    /// version.
    pub fn begin_outside(
        store: &Store,
        mut seat: Seat,
        (id, version): (OwnedRoomId, u8),
        via: &str,
    ) -> Result<Self> {
        let num = seat.room();
        if seat.is_being_joined() {
            return Err(Error::Busy { retry_after: super::JOINING_TAKES });
        }
        let guard = seat.guard();
        let written_alone = store.written_alone();
        seat.tip = None;
        staged::clear(store, &guard, num)?;
        let mut batch = store.batch(&guard);
        let row = match schema::ROOM.get(&batch, num)? {
            Some(row) => row,
            None => {
                let row = RoomRow::new(id.clone(), version, Resident::Invited);
                schema::ROOM_ID.expect_absent(&mut batch, id.as_str());
                schema::ROOM_ID.put(&mut batch, id.as_str(), &num);
                row
            }
        };
        if row.id != id || (row.resident.has_history() && row.version != version) {
            let cause = "it says another version of the room than is known".to_owned();
            return Err(Error::Remote { server: via.to_owned(), cause });
        }
        Self::over(store, batch, guard, seat, row, written_alone)
    }

    /// Sets what a user of ours is to the room from outside. What they do themselves ends or hides all that stands. An invitation
    /// replaces what its inviter's server may end, and stands behind whatever else is shown.
    pub fn set_outside(&mut self, user: UserNum, told: Told) -> Result<()> {
        let user_id = accounts::users::require(&self.batch, user)?.user_id;
        let Some(row) = self.find_standing(user)? else {
            return self.show_outside(user, &user_id, told, Vec::new());
        };
        let mut standing = list_standing(&row);
        match told.membership {
            Membership::Invite => {
                let names = names_of(&told);
                let known = self.row.version;
                let gives_way = |it: &Standing| replaces(&told.sender, &names, known, &user_id, it);
                let shown = standing.remove(0);
                let mut others = standing;
                others.retain(|it| !gives_way(it));
                // A knock says nothing of the room that an invitation does not, and an invitation that is withheld shows nothing.
                let is_hidden = shown.sender == *user_id || !self.is_shown(user, &user_id, &shown)?;
                if gives_way(&shown) {
                    return self.show_outside(user, &user_id, told, others);
                }
                if is_hidden {
                    others.push(behind(shown));
                    return self.show_outside(user, &user_id, told, others);
                }
                let Told { membership: _, version, via, sender, event, state } = told;
                others.push(behind(Standing { sender, event, state, version, via }));
                let row = OutsideRow { others: bounded(others), ..row };
                invited::put(&mut self.batch, (self.num, user, user_id.as_str()), Membership::Invite, row)?;
                Ok(())
            }
            Membership::Knock => {
                standing.retain(|it| it.sender != *user_id);
                let others = standing.into_iter().map(behind).collect();
                self.show_outside(user, &user_id, told, others)
            }
            Membership::Leave | Membership::Ban | Membership::Join => {
                self.show_outside(user, &user_id, told, Vec::new())
            }
        }
    }

    /// Ends those invitations and knocks of a user that the sender of the event may end, and shows the newest that is left.
    pub fn end_outside(&mut self, user: UserNum, end: End) -> Result<()> {
        let user_id = accounts::users::require(&self.batch, user)?.user_id;
        let Some(row) = self.find_standing(user)? else { return Ok(()) };
        let by = &end.told.sender;
        if !may_end(&row, &user_id, by, &end.names, self.row.version) {
            return Ok(());
        }
        let ends = |it: &Standing| it.may_end(&user_id, by);
        let ended = Told { event: shortened(&end.told), ..end.told.clone() };
        self.end_those(user, &user_id, row, ends, ended)
    }

    /// Ends the invitations of a user by users of one server, because there is no room for them any more.
    pub fn give_way_outside(&mut self, user: UserNum, server: &str) -> Result<()> {
        let user_id = accounts::users::require(&self.batch, user)?.user_id;
        let Some(row) = self.find_standing(user)? else { return Ok(()) };
        let Standing { sender, version, via, .. } = row.shown.clone();
        let (membership, event, state) = (Membership::Leave, String::new(), Vec::new());
        let ended = Told { membership, version, via, sender, event, state };
        let ends = |it: &Standing| it.sender != *user_id && event::server_of(&it.sender) == Some(server);
        self.end_those(user, &user_id, row, ends, ended)
    }

    /// Ends some of what stands for a user, and shows the newest that is left, or the end of all.
    fn end_those(
        &mut self,
        user: UserNum,
        user_id: &UserId,
        row: OutsideRow,
        ends: impl Fn(&Standing) -> bool,
        ended: Told,
    ) -> Result<()> {
        let mut others = list_standing(&row);
        let ends_shown = others.first().is_some_and(&ends);
        others.retain(|it| !ends(it));
        if !ends_shown {
            others.remove(0);
            let is_knock = row.shown.sender == *user_id;
            let membership = if is_knock { Membership::Knock } else { Membership::Invite };
            let row = OutsideRow { others, ..row };
            invited::put(&mut self.batch, (self.num, user, user_id.as_str()), membership, row)?;
            return Ok(());
        }
        let mut next = None;
        for (at, it) in others.iter().enumerate() {
            let rank = (it.sender != *user_id, self.is_shown(user, user_id, it)?, at);
            next = next.max(Some(rank));
        }
        let Some((is_invite, _, at)) = next else {
            self.ended.push((user, EventNum(self.row.next_event)));
            return self.show_outside(user, user_id, ended, Vec::new());
        };
        let membership = if is_invite { Membership::Invite } else { Membership::Knock };
        let Standing { sender, event, state, version, via } = others.remove(at);
        let told = Told { membership, version, via, sender, event, state };
        self.show_outside(user, user_id, told, others)
    }

    /// Promises that the ends of this change are forgotten that others made.
    pub(crate) fn promise_forgetting(&mut self, now_ms: u64) {
        for (user, number) in std::mem::take(&mut self.ended) {
            let job = Job::ForgetEnded { room: self.num, user, number };
            timer::set(&mut self.batch, &job.timer(now_ms.saturating_add(ENDED_KEPT_MS)));
        }
    }

    /// Forgets an end of this number, unless the user is something else to the room by now, and the room itself where nobody of ours
    /// has to do with it any more. Gives `false` where the log still names the end, so that it must stay.
    pub fn forget_ended(&mut self, user: UserNum, number: EventNum) -> Result<bool, Fault> {
        let row = members::find(&self.batch, user, self.num)?;
        let is_it = |row: &UserRoomRow| row.event == number && row.membership == Membership::Leave;
        let Some(row) = row.filter(is_it) else { return Ok(true) };
        if !matches!(self.row.resident, Resident::Invited | Resident::Knocked) {
            return Ok(true);
        }
        if row.since > tail::trimmed(&self.batch)? {
            return Ok(false);
        }
        invited::delete(&mut self.batch, self.num, user)?;
        members::delete_outside(&mut self.batch, user, self.num);
        let mut others = schema::OUTSIDE.prefix::<(RoomNum,)>(&self.batch, (self.num,), Direction::Up)?;
        let is_alone = others.next().transpose()?.is_none();
        drop(others);
        // The number of the last room says which number comes next, and no number is given twice.
        if is_alone && !rooms::is_last(&self.batch, self.num)? {
            schema::ROOM_ID.delete(&mut self.batch, self.row.id.as_str());
            schema::ROOM.delete(&mut self.batch, self.num);
            self.seat.tip = None;
            self.is_part = true;
        }
        Ok(true)
    }

    /// Finds the row of a user who is invited from outside or has knocked.
    fn find_standing(&self, user: UserNum) -> Result<Option<OutsideRow>, Fault> {
        let row = members::find(&self.batch, user, self.num)?;
        let stands = |row: &UserRoomRow| matches!(row.membership, Membership::Invite | Membership::Knock);
        let Some(row) = row.filter(stands) else { return Ok(None) };
        find(&self.batch, self.num, user, &row)
    }

    /// Whether the user is shown an invitation of its inviter.
    fn is_shown(&self, user: UserNum, user_id: &UserId, it: &Standing) -> Result<bool, Fault> {
        let ignored = Arc::new(Ignored::of(&self.batch, user, user_id)?);
        Ok(Permissions::of(&self.batch, user, ignored)?.judge(&it.sender) == Verdict::Allow)
    }

    fn show_outside(
        &mut self,
        user: UserNum,
        user_id: &UserId,
        told: Told,
        others: Vec<Standing>,
    ) -> Result<()> {
        let number = EventNum(self.row.next_event);
        self.row.next_event += 1;
        if !self.row.resident.has_history() {
            self.row.resident = match told.membership {
                Membership::Knock => Resident::Knocked,
                _ => Resident::Invited,
            };
        }
        self.put_room();
        let order = Order::live(self.batch.position(&LogEntry::RoomState { room: self.num }));
        let since = Since { membership: told.membership, event: number, order };
        members::track_from_outside(&mut self.batch, self.num, user_id.as_str(), since)?;
        let Told { membership, version, via, sender, event, state } = told;
        let (state, others) = (stripped::bound(state, &sender), bounded(others));
        let shown = Standing { sender, event, state, version, via };
        let row = OutsideRow { number: number.0, shown, others };
        invited::put(&mut self.batch, (self.num, user, user_id.as_str()), membership, row)?;
        self.concern(Some(user), membership);
        Ok(())
    }

    /// Takes away what the room's state has overtaken, once the room is joined. Whoever was invited from outside and is not
    /// by the room's state, is not invited any more.
    pub(super) fn settle_outside(&mut self) -> Result<()> {
        let rows = schema::OUTSIDE.prefix::<(RoomNum,)>(&self.batch, (self.num,), Direction::Up)?;
        let users: Vec<UserNum> =
            rows.take(SETTLED_MAX).map(|row| row.map(|((_, user), _)| user)).collect::<Result<_, _>>()?;
        for user in users {
            let row = members::find(&self.batch, user, self.num)?;
            let told = row.map(|row| find(&self.batch, self.num, user, &row)).transpose()?.flatten();
            let still = row.filter(|row| matches!(row.membership, Membership::Invite | Membership::Knock));
            match (told, still) {
                (Some(told), Some(_)) => {
                    let Standing { sender, version, via, .. } = told.shown;
                    let (membership, event, state) = (Membership::Leave, String::new(), Vec::new());
                    let ended = Told { membership, version, via, sender, event, state };
                    self.set_outside(user, ended)?;
                }
                (Some(_), None) => {}
                (None, _) => invited::delete(&mut self.batch, self.num, user)?,
            }
        }
        Ok(())
    }
}

/// The event of an end as it is kept.
fn shortened(end: &Told) -> String {
    if end.event.len() <= END_BYTES_MAX {
        return end.event.clone();
    }
    let rules = versions::find_rules(end.version);
    let redacted = rules.and_then(|rules| redact::redacted(end.event.as_bytes(), rules));
    let redacted = redacted.filter(|json| json.len() <= END_BYTES_MAX);
    redacted.map(|json| String::from_utf8_lossy(&json).into_owned()).unwrap_or_default()
}

/// The ids of the events that a member event names as allowing it.
fn names_of(told: &Told) -> Vec<OwnedEventId> {
    let id = Signed::find_id(told.version, told.event.as_bytes());
    let event = id.and_then(|id| Event::parse(id, told.event.as_bytes()).ok());
    event.map(|event| event.auth).unwrap_or_default()
}
