//! Searches in indexes that are made for them.

use std::collections::BTreeSet;

use tantivy::directory::RamDirectory;

use super::*;
use crate::{
    ids::{Order, Position},
    search::index::{Document, Shelf},
};

fn at(number: u64) -> Position {
    Position::new(number).unwrap()
}

/// An index with these texts, each in a room of this number. The events are numbered from 1 on.
fn index_of(texts: &[(u64, &str)]) -> Index {
    let ram = RamDirectory::create();
    let (index, progress) = Index::open(Shelf::Memory(ram), 16 << 20, false, 0, Position::ZERO).unwrap();
    let mut change = index.write();
    for (number, (room, text)) in texts.iter().enumerate() {
        let event = number as u64 + 1;
        let document = Document {
            room: RoomNum(*room),
            event: EventNum(event),
            edit: None,
            later: Vec::new(),
            order: Order::live(at(event)),
            sent_ms: event,
            kind: TextKind::Body,
            has_url: false,
            sender: format!("@user{}:a.example", event % 2),
            text: (*text).to_owned(),
        };
        change.add(&document).unwrap();
        if number % 3 == 0 {
            change.commit(&progress).unwrap();
        }
    }
    change.commit(&progress).unwrap();
    drop(change);
    index
}

fn ask(index: &Index, term: &str, rooms: &[Scope], order_by: OrderBy) -> Found {
    let words = Words::parse(term).unwrap();
    let (kinds, url, senders) = (&TextKind::ALL, None, None);
    find(
        index,
        &Question { words: &words, rooms, kinds, url, senders, not_senders: &[], order_by, after: None },
    )
    .unwrap()
}

fn events(found: &Found) -> Vec<u64> {
    found.candidates.iter().map(|candidate| candidate.event().0).collect()
}

fn whole(rooms: impl IntoIterator<Item = u64>) -> Vec<Scope> {
    let seen = vec![(Position::ZERO, Position::MAX)];
    rooms.into_iter().map(|room| Scope { room: RoomNum(room), seen: seen.clone() }).collect()
}

#[test]
fn a_search_is_read_as_words_and_as_pairs_of_characters() {
    let spaced = |text: &str| Part::Spaced(text.to_owned());
    let run = |pairs: &[&str]| Part::Run(pairs.iter().map(|pair| (*pair).to_owned()).collect());
    for (text, parts) in [
        ("", vec![]),
        ("Two words two", vec![spaced("two"), spaced("words")]),
        ("東京都 猫", vec![run(&["東京", "京都"]), Part::Single("猫".into())]),
        ("東京 大阪", vec![run(&["東京"]), run(&["大阪"])]),
        ("a東b", vec![spaced("a"), Part::Single("東".into()), spaced("b")]),
    ] {
        assert_eq!(Words::parse(text).unwrap(), Words(parts), "{text}");
    }
}

#[test]
fn a_search_is_bounded() {
    assert!(Words::parse(&"x".repeat(SEARCH_BYTES_MAX + 1)).is_err());
    let many: String = (0..=WORDS_MAX).map(|number| format!("w{number} ")).collect();
    assert!(Words::parse(&many).is_err());
    // Each character makes a pair with the next one.
    let different: String = (0x4e00..0x4e00 + 42).filter_map(char::from_u32).collect();
    assert!(Words::parse(&different).is_err());
    let different: String = (0x4e00..0x4e00 + 41).filter_map(char::from_u32).collect();
    assert!(Words::parse(&different).is_ok());
}

#[test]
fn only_these_rooms_are_searched_and_none_above_its_end() {
    // More rooms than a query names to the index, and fewer.
    for count in [3, ROOMS_NAMED_MAX as u64 + 10] {
        let texts: Vec<(u64, &str)> = (0..count).map(|room| (room, "needle")).collect();
        let index = index_of(&texts);
        let all = ask(&index, "needle", &whole(0..count), OrderBy::Recent);
        assert_eq!(events(&all), (1..=count).rev().collect::<Vec<_>>());
        let but_one = ask(&index, "needle", &whole(1..count), OrderBy::Recent);
        assert_eq!(events(&but_one), (2..=count).rev().collect::<Vec<_>>());
        assert_eq!(but_one.counts.len() as u64, count - 1);
        let mut scopes = whole(0..count);
        scopes[1].seen = vec![(Position::ZERO, at(1)), (at(3), Position::MAX)];
        let ended = ask(&index, "needle", &scopes, OrderBy::Recent);
        assert!(!events(&ended).contains(&2));
        assert_eq!(ended.counts.get(&RoomNum(1)), None, "what is above the end is not counted");
    }
}

