//! Versions of backups, their keys, and how much there is of both.

use super::*;
use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

const ALICE: UserNum = UserNum(1);

fn store() -> Store {
    Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
}

fn write<T>(store: &Store, build: impl FnOnce(&mut Batch) -> T) -> T {
    let mut batch = store.batch(&Guard::alone());
    let built = build(&mut batch);
    if batch.row_count() > 0 {
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
    }
    built
}

fn row(auth_data: &str) -> BackupRow {
    BackupRow { algorithm: "a".to_owned(), auth_data: auth_data.to_owned() }
}

fn key(is_verified: bool, first_message_index: u64, forwarded_count: u64) -> BackedUpKey {
    BackedUpKey { is_verified, first_message_index, forwarded_count, session_data: Bytes::from_static(b"{}") }
}

fn upload(room: &str, session: &str, bytes: usize) -> Upload {
    let session_data = Bytes::from(format!("\"{}\"", "x".repeat(bytes)));
    let key = BackedUpKey { session_data, ..key(false, 1, 0) };
    Upload { room: room.to_owned(), session: session.to_owned(), key }
}

fn list(store: &Store, version: u64, only: Option<&str>, after: Option<(&str, &str)>) -> Vec<Upload> {
    let page = list_keys(&*store.snapshot(), ALICE, version, only, after, usize::MAX).unwrap();
    assert!(!page.has_more);
    page.keys
}

/// Requires that all counts are those of the keys that are there, and gives those of a version.
fn counted(store: &Store, version: u64) -> BackupState {
    let snapshot = store.snapshot();
    let mut rooms = BTreeMap::<String, BackupShare>::new();
    for Upload { room, session, key } in list(store, version, None, None) {
        let share = rooms.entry(room.clone()).or_default();
        share.keys += 1;
        share.bytes += row_bytes(&room, &session, &key);
    }
    let said = schema::BACKUP_ROOM.prefix::<(UserNum, u64)>(&*snapshot, (ALICE, version), Direction::Up);
    let said: BTreeMap<_, _> =
        said.unwrap().map(|share| share.map(|((.., room), share)| (room, share)).unwrap()).collect();
    assert_eq!(said, rooms);
    let state = state(&*snapshot, ALICE, version).unwrap();
    assert_eq!(state.keys, rooms.values().map(|share| share.keys).sum::<u64>());
    assert_eq!(state.bytes, rooms.values().map(|share| share.bytes).sum::<u64>());
    state
}

#[test]
fn a_verified_key_is_better_and_then_an_earlier_one_and_then_one_that_was_forwarded_less() {
    let best_first = [
        key(true, 0, 0),
        key(true, 0, 1),
        key(true, 1, 0),
        key(false, 0, 0),
        key(false, 0, 1),
        key(false, 7, 0),
    ];
    for (at, one) in best_first.iter().enumerate() {
        for (other_at, other) in best_first.iter().enumerate() {
            assert_eq!(one.is_better_than(other), at < other_at, "{one:?}, {other:?}");
        }
    }
}

#[test]
fn numbers_are_never_given_twice() {
    assert_eq!((next_number(0, 0), next_number(1, 0)), (1, 2));
    let of_first = next_number(7, 1);
    assert!(of_first > 7 && next_number(of_first, 1) == of_first + 1);
    assert!(next_number(of_first, 511) < 1 << 53);
    let store = store();
    let versions: Vec<_> =
        (0..2).map(|_| write(&store, |batch| create(batch, ALICE, row("{}"), 0).unwrap())).collect();
    write(&store, |batch| delete(batch, ALICE, "2").unwrap());
    let third = write(&store, |batch| create(batch, ALICE, row("{}"), 0).unwrap());
    assert_eq!((versions, third), (vec![1, 2], 3));
    // A restored store, which may have lost versions that clients remember.
    let fourth = write(&store, |batch| create(batch, ALICE, row("{}"), 1).unwrap());
    assert_eq!(fourth, (1 << 40) + 1);
}

#[test]
fn versions_are_named_as_we_name_them() {
    let store = store();
    write(&store, |batch| create(batch, ALICE, row("{}"), 0).unwrap());
    for odd in ["", "0", "01", "+1", " 1", "1 ", "2", "-1", "1.0", "99999999999999999999"] {
        assert!(require(&*store.snapshot(), ALICE, odd).is_err(), "{odd}");
        write(&store, |batch| assert!(delete(batch, ALICE, odd).is_err(), "{odd}"));
    }
    assert!(require(&*store.snapshot(), UserNum(2), "1").is_err());
    assert_eq!(require(&*store.snapshot(), ALICE, "1").unwrap(), 1);
}

#[test]
fn a_user_has_a_bounded_number_of_versions() {
    let store = store();
    for _ in 0..VERSIONS_MAX {
        write(&store, |batch| create(batch, ALICE, row("{}"), 0).unwrap());
    }
    write(&store, |batch| assert!(create(batch, ALICE, row("{}"), 0).is_err()));
    write(&store, |batch| delete(batch, ALICE, "1").unwrap());
    write(&store, |batch| create(batch, ALICE, row("{}"), 0).unwrap());
}

