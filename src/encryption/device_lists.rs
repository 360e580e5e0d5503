//! The log of users whose devices or keys changed, from which `device_lists` of `/sync` and `/keys/changes` answer, and of which other
//! servers are told.
//!
//! A change of a user of ours has the position at which it was stored as its number between servers (`stream_id`), and names the change
//! before it, so that a server sees whether it missed one. Only the last changes are remembered with their devices: a server
//! that missed more is told of the newest, and asks for the whole list.

use std::ops::Bound;

use federation::json::Canonical;
use ruma::{OwnedDeviceId, UserId};
use serde_json::Value;

use crate::{
    accounts::devices,
    encryption::{
        cross_signing::{self, Usage},
        keys,
        signatures::Signable,
    },
    ids::{Position, UserNum},
    schema::{self, encryption::DeviceStepRow},
    store::{Batch, Direction, Fault, LogEntry, Read},
};

/// At most this many changes of a user's devices are remembered with the devices, the newest ones.
pub const STEPS_MAX: usize = 20;

/// Notes that these devices of a local user came, changed or went. Without one it is noted that the list may be another in any
/// of its parts. The caller holds the user's lock.
pub fn changed(
    batch: &mut Batch,
    user: UserNum,
    user_id: &UserId,
    device_ids: &[OwnedDeviceId],
) -> Result<Position, Fault> {
    add_steps(batch, (user, user_id), device_ids, false)
}

/// Notes that the keys changed with which a local user signs, and these devices. Other servers are told of the keys together with a device,
/// whose change has a number, so that a server that missed the keys sees that it missed something. The caller holds the user's lock.
pub fn signing_keys_changed(
    batch: &mut Batch,
    user: UserNum,
    user_id: &UserId,
    device_ids: &[OwnedDeviceId],
) -> Result<Position, Fault> {
    add_steps(batch, (user, user_id), device_ids, true)
}

fn add_steps(
    batch: &mut Batch,
    (user, user_id): (UserNum, &UserId),
    device_ids: &[OwnedDeviceId],
    has_signing_keys: bool,
) -> Result<Position, Fault> {
    let entry = LogEntry::DeviceList { user };
    let before = schema::DEVICE_CHANGED.get(batch, user_id.as_str())?;
    let untold = device_ids.len().saturating_sub(STEPS_MAX);
    let (mut prev, mut last) = (before, None);
    if untold > 0 || device_ids.is_empty() {
        // Nobody is ever told of this number, so that all who are told of the next one ask for the list.
        prev = Some(batch.position(&entry));
    }
    for device_id in device_ids.iter().skip(untold) {
        let position = batch.position(&entry);
        // The keys are told once, with the last of the devices.
        let has_signing_keys = has_signing_keys && device_ids.last() == Some(device_id);
        let step = DeviceStepRow { prev, device_id: device_id.to_string(), has_signing_keys };
        schema::DEVICE_STEP.put(batch, (user, position), &step);
        (prev, last) = (Some(position), Some(position));
    }
    let last = last.unwrap_or_else(|| batch.position(&entry));
    note(batch, user_id, before, last);
    let old = schema::DEVICE_STEP.prefix::<(UserNum,)>(batch, (user,), Direction::Down)?.skip(STEPS_MAX);
    let old = old.map(|row| row.map(|(key, _)| key)).collect::<Result<Vec<_>, _>>()?;
    for key in old {
        schema::DEVICE_STEP.delete(batch, key);
    }
    Ok(last)
}

/// Notes that the devices or keys of this user of another server changed. The caller holds the lock that stands for the user.
pub fn changed_elsewhere(batch: &mut Batch, user_id: &UserId) -> Result<Position, Fault> {
    let before = schema::DEVICE_CHANGED.get(batch, user_id.as_str())?;
    let position = batch.position(&LogEntry::OtherDeviceList);
    note(batch, user_id, before, position);
    Ok(position)
}

fn note(batch: &mut Batch, user_id: &UserId, before: Option<Position>, position: Position) {
    if let Some(before) = before {
        schema::DEVICE_LOG.delete(batch, before);
    }
    schema::DEVICE_CHANGED.put(batch, user_id.as_str(), &position);
    schema::DEVICE_LOG.put(batch, position, &user_id.as_str().to_owned());
}

/// A change of the devices of a user of ours, as other servers are told it: what the device is by now.
#[derive(Clone, Debug, PartialEq)]
pub struct Update {
    /// The number of the change.
    pub stream_id: Position,
    /// The number of the change before it, if there was one.
    pub prev_id: Option<Position>,
    /// The device that came, changed or went.
    pub device_id: OwnedDeviceId,
    /// The device as it is now; none if it went.
    pub device: Option<UpdatedDevice>,
    /// The keys with which the user signs, where they may have changed too.
    pub signing_keys: Option<ToldSigningKeys>,
}

