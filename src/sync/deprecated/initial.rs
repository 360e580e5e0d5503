//! Answers `/initialSync` and `/rooms/{roomId}/initialSync`: rooms as they are now, each with its newest messages.

use std::collections::BTreeSet;

use bytes::Bytes;
use ruma::RoomId;

use super::{Open, ask, form, token};
use crate::{
    accounts::Caller,
    error::Result,
    ids::Order,
    json::{JsonText, Object},
    rooms::{directory, members, visibility::Reader},
    schema::{
        self,
        rooms::{Membership, Resident, RoomRow},
    },
    store::{Fault, Read},
    sync::{
        Parts, SyncToken,
        changes::Changes,
        collect,
        sent::SentMembers,
        streams::{
            account_data::{self, Data},
            presence, receipts,
        },
        window::{Moment, RoomPlace, RoomWindow, Standing, Window},
    },
};

/// Look at no more than this many members of a room for their presence, because each is looked up.
const MEMBERS_MAX: usize = 500;

impl Parts {
    pub(super) fn initial(&self, caller: Caller, limit: usize, archived: bool) -> Result<Bytes> {
        let snapshot = self.store.snapshot();
        let ask = ask(caller, None, limit)?;
        // Ephemeral changes are read after the snapshot, as for `/sync`.
        let (moment, sent) = (Moment::since(&self.ephemeral, None), SentMembers::default());
        let window = self.window(&snapshot, &ask, snapshot.upto(), moment, &sent);
        Ok(everything(&window, archived)?)
    }

    pub(super) fn initial_of_room(&self, caller: Caller, room: &RoomId, limit: usize) -> Result<Bytes> {
        let snapshot = self.store.snapshot();
        let ask = ask(caller, None, limit)?;
        let (moment, sent) = (Moment::since(&self.ephemeral, None), SentMembers::default());
        let window = self.window(&snapshot, &ask, snapshot.upto(), moment, &sent);
        let open = Open::of(&window, room)?;
        let place = begin(&window, open.end);
        let (num, row, user_row, reader) = (open.num, &open.row, &open.user_row, &open.reader);
        let room = RoomWindow { window: &window, num, row, user_row, place, reader };
        let data = account_data::of_room(&window, row.id.as_str())?;
        let mut answer = Object::new();
        write(&room, true, &data, end(&window), &mut answer)?;
        let is_present = open.is_present();
        let receipts = if is_present { receipts::collect(&room)? } else { Vec::new() };
        answer.list("receipts", &form::receipts(&row.id, &receipts));
        // Who looks in from outside shares no room with anybody by that.
        let told = if user_row.membership == Membership::Join {
            presence::of_members(&window, list_members(&room)?)?
        } else {
            Vec::new()
        };
        answer.list("presence", &form::presence(&window, &told));
        Ok(answer.finish().into())
    }
}

/// The token with which `/events`, `/sync` and `/messages` go on from an answer.
fn end(window: &Window<'_>) -> SyncToken {
    token(window.upto, window.ephemeral.boot(), window.moment.number)
}

fn begin(window: &Window<'_>, end: Order) -> RoomPlace {
    let timeline_limit = window.ask.filter.timeline_limit;
    RoomPlace { standing: Standing::New, whole_state: true, timeline_limit, end }
}

