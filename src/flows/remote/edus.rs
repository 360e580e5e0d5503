//! Takes in the ephemeral messages of other servers (server-server API, "EDUs"): typing, receipts, presence, messages between
//! devices, and that devices or keys changed.
//!
//! A server speaks for its own users only, and of rooms only for those who are in them and only where the room admits the server.
//! What does not hold to that, or is not in its form, is passed over by itself. Kinds that are not known are ignored.
//!
//! Most of it may be lost with the process, as it is meant to be. Messages between devices and changes of device lists may
//! not: where they cannot be stored, the transaction fails, and its server sends it again. Each message is delivered once,
//! however often it comes, because how far it was delivered is stored in the batch that delivers it.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use ruma::{
    OwnedEventId, OwnedServerName, OwnedUserId, RoomId, ServerName, UserId, presence::PresenceState,
    to_device::DeviceIdOrAllDevices,
};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{judge::within, lists, remembered, staged::takes_events};
use crate::{
    accounts::{
        presence::{Presence, STATUS_BYTES_MAX},
        users,
    },
    encryption::{
        elsewhere::Change,
        inbox::{Message, Nearness},
    },
    env::payer::{self, Payer},
    error::{Error, Result},
    flows::{
        App,
        device::send_to_device::{self, Target},
        limits::{Limit, Source},
        room::{presence, receipts, receipts::ToldReceipt, typing},
        write,
    },
    ids::{DeviceNum, RoomNum, UserNum},
    rooms::{self, acl, members},
    schema::{
        self,
        event_types::{PRESENCE, RECEIPT, TYPING},
        remote::InboundMessageRow,
        rooms::Membership,
    },
    store::{Fault, Snapshot},
};

/// One transaction tells at most this many receipts.
const RECEIPTS_MAX: usize = 1_000;
/// One transaction tells the presence of at most this many users.
const PRESENCE_MAX: usize = 500;
/// A message between devices reaches at most this many devices.
const DEVICES_MAX: usize = 5_000;
/// Look into at most this many rooms of users for those that a server is in, for one transaction.
const ROOMS_LOOKED_AT: usize = 20_000;
/// A server whose messages between devices are too many waits for at least this long.
const TOO_MANY_WAIT: Duration = Duration::from_secs(5);
/// How often is looked whether a server may go on.
const LOOKED_AT_EVERY: Duration = Duration::from_millis(200);
/// One batch has at most this many messages between devices.
const DELIVERED_AT_ONCE: usize = 20;
/// Types and ids of messages have at most this many bytes.
const NAME_BYTES_MAX: usize = 255;
/// The content of a message nests at most this deep, so that clients can read it.
const NESTING_MAX: usize = 100;

/// A message as it came.
#[derive(Deserialize)]
struct Edu<'a> {
    #[serde(borrow)]
    edu_type: Cow<'a, str>,
    #[serde(borrow)]
    content: &'a RawValue,
}

