//! The servers that have somebody in a room, and how many users are joined, at any point of the room's history.
//!
//! Both follow from the member events, and are kept as derived keys of the room's state (their types begin with byte
//! 0x01, so that nobody can set them). A change of the main line writes them in the same step, a server's key only
//! where its first member comes or its last one goes. So listing the servers of a room of any size scans one row for
//! each server.
//!
//! Side states set no derived keys: the members that they change are counted against their place on the main line.

mod past;

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

pub use self::past::{count_joined_at, list_servers_at, list_servers_ever, was_server_joined};
use super::{list_keys, membership_of_event};
use crate::{
    ids::{Order, Position, RoomNum, StateKeyNum},
    rooms::{
        event,
        state::{self, Chain, StateRef, StateValue},
    },
    schema,
    schema::{
        event_types::{DERIVED, DERIVED_JOINED as JOINED, DERIVED_SERVER as SERVER, MEMBER},
        marked::{Marked, Staged},
        rooms::Membership,
    },
    store::{Batch, Direction, Fault, Read},
};

/// Whether a type is that of a derived key.
pub(crate) fn is_derived(event_type: &str) -> bool {
    event_type.starts_with(DERIVED)
}

/// The servers whose members come or go in one step of the main line, each with the number that it has more after the
/// step.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    servers: BTreeMap<String, i64>,
    is_any: bool,
    /// Where only a part of the members before a place is known: the server of which all are, and the place. Any other server that was in
    /// the room then stays when the last of its known members goes.
    among_unknown: Option<(String, Order)>,
}

impl Touched {
    /// Begins to count in a room of which only a part of the members at the place `base` is known: all of those of the server `us`.
    pub(crate) fn among_unknown(us: &str, base: Order) -> Self {
        Self { among_unknown: Some((us.to_owned(), base)), ..Self::default() }
    }

    /// Counts a member who came (`by` is 1) or went (-1).
    pub(crate) fn count(&mut self, user_id: &str, by: i64) {
        self.is_any = true;
        if let Some(server) = event::server_of(user_id) {
            *self.servers.entry(server.to_owned()).or_default() += by;
        }
    }

    /// Writes the counts, and gives the values of the derived keys after the step, also of those that do not change. The
    /// state in `batch` is that before the step.
    pub(crate) fn values(
        mut self,
        batch: &mut Batch,
        room: RoomNum,
        next_key: &mut u32,
        joined: u32,
    ) -> Result<Vec<(StateKeyNum, StateValue)>, Fault> {
        let is_any = self.is_any;
        let mut values = Vec::new();
        let among_unknown = self.among_unknown.take();
        for (server, count) in self.counts(batch, room)? {
            let may_have_more = match &among_unknown {
                Some((us, base)) if *us != server => {
                    schema::SERVER_MEMBERS.contains(&*batch, (room, &server))?
                        && was_on_main_line(&*batch, room, *base, &server)?
                }
                _ => false,
            };
            if count == 0 && !may_have_more {
                schema::SERVER_MEMBERS.delete(batch, (room, &server));
            } else {
                schema::SERVER_MEMBERS.put(batch, (room, &server), &count.into());
            }
            values.push(server_value(batch, room, next_key, &server, count.max(u64::from(may_have_more)))?);
        }
        if is_any {
            values.push(joined_value(batch, room, next_key, joined)?);
        }
        Ok(values)
    }

    /// Gives the number of members that each server has after a staged step, those of the claimed servers among them.
    pub(crate) fn counts_with(
        &mut self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        claimed: &BTreeSet<String>,
    ) -> Result<Vec<Counted>, Fault> {
        self.is_any |= !claimed.is_empty();
        for server in claimed {
            self.servers.entry(server.clone()).or_default();
        }
        let counts = self.counts(read, room)?.into_iter();
        let counted = |(server, count)| Counted { is_claimed: claimed.contains(&server), server, count };
        Ok(counts.map(counted).collect())
    }

