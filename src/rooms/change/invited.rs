//! Counts the invitations from outside that wait for users of ours. Anybody can invite somebody, so that a user has a bounded number
//! of them, and no server has more than a part. Each has a row of its own by which it is counted, so that a count reads
//! nothing of what the invitations tell.
//!
//! Where a user has as many as may be, a new one is taken in the place of another, so that nobody shuts others out, however many names of
//! servers they have (`docs/decisions/invitations-make-room.md`).

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ruma::ServerName;

use crate::{
    ids::{Position, RoomNum, UserNum},
    rooms::{event, members},
    schema::{self, remote::OutsideRow, rooms::Membership},
    store::{Batch, Direction, Fault, Read, key::Json},
};

/// A user has at most this many invitations from outside at a time.
const OF_USER_MAX: usize = 1_000;
/// At most this many of them are by users of one server.
const OF_SERVER_MAX: usize = 200;

/// Where all servers share a room with the user, look at most at this many of them, and at as many invitations of each.
const NEAR_MAX: usize = 3;
/// Looking for an invitation that gives way takes about this many reads at most.
const READS_MAX: usize = 20_000;
/// Look at most at this many rooms of a user for somebody who shares one.
const ROOMS_MAX: usize = 1_000;

/// Whether one invitation more may wait for a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// There is room for it.
    Free,
    /// There is room for it once that of this server to this room is gone.
    InPlaceOf(RoomNum, String),
    /// There is no room for it.
    Full,
}

/// Judges whether one invitation more to a room, by a user of this server, may wait for the user. One that takes the place of
/// another of the same server may. The count is right while the user's lock is held.
pub fn judge(
    read: &(impl Read + ?Sized),
    (user, server): (UserNum, &str),
    room: Option<RoomNum>,
) -> Result<Admission, Fault> {
    if let Some(room) = room
        && schema::INVITED.contains(read, (user, server, room))?
    {
        return Ok(Admission::Free);
    }
    let of_server =
        schema::INVITED.prefix::<(UserNum, String)>(read, (user, server), Direction::Up)?.take(OF_SERVER_MAX);
    let of_server = of_server.map(|row| row.map(|((.., room), ())| room)).collect::<Result<Vec<_>, _>>()?;
    if of_server.len() >= OF_SERVER_MAX && list_waiting(read, user, &of_server)?.len() >= OF_SERVER_MAX {
        return Ok(Admission::Full);
    }
    let all = schema::INVITED.prefix::<(UserNum,)>(read, (user,), Direction::Up)?.take(OF_USER_MAX);
    let all =
        all.map(|row| row.map(|((_, server, room), ())| (server, room))).collect::<Result<Vec<_>, _>>()?;
    if all.len() < OF_USER_MAX {
        return Ok(Admission::Free);
    }
    let rooms: Vec<RoomNum> = all.iter().map(|(_, room)| *room).collect();
    let waiting = list_waiting(read, user, &rooms)?;
    if all.iter().filter(|(_, room)| waiting.contains_key(room)).count() < OF_USER_MAX {
        return Ok(Admission::Free);
    }
    let mut by_server = BTreeMap::<String, BTreeSet<(Position, RoomNum)>>::new();
    for (server, room) in all {
        if let Some(since) = waiting.get(&room) {
            by_server.entry(server).or_default().insert((*since, room));
        }
    }
    find_giving_way(read, (user, server), by_server)
}

/// The invitations that wait by users of one server, oldest first.
struct OfServer {
    server: String,
    source: Source,
    oldest: (Position, RoomNum),
    rooms: BTreeSet<(Position, RoomNum)>,
}