/// Takes in the messages of a transaction; answers whether any was taken. Errors: [`Error::Busy`] or [`Error::Broken`] where one
/// that must not be lost could not be stored.
pub(super) async fn take_in(
    app: &App,
    origin: &OwnedServerName,
    edus: Vec<Bytes>,
    until: Duration,
) -> Result<bool> {
    let mut is_any = false;
    let (mut told_receipts, mut told_presence) = (0, 0);
    let (mut changed, mut deliveries) = (BTreeMap::new(), Vec::new());
    let near = Arc::new(Mutex::new(Near { users: BTreeMap::new(), rooms_left: ROOMS_LOOKED_AT }));
    for edu in &edus {
        // A list would be read as the fields of the object in their order.
        let object = (edu.first() == Some(&b'{')).then(|| serde_json::from_slice::<Edu<'_>>(edu));
        let Some(Ok(Edu { edu_type, content })) = object else {
            app.metrics.inbound_edu("unreadable", false);
            continue;
        };
        let (kind, taken) = match &*edu_type {
            TYPING => ("typing", note(take_typing(app, origin, content).await)?),
            RECEIPT => {
                ("receipt", note(take_receipts(app, origin, content, &mut told_receipts, until).await)?)
            }
            PRESENCE => ("presence", note(take_presence(app, origin, content, &mut told_presence).await)?),
            "m.direct_to_device" => {
                let (owned, of, content) = (app.clone(), origin.clone(), content.to_owned());
                let near = Arc::clone(&near);
                let read = move || read_message(&owned.store.snapshot(), &of, &content, &mut near.lock());
                let delivery = app.env.blocking(read).await?;
                let is_one = delivery.is_some();
                deliveries.extend(delivery);
                ("direct_to_device", is_one)
            }
            "m.device_list_update" => {
                ("device_list_update", note_change(&mut changed, lists::read_change(origin, true, content)))
            }
            "m.signing_key_update" => {
                ("signing_key_update", note_change(&mut changed, lists::read_change(origin, false, content)))
            }
            _ => ("unknown", false),
        };
        if !taken {
            tracing::debug!(%origin, kind, "a message of another server is passed over");
        }
        app.metrics.inbound_edu(kind, taken);
        is_any |= taken;
    }
    deliver(app, origin, deliveries, until).await?;
    // Several devices of a user may have changed, of which clients are told once.
    for (user_id, changes) in changed {
        lists::take_changes(app, user_id, changes).await?;
    }
    Ok(is_any)
}

/// Passes over a failure to take what may be lost, unless it is ours.
fn note(taken: Result<bool>) -> Result<bool> {
    match taken {
        Ok(taken) => Ok(taken),
        Err(Error::Broken(cause)) => Err(Error::Broken(cause)),
        Err(error) => {
            tracing::debug!(%error, "a message of another server is lost");
            Ok(false)
        }
    }
}

/// Reads the content of a message as its type. None where it is in another form.
fn read<'a, T: Deserialize<'a>>(content: &'a RawValue) -> Option<T> {
    serde_json::from_str(content.get()).ok()
}

/// The number of a room in which this server is and that admits the other one.
fn find_room(snapshot: &Snapshot, id: &str, origin: &ServerName) -> Result<Option<RoomNum>, Fault> {
    let Ok(id) = <&RoomId>::try_from(id) else { return Ok(None) };
    let Some(num) = rooms::find_room(snapshot, id)? else { return Ok(None) };
    let is_ours = rooms::find_row(snapshot, num)?
        .is_some_and(|row| takes_events(row.resident) && row.resident.counts());
    Ok(if is_ours && acl::admits(snapshot, num, origin)? { Some(num) } else { None })
}

/// A user of this server, by id.
fn own_user(origin: &ServerName, id: &str) -> Option<OwnedUserId> {
    UserId::parse(id).ok().filter(|user_id| user_id.server_name() == origin)
}

async fn take_typing(app: &App, origin: &OwnedServerName, content: &RawValue) -> Result<bool> {
    #[derive(Deserialize)]
    struct Typing {
        room_id: String,
        user_id: String,
        typing: bool,
    }
    let Some(Typing { room_id, user_id, typing }) = read(content) else { return Ok(false) };
    let Some(user_id) = own_user(origin, &user_id) else { return Ok(false) };
    let (owned, of, by) = (app.clone(), origin.clone(), user_id.clone());
    let find = move || {
        let snapshot = owned.store.snapshot();
        let Some(num) = find_room(&snapshot, &room_id, &of)? else { return Ok(None) };
        Ok(members::may_be_joined(&*snapshot, num, &by)?.then_some(num))
    };
    let Some(num) = app.env.blocking(find).await? else { return Ok(false) };
    typing::set_typing_elsewhere(app, num, &user_id, typing).await?;
    Ok(true)
}

async fn take_receipts(
    app: &App,
    origin: &OwnedServerName,
    content: &RawValue,
    told: &mut usize,
    until: Duration,
) -> Result<bool> {
    #[derive(Deserialize)]
    struct OfRoom<'a> {
        #[serde(borrow, default, rename = "m.read")]
        read: BTreeMap<Cow<'a, str>, &'a RawValue>,
    }
    #[derive(Deserialize)]
    struct OfUser {
        event_ids: Vec<String>,
        #[serde(default)]
        data: Data,
    }
    #[derive(Default, Deserialize)]
    struct Data {
        #[serde(default)]
        ts: Option<serde_json::Number>,
        #[serde(default)]
        thread_id: Option<String>,
    }
    let Some(rooms) = read::<BTreeMap<Cow<'_, str>, &RawValue>>(content) else { return Ok(false) };
    let mut is_any = false;
    for (room_id, of_room) in rooms {
        let Some(OfRoom { read: users }) = read::<OfRoom<'_>>(of_room) else { continue };
        let mut receipts = Vec::new();
        for (user_id, receipt) in users {
            let user_id = own_user(origin, &user_id);
            let Some((user_id, OfUser { event_ids, data })) = user_id.zip(read::<OfUser>(receipt)) else {
                continue;
            };
            let event = event_ids.into_iter().next().and_then(|id| OwnedEventId::try_from(id).ok());
            let Some(event) = event.filter(|_| *told < RECEIPTS_MAX) else { continue };
            *told += 1;
            // A time that is none is as good as now.
            let sent_ms = data.ts.and_then(|ts| ts.as_u64()).unwrap_or(u64::MAX);
            receipts.push(ToldReceipt { user_id, event, thread: data.thread_id, sent_ms });
        }
        if receipts.is_empty() {
            continue;
        }
        let (owned, of, room_id) = (app.clone(), origin.clone(), room_id.into_owned());
        let find = move || Ok(find_room(&owned.store.snapshot(), &room_id, &of)?);
        let Some(num) = app.env.blocking(find).await? else { continue };
        if let Some(kept) = within(app, Some(until), receipts::keep_told(app, num, receipts)).await {
            is_any |= kept?;
        }
    }
    Ok(is_any)
}

