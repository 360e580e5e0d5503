//! Checks the rows of rooms, one by one and against one another, for `db check`.

mod delayed;
mod events;
mod sticky;

pub use super::state::check::is_staged;

use ruma::UserId;

use crate::{
    accounts,
    ids::{EventNum, Order, Position, RoomNum, UserNum},
    rooms::{
        change::{invited, outside},
        event,
        members::{self, Tally},
        relations,
        state::{
            self, StateRef, StateValue,
            check::{of_room, reference},
            stage,
        },
    },
    schema::event_types::MEMBER,
    schema::{
        self,
        marked::Marked,
        receipts::{ReceiptKey, ReceiptKind, ReceiptRow},
        rooms::{Head, Membership, Place, RoomRow, UserRoomRow},
    },
    store::{
        Direction, Fault, LogEntry, Snapshot,
        check::{Doubts, RowCheck},
        key::Json,
    },
};

/// Lists the checks of rooms: of the rooms themselves, their events, state, members, names and receipts.
pub fn checks() -> Vec<RowCheck> {
    let own = [
        of_room(&schema::ROOM, room),
        RowCheck::of(&schema::ROOM_ID, |read, id, room, doubts| {
            let row = schema::ROOM.get(read, *room)?;
            let is_it = row.is_some_and(|row| row.id.as_str() == id);
            doubts.unless(is_it, format!("room {room} is gone or has another id"));
            Ok(())
        }),
        RowCheck::of(&schema::USER_ROOM, user_room),
        of_room(&schema::ROOM_USER, |read, (room, user), row, doubts| {
            let listed = stage::row_that_counts(read, *room, Some(*row))?;
            let row = members::find(read, *user, *room)?;
            let near = row.map(|row| row.membership).filter(|membership| members::is_near(*membership));
            doubts.unless(
                listed == near,
                "by the user's own row the user is not joined, invited or knocking as this row says",
            );
            Ok(())
        }),
        of_room(&schema::OUTSIDE, |read, (room, user), Json(row), doubts| {
            let of = schema::ROOM.get(read, *room)?;
            let next = of.map_or(0, |of| of.next_event);
            doubts.unless(row.number < next, "the room has not given out its number");
            doubts.unless(
                !schema::PLACE.contains(read, (*room, EventNum(row.number)))?,
                "an event of the room has its number",
            );
            doubts.unless(
                members::find(read, *user, *room)?.is_some(),
                "the user has nothing to do with the room",
            );
            Ok(())
        }),
        RowCheck::of(&schema::INVITED, |read, (user, server, room), (), doubts| {
            let told = schema::OUTSIDE.get(read, (*room, *user))?;
            let is_told = told.is_some_and(|Json(told)| {
                invited::inviters(&told).any(|inviter| event::server_of(inviter) == Some(server))
            });
            doubts.unless(is_told, "nobody of that server has invited the user");
            Ok(())
        }),
        of_room(&schema::SERVER_MEMBERS, |read, (room, server), row, doubts| {
            let count = stage::row_that_counts(read, *room, Some(*row))?;
            let is_in = members::was_server_joined(read, *room, StateRef::Main(Order::MAX), server)?;
            let is_partial = schema::ROOM.get(read, *room)?.is_some_and(|row| row.partial.is_some());
            doubts.unless(count != Some(0) || is_partial, "a server without members has no such row");
            doubts.unless(
                is_in == count.is_some(),
                "by the room's state the server has no member in it, or some",
            );
            Ok(())
        }),
        of_room(&schema::REDACTED_STATE, |read, (room, order), event, doubts| {
            doubts.unless(schema::TIMELINE.contains(read, (*room, *order))?, "no redaction stands there");
            let stored = event::find_anywhere(read, *room, *event)?;
            let is_redacted = stored
                .is_some_and(|stored| stored.row.is_redacted() && stored.row.header.state_key.is_some());
            doubts.unless(is_redacted, "there is no redacted state event of this number");
            Ok(())
        }),
        of_room(&schema::RETENTION, |read, room, row, doubts| {
            doubts.position(read, row.below.anchor);
            doubts.unless(schema::ROOM.contains(read, *room)?, "there is no such room");
            Ok(())
        }),
        RowCheck::of(&schema::ALIAS, |read, alias, Json(row), doubts| {
            let room = row.room;
            doubts.unless(schema::ROOM.contains(read, room)?, format!("there is no room {room}"));
            let listed = schema::ROOM_ALIAS.contains(read, (room, alias.as_str()))?;
            doubts.unless(listed, "its room does not list it");
            Ok(())
        }),
        RowCheck::of(&schema::ROOM_ALIAS, |read, (room, alias), (), doubts| {
            let row = schema::ALIAS.get(read, alias)?;
            doubts.unless(
                row.is_some_and(|Json(row)| row.room == *room),
                "the alias names another room or none",
            );
            Ok(())
        }),
        RowCheck::of(&schema::PUBLISHED, |read, room, (), doubts| {
            doubts.unless(schema::ROOM.contains(read, *room)?, "there is no such room");
            Ok(())
        }),
        RowCheck::of(&schema::RECEIPTS, |read, (room, user, kind, thread), row, doubts| {
            let Ok(user) = <&UserId>::try_from(user.as_str()) else {
                doubts.unless(false, "the id of its user is not valid");
                return Ok(());
            };
            let key = ReceiptKey { user: user.to_owned(), kind: *kind, thread: thread.clone() };
            receipt(read, *room, &key, row, doubts)
        }),
        RowCheck::of(&schema::RECEIPT_LOG, |read, (room, position), Json(key), doubts| {
            doubts.unless(key.kind == ReceiptKind::Public, "it is of a private receipt");
            logged_receipt(read, (*room, *position), key, doubts)
        }),
        RowCheck::of(&schema::PRIVATE_RECEIPT_LOG, |read, (room, user, position), Json(key), doubts| {
            let is_own = key.kind == ReceiptKind::Private && key.user.as_str() == user;
            doubts.unless(is_own, "it is of a public receipt, or of another user's");
            logged_receipt(read, (*room, *position), key, doubts)
        }),
    ];
    let of_events = events::checks().into_iter().chain(relations::check::checks());
    own.into_iter()
        .chain(delayed::checks())
        .chain(sticky::checks())
        .chain(of_events)
        .chain(state::check::checks())
        .collect()
}

