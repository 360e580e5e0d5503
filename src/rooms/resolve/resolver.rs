//! Answers what states resolve to: from memory, at once where that is little work, or else by saying that it takes
//! longer, so that whoever asks in a room's turn can let others go on meanwhile.

use super::{EVENTS_MAX, NotResolved, Question, Recent, Resolution, StoredEvents, resolve};
use crate::{
    env::Env,
    ids::{Position, RoomNum},
    metrics::Metrics,
    rooms::{state::Sketch, versions},
    store::{Fault, Read},
};

/// What a turn of a room may take: states that differ in at most so many keys ..
const LITTLE_DISTANCE: u64 = if cfg!(test) { 40 } else { 256 };
/// .. and so many events and headers to read (each takes about 10 µs).
const LITTLE_EVENTS: usize = if cfg!(test) { 100 } else { 400 };

/// How an answer was come by.
#[derive(Debug)]
pub enum Attempt {
    /// It was known.
    Known(Sketch),
    /// It was worked out now.
    New(Sketch),
    /// It takes longer than a room's turn may: [`Resolver::work_out`] is to be called beside it.
    TakesLong,
}

/// Resolves, remembers and counts.
pub struct Resolver {
    recent: Recent,
    env: Env,
    metrics: Metrics,
}

impl Resolver {
    /// Nothing is remembered yet.
    pub fn new(env: Env, metrics: Metrics) -> Self {
        Self { recent: Recent::default(), env, metrics }
    }

    /// The answer, if it is known or little work.
    pub fn try_now(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        version: u8,
        question: &Question,
    ) -> Result<Attempt, NotResolved> {
        if let Some(only) = question.only() {
            return Ok(Attempt::Known(only.clone()));
        }
        let known = self.recent.find(&question.key(room));
        self.metrics.cache("resolutions", known.is_some());
        if let Some(known) = known {
            return Ok(Attempt::Known(known));
        }
        if !is_near(read, room, question)? {
            return Ok(Attempt::TakesLong);
        }
        match self.resolve(read, room, version, question, LITTLE_EVENTS) {
            Ok(answer) => Ok(Attempt::New(answer)),
            Err(NotResolved::TooMuch) => Ok(Attempt::TakesLong),
            Err(why) => Err(why),
        }
    }

    /// Works out an answer, however long that takes, so that [`Resolver::try_now`] knows it. It belongs on the long pool,
    /// beside the room's turns. `read` is a snapshot that has the states of the question.
    pub fn work_out(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        version: u8,
        question: &Question,
    ) -> Result<(), NotResolved> {
        let key = question.key(room);
        // Somebody else may have asked the same meanwhile.
        if self.recent.find(&key).is_none() {
            self.recent.keep(key, self.resolve(read, room, version, question, EVENTS_MAX)?);
        }
        Ok(())
    }

    fn resolve(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        version: u8,
        question: &Question,
        events_max: usize,
    ) -> Result<Sketch, NotResolved> {
        let rules = versions::find_rules(version).ok_or(NotResolved::UnknownVersion)?;
        let source = StoredEvents::new(read, room, version, question.newcomer());
        let began = self.env.instant();
        let Resolution { state, events_loaded } =
            resolve(read, room, rules, question.states(), &source, events_max)?;
        self.metrics.resolution(self.env.instant().saturating_duration_since(began), events_loaded);
        Ok(state)
    }

    /// Keeps answers that a batch has made true, now that the store has accepted it: `base` is its first position.
    pub fn keep(&self, room: RoomNum, answers: Vec<(Question, Sketch)>, base: Position) {
        for (question, answer) in answers {
            self.recent.keep(question.settle(base).key(room), answer.settle(base));
        }
    }

    /// What it remembers.
    pub fn recent(&self) -> &Recent {
        &self.recent
    }
}

/// Whether the states are so near to one another that resolving them may be little work. Costs a few seeks a state.
fn is_near(read: &(impl Read + ?Sized), room: RoomNum, question: &Question) -> Result<bool, Fault> {
    let Some((first, rest)) = question.states().split_first() else { return Ok(true) };
    let mut distance = 0_u64;
    for other in rest {
        distance = distance.saturating_add(first.distance(read, room, other)?);
        if distance > LITTLE_DISTANCE {
            return Ok(false);
        }
    }
    Ok(true)
}
