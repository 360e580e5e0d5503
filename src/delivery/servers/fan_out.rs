//! Works out which servers are told of an event: those that have somebody in the room before or after it, so that a server also
//! learns that its last user was removed; and where the event merges forks, those that have somebody in one of them, which otherwise
//! would never learn that the forks resolve to a state without them. The settings leave servers out. The room's access list does not: a server whose users are
//! still in the room is told, though nobody listens to it (client-server API, "Server Access Control Lists (ACLs) for rooms").

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use federation::client::Client;
use ruma::{OwnedServerName, ServerName, UserId};

use crate::{
    ids::{Position, RoomNum, UserNum},
    rooms::{
        self,
        around::Around,
        event::{self, StoredEvent},
        members, state,
    },
    schema::{
        event_types::MEMBER,
        rooms::{Membership, Resident},
        state::StateRef,
    },
    store::{Fault, Snapshot},
};

/// Remember lists of servers of at most this many names in all.
const NAMES_MAX: usize = 100_000;

/// Forks that differ in more keys than this are looked at as a whole, instead of key by key.
const DIFFERENCES_MAX: u64 = 1_000;

/// Tell at most this many servers what happens in a room of which only a part of the state is known, beside those of which a member is
/// known: one server names the others, and could have us knock at the doors of thousands that are not there.
const UNPROVEN_MAX: usize = 500;
/// Remember of at most this many such rooms who was told. The servers of others are told again when the state is whole.
const PARTIAL_ROOMS_MAX: usize = 200;

/// Some servers, sorted by name.
pub(super) type List = Arc<[OwnedServerName]>;

/// Works out who is told of events.
pub(super) struct Planner {
    us: OwnedServerName,
    client: Client,
    /// The list last worked out for a room. What it depends on is kept with it, so that it is right or not used.
    lists: BTreeMap<RoomNum, Listed>,
    names: usize,
    /// Who was told of events of ours in rooms of which only a part of the state is known.
    told_in_part: BTreeMap<RoomNum, ToldInPart>,
}

/// The servers that were told of each event of ours in a room, from one on.
struct ToldInPart {
    first: Position,
    servers: BTreeSet<OwnedServerName>,
}

struct Listed {
    at: StateRef,
    /// When the room's state became whole that was known in part: servers became known without a change of the state.
    filled_at: Option<Position>,
    servers: List,
}

impl Planner {
    /// Works for the server of this name, which talks with those servers that the client may talk with.
    pub(super) fn new(us: OwnedServerName, client: Client) -> Self {
        Self { us, client, lists: BTreeMap::new(), names: 0, told_in_part: BTreeMap::new() }
    }

    /// Whether an event is ours to tell to other servers: one of our users sent it, or we let its sender in.
    pub(super) fn is_ours(&self, stored: &StoredEvent) -> bool {
        event::is_ours_to_tell(&stored.row, &self.us)
    }

    /// Lists the servers that are told of an event. The server of its sender has it.
    pub(super) fn of_event(
        &mut self,
        read: &Snapshot,
        room: RoomNum,
        stored: &StoredEvent,
    ) -> Result<List, Fault> {
        let mut servers = self.around_event(read, room, stored)?;
        // A room without other servers costs no look at its row.
        if !servers.is_empty()
            && let Some(via) = find_via(read, room)?
        {
            servers = bounded(read, room, &via, &servers)?;
            self.note_told(room, stored.order.anchor, &servers);
        }
        let sender = stored.row.sender();
        if servers.iter().any(|server| event::is_of(&sender, server.as_str())) {
            return Ok(servers
                .iter()
                .filter(|server| !event::is_of(&sender, server.as_str()))
                .cloned()
                .collect());
        }
        Ok(servers)
    }

    /// Lists the servers that have somebody in the room before or after an event, or whom it takes their invitation or knock.
    fn around_event(&mut self, read: &Snapshot, room: RoomNum, stored: &StoredEvent) -> Result<List, Fault> {
        let states = Around::of(read, room, stored)?;
        let before = self.in_state(read, room, states.before)?;
        let asked = find_asked(read, room, stored)?.filter(|server| self.may_tell(server));
        let mut lost = list_lost(read, room, &states)?;
        lost.retain(|server| self.may_tell(server));
        if states.before == states.after && asked.is_none() && lost.is_empty() {
            return Ok(before);
        }
        let mut servers: BTreeSet<OwnedServerName> = before.iter().cloned().collect();
        servers.extend(lost);
        servers.extend(self.in_state(read, room, states.after)?.iter().cloned());
        servers.extend(asked);
        Ok(servers.into_iter().collect())
    }

