//! Rendezvous: two devices that know no secret of each other yet meet here while one is being logged in by a QR code (MSC4108, MSC4388).
//! A session is one small payload that either overwrites, and means nothing to the server.
//!
//! Sessions live in memory, for minutes, and are bounded in number: over all, and for each user or address that begins them. When as many
//! are open as may be, whoever holds most gives way, so that nobody keeps others from logging in.

use std::{cmp::Reverse, collections::BTreeMap, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::{
    env::{
        Env,
        payer::{Payer, Payers},
    },
    error::{Error, Refusal, Result},
};

/// A payload has at most this many bytes, by the proposals.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 10;
/// A session ends after this many milliseconds, the longest time that MSC4388 allows.
pub const SESSION_MS: u64 = 300_000;
/// At most this many sessions are open.
const SESSIONS_MAX: usize = 2_000;
/// At most this many sessions of one user, or from one address, are open.
const SESSIONS_OF_ONE_MAX: usize = 10;
/// Characters of the id of a session, which is all that keeps others from it.
const ID_CHARACTERS: usize = 32;
/// Characters of the token of a payload.
const TOKEN_CHARACTERS: usize = 24;

/// The proposal that a session follows. A session of one is not found by requests of the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The rendezvous of MSC4108 in its form of 2024.
    Msc4108,
    /// The rendezvous of MSC4388.
    Msc4388,
}

/// A session, as those who meet there see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The payload that was written last.
    pub payload: Bytes,
    /// The token of that payload: another for each write.
    pub token: String,
    /// When that was written, in milliseconds since the epoch.
    pub changed_ms: u64,
    /// When the session ends, in milliseconds since the epoch.
    pub ends_ms: u64,
}

/// The outcome of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// The payload is the one that was sent.
    Done(Seen),
    /// Somebody else has written in between, and their payload stays.
    Overtaken(Seen),
}

struct Session {
    kind: Kind,
    payers: Payers,
    seen: Seen,
}

/// The sessions that are open.
#[derive(Default)]
pub struct Board(Mutex<BTreeMap<String, Session>>);

/// The refusal for a session that is not there: 404 `M_NOT_FOUND`.
fn no_such_session() -> Refusal {
    Refusal::not_found("There is no such rendezvous; it may have ended.")
}

/// Refuses a payload that is too large: 413 `M_TOO_LARGE`.
fn check_payload(payload: &Bytes) -> Result<()> {
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(Refusal::too_large("The payload of a rendezvous has at most 4,096 bytes.").into());
    }
    Ok(())
}

/// The sessions of those who hold most; among equals of those whose oldest session is the oldest.
fn of_most<'s>(
    sessions: Vec<(&'s String, &'s Session)>,
    holder: fn(&Session) -> Payer,
) -> Vec<(&'s String, &'s Session)> {
    let mut held: BTreeMap<Payer, (usize, Reverse<u64>)> = BTreeMap::new();
    for (_, session) in &sessions {
        let (count, oldest) = held.entry(holder(session)).or_insert((0, Reverse(u64::MAX)));
        *count += 1;
        oldest.0 = oldest.0.min(session.seen.ends_ms);
    }
    let most = held.into_iter().max_by_key(|(_, held)| *held).map(|(most, _)| most);
    sessions.into_iter().filter(|(_, session)| Some(holder(session)) == most).collect()
}

/// The oldest session of those who hold most. A site of IPv6 has many networks, so that it counts as a whole first.
fn find_to_give_way(sessions: &BTreeMap<String, Session>) -> Option<String> {
    let of_site = of_most(sessions.iter().collect(), |session| session.payers.narrowest().site());
    let of_one = of_most(of_site, |session| session.payers.narrowest());
    of_one.into_iter().min_by_key(|(_, session)| session.seen.ends_ms).map(|(id, _)| id.clone())
}

impl Board {
    /// Opens a session, and answers its id. While as many are open as may be, the oldest of the site that holds most gives way, there of the
    /// address that does, or of the user where many share the address. Errors: 413 for a payload that is too large, 429 while this payer has as many as one may have.
    pub fn open(&self, env: &Env, kind: Kind, payers: Payers, payload: Bytes) -> Result<(String, Seen)> {
        check_payload(&payload)?;
        let now_ms = env.now_ms();
        let mut sessions = self.0.lock();
        sessions.retain(|_, session| session.seen.ends_ms > now_ms);
        let payer = payers.first();
        let of_payer = sessions.values().filter(|session| session.payers.first() == payer);
        // Clients behind a proxy on this machine cannot be told apart, so that none of them has a share.
        let is_one = !matches!(payer, Payer::Anybody | Payer::Server);
        if is_one && of_payer.clone().count() >= SESSIONS_OF_ONE_MAX {
            tracing::debug!(?payer, reason = "too many sessions", "a rendezvous is refused");
            let ends_ms = of_payer.map(|session| session.seen.ends_ms).min().unwrap_or(now_ms);
            return Err(Error::Busy { retry_after: Duration::from_millis(ends_ms.saturating_sub(now_ms)) });
        }
        while sessions.len() >= SESSIONS_MAX {
            let Some(id) = find_to_give_way(&sessions) else { break };
            tracing::debug!(reason = "too many sessions", "a rendezvous gives way: its address holds most");
            sessions.remove(&id);
        }
        let id = env.random_string(ID_CHARACTERS);
        let token = env.random_string(TOKEN_CHARACTERS);
        let seen = Seen { payload, token, changed_ms: now_ms, ends_ms: now_ms.saturating_add(SESSION_MS) };
        sessions.insert(id.clone(), Session { kind, payers, seen: seen.clone() });
        Ok((id, seen))
    }