    /// Gives the number of members that each server has after the step.
    pub(crate) fn counts(
        &mut self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
    ) -> Result<Vec<(String, u64)>, Fault> {
        if !self.is_any {
            return Ok(Vec::new());
        }
        let uncounted = count_all(read, room)?;
        for server in uncounted.iter().flat_map(BTreeMap::keys) {
            self.servers.entry(server.clone()).or_default();
        }
        let mut counts = Vec::with_capacity(self.servers.len());
        for (server, by) in std::mem::take(&mut self.servers) {
            let before = match &uncounted {
                Some(all) => all.get(&server).copied().unwrap_or(0),
                None => members_of(read, room, &server)?,
            };
            counts.push((server, before.saturating_add_signed(by)));
        }
        Ok(counts)
    }
}

/// Whether a server has somebody in the room at a place of the main line, or is said to.
fn was_on_main_line(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    at: Order,
    server: &str,
) -> Result<bool, Fault> {
    match state::find_key(read, room, SERVER, server)? {
        Some(key) => Ok(state::at(read, room, StateRef::Main(at), key)?.is_derived()),
        None => Ok(false),
    }
}

/// Gives the value of the derived key of a server that has this many members.
fn server_value(
    batch: &mut Batch,
    room: RoomNum,
    next_key: &mut u32,
    server: &str,
    count: u64,
) -> Result<(StateKeyNum, StateValue), Fault> {
    let key = state::intern_key(batch, room, next_key, SERVER, server)?;
    Ok((key, if count > 0 { StateValue::Derived(1) } else { StateValue::Absent }))
}

/// Gives the value of the derived key that holds how many users are joined.
pub(crate) fn joined_value(
    batch: &mut Batch,
    room: RoomNum,
    next_key: &mut u32,
    joined: u32,
) -> Result<(StateKeyNum, StateValue), Fault> {
    let key = state::intern_key(batch, room, next_key, JOINED, "")?;
    Ok((key, if joined > 0 { StateValue::Derived(joined) } else { StateValue::Absent }))
}

/// Writes the number of members that a server has after the staged step at this position, and gives the value of its
/// derived key.
pub(crate) fn stage_count(
    batch: &mut Batch,
    room: RoomNum,
    next_key: &mut u32,
    anchor: Position,
    Counted { server, count, is_claimed }: &Counted,
) -> Result<(StateKeyNum, StateValue), Fault> {
    let row = schema::SERVER_MEMBERS.get(&*batch, (room, server))?;
    let before = state::stage::row_that_counts(&*batch, room, row)?;
    let now = Some(*count).filter(|now| *now > 0 || *is_claimed);
    schema::SERVER_MEMBERS.put(
        batch,
        (room, server),
        &Marked { now, staged: Some(Staged { anchor, before }) },
    );
    server_value(batch, room, next_key, server, u64::from(now.is_some()))
}

/// The members that a server has after a staged step.
#[derive(Clone, Debug)]
pub(crate) struct Counted {
    pub(crate) server: String,
    pub(crate) count: u64,
    /// Whether the server is said to have somebody in the room, be that known or not.
    pub(crate) is_claimed: bool,
}

/// Lists the servers of which the unfinished step at this position wrote counts.
pub(crate) fn list_staged(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    anchor: Position,
) -> Result<Vec<String>, Fault> {
    let rows = schema::SERVER_MEMBERS.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    let staged = rows.filter_map(|row| match row {
        Ok(((_, server), row)) => {
            row.staged.is_some_and(|staged| staged.anchor == anchor).then_some(Ok(server))
        }
        Err(fault) => Some(Err(fault)),
    });
    staged.collect()
}

/// Takes back what the unfinished step at this position wrote of a server.
pub(crate) fn take_back_count(
    batch: &mut Batch,
    room: RoomNum,
    server: &str,
    anchor: Position,
) -> Result<(), Fault> {
    state::stage::restore(batch, &schema::SERVER_MEMBERS, (room, server), anchor)
}

/// Notes that a server is said to have somebody in the room, although none of them is known. Gives the value of its derived key.
pub(crate) fn claim_server(
    batch: &mut Batch,
    room: RoomNum,
    next_key: &mut u32,
    server: &str,
) -> Result<(StateKeyNum, StateValue), Fault> {
    if !schema::SERVER_MEMBERS.contains(&*batch, (room, server))? {
        schema::SERVER_MEMBERS.put(batch, (room, server), &0.into());
    }
    server_value(batch, room, next_key, server, 1)
}