fn logged_receipt(
    read: &Snapshot,
    (room, position): (RoomNum, Position),
    key: &ReceiptKey,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let row = schema::RECEIPTS.get(read, (room, key.user.as_str(), key.kind, key.thread.as_str()))?;
    doubts.unless(
        row.is_some_and(|row| row.position == position),
        "no receipt was stored there, or a newer one",
    );
    Ok(())
}

fn room(read: &Snapshot, num: &RoomNum, row: &RoomRow, doubts: &mut Doubts) -> Result<(), Fault> {
    let named = schema::ROOM_ID.get(read, row.id.as_str())?;
    doubts.unless(named == Some(*num), format!("the id {} belongs to another room", row.id));
    if !row.resident.has_whole_state() {
        return Ok(());
    }
    doubts.position(read, row.tip.anchor);
    doubts.unless(schema::TIMELINE.contains(read, (*num, row.tip))?, "no event stands at its tip");
    let state_tip = state::tip(read, *num)?;
    doubts.unless(
        state_tip == StateRef::Main(row.state_tip),
        "the newest change of its state is not at `state_tip`",
    );
    doubts.unless(!row.heads.is_empty(), "it has no heads");
    let apart = row.apart.iter().map(|branch| &branch.head);
    for Head { event, key, depth, after, .. } in row.heads.iter().chain(apart) {
        let stored = event::find(read, *num, *event)?;
        let is_it = stored.is_some_and(|it| it.row.header.key == *key && it.row.header.depth == *depth);
        doubts.unless(is_it, format!("its head {event} is not there or is another event"));
        reference(read, *num, *after, doubts)?;
    }
    let (mut joined, mut invited, mut tally) = (0, 0, Tally::default());
    let of_members = std::ops::Bound::Included((*num, MEMBER));
    let keys =
        schema::STATE_KEY_NUM.range::<(RoomNum, String)>(read, of_members, of_members, Direction::Up)?;
    for key in keys {
        let ((_, _, user), key) = key?;
        let Some(event) = state::current(read, *num, key)? else { continue };
        let membership = members::membership_of_event(read, *num, event)?;
        joined += u32::from(membership == Membership::Join);
        invited += u32::from(membership == Membership::Invite);
        if membership == Membership::Join {
            joined_user(read, *num, &user, event, doubts)?;
            tally.add(&user);
        }
    }
    let is_counted = members::are_counted(read, *num, &tally)?;
    doubts.unless(is_counted, "the members counted by server are not those that its state has");
    let is_right = (row.joined, row.invited) == (joined, invited);
    let said = format!("it counts {} joined and {} invited", row.joined, row.invited);
    doubts.unless(is_right, format!("{said}, but its state has {joined} and {invited}"));
    Ok(())
}

