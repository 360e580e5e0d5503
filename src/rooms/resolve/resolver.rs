//! Answers questions: from memory, at once where that is little work, or else by saying that it takes longer, so that a
//! caller in a room's turn can let others go on meanwhile.

use super::{
    Bounds, EVENTS_AT_ONCE, EVENTS_MAX, Loaded, NotResolved, Question, Recent, Resolution, Settled,
    StoredEvents, resolve,
};
use crate::{
    env::Env,
    ids::{Position, RoomNum},
    metrics::Metrics,
    rooms::{graph, state::Sketch, versions},
    store::{Fault, Read},
};

/// Resolve in a turn only states that differ in at most this many keys, so that other changes need not wait.
const LITTLE_DISTANCE: u64 = if cfg!(test) { 40 } else { 256 };
/// Read at most this many events and headers in a turn (each takes about 10 µs).
const LITTLE_EVENTS: usize = if cfg!(test) { 100 } else { 400 };

/// Resolve again in a turn, with the events at hand that were read beside it, states that differ in at most this many
/// keys.
const LOADED_DISTANCE: u64 = 50_000;

/// The outcome of a try to answer a question in a room's turn.
#[derive(Debug)]
pub enum Attempt {
    /// The answer was remembered from before.
    Known(Sketch),
    /// The answer was worked out now.
    New(Sketch),
    /// The answer takes longer than a room's turn may: [`Resolver::work_out`] is to be called beside it.
    TakesLong,
}

/// The means by which a turn resolves states.
#[derive(Clone, Copy)]
pub struct Resolving<'r> {
    /// The resolver of all rooms, which remembers results.
    pub resolver: &'r Resolver,
    /// Events that were read beside the turn, for the event that the turn is about.
    pub loaded: Option<&'r Loaded>,
}

impl<'r> From<&'r Resolver> for Resolving<'r> {
    fn from(resolver: &'r Resolver) -> Self {
        Self { resolver, loaded: None }
    }
}

/// Resolves states, remembers the results and counts how often that helped.
pub struct Resolver {
    recent: Recent,
    env: Env,
    metrics: Metrics,
}

impl Resolver {
    /// A resolver that remembers nothing yet.
    pub fn new(env: Env, metrics: Metrics) -> Self {
        Self { recent: Recent::default(), env, metrics }
    }

    /// Answers a question if the answer is known or little work. With `loaded`, the events that a similar question
    /// needed are at hand, and much more is little work: so a room whose state moves faster than a resolution cannot
    /// make the resolution useless.
    pub fn try_now(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        version: u8,
        question: &Question,
        loaded: Option<&Loaded>,
    ) -> Result<Attempt, NotResolved> {
        if let Some(only) = question.only() {
            return Ok(Attempt::Known(only.clone()));
        }
        // A place of the batch that is being built means another one in every other batch, so no answer about it is
        // remembered.
        if let Ok(settled) = question.clone().settled() {
            let key = settled.key(room);
            let of_loaded = || loaded.and_then(|loaded| loaded.find_answer(&key));
            let known = self.recent.find(&key).or_else(of_loaded);
            self.metrics.cache("resolutions", known.is_some());
            if let Some(known) = known {
                return Ok(Attempt::Known(known));
            }
        }
        let (distance_max, events_max) = match loaded {
            Some(_) => (LOADED_DISTANCE, EVENTS_AT_ONCE),
            None => (LITTLE_DISTANCE, LITTLE_EVENTS),
        };
        if !is_near(read, room, question, distance_max)? {
            return Ok(Attempt::TakesLong);
        }
        match self.resolve(read, room, version, question, loaded, events_max) {
            Ok(answer) => Ok(Attempt::New(answer)),
            Err(NotResolved::TooMuch) => Ok(Attempt::TakesLong),
            Err(why) => Err(why),
        }
    }

    /// Works out an answer, however long that takes, so that [`Resolver::try_now`] knows it. It belongs on the long
    /// pool, beside the room's turns. `read` is a snapshot that has the states of the question. The events that it
    /// reads go to `loaded`. Errors: [`NotResolved::TooMuch`] where it needs more than `events_max` events.
    pub fn work_out(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        version: u8,
        settled: &Settled,
        loaded: &Loaded,
        events_max: usize,
    ) -> Result<(), NotResolved> {
        let key = settled.key(room);
        // Somebody else may have asked the same question meanwhile.
        if self.recent.find(&key).is_none() {
            let question = settled.question();
            let events_max = events_max.min(EVENTS_MAX);
            let answer = self.resolve(read, room, version, question, Some(loaded), events_max)?;
            loaded.keep_answer(key.clone(), answer.clone());
            self.recent.keep(key, answer);
        }
        Ok(())
    }

    /// Whether the states of a question may be further apart than those of a room and a branch that stands in it.
    pub fn is_far(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        settled: &Settled,
    ) -> Result<bool, Fault> {
        Ok(!is_near(read, room, settled.question(), graph::APART_DISTANCE)?)
    }

    fn resolve(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        version: u8,
        question: &Question,
        loaded: Option<&Loaded>,
        events_max: usize,
    ) -> Result<Sketch, NotResolved> {
        let rules = versions::find_rules(version).ok_or(NotResolved::UnknownVersion)?;
        let source = StoredEvents::new(read, room, version);
        let source = source.with_newcomer(question.newcomer()).with_loaded(loaded);
        let began = self.env.instant();
        let Resolution { state, events_loaded } =
            resolve(read, room, rules, question.states(), &source, Bounds::of(events_max))?;
        self.metrics.resolution(self.env.instant().saturating_duration_since(began), events_loaded);
        Ok(state)
    }

    /// Keeps answers that name rows of a batch, now that the store has accepted it: `base` is its first position.
    pub fn keep(&self, room: RoomNum, answers: Vec<(Question, Sketch)>, base: Position) {
        for (question, answer) in answers {
            self.recent.keep(question.settle(base).key(room), answer.settle(base));
        }
    }

    /// The results that the resolver remembers.
    pub fn recent(&self) -> &Recent {
        &self.recent
    }
}

/// Whether the states are so near to one another that resolving them may be little work. Costs a few seeks a state.
fn is_near(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    question: &Question,
    distance_max: u64,
) -> Result<bool, Fault> {
    let Some((first, rest)) = question.states().split_first() else { return Ok(true) };
    let mut distance = 0_u64;
    for other in rest {
        distance = distance.saturating_add(first.distance(read, room, other)?);
        if distance > distance_max {
            return Ok(false);
        }
    }
    Ok(true)
}
