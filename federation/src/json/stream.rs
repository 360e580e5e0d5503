//! Bounds on an answer while it streams in.
//!
//! An answer comes from a server that may be hostile: it may send without end, nest without end, or send few bytes that
//! take much memory once they are parsed. So bytes, levels and values are counted piece by piece, before anything
//! parses them, and all answers that are in memory share one [`Memory`]. A server that sends too slowly for what it holds is given
//! up.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    json::tree::DEPTH_MAX,
    ports::{Body, NotSent},
    turns::{Turn, Turns},
};

/// A server that sends nothing for this long has given up, or wants to hold us.
const PIECE_TIMEOUT: Duration = Duration::from_secs(30);

/// An answer that is not complete gets more of itself in each of these times: [`Size::least_bytes`].
const WINDOW: Duration = Duration::from_secs(30);

/// Memory is counted in pieces of this many bytes.
const PIECE_BYTES: usize = 4096;
/// An answer is small as long as it has at most this many bytes.
const SMALL_BYTES_MAX: usize = 256 << 10;
/// An answer is large when it has more than this many bytes.
const MEDIUM_BYTES_MAX: usize = 16 << 20;
/// A buffer grows by at least this many bytes.
const GROWTH_BYTES_MIN: usize = 16 << 10;

/// How large one answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// At most this many bytes.
    pub bytes_max: usize,
    /// At most this many JSON values, because each takes memory that its bytes do not show; 0 for an answer that is not JSON.
    pub values_max: usize,
}

impl Limits {
    /// An answer in JSON: 10 MB.
    pub const JSON: Self = Self { bytes_max: 10_000_000, values_max: 1_000_000 };

    /// An answer with the whole state of a room, as to `send_join`: 100 MB.
    pub const WHOLE_STATE: Self = Self { bytes_max: 100_000_000, values_max: 10_000_000 };

    /// A small document, as keys and well-known answers are: 64 KiB.
    pub const DOCUMENT: Self = Self { bytes_max: 65_536, values_max: 5_000 };

    /// Bytes of any kind, as media.
    pub const fn bytes(bytes_max: usize) -> Self {
        Self { bytes_max, values_max: 0 }
    }
}

/// A bound that an answer exceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    /// It has too many bytes.
    #[error("it has more than {0} bytes")]
    Bytes(usize),
    /// It nests too deep.
    #[error("it nests more than {DEPTH_MAX} levels deep")]
    Depth,
    /// It has too many values.
    #[error("it has more than {0} values")]
    Values(usize),
}

/// An answer that was not read to its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRead {
    /// A bound was exceeded.
    #[error("the answer is too large: {0}")]
    TooLarge(#[from] Exceeded),
    /// The connection broke.
    #[error(transparent)]
    Broken(#[from] NotSent),
    /// Nothing came for too long.
    #[error("the answer stopped coming")]
    Stalled,
    /// Other answers take all the memory there is for them.
    #[error("too many answers are being read at once")]
    NoMemory,
}

/// The size of an answer, as far as it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Size {
    Small,
    Medium,
    Large,
}

impl Size {
    const fn of(bytes: usize) -> Self {
        if bytes <= SMALL_BYTES_MAX {
            Self::Small
        } else if bytes <= MEDIUM_BYTES_MAX {
            Self::Medium
        } else {
            Self::Large
        }
    }

    /// So many bytes must come in each [`WINDOW`].
    const fn least_bytes(self) -> usize {
        match self {
            Self::Small => 1,
            Self::Medium => 256 << 10,
            Self::Large => 16 << 20,
        }
    }
}

/// The memory for all answers that are being read or worked on. Cheap to clone.
///
/// Small answers, those of medium size and large ones have memory apart, so that none of a kind leave others without any. Of large
/// answers there are only a few at once, and further ones wait: whoever asks for the whole state of a room must not fail where the
/// other server has acted on the question already.
#[derive(Clone, Debug)]
pub struct Memory {
    small: Pool,
    medium: Pool,
    large: Arc<Semaphore>,
    /// The turn of a payer: of large answers each has one at a time.
    turns: Turns<u64>,
    payer: Option<u64>,
}

