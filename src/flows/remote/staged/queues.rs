//! How many events wait, and whose they are, so that nobody's events take the places of all others.
//!
//! Names of servers cost nothing, so that events count for the owner of their server's name and for the address that sent them. Of all
//! places, a holder may have one part in eight of what is free afterwards: alone, that is a ninth of all. Where a holder may have no more, or a
//! room is full, whoever has most gives way to who has less. Where nobody else does, whichever tenant of the same holder has most gives way to
//! one that has less (`tenants.rs`), so that nobody shuts out their neighbours.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
    sync::Arc,
};

use bytes::Bytes;
use ruma::{OwnedEventId, OwnedServerName, ServerName};
use tokio::sync::Notify;

use crate::{
    env::payer::{Payer, Payers},
    flows::remote::tenants::Tenant,
    ids::RoomNum,
    rooms::change::invited::Source,
    schema::remote::InboundEventRow,
};

/// One server has at most this many events here.
const OF_ORIGIN: Bounds = Bounds { events: 2_000, bytes: 32 << 20 };
/// One room has at most this many events here.
const OF_ROOM: Bounds = Bounds { events: 1_000, bytes: 16 << 20 };
/// One server has at most this many events of one room here.
const OF_ORIGIN_IN_ROOM: Bounds = Bounds { events: 500, bytes: 8 << 20 };
/// Servers that have nobody in a room have at most this many events of it here.
const OF_STRANGERS_IN_ROOM: Bounds = Bounds { events: 100, bytes: 2 << 20 };
/// One of them has at most this many, so that one that nobody knows does not keep out others.
const OF_STRANGER_IN_ROOM: Bounds = Bounds { events: 20, bytes: 512 << 10 };
/// All together are at most this many, because their ids are in memory.
const OF_ALL: Bounds = Bounds { events: 50_000, bytes: 512 << 20 };
/// A holder may have one part in this many of what is free.
const SHARE: usize = 8;
/// At most this many events give way to one.
const GIVE_WAY_MAX: usize = 20;

/// A number of events, and of their bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Bounds {
    events: usize,
    bytes: usize,
}

impl Bounds {
    fn has_room_for(self, held: Self, bytes: usize) -> bool {
        held.events < self.events && held.bytes.saturating_add(bytes) <= self.bytes
    }

    /// Whether one event more leaves free [`SHARE`] times what its holder has then.
    fn leaves_room(self, all: Self, held: Self, bytes: usize) -> bool {
        let fits = |max: usize, all: usize, held: usize, more: usize| {
            let free = max.checked_sub(all.saturating_add(more));
            free.is_some_and(|free| held.saturating_add(more).saturating_mul(SHARE) <= free)
        };
        fits(self.events, all.events, held.events, 1) && fits(self.bytes, all.bytes, held.bytes, bytes)
    }

    /// The part of these bounds that somebody holds, as a number by which holders are compared.
    fn weight(self, held: Self) -> usize {
        let by_events = held.events.saturating_mul(self.bytes);
        by_events.max(held.bytes.saturating_mul(self.events))
    }

    fn with(mut self, bytes: usize) -> Self {
        self.add(bytes);
        self
    }

    fn add(&mut self, bytes: usize) {
        self.events += 1;
        self.bytes += bytes;
    }

    fn take(&mut self, bytes: usize) {
        self.events = self.events.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// The server that sent an event, and what it counts for.
#[derive(Clone, Debug)]
pub(super) struct Sender {
    pub(super) origin: OwnedServerName,
    tenant: Tenant,
    /// The network that the request came from, where that is known.
    network: Option<u128>,
    /// Whether the server has nobody in the room.
    is_stranger: bool,
}

impl Sender {
    /// The server that had these payers' request made.
    pub(super) fn new(origin: &ServerName, payers: Payers, is_stranger: bool) -> Self {
        let network = match payers.narrowest() {
            Payer::Address(address) => Some(wide(address)),
            _ => None,
        };
        Self { network, is_stranger, ..Self::of(origin.to_owned()) }
    }

    /// A server that is in the room. Nothing more is known of its request.
    pub(super) fn of(origin: OwnedServerName) -> Self {
        let tenant = Tenant::of(&origin);
        Self { origin, tenant, network: None, is_stranger: false }
    }

    fn holders(&self) -> impl Iterator<Item = Holder> {
        let network = self.network.map(Holder::Network);
        [Some(Holder::Owner(self.tenant.owner().clone())), network].into_iter().flatten()
    }
}

/// The network that somebody has to themselves: of IPv6 that of 48 bits, because smaller ones are given away by the thousand.
fn wide(address: u128) -> u128 {
    let is_v4 = Ipv6Addr::from_bits(address).to_ipv4_mapped().is_some();
    if is_v4 { address } else { address >> 80 << 80 }
}

/// Somebody for whom events count.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    Owner(Source),
    Network(u128),
}

#[derive(Debug, Default)]
struct Held {
    size: Bounds,
    numbers: BTreeSet<u64>,
}

impl Held {
    fn add(&mut self, number: u64, bytes: usize) {
        self.size.add(bytes);
        self.numbers.insert(number);
    }

