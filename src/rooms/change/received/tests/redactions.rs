//! Redactions that come in: when they apply, and who sees them.

use super::*;

fn redaction(sender: &OwnedUserId, target: &OwnedEventId) -> Draft {
    Draft {
        state_key: None,
        redacts: Some(target.clone()),
        ..Draft::state(sender.clone(), "m.room.redaction", "", content(json!({})), 0)
    }
}

impl Fixture {
    fn is_redacted(&self, id: &OwnedEventId) -> bool {
        let snapshot = self.store.snapshot();
        let num = event::find_num(&*snapshot, ROOM, id).unwrap().unwrap();
        event::require(&*snapshot, ROOM, num).unwrap().row.is_redacted()
    }

    fn waiting(&self) -> usize {
        let snapshot = self.store.snapshot();
        schema::REDACTION_WAITING.prefix::<()>(&*snapshot, (), crate::store::Direction::Up).unwrap().count()
    }
}

#[test]
fn a_redaction_that_comes_first_waits_for_its_event_and_is_judged_by_its_own_state() {
    let mut fixture = Fixture::new();
    fixture.state(&carol(), "m.room.member", carol().as_str(), json!({ "membership": "join" }), None);
    let heads = fixture.heads();
    // Bob's messages come late, and their redactions come first: one by Alice, who has the power, one by Carol, who has
    // not, and one by another user of Bob's server.
    let late: Vec<_> = ["by alice", "by carol", "by bob"]
        .iter()
        .map(|body| fixture.build(&text(&bob(), body), Some(&heads)))
        .collect();
    let ids: Vec<_> = late.iter().map(|received| received.event().id.clone()).collect();
    for (sender, id) in [alice(), carol(), bob()].iter().zip(&ids) {
        let redaction = fixture.build(&redaction(sender, id), None);
        assert!(accepted(&fixture.receive(redaction).1));
    }
    assert_eq!(fixture.waiting(), 3);
    // Alice loses the power and Carol gains it before the events come, which changes nothing.
    let levels = json!({ "users": { "@alice:a.example": 100, "@carol:c.example": 100 }, "redact": 100 });
    assert!(accepted(&fixture.state(&alice(), "m.room.power_levels", "", levels, None).1));
    let levels = json!({ "users": { "@carol:c.example": 100 }, "redact": 100 });
    assert!(accepted(&fixture.state(&alice(), "m.room.power_levels", "", levels, None).1));
    for received in late {
        assert!(accepted(&fixture.receive(received).1));
    }
    assert_eq!(ids.iter().map(|id| fixture.is_redacted(id)).collect::<Vec<_>>(), [true, false, true]);
    assert_eq!(fixture.waiting(), 0, "an event comes once");
}

#[test]
fn a_redaction_is_judged_by_the_state_before_it_and_not_by_the_rooms() {
    let mut fixture = Fixture::new();
    let (said, _) = fixture.say(&bob(), "hello", None);
    let before = fixture.heads();
    let levels = json!({ "users": { "@bob:b.example": 100 } });
    assert!(accepted(&fixture.state(&alice(), "m.room.power_levels", "", levels, None).1));
    // This redaction stands on a branch on which Alice still has the power.
    let old = fixture.build(&redaction(&alice(), &said), Some(&before));
    fixture.state(&carol(), "m.room.member", carol().as_str(), json!({ "membership": "join" }), None);
    let forbidden = fixture.build(&redaction(&carol(), &said), None);
    assert!(accepted(&fixture.receive(forbidden).1), "it is an event like any other");
    assert!(!fixture.is_redacted(&said));
    assert!(accepted(&fixture.receive(old).1));
    assert!(fixture.is_redacted(&said));
}

#[test]
fn a_redacted_state_event_counts_as_what_is_left_of_it_also_where_clients_do_not_see_it() {
    let mut fixture = Fixture::new();
    let member = json!({ "membership": "join", "displayname": "Bad words" });
    let draft = Draft::state(bob(), "m.room.member", bob().as_str(), content(member), 0);
    let late = fixture.build(&draft, None);
    let id = late.id().to_owned();
    let redaction_first = fixture.build(&redaction(&alice(), &id), None);
    assert!(accepted(&fixture.receive(redaction_first).1));
    assert!(accepted(&fixture.receive(late).1));
    assert_eq!(fixture.value("m.room.member", bob().as_str()), json!({ "membership": "join" }));
    // A soft-failed event is kept aside: Bob is banned, and a message of his from before the ban comes in.
    let before = fixture.heads();
    let soft_failed = fixture.build(&text(&bob(), "bad words"), Some(&before));
    let ban = json!({ "membership": "ban" });
    assert!(accepted(&fixture.state(&alice(), "m.room.member", bob().as_str(), ban, None).1));
    let (id, outcome) = fixture.receive(soft_failed);
    assert!(matches!(outcome, Outcome::Aside(..)), "{outcome:?}");
    let redaction = fixture.build(&redaction(&alice(), &id), None);
    assert!(accepted(&fixture.receive(redaction).1));
    assert!(fixture.is_redacted(&id));
}

