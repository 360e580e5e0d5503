//! Joins by servers that do not know what users of ours did last in the room.

use super::*;

/// A room that Bob has left, which nobody elsewhere knows.
struct Scene {
    here: Here,
    /// The room as it is elsewhere, with Bob.
    theirs: Elsewhere,
    /// The invitation that Bob made before.
    invited: Received,
    left: Received,
    /// The join of another user of ours.
    back: Received,
}

const CAROL: &str = "@carol:c.example";

impl Scene {
    fn new() -> Self {
        let (here, mut theirs) = (Here::new(1), Elsewhere::new(VERSION));
        let brought = theirs.brought();
        let join = theirs.join(&bob());
        here.join(&theirs.row, brought, &join).unwrap();
        let mut ours = theirs.clone();
        let invited = ours.make(&bob(), MEMBER, Some(CAROL), json!({ "membership": "invite" }));
        ours.add(&invited);
        assert!(matches!(here.receive(&invited), Outcome::Accepted(_)));
        leave(&here, &mut ours, &bob());
        let left = ours.state[&(MEMBER.to_owned(), bob().to_string())].clone();
        let back = theirs.make(
            &user("user0:here.example"),
            MEMBER,
            Some("@user0:here.example"),
            json!({ "membership": "join" }),
        );
        Self { here, theirs, invited, left, back }
    }

    fn tip(&self) -> BTreeMap<Key, OwnedEventId> {
        self.here.state_at(state::tip(&*self.here.store.snapshot(), ROOM).unwrap())
    }

    /// The room's state where both are known: what Bob did, and what happened elsewhere.
    fn both(&self) -> BTreeMap<Key, OwnedEventId> {
        let mut both = self.theirs.ids();
        for event in [&self.invited, &self.left] {
            both.insert((MEMBER.to_owned(), event.event().state_key.clone().unwrap()), event.id().to_owned());
        }
        both
    }

    fn heads(&self) -> BTreeSet<OwnedEventId> {
        let row = self.here.row();
        row.heads.iter().map(|head| event::event_id(&head.key, row.version)).collect()
    }

    /// Takes in an event of Alice's, elsewhere.
    fn say(&mut self, body: &str) -> Received {
        let said = self.theirs.say(&alice(), json!({ "body": body }));
        assert!(matches!(self.here.receive(&said), Outcome::Accepted(_)));
        said
    }

    /// Takes in an event of Alice's on what is known elsewhere and on Bob's leave.
    fn merge(&mut self) -> Received {
        self.theirs.heads.push(self.left.id().to_owned());
        self.say("merged")
    }

    fn assert_states(&self, said: &[&Received], merged: &Received) {
        let (before, after) = (self.here.state_before_id(self.back.id()), self.theirs.ids());
        let mut expected = after.clone();
        expected.remove(&(MEMBER.to_owned(), "@user0:here.example".to_owned()));
        assert_eq!(before, expected, "the state before the join is that of the graph");
        for said in said {
            assert_eq!(self.here.state_before_id(said.id()), after);
        }
        assert_eq!(self.here.state_before_id(merged.id()), self.both());
        assert_eq!(self.tip(), self.both());
        assert_eq!(self.here.faults(), [""; 0]);
    }
}

#[test]
fn an_event_of_ours_that_the_server_which_joins_us_does_not_know_is_a_head_besides_the_join() {
    let mut it = Scene::new();
    let brought = it.theirs.brought();
    it.theirs.add(&it.back.clone());
    it.here.join(&it.theirs.row, brought, &it.back).unwrap();
    assert_eq!(it.heads(), [it.left.id().to_owned(), it.back.id().to_owned()].into());
    let membership = |it: &Scene| it.tip()[&(MEMBER.to_owned(), bob().to_string())].clone();
    assert_eq!(membership(&it), it.left.id(), "nobody of ours is brought back");
    let said = it.say("one");
    assert_eq!(it.tip(), it.both(), "the room's state has what Bob did before he left");
    let merged = it.merge();
    assert_eq!(it.heads(), [merged.id().to_owned()].into());
    it.assert_states(&[&said], &merged);
}

#[test]
fn what_forks_resolve_to_does_not_rest_on_a_later_membership_of_ours_below_a_join() {
    for merges_first in [false, true] {
        let mut it = Scene::new();
        let is_member = |event: &&Received| event.event().event_type.to_string() == MEMBER;
        let members: Vec<_> = it.theirs.events.iter().filter(is_member).cloned().collect();
        it.here.join_without_members(&it.theirs, &it.back);
        it.theirs.add(&it.back.clone());
        let said = it.say("one");
        let merged = merges_first.then(|| it.merge());
        it.here.learn(&members);
        let left = it.left.id().to_owned();
        assert_eq!(it.heads().contains(&left), !merges_first, "it is a head unless an event cites it");
        it.here.make_whole();
        assert_eq!(it.tip(), it.both());
        let merged = merged.unwrap_or_else(|| it.merge());
        it.assert_states(&[&said], &merged);
    }
}