    fn take(&mut self, number: u64, bytes: usize) {
        self.size.take(bytes);
        self.numbers.remove(&number);
    }
}

/// The events that count for a holder, by tenant.
#[derive(Debug, Default)]
struct OfHolder {
    size: Bounds,
    tenants: BTreeMap<Tenant, Held>,
}

impl OfHolder {
    fn add(&mut self, number: u64, (tenant, bytes): (&Tenant, usize)) {
        self.size.add(bytes);
        self.tenants.entry(tenant.clone()).or_default().add(number, bytes);
    }

    fn take(&mut self, number: u64, (tenant, bytes): (&Tenant, usize)) {
        self.size.take(bytes);
        if let Some(held) = self.tenants.get_mut(tenant) {
            held.take(number, bytes);
            if held.numbers.is_empty() {
                self.tenants.remove(tenant);
            }
        }
    }

    /// The tenant that has most, with the weight of what it has.
    fn find_largest(&self) -> Option<(usize, &Held)> {
        let weights = self.tenants.values().map(|held| (OF_ALL.weight(held.size), held));
        weights.max_by_key(|(weight, _)| *weight)
    }
}

/// The size of somebody's events in a room, and the last of them that may give way.
#[derive(Clone, Copy, Debug, Default)]
struct InRoom {
    size: Bounds,
    last: Option<u64>,
}

/// The events in a room that came from tenants of one owner.
#[derive(Debug, Default)]
struct OwnersInRoom<'a> {
    size: Bounds,
    tenants: BTreeMap<&'a Tenant, InRoom>,
}

impl OwnersInRoom<'_> {
    /// The last event of whichever tenant has most, with the weight of what it has.
    fn find_largest(&self) -> Option<(usize, u64)> {
        let tenants = self.tenants.values().filter_map(|of| Some((OF_ROOM.weight(of.size), of.last?)));
        tenants.max()
    }
}

/// The events that wait.
#[derive(Debug, Default)]
pub(super) struct Queues {
    waiting: BTreeMap<u64, Waiting>,
    rooms: BTreeMap<RoomNum, OfRoom>,
    origins: BTreeMap<OwnedServerName, Bounds>,
    holders: BTreeMap<Holder, OfHolder>,
    all: Bounds,
    /// The number that the next event gets; numbers rise over all rooms.
    next: u64,
}

#[derive(Debug)]
struct Waiting {
    room: RoomNum,
    id: OwnedEventId,
    sender: Sender,
    bytes: usize,
    /// Whether its row is written, so that it may give way.
    is_written: bool,
}

/// The events of a room that wait.
#[derive(Debug, Default)]
struct OfRoom {
    /// Each by its name and its sender: the name says nothing of the signatures, so that another server's copy may be a forged one.
    copies: BTreeSet<(OwnedEventId, OwnedServerName)>,
    size: Bounds,
    /// The size of those whose servers have nobody in the room.
    strangers: Bounds,
    lines: BTreeMap<Tenant, Line>,
}

/// The events of a room that came from one tenant. They have a worker of their own.
#[derive(Debug, Default)]
struct Line {
    held: Held,
    has_worker: bool,
    hurry: Arc<Notify>,
}

