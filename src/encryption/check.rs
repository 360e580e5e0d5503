//! Invariants of the rows of inboxes, device lists and keys, which `db check` verifies.

use std::collections::BTreeMap;

use ruma::UserId;
use serde_json::value::RawValue;

use crate::{
    accounts::check::Devices,
    encryption::{
        backup,
        cross_signing::{self, Usage},
        elsewhere::{self, OtherDevice},
        inbox,
        keys::Owner,
    },
    ids::{DeviceNum, UserNum},
    schema::{
        self,
        encryption::{InboxShare, InboxState, KeyCounts, OtherCount, OtherDeviceRow},
    },
    store::{
        Direction, Fault, LogEntry, Snapshot,
        check::{Doubts, RowCheck},
        key::Json,
    },
};

/// The checks of messages between devices, device lists, keys and their backups.
pub fn checks() -> Vec<RowCheck> {
    let kept_here = inboxes().into_iter().chain(requests_and_keys()).chain(signing_keys());
    kept_here.chain(backup::check::checks()).chain(lists_elsewhere()).collect()
}

fn inboxes() -> [RowCheck; 5] {
    let (mut devices, mut shares) = (Devices::default(), Shares::default());
    [
        RowCheck::of(&schema::INBOX, move |read, (user, device, position), message, doubts| {
            doubts.logged(read, *position, LogEntry::ToDevice { user: *user })?;
            doubts.unless(serde_json::from_slice::<&RawValue>(message).is_ok(), "it is not JSON");
            let state = schema::INBOX_STATE.get(read, (*user, *device))?;
            let waits = state.is_some_and(|state| state.acknowledged < *position);
            doubts.unless(waits, "its device has confirmed it, or has no `INBOX_STATE`");
            let sender = inbox::sender_of(message).unwrap_or_default();
            let is_counted = schema::INBOX_SHARE.contains(read, (*user, *device, &sender))?;
            doubts.unless(is_counted, format!("what waits from its sender {sender:?} is not counted"));
            let is_listed = schema::INBOX_KEY_REQUEST.contains(read, (*user, *device, *position))?;
            let is_key_request = inbox::is_key_request(message);
            doubts.unless(is_listed == is_key_request, "`INBOX_KEY_REQUEST` is wrong about it");
            doubts.unless(devices.has(read, *user, *device)?, "its device is gone");
            Ok(())
        }),
        RowCheck::of(&schema::INBOX_STATE, inbox_state),
        RowCheck::of(&schema::INBOX_SHARE, move |read, (user, device, sender), share, doubts| {
            let waits = match sender.starts_with(':') {
                true => of_server(read, (*user, *device), sender)?,
                false => shares.of(read, (*user, *device), sender)?,
            };
            doubts.unless(waits == *share, format!("{share:?} is said to wait, and {waits:?} does"));
            Ok(())
        }),
        RowCheck::of(&schema::INBOX_OF_SERVER, |read, (user, device, server, position), bytes, doubts| {
            let message = schema::INBOX.get(read, (*user, *device, *position))?;
            let is_right = message.as_ref().is_some_and(|message| {
                let sender = inbox::sender_of(message).unwrap_or_default();
                message.len() as u64 == *bytes && sender.ends_with(server.as_str())
            });
            doubts.unless(is_right, "there is no such message of this server");
            let is_counted = schema::INBOX_SHARE.contains(read, (*user, *device, server.as_str()))?;
            doubts.unless(is_counted, "what waits from its server is not counted");
            Ok(())
        }),
        RowCheck::of(&schema::INBOX_KEY_REQUEST, |read, (user, device, position), (), doubts| {
            let waits = schema::INBOX.contains(read, (*user, *device, *position))?;
            doubts.unless(waits, "there is no such message");
            Ok(())
        }),
    ]
}