/// Whoever pays for answers holds at most one part in this many of the memory for answers of one size.
const SHARE: usize = 8;

/// The memory for answers of one size, in pieces.
#[derive(Clone, Debug)]
struct Pool {
    free: Arc<Semaphore>,
    share: usize,
    held: Arc<Mutex<BTreeMap<u64, usize>>>,
}

impl Pool {
    /// Memory of this many bytes for answers that have at most as many as `of_answer`. One such answer fits into a share.
    fn new(bytes: usize, of_answer: usize) -> Self {
        let pieces = (bytes / PIECE_BYTES).clamp(1, Semaphore::MAX_PERMITS);
        let (free, held) = (Arc::new(Semaphore::new(pieces)), Arc::default());
        Self { free, share: (pieces / SHARE).max(of_answer.div_ceil(PIECE_BYTES)), held }
    }

    /// Takes memory. Nobody waits: two answers that wait for each other's memory would wait for ever.
    fn take(&self, payer: Option<u64>, bytes: usize) -> Result<Taken, NotRead> {
        let pieces = bytes.div_ceil(PIECE_BYTES);
        let counted = u32::try_from(pieces).map_err(|_| NotRead::NoMemory)?;
        let permit = Arc::clone(&self.free).try_acquire_many_owned(counted);
        let mut taken = Taken { _permit: permit.map_err(|_| NotRead::NoMemory)?, paid: None };
        if let Some(payer) = payer {
            let mut held = self.held.lock();
            let of_payer = held.entry(payer).or_default();
            if *of_payer + pieces > self.share {
                return Err(NotRead::NoMemory);
            }
            *of_payer += pieces;
            taken.paid = Some(Paid { pool: self.clone(), payer, pieces });
        }
        Ok(taken)
    }
}

/// A part of a pool, given back when it is dropped.
#[derive(Debug)]
struct Taken {
    _permit: OwnedSemaphorePermit,
    paid: Option<Paid>,
}

#[derive(Debug)]
struct Paid {
    pool: Pool,
    payer: u64,
    pieces: usize,
}

impl Drop for Paid {
    fn drop(&mut self) {
        let mut held = self.pool.held.lock();
        if let Some(of_payer) = held.get_mut(&self.payer) {
            *of_payer = of_payer.saturating_sub(self.pieces);
            if *of_payer == 0 {
                held.remove(&self.payer);
            }
        }
    }
}

/// The memory that an answer holds until it is dropped.
#[derive(Debug)]
enum Room {
    /// Parts of a pool, as the answer took them while it grew.
    Parts(Vec<Taken>),
    Large {
        _place: OwnedSemaphorePermit,
        _turn: Option<Turn<u64>>,
    },
}

impl Memory {
    /// Memory for this many bytes of small answers, as many of medium size, and this number of large answers, each as large as its
    /// limits let it be.
    pub fn new(small_bytes_max: usize, medium_bytes_max: usize, large_max: usize) -> Self {
        Self {
            small: Pool::new(small_bytes_max, SMALL_BYTES_MAX),
            medium: Pool::new(medium_bytes_max, MEDIUM_BYTES_MAX),
            large: Arc::new(Semaphore::new(large_max.max(1))),
            turns: Turns::default(),
            payer: None,
        }
    }

    async fn take_large(&self) -> Result<Room, NotRead> {
        let turn = match self.payer {
            Some(payer) => Some(self.turns.enter(payer).await),
            None => None,
        };
        let place = Arc::clone(&self.large).acquire_owned().await.map_err(|_| NotRead::NoMemory)?;
        Ok(Room::Large { _place: place, _turn: turn })
    }

    /// The same memory, of which this payer holds no more than a share; without one it is the server's own.
    #[must_use]
    pub fn paid_by(&self, payer: Option<u64>) -> Self {
        Self { payer, ..self.clone() }
    }
}