    /// Lists the servers that are in a room now.
    pub(super) fn of_room(&mut self, read: &Snapshot, room: RoomNum) -> Result<List, Fault> {
        let tip = state::tip(read, room)?;
        let servers = self.in_state(read, room, tip)?;
        match find_via(read, room)? {
            Some(via) => bounded(read, room, &via, &servers),
            None => Ok(servers),
        }
    }

    /// Notes who is told of an event of ours in a room of which only a part of the state is known.
    fn note_told(&mut self, room: RoomNum, at: Position, servers: &[OwnedServerName]) {
        let (is_known, rooms) = (self.told_in_part.contains_key(&room), self.told_in_part.len());
        match self.told_in_part.get_mut(&room) {
            Some(told) if at >= told.first => {
                told.servers.retain(|known| servers.binary_search(known).is_ok());
            }
            // The log is read again from here, or nothing was told yet.
            _ if is_known || rooms < PARTIAL_ROOMS_MAX => {
                let told = ToldInPart { first: at, servers: servers.iter().cloned().collect() };
                self.told_in_part.insert(room, told);
            }
            _ => {}
        }
    }

    /// Lists the servers of a room, whose state is whole by now, that may not have been told of all events of ours since the join, of which
    /// this is the first.
    pub(super) fn list_untold(
        &mut self,
        read: &Snapshot,
        room: RoomNum,
        first: Position,
    ) -> Result<List, Fault> {
        let told = self.told_in_part.remove(&room).filter(|told| told.first == first);
        let servers = self.of_room(read, room)?;
        let Some(told) = told else { return Ok(servers) };
        Ok(servers.iter().filter(|server| !told.servers.contains(*server)).cloned().collect())
    }

    /// Lists the servers that share one of these rooms now.
    pub(super) fn of_rooms(
        &mut self,
        read: &Snapshot,
        rooms: &[RoomNum],
    ) -> Result<BTreeSet<OwnedServerName>, Fault> {
        let mut servers = BTreeSet::new();
        for room in rooms {
            servers.extend(self.of_room(read, *room)?.iter().cloned());
        }
        Ok(servers)
    }

    /// Lists the servers to which the devices of a user are announced who is in a room: those of the room that share no other room with the
    /// user, so that they were told nothing of the devices so far. Of a room of which only a part of the state is known that is nobody yet,
    /// and it counts for nothing where another room is asked about.
    pub(super) fn announce_to(
        &mut self,
        read: &Snapshot,
        user: UserNum,
        room: RoomNum,
    ) -> Result<List, Fault> {
        if find_via(read, room)?.is_some() {
            return Ok(List::default());
        }
        let mut known = BTreeSet::new();
        for other in members::list_joined_rooms(read, user)? {
            if other != room && find_via(read, other)?.is_none() {
                known.extend(self.of_room(read, other)?.iter().cloned());
            }
        }
        let here = self.of_room(read, room)?;
        Ok(here.iter().filter(|server| !known.contains(*server)).cloned().collect())
    }

    fn in_state(&mut self, read: &Snapshot, room: RoomNum, at: StateRef) -> Result<List, Fault> {
        let at = state::canonical(read, room, at)?;
        let Some(row) = rooms::find_row(read, room)? else { return Ok(List::default()) };
        let known = self.lists.get(&room).filter(|known| known.at == at && known.filled_at == row.filled_at);
        if let Some(known) = known
            && row.resident != Resident::Partial
        {
            return Ok(Arc::clone(&known.servers));
        }
        let is_now = at == state::tip(read, room)?;
        let names = if is_now {
            members::list_servers(read, room)?.collect::<Result<Vec<_>, _>>()?
        } else {
            members::list_servers_at(read, room, at)?
        };
        let servers = names.into_iter().filter_map(|name| OwnedServerName::try_from(name).ok());
        let servers = servers.filter(|server| self.may_tell(server));
        let servers: List = servers.collect();
        if self.names + servers.len() > NAMES_MAX {
            self.lists.clear();
            self.names = 0;
        }
        self.names += servers.len();
        let listed = Listed { at, filled_at: row.filled_at, servers: Arc::clone(&servers) };
        if let Some(before) = self.lists.insert(room, listed) {
            self.names -= before.servers.len();
        }
        Ok(servers)
    }

