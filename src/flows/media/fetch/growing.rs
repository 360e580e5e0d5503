//! Files of other servers while they are received: what has come of one is given to those who wait for it, before it is whole.
//!
//! The end of it that came last is in memory, and whoever reads as fast as it comes takes it from there. Nobody is waited for: a reader
//! who falls behind goes on from the disk once the file is kept. So a slow reader costs neither memory nor the time of others.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

use super::NotFetched;
use crate::{
    env::Env,
    flows::media::Media,
    media::{Name, kinds, multipart::Head},
    schema::media::ContentRow,
};

/// At most this many bytes of a file that is being received are in memory, for all who read it.
const WINDOW_BYTES: usize = 256 << 10;
/// A file is given as it comes once this many bytes have come. One that has fewer is given when it is whole, so that a failure is told
/// as one, and the answer has its length and its tag.
const GIVEN_FROM_BYTES: u64 = 128 << 10;
/// A file is given as it comes after this time, too, if anything has come.
const GIVEN_AFTER: Duration = Duration::from_secs(1);
/// Readers are told of what has come each time when it is this many bytes more: its server may send it byte by byte, and each time wakes all
/// of them.
const TOLD_EVERY_BYTES: u64 = 16 << 10;
/// A reader takes at most this many bytes at a time.
const PIECE_BYTES: usize = 64 << 10;

/// A file that is being received.
pub(crate) struct Growing {
    /// The content type of the file, as it is kept.
    pub(crate) content_type: String,
    /// The name that it was given.
    pub(crate) name: Option<String>,
    /// The number of its bytes, if its server has said it.
    pub(crate) bytes_announced: Option<u64>,
    began: Instant,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// The bytes that came last.
    window: VecDeque<u8>,
    /// The number of all bytes that have come.
    received: u64,
    /// The number of those of which readers were told.
    told: u64,
    /// The outcome, once there is one: what is kept, or why nothing is.
    ended: Option<Result<ContentRow, NotFetched>>,
}

/// The next step for a reader.
#[derive(Debug)]
pub(crate) enum Next {
    /// Bytes that have come.
    Data(Bytes),
    /// The file is kept, and the rest of it is read from there.
    Kept(ContentRow),
    /// It was not received whole, so that whoever has a part of it must learn that.
    Failed(NotFetched),
}