#[test]
fn a_redaction_is_seen_once_it_applies_and_not_before() {
    let mut fixture = Fixture::new();
    fixture.state(&carol(), "m.room.member", carol().as_str(), json!({ "membership": "join" }), None);
    let heads = fixture.heads();
    let late = fixture.build(&text(&bob(), "late"), Some(&heads));
    let id = late.id().to_owned();
    let redactions: Vec<_> =
        [carol(), alice(), bob()].iter().map(|sender| fixture.build(&redaction(sender, &id), None)).collect();
    let ids: Vec<_> = redactions.iter().map(|received| received.event().id.clone()).collect();
    for redaction in redactions {
        assert!(accepted(&fixture.receive(redaction).1));
    }
    let shown = |fixture: &Fixture| {
        let seen = |id| fixture.seen_in_timeline(id);
        ids.iter().map(seen).collect::<Vec<_>>()
    };
    assert_eq!(shown(&fixture), [false, false, false], "what they redact is not here");
    assert!(accepted(&fixture.receive(late).1));
    assert_eq!(shown(&fixture), [false, true, true], "Carol may not");
    let more = fixture.build(&redaction(&carol(), &id), None);
    let more_id = more.id().to_owned();
    assert!(accepted(&fixture.receive(more).1));
    assert!(!fixture.seen_in_timeline(&more_id));
    let odd = "$no\"id".try_into().unwrap();
    let odd = fixture.build(&redaction(&alice(), &odd), None);
    let odd_id = odd.id().to_owned();
    assert!(accepted(&fixture.receive(odd).1));
    assert!(!fixture.seen_in_timeline(&odd_id), "it names nothing");
}

#[test]
fn what_was_not_accepted_is_not_remembered() {
    let mut fixture = Fixture::new();
    let member = json!({ "membership": "join", "displayname": "Bob" });
    let (id, outcome) = fixture.state(&bob(), "m.room.member", bob().as_str(), member, None);
    assert!(accepted(&outcome));
    let redaction = fixture.build(&redaction(&alice(), &id), None);
    // The room's tip is dropped, as it is once there are more than a thousand rooms.
    fixture.rooms.sit(ROOM).tip = None;
    let mut change = Change::begin(&fixture.store, fixture.rooms.sit(ROOM), ROOM).unwrap();
    let rooms = fixture.rooms.clone();
    let step = change.receive(&redaction, None, rooms.resolver(), 0).unwrap();
    assert!(matches!(step, Step::Done(Outcome::Accepted(_))));
    schema::ROOM.expect_absent(&mut change.batch, ROOM);
    assert!(change.enqueue(&fixture.store).is_err());
    assert!(!fixture.is_redacted(&id));
    let mut change = Change::begin(&fixture.store, fixture.rooms.sit(ROOM), ROOM).unwrap();
    let remembered = change.state("m.room.member", bob().as_str()).unwrap().unwrap();
    assert!(remembered.parsed.content.get().contains("Bob"), "{}", remembered.parsed.content.get());
}

#[test]
fn an_event_with_a_number_that_canonical_json_does_not_have_can_be_redacted() {
    let mut fixture = Fixture::new();
    let said = fixture.build(&text(&bob(), "hello"), None);
    let said = fixture.rewritten(&said, "content", json!({ "body": 1.5 }));
    let id = said.id().to_owned();
    assert!(accepted(&fixture.receive(said).1));
    let redaction = fixture.build(&redaction(&alice(), &id), None);
    assert!(accepted(&fixture.receive(redaction).1));
    assert!(fixture.is_redacted(&id));
}

#[test]
fn an_outlier_that_was_redacted_comes_back_redacted_after_it_was_forgotten() {
    let mut fixture = Fixture::new();
    let draft = Draft::state(bob(), "x", "", content(json!({ "bad": "words" })), 0);
    let x = fixture.build(&draft, None);
    let id = x.id().to_owned();
    assert!(matches!(fixture.change(|change| change.receive_outlier(&x).unwrap()), Outcome::Outlier(_)));
    let redacts = fixture.build(&redaction(&alice(), &id), None);
    let redaction_id = redacts.id().to_owned();
    assert!(accepted(&fixture.receive(redacts).1));
    assert!(fixture.is_redacted(&id) && fixture.seen_in_timeline(&redaction_id));
    // Newer events aside push it out.
    for number in 0..20 {
        let other =
            fixture.build(&Draft::state(bob(), "x", &format!("{number}"), content(json!({})), 0), None);
        fixture.change(|change| change.receive_outlier(&other).unwrap());
    }
    assert!(fixture.sweep(1_000));
    assert!(!fixture.is_known(&id));
    assert!(accepted(&fixture.receive(x).1));
    assert!(fixture.is_redacted(&id) && fixture.seen_in_timeline(&redaction_id));
    assert_eq!(fixture.waiting(), 0);
}