/// Lists at most `max` servers that are said to have somebody in the room, of whom nobody is known.
pub(crate) fn list_claimed(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    max: usize,
) -> Result<Vec<String>, Fault> {
    let rows = schema::SERVER_MEMBERS.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    let claimed = rows.filter(|row| row.as_ref().map_or(true, |(_, row)| row.now == Some(0)));
    claimed.take(max).map(|row| row.map(|((_, server), _)| server)).collect()
}

/// Takes back that some servers have somebody in the room of whom nobody became known, at most `max` of them. Gives the values
/// of their derived keys.
pub(crate) fn release_servers(
    batch: &mut Batch,
    room: RoomNum,
    next_key: &mut u32,
    max: usize,
) -> Result<Vec<(StateKeyNum, StateValue)>, Fault> {
    let claimed = list_claimed(&*batch, room, max)?;
    let mut values = Vec::with_capacity(claimed.len());
    for server in claimed {
        schema::SERVER_MEMBERS.delete(batch, (room, &server));
        values.push(server_value(batch, room, next_key, &server, 0)?);
    }
    Ok(values)
}

/// Counts the members that a server has now.
fn members_of(read: &(impl Read + ?Sized), room: RoomNum, server: &str) -> Result<u64, Fault> {
    let row = schema::SERVER_MEMBERS.get(read, (room, server))?;
    Ok(state::stage::row_that_counts(read, room, row)?.unwrap_or(0))
}

/// Deletes the counts of a room that was never finished.
pub(super) fn clear(batch: &mut Batch, room: RoomNum) {
    schema::SERVER_MEMBERS.delete_prefix::<(RoomNum,)>(batch, (room,));
}

/// Counts the members of a room that was made before members were counted by server; `None` for any other room.
fn count_all(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Option<BTreeMap<String, u64>>, Fault> {
    if state::find_key(read, room, JOINED, "")?.is_some() {
        return Ok(None);
    }
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for key in list_keys(read, room)? {
        let (user_id, key) = key?;
        if let Some(server) = event::server_of(&user_id)
            && is_joined(read, room, state::now(read, room, key)?)?
        {
            *counts.entry(server.to_owned()).or_default() += 1;
        }
    }
    Ok(Some(counts))
}

fn is_joined(read: &(impl Read + ?Sized), room: RoomNum, val: StateValue) -> Result<bool, Fault> {
    match val.event() {
        Some(event) => Ok(membership_of_event(read, room, event)? == Membership::Join),
        None => Ok(false),
    }
}

/// The members who came and went between a place on the main line and a state.
#[derive(Default)]
struct Moves {
    base: Order,
    came: BTreeMap<String, u64>,
    went: BTreeMap<String, u64>,
    joined: i64,
    /// The number of members that each server from which somebody went had at the place.
    counts: BTreeMap<String, u64>,
}

impl Moves {
    fn to(read: &(impl Read + ?Sized), room: RoomNum, at: StateRef) -> Result<Self, Fault> {
        let chain = Chain::read(read, room, at)?;
        let mut moves = Self { base: chain.base, ..Self::default() };
        let entries = chain.entries();
        let names = state::list_key_names(read, room, entries.keys().copied())?;
        for ((key, val), name) in entries.into_iter().zip(names) {
            let Some((kind, user_id)) = name else { continue };
            if kind != MEMBER {
                continue;
            }
            let was = is_joined(read, room, state::at(read, room, StateRef::Main(chain.base), key)?)?;
            let is = is_joined(read, room, val)?;
            moves.joined += i64::from(is) - i64::from(was);
            let Some(server) = event::server_of(&user_id) else { continue };
            match (was, is) {
                (false, true) => *moves.came.entry(server.to_owned()).or_default() += 1,
                (true, false) => *moves.went.entry(server.to_owned()).or_default() += 1,
                (true, true) | (false, false) => {}
            }
        }
        moves.counts = count_on_main_line(read, room, chain.base, moves.went.keys())?;
        Ok(moves)
    }

    /// Whether a server has somebody in the state; `was_in` says whether it has at the place.
    fn leave_in(&self, server: &str, was_in: bool) -> bool {
        if self.came.contains_key(server) {
            return true;
        }
        match self.went.get(server) {
            Some(went) if was_in => self.counts.get(server).is_some_and(|count| count > went),
            _ => was_in,
        }
    }
}

/// Counts the members of some servers at a place on the main line: as many as now, corrected by those who came and went since.
/// The changes since are read once for all of the servers, and not at all where there are none.
fn count_on_main_line<'s>(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    order: Order,
    servers: impl Iterator<Item = &'s String>,
) -> Result<BTreeMap<String, u64>, Fault> {
    let mut counts = BTreeMap::new();
    for server in servers {
        counts.insert(server.clone(), members_of(read, room, server)?);
    }
    if counts.is_empty() {
        return Ok(counts);
    }
    let mut then: BTreeMap<StateKeyNum, StateValue> = BTreeMap::new();
    for step in state::changes(read, room, order, Order::MAX)? {
        for (key, prior) in step?.1 {
            then.entry(key).or_insert(prior);
        }
    }
    let names = state::list_key_names(read, room, then.keys().copied())?;
    for ((key, prior), name) in then.into_iter().zip(names) {
        let server = name.filter(|(kind, _)| kind == MEMBER);
        let server = server.as_ref().and_then(|(_, user_id)| event::server_of(user_id));
        if let Some(count) = server.and_then(|server| counts.get_mut(server)) {
            let (was, is) =
                (is_joined(read, room, prior)?, is_joined(read, room, state::now(read, room, key)?)?);
            *count = count.saturating_add_signed(i64::from(was) - i64::from(is));
        }
    }
    Ok(counts)
}