/// The memory that one answer holds.
#[derive(Debug, Default)]
struct Held {
    room: Option<Room>,
    bytes: usize,
}

impl Held {
    /// Holds as much as an answer of these bytes needs that may become as large as `bytes_max`.
    async fn grow(&mut self, memory: &Memory, needed: usize, bytes_max: usize) -> Result<(), NotRead> {
        if needed <= self.bytes {
            return Ok(());
        }
        // A buffer grows by a part of itself, so that a large answer takes its memory in few steps, and one that stops not much.
        let wanted = needed.saturating_add((needed / 4).max(GROWTH_BYTES_MIN)).min(bytes_max).max(needed);
        let (before, size) = (Size::of(self.bytes), Size::of(needed));
        let wanted = match size {
            Size::Small => wanted.min(SMALL_BYTES_MAX),
            Size::Medium => wanted.min(MEDIUM_BYTES_MAX),
            Size::Large => bytes_max.max(needed),
        };
        if size == Size::Large {
            if before != Size::Large || self.room.is_none() {
                self.room = Some(memory.take_large().await?);
            }
        } else {
            let pool = if size == Size::Small { &memory.small } else { &memory.medium };
            match &mut self.room {
                Some(Room::Parts(parts)) if before == size => {
                    parts.push(pool.take(memory.payer, wanted - self.bytes)?);
                }
                _ => self.room = Some(Room::Parts(vec![pool.take(memory.payer, wanted)?])),
            }
        }
        self.bytes = wanted;
        Ok(())
    }
}

/// The whole body of an answer. Its memory counts until this is dropped.
#[derive(Debug)]
pub struct Answer {
    bytes: Bytes,
    _memory: Option<Room>,
}

impl Answer {
    /// The bytes.
    pub const fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

/// Reads a body to its end, within bounds. Errors: [`NotRead`].
#[expect(clippy::disallowed_methods, reason = "a window is a bound in time as the one of a piece is")]
pub async fn collect(mut body: Body, limits: Limits, memory: &Memory) -> Result<Answer, NotRead> {
    let mut counter = Counter::new(limits);
    let mut bytes = BytesMut::new();
    let mut held = Held::default();
    'windows: loop {
        let begin = bytes.len();
        let window = tokio::time::sleep(WINDOW);
        tokio::pin!(window);
        loop {
            let piece = tokio::select! {
                biased;
                piece = tokio::time::timeout(PIECE_TIMEOUT, body.next()) => piece.map_err(|_| NotRead::Stalled)?,
                () = &mut window => break,
            };
            let Some(piece) = piece else { break 'windows };
            let piece = piece?;
            counter.count(&piece)?;
            held.grow(memory, bytes.len() + piece.len(), limits.bytes_max).await?;
            if bytes.capacity() < bytes.len() + piece.len() {
                bytes.reserve(held.bytes.min(2 * (bytes.len() + piece.len())) - bytes.len());
            }
            bytes.extend_from_slice(&piece);
        }
        if bytes.len() - begin < Size::of(bytes.len()).least_bytes() {
            return Err(NotRead::Stalled);
        }
    }
    Ok(Answer { bytes: bytes.freeze(), _memory: held.room })
}

/// Counts what a body holds, without parsing it.
struct Counter {
    limits: Limits,
    bytes: usize,
    depth: usize,
    values: usize,
    is_in_string: bool,
    is_escaped: bool,
}

impl Counter {
    const fn new(limits: Limits) -> Self {
        Self { limits, bytes: 0, depth: 0, values: 0, is_in_string: false, is_escaped: false }
    }

    fn count(&mut self, piece: &[u8]) -> Result<(), Exceeded> {
        self.bytes = self.bytes.saturating_add(piece.len());
        if self.bytes > self.limits.bytes_max {
            return Err(Exceeded::Bytes(self.limits.bytes_max));
        }
        if self.limits.values_max > 0 {
            piece.iter().try_for_each(|byte| self.count_byte(*byte))?;
        }
        Ok(())
    }