/// The keys with which a user signs, as other servers are told them; one that the user does not have is left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ToldSigningKeys {
    /// The key that stands for the user.
    pub master: Option<Canonical>,
    /// The key that signs the user's devices.
    pub self_signing: Option<Canonical>,
}

/// Reads the keys with which a user of ours signs, as other servers are told them.
pub fn find_signing_keys(
    read: &(impl Read + ?Sized),
    of: (UserNum, &UserId),
) -> Result<ToldSigningKeys, Fault> {
    let master = cross_signing::find_shown(read, of, Usage::Master)?;
    let self_signing = cross_signing::find_shown(read, of, Usage::SelfSigning)?;
    let json = |key: Option<Signable>| key.map(|key| key.json());
    Ok(ToldSigningKeys { master: json(master), self_signing: json(self_signing) })
}

/// A device as other servers are told of it.
#[derive(Clone, Debug, PartialEq)]
pub struct UpdatedDevice {
    /// The name that its owner gave it.
    pub display_name: Option<String>,
    /// Its identity keys, if it has uploaded some.
    pub keys: Option<Value>,
}

/// Finds the change of a user's devices at a position, or the newest one if that is not remembered. None for a user who never
/// had a device.
pub fn find_update(
    read: &(impl Read + ?Sized),
    (user, user_id): (UserNum, &UserId),
    at: Position,
) -> Result<Option<Update>, Fault> {
    let (mut stream_id, mut step) = (at, schema::DEVICE_STEP.get(read, (user, at))?);
    if step.is_none() {
        let Some(newest) = find_changed(read, user_id)? else { return Ok(None) };
        (stream_id, step) = (newest, schema::DEVICE_STEP.get(read, (user, newest))?);
    }
    // Where the change that is meant is not known any more, the keys may have changed with it.
    let is_known = stream_id == at && step.is_some();
    let (prev_id, device_id, has_signing_keys) = match step {
        Some(step) => (step.prev, OwnedDeviceId::from(step.device_id), step.has_signing_keys || !is_known),
        // The change was noted for the whole list. Any device will do, with a change before it that nobody was told of.
        None => match devices::list(read, user)?.into_iter().next() {
            Some(device) => (Some(stream_id.before()), device.id, true),
            None => return Ok(None),
        },
    };
    let device = match devices::find(read, user, &device_id)? {
        Some(device) => Some(UpdatedDevice {
            keys: keys::find_device_keys(read, (user_id, (user, device.num)), None)?,
            display_name: device.display_name,
        }),
        None => None,
    };
    let signing_keys = if has_signing_keys { Some(find_signing_keys(read, (user, user_id))?) } else { None };
    let signing_keys = signing_keys.filter(|keys| *keys != ToldSigningKeys::default());
    Ok(Some(Update { stream_id, prev_id, device_id, device, signing_keys }))
}

/// Whether something of a user's devices that is told of this position is still to be told: it is remembered, or it is the newest change.
pub fn is_to_tell(
    read: &(impl Read + ?Sized),
    (user, user_id): (UserNum, &UserId),
    at: Position,
) -> Result<bool, Fault> {
    Ok(schema::DEVICE_STEP.contains(read, (user, at))? || find_changed(read, user_id)? == Some(at))
}

/// The position at which the devices or keys of this user last changed, as far as we know.
pub fn find_changed(read: &(impl Read + ?Sized), user_id: &UserId) -> Result<Option<Position>, Fault> {
    schema::DEVICE_CHANGED.get(read, user_id.as_str())
}

/// Finds the positions at which the devices or keys of these users last changed, in their order.
pub fn find_changed_of_many<'u>(
    read: &(impl Read + ?Sized),
    user_ids: impl IntoIterator<Item = &'u str>,
) -> Result<Vec<Option<Position>>, Fault> {
    schema::DEVICE_CHANGED.get_many(read, user_ids)
}

/// Lists the users whose devices or keys changed in (after, upto], on the whole server, the oldest change first. Each user
/// comes once, because a change deletes the entry of the one before. Rows are read only as far as the caller walks.
pub fn list_changes(
    read: &(impl Read + ?Sized),
    after: Position,
    upto: Position,
) -> Result<impl Iterator<Item = Result<String, Fault>> + '_, Fault> {
    let (low, high) = (Bound::Excluded(after), Bound::Included(upto));
    let rows = schema::DEVICE_LOG.range::<Position>(read, low, high, Direction::Up)?;
    Ok(rows.map(|row| row.map(|(_, user_id)| user_id)))
}

/// Lists the users whose devices or keys changed last, at or before a position, the newest change first; at most `count`.
pub fn list_latest(read: &(impl Read + ?Sized), upto: Position, count: usize) -> Result<Vec<String>, Fault> {
    let high = Bound::Included(upto);
    let rows = schema::DEVICE_LOG.range::<Position>(read, Bound::Unbounded, high, Direction::Down)?;
    rows.take(count).map(|row| row.map(|(_, user_id)| user_id)).collect()
}