/// The outcome of adding an event to those that wait.
pub(super) enum Added {
    /// It is to be written as this row, under this number.
    New(u64, InboundEventRow),
    /// It waits here already, as the same server sent it before.
    IsHere,
    /// There is no room for it.
    NoRoom,
}

/// The rows of events that gave way, by room and number. They are to be deleted.
pub(super) type GaveWay = Vec<(RoomNum, u64)>;

impl Queues {
    /// Counts an event that is stored.
    pub(super) fn count_stored(
        &mut self,
        (room, number): (RoomNum, u64),
        row: InboundEventRow,
        (origin, is_stranger): (OwnedServerName, bool),
    ) {
        self.next = self.next.max(number.saturating_add(1));
        let (sender, bytes) = (Sender { is_stranger, ..Sender::of(origin) }, row.json.len());
        self.insert(number, Waiting { room, id: row.id, sender, bytes, is_written: true });
    }

    /// Counts an event, if it is new and there is room for it. Others may give way to it where the caller deletes their rows.
    pub(super) fn add(
        &mut self,
        room: RoomNum,
        sender: &Sender,
        (id, json): (OwnedEventId, Bytes),
        received_ms: u64,
        gave_way: Option<&mut GaveWay>,
    ) -> Added {
        let copy = (id, sender.origin.clone());
        if self.rooms.get(&room).is_some_and(|of_room| of_room.copies.contains(&copy)) {
            return Added::IsHere;
        }
        let (id, _) = copy;
        let bytes = json.len();
        if !self.make_room(room, sender, bytes, gave_way) {
            return Added::NoRoom;
        }
        let number = self.next;
        self.next += 1;
        let (origin, sender) = (sender.origin.to_string(), sender.clone());
        self.insert(number, Waiting { room, id: id.clone(), sender, bytes, is_written: false });
        Added::New(number, InboundEventRow { origin, id, received_ms, json })
    }

    /// Whether there is room for an event of so many bytes, where need be after others gave way.
    fn make_room(
        &mut self,
        room: RoomNum,
        sender: &Sender,
        bytes: usize,
        mut gave_way: Option<&mut GaveWay>,
    ) -> bool {
        let of_origin = if sender.is_stranger { OF_STRANGER_IN_ROOM } else { OF_ORIGIN_IN_ROOM };
        if !of_origin.has_room_for(self.of_origin_in(room, sender), bytes) {
            return false;
        }
        let mut left = GIVE_WAY_MAX;
        let mut give_way = |queues: &mut Self, number: Option<u64>| {
            let (Some(number), Some(gone)) = (number, gave_way.as_deref_mut()) else { return false };
            if left == 0 {
                return false;
            }
            left -= 1;
            gone.extend(queues.remove(number).map(|room| (room, number)));
            true
        };
        while !self.has_room_in(room, sender, bytes) {
            let number = self.find_giving_way_in(room, sender, bytes);
            if !give_way(self, number) {
                return false;
            }
        }
        if self.is_within_shares(sender, bytes) {
            return true;
        }
        loop {
            let number = self.find_giving_way(sender, bytes);
            if !give_way(self, number) {
                return false;
            }
            if OF_ALL.has_room_for(self.all, bytes) {
                return true;
            }
        }
    }

    fn of_origin_in(&self, room: RoomNum, sender: &Sender) -> Bounds {
        let line = self.rooms.get(&room).and_then(|of_room| of_room.lines.get(&sender.tenant));
        let waiting = line.into_iter().flat_map(|line| &line.held.numbers);
        let waiting = waiting.filter_map(|number| self.waiting.get(number));
        let waiting = waiting.filter(|waiting| waiting.sender.origin == sender.origin);
        waiting.fold(Bounds::default(), |held, waiting| held.with(waiting.bytes))
    }

    fn has_room_in(&self, room: RoomNum, sender: &Sender, bytes: usize) -> bool {
        let Some(of_room) = self.rooms.get(&room) else { return true };
        let has_strangers_room = OF_STRANGERS_IN_ROOM.has_room_for(of_room.strangers, bytes);
        OF_ROOM.has_room_for(of_room.size, bytes) && (has_strangers_room || !sender.is_stranger)
    }

