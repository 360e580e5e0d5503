//! The device lists of users of other servers, as those servers told them. A list is kept while its user's server is known to tell
//! this one of changes: somebody of ours shares a room with the user ([`Witness`]). It is bounded for each user and each server.
//!
//! That the user is in the room may be the word of a third server alone, which can hide that the user has left, so that the user's server
//! tells this one nothing. It cannot do so in rooms of others. So a list counts for a user of ours ([`Asker`]) only if they have come to
//! no other room with its user since it was asked for. A user who comes to a room of ours has their server tell of their devices anew.
//!
//! A change comes with its number and that of the change before it. A list that knows the one before takes the change; one that
//! does not has missed something, is stale from then on, and is told to nobody until the whole list was asked for again.
//!
//! Specification: server-server API, "Device Management".

use std::{collections::BTreeMap, ops::Bound};

use ruma::{OwnedDeviceId, OwnedUserId, UserId};

use crate::{
    encryption::{device_lists, signatures::Signable},
    ids::{EventNum, Position, RoomNum, UserNum},
    rooms::{members, state},
    schema::{
        self,
        encryption::{OtherCount, OtherDeviceRow, OtherListRow},
        event_types::MEMBER,
        rooms::Membership,
    },
    store::{Batch, Direction, Fault, Read, Snapshot, Wake, key::Json},
};

/// A list of more devices is not kept: it is asked for each time.
pub const DEVICES_MAX: usize = 1_000;
/// A list with more bytes of keys is not kept, so that one batch can hold a list.
pub const BYTES_MAX: u64 = 400 << 10;
/// The lists of at most this many users of one server are kept.
pub const USERS_OF_SERVER_MAX: u64 = 20_000;
/// The lists of one server that are kept have at most this many bytes.
pub const BYTES_OF_SERVER_MAX: u64 = 128 << 20;
/// At most this many numbers of changes are remembered for a list, the newest ones.
const STREAMS_MAX: usize = 20;
/// At most this many members of rooms are looked up at once.
const LOOKED_UP_AT_ONCE: usize = 500;
/// At most this many users of ours are looked at in a room of the user of a list.
const OWN_LOOKED_AT_MAX: usize = 100;
/// At most this many members of rooms are looked up for those with whom a user of ours shares a room.
const LOOKED_UP_MAX: usize = 100_000;

/// A device of a user of another server. Whoever makes one has checked that its keys are those of this device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherDevice {
    /// The JSON of its identity keys.
    pub keys: String,
    /// The name that its owner gave it.
    pub display_name: Option<String>,
}

/// A whole device list, as the user's server answered it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OtherList {
    /// The number of the last change that is in it.
    pub stream_id: u64,
    /// The devices that have keys.
    pub devices: BTreeMap<OwnedDeviceId, OtherDevice>,
    /// The JSON of the user's master key.
    pub master_key: Option<String>,
    /// The JSON of the key with which the user signs devices.
    pub self_signing_key: Option<String>,
}

/// A change that the server of a user tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A device came, changed or went: none if it has no keys.
    Device {
        /// The number of this change.
        stream_id: u64,
        /// The numbers of the changes before it.
        prev_ids: Vec<u64>,
        /// The device that it is about.
        device_id: OwnedDeviceId,
        /// The device as it is now; none where it went.
        device: Option<OtherDevice>,
    },
    /// The keys with which the user signs are these now, as far as they are told.
    SigningKeys {
        /// The JSON of the master key.
        master_key: Option<String>,
        /// The JSON of the key that signs devices.
        self_signing_key: Option<String>,
    },
    /// Something changed, and nobody here can tell what.
    Unreadable,
}

/// The effect of a change on a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The list had the change already.
    Known,
    /// The list has the change now.
    Taken,
    /// The list missed something, and must be asked for again.
    Stale,
    /// No list of the user is kept.
    NotKept,
}

/// The reason why a user's server tells this one of changes: the user and a user of ours are in a room, and have been all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Witness {
    room: RoomNum,
    member: EventNum,
    own: UserNum,
    own_since: Position,
}