    fn count_byte(&mut self, byte: u8) -> Result<(), Exceeded> {
        if self.is_in_string {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' => self.is_escaped = true,
                b'"' => self.is_in_string = false,
                _ => {}
            }
            return Ok(());
        }
        match byte {
            b'"' => self.is_in_string = true,
            b'{' | b'[' => {
                self.depth += 1;
                self.values += 1;
            }
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b',' => self.values += 1,
            _ => {}
        }
        if self.depth > DEPTH_MAX {
            return Err(Exceeded::Depth);
        }
        if self.values > self.limits.values_max {
            return Err(Exceeded::Values(self.limits.values_max));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn body(pieces: &[&str]) -> Body {
        let pieces: Vec<_> = pieces.iter().map(|it| Ok(Bytes::copy_from_slice(it.as_bytes()))).collect();
        Body::new(stream::iter(pieces))
    }

    const SMALL: Limits = Limits { bytes_max: 1000, values_max: 10 };

    async fn read(pieces: &[&str], limits: Limits) -> Result<Bytes, NotRead> {
        let answer = collect(body(pieces), limits, &Memory::new(1 << 20, 1 << 20, 1)).await?;
        Ok(answer.bytes().clone())
    }

    #[tokio::test]
    async fn an_answer_is_bounded_in_bytes_levels_and_values() {
        assert_eq!(read(&["{\"a\"", ":[1]}"], SMALL).await.unwrap(), "{\"a\":[1]}");
        let long = "x".repeat(501);
        assert_eq!(read(&[&long, &long], SMALL).await, Err(Exceeded::Bytes(1000).into()));
        let deep = "[".repeat(129);
        let deep_limits = Limits { values_max: 1000, ..SMALL };
        assert_eq!(read(&[&deep], deep_limits).await, Err(Exceeded::Depth.into()));
        assert_eq!(read(&["[0,0,0,0,0,", "0,0,0,0,0,0]"], SMALL).await, Err(Exceeded::Values(10).into()));
        // What stands in strings is no structure, also where a string and its escapes are cut in two.
        let quoted = ["[\"[[[[[[[[[[,,,,,,,,,\\", "\"[[[[,,,,,,,,,\\\\", "\"]"];
        assert!(read(&quoted, SMALL).await.is_ok());
        assert!(read(&["]]]]}}}}[[[["], SMALL).await.is_ok(), "whoever parses it sees that this is no JSON");
        assert!(read(&["[[[[[[[[[[[[[[[[[[[["], Limits::bytes(1000)).await.is_ok());
    }

    #[tokio::test]
    async fn small_answers_share_one_memory_and_give_it_back() {
        let memory = Memory::new(2 * GROWTH_BYTES_MIN, 1 << 20, 1);
        let large = "x".repeat(PIECE_BYTES);
        let limits = Limits::bytes(100_000);
        let first = collect(body(&[&large, "y"]), limits, &memory).await.unwrap();
        assert_eq!(first.bytes().len(), PIECE_BYTES + 1);
        let second = collect(body(&[&large, "y"]), limits, &memory).await;
        assert_eq!(second.unwrap_err(), NotRead::NoMemory);
        drop(first);
        assert!(collect(body(&[&large, "y"]), limits, &memory).await.is_ok());
        assert_eq!(memory.small.free.available_permits(), 2 * GROWTH_BYTES_MIN / PIECE_BYTES);
    }

    #[tokio::test]
    async fn whoever_pays_for_answers_holds_a_share_of_the_memory() {
        let memory = Memory::new(16 * SMALL_BYTES_MAX, 1 << 20, 1);
        let (first, second) = (memory.paid_by(Some(1)), memory.paid_by(Some(2)));
        let piece = "x".repeat(SMALL_BYTES_MAX);
        let limits = Limits::bytes(SMALL_BYTES_MAX);
        let (one, two) =
            (collect(body(&[&piece]), limits, &first).await, collect(body(&[&piece]), limits, &first).await);
        assert!(one.is_ok() && two.is_ok());
        assert_eq!(collect(body(&[&piece]), limits, &first).await.unwrap_err(), NotRead::NoMemory);
        assert!(collect(body(&[&piece]), limits, &second).await.is_ok(), "another has their own");
        assert!(collect(body(&[&piece]), limits, &memory).await.is_ok(), "and so has the server");
        drop(one);
        assert!(collect(body(&[&piece]), limits, &first).await.is_ok());
        drop(two);
        assert!(memory.small.held.lock().is_empty());
        assert_eq!(memory.small.free.available_permits(), 16 * SMALL_BYTES_MAX / PIECE_BYTES);
    }

    #[tokio::test]
    async fn large_answers_leave_memory_to_others_and_wait_for_one_another() {
        let memory = Memory::new(1 << 20, 64 << 20, 1);
        let piece = "x".repeat(1 << 20);
        let large = vec![&*piece; 17];
        let limits = Limits::bytes(32 << 20);
        let first = collect(body(&large), limits, &memory).await.unwrap();
        assert_eq!(
            memory.medium.free.available_permits(),
            (64 << 20) / PIECE_BYTES,
            "it holds none of the others'"
        );
        let mut second = Box::pin(collect(body(&large), limits, &memory));
        assert!(futures_util::poll!(&mut second).is_pending(), "it waits for the first");
        assert!(collect(body(&["small"]), limits, &memory).await.is_ok());
        assert!(collect(body(&large[..2]), limits, &memory).await.is_ok());
        drop(first);
        assert_eq!(second.await.unwrap().bytes().len(), 17 << 20);
        // Of two places one payer holds one.
        let memory = Memory::new(1 << 20, 64 << 20, 2);
        let (one, two) = (memory.paid_by(Some(1)), memory.paid_by(Some(2)));
        let first = collect(body(&large), limits, &one).await.unwrap();
        let mut second = Box::pin(collect(body(&large), limits, &one));
        assert!(futures_util::poll!(&mut second).is_pending(), "it waits for their own");
        assert!(collect(body(&large), limits, &two).await.is_ok());
        drop(first);
        assert!(second.await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    #[expect(clippy::disallowed_methods, reason = "the pieces come by tokio's paused clock")]
    async fn an_answer_that_trickles_is_given_up_once_it_holds_much() {
        let memory = Memory::new(1 << 20, 64 << 20, 1);
        let trickle = |first: usize| {
            let begin = stream::iter([Ok(Bytes::from("x".repeat(first)))]);
            let rest = stream::unfold((), |()| async {
                tokio::time::sleep(Duration::from_secs(5)).await;
                Some((Ok(Bytes::from("y")), ()))
            });
            Body::new(begin.chain(rest.take(20)))
        };
        let limits = Limits::bytes(32 << 20);
        assert!(collect(trickle(1_000), limits, &memory).await.is_ok(), "a small one may take its time");
        for first in [1 << 20, 20 << 20] {
            let began = tokio::time::Instant::now();
            assert_eq!(collect(trickle(first), limits, &memory).await.unwrap_err(), NotRead::Stalled);
            assert!(began.elapsed() <= 2 * WINDOW, "{:?}", began.elapsed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_stalls_or_breaks_is_given_up() {
        let memory = Memory::new(1 << 20, 1 << 20, 1);
        let stalled = Body::new(stream::iter([Ok(Bytes::from("{"))]).chain(stream::pending()));
        assert_eq!(collect(stalled, Limits::JSON, &memory).await.unwrap_err(), NotRead::Stalled);
        let broken = NotSent::Broken("reset".into());
        let breaks = Body::new(stream::iter([Ok(Bytes::from("{")), Err(broken.clone())]));
        assert_eq!(collect(breaks, Limits::JSON, &memory).await.unwrap_err(), broken.into());
    }
}
