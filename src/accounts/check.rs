//! Invariants of the rows of accounts, which `db check` verifies.

use std::collections::BTreeSet;

use ruma::UserId;
use serde_json::{Value, value::RawValue};

use crate::{
    ids::{DeviceNum, UserNum},
    schema::{
        self,
        accounts::{AccessTokenRow, EndedDevices, RefreshTokenRow},
    },
    store::{
        Direction, Fault, LogEntry, Snapshot,
        check::{Doubts, RowCheck},
        key::Json,
    },
};

/// The checks of accounts, devices, tokens and account data.
pub fn checks() -> Vec<RowCheck> {
    vec![
        RowCheck::of(&schema::USERS, |read, user, row, doubts| {
            let name = row.user_id.localpart();
            let named = schema::USER_NAMES.get(read, name)?;
            doubts.unless(named == Some(*user), format!("the name {name} is not its own"));
            let is_hidden = schema::ERASED_USERS.contains(read, row.user_id.as_str())?;
            doubts.unless(
                is_hidden == row.is_erased,
                "`ERASED_USERS` and the account disagree on whether it is erased",
            );
            Ok(())
        }),
        RowCheck::of(&schema::ERASED_USERS, |read, user_id, (), doubts| {
            let Ok(parsed) = <&UserId>::try_from(user_id.as_str()) else {
                doubts.unless(false, "this is no user id");
                return Ok(());
            };
            let row = match super::users::find_num(read, parsed)? {
                Some(user) => super::users::find(read, user)?,
                None => None,
            };
            doubts.unless(row.is_some_and(|row| row.is_erased), "no account of this name was erased");
            Ok(())
        }),
        RowCheck::of(&schema::USER_NAMES, |read, name, user, doubts| {
            let row = schema::USERS.get(read, *user)?;
            let is_it = row.is_some_and(|row| row.user_id.localpart() == name);
            doubts.unless(is_it, format!("account {user} is gone or has another name"));
            Ok(())
        }),
        RowCheck::of(&schema::PASSWORDS, |read, user, _, doubts| account(read, *user, doubts)),
        RowCheck::of(&schema::PROFILES, |read, (user, _), value, doubts| {
            doubts.unless(serde_json::from_slice::<&RawValue>(value).is_ok(), "it is not JSON");
            account(read, *user, doubts)
        }),
        RowCheck::of(&schema::FILTERS, |read, (user, _), filter, doubts| {
            doubts.unless(serde_json::from_slice::<Value>(filter).is_ok(), "it is not JSON");
            account(read, *user, doubts)
        }),
        RowCheck::of(&schema::OPENID_TOKENS, |read, user, Json(row), doubts| {
            doubts.unless(row.tokens.len() <= super::openid::TOKENS_MAX, "it holds too many tokens");
            let live = super::users::find(read, *user)?.filter(|account| !account.is_deactivated);
            doubts.unless(live.is_some(), "its account is gone");
            Ok(())
        }),
        RowCheck::of(&schema::REPORTS, |read, (user, name), Json(row), doubts| {
            doubts.unless(row.subject.name() == *name, "it is about something else than its name says");
            account(read, *user, doubts)
        }),
        RowCheck::of(&schema::REGISTRATION_TOKENS, |_, _, Json(row), doubts| {
            doubts.unless(row.uses_max.is_none_or(|max| row.uses <= max), "it was used too often");
            Ok(())
        }),
    ]
    .into_iter()
    .chain(devices())
    .chain(account_data())
    .chain(subscriptions())
    .chain(emails())
    .collect()
}

