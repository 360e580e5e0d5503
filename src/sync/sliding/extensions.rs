//! The extensions of sliding sync: all that is told beside the rooms themselves.
//!
//! A further extension has a field in `Extensions` (`sync/sliding/ask.rs`), is told here, by [`beside_rooms`] or by [`of_room`], or in a
//! file of its own as sticky events are, and is written by a method of the answer (`sync/shape/sliding.rs`). What it must remember of a room is a flag of
//! [`RoomSent`], and what it must remember beside rooms a part of [`crate::sync::Pos`].

use crate::{
    ids::{Order, Position},
    schema::{rooms::Membership, sync::RoomSent},
    store::Fault,
    sync::{
        Ask, SyncToken, key_changes,
        shape::sliding::Answer,
        sliding::ask::{Extensions, SlidingAsk},
        streams::{
            account_data::{self, AccountData},
            receipts, subscriptions, to_device, typing,
        },
        window::{RoomPlace, RoomWindow, Standing, Window},
    },
};

/// The lists that a room is in, and whether the client subscribes to it.
pub(crate) struct Scope<'a> {
    pub(crate) room_id: &'a str,
    pub(crate) lists: &'a [&'a str],
    pub(crate) is_subscribed: bool,
}

/// The extensions that a client wants of a room, or was told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Covered {
    pub(crate) typing: bool,
    pub(crate) receipts: bool,
    pub(crate) data: bool,
}

impl Covered {
    /// The extensions that the client was told of a room.
    pub(crate) fn of(sent: &RoomSent) -> Self {
        Self { typing: sent.has_typing, receipts: sent.has_receipts, data: sent.has_data }
    }
}

/// Says which extensions the client wants of a room. Only members hear of receipts and of who types.
pub(crate) fn covered(extensions: &Extensions, scope: &Scope<'_>, membership: Membership) -> Covered {
    let covers =
        |extension: &super::ask::Extension| extension.covers(scope.room_id, scope.lists, scope.is_subscribed);
    let is_in = membership == Membership::Join;
    Covered {
        typing: is_in && covers(&extensions.typing),
        receipts: is_in && covers(&extensions.receipts),
        data: covers(&extensions.account_data),
    }
}

/// Tells the extensions of one room. `known` is what the client knows of the room, if it goes on from there; `shown_from` is where the
/// timeline of this answer begins, if it has events from before what the client knew.
pub(crate) fn of_room(
    room: &RoomWindow<'_, '_>,
    (known, shown_from): (Option<&RoomSent>, Option<Order>),
    covered: Covered,
    data: &mut AccountData,
    answer: &mut Answer<'_, '_>,
) -> Result<(), Fault> {
    let before = known.map(Covered::of).unwrap_or_default();
    let is_behind = known.is_some_and(|sent| sent.upto.is_some());
    let as_new = room.at(RoomPlace { standing: Standing::New, ..room.place });
    let (room_id, window) = (room.row.id.as_str(), room.window);
    if covered.typing {
        // Those who typed when the client was told last may have stopped since.
        let again = room.at(RoomPlace { standing: Standing::Returns(Some(Order::MIN)), ..room.place });
        let typists = match (before.typing, is_behind) {
            (true, false) => typing::collect(room)?,
            (true, true) => typing::collect(&again)?,
            (false, _) => typing::collect(&as_new)?,
        };
        if let Some(typists) = typists {
            answer.typing(room_id, &typists);
        }
    }
    if covered.receipts {
        let mut told = match (before.receipts, shown_from) {
            (true, _) => receipts::collect(room)?,
            (false, None) => receipts::collect(&as_new)?,
            (false, Some(_)) => Vec::new(),
        };
        if let Some(start) = shown_from {
            told.extend(receipts::collect_for_events(room, start)?);
        }
        answer.receipts(room_id, &told);
    }
    if covered.data {
        let told = match before.data && !is_behind {
            true => data.by_room.remove(room_id).unwrap_or_default(),
            false => account_data::of_room(window, room_id)?,
        };
        answer.room_data(room_id, &told);
    }
    Ok(())
}