#[test]
fn counts_are_those_of_the_keys_whatever_comes_and_goes() {
    let store = store();
    let version = write(&store, |batch| create(batch, ALICE, row("{}"), 0).unwrap());
    let put = |uploads: &[Upload]| {
        write(&store, |batch| put_some(batch, ALICE, version, uploads, 0).unwrap());
        counted(&store, version)
    };
    let first = put(&[upload("!a", "1", 10), upload("!a", "2", 10), upload("!b", "1", 10)]);
    assert_eq!((first.keys, first.etag), (3, 1));
    assert_eq!(put(&[upload("!a", "1", 99)]), first, "the key is no better");
    let mut better = upload("!a", "1", 99);
    better.key.first_message_index = 0;
    let second = put(&[better, upload("!c", "1", 1), upload("!a", "2", 10)]);
    assert_eq!((second.keys, second.etag), (4, 2));
    let delete = |which: Which| {
        write(&store, |batch| delete_keys(batch, ALICE, version, &which, 0).unwrap());
        let state = counted(&store, version);
        (state.keys, state.etag)
    };
    let session = |room: &str, session: &str| Which::Session(room.to_owned(), session.to_owned());
    assert_eq!(delete(session("!a", "3")), (4, 2));
    assert_eq!(delete(session("!a", "1")), (3, 3));
    assert_eq!(delete(session("!c", "1")), (2, 4));
    assert_eq!(delete(Which::Room("!d".to_owned())), (2, 4));
    assert_eq!(delete(Which::Room("!a".to_owned())), (1, 5));
    assert_eq!(delete(Which::All), (0, 6));
    assert_eq!(delete(Which::All), (0, 6));
    assert_eq!(put(&[upload("!a", "1", 10)]).etag, 7);
    write(&store, |batch| super::delete(batch, ALICE, "1").unwrap());
    for table in [schema::BACKUP_KEY.id, schema::BACKUP_ROOM.id, schema::BACKUP_STATE.id, schema::BACKUP.id] {
        let rows = store
            .snapshot()
            .range_raw(schema::BACKUP.family, vec![table], vec![table + 1], Direction::Up)
            .unwrap()
            .count();
        assert_eq!(rows, 0, "table {table}");
    }
}

#[test]
fn many_keys_are_several_batches_of_bounded_size() {
    let store = store();
    let version = write(&store, |batch| create(batch, ALICE, row("{}"), 0).unwrap());
    // Many small keys, each in a room of its own with a long name, and then a few that are as large as can be.
    let name = |number: usize| format!("!{number:0>254}");
    let mut uploads: Vec<_> = (0..5_000).map(|number| upload(&name(number), &name(number), 8)).collect();
    uploads.extend((0..40).map(|number| upload("!large", &name(number), SESSION_DATA_BYTES_MAX - 2)));
    let (mut begin, mut batches) = (0, 0);
    while begin < uploads.len() {
        begin += write(&store, |batch| {
            let count = put_some(batch, ALICE, version, &uploads[begin..], 0).unwrap();
            batch.check_size().unwrap();
            count
        });
        batches += 1;
        assert_eq!(counted(&store, version).keys, begin as u64);
    }
    assert!(batches >= 6, "{batches}");
    // The whole upload once more changes nothing.
    let before = counted(&store, version);
    write(&store, |batch| put_some(batch, ALICE, version, &uploads, 0).unwrap());
    assert_eq!(counted(&store, version), before);
    assert_eq!(list(&store, version, None, None).len(), uploads.len());
    let after = name(29);
    let rest = list(&store, version, Some("!large"), Some(("!large", &after)));
    assert_eq!((list(&store, version, Some("!large"), None).len(), rest.len()), (40, 10));
    // A page ends with the key that fills it.
    let page = list_keys(&*store.snapshot(), ALICE, version, Some("!large"), None, 1).unwrap();
    assert_eq!((page.keys.len(), page.has_more), (1, true));
}

#[test]
fn a_user_backs_up_a_bounded_amount_over_all_versions_and_may_always_make_it_less() {
    let store = store();
    let [old, new] = [(); 2].map(|()| write(&store, |batch| create(batch, ALICE, row("{}"), 0).unwrap()));
    let put = |version: u64, uploads: &[Upload], bounds: BackupShare| {
        write(&store, |batch| put_some_within(batch, ALICE, version, uploads, 0, bounds).is_ok())
    };
    let bounds = BackupShare { keys: 3, bytes: 1_000 };
    assert!(put(old, &[upload("!a", "1", 10), upload("!a", "2", 10)], bounds));
    assert!(put(new, &[upload("!a", "1", 10)], bounds));
    let mut batch = store.batch(&Guard::alone());
    let fourth = [upload("!a", "2", 10)];
    assert!(put_some_within(&mut batch, ALICE, new, &fourth, 0, bounds).is_err(), "a fourth key");
    let mut longer = upload("!a", "1", 2_000);
    longer.key.first_message_index = 0;
    assert!(put_some_within(&mut batch, ALICE, new, &[longer], 0, bounds).is_err(), "too many bytes");
    drop(batch);
    let mut shorter = upload("!a", "1", 1);
    shorter.key.first_message_index = 0;
    assert!(put(new, &[shorter], BackupShare::default()), "it becomes less");
    write(&store, |batch| delete(batch, ALICE, "1").unwrap());
    assert!(put(new, &[upload("!a", "2", 10)], bounds));
    counted(&store, new);
}