fn emails() -> [RowCheck; 2] {
    [
        RowCheck::of(&schema::EMAILS, |read, (user, address), _, doubts| {
            let owner = schema::EMAIL_OWNERS.get(read, address)?;
            doubts.unless(owner == Some(*user), "`EMAIL_OWNERS` does not name its account");
            let is_canonical = super::emails::canonical(address).is_ok_and(|it| it == *address);
            doubts.unless(is_canonical, "it is no e-mail address in its canonical form");
            let live = super::users::find(read, *user)?.filter(|account| !account.is_deactivated);
            doubts.unless(live.is_some(), "its account is gone");
            Ok(())
        }),
        RowCheck::of(&schema::EMAIL_OWNERS, |read, address, user, doubts| {
            let has = schema::EMAILS.contains(read, (*user, address.as_str()))?;
            doubts.unless(has, "the account has no such e-mail address");
            Ok(())
        }),
    ]
}

fn subscriptions() -> [RowCheck; 3] {
    [
        RowCheck::of(&schema::SUBSCRIPTION, |read, (user, room, root), row, doubts| {
            doubts.logged(read, row.position, LogEntry::AccountData { user: *user })?;
            let named = schema::SUBSCRIPTION_LOG.get(read, (*user, row.position))?;
            doubts.unless(named == Some((*room, *root)), "the log of subscriptions does not name it");
            doubts.unless(schema::PLACE.contains(read, (*room, *root))?, "there is no such thread");
            let counted = schema::SUBSCRIPTION_COUNT.get(read, *user)?.unwrap_or_default();
            doubts.unless(counted > 0, "the subscriptions of its user are not counted");
            account(read, *user, doubts)
        }),
        RowCheck::of(&schema::SUBSCRIPTION_LOG, |read, (user, position), (room, root), doubts| {
            let row = schema::SUBSCRIPTION.get(read, (*user, *room, *root))?;
            let is_it = row.is_some_and(|row| row.position == *position);
            doubts.unless(is_it, "the subscription was last changed at another position");
            Ok(())
        }),
        RowCheck::of(&schema::SUBSCRIPTION_COUNT, |read, user, count, doubts| {
            let rows = schema::SUBSCRIPTION.prefix::<(UserNum,)>(read, (*user,), Direction::Up)?;
            doubts.unless(rows.count() as u64 == *count, "the user has another number of subscriptions");
            Ok(())
        }),
    ]
}

fn devices() -> [RowCheck; 7] {
    let mut seen = Devices::default();
    [
        RowCheck::of(&schema::PRESENCE, |read, user, _, doubts| account(read, *user, doubts)),
        RowCheck::of(&schema::DEVICES, |read, (user, _), Json(row), doubts| {
            let last = schema::USERS.get(read, *user)?.map(|row| row.last_device);
            doubts.unless(last.is_some(), "its account is gone");
            doubts.unless(
                row.num >= DeviceNum(1) && last.is_none_or(|last| row.num <= last),
                "its number was never given",
            );
            Ok(())
        }),
        RowCheck::of(&schema::ACCESS_TOKENS, |read, hash, row: &AccessTokenRow, doubts| {
            let key = (row.user, row.device, super::tokens::KIND_ACCESS, hash);
            doubts.unless(schema::DEVICE_TOKENS.contains(read, key)?, "its device does not list it");
            device(read, row.user, row.device, row.device_id.as_str(), doubts)
        }),
        RowCheck::of(&schema::REFRESH_TOKENS, |read, hash, Json(row): &Json<RefreshTokenRow>, doubts| {
            let (user, num) = (row.user, row.device);
            let key = (user, num, super::tokens::KIND_REFRESH, hash);
            doubts.unless(schema::DEVICE_TOKENS.contains(read, key)?, "its device does not list it");
            device(read, user, num, row.device_id.as_str(), doubts)
        }),
        RowCheck::of(&schema::DEVICE_TOKENS, |read, (user, num, kind, hash), (), doubts| {
            let of = match *kind {
                super::tokens::KIND_ACCESS => {
                    schema::ACCESS_TOKENS.get(read, hash)?.map(|row| (row.user, row.device))
                }
                super::tokens::KIND_REFRESH => {
                    schema::REFRESH_TOKENS.get(read, hash)?.map(|Json(row)| (row.user, row.device))
                }
                _ => None,
            };
            doubts.unless(of == Some((*user, *num)), "there is no such token of this device");
            Ok(())
        }),
        RowCheck::of(&schema::DEHYDRATED, |read, user, Json(row), doubts| {
            let is_json = serde_json::from_str::<&RawValue>(&row.device_data).is_ok();
            doubts.unless(is_json, "the data of the dehydrated device is not JSON");
            let live = super::devices::find(read, *user, row.device_id.as_str().into())?;
            let is_it = live.is_some_and(|device| device.num == row.num);
            doubts.unless(is_it, "the dehydrated device has ended");
            Ok(())
        }),
        RowCheck::of(&schema::DEVICE_SEEN, move |read, (user, device), _, doubts| {
            doubts.unless(seen.has(read, *user, *device)?, "there is no such device");
            Ok(())
        }),
    ]
}