/// How many members servers have in a state of the past, while a hole is filled with the events that lead to it.
pub(crate) struct Census {
    counts: BTreeMap<String, u64>,
    joined: u32,
}

impl Census {
    /// Counts the members of the servers of these users at a place on the main line; `None` for a room whose members are not
    /// counted by server.
    pub(crate) fn at<'u>(
        read: &(impl Read + ?Sized),
        room: RoomNum,
        order: Order,
        users: impl Iterator<Item = &'u str>,
    ) -> Result<Option<Self>, Fault> {
        let Some(key) = state::find_key(read, room, JOINED, "")? else { return Ok(None) };
        let servers: BTreeSet<String> = users.filter_map(event::server_of).map(ToOwned::to_owned).collect();
        let counts = count_on_main_line(read, room, order, servers.iter())?;
        let joined = match state::at(read, room, StateRef::Main(order), key)? {
            StateValue::Derived(joined) => joined,
            _ => 0,
        };
        Ok(Some(Self { counts, joined }))
    }

    /// Counts a user who came (`by` is 1) or went (-1).
    pub(crate) fn count(&mut self, user_id: &str, by: i64) {
        let joined = i64::from(self.joined).saturating_add(by).max(0);
        self.joined = u32::try_from(joined).unwrap_or(u32::MAX);
        if let Some(count) = event::server_of(user_id).and_then(|server| self.counts.get_mut(server)) {
            *count = count.saturating_add_signed(by);
        }
    }

    /// Gives the values of the derived keys that depend on these users.
    pub(crate) fn values<'u>(
        &self,
        batch: &mut Batch,
        room: RoomNum,
        next_key: &mut u32,
        users: impl Iterator<Item = &'u str>,
    ) -> Result<Vec<(StateKeyNum, StateValue)>, Fault> {
        let mut users = users.peekable();
        if users.peek().is_none() {
            return Ok(Vec::new());
        }
        let mut values = vec![joined_value(batch, room, next_key, self.joined)?];
        for server in users.filter_map(event::server_of).collect::<BTreeSet<_>>() {
            let count = self.counts.get(server).copied().unwrap_or(0);
            values.push(server_value(batch, room, next_key, server, count)?);
        }
        Ok(values)
    }
}

/// Whether a server has somebody in the room now, or is said to in a room of which not all members are known.
pub fn is_server_joined(read: &(impl Read + ?Sized), room: RoomNum, server: &str) -> Result<bool, Fault> {
    let row = schema::SERVER_MEMBERS.get(read, (room, server))?;
    Ok(state::stage::row_that_counts(read, room, row)?.is_some())
}

/// Whether somebody of a server is known to be in the room now. In a room of which not all members are known, a server may also only be
/// said to be there.
pub fn has_known_members(read: &(impl Read + ?Sized), room: RoomNum, server: &str) -> Result<bool, Fault> {
    Ok(members_of(read, room, server)? > 0)
}

