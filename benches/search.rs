//! Full-text search over an index on disk: the figures of `docs/performance.md`, "Search".
//!
//! `cargo bench --bench search` makes an index of 1,000,000 short messages first, and prints how fast that goes and what it takes on
//! disk. `AQUEDUCT_BENCH_MESSAGES=N` makes it of another size.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a benchmark that fails has nobody to tell but whoever runs it, and it reads the clock"
)]

use std::{hint::black_box, path::Path, time::Instant};

use aqueduct::{
    ids::{EventNum, Order, Position, RoomNum},
    search::{
        find::{OrderBy, Question, Scope, Words, find},
        index::{Document, Index, Shelf, TextKind},
    },
};
use criterion::{Criterion, criterion_group, criterion_main};
use rand::{RngExt, SeedableRng, rngs::ChaCha20Rng};

/// The messages are in this many rooms.
const ROOMS: u64 = 1_000;
/// There are this many different words; the n-th is n times as rare as the first.
const WORDS: u32 = 50_000;
/// A message has at most this many words.
const WORDS_OF_MESSAGE: usize = 20;

fn count() -> u64 {
    std::env::var("AQUEDUCT_BENCH_MESSAGES").ok().map_or(1_000_000, |count| count.parse().unwrap())
}

/// The text of a message: words as they are distributed in languages.
fn text(rng: &mut ChaCha20Rng) -> String {
    let words = (0..rng.random_range(3..=WORDS_OF_MESSAGE)).map(|_| {
        let rank = f64::from(WORDS).powf(rng.random_range(0.0..1.0));
        format!("word{}", rank.floor())
    });
    words.collect::<Vec<_>>().join(" ")
}

fn size(path: &Path) -> u64 {
    std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

fn fill(index: &Index, progress: &aqueduct::search::index::Progress) -> (u64, f64) {
    let mut rng = ChaCha20Rng::seed_from_u64(1);
    let (began, mut bytes) = (Instant::now(), 0);
    let mut change = index.write();
    for number in 1..=count() {
        let text = text(&mut rng);
        bytes += text.len() as u64;
        change
            .add(&Document {
                room: RoomNum(rng.random_range(1..=ROOMS)),
                event: EventNum(number),
                edit: None,
                later: Vec::new(),
                order: Order::live(Position::new(number).unwrap()),
                sent_ms: number * 1_000,
                kind: TextKind::Body,
                has_url: false,
                sender: format!("@user{}:bench.example", number % 5_000),
                text,
            })
            .unwrap();
        if change.count() >= 50_000 {
            change.commit(progress).unwrap();
        }
    }
    change.commit(progress).unwrap();
    (bytes, began.elapsed().as_secs_f64())
}

#[expect(clippy::print_stdout, reason = "the figures are for whoever runs it")]
fn searches(c: &mut Criterion) {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("search");
    let shelf = Shelf::Disk(path.clone());
    let (index, progress) = Index::open(shelf, 64 << 20, true, 0, Position::ZERO).unwrap();
    let (bytes, took) = fill(&index, &progress);
    let rate = count() as f64 / took;
    println!("indexed {} messages of {bytes} bytes in {took:.1} s: {rate:.0} a second", count());
    println!("the index has {} bytes on disk", size(&path));
    let mut group = c.benchmark_group("search");
    group.sample_size(20);
    for (name, term, rooms) in [
        ("rare word, 1000 rooms", "word40000", ROOMS),
        ("common word, 1000 rooms", "word1", ROOMS),
        ("common word, 100 rooms", "word1", 100),
        ("common word, 1 room", "word1", 1),
        ("two words, 1000 rooms", "word12 word7", ROOMS),
        ("many common words, 1000 rooms", "word1 word2 word3 word4 word5 word6 word7 word8", ROOMS),
    ] {
        let words = Words::parse(term).unwrap();
        let rooms: Vec<_> = (1..=rooms)
            .map(|room| Scope { room: RoomNum(room), seen: vec![(Position::ZERO, Position::MAX)] })
            .collect();
        let question = Question {
            words: &words,
            rooms: &rooms,
            kinds: &TextKind::ALL,
            url: None,
            senders: None,
            not_senders: &[],
            order_by: OrderBy::Rank,
            after: None,
        };
        group.bench_function(name, |b| b.iter(|| black_box(find(&index, &question).unwrap())));
    }
    group.finish();
}

criterion_group!(benches, searches);
criterion_main!(benches);