#[test]
fn each_searcher_finds_the_newest_text_that_they_see() {
    let ram = RamDirectory::create();
    let (index, progress) = Index::open(Shelf::Memory(ram), 16 << 20, false, 0, Position::ZERO).unwrap();
    let mut change = index.write();
    // The message at 1 was edited at 10, 20 and 30.
    let edits = [10, 20, 30].map(|number| (EventNum(number), at(number)));
    for (number, edit) in [None, Some(edits[0]), Some(edits[1]), Some(edits[2])].into_iter().enumerate() {
        let document = Document {
            room: RoomNum(1),
            event: EventNum(1),
            edit,
            later: edits[number..].to_vec(),
            order: Order::live(at(1)),
            sent_ms: 1,
            kind: TextKind::Body,
            has_url: false,
            sender: "@user:a.example".to_owned(),
            text: "needle".to_owned(),
        };
        change.add(&document).unwrap();
    }
    change.commit(&progress).unwrap();
    drop(change);
    let found = |seen: &[(u64, u64)]| {
        let seen = seen.iter().map(|(first, last)| (at(*first), at(*last))).collect();
        let found = ask(&index, "needle", &[Scope { room: RoomNum(1), seen }], OrderBy::Recent);
        let edits = found.candidates.iter().map(|candidate| candidate.edit.map_or(0, |edit| edit.0));
        edits.collect::<Vec<_>>()
    };
    for (seen, edit) in [
        (vec![(0, 99)], 30),
        (vec![(0, 9)], 0),
        (vec![(0, 10)], 10),
        (vec![(0, 29)], 20),
        (vec![(0, 5), (15, 25)], 20),
        (vec![(0, 5), (12, 18)], 0),
        (vec![(0, 12), (18, 19), (25, 40)], 30),
    ] {
        assert_eq!(found(&seen), [edit], "{seen:?}");
    }
    assert_eq!(found(&[(5, 99)]).len(), 0, "the message itself is not seen");
}

#[test]
fn a_better_fit_has_a_greater_rank_and_others_messages_have_no_part_in_it() {
    let index = index_of(&[
        (1, "needle in a very large stack of dry hay that nobody has looked through"),
        (1, "needle"),
        (1, "needles"),
        (1, "needle needle needle"),
    ]);
    let found = ask(&index, "needle", &whole([1]), OrderBy::Rank);
    assert_eq!(events(&found), [4, 2, 1, 3]);
    let score = |found: &Found, event| {
        found.candidates.iter().find(|candidate| candidate.event().0 == event).unwrap().score
    };
    let before = score(&found, 2);
    let mut more = vec![(1, "other"), (1, "needle")];
    more.extend(std::iter::repeat_n((2, "needle"), 50));
    let after = ask(&index_of(&more), "needle", &whole([1]), OrderBy::Rank);
    assert_eq!(events(&after), [2]);
    assert_eq!(score(&after, 2).to_bits(), before.to_bits());
}

#[test]
fn the_best_of_many_are_handed_on_and_a_page_goes_on_below_a_key() {
    let count = CANDIDATES_MAX as u64 + 200;
    let texts: Vec<(u64, &str)> = (0..count).map(|_| (1, "needle")).collect();
    let index = index_of(&texts);
    let found = ask(&index, "needle", &whole([1]), OrderBy::Recent);
    assert_eq!(events(&found), (201..=count).rev().collect::<Vec<_>>());
    assert!(found.is_more);
    assert_eq!(found.counts.get(&RoomNum(1)), Some(&count));
    let words = Words::parse("needle").unwrap();
    let rest = find(
        &index,
        &Question {
            words: &words,
            rooms: &whole([1]),
            kinds: &TextKind::ALL,
            url: None,
            senders: None,
            not_senders: &[],
            order_by: OrderBy::Recent,
            after: found.candidates.last().map(|last| last.key),
        },
    );
    let rest = rest.unwrap();
    assert_eq!(events(&rest), (1..=200).rev().collect::<Vec<_>>());
    assert!(!rest.is_more);
    assert_eq!(rest.counts.get(&RoomNum(1)), Some(&count), "all are counted, whatever page is asked for");
}

#[test]
fn a_word_stands_for_all_that_begin_with_it_whatever_other_rooms_have() {
    // Another room is full of words that begin so, each of them more common than those of this one, and before them in the alphabet.
    let others: Vec<String> =
        (0..600).map(|at| (0..20).map(|word| format!("abca{:05} ", at / 2 * 20 + word)).collect()).collect();
    let mut texts = vec![(1, "abczebra"), (1, "abc"), (1, "abd"), (1, "Abcäöü")];
    texts.extend(others.iter().map(|text| (2, text.as_str())));
    let crowded = index_of(&texts);
    let alone = index_of(&texts[..4]);
    for term in ["abc", "abcz", "abczebra", "ABCÄ", "ab", "abcdef"] {
        for order_by in [OrderBy::Rank, OrderBy::Recent] {
            let (found, expected) =
                (ask(&crowded, term, &whole([1]), order_by), ask(&alone, term, &whole([1]), order_by));
            assert_eq!(found, expected, "{term}");
        }
    }
    assert_eq!(
        events(&ask(&crowded, "abc", &whole([1]), OrderBy::Rank)),
        [2, 4, 1],
        "the word itself is the best"
    );
    assert_eq!(ask(&crowded, "abca", &whole([2]), OrderBy::Rank).counts.get(&RoomNum(2)), Some(&600));
}

#[test]
fn long_words_are_found_by_their_beginnings_up_to_a_bound() {
    let long = "abcdefghijklmnopqrstuvwxyz";
    let index = index_of(&[(1, long), (1, "x")]);
    let count = |term: &str| ask(&index, term, &whole([1]), OrderBy::Recent).candidates.len();
    assert_eq!((count(&long[..2]), count(&long[..3]), count(&long[..20])), (0, 1, 1));
    assert_eq!((count(&long[..21]), count(long)), (0, 1), "a longer word stands for itself");
}

#[test]
fn highlights_are_what_was_found_as_it_is_written() {
    let words = Words::parse("cafe 東京都").unwrap();
    let mut highlights = BTreeSet::new();
    words.add_highlights("Der Café-Besitzer in 東京都, 東京, CAFETERIA; nothing", &mut highlights);
    assert_eq!(highlights, ["Café", "CAFETERIA", "東京都", "東京"].map(str::to_owned).into());
}