/// Counts what waits for a device from another server. Messages that older versions put there were not listed.
fn of_server(read: &Snapshot, (user, device): Owner, server: &str) -> Result<InboxShare, Fault> {
    let mut share = InboxShare::default();
    let rows = schema::INBOX_OF_SERVER.prefix::<(UserNum, DeviceNum, String)>(
        read,
        (user, device, server),
        Direction::Up,
    )?;
    for row in rows {
        share.messages += 1;
        share.bytes += row?.1;
    }
    Ok(share)
}

/// Counts what waits for a device from each sender. It remembers one device at a time, for rows come in the order of devices.
#[derive(Default)]
struct Shares {
    of: Option<Owner>,
    by_sender: BTreeMap<String, InboxShare>,
}

impl Shares {
    fn of(&mut self, read: &Snapshot, owner: Owner, sender: &str) -> Result<InboxShare, Fault> {
        if self.of != Some(owner) {
            self.by_sender.clear();
            for row in schema::INBOX.prefix::<Owner>(read, owner, Direction::Up)? {
                let (_, message) = row?;
                let share = self.by_sender.entry(inbox::sender_of(&message).unwrap_or_default()).or_default();
                share.messages += 1;
                share.bytes += message.len() as u64;
            }
            self.of = Some(owner);
        }
        Ok(self.by_sender.get(sender).copied().unwrap_or_default())
    }
}

fn requests_and_keys() -> Vec<RowCheck> {
    let (mut of_txns, mut of_keys) = (Devices::default(), Devices::default());
    let (mut of_one_time, mut of_given, mut of_fallback) =
        (Devices::default(), Devices::default(), Devices::default());
    vec![
        RowCheck::of(&schema::TO_DEVICE_TXN_LOG, |read, (user, device, _, kind, txn), (), doubts| {
            let key = (*user, *device, kind.as_str(), txn.as_str());
            doubts.unless(schema::TO_DEVICE_TXNS.contains(read, key)?, "the request itself is not known");
            Ok(())
        }),
        RowCheck::of(&schema::TO_DEVICE_TXNS, move |read, (user, device, ..), _, doubts| {
            doubts.unless(of_txns.has(read, *user, *device)?, "its device is gone");
            Ok(())
        }),
        RowCheck::of(&schema::DEVICE_CHANGED, |read, user_id, position, doubts| {
            doubts.position(read, *position);
            let logged = schema::DEVICE_LOG.get(read, *position)?;
            doubts.unless(logged.as_ref() == Some(user_id), "the log of device lists does not name it");
            Ok(())
        }),
        RowCheck::of(&schema::DEVICE_LOG, |read, position, user_id, doubts| {
            doubts.position(read, *position);
            // An entry of an older position is superseded; one that is newer than the row was never written with it.
            let changed = schema::DEVICE_CHANGED.get(read, user_id)?;
            doubts.unless(changed.is_some_and(|at| at >= *position), "its user has not changed since");
            Ok(())
        }),
        RowCheck::of(&schema::DEVICE_STEP, |read, (user, position), step, doubts| {
            doubts.logged(read, *position, LogEntry::DeviceList { user: *user })?;
            let follows = step.prev.is_none_or(|prev| prev < *position);
            doubts.unless(follows, "it comes before the change that it follows");
            Ok(())
        }),
        RowCheck::of(&schema::DEVICE_KEYS, move |read, (user, device), keys, doubts| {
            doubts.unless(serde_json::from_slice::<&RawValue>(keys).is_ok(), "they are not JSON");
            doubts.unless(of_keys.has(read, *user, *device)?, "their device is gone");
            Ok(())
        }),
        RowCheck::of(&schema::ONE_TIME_KEYS, move |read, (user, device, _, position, _), key, doubts| {
            doubts.position(read, *position);
            doubts.unless(serde_json::from_slice::<&RawValue>(key).is_ok(), "it is not JSON");
            doubts.unless(of_one_time.has(read, *user, *device)?, "its device is gone");
            counted(read, *user, *device, doubts)
        }),
        RowCheck::of(&schema::GIVEN_KEYS, move |read, (user, device, algorithm, position, id), _, doubts| {
            doubts.position(read, *position);
            doubts.unless(of_given.has(read, *user, *device)?, "its device is gone");
            let at = (*user, *device, algorithm.as_str(), *position, id.as_str());
            doubts.unless(!schema::ONE_TIME_KEYS.contains(read, at)?, "it is still to be given");
            counted(read, *user, *device, doubts)
        }),
        RowCheck::of(&schema::FALLBACK_KEYS, move |read, (user, device, _), Json(row), doubts| {
            doubts.unless(serde_json::from_str::<&RawValue>(&row.key).is_ok(), "it is not JSON");
            doubts.unless(of_fallback.has(read, *user, *device)?, "its device is gone");
            counted(read, *user, *device, doubts)
        }),
        RowCheck::of(&schema::KEY_COUNTS, key_counts),
    ]
}

