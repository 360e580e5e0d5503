//! The texts that are left in an index, and in its files, when events change and when it is opened again.

use std::{collections::BTreeSet, path::Path};

use tantivy::{Directory as _, directory::RamDirectory};

use super::*;
use crate::search::find::{Found, OrderBy, Question, Scope, Words, find};

const ROOM: RoomNum = RoomNum(7);

fn at(number: u64) -> Position {
    Position::new(number).unwrap()
}

fn document(event: u64, edit: Option<u64>, text: &str) -> Document {
    Document {
        room: ROOM,
        event: EventNum(event),
        edit: edit.map(|edit| (EventNum(edit), at(edit))),
        later: Vec::new(),
        order: Place::live(at(event)),
        sent_ms: event,
        kind: TextKind::Body,
        has_url: false,
        sender: format!("@user{}:a.example", event % 2),
        text: text.to_owned(),
    }
}

fn open(ram: &RamDirectory, incarnation: u16, upto: u64) -> (Index, Progress) {
    Index::open(Shelf::Memory(ram.clone()), 16 << 20, false, incarnation, at(upto)).unwrap()
}

fn ask(index: &Index, term: &str) -> Found {
    let words = Words::parse(term).unwrap();
    let rooms = [Scope { room: ROOM, seen: vec![(Position::ZERO, Position::MAX)] }];
    let question = Question {
        words: &words,
        rooms: &rooms,
        kinds: &TextKind::ALL,
        url: None,
        senders: None,
        not_senders: &[],
        order_by: OrderBy::Recent,
        after: None,
    };
    find(index, &question).unwrap()
}

fn events(index: &Index, term: &str) -> Vec<u64> {
    ask(index, term).candidates.iter().map(|candidate| candidate.event().0).collect()
}

#[test]
fn after_a_crash_the_index_has_what_was_committed_and_goes_on_from_there() {
    let ram = RamDirectory::create();
    let (index, mut progress) = open(&ram, 3, 10);
    assert_eq!(progress.position(), at(10));
    assert_eq!(progress.walk, Some(Walk::new(at(10))));
    let mut change = index.write();
    change.add(&document(1, None, "needle")).unwrap();
    progress = Progress { position: 11, walk: None, ..progress };
    change.commit(&progress).unwrap();
    change.add(&document(2, None, "needle")).unwrap();
    assert_eq!(change.count(), 1);
    drop(change);
    assert_eq!(events(&index, "needle"), [1], "nothing is found before it is committed");
    drop(index);
    let (index, again) = open(&ram, 3, 12);
    assert_eq!(again, progress);
    assert_eq!(events(&index, "needle"), [1]);
    // The same page is read again, and its event is in the index once.
    let mut change = index.write();
    for _ in 0..2 {
        change.delete_event(ROOM, EventNum(2)).unwrap();
        change.add(&document(2, None, "needle")).unwrap();
    }
    change.commit(&Progress { position: 12, ..again }).unwrap();
    drop(change);
    assert_eq!(events(&index, "needle"), [2, 1]);
}

#[test]
fn an_index_of_another_store_layout_or_of_garbage_is_begun_anew() {
    let begun = |ram: &RamDirectory, incarnation, upto| {
        let (index, progress) = open(ram, incarnation, upto);
        (index.document_count(), progress.position, progress.walk.is_some())
    };
    let filled = || {
        let ram = RamDirectory::create();
        let (index, progress) = open(&ram, 0, 10);
        let mut change = index.write();
        change.add(&document(1, None, "needle")).unwrap();
        change.commit(&Progress { walk: None, ..progress }).unwrap();
        ram
    };
    assert_eq!(begun(&filled(), 0, 10), (1, 10, false));
    assert_eq!(begun(&filled(), 0, 500), (1, 10, false), "the log is read from where the index is");
    assert_eq!(begun(&filled(), 1, 20), (0, 20, true), "the store was restored");
    assert_eq!(begun(&filled(), 0, 9), (0, 9, true), "the store has lost what the index knows");
    let meta = Path::new("meta.json");
    for harm in ["{", "", "{\"segments\":[]}"] {
        let ram = filled();
        ram.atomic_write(meta, harm.as_bytes()).unwrap();
        assert_eq!(begun(&ram, 0, 10), (0, 10, true), "{harm}");
    }
    let ram = filled();
    let text = String::from_utf8(ram.atomic_read(meta).unwrap()).unwrap();
    let other = text.replace("\\\"layout\\\":4", "\\\"layout\\\":3");
    assert_ne!(text, other);
    ram.atomic_write(meta, other.as_bytes()).unwrap();
    assert_eq!(begun(&ram, 0, 10), (0, 10, true), "another layout");
    let ram = filled();
    ram.atomic_write(meta, text.replace("\"sender\"", "\"author\"").as_bytes()).unwrap();
    assert_eq!(begun(&ram, 0, 10), (0, 10, true), "other fields");
}