    /// Finds the event of a room that gives way to one of this sender: the last of whoever has most there. Strangers have only others like
    /// themselves give way.
    fn find_giving_way_in(&self, room: RoomNum, sender: &Sender, bytes: usize) -> Option<u64> {
        let mut owners = BTreeMap::<&Source, OwnersInRoom<'_>>::new();
        for line in self.rooms.get(&room)?.lines.values() {
            for (number, waiting) in
                line.held.numbers.iter().filter_map(|it| Some((it, self.waiting.get(it)?)))
            {
                if waiting.sender.is_stranger || !sender.is_stranger {
                    let tenant = &waiting.sender.tenant;
                    let of_owner = owners.entry(tenant.owner()).or_default();
                    of_owner.size.add(waiting.bytes);
                    let of_tenant = of_owner.tenants.entry(tenant).or_default();
                    of_tenant.size.add(waiting.bytes);
                    of_tenant.last = waiting.is_written.then_some(*number).or(of_tenant.last);
                }
            }
        }
        let mut own = owners.remove(sender.tenant.owner()).unwrap_or_default();
        let others =
            owners.into_values().filter_map(|of| Some((OF_ROOM.weight(of.size), of.find_largest()?)));
        let most = others.max().filter(|(weight, _)| *weight > OF_ROOM.weight(own.size.with(bytes)));
        if let Some((_, (_, last))) = most {
            return Some(last);
        }
        let of_sender = own.tenants.remove(&sender.tenant).unwrap_or_default().size;
        let most = own.find_largest().filter(|(weight, _)| *weight > OF_ROOM.weight(of_sender.with(bytes)));
        most.map(|(_, last)| last)
    }

    fn is_within_shares(&self, sender: &Sender, bytes: usize) -> bool {
        sender.holders().all(|holder| OF_ALL.leaves_room(self.all, self.held_by(&holder), bytes))
    }

    fn held_by(&self, holder: &Holder) -> Bounds {
        self.holders.get(holder).map(|held| held.size).unwrap_or_default()
    }

    /// Finds the event that gives way to one of this sender: the last of whoever has most, if that is more than the sender would have. Where
    /// no other holder has more, it is that of a neighbour which has more than the sender's server would have. Nobody gives way to a server
    /// that is not in the room.
    fn find_giving_way(&self, sender: &Sender, bytes: usize) -> Option<u64> {
        if sender.is_stranger {
            return None;
        }
        let of = |holder: &Holder| OF_ALL.weight(self.held_by(holder).with(bytes));
        let (own, heaviest) = sender.holders().map(|holder| (of(&holder), holder)).max()?;
        let is_own = |holder: &Holder| sender.holders().any(|own| own == *holder);
        let others = self.holders.iter().filter(|(holder, _)| !is_own(holder));
        let most = others.map(|(_, of)| (OF_ALL.weight(of.size), of)).max_by_key(|(weight, _)| *weight);
        if let Some((_, largest)) = most.filter(|(weight, _)| *weight > own) {
            let (_, largest) = largest.find_largest()?;
            return self.find_last(largest);
        }
        let own = self.holders.get(&heaviest)?;
        let of_sender = own.tenants.get(&sender.tenant).map(|held| held.size).unwrap_or_default();
        let most = own.find_largest().filter(|(weight, _)| *weight > OF_ALL.weight(of_sender.with(bytes)));
        most.and_then(|(_, largest)| self.find_last(largest))
    }

    /// The last of these events that may give way.
    fn find_last(&self, held: &Held) -> Option<u64> {
        let is_written = |number: &&u64| self.waiting.get(number).is_some_and(|waiting| waiting.is_written);
        held.numbers.iter().rev().find(is_written).copied()
    }

    fn insert(&mut self, number: u64, waiting: Waiting) {
        let (sender, bytes) = (&waiting.sender, waiting.bytes);
        self.all.add(bytes);
        self.origins.entry(sender.origin.clone()).or_default().add(bytes);
        for holder in sender.holders() {
            self.holders.entry(holder).or_default().add(number, (&sender.tenant, bytes));
        }
        let of_room = self.rooms.entry(waiting.room).or_default();
        of_room.size.add(bytes);
        if sender.is_stranger {
            of_room.strangers.add(bytes);
        }
        of_room.copies.insert((waiting.id.clone(), sender.origin.clone()));
        of_room.lines.entry(sender.tenant.clone()).or_default().held.add(number, bytes);
        self.waiting.insert(number, waiting);
    }