/// Lists the servers that have somebody in the room now, sorted.
pub fn list_servers<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
) -> Result<impl Iterator<Item = Result<String, Fault>> + 'r, Fault> {
    let rows = schema::SERVER_MEMBERS.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    Ok(rows.filter_map(move |row| {
        let (server, row) = match row {
            Ok(((_, server), row)) => (server, row),
            Err(fault) => return Some(Err(fault)),
        };
        let count = state::stage::row_that_counts(read, room, Some(row)).transpose()?;
        Some(count.map(|_| server))
    }))
}

/// Whether servers beside this one have somebody in the room now.
pub fn has_other_servers(read: &(impl Read + ?Sized), room: RoomNum, ours: &str) -> Result<bool, Fault> {
    for server in list_servers(read, room)?.take(2) {
        if server? != ours {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The order at which the last user of a server left the room; `None` where somebody of it is there now, or never was.
pub fn server_left_at(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    server: &str,
) -> Result<Option<Order>, Fault> {
    let Some(key) = state::find_key(read, room, SERVER, server)? else { return Ok(None) };
    let change = state::last_change_of(read, room, key)?;
    Ok(change.filter(|(_, before)| before.is_derived()).map(|(order, _)| order))
}

/// Lists the servers that had nobody in the room before a step of the main line, and have somebody by it. Of a step with very many
/// changes at most `changes_max` are looked at.
pub fn list_servers_came_at(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    step: Order,
    changes_max: usize,
) -> Result<Vec<String>, Fault> {
    let changes = schema::STATE_LOG.get(read, (room, step))?.unwrap_or_default().changes;
    let mut came = Vec::new();
    for (key, prior) in changes.into_iter().take(changes_max) {
        if prior != StateValue::Absent || !state::at(read, room, StateRef::Main(step), key)?.is_derived() {
            continue;
        }
        let name = state::key_name(read, room, key)?;
        came.extend(name.filter(|(event_type, _)| event_type == SERVER).map(|(_, server)| server));
    }
    Ok(came)
}

/// The number of members of each server, folded into numbers, so that counting a room of any size needs no more memory
/// than one member does. Each server adds a hash of its name for each of its members, so two tallies are equal where
/// the counts are.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    joined: u64,
    by_server: u128,
}

impl Tally {
    /// Counts one more member of the room.
    pub(crate) fn add(&mut self, user_id: &str) {
        self.joined += 1;
        if let Some(server) = event::server_of(user_id) {
            self.by_server = self.by_server.wrapping_add(fold(server));
        }
    }
}

fn fold(server: &str) -> u128 {
    let hash = Sha256::digest(server.as_bytes());
    hash.iter().take(16).fold(0, |folded, byte| folded << 8 | u128::from(*byte))
}

/// Whether the counts that are kept of a room agree with these users, who are all that are joined.
pub(crate) fn are_counted(read: &(impl Read + ?Sized), room: RoomNum, joined: &Tally) -> Result<bool, Fault> {
    let kept = schema::SERVER_MEMBERS.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?;
    let counted = |row: Result<((RoomNum, String), Marked<u64>), Fault>| {
        let ((_, server), row) = row?;
        Ok::<_, Fault>(state::stage::row_that_counts(read, room, Some(row))?.map(|count| (server, count)))
    };
    let mut kept = kept.map(counted).filter_map(Result::transpose);
    if state::find_key(read, room, JOINED, "")?.is_none() {
        return Ok(kept.next().is_none());
    }
    let (mut by_server, mut servers) = (0_u128, 0_u128);
    for row in kept {
        let (server, count) = row?;
        let folded = fold(&server);
        servers = servers.wrapping_add(folded);
        by_server = by_server.wrapping_add(folded.wrapping_mul(count.into()));
    }
    let now = StateRef::Main(Order::MAX);
    let named = list_servers_at(read, room, now)?;
    let named = named.iter().fold(0_u128, |sum, server| sum.wrapping_add(fold(server)));
    Ok(by_server == joined.by_server
        && servers == named
        && count_joined_at(read, room, now)? == joined.joined)
}

#[cfg(test)]
mod tests;