/// Checks that a user of ours who is joined by the room's state has a row that says so, by the same event.
fn joined_user(
    read: &Snapshot,
    room: RoomNum,
    user_id: &str,
    event: EventNum,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let Ok(user_id) = <&UserId>::try_from(user_id) else { return Ok(()) };
    let Some(user) = accounts::users::find_num(read, user_id)? else { return Ok(()) };
    let row = members::find(read, user, room)?;
    let is_it = row.is_some_and(|row| row.membership == Membership::Join && row.event == event);
    doubts.unless(
        is_it,
        format!("{user_id} is joined by event {event}, but the user's own row says otherwise"),
    );
    Ok(())
}

fn user_room(
    read: &Snapshot,
    (user, room): &(UserNum, RoomNum),
    row: &Marked<UserRoomRow>,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    // A row that does not count yet is judged by what it is until then.
    let Some(row) = stage::row_that_counts(read, *room, Some(*row))? else { return Ok(()) };
    doubts.position(read, row.since);
    let listed = members::find_near(read, *room, *user)?;
    let expected = Some(row.membership).filter(|membership| members::is_near(*membership));
    doubts.unless(listed == expected, "the room's list of users has another membership");
    let Some(account) = schema::USERS.get(read, *user)? else {
        doubts.unless(false, "its account is gone");
        return Ok(());
    };
    let Some(of) = schema::ROOM.get(read, *room)? else {
        doubts.unless(false, "the room is gone");
        return Ok(());
    };
    if outside::find(read, *room, *user, &row)?.is_some() {
        let is_outside = row.membership != Membership::Join && row.membership != Membership::Ban;
        doubts.unless(is_outside, "nobody is in a room, or banned from it, from outside");
        return Ok(());
    }
    doubts
        .unless(of.resident.has_history(), "nothing says how the user came to be what they are to the room");
    if !of.resident.has_whole_state() {
        return Ok(());
    }
    let now = match state::find_key(read, *room, MEMBER, account.user_id.as_str())? {
        Some(key) => state::now(read, *room, key)?,
        None => StateValue::Absent,
    };
    let membership = match now {
        StateValue::Event(event) => {
            doubts.unless(
                event == row.event,
                format!("by the room's state the membership comes from event {event}"),
            );
            members::membership_of_event(read, *room, event)?
        }
        StateValue::Absent | StateValue::Derived(_) => Membership::Leave,
        // The state is only partly known, so nothing contradicts the row.
        StateValue::Unknown => row.membership,
    };
    let said = membership.as_str();
    doubts.unless(membership == row.membership, format!("by the room's state the membership is {said:?}"));
    Ok(())
}

fn receipt(
    read: &Snapshot,
    room: RoomNum,
    key: &ReceiptKey,
    row: &ReceiptRow,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    doubts.logged(read, row.position, LogEntry::Receipts { room })?;
    let logged = match key.kind {
        ReceiptKind::Public => schema::RECEIPT_LOG.get(read, (room, row.position))?,
        ReceiptKind::Private => {
            schema::PRIVATE_RECEIPT_LOG.get(read, (room, key.user.as_str(), row.position))?
        }
    };
    doubts.unless(
        logged.is_some_and(|Json(logged)| logged == *key),
        "the room's log of receipts does not name it",
    );
    let event = event::find_num(read, room, &row.event_id)?;
    let place = event.map(|event| schema::PLACE.get(read, (room, event))).transpose()?.flatten();
    doubts.unless(place == Some(Place::Timeline(row.order)), "the event that it names is not at its order");
    Ok(())
}