impl Growing {
    fn new(env: &Env, head: &Head, bytes_announced: Option<u64>) -> Self {
        Self {
            content_type: kinds::kept_type(head.content_type.as_deref()),
            name: head.name.clone(),
            bytes_announced,
            began: env.instant(),
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Adds bytes that have come.
    pub(super) fn add(&self, bytes: &[u8]) {
        let mut state = self.state.lock();
        state.received = state.received.saturating_add(bytes.len() as u64);
        let kept = bytes.get(bytes.len().saturating_sub(WINDOW_BYTES)..).unwrap_or_default();
        let excess = (state.window.len() + kept.len()).saturating_sub(WINDOW_BYTES);
        state.window.drain(..excess);
        state.window.extend(kept);
        let is_told = state.received - state.told >= TOLD_EVERY_BYTES;
        if is_told {
            state.told = state.received;
        }
        drop(state);
        if is_told {
            self.changed.notify_waiters();
        }
    }

    /// Says what came of it. Only the first outcome counts.
    pub(super) fn end(&self, outcome: Result<ContentRow, NotFetched>) {
        self.state.lock().ended.get_or_insert(outcome);
        self.changed.notify_waiters();
    }

    /// Waits for what comes of it.
    pub(super) async fn outcome(&self) -> Result<(), NotFetched> {
        self.when(|state| state.ended.clone()).await.map(drop)
    }

    /// Waits until it is time to give the file as it comes. It never is for one that ends before, or whose beginning is not in memory any
    /// more: then this answers `false`.
    async fn is_to_be_given(&self, env: &Env) -> bool {
        let has_come = |bytes_min: u64| {
            move |state: &State| {
                let has_beginning = state.received == state.window.len() as u64;
                match (state.ended.is_some() || !has_beginning, state.received >= bytes_min) {
                    (true, _) => Some(false),
                    (false, true) => Some(true),
                    (false, false) => None,
                }
            }
        };
        let left = GIVEN_AFTER.saturating_sub(env.instant().saturating_duration_since(self.began));
        tokio::select! {
            biased;
            is = self.when(has_come(GIVEN_FROM_BYTES)) => is,
            () = env.sleep(left) => self.when(has_come(1)).await,
        }
    }

    /// Waits for what comes after so many bytes.
    pub(crate) async fn next(&self, at: u64) -> Next {
        self.when(|state| self.look(state, at)).await
    }

    fn look(&self, state: &State, at: u64) -> Option<Next> {
        let is_kept = match &state.ended {
            Some(Err(why)) => return Some(Next::Failed(why.clone())),
            ended => ended.is_some(),
        };
        // A client that was told a length takes the file for whole once it has that many bytes, so that the last one waits until it is.
        let end = match self.bytes_announced {
            Some(announced) if !is_kept => state.received.min(announced.saturating_sub(1)),
            Some(_) | None => state.received,
        };
        let from = state.received - state.window.len() as u64;
        if at < from || at >= end {
            return state.ended.clone().and_then(Result::ok).map(Next::Kept);
        }
        let skipped = usize::try_from(at - from).ok()?;
        let length = usize::try_from(end - at).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        let mut piece = BytesMut::with_capacity(length);
        let (first, second) = state.window.as_slices();
        for (part, before) in [(first, 0), (second, first.len())] {
            let begin = (skipped + piece.len()).saturating_sub(before).min(part.len());
            let part = part.get(begin..).unwrap_or_default();
            piece.extend_from_slice(part.get(..length - piece.len()).unwrap_or(part));
        }
        Some(Next::Data(piece.freeze()))
    }

    /// Waits until something is found in the state.
    async fn when<T>(&self, find: impl Fn(&State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // A change between the look and the wait is noticed, too.
            changed.as_mut().enable();
            if let Some(found) = find(&self.state.lock()) {
                return found;
            }
            changed.await;
        }
    }
}

/// The files that are being received, each once.
#[derive(Default)]
pub(in crate::flows::media) struct AllGrowing {
    by_name: Mutex<BTreeMap<Name, Arc<Growing>>>,
    begun: Notify,
}

impl AllGrowing {
    /// Finds a file that is being received.
    pub(super) fn find(&self, name: &Name) -> Option<Arc<Growing>> {
        self.by_name.lock().get(name).cloned()
    }

    /// Waits until a file is being received, and it is time to give it as it comes. It may never be.
    pub(super) async fn begun(&self, env: &Env, name: &Name) -> Arc<Growing> {
        loop {
            let begun = self.begun.notified();
            tokio::pin!(begun);
            begun.as_mut().enable();
            if let Some(growing) = self.find(name)
                && growing.is_to_be_given(env).await
            {
                return growing;
            }
            begun.await;
        }
    }
}

/// The entry of a file among those that are being received, which ends with this.
pub(super) struct Entry {
    media: Media,
    name: Name,
    growing: Arc<Growing>,
}

impl Entry {
    /// Has those who wait for a file find it, which begins to come now.
    pub(super) fn new(
        media: &Media,
        env: &Env,
        name: &Name,
        (head, bytes_announced): (&Head, Option<u64>),
    ) -> Self {
        let growing = Arc::new(Growing::new(env, head, bytes_announced));
        let all = &media.0.growing;
        all.by_name.lock().insert(name.clone(), Arc::clone(&growing));
        all.begun.notify_waiters();
        Self { media: media.clone(), name: name.clone(), growing }
    }

    /// The file that is being received.
    pub(super) fn growing(&self) -> &Arc<Growing> {
        &self.growing
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let why = "the fetch ended before the file was whole";
        self.growing.end(Err(NotFetched::Broken(why.to_owned())));
        let mut all = self.media.0.growing.by_name.lock();
        if all.get(&self.name).is_some_and(|it| Arc::ptr_eq(it, &self.growing)) {
            all.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;
    use crate::schema::media::Digest;

    fn growing(bytes_announced: Option<u64>) -> Growing {
        let head = Head { content_type: Some("text/plain".to_owned()), name: None, location: None };
        Growing::new(&Env::simulated(1, 0), &head, bytes_announced)
    }

    fn kept(bytes: u64) -> ContentRow {
        ContentRow { digest: Digest([1; 32]), bytes, content_type: String::new(), name: None }
    }

    /// The next bytes at a place; none while there are none.
    fn data(growing: &Growing, at: u64) -> Option<Bytes> {
        match growing.next(at).now_or_never()? {
            Next::Data(bytes) => Some(bytes),
            other => panic!("{other:?}"),
        }
    }

    fn is_kept(growing: &Growing, at: u64) -> bool {
        matches!(growing.next(at).now_or_never(), Some(Next::Kept(_)))
    }

    #[test]
    fn readers_get_what_has_come_and_those_who_fall_behind_wait_for_the_whole() {
        let growing = growing(None);
        assert_eq!(data(&growing, 0), None);
        growing.add(b"hello ");
        growing.add(b"world");
        assert_eq!(data(&growing, 0).unwrap(), "hello world");
        assert_eq!(data(&growing, 6).unwrap(), "world");
        assert_eq!(data(&growing, 11), None);
        growing.add(&[7; WINDOW_BYTES]);
        assert_eq!(data(&growing, 0), None, "the beginning is not in memory any more");
        assert_eq!(data(&growing, 11).unwrap(), vec![7; PIECE_BYTES]);
        let all = 11 + WINDOW_BYTES as u64;
        growing.end(Ok(kept(all)));
        assert!(is_kept(&growing, 0) && is_kept(&growing, all));
        assert_eq!(data(&growing, all - 1).unwrap().len(), 1);
    }

    #[test]
    fn no_more_is_in_memory_than_may_be_however_it_comes() {
        let growing = growing(None);
        for length in [1, WINDOW_BYTES - 1, 3, WINDOW_BYTES * 3, 5] {
            growing.add(&vec![u8::try_from(length % 251).unwrap(); length]);
            let state = growing.state.lock();
            assert!(state.window.len() <= WINDOW_BYTES && state.window.capacity() <= 2 * WINDOW_BYTES);
        }
        assert_eq!(data(&growing, (WINDOW_BYTES * 4 + 3) as u64).unwrap(), vec![5; 5]);
    }

    #[test]
    fn the_last_byte_of_a_file_with_a_known_length_comes_when_it_is_kept() {
        let growing = growing(Some(5));
        growing.add(b"12345678");
        assert_eq!(data(&growing, 0).unwrap(), "1234", "no more than was announced, less one");
        assert_eq!(data(&growing, 4), None);
        let right = self::growing(Some(5));
        right.add(b"12345");
        right.end(Ok(kept(5)));
        assert_eq!(data(&right, 4).unwrap(), "5");
        assert!(is_kept(&right, 5));
    }

    #[test]
    fn a_file_that_fails_is_never_taken_for_whole() {
        for announced in [None, Some(5)] {
            let growing = growing(announced);
            growing.add(b"12345");
            growing.end(Err(NotFetched::Broken("it broke".to_owned())));
            growing.end(Ok(kept(5)));
            for at in 0..6 {
                assert!(matches!(growing.next(at).now_or_never(), Some(Next::Failed(_))), "{at}");
            }
        }
    }

    proptest! {
        #[test]
        fn readers_get_each_byte_once_and_in_order(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..50),
            announced: bool,
        ) {
            let all = pieces.concat();
            let growing = growing(announced.then_some(all.len() as u64));
            let mut read = Vec::new();
            for piece in &pieces {
                growing.add(piece);
                while let Some(bytes) = data(&growing, read.len() as u64) {
                    read.extend(bytes);
                }
            }
            growing.end(Ok(kept(all.len() as u64)));
            while !is_kept(&growing, read.len() as u64) {
                read.extend(data(&growing, read.len() as u64).unwrap());
            }
            prop_assert_eq!(read, all);
        }
    }
}