    /// Looks at a session. Errors: 404 if there is none.
    pub fn look(&self, env: &Env, kind: Kind, id: &str) -> Result<Seen> {
        self.with(env, kind, id, |session| session.seen.clone())
    }

    /// Writes a payload, if the one that is there has this token. One that is there already is not written again, so that a client may
    /// repeat itself. Errors: 404 if there is no such session, 413 for a payload that is too large.
    pub fn write(&self, env: &Env, kind: Kind, id: &str, token: &str, payload: Bytes) -> Result<Written> {
        check_payload(&payload)?;
        self.with(env, kind, id, |session| {
            let seen = &mut session.seen;
            if seen.token == token {
                seen.payload = payload;
                seen.token = env.random_string(TOKEN_CHARACTERS);
                seen.changed_ms = env.now_ms();
                return Written::Done(seen.clone());
            }
            // MSC4388 asks for this; the older proposal has whoever comes second read first.
            if kind == Kind::Msc4388 && seen.payload == payload {
                return Written::Done(seen.clone());
            }
            Written::Overtaken(seen.clone())
        })
    }

    /// Ends a session. Errors: 404 if there is none.
    pub fn end(&self, env: &Env, kind: Kind, id: &str) -> Result<()> {
        self.with(env, kind, id, |_| ())?;
        self.0.lock().remove(id);
        Ok(())
    }