#[test]
fn documents_go_by_event_edit_room_and_sender() {
    let ram = RamDirectory::create();
    let (index, progress) = open(&ram, 0, 0);
    let mut change = index.write();
    for event in 1..=4 {
        change.add(&document(event, None, "needle")).unwrap();
    }
    change.add(&document(5, Some(9), "needle")).unwrap();
    change.add(&Document { later: vec![(EventNum(9), at(9))], ..document(5, None, "needle") }).unwrap();
    change.commit(&progress).unwrap();
    change.delete_event(ROOM, EventNum(1)).unwrap();
    change.add(&document(6, Some(10), "needle")).unwrap();
    assert_eq!(change.delete_edit(ROOM, EventNum(9)).unwrap(), [EventNum(5)]);
    assert_eq!(change.delete_edit(ROOM, EventNum(10)).unwrap(), [EventNum(6)], "before it is committed, too");
    assert_eq!(change.delete_edit(ROOM, EventNum(11)).unwrap(), []);
    change.commit(&progress).unwrap();
    drop(change);
    assert_eq!(events(&index, "needle"), [4, 3, 2]);
    let mut change = index.write();
    change.delete_sender("@user0:a.example").unwrap();
    change.commit(&progress).unwrap();
    drop(change);
    assert_eq!(events(&index, "needle"), [3]);
    let mut change = index.write();
    change.delete_room(RoomNum(8)).unwrap();
    change.commit(&progress).unwrap();
    drop(change);
    assert_eq!(events(&index, "needle"), [3]);
    let mut change = index.write();
    change.delete_room(ROOM).unwrap();
    change.commit(&progress).unwrap();
    drop(change);
    assert_eq!(events(&index, "needle"), Vec::<u64>::new());
}

#[test]
fn scrubbing_leaves_nothing_of_deleted_words_in_the_files() {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("search");
    let shelf = Shelf::Disk(path.clone());
    let (index, progress) = Index::open(shelf, 16 << 20, false, 0, at(0)).unwrap();
    let mut change = index.write();
    change.add(&document(1, None, "zebrawords")).unwrap();
    change.add(&document(2, None, "ordinarywords")).unwrap();
    change.commit(&progress).unwrap();
    change.delete_event(ROOM, EventNum(1)).unwrap();
    change.commit(&progress).unwrap();
    let holds = |word: &str| {
        let (searcher, fields) = index.searcher();
        searcher.doc_freq(&Term::from_field_text(fields.text, word)).unwrap() > 0
    };
    let dictionaries = || {
        let files = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|extension| extension == "term")).count()
    };
    assert!(holds("zebrawords"), "a deleted document is only marked");
    change.scrub().unwrap();
    assert!(!holds("zebrawords"));
    assert!(holds("ordinarywords"));
    assert_eq!(dictionaries(), index.searcher().0.segment_readers().len(), "the old files are gone");
    drop(change);
    assert_eq!(events(&index, "ordinarywords"), [2]);
}

#[test]
fn a_walk_knows_what_it_will_still_read() {
    let walk = Walk::new(at(100)).at(RoomNum(5), Place::live(at(50)));
    for (room, order, will) in [
        (4, Place::live(at(60)), false),
        (5, Place::live(at(50)), false),
        (5, Place::live(at(51)), true),
        (6, Place::live(at(1)), true),
        (6, Place::live(at(101)), false),
        (6, Place { anchor: at(100), minor: -5 }, true),
    ] {
        assert_eq!(walk.will_read(RoomNum(room), order), will, "{room} {order:?}");
    }
}

#[test]
fn what_is_kept_of_a_message_holds_no_text() {
    let (schema, _) = schema();
    let stored: BTreeSet<&str> =
        schema.fields().filter(|(_, entry)| entry.is_stored()).map(|(_, entry)| entry.name()).collect();
    assert_eq!(stored, BTreeSet::new());
}
