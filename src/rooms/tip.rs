//! The tip of a room: its newest accepted state, as far as writers asked for it, so that the next change need not read
//! it again.
//!
//! A tip agrees with the store, with published rows and with those that wait for the flush, and is only changed by
//! changes that the store accepted. So it may be dropped at any time. It is dropped when rows of rooms were written under
//! `Guard::alone`, which does not go through the room's turns.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use crate::{
    ids::UserNum,
    rooms::{event::StateEvent, retention::Lifetime},
    schema::event_types::{CREATE, JOIN_RULES, MEMBER, POLICY, POWER_LEVELS, THIRD_PARTY_INVITE},
    schema::{push::Totals, rooms::RoomRow},
};

/// Remember at most this many state events of a room, about a kilobyte each: its power levels and such, and the members
/// who write.
pub(in crate::rooms) const STATE_MAX: usize = 256;

/// The types that are looked at for each event: by the authorization rules, and for whether a policy server is to be asked. No
/// other state is remembered, so that a quiet room costs little.
const REMEMBERED: [&str; 6] = [CREATE, MEMBER, POWER_LEVELS, JOIN_RULES, THIRD_PARTY_INVITE, POLICY];

/// A remembered event takes about this many bytes beside its texts.
const EVENT_BYTES: usize = 1_000;

/// The part of a room's newest accepted state that is remembered.
#[derive(Debug)]
pub(in crate::rooms) struct Tip {
    pub(in crate::rooms) row: RoomRow,
    /// Current state events by type and state key; `None` where the key has no event.
    state: BTreeMap<(String, String), Option<Arc<StateEvent>>>,
    state_bytes: usize,
    /// Our users who are joined, invited or knocking, rising; `None` until somebody asks.
    pub(in crate::rooms) users: Option<Arc<[UserNum]>>,
    /// The running unread numbers outside threads, if they are known.
    pub(in crate::rooms) unread: Option<Totals>,
    /// The last day of which transactions are remembered, and for which the timer that forgets them is set.
    pub(in crate::rooms) sent_day: Option<u32>,
    /// The lifetime of the room's messages, once it was asked for.
    pub(in crate::rooms) lifetime: Option<Lifetime>,
    /// The number of [`Store::written_alone`](crate::store::Store::written_alone) before anything of this was read. When it is
    /// another one, the room's rows may have changed below the tip.
    pub(in crate::rooms) written_alone: u64,
}

impl Tip {
    /// Makes a tip that remembers only the room's row, which was read after `written_alone` had this number.
    pub(in crate::rooms) fn of(row: RoomRow, written_alone: u64) -> Self {
        Self {
            row,
            state: BTreeMap::new(),
            state_bytes: 0,
            users: None,
            unread: None,
            sent_day: None,
            lifetime: None,
            written_alone,
        }
    }

    /// Finds the event of a key: `None` if that is not remembered, `Some(None)` if the key has no event.
    pub(in crate::rooms) fn find(&self, key: &(String, String)) -> Option<&Option<Arc<StateEvent>>> {
        self.state.get(key)
    }

    /// Remembers the event of a key, if its type is one that is looked at for each event.
    pub(in crate::rooms) fn remember(&mut self, key: (String, String), event: Option<Arc<StateEvent>>) {
        if !REMEMBERED.contains(&key.0.as_str()) {
            return;
        }
        if self.state.len() >= STATE_MAX && !self.state.contains_key(&key) {
            self.forget_one_beside(&key);
        }
        self.state_bytes += bytes(&key, event.as_ref());
        let of_key = key.clone();
        if let Some(replaced) = self.state.insert(key, event) {
            self.state_bytes -= bytes(&of_key, replaced.as_ref());
        }
        debug_assert!(self.state.len() <= STATE_MAX, "what a tip remembers is bounded");
    }

    /// Forgets the member whose key comes next, which is as good a choice as any. If more members write in turn than
    /// are remembered, forgetting the one who wrote longest ago would always forget the one who writes next.
    fn forget_one_beside(&mut self, key: &(String, String)) {
        let after = self.state.range((Bound::Excluded(key), Bound::Unbounded));
        let victim = after
            .chain(&self.state)
            .map(|(key, _)| key)
            .find(|(event_type, _)| event_type == MEMBER)
            .cloned();
        match victim {
            Some(victim) => {
                if let Some(forgotten) = self.state.remove(&victim) {
                    self.state_bytes -= bytes(&victim, forgotten.as_ref());
                }
            }
            None => {
                self.state.clear();
                self.state_bytes = 0;
            }
        }
    }

    /// Tells about how many bytes the tip takes.
    pub(in crate::rooms) fn byte_count(&self) -> usize {
        let users = self.users.as_ref().map_or(0, |users| users.len() * size_of::<UserNum>());
        size_of::<Self>() + self.state_bytes + users
    }

    /// Tells how many state events are remembered.
    #[cfg(test)]
    pub(in crate::rooms) fn state_count(&self) -> usize {
        self.state.len()
    }
}

fn bytes(key: &(String, String), event: Option<&Arc<StateEvent>>) -> usize {
    let event = event.map_or(0, |event| EVENT_BYTES + 2 * event.parsed.content.get().len());
    key.0.len() + key.1.len() + size_of::<(String, String)>() + event
}