/// The outcome of telling what belongs to no room.
#[derive(Debug)]
pub(crate) struct Beside {
    pub(crate) has_news: bool,
    /// Changes of device lists are told up to here.
    pub(crate) lists: Option<Position>,
    /// Account data of no room is told up to here.
    pub(crate) data: Option<Position>,
    /// Changes of subscriptions to threads are told up to here.
    pub(crate) subscriptions: Option<Position>,
    /// The place that the client has to confirm of sticky events, so that it has all of them ([`crate::sync::Pos::sticky`]).
    pub(crate) sticky: Option<Position>,
}

/// Tells what belongs to no room.
pub(crate) fn beside_rooms(
    window: &Window<'_>,
    ask: &SlidingAsk,
    answer: &mut Answer<'_, '_>,
) -> Result<Beside, Fault> {
    let extensions = &ask.extensions;
    let (lists, data) = ask.pos.map_or((None, None), |pos| (pos.lists, pos.data));
    let subscriptions = ask.pos.and_then(|pos| pos.subscriptions);
    let mut beside = Beside { has_news: false, lists, data, subscriptions, sticky: None };
    if extensions.to_device.is_on() {
        beside.has_news |= to_device(window, ask, answer)?;
    }
    if extensions.e2ee.is_on() {
        let mut told = None;
        if let Some(from) = lists {
            let ask = Ask { since: window.since.map(|token| at(token, from)), ..window.ask.clone() };
            told = Some(key_changes::list(&window.of(&ask))?);
        }
        beside.has_news |= told.as_ref().is_some_and(|told| !told.is_empty());
        beside.lists = Some(window.upto);
        answer.e2ee(told.as_ref(), &to_device::key_counts(window)?);
    }
    if extensions.account_data.is_on() {
        let (global, rules) = account_data::global(window, data)?;
        beside.has_news |= !global.is_empty() || rules.is_some();
        beside.data = Some(window.upto);
        answer.global_data(&global, rules.as_ref());
    }
    if extensions.subscriptions.is_on() {
        let limit = extensions.subscriptions.limit.and_then(|limit| usize::try_from(limit).ok());
        let span = (subscriptions.unwrap_or_default(), window.upto);
        let limit = limit.unwrap_or(subscriptions::CHANGES_DEFAULT);
        let told = subscriptions::collect(window.read, window.caller().user, span, limit)?;
        beside.has_news |= !told.is_empty();
        beside.subscriptions = Some(window.upto);
        answer.subscriptions(&told);
    }
    beside.has_news |= answer.has_room_extensions();
    Ok(beside)
}

/// The same token at another position.
fn at(token: SyncToken, position: Position) -> SyncToken {
    SyncToken {
        position: position.min(token.position),
        inbox: None,
        receipts: None,
        invites: None,
        sticky: None,
        ..token
    }
}

/// Tells the messages to the device that it has not confirmed, and says whether there are any. The client confirms with the token
/// that stands beside them.
fn to_device(window: &Window<'_>, ask: &SlidingAsk, answer: &mut Answer<'_, '_>) -> Result<bool, Fault> {
    let since = ask.inbox;
    let limit = ask.extensions.to_device.limit.and_then(|limit| usize::try_from(limit).ok());
    let inbox_ask = Ask { since, ..window.ask.clone() };
    // A client that wants no message at all would ask for ever.
    let inbox = to_device::collect_some(&window.of(&inbox_ask), limit.unwrap_or(usize::MAX).max(1))?;
    let caller = window.caller();
    let next = SyncToken {
        position: inbox.told_upto.unwrap_or(window.upto),
        boot: window.ephemeral.boot(),
        ephemeral: 0,
        inbox: None,
        receipts: None,
        invites: None,
        sticky: None,
        device: Some(SyncToken::mark(caller.user, caller.device)),
    };
    answer.messages_to_device(&inbox.messages, &next.to_string());
    Ok(!inbox.messages.is_empty())
}
