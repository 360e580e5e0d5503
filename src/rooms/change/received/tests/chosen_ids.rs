//! Events of room versions 1 and 2, whose servers choose their ids: another event may come under an id that is taken.

use super::{
    in_each_version::{Elsewhere, reference_of},
    *,
};

/// The same event with other fields, as its server may have made it under the same id.
fn rewritten(room: &Elsewhere, received: &Received, fields: serde_json::Value) -> Received {
    let mut json: serde_json::Value = serde_json::from_slice(received.json()).unwrap();
    for (name, value) in fields.as_object().unwrap() {
        match value {
            serde_json::Value::Null => drop(json.as_object_mut().unwrap().remove(name)),
            value => json[name] = value.clone(),
        }
    }
    // The hash tells the content apart of which redaction leaves nothing.
    json["hashes"] = json!({ "sha256": json["content"].to_string() });
    Received::check(ROOM, &room.fixture.row(), reference_of(&json), json.to_string().into()).unwrap()
}

/// An event of Bob on the heads, which has not come in, and those that allow it.
fn by_bob(
    room: &mut Elsewhere,
    id: &str,
    event_type: &str,
    key: &str,
    content: serde_json::Value,
) -> Received {
    let current = room.fixture.current();
    let auth: Vec<_> =
        [("m.room.create", ""), ("m.room.power_levels", ""), ("m.room.member", "@bob:b.example")]
            .iter()
            .map(|(event_type, key)| current[&((*event_type).to_owned(), (*key).to_owned())].clone())
            .collect();
    let heads = room.fixture.heads();
    let made = room.make(&bob(), event_type, key, content, &heads, &auth);
    rewritten(room, &made, json!({ "event_id": id }))
}

fn kept(room: &Elsewhere, id: &EventId) -> serde_json::Value {
    let snapshot = room.fixture.store.snapshot();
    let num = event::find_num(&*snapshot, ROOM, id).unwrap().unwrap();
    serde_json::from_slice(&event::require(&*snapshot, ROOM, num).unwrap().row.json).unwrap()
}

#[test]
fn the_first_event_of_an_id_stays_and_another_one_changes_nothing() {
    for version in [1, 2] {
        let mut room = Elsewhere::new(version);
        let first = by_bob(&mut room, "$same:b.example", "x", "k", json!({ "n": 1 }));
        assert!(accepted(&room.fixture.receive(first.clone()).1));
        let (current, heads) = (room.fixture.current(), room.fixture.heads());
        let tip = room.fixture.row().state_tip;
        for other in [
            json!({ "content": { "n": 2 } }),
            json!({ "state_key": "other" }),
            json!({ "state_key": null, "type": "m.room.message" }),
            json!({ "prev_events": [[heads[0], {}]] }),
        ] {
            let other = rewritten(&room, &first, other);
            assert!(matches!(room.fixture.receive(other.clone()).1, Outcome::Known(_)));
            let outcome = room.fixture.change(|change| change.receive_outlier(&other).unwrap());
            assert!(matches!(outcome, Outcome::Known(_)));
        }
        assert_eq!(kept(&room, first.id())["content"], json!({ "n": 1 }));
        assert_eq!((room.fixture.current(), room.fixture.heads()), (current, heads));
        assert_eq!(room.fixture.row().state_tip, tip);
        room.fixture.check_state();
    }
}

#[test]
fn another_event_does_not_take_the_place_of_an_outlier_of_its_id() {
    for version in [1, 2] {
        let mut room = Elsewhere::new(version);
        let first = by_bob(&mut room, "$same:b.example", "x", "k", json!({ "n": 1 }));
        let outcome = room.fixture.change(|change| change.receive_outlier(&first).unwrap());
        let Outcome::Outlier(num) = outcome else { panic!("{outcome:?}") };
        for other in
            [json!({ "content": { "n": 2 } }), json!({ "state_key": null, "type": "m.room.message" })]
        {
            let other = rewritten(&room, &first, other);
            assert!(matches!(room.fixture.receive(other).1, Outcome::Known(known) if known == num));
        }
        assert_eq!(kept(&room, first.id())["content"], json!({ "n": 1 }));
        assert!(!room.fixture.current().contains_key(&("x".to_owned(), "k".to_owned())));
        // The outlier itself gets its place.
        let (_, outcome) = room.fixture.receive(first.clone());
        assert!(matches!(&outcome, Outcome::Accepted(stored) if stored.event() == num), "{outcome:?}");
        assert_eq!(room.fixture.value("x", "k"), json!({ "n": 1 }));
    }
}

#[test]
fn the_hash_beside_an_id_that_is_cited_decides_nothing() {
    for version in [1, 2] {
        let mut room = Elsewhere::new(version);
        let first = by_bob(&mut room, "$one:b.example", "x", "k", json!({ "n": 1 }));
        let wrong = json!([first.event().prev[0], { "sha256": "of another event" }]);
        let first = rewritten(&room, &first, json!({ "prev_events": [wrong] }));
        assert!(accepted(&room.fixture.receive(first.clone()).1));
        assert_eq!(kept(&room, first.id())["prev_events"], json!([wrong]), "it is carried as it came");
        assert_eq!(event::list_cited(&event_row(&room, first.id())), first.event().prev);
    }
}

