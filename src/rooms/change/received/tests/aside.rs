//! Events that are kept aside: their number is bounded, and outliers only allow others.

use super::*;

#[test]
fn a_room_keeps_a_bounded_number_of_events_aside_and_forgets_the_oldest() {
    use crate::rooms::change::aside::ASIDE_MAX;
    let mut fixture = Fixture::new();
    let count = |fixture: &Fixture| {
        let snapshot = fixture.store.snapshot();
        schema::ASIDE.prefix::<()>(&*snapshot, (), crate::store::Direction::Up).unwrap().count() as u64
    };
    let mut first = None;
    for number in 0..3 * ASIDE_MAX {
        let junk = Draft::state(bob(), "org.example.junk", &number.to_string(), content(json!({})), 0);
        let junk = fixture.build(&junk, None);
        first.get_or_insert_with(|| junk.clone());
        assert!(matches!(fixture.receive(junk).1, Outcome::Aside(..)));
        assert!(count(&fixture) <= ASIDE_MAX);
    }
    // A forgotten event is judged again when it comes again.
    assert!(matches!(fixture.receive(first.unwrap()).1, Outcome::Aside(..)));
    // A state may rest on a soft-failed state event, so none of these is forgotten, and no more are taken.
    let before = fixture.heads();
    let ban = json!({ "membership": "ban" });
    assert!(accepted(&fixture.state(&alice(), "m.room.member", bob().as_str(), ban, None).1));
    let mut refused = 0;
    for number in 0..2 * ASIDE_MAX {
        let late = Draft::state(bob(), "x", &number.to_string(), content(json!({})), 0);
        let late = fixture.build(&late, Some(&before));
        refused += u64::from(matches!(fixture.receive(late).1, Outcome::Unknown));
        assert!(count(&fixture) <= ASIDE_MAX);
    }
    assert!((ASIDE_MAX..2 * ASIDE_MAX).contains(&refused), "{refused}");
}

#[test]
fn an_outlier_allows_others_and_is_no_event_that_others_can_stand_on() {
    let mut fixture = Fixture::new();
    let x = fixture.build(&Draft::state(bob(), "x", "", content(json!({ "n": 1 })), 0), None);
    let id = x.id().to_owned();
    let Outcome::Outlier(num) = fixture.change(|change| change.receive_outlier(&x).unwrap()) else {
        panic!("it is no outlier")
    };
    assert_eq!(fixture.value("x", ""), serde_json::Value::Null, "it stands nowhere");
    assert!(!fixture.seen_in_timeline(&id));
    assert!(
        matches!(fixture.change(|change| change.receive_outlier(&x).unwrap()), Outcome::Known(known) if known == num)
    );
    // An event that cites the outlier needs it once more; one that names it as an auth event does not.
    let after = fixture.build(&text(&bob(), "after"), None);
    let after = fixture.rewritten(&after, "prev_events", json!([id]));
    assert!(
        matches!(fixture.receive(after.clone()).1, Outcome::Need { prev, auth } if prev == [id.clone()] && auth.is_empty())
    );
    let allowed = fixture.build(&text(&bob(), "allowed"), None);
    let mut auth = allowed.event().auth.clone();
    auth.push(id.clone());
    let allowed = fixture.rewritten(&allowed, "auth_events", json!(auth));
    assert!(!matches!(fixture.receive(allowed).1, Outcome::Need { .. }));
    // An outlier that is received becomes part of the room, under the number that it has.
    let outcome = fixture.receive(x).1;
    let Outcome::Accepted(stored) = outcome else { panic!("{outcome:?}") };
    assert_eq!(stored.event(), num);
    assert_eq!(fixture.value("x", "")["n"], 1);
    assert!(fixture.seen_in_timeline(&id));
    let snapshot = fixture.store.snapshot();
    assert!(!schema::ASIDE.contains(&*snapshot, (ROOM, num)).unwrap());
    drop(snapshot);
    assert!(accepted(&fixture.receive(after).1));
    fixture.check_state();
}

#[test]
fn an_outlier_that_its_auth_events_forbid_takes_no_key_and_allows_nothing() {
    let mut fixture = Fixture::new();
    let before = fixture.row().next_key;
    let name =
        fixture.build(&Draft::state(bob(), "m.room.name", "", content(json!({ "name": "mine" })), 0), None);
    let outcome = fixture.change(|change| change.receive_outlier(&name).unwrap());
    let Outcome::Outlier(num) = outcome else { panic!("{outcome:?}") };
    assert!(schema::ASIDE.get(&*fixture.store.snapshot(), (ROOM, num)).unwrap().unwrap().rejected);
    assert_eq!(fixture.row().next_key, before);
    assert!(matches!(fixture.receive(name).1, Outcome::Aside(known, _) if known == num));
}