    fn with<T>(&self, env: &Env, kind: Kind, id: &str, act: impl FnOnce(&mut Session) -> T) -> Result<T> {
        let now_ms = env.now_ms();
        let mut sessions = self.0.lock();
        let session = sessions.get_mut(id).filter(|it| it.kind == kind && it.seen.ends_ms > now_ms);
        Ok(act(session.ok_or_else(no_such_session)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::UserNum;

    const KIND: Kind = Kind::Msc4388;

    fn env() -> Env {
        Env::simulated(1, 1_000)
    }

    fn payload(text: &str) -> Bytes {
        Bytes::copy_from_slice(text.as_bytes())
    }

    #[test]
    fn who_knows_the_last_payload_writes_the_next() {
        let (board, env) = (Board::default(), env());
        let (id, first) = board.open(&env, KIND, Payers::one(Payer::Anybody), payload("a")).unwrap();
        assert_eq!(board.look(&env, KIND, &id).unwrap(), first);
        let Written::Done(second) = board.write(&env, KIND, &id, &first.token, payload("b")).unwrap() else {
            panic!("nobody else has written")
        };
        assert_ne!(second.token, first.token);
        let overtaken = board.write(&env, KIND, &id, &first.token, payload("c")).unwrap();
        assert_eq!(overtaken, Written::Overtaken(second.clone()));
        let again = board.write(&env, KIND, &id, &first.token, payload("b")).unwrap();
        assert_eq!(again, Written::Done(second.clone()), "the same request again");
        let Written::Done(third) = board.write(&env, KIND, &id, &second.token, payload("b")).unwrap() else {
            panic!("nobody else has written")
        };
        assert_ne!(third.token, second.token, "a payload that is written again has another token");
        assert!(board.look(&env, Kind::Msc4108, &id).is_err());
        assert!(board.end(&env, Kind::Msc4108, &id).is_err());
        board.end(&env, KIND, &id).unwrap();
        assert!(board.end(&env, KIND, &id).is_err() && board.look(&env, KIND, &id).is_err());
    }

    #[test]
    fn the_older_proposal_repeats_nothing() {
        let (board, env, kind) = (Board::default(), env(), Kind::Msc4108);
        let (id, first) = board.open(&env, kind, Payers::one(Payer::Anybody), payload("a")).unwrap();
        board.write(&env, kind, &id, &first.token, payload("b")).unwrap();
        let again = board.write(&env, kind, &id, &first.token, payload("b")).unwrap();
        assert!(matches!(again, Written::Overtaken(_)));
    }

    #[test]
    fn payloads_and_sessions_are_bounded() {
        let (board, env) = (Board::default(), env());
        let large = Bytes::from(vec![b'x'; PAYLOAD_BYTES_MAX + 1]);
        assert!(board.open(&env, KIND, Payers::one(Payer::Anybody), large.clone()).is_err());
        let (id, first) = board.open(&env, KIND, Payers::one(Payer::Anybody), large.slice(1..)).unwrap();
        assert!(board.write(&env, KIND, &id, &first.token, large).is_err());
        let open = |payer| board.open(&env, KIND, payer, Bytes::new()).map(|(id, _)| id);
        let [alice, bob] = [1, 2].map(|user| Payers::one(Payer::User(UserNum(user))));
        let of_alice: Vec<_> = (0..SESSIONS_OF_ONE_MAX).map(|_| open(alice).unwrap()).collect();
        assert!(matches!(open(alice), Err(Error::Busy { .. })));
        open(bob).unwrap();
        board.end(&env, KIND, &of_alice[0]).unwrap();
        open(alice).unwrap();
    }

    /// A board that is full of sessions of these payers, who open them in turn, and what `carol` has opened before, who has one.
    fn overrun(board: &Board, env: &Env, carol: Payers, payers: impl Fn(u32) -> Payers) {
        let of_carol = board.open(env, KIND, carol, payload("a")).unwrap().0;
        for number in 0..SESSIONS_MAX as u32 + 200 {
            let _ = board.open(env, KIND, payers(number), Bytes::new());
        }
        assert_eq!(board.0.lock().len(), SESSIONS_MAX);
        board.look(env, KIND, &of_carol).unwrap();
        let another = Payers::of_request(None, [192, 0, 2, 77].into());
        let of_another = board.open(env, KIND, another, payload("b")).unwrap().0;
        for number in 0..200 {
            let _ = board.open(env, KIND, payers(number), Bytes::new());
        }
        assert_eq!(board.0.lock().len(), SESSIONS_MAX);
        for id in [of_carol, of_another] {
            board.look(env, KIND, &id).unwrap();
        }
    }

    #[test]
    fn who_holds_most_gives_way_when_the_board_is_full() {
        let carol = Payers::of_request(Some(UserNum(7)), [192, 0, 2, 7].into());
        let user = |number: u32| Some(UserNum(1_000 + u64::from(number % 200)));
        // Many accounts of one address, clients that cannot be told apart, and such with accounts.
        overrun(&Board::default(), &env(), carol, |number| {
            Payers::of_request(user(number), [192, 0, 2, 1].into())
        });
        overrun(&Board::default(), &env(), carol, |_| Payers::one(Payer::Anybody));
        overrun(&Board::default(), &env(), carol, |number| {
            Payers::of_request(user(number), [127, 0, 0, 1].into())
        });
    }

    fn at(address: &str) -> Payers {
        Payers::of_request(None, address.parse().unwrap())
    }

    #[test]
    fn a_site_of_many_networks_gives_way_before_others() {
        for carol in ["2001:db8:0:1::1", "2001:db8:ffff:1::1", "192.0.2.7"] {
            overrun(&Board::default(), &env(), at(carol), |number| at(&format!("2001:db8:7:{number:x}::1")));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_session_gives_way_where_all_hold_the_same() {
        let (board, env) = (Board::default(), env());
        let open = |number: u32| {
            let address = std::net::Ipv4Addr::from(0x0a00_0000 | ((number * 7919) % 65_536));
            board.open(&env, KIND, Payers::of_request(None, address.into()), Bytes::new()).unwrap().0
        };
        let mut ids = std::collections::VecDeque::new();
        for number in 0..SESSIONS_MAX as u32 + 50 {
            env.sleep(Duration::from_millis(1)).await;
            ids.push_back(open(number));
            if ids.len() > SESSIONS_MAX {
                let oldest = ids.pop_front().unwrap();
                assert!(board.look(&env, KIND, &oldest).is_err(), "{number}");
            }
        }
        assert!(ids.iter().all(|id| board.look(&env, KIND, id).is_ok()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_ends_by_itself_and_makes_room() {
        let (board, env) = (Board::default(), env());
        let payer = Payers::one(Payer::User(UserNum(1)));
        let open = || board.open(&env, KIND, payer, Bytes::new());
        let ids: Vec<_> = (0..SESSIONS_OF_ONE_MAX).map(|_| open().unwrap().0).collect();
        let Err(Error::Busy { retry_after }) = open() else { panic!("too many are open") };
        assert_eq!(retry_after, Duration::from_millis(SESSION_MS));
        env.sleep(retry_after - Duration::from_millis(1)).await;
        board.look(&env, KIND, &ids[0]).unwrap();
        assert!(open().is_err());
        env.sleep(Duration::from_millis(1)).await;
        assert!(board.look(&env, KIND, &ids[0]).is_err());
        open().unwrap();
        assert_eq!(board.0.lock().len(), 1);
    }
}