fn event_row(room: &Elsewhere, id: &EventId) -> crate::schema::rooms::EventRow {
    let snapshot = room.fixture.store.snapshot();
    event::find_by_id(&*snapshot, ROOM, id).unwrap().unwrap().row
}

/// A redaction by somebody, under an id of this server. Whoever sends it has the power to send redactions, and not that to redact.
fn redaction(room: &mut Elsewhere, id: &str, target: &str) -> Received {
    let made = by_bob(room, id, "m.room.redaction", "", json!({}));
    rewritten(room, &made, json!({ "state_key": null, "redacts": target }))
}

#[test]
fn whom_a_redaction_may_redact_is_said_by_the_servers_of_the_two_ids() {
    for version in [1, 2] {
        let mut room = Elsewhere::new(version);
        let levels = json!({
            "users": { "@alice:a.example": 100, "@bob:b.example": 20 }, "redact": 50, "events": { "x": 0 },
        });
        let heads = room.fixture.heads();
        room.add(&alice(), "m.room.power_levels", "", levels, &heads);
        for id in ["$hers:a.example", "$his:b.example"] {
            let said = by_bob(&mut room, id, "m.room.message", "", json!({ "body": "x" }));
            let said = rewritten(&room, &said, json!({ "state_key": null }));
            assert!(accepted(&room.fixture.receive(said).1));
        }
        // The rules reject what redacts an event of another server's id: nobody may cite it as allowed.
        let forbidden = redaction(&mut room, "$r1:b.example", "$hers:a.example");
        let (_, outcome) = room.fixture.receive(forbidden);
        assert!(matches!(outcome, Outcome::Aside(..)), "{outcome:?}");
        assert_eq!(kept(&room, "$hers:a.example".try_into().unwrap())["content"], json!({ "body": "x" }));
        let allowed = redaction(&mut room, "$r2:b.example", "$his:b.example");
        assert!(accepted(&room.fixture.receive(allowed).1));
        assert_eq!(kept(&room, "$his:b.example".try_into().unwrap())["content"], json!({}));
        assert_eq!(kept(&room, "$his:b.example".try_into().unwrap())["event_id"], "$his:b.example");
        // One that comes before its event waits for it, and the next event of the id counts for nothing.
        let early = redaction(&mut room, "$r3:b.example", "$late:b.example");
        assert!(accepted(&room.fixture.receive(early).1));
        let late = by_bob(&mut room, "$late:b.example", "m.room.message", "", json!({ "body": "late" }));
        let late = rewritten(&room, &late, json!({ "state_key": null }));
        assert!(accepted(&room.fixture.receive(late.clone()).1));
        assert_eq!(kept(&room, late.id())["content"], json!({}));
        let again = rewritten(&room, &late, json!({ "content": { "body": "again" } }));
        assert!(matches!(room.fixture.receive(again).1, Outcome::Known(_)));
        assert_eq!(kept(&room, late.id())["content"], json!({}));
    }
}

#[test]
fn rooms_may_have_events_of_the_same_id() {
    let fixture = Fixture::without_room();
    let (one, two) = (ROOM, crate::ids::RoomNum(2));
    let id = OwnedEventId::try_from("$same:b.example").unwrap();
    for (num, room_id, text) in [(one, "!one:a.example", "1"), (two, "!two:a.example", "2")] {
        let room_id = RoomId::parse(room_id).unwrap();
        let mut change =
            Change::begin_room(&fixture.store, fixture.rooms.sit(num), num, room_id.clone(), 1).unwrap();
        let json = json!({
            "type": "m.room.create", "state_key": "", "sender": "@bob:b.example", "room_id": room_id, "event_id": id,
            "origin_server_ts": 1, "depth": 1, "content": { "creator": "@bob:b.example", "n": text },
            "prev_events": [], "auth_events": [],
        });
        // Nothing but the index is looked at here, so that the rooms' other servers do not matter.
        let received =
            Received::check(num, &change.row, reference_of(&json), json.to_string().into()).unwrap();
        let outcome = change.receive_outlier(&received).unwrap();
        assert!(matches!(outcome, Outcome::Outlier(_)), "{outcome:?}");
        drop(change.enqueue(&fixture.store).unwrap());
        fixture.store.flush().unwrap();
    }
    let snapshot = fixture.store.snapshot();
    let found = event::list_anywhere_by_id(&*snapshot, &id).unwrap();
    assert_eq!(found.iter().map(|(room, _)| *room).collect::<Vec<_>>(), [one, two]);
    for (room, event) in found {
        assert_eq!(event::find_num(&*snapshot, room, &id).unwrap(), Some(event));
        let text = if room == one { "\"1\"" } else { "\"2\"" };
        let kept = event::require(&*snapshot, room, event).unwrap();
        assert!(std::str::from_utf8(&kept.row.json).unwrap().contains(text));
    }
    let other = OwnedEventId::try_from("$same:b.example:1").unwrap();
    assert!(event::list_anywhere_by_id(&*snapshot, &other).unwrap().is_empty());
}
