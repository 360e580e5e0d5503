//! Bounds on an answer while it streams in.
//!
//! An answer comes from a server that may be hostile: it may send without end, nest without end, or send few bytes that
//! take much memory once they are parsed. So bytes, levels and values are counted piece by piece, before anything
//! parses them, and all answers that are in memory share one [`Memory`].

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    json::tree::DEPTH_MAX,
    ports::{Body, NotSent},
};

/// A server that sends nothing for this long has given up, or wants to hold us.
const PIECE_TIMEOUT: Duration = Duration::from_secs(30);

/// Memory is counted in pieces of this many bytes.
const PIECE_BYTES: usize = 4096;

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

/// The memory for all answers that are being read or worked on. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Semaphore>);

impl Memory {
    /// Memory for this many bytes, at least one piece.
    pub fn new(bytes_max: usize) -> Self {
        Self(Arc::new(Semaphore::new((bytes_max / PIECE_BYTES).clamp(1, Semaphore::MAX_PERMITS))))
    }

    fn take(&self, bytes: usize) -> Result<Option<OwnedSemaphorePermit>, NotRead> {
        let pieces = u32::try_from(bytes.div_ceil(PIECE_BYTES)).map_err(|_| NotRead::NoMemory)?;
        if pieces == 0 {
            return Ok(None);
        }
        // Nobody waits: two answers that wait for each other's memory would wait for ever.
        Arc::clone(&self.0).try_acquire_many_owned(pieces).map(Some).map_err(|_| NotRead::NoMemory)
    }
}

/// The whole body of an answer. Its memory counts until this is dropped.
#[derive(Debug)]
pub struct Answer {
    bytes: Bytes,
    _memory: Option<OwnedSemaphorePermit>,
}

impl Answer {
    /// The bytes.
    pub const fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

/// Reads a body to its end, within bounds. Errors: [`NotRead`].
pub async fn collect(mut body: Body, limits: Limits, memory: &Memory) -> Result<Answer, NotRead> {
    let mut counter = Counter::new(limits);
    let mut bytes = BytesMut::new();
    let mut held: Option<OwnedSemaphorePermit> = None;
    let mut held_bytes = 0;
    loop {
        let piece = tokio::time::timeout(PIECE_TIMEOUT, body.next()).await.map_err(|_| NotRead::Stalled)?;
        let Some(piece) = piece else { break };
        let piece = piece?;
        counter.count(&piece)?;
        let needed = bytes.len() + piece.len();
        if needed > held_bytes {
            // It grows as the buffer does, so that a large answer takes its memory in few steps.
            let more = needed.max(held_bytes * 2).min(limits.bytes_max).max(needed) - held_bytes;
            let more = more.div_ceil(PIECE_BYTES) * PIECE_BYTES;
            if let Some(permit) = memory.take(more)? {
                match &mut held {
                    Some(held) => held.merge(permit),
                    None => held = Some(permit),
                }
            }
            held_bytes += more;
            bytes.reserve(held_bytes - bytes.len());
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(Answer { bytes: bytes.freeze(), _memory: held })
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
        let answer = collect(body(pieces), limits, &Memory::new(1 << 20)).await?;
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
    async fn all_answers_share_one_memory_and_give_it_back() {
        let memory = Memory::new(3 * PIECE_BYTES);
        let large = "x".repeat(PIECE_BYTES);
        let limits = Limits::bytes(100_000);
        let first = collect(body(&[&large, "y"]), limits, &memory).await.unwrap();
        assert_eq!(first.bytes().len(), PIECE_BYTES + 1);
        let second = collect(body(&[&large, "y"]), limits, &memory).await;
        assert_eq!(second.unwrap_err(), NotRead::NoMemory);
        drop(first);
        assert!(collect(body(&[&large, "y"]), limits, &memory).await.is_ok());
        assert_eq!(memory.0.available_permits(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_stalls_or_breaks_is_given_up() {
        let memory = Memory::new(1 << 20);
        let stalled = Body::new(stream::iter([Ok(Bytes::from("{"))]).chain(stream::pending()));
        assert_eq!(collect(stalled, Limits::JSON, &memory).await.unwrap_err(), NotRead::Stalled);
        let broken = NotSent::Broken("reset".into());
        let breaks = Body::new(stream::iter([Ok(Bytes::from("{")), Err(broken.clone())]));
        assert_eq!(collect(breaks, Limits::JSON, &memory).await.unwrap_err(), broken.into());
    }
}
