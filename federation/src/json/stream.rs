//! Bounds on an answer while it streams in.
//!
//! An answer comes from a server that may be hostile: it may send without end, nest without end, or send few bytes that
//! take much memory once they are parsed. So bytes, levels and values are counted piece by piece, before anything
//! parses them, and all answers that are in memory share one [`Memory`]. A server that sends too slowly for what it holds is given
//! up.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

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
/// A large answer that comes slowly may go on for this many windows while others wait for its place, and as long as nobody does.
const SLOW_WINDOWS_MAX: u32 = 2;

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

    /// So many bytes must come in each [`WINDOW`]. The time for the whole request bounds how long an answer may take, so that a server
    /// with a slow line can send a large one, too: it only makes room for others who wait for its place.
    const fn least_bytes(self, makes_room: bool) -> usize {
        match self {
            Self::Small => 1,
            Self::Medium => 256 << 10,
            Self::Large if makes_room => 16 << 20,
            Self::Large => 256 << 10,
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
    /// The number of answers that wait for a place among the large ones.
    large_wanted: Arc<AtomicUsize>,
    /// The number of answers that nobody pays for and that wait for their turn.
    turn_wanted: Arc<AtomicUsize>,
    /// Places for those that wait for one among the large ones, which hold none of the memory for answers of medium size.
    lobby: Arc<Semaphore>,
    /// The turn of a payer: of large answers each has one at a time, and so have all for which nobody pays.
    turns: Turns<Option<u64>>,
    payer: Option<u64>,
}

/// Whoever pays for answers holds at most one part in this many of the memory for answers of one size.
const SHARE: usize = 8;
/// Answers for which nobody pays hold at most all but one part in this many of the memory for answers of one size: servers that
/// send slowly what nobody of ours asked for leave some to those who ask.
const KEPT_FREE: usize = 3;
/// At most this many answers wait for a place among the large ones without counting for others; each holds as much as one of medium
/// size may.
const LOBBY_MAX: usize = 8;

/// The number that counts answers for which nobody pays.
const NOBODY: Option<u64> = None;

/// The memory for answers of one size, in pieces.
#[derive(Clone, Debug)]
struct Pool {
    free: Arc<Semaphore>,
    share: usize,
    share_of_nobody: usize,
    held: Arc<Mutex<BTreeMap<Option<u64>, usize>>>,
}

impl Pool {
    /// Memory of this many bytes for answers that have at most as many as `of_answer`. One such answer fits into a share.
    fn new(bytes: usize, of_answer: usize) -> Self {
        let pieces = (bytes / PIECE_BYTES).clamp(1, Semaphore::MAX_PERMITS);
        let (free, held) = (Arc::new(Semaphore::new(pieces)), Arc::default());
        let of_answer = of_answer.div_ceil(PIECE_BYTES);
        let share_of_nobody = (pieces - pieces / KEPT_FREE).max(of_answer);
        Self { free, share: (pieces / SHARE).max(of_answer), share_of_nobody, held }
    }

    /// Takes whole pieces of memory. Nobody waits: two answers that wait for each other's memory would wait for ever.
    fn take(&self, payer: Option<u64>, pieces: usize) -> Result<Taken, NotRead> {
        let counted = u32::try_from(pieces).map_err(|_| NotRead::NoMemory)?;
        let permit = Arc::clone(&self.free).try_acquire_many_owned(counted);
        let permit = permit.map_err(|_| NotRead::NoMemory)?;
        let share = if payer == NOBODY { self.share_of_nobody } else { self.share };
        let mut held = self.held.lock();
        let of_payer = held.get(&payer).copied().unwrap_or_default();
        if of_payer + pieces > share {
            return Err(NotRead::NoMemory);
        }
        held.insert(payer, of_payer + pieces);
        drop(held);
        Ok(Taken { _permit: permit, _paid: Paid { pool: self.clone(), payer, pieces } })
    }
}

/// A part of a pool, given back when it is dropped.
#[derive(Debug)]
struct Taken {
    _permit: OwnedSemaphorePermit,
    _paid: Paid,
}

#[derive(Debug)]
struct Paid {
    pool: Pool,
    payer: Option<u64>,
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
        _turn: Turn<Option<u64>>,
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
            large_wanted: Arc::default(),
            turn_wanted: Arc::default(),
            lobby: Arc::new(Semaphore::new(LOBBY_MAX)),
            turns: Turns::default(),
            payer: None,
        }
    }

    /// Waits for a place among the large answers. What the answer holds so far is given back before that, where there is a place to
    /// wait without it: those of medium size do not wait for large ones.
    async fn take_large(&self, held: &mut Option<Room>) -> Result<Room, NotRead> {
        let turn = {
            let _wanted = (self.payer == NOBODY).then(|| Wanted::one_more(&self.turn_wanted));
            self.turns.enter(self.payer).await
        };
        let large = Arc::clone(&self.large);
        let place = match Arc::clone(&large).try_acquire_owned() {
            Ok(place) => place,
            Err(_) => {
                let _wanted = Wanted::one_more(&self.large_wanted);
                let entering = Arc::clone(&self.lobby).acquire_owned();
                tokio::select! {
                    biased;
                    place = Arc::clone(&large).acquire_owned() => place.map_err(|_| NotRead::NoMemory)?,
                    lobby = entering => {
                        let _lobby = lobby.map_err(|_| NotRead::NoMemory)?;
                        *held = None;
                        large.acquire_owned().await.map_err(|_| NotRead::NoMemory)?
                    }
                }
            }
        };
        Ok(Room::Large { _place: place, _turn: turn })
    }

    /// Whether large answers that come slowly are to make room.
    fn wants_large(&self) -> bool {
        let is_turn_wanted = self.payer == NOBODY && self.turn_wanted.load(Ordering::Relaxed) > 0;
        is_turn_wanted || self.large_wanted.load(Ordering::Relaxed) > 0
    }

    /// The same memory, of which this payer holds no more than a share. All for which nobody pays hold most of it together.
    #[must_use]
    pub fn paid_by(&self, payer: Option<u64>) -> Self {
        Self { payer, ..self.clone() }
    }
}