/// Gives the list of users with these added or, where the flag is `false`, removed. Both are rising.
pub(in crate::rooms) fn with_changes(users: &[UserNum], changed: &[(UserNum, bool)]) -> Arc<[UserNum]> {
    let mut now: Vec<UserNum> = users.to_vec();
    for (user, is_in) in changed {
        match (now.binary_search(user), *is_in) {
            (Err(at), true) => now.insert(at, *user),
            (Ok(at), false) => drop(now.remove(at)),
            (Ok(_), true) | (Err(_), false) => {}
        }
    }
    debug_assert!(now.is_sorted_by(|one, other| one < other), "users rise, each once");
    now.into()
}

#[cfg(test)]
pub(in crate::rooms) mod tests {
    use ruma::RoomId;

    use super::*;
    use crate::{ids::Order, schema::rooms::Resident};

    /// Makes the row of a room whose newest event stands at `tip`.
    pub(in crate::rooms) fn row(tip: Order) -> RoomRow {
        RoomRow {
            id: RoomId::parse("!room:a.example").unwrap(),
            version: 11,
            resident: Resident::Yes,
            tip,
            state_tip: Order::MIN,
            next_event: 0,
            next_key: 0,
            next_side: 0,
            heads: Vec::new(),
            apart: Vec::new(),
            joined: 0,
            invited: 0,
            partial: None,
            filled_at: None,
            earlier: Vec::new(),
        }
    }

    /// Makes a tip take about this many bytes.
    pub(in crate::rooms) fn some_state(tip: &mut Tip, bytes: usize) {
        let users = u64::try_from(bytes / size_of::<UserNum>()).unwrap();
        tip.users = Some((0..users).map(UserNum).collect());
    }

    #[test]
    fn what_a_tip_remembers_is_counted_and_bounded() {
        let mut tip = Tip::of(row(Order::MIN), 0);
        let empty = tip.byte_count();
        for number in 0..2 * STATE_MAX {
            tip.remember((MEMBER.to_owned(), format!("@user{number}:a.example")), None);
        }
        assert_eq!(tip.state_count(), STATE_MAX);
        tip.remember(("m.room.topic".to_owned(), String::new()), None);
        assert_eq!(tip.state_count(), STATE_MAX, "no rule looks at topics");
        let full = tip.byte_count();
        tip.remember((MEMBER.to_owned(), "@user1:a.example".to_owned()), None);
        assert!(tip.byte_count() <= full + 100 && full > empty);
        tip.state.clear();
        tip.state_bytes = 0;
        assert_eq!(tip.byte_count(), empty);
    }

    #[test]
    fn users_come_and_go_in_a_list_that_stays_sorted() {
        let users: Vec<UserNum> = [2, 4, 6].map(UserNum).to_vec();
        let changed = [(UserNum(5), true), (UserNum(2), false), (UserNum(4), true), (UserNum(9), false)];
        assert_eq!(*with_changes(&users, &changed), [4, 5, 6].map(UserNum));
    }

    #[tokio::test(start_paused = true)]
    async fn a_tip_follows_changes_that_were_accepted_and_no_others() {
        use serde_json::json;

        use crate::{
            env::Env,
            error::{Error, Refusal},
            flows::{commit, room::create},
            rooms::{self, build::Draft, change::Change, policy},
            server::Server,
        };

        let server = Server::in_memory(Env::simulated(1, 0));
        let (app, alice) = (server.app(), server.register("alice").await);
        let create = ruma::api::client::room::create_room::v3::Request::new();
        let id = create::create(app, &alice, create).await.unwrap().room_id;
        let room = rooms::find_room(&*app.store.snapshot(), &id).unwrap().unwrap();
        let rename = |name: &str, accepts: bool| {
            let (owned, user, author) = (app.clone(), alice.user_id.clone(), policy::Author::from(&alice));
            let content = json!({ "membership": "join", "displayname": name });
            let content = serde_json::from_value(content).unwrap();
            let draft = Draft::state(user.clone(), MEMBER, user.as_str(), content, owned.env.event_ms());
            commit::in_room(app, room, move |change| {
                let signer = owned.rooms.signer();
                policy::approve(change, signer.server(), &author, draft)?.add(change, signer)?;
                if accepts { Ok(()) } else { Err(Error::from(Refusal::forbidden("This is a test."))) }
            })
        };
        let user = alice.user_id.to_string();
        let name = || {
            let user = user.clone();
            commit::in_room(app, room, move |change: &mut Change| {
                let event = change.state(MEMBER, &user)?.unwrap();
                let content: serde_json::Value = serde_json::from_str(event.parsed.content.get()).unwrap();
                Ok(content["displayname"].as_str().unwrap().to_owned())
            })
        };
        assert_eq!(name().await.unwrap(), "alice");
        rename("refused", false).await.unwrap_err();
        assert_eq!(name().await.unwrap(), "alice");
        rename("accepted", true).await.unwrap();
        let tip = app.rooms.sit(room).tip.take().unwrap();
        let remembered = tip.find(&(MEMBER.to_owned(), user.clone())).unwrap().clone().unwrap();
        assert!(remembered.parsed.content.get().contains("accepted"), "the tip has the event itself");
        assert_eq!(name().await.unwrap(), "accepted");
    }
}