fn account_data() -> [RowCheck; 3] {
    [
        RowCheck::of(&schema::ACCOUNT_DATA_SIZE, |read, user, size, doubts| {
            let is = super::account_data::count(read, *user)?;
            doubts.unless(is == *size, format!("{size:?} is said to be there, and {is:?} is"));
            account(read, *user, doubts)
        }),
        RowCheck::of(&schema::ACCOUNT_DATA, |read, (user, room, kind), row, doubts| {
            doubts.logged(read, row.position, LogEntry::AccountData { user: *user })?;
            doubts.unless(serde_json::from_slice::<&RawValue>(&row.content).is_ok(), "it is not JSON");
            let logged = schema::ACCOUNT_DATA_LOG.get(read, (*user, row.position))?;
            let is_it = logged.is_some_and(|Json(key)| key.room == *room && key.kind == *kind);
            doubts.unless(is_it, "the user's log does not name it");
            account(read, *user, doubts)
        }),
        RowCheck::of(&schema::ACCOUNT_DATA_LOG, |read, (user, position), Json(key), doubts| {
            let row = schema::ACCOUNT_DATA.get(read, (*user, key.room.as_str(), key.kind.as_str()))?;
            // An entry of an older position is superseded; one that is newer than the row was never written with it.
            let is_known = row.is_some_and(|row| row.position >= *position);
            doubts.unless(is_known, format!("there is no {} of {:?} as new as that", key.kind, key.room));
            Ok(())
        }),
    ]
}

fn account(read: &Snapshot, user: UserNum, doubts: &mut Doubts) -> Result<(), Fault> {
    doubts.unless(schema::USERS.contains(read, user)?, "its account is gone");
    Ok(())
}

fn device(
    read: &Snapshot,
    user: UserNum,
    num: DeviceNum,
    id: &str,
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let row = schema::DEVICES.get(read, (user, id))?;
    let is_it = row.is_some_and(|Json(row)| row.num == num);
    // Rows of a device that has ended stay until they are swept, so they are no fault.
    let has_ended = schema::USERS.get(read, user)?.is_some_and(|row| row.ended.contains(num));
    doubts.unless(is_it || has_ended, format!("device {num} of account {user} is gone"));
    account(read, user, doubts)
}

/// Answers whether a device exists, for tables that name devices by number. It remembers the devices of one user at a time,
/// because rows are checked in the order of users.
#[derive(Default)]
pub(crate) struct Devices {
    of: Option<UserNum>,
    nums: BTreeSet<DeviceNum>,
    ended: EndedDevices,
}

impl Devices {
    /// Whether the user has a device of this number, or had one that has ended and is not swept yet.
    pub(crate) fn has(&mut self, read: &Snapshot, user: UserNum, device: DeviceNum) -> Result<bool, Fault> {
        if self.of != Some(user) {
            let rows = schema::DEVICES.prefix::<(UserNum,)>(read, (user,), Direction::Up)?;
            self.nums = rows.map(|row| row.map(|(_, Json(row))| row.num)).collect::<Result<_, _>>()?;
            self.ended = schema::USERS.get(read, user)?.map(|row| row.ended).unwrap_or_default();
            self.of = Some(user);
        }
        Ok(self.nums.contains(&device) || self.ended.contains(device))
    }
}