    /// Counts an event no longer. Gives its room, if it was here.
    pub(super) fn remove(&mut self, number: u64) -> Option<RoomNum> {
        let Waiting { room, id, sender, bytes, .. } = self.waiting.remove(&number)?;
        self.all.take(bytes);
        if let Some(held) = self.origins.get_mut(&sender.origin) {
            held.take(bytes);
            if held.events == 0 {
                self.origins.remove(&sender.origin);
            }
        }
        for holder in sender.holders() {
            if let Some(held) = self.holders.get_mut(&holder) {
                held.take(number, (&sender.tenant, bytes));
                if held.tenants.is_empty() {
                    self.holders.remove(&holder);
                }
            }
        }
        if let Some(of_room) = self.rooms.get_mut(&room) {
            of_room.size.take(bytes);
            if sender.is_stranger {
                of_room.strangers.take(bytes);
            }
            of_room.copies.remove(&(id, sender.origin.clone()));
            if let Some(line) = of_room.lines.get_mut(&sender.tenant) {
                line.held.take(number, bytes);
            }
        }
        self.forget_idle(room, &sender.tenant);
        Some(room)
    }

    /// Forgets a line in which nothing waits, once it has no worker.
    fn forget_idle(&mut self, room: RoomNum, tenant: &Tenant) {
        let Some(of_room) = self.rooms.get_mut(&room) else { return };
        let is_idle = |line: &Line| line.held.numbers.is_empty() && !line.has_worker;
        if of_room.lines.get(tenant).is_some_and(is_idle) {
            of_room.lines.remove(tenant);
        }
        if of_room.lines.is_empty() {
            self.rooms.remove(&room);
        }
    }

    /// Notes that the row of an event is written.
    pub(super) fn note_written(&mut self, number: u64) {
        if let Some(waiting) = self.waiting.get_mut(&number) {
            waiting.is_written = true;
        }
    }

    /// Whether a server may have one event more here.
    pub(super) fn has_room_for_origin(&self, origin: &ServerName) -> bool {
        let held = self.origins.get(origin).copied().unwrap_or_default();
        OF_ORIGIN.has_room_for(held, 0)
    }

    /// The number of events that wait.
    pub(super) fn count(&self) -> usize {
        self.all.events
    }

    /// Lists the numbers of some events of a line, from one on.
    pub(super) fn list(&self, room: RoomNum, tenant: &Tenant, from: u64, count: usize) -> Vec<u64> {
        let line = self.rooms.get(&room).and_then(|of_room| of_room.lines.get(tenant));
        line.into_iter().flat_map(|line| line.held.numbers.range(from..)).take(count).copied().collect()
    }

    /// Lists the rooms in which events wait.
    pub(super) fn list_rooms(&self) -> Vec<RoomNum> {
        self.rooms.keys().copied().collect()
    }

    /// Hurries the workers of a room, but for the one of this line.
    pub(super) fn hurry(&self, room: RoomNum, but_for: Option<&Tenant>) {
        let lines = self.rooms.get(&room).into_iter().flat_map(|of_room| &of_room.lines);
        lines.filter(|(tenant, _)| but_for != Some(*tenant)).for_each(|(_, line)| line.hurry.notify_one());
    }

    /// Claims the right to be the worker of each line of a room that has none and needs one. Workers that are there are hurried where
    /// something is to be tried at once.
    pub(super) fn begin_work(&mut self, room: RoomNum, at_once: bool) -> Vec<(Tenant, Arc<Notify>)> {
        let mut begun = Vec::new();
        for (tenant, line) in self.rooms.get_mut(&room).into_iter().flat_map(|of_room| &mut of_room.lines) {
            if line.held.numbers.is_empty() {
                continue;
            }
            if !std::mem::replace(&mut line.has_worker, true) {
                begun.push((tenant.clone(), Arc::clone(&line.hurry)));
            } else if at_once {
                line.hurry.notify_one();
            }
        }
        begun
    }