/// An answer that waits for a place among the large ones.
struct Wanted(Arc<AtomicUsize>);

impl Wanted {
    fn one_more(wanted: &Arc<AtomicUsize>) -> Self {
        wanted.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(wanted))
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The memory that one answer holds: whole pieces, as it is counted.
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
        // The bounds of the sizes are whole pieces, so that the parts of an answer are as many pieces as its bytes.
        let wanted = match size {
            Size::Small => wanted.next_multiple_of(PIECE_BYTES).min(SMALL_BYTES_MAX),
            Size::Medium => wanted.next_multiple_of(PIECE_BYTES).min(MEDIUM_BYTES_MAX),
            Size::Large => bytes_max.max(needed),
        };
        if size == Size::Large {
            if before != Size::Large || self.room.is_none() {
                self.room = Some(memory.take_large(&mut self.room).await?);
            }
        } else {
            let pool = if size == Size::Small { &memory.small } else { &memory.medium };
            match &mut self.room {
                Some(Room::Parts(parts)) if before == size => {
                    parts.push(pool.take(memory.payer, (wanted - self.bytes) / PIECE_BYTES)?);
                }
                _ => self.room = Some(Room::Parts(vec![pool.take(memory.payer, wanted / PIECE_BYTES)?])),
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

/// The memory of an answer of which the bytes are gone. It counts for what was made of them until this is dropped.
#[derive(Debug)]
pub struct Counted {
    _memory: Option<Room>,
}

impl Answer {
    /// Gives up the bytes, and goes on to count their memory for what was made of them.
    pub fn into_counted(self) -> Counted {
        Counted { _memory: self._memory }
    }

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
    let mut slow_windows = 0;
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
        let (came, size) = (bytes.len() - begin, Size::of(bytes.len()));
        let is_slow = size == Size::Large && came < size.least_bytes(true);
        slow_windows = if is_slow { slow_windows + 1 } else { 0 };
        if came < size.least_bytes(slow_windows >= SLOW_WINDOWS_MAX && memory.wants_large()) {
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
    async fn the_largest_answer_of_each_size_fits_into_the_share_of_a_payer() {
        // The memory that all share, as the caller makes it.
        let memory = Memory::new(32 << 20, 96 << 20, 2).paid_by(Some(1));
        for length in
            [SMALL_BYTES_MAX, 10_000_000, MEDIUM_BYTES_MAX, MEDIUM_BYTES_MAX + 1, 60_000_000, 100_000_000]
        {
            for piece in [1_000, 16 << 10, 65_537] {
                let whole = Bytes::from(vec![b'x'; length]);
                let pieces: Vec<_> = (0..length)
                    .step_by(piece)
                    .map(|at| Ok(whole.slice(at..length.min(at + piece))))
                    .collect();
                let limits = Limits::bytes(100_000_000);
                let answer = collect(Body::new(stream::iter(pieces)), limits, &memory).await;
                assert_eq!(answer.map(|it| it.bytes().len()), Ok(length), "in pieces of {piece}");
            }
        }
        for pool in [&memory.small, &memory.medium] {
            assert!(pool.held.lock().is_empty());
        }
    }

    #[tokio::test]
    async fn answers_that_nobody_pays_for_leave_memory_to_those_who_do() {
        let memory = Memory::new(12 * SMALL_BYTES_MAX, 96 << 20, 2);
        let piece = "x".repeat(SMALL_BYTES_MAX);
        let limits = Limits::bytes(SMALL_BYTES_MAX);
        let mut held = Vec::new();
        for _ in 0..8 {
            held.push(collect(body(&[&piece]), limits, &memory).await.unwrap());
        }
        assert_eq!(collect(body(&[&piece]), limits, &memory).await.unwrap_err(), NotRead::NoMemory);
        assert!(collect(body(&[&piece]), limits, &memory.paid_by(Some(1))).await.is_ok());
        // Of large ones they hold one at a time, though there are two places.
        let piece = "x".repeat(1 << 20);
        let (large, limits) = (vec![&*piece; 17], Limits::bytes(32 << 20));
        let first = collect(body(&large), limits, &memory).await.unwrap();
        let mut second = Box::pin(collect(body(&large), limits, &memory));
        assert!(futures_util::poll!(&mut second).is_pending());
        assert!(collect(body(&large), limits, &memory.paid_by(Some(1))).await.is_ok());
        drop(first);
        assert!(second.await.is_ok());
    }

    #[tokio::test]
    async fn those_who_wait_for_a_large_place_hold_nothing_of_the_medium_ones() {
        let memory = Memory::new(1 << 20, 96 << 20, 1);
        let piece = "x".repeat(1 << 20);
        let (large, limits) = (vec![&*piece; 17], Limits::bytes(32 << 20));
        let first = collect(body(&large), limits, &memory.paid_by(Some(1))).await.unwrap();
        let mut waiting = Vec::new();
        for payer in 2..7 {
            let paid = memory.paid_by(Some(payer));
            let pieces = large.clone();
            let mut waits = Box::pin(async move { collect(body(&pieces), limits, &paid).await });
            assert!(futures_util::poll!(&mut waits).is_pending());
            waiting.push(waits);
        }
        assert_eq!(memory.medium.free.available_permits(), (96 << 20) / PIECE_BYTES);
        drop(first);
        for waits in waiting {
            assert_eq!(waits.await.unwrap().bytes().len(), 17 << 20);
        }
        assert_eq!(memory.large_wanted.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    #[expect(clippy::disallowed_methods, reason = "the pieces come by tokio's paused clock")]
    async fn a_large_answer_may_come_slowly_until_others_wait_for_its_place() {
        // One MiB in five seconds is less than two Mbit/s.
        let slow = |pieces: usize| {
            Body::new(Box::pin(stream::unfold(0, move |at| async move {
                tokio::time::sleep(Duration::from_secs(5)).await;
                (at < pieces).then(|| (Ok(Bytes::from(vec![b'x'; 1 << 20])), at + 1))
            })))
        };
        let (memory, limits) = (Memory::new(1 << 20, 96 << 20, 1), Limits::bytes(100 << 20));
        let paid = memory.paid_by(Some(1));
        assert_eq!(collect(slow(60), limits, &paid).await.unwrap().bytes().len(), 60 << 20);
        let piece = "x".repeat(1 << 20);
        let other = async {
            tokio::time::sleep(Duration::from_secs(150)).await;
            let began = tokio::time::Instant::now();
            let answer = collect(body(&vec![&*piece; 17]), limits, &memory.paid_by(Some(2))).await;
            assert!(answer.is_ok() && began.elapsed() <= 2 * WINDOW, "{:?}", began.elapsed());
        };
        let (given_up, ()) = tokio::join!(collect(slow(60), limits, &paid), other);
        assert_eq!(given_up.unwrap_err(), NotRead::Stalled);
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