impl Witness {
    /// Finds witnesses for those of some users with whom a user of ours shares a room. The search ends after a bounded number of
    /// look-ups, so that it may miss some: their lists are asked for each time.
    pub fn find_many(
        read: &(impl Read + ?Sized),
        own: UserNum,
        mut user_ids: Vec<OwnedUserId>,
    ) -> Result<BTreeMap<OwnedUserId, Self>, Fault> {
        let (mut found, mut looked_up) = (BTreeMap::new(), 0);
        let rooms = members::list_joined_rooms(read, own)?;
        let of_own = members::find_many(read, own, rooms.iter().copied())?;
        for (room, of_own) in rooms.into_iter().zip(of_own) {
            let Some(own_since) = of_own.map(|row| row.since) else { continue };
            if user_ids.is_empty() || looked_up >= LOOKED_UP_MAX {
                break;
            }
            looked_up += user_ids.len();
            for some in user_ids.chunks(LOOKED_UP_AT_ONCE) {
                let keys = state::find_keys(read, room, MEMBER, some.iter().map(|user| user.as_str()))?;
                let joined =
                    members::list_memberships(read, room, keys.iter().flatten().copied().collect(), None)?;
                for (user_id, key) in some.iter().zip(keys) {
                    let member = key.and_then(|key| joined.get(&key));
                    if let Some((member, Membership::Join)) = member {
                        found.insert(user_id.clone(), Self { room, member: *member, own, own_since });
                    }
                }
            }
            user_ids.retain(|user_id| !found.contains_key(user_id));
        }
        Ok(found)
    }

    /// Finds a witness for a user who is joined to some of these rooms, in one of which somebody of ours may be.
    pub fn find_in(
        read: &(impl Read + ?Sized),
        rooms: &[RoomNum],
        user_id: &UserId,
    ) -> Result<Option<Self>, Fault> {
        for room in rooms {
            let Some(own) = members::joined_local_users(read, *room)?.next().transpose()? else { continue };
            let Some(of_own) = members::find(read, own, *room)? else { continue };
            let Some(member) = find_member(read, *room, user_id)? else { continue };
            return Ok(Some(Self { room: *room, member, own, own_since: of_own.since }));
        }
        Ok(None)
    }

    /// Whether nothing has come between since the witness was found. A user who changes their name in the room ends it, too: this
    /// costs one more question to their server, and saves looking over the history.
    pub fn holds(&self, read: &(impl Read + ?Sized), user_id: &UserId) -> Result<bool, Fault> {
        let own = members::find(read, self.own, self.room)?;
        let is_in = |row: schema::rooms::UserRoomRow| {
            row.membership == Membership::Join && row.since == self.own_since
        };
        Ok(own.is_some_and(is_in) && find_member(read, self.room, user_id)? == Some(self.member))
    }

    fn of(row: &OtherListRow) -> Option<Self> {
        let own_since = Position::new(row.own_since)?;
        Some(Self { room: RoomNum(row.room), member: EventNum(row.member), own: UserNum(row.own), own_since })
    }
}

/// The event by which a user is joined to a room.
fn find_member(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    user_id: &UserId,
) -> Result<Option<EventNum>, Fault> {
    let Some(key) = state::find_key(read, room, MEMBER, user_id.as_str())? else { return Ok(None) };
    let joined = members::list_memberships(read, room, vec![key], None)?;
    let joined = joined.get(&key).filter(|(_, membership)| *membership == Membership::Join);
    Ok(joined.map(|(event, _)| *event))
}

/// A user of ours who wants to know of lists that are kept, with the rooms that the user is in.
pub struct Asker {
    /// The rooms, by when the user came.
    rooms: Vec<(Position, RoomNum)>,
    looked_up: usize,
}