    /// Ends the work in a line where nothing waits any more. Answers whether it has ended.
    pub(super) fn end_work(&mut self, room: RoomNum, tenant: &Tenant) -> bool {
        let line = self.rooms.get_mut(&room).and_then(|of_room| of_room.lines.get_mut(tenant));
        let Some(line) = line else { return true };
        if !line.held.numbers.is_empty() {
            return false;
        }
        line.has_worker = false;
        self.forget_idle(room, tenant);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: RoomNum = RoomNum(1);

    fn sender(origin: &str, last: u8) -> Sender {
        let payers = Payers::of_request(None, [192, 0, 2, last].into());
        Sender::new(origin.try_into().unwrap(), payers, false)
    }

    fn stranger(origin: &str) -> Sender {
        Sender { is_stranger: true, ..sender(origin, 9) }
    }

    /// Adds events until there is no room, at most so many, and gives how many were added.
    fn fill(queues: &mut Queues, room: RoomNum, sender: &Sender, count: usize) -> usize {
        (0..count).take_while(|_| add(queues, room, sender)).count()
    }

    fn add(queues: &mut Queues, room: RoomNum, sender: &Sender) -> bool {
        let id = format!("${:0>43}", queues.next).try_into().unwrap();
        let mut gone = Vec::new();
        match queues.add(room, sender, (id, Bytes::from_static(b"{}")), 0, Some(&mut gone)) {
            Added::New(number, _) => {
                queues.note_written(number);
                true
            }
            Added::IsHere => panic!("the id is new"),
            Added::NoRoom => false,
        }
    }

    #[test]
    fn a_copy_of_another_server_takes_the_place_of_no_event() {
        let mut queues = Queues::default();
        let id: OwnedEventId = format!("${:0>43}", 1).try_into().unwrap();
        let mut add = |origin: &str| {
            let coming = (id.clone(), Bytes::from_static(b"{}"));
            queues.add(ROOM, &sender(origin, 1), coming, 0, None)
        };
        let Added::New(forged, _) = add("evil.example") else { panic!("it is new") };
        assert!(matches!(add("evil.example"), Added::IsHere));
        assert!(matches!(add("home.example"), Added::New(..)), "it may be signed otherwise");
        assert!(matches!(add("home.example"), Added::IsHere));
        queues.remove(forged);
        assert!(matches!(
            queues.add(ROOM, &sender("evil.example", 1), (id, Bytes::new()), 0, None),
            Added::New(..)
        ));
    }

    #[test]
    fn nobody_takes_all_places_with_many_names_or_from_one_address() {
        let mut queues = Queues::default();
        // All names of one owner in many rooms.
        for room in 0..200 {
            fill(&mut queues, RoomNum(room), &sender(&format!("n{room}.evil.example"), 1), 500);
        }
        assert_eq!(queues.count(), OF_ALL.events / (SHARE + 1));
        // Many owners at one address.
        for room in 200..400 {
            fill(&mut queues, RoomNum(room), &sender(&format!("evil{room}.example"), 2), 500);
        }
        // These are two labels each, so that each is an owner.
        assert!(queues.count() < OF_ALL.events / 4, "{}", queues.count());
        assert_eq!(fill(&mut queues, RoomNum(999), &sender("honest.example", 3), 500), 500);
    }

    #[test]
    fn whoever_has_most_gives_way_where_all_places_are_taken() {
        let mut queues = Queues::default();
        for number in 0..200_u8 {
            for room in 0..8 {
                let of_evil = sender(&format!("evil{number}.test"), number);
                fill(&mut queues, RoomNum(u64::from(number) * 8 + room), &of_evil, 500);
            }
        }
        let before = queues.count();
        assert!(before > OF_ALL.events - 100, "{before}");
        assert_eq!(fill(&mut queues, RoomNum(9_999), &sender("honest.example", 250), 100), 100);
        assert!(queues.count() <= before + 1);
        assert!(
            !add(&mut queues, RoomNum(9_999), &stranger("strange.example")),
            "nobody gives way to a stranger"
        );
        let numbers: Vec<u64> = queues.waiting.keys().copied().collect();
        for number in numbers {
            queues.remove(number);
        }
        assert!(queues.rooms.is_empty() && queues.holders.is_empty() && queues.origins.is_empty());
        assert_eq!((queues.all.events, queues.all.bytes), (0, 0));
    }

    #[test]
    fn two_servers_do_not_shut_out_the_others_of_a_room() {
        let mut queues = Queues::default();
        for name in ["a.evil.example", "b.evil.example"] {
            assert_eq!(fill(&mut queues, ROOM, &sender(name, 1), 600), OF_ORIGIN_IN_ROOM.events);
        }
        assert!(!add(&mut queues, ROOM, &sender("a.evil.example", 1)), "nobody gives way to oneself");
        assert!(!add(&mut queues, ROOM, &sender("a.evil.example:1", 1)), "ports are nobody else");
        assert!(!add(&mut queues, ROOM, &stranger("strange.test")), "nor members to strangers");
        assert_eq!(fill(&mut queues, ROOM, &sender("honest.test", 2), 400), 400);
        assert_eq!(queues.rooms[&ROOM].size.events, OF_ROOM.events);
    }

    #[test]
    fn nobody_shuts_out_their_neighbours() {
        let mut queues = Queues::default();
        // The places of all rooms are taken as far as one owner may have them.
        for room in 0..12 {
            fill(&mut queues, RoomNum(100 + room), &sender("evil.dyn.example", 1), 500);
        }
        let of_owner = queues.count();
        assert_eq!(of_owner, OF_ALL.events / (SHARE + 1));
        let honest = sender("honest.dyn.example", 2);
        assert_eq!(fill(&mut queues, ROOM, &honest, 400), 400);
        assert_eq!(queues.count(), of_owner, "their owner has no more than before");
        let of_honest = |queues: &Queues| queues.of_origin_in(ROOM, &honest).events;
        for number in 0..40 {
            fill(&mut queues, RoomNum(200 + number), &sender(&format!("e{number}.dyn.example"), 1), 500);
        }
        assert!(
            queues.count() == of_owner && of_honest(&queues) + 2 >= of_owner / 42,
            "{}",
            of_honest(&queues)
        );
        // The places of one room are taken.
        let mut queues = Queues::default();
        for name in ["a.dyn.example", "b.dyn.example"] {
            fill(&mut queues, ROOM, &sender(name, 1), 500);
        }
        assert_eq!(fill(&mut queues, ROOM, &honest, 100), 100);
        for number in 0..10 {
            fill(&mut queues, ROOM, &sender(&format!("e{number}.dyn.example"), 1), 500);
        }
        assert_eq!(queues.rooms[&ROOM].size.events, OF_ROOM.events);
        assert!(of_honest(&queues) + 2 >= OF_ROOM.events / 13, "{}", of_honest(&queues));
    }

    #[test]
    fn the_line_of_one_who_hangs_is_not_that_of_a_neighbour() {
        let mut queues = Queues::default();
        for name in ["evil.dyn.example", "evil.dyn.example:1", "honest.dyn.example"] {
            fill(&mut queues, ROOM, &sender(name, 1), 2);
        }
        let begun = queues.begin_work(ROOM, true);
        assert_eq!(begun.len(), 2, "a host has one worker, and its neighbour another");
        let of = |name: &str| Tenant::of(name.try_into().unwrap());
        let numbers = queues.list(ROOM, &of("honest.dyn.example"), 0, 50);
        assert!(numbers.into_iter().all(|number| queues.remove(number) == Some(ROOM)));
        assert!(queues.end_work(ROOM, &of("honest.dyn.example")), "nothing of it waits");
        assert!(!queues.end_work(ROOM, &of("evil.dyn.example")));
    }

    #[test]
    fn strangers_give_way_to_one_another_and_not_members() {
        let mut queues = Queues::default();
        assert_eq!(fill(&mut queues, ROOM, &sender("member.test", 1), 200), 200);
        for number in 0..10 {
            fill(&mut queues, ROOM, &stranger(&format!("{number}.evil.example")), 30);
        }
        assert_eq!(queues.rooms[&ROOM].strangers.events, OF_STRANGERS_IN_ROOM.events);
        assert!(add(&mut queues, ROOM, &stranger("new.test")));
        assert_eq!(queues.rooms[&ROOM].strangers.events, OF_STRANGERS_IN_ROOM.events);
        let of_member = queues.of_origin_in(ROOM, &sender("member.test", 1));
        assert_eq!(of_member.events, 200);
    }
}