    /// The server that an event brings into a room in which it had nobody: it is told what its predecessors know and nobody else tells it.
    pub(super) fn newcomer(
        &self,
        read: &Snapshot,
        room: RoomNum,
        stored: &StoredEvent,
    ) -> Result<Option<OwnedServerName>, Fault> {
        if stored.membership() != Some(Membership::Join) {
            return Ok(None);
        }
        let user = stored.row.state_key();
        let user = user.as_deref().and_then(|user| <&UserId>::try_from(user).ok());
        let Some(server) = user.map(UserId::server_name).filter(|server| self.may_tell(server)) else {
            return Ok(None);
        };
        let before = Around::of(read, room, stored)?.before;
        let was_in = members::was_server_joined(read, room, before, server.as_str())?;
        Ok((!was_in).then(|| server.to_owned()))
    }

    /// Whether a server is another one, and the settings have this one talk with it.
    pub(super) fn may_tell(&self, server: &ServerName) -> bool {
        *server != *self.us && self.client.caller().servers().allows(server)
    }
}

/// The server by which a room was joined of which only a part of the state is known.
fn find_via(read: &Snapshot, room: RoomNum) -> Result<Option<String>, Fault> {
    Ok(rooms::find_row(read, room)?.and_then(|row| row.partial).map(|partial| partial.via))
}

/// Leaves out servers of a room of which only a part of the state is known, where too many are only said to be in it.
fn bounded(read: &Snapshot, room: RoomNum, via: &str, servers: &List) -> Result<List, Fault> {
    if servers.len() <= UNPROVEN_MAX {
        return Ok(List::clone(servers));
    }
    list_proven(read, room, via, servers)
}

/// Lists those of some servers of which a member is known in a room, and the one that says which servers are; and at most
/// `UNPROVEN_MAX` others.
fn list_proven(read: &Snapshot, room: RoomNum, via: &str, servers: &List) -> Result<List, Fault> {
    let (mut told, mut unproven) = (Vec::new(), 0);
    for server in servers.iter() {
        if *server != *via && !members::has_known_members(read, room, server.as_str())? {
            unproven += 1;
            if unproven > UNPROVEN_MAX {
                continue;
            }
        }
        told.push(server.clone());
    }
    Ok(told.into())
}

/// Lists the servers that have somebody in a fork which an event merges, and may have nobody in the state that the forks resolve to.
fn list_lost(read: &Snapshot, room: RoomNum, states: &Around) -> Result<BTreeSet<OwnedServerName>, Fault> {
    let mut lost = BTreeSet::new();
    for fork in &states.forks {
        let (fork, before) = (*fork, states.before);
        if state::distance(read, room, fork, before)? > DIFFERENCES_MAX {
            let servers = members::list_servers_at(read, room, fork)?;
            lost.extend(servers.into_iter().filter_map(|server| OwnedServerName::try_from(server).ok()));
            continue;
        }
        let mut looked_at = BTreeSet::new();
        for (key, ..) in state::diff(read, room, fork, before)? {
            let Some((event_type, user)) = state::key_name(read, room, key)? else { continue };
            let user = <&UserId>::try_from(user.as_str()).ok().filter(|_| event_type == MEMBER);
            let Some(server) = user.map(UserId::server_name) else { continue };
            if looked_at.insert(server.to_owned())
                && members::was_server_joined(read, room, fork, server.as_str())?
            {
                lost.insert(server.to_owned());
            }
        }
    }
    Ok(lost)
}

/// The server of a user whose invitation an event takes back, or whose knock it refuses: nobody of it need be in the room.
fn find_asked(
    read: &Snapshot,
    room: RoomNum,
    stored: &StoredEvent,
) -> Result<Option<OwnedServerName>, Fault> {
    let removes = matches!(stored.membership(), Some(Membership::Leave | Membership::Ban));
    let (true, Some(replaced)) = (removes, stored.row.header.replaces) else { return Ok(None) };
    debug_assert_eq!(stored.row.event_type(), MEMBER, "only member events give a membership");
    let was = event::find_anywhere(read, room, replaced)?.and_then(|replaced| replaced.membership());
    if !matches!(was, Some(Membership::Invite | Membership::Knock)) {
        return Ok(None);
    }
    let user = stored.row.state_key();
    let user = user.as_deref().and_then(|user| <&UserId>::try_from(user).ok());
    Ok(user.map(|user| user.server_name().to_owned()))
}

/// Whether a server is told of an event, as [`Planner::of_event`] lists it, but for access lists and settings.
pub(super) fn is_told(
    read: &Snapshot,
    room: RoomNum,
    stored: &StoredEvent,
    server: &ServerName,
) -> Result<bool, Fault> {
    if event::is_of(&stored.row.sender(), server.as_str()) {
        return Ok(false);
    }
    if Around::of(read, room, stored)?.has_server(read, room, server.as_str())? {
        return Ok(true);
    }
    Ok(find_asked(read, room, stored)?.is_some_and(|asked| asked == *server))
}