async fn take_presence(
    app: &App,
    origin: &OwnedServerName,
    content: &RawValue,
    told: &mut usize,
) -> Result<bool> {
    #[derive(Deserialize)]
    struct Updates<'a> {
        #[serde(borrow)]
        push: Vec<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Update {
        user_id: String,
        presence: String,
        #[serde(default)]
        status_msg: Option<String>,
        #[serde(default)]
        last_active_ago: Option<serde_json::Number>,
        #[serde(default)]
        currently_active: Option<bool>,
    }
    if !app.config.presence.enabled {
        return Ok(false);
    }
    let Some(Updates { push }) = read(content) else { return Ok(false) };
    let mut is_any = false;
    for update in push {
        let Some(update) = read::<Update>(update) else { continue };
        let state = match update.presence.as_str() {
            "online" => PresenceState::Online,
            "unavailable" => PresenceState::Unavailable,
            "offline" => PresenceState::Offline,
            _ => continue,
        };
        let Some(user_id) = own_user(origin, &update.user_id).filter(|_| *told < PRESENCE_MAX) else {
            continue;
        };
        *told += 1;
        let now_ms = app.env.now_ms();
        let is_active = update.currently_active == Some(true);
        let ago_ms = update.last_active_ago.and_then(|ago| ago.as_u64());
        let last_active_ms = match ago_ms {
            _ if is_active => now_ms,
            Some(ago_ms) => now_ms.saturating_sub(ago_ms),
            None => 0,
        };
        let status_msg = update.status_msg.filter(|message| message.len() <= STATUS_BYTES_MAX);
        let said = Presence { state, status_msg, last_active_ms };
        app.remote.held.hold_presence(&user_id, &said);
        presence::tell_elsewhere(app, user_id, said).await?;
        is_any = true;
    }
    Ok(is_any)
}

/// Adds a change of the devices or keys of a user to those that came with it, in their order.
fn note_change(
    changed: &mut BTreeMap<OwnedUserId, Vec<Change>>,
    change: Option<(OwnedUserId, Change)>,
) -> bool {
    let Some((user_id, change)) = change else { return false };
    changed.entry(user_id).or_default().push(change);
    true
}

/// How near a server is to users of ours, as far as it was asked for already.
struct Near {
    users: BTreeMap<UserNum, Nearness>,
    /// Rooms that may still be looked into. Where none are left, the server counts as a stranger.
    rooms_left: usize,
}