#[cfg(test)]
mod tests {
    use ruma::OwnedUserId;

    use super::*;
    use crate::{
        accounts::{
            devices::{Ending, LogIn},
            users::{self, NewUser},
        },
        env::Env,
        store::{Durability, Engine, Guard, Store, engine::Memory},
    };

    const ALICE: UserNum = UserNum(1);

    struct House {
        store: Store,
        env: Env,
        alice: OwnedUserId,
    }

    impl House {
        fn new() -> Self {
            let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
            let alice: OwnedUserId = "@alice:a.example".try_into().unwrap();
            let house = Self { store, env: Env::simulated(1, 0), alice };
            let new = NewUser { user_id: house.alice.clone(), now_ms: 0, is_admin: false, is_guest: false };
            house.write(|batch| users::create(batch, ALICE, &new));
            house
        }

        fn write<T>(&self, build: impl FnOnce(&mut Batch) -> T) -> T {
            let mut batch = self.store.batch(&Guard::alone());
            let answer = build(&mut batch);
            drop(self.store.enqueue(batch).unwrap());
            self.store.flush().unwrap();
            answer
        }

        fn log_in(&self, id: &str) {
            self.write(|batch| {
                let log_in = LogIn { id: Some(id.into()), ..LogIn::default() };
                let (device, _) = devices::log_in(batch, &self.env, ALICE, log_in).unwrap();
                changed(batch, ALICE, &self.alice, &[device.id]).unwrap();
            });
        }

        /// The changes that are remembered, the oldest first, as other servers are told them.
        fn updates(&self) -> Vec<Update> {
            let view = self.store.view();
            let steps = schema::DEVICE_STEP.prefix::<(UserNum,)>(&view, (ALICE,), Direction::Up).unwrap();
            let steps: Vec<Position> = steps.map(|row| row.unwrap().0.1).collect();
            steps
                .into_iter()
                .map(|at| find_update(&view, (ALICE, &self.alice), at).unwrap().unwrap())
                .collect()
        }

        fn newest(&self) -> Option<Update> {
            find_update(&self.store.view(), (ALICE, &self.alice), Position::MAX).unwrap()
        }
    }

    #[test]
    fn each_change_names_the_one_before_and_only_the_last_are_remembered() {
        let house = House::new();
        assert_eq!(house.newest(), None, "nothing has changed yet");
        for number in 0..STEPS_MAX + 5 {
            house.log_in(&format!("D{number:02}"));
        }
        let updates = house.updates();
        assert_eq!(updates.len(), STEPS_MAX);
        assert_eq!(updates[0].device_id, "D05");
        for two in updates.windows(2) {
            assert_eq!(two[1].prev_id, Some(two[0].stream_id));
        }
        assert_eq!(house.newest().as_ref(), updates.last());
        // A change that is not remembered any more is told as the newest one.
        let forgotten = updates[0].prev_id.unwrap();
        let told = find_update(&house.store.view(), (ALICE, &house.alice), forgotten).unwrap();
        assert_eq!(told.as_ref(), updates.last());
        assert!(!is_to_tell(&house.store.view(), (ALICE, &house.alice), forgotten).unwrap());
    }

    #[test]
    fn many_devices_that_go_at_once_leave_a_gap_that_others_notice() {
        let house = House::new();
        for number in 0..STEPS_MAX + 5 {
            house.log_in(&format!("D{number:02}"));
        }
        let before = house.newest().unwrap();
        house.write(|batch| {
            let gone = devices::end(batch, ALICE, &Ending::All).unwrap();
            assert_eq!(gone.len(), STEPS_MAX + 5);
            changed(batch, ALICE, &house.alice, &gone).unwrap();
        });
        let updates = house.updates();
        assert_eq!(updates.len(), STEPS_MAX);
        assert!(updates.iter().all(|update| update.device.is_none()));
        assert!(updates[0].prev_id > Some(before.stream_id), "nobody was told of that one");
        for two in updates.windows(2) {
            assert_eq!(two[1].prev_id, Some(two[0].stream_id));
        }
    }

    #[test]
    fn a_change_of_the_whole_list_is_told_by_any_device() {
        let house = House::new();
        house.log_in("A");
        let first = house.newest().unwrap();
        assert_eq!(first.prev_id, None);
        let at = house.write(|batch| {
            changed(batch, ALICE, &house.alice, &[]).unwrap();
            find_changed(batch, &house.alice).unwrap()
        });
        assert!(at.is_some());
        let newest = house.newest().unwrap();
        assert_eq!(newest.device_id, "A");
        assert!(
            newest.prev_id.is_some_and(|prev| prev != first.stream_id) && newest.stream_id > first.stream_id
        );
        assert!(is_to_tell(&house.store.view(), (ALICE, &house.alice), newest.stream_id).unwrap());
    }
}
