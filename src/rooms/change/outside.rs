//! Memberships of users of ours by events that stand nowhere in the room as this server knows it: other servers invite them,
//! they knock at rooms of other servers, and they refuse or withdraw that. The event itself, and what was told of the room
//! with it, stand in a row of `OUTSIDE`; the user's row in `USER_ROOM` says what they are, and names the row by a number that
//! no event of the room has. Once the room's state says something of the user, their row names an event, and the other one says
//! nothing any more.

use ruma::OwnedRoomId;
use serde_json::value::RawValue;

use super::{Change, Signed, invited, staged};
use crate::{
    accounts,
    error::{Error, Result},
    ids::{EventNum, Order, RoomNum, UserNum},
    json::{JsonText, Object},
    rooms::{
        members::{self, Since},
        stripped,
        turns::Seat,
    },
    schema::{
        self,
        event_types::MEMBER,
        remote::OutsideRow,
        rooms::{Membership, Resident, RoomRow, UserRoomRow},
    },
    store::{Direction, Fault, LogEntry, Read, Store, key::Json},
};

/// Settle what at most this many users were told of a room when it is joined, because that is part of one batch.
const SETTLED_MAX: usize = 400;

/// A membership that a user of ours gets from outside a room.
#[derive(Clone, Debug)]
pub struct Told {
    /// The membership: an invitation, a knock, or the end of either.
    pub membership: Membership,
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
    let id = Signed::find_id(version, told.event.as_bytes())?;
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

impl Change {
    /// Begins a change of what users of ours are to a room from outside. A room of which nothing is known gets a row, so that
    /// it has a number; the batch is refused if somebody else makes one meanwhile. Errors: [`Error::Remote`] by `via` if the
    /// room is known in another version.
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
        if row.id != id || row.version != version {
            let cause = "it says another version of the room than is known".to_owned();
            return Err(Error::Remote { server: via.to_owned(), cause });
        }
        Self::over(store, batch, guard, seat, row, written_alone)
    }

    /// Sets what a user of ours is to the room from outside.
    pub fn set_outside(&mut self, user: UserNum, told: Told) -> Result<()> {
        let user_id = accounts::users::require(&self.batch, user)?.user_id;
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
        let Told { membership, sender, event, state } = told;
        let state = stripped::bound(state, &sender);
        let row = OutsideRow { number: number.0, sender, event, state };
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
                    let (sender, state) = (told.sender, Vec::new());
                    let ended = Told { membership: Membership::Leave, sender, event: String::new(), state };
                    self.set_outside(user, ended)?;
                }
                (Some(_), None) => {}
                (None, _) => invited::delete(&mut self.batch, self.num, user)?,
            }
        }
        Ok(())
    }
}