impl Near {
    fn find(&mut self, snapshot: &Snapshot, origin: &ServerName, user: UserNum) -> Result<Nearness, Fault> {
        if let Some(known) = self.users.get(&user) {
            return Ok(*known);
        }
        let mut nearness = Nearness::Stranger;
        for row in members::list_user_rooms(snapshot, user)? {
            let (room, row) = row?;
            // Others invite to as many rooms as they like, which are none that count.
            if row.membership != Membership::Join {
                continue;
            }
            if self.rooms_left == 0 {
                break;
            }
            self.rooms_left -= 1;
            if members::is_server_joined(snapshot, room, origin.as_str())? {
                nearness = Nearness::Sharing;
                break;
            }
        }
        self.users.insert(user, nearness);
        Ok(nearness)
    }
}

/// A message between devices, with the devices that it is for.
struct Delivery {
    id: String,
    /// Its server shares no room with any of those who get it.
    is_strangers: bool,
    /// The acts that it counts for: a copy is written for each device.
    acts: usize,
    targets: Vec<Target>,
}

/// Counts what a server writes into inboxes, for its host, and what it writes as a stranger also for the address from which it comes,
/// because names cost nothing: whoever shares rooms with users of ours is not counted with its neighbors there. A server that
/// has written too much waits, and then hears that it does: what was delivered is delivered, and the rest comes again.
async fn count(
    app: &App,
    origin: &ServerName,
    (acts, strange): (usize, usize),
    until: Duration,
) -> Result<()> {
    let address = match payer::current().narrowest() {
        Payer::Address(address) if strange > 0 => Some((Source::Address(address), strange)),
        _ => None,
    };
    for (source, acts) in [Some((Source::host(origin.host()), acts)), address].into_iter().flatten() {
        loop {
            match app.limits.take(Limit::InboundToDevice, source) {
                Ok(()) => break,
                Err(_) if app.env.uptime() + LOOKED_AT_EVERY < until => app.env.sleep(LOOKED_AT_EVERY).await,
                Err(_) => {
                    tracing::debug!(%origin, acts, "messages between devices of another server are put off: they are too many");
                    return Err(Error::Busy { retry_after: TOO_MANY_WAIT });
                }
            }
        }
        app.limits.take_following(Limit::InboundToDevice, source, acts.saturating_sub(1))?;
    }
    Ok(())
}

/// Counts the acts of the messages of one batch, but of those that were delivered before, and which of them are those of a stranger.
fn acts_of(app: &App, origin: &str, deliveries: &[Delivery]) -> Result<(usize, usize)> {
    let view = app.store.view();
    let (mut acts, mut strange) = (0, 0);
    for delivery in deliveries {
        let before = schema::INBOUND_MESSAGE.get(&view, (origin, delivery.id.as_str()))?;
        if !before.is_some_and(|before| before.progress.is_done) {
            acts += delivery.acts;
            strange += if delivery.is_strangers { delivery.acts } else { 0 };
        }
    }
    Ok((acts, strange))
}

/// Puts messages into the inboxes of devices of ours, each once for its id, several in one batch. Errors: [`Error::Busy`] where the server
/// writes too much.
async fn deliver(
    app: &App,
    origin: &OwnedServerName,
    deliveries: Vec<Delivery>,
    until: Duration,
) -> Result<()> {
    let deliveries = Arc::new(deliveries);
    let (mut done, mut counted) = (0, 0);
    while done < deliveries.len() {
        if done >= counted {
            counted = deliveries.len().min(done + DELIVERED_AT_ONCE);
            let (owned, of, all) = (app.clone(), origin.clone(), Arc::clone(&deliveries));
            let next = done..counted;
            let look = move || acts_of(&owned, of.as_str(), all.get(next).unwrap_or_default());
            let acts = app.env.blocking(look).await?;
            if acts.0 > 0 {
                count(app, origin, acts, until).await?;
            }
        }
        // A batch may end in the middle of a part that was counted, and never goes beyond it.
        let next = deliveries.iter().skip(done).take(counted - done);
        let users = next.flat_map(|delivery| &delivery.targets).filter_map(Target::user).collect();
        let (deliveries, origin) = (Arc::clone(&deliveries), origin.to_string());
        done = write::for_users(app, users, move |app, batch| {
            let next = deliveries.iter().enumerate().skip(done).take(counted - done);
            for (at, delivery) in next {
                let key = (origin.as_str(), delivery.id.as_str());
                let before = schema::INBOUND_MESSAGE.get(batch, key)?;
                let before = before
                    .unwrap_or(InboundMessageRow { at_ms: app.env.now_ms(), ..InboundMessageRow::default() });
                if before.progress.is_done {
                    continue;
                }
                let all = &delivery.targets;
                let progress =
                    send_to_device::fill(app, batch, all, before.progress, all.len(), &mut |_, _| 0)?;
                let row = InboundMessageRow { progress, ..before };
                remembered::note_message(app, batch, key, delivery.is_strangers, &row)?;
                if !progress.is_done {
                    return Ok(at);
                }
            }
            Ok(counted)
        })
        .await?;
    }
    Ok(())
}