/// Checks that keys with which users sign are whole, and that signatures have something that they are about.
fn signing_keys() -> [RowCheck; 5] {
    let (mut signed, mut signing) = (Devices::default(), Devices::default());
    [
        RowCheck::of(&schema::CROSS_SIGNING_KEYS, |read, (user, usage), key, doubts| {
            doubts.unless((1..=3).contains(usage), "its usage is none of 1, 2 and 3");
            doubts.unless(cross_signing::is_readable(key), "it is no key with which one can sign");
            let master = schema::CROSS_SIGNING_KEYS.contains(read, (*user, Usage::Master.number()))?;
            doubts.unless(master, "there is no master key that could have signed it");
            Ok(())
        }),
        RowCheck::of(&schema::DEVICE_SIGNED, move |read, (user, device), Json(row), doubts| {
            doubts.unless(signed.has(read, *user, *device)?, "its device is gone");
            let by = cross_signing::find_key_id(read, *user, Usage::SelfSigning)?;
            doubts.unless(by.as_ref() == Some(&row.key_id), "its user has another self-signing key");
            Ok(())
        }),
        RowCheck::of(&schema::MASTER_SIGNED, move |read, (user, device), _, doubts| {
            doubts.unless(signing.has(read, *user, *device)?, "its device is gone");
            let master = schema::CROSS_SIGNING_KEYS.contains(read, (*user, Usage::Master.number()))?;
            doubts.unless(master, "its user has no master key");
            Ok(())
        }),
        RowCheck::of(&schema::SIGNED_USERS, |read, (user, of), row, doubts| {
            doubts.logged(read, row.position, LogEntry::Device { user: *user })?;
            let logged = schema::SIGNED_USERS_LOG.get(read, (*user, row.position))?;
            doubts.unless(logged.as_ref() == Some(of), "the log of signed users does not name it");
            let by = cross_signing::find_key_id(read, *user, Usage::UserSigning)?;
            doubts.unless(by.is_some(), "its user has no user-signing key");
            Ok(())
        }),
        RowCheck::of(&schema::SIGNED_USERS_LOG, |read, (user, position), of, doubts| {
            doubts.position(read, *position);
            let row = schema::SIGNED_USERS.get(read, (*user, of.as_str()))?;
            doubts.unless(row.is_some_and(|row| row.position == *position), "no row was written there");
            Ok(())
        }),
    ]
}