fn everything(window: &Window<'_>, archived: bool) -> Result<Bytes, Fault> {
    let changes = Changes::everything(window.read, window.ask.caller.user)?;
    let mut data = account_data::collect(window, &changes)?;
    let presence = presence::collect(window, &changes)?;
    let global = data.by_room.remove("").unwrap_or_default();
    let mut answer = Object::new();
    answer.text("end", &end(window).to_string());
    answer.list("presence", &form::presence(window, &presence.told));
    let global = global.iter().map(|(event_type, row)| form::account_data(event_type, row, None));
    answer.list("account_data", &global.collect::<Vec<_>>());
    let rows = schema::ROOM.get_many(window.read, changes.rooms.iter().map(|(room, _)| *room))?;
    let mut all_receipts = Vec::new();
    answer.list_with("rooms", |list| {
        for ((num, user_row), row) in changes.rooms.iter().zip(rows) {
            let Some(row) = row else { continue };
            let membership = user_row.membership;
            let is_out = matches!(membership, Membership::Leave | Membership::Ban);
            let is_left_out = user_row.forgotten || (is_out && !archived) || membership == Membership::Knock;
            if is_left_out || !is_ready(&row, membership) {
                continue;
            }
            let ignored = window.ignored()?.clone();
            let reader = Reader::with_row(*num, &window.ask.caller.user_id, user_row, ignored);
            let upto = Order::upto(window.upto);
            let place = begin(window, reader.joined_until().map_or(upto, |left| left.min(upto)));
            let room = RoomWindow { window, num: *num, row: &row, user_row, place, reader: &reader };
            let data = data.by_room.remove(row.id.as_str()).unwrap_or_default();
            if membership == Membership::Invite {
                // An invitation is left out where the user wants to hear none from its sender.
                if let Some(told) = collect::outside(&room)? {
                    let invitation = form::invitation(&room, &told)?;
                    list.object(|json| write_invitation(&room, invitation.as_ref(), json));
                }
                continue;
            }
            if membership == Membership::Join {
                all_receipts.extend(form::receipts(&row.id, &receipts::collect(&room)?));
            }
            // Somebody who declined an invitation, or was banned before they came, never saw the room.
            let is_shown = reader.joined_until().is_some();
            list.object(|json| write(&room, is_shown, &data, end(window), json))?;
        }
        Ok::<_, Fault>(())
    })?;
    answer.list("receipts", &all_receipts);
    Ok(answer.finish().into())
}

/// Whether a room can be told. One of whose members only some are known is told by its own request, which waits for them.
fn is_ready(row: &RoomRow, membership: Membership) -> bool {
    membership == Membership::Invite || (row.resident.has_history() && row.resident != Resident::Partial)
}

fn write_head(room: &RoomWindow<'_, '_>, json: &mut Object) {
    json.text("room_id", room.row.id.as_str());
    json.text("membership", room.user_row.membership.as_str());
}

fn write_invitation(room: &RoomWindow<'_, '_>, invitation: Option<&JsonText>, json: &mut Object) {
    write_head(room, json);
    if let Some(invitation) = invitation {
        json.json("invite", invitation);
    }
}

/// Writes a room. Its state and its messages come where they are shown: to who is or was in it, or looks into one that is open to everybody
/// now.
fn write(
    room: &RoomWindow<'_, '_>,
    is_shown: bool,
    data: &Data,
    end: SyncToken,
    json: &mut Object,
) -> Result<(), Fault> {
    write_head(room, json);
    let visibility = if directory::is_published(room.window.read, room.num)? { "public" } else { "private" };
    json.text("visibility", visibility);
    let data = data.iter().map(|(event_type, row)| form::account_data(event_type, row, None));
    json.list("account_data", &data.collect::<Vec<_>>());
    if !is_shown {
        return Ok(());
    }
    let (timeline, state) = collect::plain(room)?;
    let messages = form::timeline(room, &timeline.events)?;
    json.object("messages", |page| {
        page.text("start", &timeline.prev_batch().to_string());
        page.text("end", &end.to_string());
        page.list("chunk", &messages);
    });
    json.list_with("state", |list| {
        for stored in &state {
            list.json(&form::state(room, stored)?);
        }
        Ok(())
    })
}

/// Lists those who are in the room, as far as its first members go.
fn list_members(room: &RoomWindow<'_, '_>) -> Result<BTreeSet<String>, Fault> {
    let (read, num) = (room.window.read, room.num);
    let keys = members::list_keys_after(read, num, None, MEMBERS_MAX)?;
    let numbers = keys.iter().map(|(_, key)| *key).collect();
    let joined = members::list_memberships(read, num, numbers, None)?;
    let is_joined = |key| matches!(joined.get(&key), Some((_, Membership::Join)));
    Ok(keys.into_iter().filter_map(|(user_id, key)| is_joined(key).then_some(user_id)).collect())
}