/// Reads a message and looks for its devices. None where it is in another form, or for no device of ours.
fn read_message(
    snapshot: &Snapshot,
    origin: &ServerName,
    content: &RawValue,
    near: &mut Near,
) -> Result<Option<Delivery>> {
    #[derive(Deserialize)]
    struct ToDevice<'a> {
        sender: String,
        #[serde(rename = "type")]
        event_type: String,
        message_id: String,
        #[serde(borrow)]
        messages: BTreeMap<Cow<'a, str>, &'a RawValue>,
    }
    let Some(ToDevice { sender, event_type, message_id: id, messages }) = read::<ToDevice<'_>>(content)
    else {
        return Ok(None);
    };
    let is_long = event_type.len() > NAME_BYTES_MAX || id.len() > NAME_BYTES_MAX;
    let Some(sender) = own_user(origin, &sender).filter(|_| !is_long) else { return Ok(None) };
    let (mut targets, mut count, mut reached, mut acts, mut is_strangers) = (Vec::new(), 0, 0, 0, true);
    for (user_id, devices) in messages {
        let Ok(user_id) = <&UserId>::try_from(&*user_id) else { continue };
        let Some(user) = users::find_num(snapshot, user_id)? else { continue };
        let Some(devices) = read::<BTreeMap<Cow<'_, str>, &RawValue>>(devices) else { continue };
        let nearness = near.find(snapshot, origin, user)?;
        is_strangers &= nearness == Nearness::Stranger;
        for (device, content) in devices {
            let Some(message) = message(&sender, &event_type, content) else { continue };
            let message = message.from_elsewhere(nearness);
            let acts_each = send_to_device::acts(&message);
            let device = match &*device {
                "*" => DeviceIdOrAllDevices::AllDevices,
                id => DeviceIdOrAllDevices::DeviceId(id.into()),
            };
            let target = Target::here(user, device, message);
            let devices = send_to_device::list_devices(snapshot, &target, DeviceNum(0))?.len();
            (count, reached, acts) = (count + devices.max(1), reached + devices, acts + devices * acts_each);
            if count > DEVICES_MAX {
                tracing::debug!(%origin, "a message for too many devices is not delivered");
                return Ok(None);
            }
            targets.push(target);
        }
    }
    Ok((reached > 0).then_some(Delivery { id, is_strangers, acts, targets }))
}

/// The message as a device gets it; none for content that it could not read.
fn message(sender: &UserId, event_type: &str, content: &RawValue) -> Option<Message> {
    if nesting(content.get()) > NESTING_MAX {
        return None;
    }
    Message::new(sender, event_type, content).ok()
}

/// How deep a JSON text nests.
fn nesting(json: &str) -> usize {
    let (mut depth, mut deepest, mut in_text, mut is_escaped) = (0_usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_text => is_escaped = true,
            b'"' => in_text = !in_text,
            b'{' | b'[' if !in_text => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nesting_of_a_text_does_not_count_what_stands_in_strings() {
        for (json, depth) in
            [("1", 0), ("{}", 1), (r#"{"a":[{"b":"]}[[\"[["}],"c":[[]]}"#, 3), (r#""\\",[["#, 2)]
        {
            assert_eq!(nesting(json), depth, "{json}");
        }
    }
}