/// Checks that lists of other servers are counted, and their devices in them.
fn lists_elsewhere() -> [RowCheck; 3] {
    [
        RowCheck::of(&schema::OTHER_LIST, |read, (server, user_id), Json(row), doubts| {
            let parsed = <&UserId>::try_from(user_id.as_str()).ok();
            let is_of = parsed.is_some_and(|user_id| user_id.server_name() == server.as_str());
            doubts.unless(is_of, "its user is not of its server");
            let (mut devices, mut bytes) = (0, elsewhere::of_signing_keys(row));
            for device in
                schema::OTHER_DEVICE.prefix::<(String,)>(read, (user_id.as_str(),), Direction::Up)?
            {
                let ((_, id), Json(OtherDeviceRow { keys, display_name })) = device?;
                devices += 1;
                bytes += elsewhere::bytes_of(&id.into(), &OtherDevice { keys, display_name });
            }
            let said = format!("{} devices of {} bytes are said to be kept", row.devices, row.bytes);
            let is_right = (row.devices, row.bytes) == (devices, bytes);
            doubts.unless(is_right, format!("{said}, and there are {devices} of {bytes}"));
            let is_counted = schema::OTHER_COUNT.contains(read, server)?;
            doubts.unless(is_counted, "it is not counted for its server");
            Ok(())
        }),
        RowCheck::of(&schema::OTHER_DEVICE, |read, (user_id, _), Json(row), doubts| {
            doubts.unless(serde_json::from_str::<&RawValue>(&row.keys).is_ok(), "its keys are not JSON");
            let list = match <&UserId>::try_from(user_id.as_str()) {
                Ok(user_id) => elsewhere::find(read, user_id)?,
                Err(_) => None,
            };
            doubts.unless(list.is_some(), "there is no list for it to be in");
            Ok(())
        }),
        RowCheck::of(&schema::OTHER_COUNT, |read, server, count, doubts| {
            let mut found = OtherCount::default();
            for row in schema::OTHER_LIST.prefix::<(String,)>(read, (server.as_str(),), Direction::Up)? {
                let (_, Json(row)) = row?;
                found.users += 1;
                found.bytes += row.bytes;
            }
            doubts.unless(
                found == *count,
                format!("{count:?} is said to be kept of a server, and {found:?} is"),
            );
            Ok(())
        }),
    ]
}

fn counted(read: &Snapshot, user: UserNum, device: DeviceNum, doubts: &mut Doubts) -> Result<(), Fault> {
    doubts.unless(schema::KEY_COUNTS.contains(read, (user, device))?, "it is not counted");
    Ok(())
}

/// Checks that the stored numbers of waiting messages and bytes are those of the inbox.
fn inbox_state(
    read: &Snapshot,
    (user, device): &(UserNum, DeviceNum),
    state: &InboxState,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    doubts.position(read, state.acknowledged);
    let (mut messages, mut bytes) = (0, 0);
    for row in schema::INBOX.prefix::<(UserNum, DeviceNum)>(read, (*user, *device), Direction::Up)? {
        messages += 1;
        bytes += row?.1.len() as u64;
    }
    let is_right = (messages, bytes) == (state.messages, state.bytes);
    let said = format!("{} messages of {} bytes are said to wait", state.messages, state.bytes);
    doubts.unless(is_right, format!("{said}, and {messages} of {bytes} do"));
    Ok(())
}

/// Checks that the stored numbers of keys are those of the keys that are left.
fn key_counts(
    read: &Snapshot,
    (user, device): &(UserNum, DeviceNum),
    Json(counts): &Json<KeyCounts>,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let mut left = BTreeMap::<String, u64>::new();
    for row in schema::ONE_TIME_KEYS.prefix::<(UserNum, DeviceNum)>(read, (*user, *device), Direction::Up)? {
        let ((_, _, algorithm, ..), _) = row?;
        *left.entry(algorithm).or_default() += 1;
    }
    let said: BTreeMap<String, u64> = counts
        .one_time
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(name, count)| (name.clone(), *count))
        .collect();
    doubts.unless(said == left, format!("{said:?} are said to be left, and {left:?} are"));
    let given = schema::GIVEN_KEYS
        .prefix::<(UserNum, DeviceNum)>(read, (*user, *device), Direction::Up)?
        .count() as u64;
    doubts.unless(given == counts.given, format!("{} are said to be given, and {given} are", counts.given));
    for algorithm in &counts.unused_fallback {
        let key = (*user, *device, algorithm.as_str());
        doubts.unless(
            schema::FALLBACK_KEYS.contains(read, key)?,
            format!("there is no fallback key of {algorithm}"),
        );
    }
    Ok(())
}