/// Finds the invitation that gives way to one more of this server. It is one of a server that shares no room with the user: the oldest
/// of the source of which most wait, or of the new one's own where none has more. Where there is none, and the new one's server shares a
/// room, it is one of the server that has most, if that has more than this one then, and only by somebody who is in no room with the user.
fn find_giving_way(
    read: &(impl Read + ?Sized),
    (user, server): (UserNum, &str),
    by_server: BTreeMap<String, BTreeSet<(Position, RoomNum)>>,
) -> Result<Admission, Fault> {
    let mut by_source = BTreeMap::<Source, (usize, (Position, RoomNum))>::new();
    let mut servers = Vec::with_capacity(by_server.len());
    for (server, rooms) in by_server {
        let (source, Some(oldest)) = (Source::of(&server), rooms.first().copied()) else { continue };
        let of_source = by_source.entry(source.clone()).or_insert((0, oldest));
        *of_source = (of_source.0 + rooms.len(), of_source.1.min(oldest));
        servers.push(OfServer { server, source, oldest, rooms });
    }
    let own = Source::of(server);
    let own_count = by_source.get(&own).map_or(0, |(count, _)| *count);
    // Sources that have more than the new one's come first, and among those that have as many the one with the oldest invitation.
    servers.sort_by_cached_key(|of| {
        let (count, oldest) = by_source.get(&of.source).copied().unwrap_or((0, of.oldest));
        let rank = if count > own_count { 0 } else { 1 + usize::from(of.source != own) };
        (rank, Reverse(count), oldest, of.oldest)
    });
    let rooms: Vec<RoomNum> = members::list_joined_rooms(read, user)?.into_iter().take(ROOMS_MAX).collect();
    let looks = READS_MAX / rooms.len().max(1);
    let is_near = is_among(read, &rooms, server)?;
    let mut near = Vec::new();
    for of in servers.into_iter().take(looks.max(1)) {
        if !is_near
            && of.source != own
            && by_source.get(&of.source).is_none_or(|(count, _)| *count <= own_count)
        {
            break;
        }
        if !is_among(read, &rooms, &of.server)? {
            return Ok(Admission::InPlaceOf(of.oldest.1, of.server));
        }
        near.push(of);
    }
    if !is_near {
        return Ok(Admission::Full);
    }
    let own_count = near.iter().find(|of| of.server == server).map_or(0, |of| of.rooms.len());
    near.retain(|of| of.server != server && of.rooms.len() > own_count + 1);
    near.sort_by_key(|of| (Reverse(of.rooms.len()), of.oldest));
    for of in near.into_iter().take(NEAR_MAX) {
        for (_, room) in of.rooms.iter().take(NEAR_MAX) {
            if !is_by_company(read, &rooms, (user, *room))? {
                return Ok(Admission::InPlaceOf(*room, of.server));
            }
        }
    }
    Ok(Admission::Full)
}