impl Asker {
    /// Reads the rooms of a user of ours.
    pub fn new(read: &(impl Read + ?Sized), own: UserNum) -> Result<Self, Fault> {
        let mut rooms = Vec::new();
        for row in members::list_user_rooms(read, own)? {
            let (room, row) = row?;
            if row.membership == Membership::Join {
                rooms.push((row.since, room));
            }
        }
        rooms.sort_unstable();
        Ok(Self { rooms, looked_up: 0 })
    }

    /// Whether a list is kept of a user that is current, and the asker has come to no room with its user since it was asked for. After a
    /// bounded number of look-ups none counts any more, so that its user's server is asked.
    pub fn may_use(&mut self, read: &Snapshot, user_id: &UserId) -> Result<bool, Fault> {
        let Some(row) = find_current(read, user_id)? else { return Ok(false) };
        let old = self.rooms.partition_point(|(since, _)| since.number() <= row.asked_upto);
        for (_, room) in self.rooms.iter().skip(old) {
            if self.looked_up >= LOOKED_UP_MAX {
                return Ok(false);
            }
            self.looked_up += 1;
            if find_member(read, *room, user_id)?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Whether somebody of ours has come to one of these rooms of a user since the list that is kept of the user was asked for. A bounded
/// number of our users is looked at in each room.
pub fn has_anybody_come_since(
    read: &(impl Read + ?Sized),
    rooms: &[RoomNum],
    user_id: &UserId,
) -> Result<bool, Fault> {
    let Some(row) = find(read, user_id)? else { return Ok(false) };
    for room in rooms {
        for own in members::joined_local_users(read, *room)?.take(OWN_LOOKED_AT_MAX) {
            if members::find(read, own?, *room)?.is_some_and(|own| own.since.number() > row.asked_upto) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Whether a list was asked for before the incarnation that a position is of. The store went back in time since, so that a change may
/// have been told of which nothing is known any more.
fn is_doubted(row: &OtherListRow, now: Position) -> bool {
    Position::new(row.asked_upto).unwrap_or_default().incarnation() < now.incarnation()
}

/// Whether a list is kept of a user that was asked for before this incarnation of the store.
pub fn is_from_before(read: &Snapshot, user_id: &UserId) -> Result<bool, Fault> {
    Ok(find(read, user_id)?.is_some_and(|row| is_doubted(&row, read.upto())))
}

/// Whether a list is kept of a user that is known to be what the user's server would answer now.
pub fn is_current(read: &Snapshot, user_id: &UserId) -> Result<bool, Fault> {
    Ok(find_current(read, user_id)?.is_some())
}

fn find_current(read: &Snapshot, user_id: &UserId) -> Result<Option<OtherListRow>, Fault> {
    let row = find(read, user_id)?.filter(|row| !row.is_stale && !is_doubted(row, read.upto()));
    let Some(row) = row else { return Ok(None) };
    match Witness::of(&row) {
        Some(witness) if witness.holds(read, user_id)? => Ok(Some(row)),
        Some(_) | None => Ok(None),
    }
}

/// The row of the list that is kept of a user, without the devices.
pub fn find(read: &(impl Read + ?Sized), user_id: &UserId) -> Result<Option<OtherListRow>, Fault> {
    let key = (user_id.server_name().as_str(), user_id.as_str());
    Ok(schema::OTHER_LIST.get(read, key)?.map(|Json(row)| row))
}

/// Lists the devices of a list that is kept, by id.
pub fn list_devices(
    read: &(impl Read + ?Sized),
    user_id: &UserId,
) -> Result<Vec<(OwnedDeviceId, OtherDevice)>, Fault> {
    let rows =
        schema::OTHER_DEVICE.prefix::<(String,)>(read, (user_id.as_str(),), Direction::Up)?.take(DEVICES_MAX);
    rows.map(|row| {
        let ((_, id), Json(OtherDeviceRow { keys, display_name })) = row?;
        Ok((OwnedDeviceId::from(id), OtherDevice { keys, display_name }))
    })
    .collect()
}

/// The state of things when a list is asked for.
#[derive(Clone, Copy, Debug)]
pub struct AskedAt {
    /// When the list last was noted as changed.
    changed: Option<Position>,
    upto: Position,
}

impl AskedAt {
    /// Looks at what is known of a user before the user's list is asked for. `read` has all that was accepted, and `upto` is a position up
    /// to which that is so.
    pub fn now(read: &(impl Read + ?Sized), user_id: &UserId, upto: Position) -> Result<Self, Fault> {
        Ok(Self { changed: device_lists::find_changed(read, user_id)?, upto })
    }
}

/// Keeps a list that a user's server answered, in place of the one that was kept. Where it has changed since it was asked for, the answer
/// may be older than the change, and the list is stale. Answers
/// whether the list is stale; one that is too large, or one list too many of its server, is not kept at all. If the list that was kept is from
/// before this incarnation, and another one, it is noted as changed, because a change that was told may be lost. The caller
/// holds the lock that stands for the server.
pub fn keep(
    batch: &mut Batch,
    user_id: &UserId,
    list: &OtherList,
    witness: Witness,
    asked_at: AskedAt,
) -> Result<bool, Fault> {
    let is_stale = device_lists::find_changed(batch, user_id)? != asked_at.changed;
    if let Some(before) = find(batch, user_id)?
        && is_doubted(&before, asked_at.upto)
        && !is_same(batch, user_id, &before, list)?
    {
        device_lists::changed_elsewhere(batch, user_id)?;
        batch.wake(Wake::InRooms { rooms: [witness.room].into() });
    }
    forget(batch, user_id)?;
    let mut row = OtherListRow {
        streams: vec![list.stream_id],
        is_stale,
        devices: list.devices.len() as u64,
        bytes: 0,
        master_key: list.master_key.clone(),
        self_signing_key: list.self_signing_key.clone(),
        room: witness.room.0,
        member: witness.member.0,
        own: witness.own.0,
        own_since: witness.own_since.number(),
        asked_upto: asked_at.upto.number(),
    };
    row.bytes =
        of_signing_keys(&row) + list.devices.iter().map(|(id, device)| bytes_of(id, device)).sum::<u64>();
    let count = count_of(batch, user_id)?;
    let is_too_much = list.devices.len() > DEVICES_MAX || row.bytes > BYTES_MAX;
    if is_too_much
        || count.users >= USERS_OF_SERVER_MAX
        || count.bytes.saturating_add(row.bytes) > BYTES_OF_SERVER_MAX
    {
        tracing::debug!(%user_id, devices = row.devices, bytes = row.bytes, is_too_much, reason = "too much", "a device list is not kept");
        return Ok(false);
    }
    for (id, device) in &list.devices {
        put_device(batch, user_id, id, device);
    }
    let is_stale = row.is_stale;
    let count = OtherCount { users: count.users + 1, bytes: count.bytes + row.bytes };
    schema::OTHER_COUNT.put(batch, user_id.server_name().as_str(), &count);
    put(batch, user_id, row);
    Ok(is_stale)
}

/// Whether a list that is kept has the same devices and keys as this one.
fn is_same(
    read: &(impl Read + ?Sized),
    user_id: &UserId,
    kept: &OtherListRow,
    list: &OtherList,
) -> Result<bool, Fault> {
    let are_keys_same = kept.master_key == list.master_key && kept.self_signing_key == list.self_signing_key;
    Ok(are_keys_same && list_devices(read, user_id)?.iter().map(|(id, it)| (id, it)).eq(&list.devices))
}

/// Has a change come into the list that is kept of a user. The caller holds the lock that stands for the server.
pub fn apply(batch: &mut Batch, user_id: &UserId, change: Change) -> Result<Outcome, Fault> {
    let Some(mut row) = find(batch, user_id)? else { return Ok(Outcome::NotKept) };
    match change {
        Change::SigningKeys { master_key, self_signing_key } => {
            let before = row.clone();
            // A new master key has not signed the key that came with the old one.
            if master_key.is_some() && !is_same_key(master_key.as_deref(), row.master_key.as_deref()) {
                row.self_signing_key = None;
            }
            row.master_key = master_key.or(row.master_key);
            row.self_signing_key = self_signing_key.or(row.self_signing_key);
            if row == before {
                return Ok(Outcome::Known);
            }
            row.bytes = row.bytes + of_signing_keys(&row) - of_signing_keys(&before);
            replace(batch, user_id, &before, row)
        }
        Change::Device { stream_id, prev_ids, device_id, device } => {
            let before = row.clone();
            // A change that names none before it begins a new count, so that it says nothing of what was missed.
            let has_begun = prev_ids.is_empty();
            if row.is_stale || has_begun {
                return make_stale(batch, user_id, row);
            }
            // A list that was just asked for has the change already, whatever came before it.
            if row.streams.contains(&stream_id) {
                return Ok(Outcome::Known);
            }
            if !prev_ids.iter().all(|prev_id| row.streams.contains(prev_id)) {
                return make_stale(batch, user_id, row);
            }
            row.streams.push(stream_id);
            if row.streams.len() > STREAMS_MAX {
                row.streams.remove(0);
            }
            let key = (user_id.as_str(), device_id.as_str());
            if let Some(Json(OtherDeviceRow { keys, display_name })) = schema::OTHER_DEVICE.get(batch, key)? {
                row.bytes -= bytes_of(&device_id, &OtherDevice { keys, display_name }).min(row.bytes);
                row.devices = row.devices.saturating_sub(1);
                schema::OTHER_DEVICE.delete(batch, key);
            }
            if let Some(device) = device {
                row.bytes += bytes_of(&device_id, &device);
                row.devices += 1;
                put_device(batch, user_id, &device_id, &device);
            }
            replace(batch, user_id, &before, row)
        }
        Change::Unreadable => make_stale(batch, user_id, row),
    }
}

/// Whether both are the same key, whoever has signed it.
fn is_same_key(one: Option<&str>, other: Option<&str>) -> bool {
    let part = |key: Option<&str>| Some(Signable::parse(key?.as_bytes())?.signed_part());
    part(one) == part(other)
}

fn make_stale(batch: &mut Batch, user_id: &UserId, row: OtherListRow) -> Result<Outcome, Fault> {
    if !row.is_stale {
        put(batch, user_id, OtherListRow { is_stale: true, ..row });
    }
    Ok(Outcome::Stale)
}

/// Writes a row in place of another. A list that has become too large is forgotten.
fn replace(
    batch: &mut Batch,
    user_id: &UserId,
    before: &OtherListRow,
    row: OtherListRow,
) -> Result<Outcome, Fault> {
    let count = count_of(batch, user_id)?;
    let bytes = (count.bytes + row.bytes).saturating_sub(before.bytes);
    let is_too_much = row.devices > DEVICES_MAX as u64 || row.bytes > BYTES_MAX;
    if is_too_much || bytes > BYTES_OF_SERVER_MAX {
        tracing::debug!(%user_id, devices = row.devices, bytes = row.bytes, is_too_much, reason = "too much", "a device list is not kept any more");
        forget(batch, user_id)?;
        return Ok(Outcome::NotKept);
    }
    schema::OTHER_COUNT.put(batch, user_id.server_name().as_str(), &OtherCount { bytes, ..count });
    put(batch, user_id, row);
    Ok(Outcome::Taken)
}

/// Forgets the list that is kept of a user, if there is one. The caller holds the lock that stands for the server.
pub fn forget(batch: &mut Batch, user_id: &UserId) -> Result<(), Fault> {
    let Some(row) = find(batch, user_id)? else { return Ok(()) };
    let server = user_id.server_name().as_str();
    schema::OTHER_DEVICE.delete_prefix::<(String,)>(batch, (user_id.as_str(),));
    schema::OTHER_LIST.delete(batch, (server, user_id.as_str()));
    let count = count_of(batch, user_id)?;
    let (users, bytes) = (count.users.saturating_sub(1), count.bytes.saturating_sub(row.bytes));
    if users == 0 {
        schema::OTHER_COUNT.delete(batch, server);
    } else {
        schema::OTHER_COUNT.put(batch, server, &OtherCount { users, bytes });
    }
    Ok(())
}

/// The server and the user of a list that is kept.
pub type Place = (String, String);

/// Lists some of the users whose lists are kept, after this one, by server. Answers where to go on, if there may be more.
pub fn list_kept(
    read: &(impl Read + ?Sized),
    after: Option<Place>,
    count: usize,
) -> Result<(Vec<OwnedUserId>, Option<Place>), Fault> {
    let low = after.as_ref().map_or(Bound::Unbounded, |(server, user)| Bound::Excluded((&**server, &**user)));
    let rows = schema::OTHER_LIST.range::<(String, String)>(read, low, Bound::Unbounded, Direction::Up)?;
    let keys = rows.take(count).map(|row| row.map(|(key, _)| key)).collect::<Result<Vec<_>, _>>()?;
    let goes_on = keys.last().filter(|_| keys.len() == count).cloned();
    let user_ids = keys.iter().filter_map(|(_, user_id)| UserId::parse(user_id).ok()).collect();
    Ok((user_ids, goes_on))
}

fn put(batch: &mut Batch, user_id: &UserId, row: OtherListRow) {
    schema::OTHER_LIST.put(batch, (user_id.server_name().as_str(), user_id.as_str()), &Json(row));
}

fn put_device(batch: &mut Batch, user_id: &UserId, id: &OwnedDeviceId, device: &OtherDevice) {
    let row = OtherDeviceRow { keys: device.keys.clone(), display_name: device.display_name.clone() };
    schema::OTHER_DEVICE.put(batch, (user_id.as_str(), id.as_str()), &Json(row));
}

fn count_of(read: &(impl Read + ?Sized), user_id: &UserId) -> Result<OtherCount, Fault> {
    Ok(schema::OTHER_COUNT.get(read, user_id.server_name().as_str())?.unwrap_or_default())
}

/// The bytes that a device counts for.
pub(super) fn bytes_of(id: &OwnedDeviceId, device: &OtherDevice) -> u64 {
    let name = device.display_name.as_ref().map_or(0, String::len);
    (id.as_str().len() + device.keys.len() + name) as u64
}

/// The bytes that the keys count for with which a user signs.
pub(super) fn of_signing_keys(row: &OtherListRow) -> u64 {
    let length = |key: &Option<String>| key.as_ref().map_or(0, String::len) as u64;
    length(&row.master_key) + length(&row.self_signing_key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    fn store() -> Store {
        Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap()
    }

    fn bob() -> OwnedUserId {
        "@bob:b.example".try_into().unwrap()
    }

    fn device(text: &str) -> OtherDevice {
        OtherDevice { keys: format!("{{\"k\":\"{text}\"}}"), display_name: None }
    }

    fn witness() -> Witness {
        Witness { room: RoomNum(1), member: EventNum(2), own: UserNum(3), own_since: Position::ZERO }
    }

    fn unchanged() -> AskedAt {
        AskedAt { changed: None, upto: Position::ZERO }
    }

    fn in_batch<T>(store: &Store, build: impl FnOnce(&mut Batch) -> T) -> T {
        let mut batch = store.batch(&Guard::alone());
        let answer = build(&mut batch);
        if batch.row_count() > 0 {
            drop(store.enqueue(batch).unwrap());
            store.flush().unwrap();
        }
        answer
    }

    fn list(stream_id: u64, devices: &[&str]) -> OtherList {
        let devices = devices.iter().map(|id| (OwnedDeviceId::from(*id), device(id)));
        OtherList { stream_id, devices: devices.collect(), ..OtherList::default() }
    }

    fn change(stream_id: u64, prev_ids: &[u64], id: &str, device: Option<OtherDevice>) -> Change {
        Change::Device { stream_id, prev_ids: prev_ids.to_vec(), device_id: id.into(), device }
    }

    fn devices(store: &Store) -> Vec<String> {
        let devices = list_devices(&store.view(), &bob()).unwrap();
        devices.into_iter().map(|(id, device)| format!("{id} {}", device.keys)).collect()
    }

    /// The counts are those of the rows that are there.
    fn check_counts(store: &Store) {
        let view = store.view();
        let count = schema::OTHER_COUNT.get(&view, "b.example").unwrap();
        let row = find(&view, &bob()).unwrap();
        assert_eq!(count.is_some(), row.is_some());
        let Some((count, row)) = count.zip(row) else { return };
        let devices = list_devices(&view, &bob()).unwrap();
        let bytes = devices.iter().map(|(id, device)| bytes_of(id, device)).sum::<u64>();
        assert_eq!((row.devices, row.bytes), (devices.len() as u64, bytes + of_signing_keys(&row)));
        assert_eq!(count, OtherCount { users: 1, bytes: row.bytes });
    }

    #[test]
    fn changes_that_follow_each_other_are_taken_once_and_others_make_the_list_stale() {
        let (store, bob) = (store(), bob());
        let apply = |change| in_batch(&store, |batch| apply(batch, &bob, change).unwrap());
        assert_eq!(apply(change(1, &[], "A", None)), Outcome::NotKept);
        let keep = |list| in_batch(&store, |batch| keep(batch, &bob, &list, witness(), unchanged()).unwrap());
        assert!(!keep(list(5, &["A", "B"])));
        check_counts(&store);
        assert_eq!(apply(change(6, &[5], "C", Some(device("c")))), Outcome::Taken);
        assert_eq!(apply(change(6, &[5], "C", None)), Outcome::Known);
        assert_eq!(
            apply(change(5, &[4], "B", None)),
            Outcome::Known,
            "it was in the list that was asked for"
        );
        assert_eq!(apply(change(7, &[6], "A", None)), Outcome::Taken);
        assert_eq!(apply(change(8, &[7, 6], "B", Some(device("b2")))), Outcome::Taken);
        assert_eq!(devices(&store), [r#"B {"k":"b2"}"#, r#"C {"k":"c"}"#]);
        check_counts(&store);
        let keys = |master: &str, self_signing: Option<&str>| Change::SigningKeys {
            master_key: Some(master.to_owned()),
            self_signing_key: self_signing.map(str::to_owned),
        };
        let signing = || find(&store.view(), &bob).unwrap().unwrap().self_signing_key;
        assert_eq!(apply(keys(r#"{"k":1}"#, Some("{}"))), Outcome::Taken);
        assert_eq!(apply(keys(r#"{"k":1}"#, Some("{}"))), Outcome::Known);
        check_counts(&store);
        assert_eq!(apply(keys(r#"{"k":1,"signatures":{"@bob:b.example":{}}}"#, None)), Outcome::Taken);
        assert_eq!(signing().as_deref(), Some("{}"), "the same key was signed by a device");
        assert_eq!(apply(keys(r#"{"k":2}"#, None)), Outcome::Taken);
        assert_eq!(signing(), None, "the new master key has signed no such key");
        check_counts(&store);
        assert_eq!(apply(change(10, &[9], "D", Some(device("d")))), Outcome::Stale);
        assert_eq!(apply(change(11, &[10], "D", Some(device("d")))), Outcome::Stale);
        assert_eq!(devices(&store).len(), 2, "a stale list takes nothing");
        assert!(!is_current(&store.snapshot(), &bob).unwrap());
        assert!(!keep(list(11, &["D"])));
        assert_eq!(devices(&store), [r#"D {"k":"D"}"#]);
        check_counts(&store);
        assert_eq!(apply(change(12, &[], "D", None)), Outcome::Stale, "it may have missed something");
        in_batch(&store, |batch| forget(batch, &bob).unwrap());
        check_counts(&store);
        assert!(devices(&store).is_empty());
    }

    #[test]
    fn an_answer_that_a_change_overtook_is_stale() {
        let (store, bob) = (store(), bob());
        in_batch(&store, |batch| device_lists::changed_elsewhere(batch, &bob).unwrap());
        let asked_at = AskedAt::now(&store.view(), &bob, Position::ZERO).unwrap();
        let keep =
            || in_batch(&store, |batch| keep(batch, &bob, &list(5, &["A"]), witness(), asked_at).unwrap());
        assert!(!keep());
        in_batch(&store, |batch| device_lists::changed_elsewhere(batch, &bob).unwrap());
        assert!(keep());
        check_counts(&store);
    }

    #[test]
    fn a_list_from_before_a_restore_counts_no_more_and_is_news_where_it_has_become_another() {
        let (store, bob) = (store(), bob());
        in_batch(&store, |batch| keep(batch, &bob, &list(5, &["A"]), witness(), unchanged()).unwrap());
        assert!(!is_from_before(&store.snapshot(), &bob).unwrap());
        let ended = store.snapshot().upto();
        store.begin_incarnation(0, ended).unwrap();
        assert!(is_from_before(&store.snapshot(), &bob).unwrap());
        let again = |list: &OtherList| {
            let upto = store.snapshot().upto();
            let asked_at = AskedAt::now(&store.view(), &bob, upto).unwrap();
            in_batch(&store, |batch| keep(batch, &bob, list, witness(), asked_at).unwrap())
        };
        let changed = || device_lists::find_changed(&store.view(), &bob).unwrap();
        assert!(!again(&list(9, &["A"])));
        assert_eq!(changed(), None, "it is still the same");
        assert!(!is_from_before(&store.snapshot(), &bob).unwrap());
        assert!(!again(&list(9, &["B"])));
        assert_eq!(
            changed(),
            None,
            "changes that are told within one incarnation are noted as they are told"
        );
        store.begin_incarnation(1, store.snapshot().upto()).unwrap();
        assert!(!again(&list(9, &["C"])), "it is noted as changed, and is what it was changed to");
        assert_eq!(changed().map(Position::incarnation), Some(2));
        check_counts(&store);
    }

    #[test]
    fn lists_are_bounded_and_one_that_grows_too_large_is_forgotten() {
        let (store, bob) = (store(), bob());
        let keep = |list| in_batch(&store, |batch| keep(batch, &bob, &list, witness(), unchanged()).unwrap());
        let ids: Vec<String> = (0..=DEVICES_MAX).map(|number| number.to_string()).collect();
        let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
        keep(list(1, &ids));
        assert_eq!(find(&store.view(), &bob).unwrap(), None);
        keep(list(1, &ids[1..]));
        assert_eq!(find(&store.view(), &bob).unwrap().unwrap().devices, DEVICES_MAX as u64);
        let apply = |change| in_batch(&store, |batch| apply(batch, &bob, change).unwrap());
        assert_eq!(apply(change(2, &[1], "one more", Some(device("x")))), Outcome::NotKept);
        check_counts(&store);
        keep(list(1, &["A"]));
        let large = OtherDevice { keys: "x".repeat(BYTES_MAX as usize + 1), display_name: None };
        assert_eq!(apply(change(2, &[1], "A", Some(large))), Outcome::NotKept);
        check_counts(&store);
        let full = OtherCount { users: USERS_OF_SERVER_MAX, bytes: 0 };
        in_batch(&store, |batch| schema::OTHER_COUNT.put(batch, "b.example", &full));
        keep(list(1, &["A"]));
        assert_eq!(find(&store.view(), &bob).unwrap(), None);
    }

    #[test]
    fn many_changes_leave_a_bounded_memory_of_them() {
        let (store, bob) = (store(), bob());
        in_batch(&store, |batch| keep(batch, &bob, &list(1, &[]), witness(), unchanged()).unwrap());
        for stream_id in 2..100 {
            let change = change(stream_id, &[stream_id - 1], "A", Some(device("a")));
            assert_eq!(in_batch(&store, |batch| apply(batch, &bob, change).unwrap()), Outcome::Taken);
        }
        let row = find(&store.view(), &bob).unwrap().unwrap();
        assert_eq!((row.streams.len(), row.streams.last()), (STREAMS_MAX, Some(&99)));
    }
}