/// Whether an invitation is by somebody who is in one of these rooms.
fn is_by_company(
    read: &(impl Read + ?Sized),
    rooms: &[RoomNum],
    (user, room): (UserNum, RoomNum),
) -> Result<bool, Fault> {
    let Some(Json(row)) = schema::OUTSIDE.get(read, (room, user))? else { return Ok(false) };
    for inviter in inviters(&row) {
        let Some(server) = event::server_of(inviter) else { continue };
        for shared in rooms {
            if members::has_known_members(read, *shared, server)?
                && members::is_user_joined(read, *shared, inviter)?
            {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// The part of a server's name that its owner does not have for nothing: the last two labels, or the network of an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Source(String);

impl Source {
    /// The source of a server's name.
    pub(crate) fn of(server: &str) -> Self {
        let host = <&ServerName>::try_from(server).map_or(server, ServerName::host);
        if let Ok(address) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
            return Self(match address {
                IpAddr::V4(address) => format!("{}/24", address.to_bits() >> 8),
                IpAddr::V6(address) => format!("{}/48", address.to_bits() >> 80),
            });
        }
        let start = host.rmatch_indices('.').nth(1).map_or(0, |(dot, _)| dot + 1);
        Self(host.get(start..).unwrap_or(host).to_ascii_lowercase())
    }

    /// The text of it, which is the same for all names of one owner.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether a server has somebody in one of these rooms.
fn is_among(read: &(impl Read + ?Sized), rooms: &[RoomNum], server: &str) -> Result<bool, Fault> {
    for room in rooms {
        if members::has_known_members(read, *room, server)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Lists those of the rooms to which an invitation still waits, with the position since which it does.
fn list_waiting(
    read: &(impl Read + ?Sized),
    user: UserNum,
    rooms: &[RoomNum],
) -> Result<BTreeMap<RoomNum, Position>, Fault> {
    let rows = members::find_many(read, user, rooms.iter().copied())?;
    let waits = |membership| matches!(membership, Membership::Invite | Membership::Knock);
    let waiting = rooms.iter().zip(rows).filter_map(|(room, row)| Some((*room, row?)));
    Ok(waiting.filter(|(_, row)| waits(row.membership)).map(|(room, row)| (room, row.since)).collect())
}

/// Writes what was told of a room to a user, and the rows by which the invitations in it are counted.
pub(super) fn put(
    batch: &mut Batch,
    (room, user, user_id): (RoomNum, UserNum, &str),
    membership: Membership,
    row: OutsideRow,
) -> Result<(), Fault> {
    uncount(batch, room, user)?;
    if matches!(membership, Membership::Invite | Membership::Knock) {
        for server in inviters(&row).filter(|sender| *sender != user_id).filter_map(event::server_of) {
            schema::INVITED.put(batch, (user, server, room), &());
        }
    }
    schema::OUTSIDE.put(batch, (room, user), &Json(row));
    Ok(())
}

/// Deletes what was told of a room to a user, and no longer counts it.
pub(super) fn delete(batch: &mut Batch, room: RoomNum, user: UserNum) -> Result<(), Fault> {
    uncount(batch, room, user)?;
    schema::OUTSIDE.delete(batch, (room, user));
    Ok(())
}

fn uncount(batch: &mut Batch, room: RoomNum, user: UserNum) -> Result<(), Fault> {
    let Some(Json(row)) = schema::OUTSIDE.get(batch, (room, user))? else { return Ok(()) };
    let servers: BTreeSet<&str> = inviters(&row).filter_map(event::server_of).collect();
    for server in servers {
        if schema::INVITED.contains(batch, (user, server, room))? {
            schema::INVITED.delete(batch, (user, server, room));
        }
    }
    Ok(())
}

/// The users by whose word a row stands.
pub(crate) fn inviters(row: &OutsideRow) -> impl Iterator<Item = &str> {
    std::iter::once(row.shown.sender.as_str()).chain(row.others.iter().map(|other| other.sender.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{EventNum, Position},
        schema::{remote::Standing, rooms::UserRoomRow},
        store::{Durability, Engine, Guard, Store, engine::Memory},
    };

    const BOB: UserNum = UserNum(1);

    fn write(store: &Store, build: impl FnOnce(&mut Batch)) {
        let mut batch = store.batch(&Guard::alone());
        build(&mut batch);
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
    }

    fn invite(batch: &mut Batch, room: u64, server: &str) {
        let room = RoomNum(room);
        let row = UserRoomRow {
            membership: Membership::Invite,
            since: Position::ZERO,
            event: EventNum(0),
            forgotten: false,
            left: None,
            forgotten_below: None,
        };
        schema::USER_ROOM.put(batch, (BOB, room), &row.into());
        let shown = Standing {
            sender: format!("@m:{server}"),
            event: "e".repeat(60_000),
            state: vec!["s".repeat(60_000)],
            ..Standing::default()
        };
        let told = OutsideRow { number: 0, shown, others: Vec::new() };
        put(batch, (room, BOB, "@bob:s"), Membership::Invite, told).unwrap();
    }

    #[test]
    fn a_count_reads_no_invitation_and_a_server_has_a_part() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        for room in 0..OF_SERVER_MAX as u64 {
            write(&store, |batch| invite(batch, room, "a.example"));
        }
        let Engine::Memory(memory) = store.engine() else { unreachable!() };
        let ask = |server: &str, room: Option<u64>| {
            let (snapshot, before) = (store.snapshot(), memory.reads());
            let may = judge(&*snapshot, (BOB, server), room.map(RoomNum)).unwrap();
            (may == Admission::Free, memory.reads() - before)
        };
        let (may, reads) = ask("b.example", None);
        assert!(may && reads <= OF_SERVER_MAX as u64 + 2, "{reads}");
        let (may, reads) = ask("a.example", None);
        assert!(!may && reads <= 2 * OF_SERVER_MAX as u64 + 2, "{reads}");
        assert!(ask("a.example", Some(7)).0, "it takes the place of another");
        // One that was answered makes room, and what is told no more is not counted either.
        write(&store, |batch| delete(batch, RoomNum(7), BOB).unwrap());
        assert!(ask("a.example", None).0);
        write(&store, |batch| invite(batch, 7, "a.example"));
        assert!(!ask("a.example", None).0);
        write(&store, |batch| schema::USER_ROOM.delete(batch, (BOB, RoomNum(8))));
        assert!(ask("a.example", None).0);
        for room in 1_000..1_800 {
            write(&store, |batch| invite(batch, room, &format!("s{room}.example")));
        }
        assert!(ask("b.example", None).0, "one of the thousand is not waiting any more");
        write(&store, |batch| invite(batch, 8, "z.example"));
        assert!(!ask("b.example", None).0);
        let snapshot = store.snapshot();
        let judged = judge(&*snapshot, (BOB, "b.example"), None).unwrap();
        assert_eq!(judged, Admission::InPlaceOf(RoomNum(0), "a.example".to_owned()));
        drop(snapshot);
        // Another server's word for a room takes the place of the first, which is not counted any more.
        let snapshot = store.snapshot();
        assert!(!schema::INVITED.contains(&*snapshot, (BOB, "a.example", RoomNum(8))).unwrap());
    }

    #[test]
    fn a_new_invitation_takes_the_place_of_one_of_who_has_more_or_is_further_away() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let judge = |server: &str| {
            let snapshot = store.snapshot();
            judge(&*snapshot, (BOB, server), None).unwrap()
        };
        // Two servers share a room with Bob, and a thousand others have one invitation each.
        write(&store, |batch| {
            let row = UserRoomRow {
                membership: Membership::Join,
                since: Position::ZERO,
                event: EventNum(0),
                forgotten: false,
                left: None,
                forgotten_below: None,
            };
            schema::USER_ROOM.put(batch, (BOB, RoomNum(9_000)), &row.into());
            for near in ["near.example", "next.example"] {
                schema::SERVER_MEMBERS.put(batch, (RoomNum(9_000), near), &1.into());
            }
            // It is only said that this one does.
            schema::SERVER_MEMBERS.put(batch, (RoomNum(9_000), "named.example"), &0.into());
        });
        for room in 0..OF_USER_MAX as u64 {
            write(&store, |batch| invite(batch, room, &format!("s{room:04}.example")));
        }
        let oldest = Admission::InPlaceOf(RoomNum(0), "s0000.example".to_owned());
        for server in ["new.example", "named.example", "near.example"] {
            assert_eq!(
                judge(server),
                oldest,
                "{server}: whoever has as many names as may wait keeps nobody out"
            );
        }
        let own = Admission::InPlaceOf(RoomNum(7), "s0007.example".to_owned());
        assert_eq!(judge("s0007.example"), own, "whoever comes again gives way to oneself");
        assert_eq!(judge("x.s0007.example:8448"), own, "by whatever name");
        // Most wait of names that cost nothing, and one of those gives way, not the oldest of all.
        for room in 500..600 {
            write(&store, |batch| invite(batch, room, &format!("n{room}.evil.example")));
        }
        let of_many = Admission::InPlaceOf(RoomNum(500), "n500.evil.example".to_owned());
        assert_eq!(judge("new.example"), of_many);
        assert_eq!(judge("n9999.evil.example"), of_many);
        // Those that are near hold all, one of them nearly all of it.
        for room in 0..OF_USER_MAX as u64 {
            let server = match room {
                0..200 => "near.example".to_owned(),
                _ => format!("n{room:04}.example"),
            };
            write(&store, |batch| {
                invite(batch, room, &server);
                schema::SERVER_MEMBERS.put(batch, (RoomNum(9_000), server.as_str()), &1.into());
            });
        }
        assert_eq!(judge("new.example"), Admission::Full, "strangers push nobody out who is nearer");
        assert_eq!(judge("near.example"), Admission::Full, "it has its part");
        assert_eq!(judge("next.example"), Admission::InPlaceOf(RoomNum(0), "near.example".to_owned()));
    }

    #[test]
    fn a_source_is_what_a_name_costs() {
        let of = |server| Source::of(server).0;
        for (one, other) in [
            ("a.b.evil.example", "evil.example:8448"),
            ("x.EVIL.example", "evil.example"),
            ("192.0.2.1", "192.0.2.77:8448"),
            ("[2001:db8:1:2::1]", "[2001:db8:1:3::1]:8448"),
        ] {
            assert_eq!(of(one), of(other));
        }
        assert_ne!(of("192.0.2.1"), of("192.0.3.1"));
        assert_ne!(of("evil.example"), of("honest.example"));
        assert_eq!(of("localhost"), "localhost");
    }
}
