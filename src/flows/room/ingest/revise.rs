//! Learns the state that a join left out, and judges again what came since, in turns of the room
//! (`docs/decisions/partial-state-joins.md`).

use std::{sync::Arc, time::Duration};

use super::{Worked, work_out};
use crate::{
    error::{Error, Result},
    flows::{App, commit},
    ids::{EventNum, RoomNum, StateKeyNum},
    rooms::{
        change::{Change, Completion},
        resolve::{Resolving, Settled},
        state::StateValue,
    },
    schema::jobs::Job,
    store::timer::{self, Timer},
};

/// Learn at most this many keys in one turn.
const LEARNED_AT_ONCE: usize = 200;
/// Take back at most this many servers in one turn.
const RELEASED_AT_ONCE: usize = 500;
/// Events that stand on revised ones may come before them, so that all are judged up to this many times.
const PASSES_MAX: usize = 4;
/// A job that finds another state to learn comes back after this time.
const AGAIN: Duration = Duration::from_secs(10);
/// The state of an earlier stay is completed so many milliseconds after that of the stay after it.
const EARLIER_MS: u64 = 1_000;
/// A question that is not answered in so many tries is left for the next run.
const ANSWERS_MAX: usize = 6;

/// Learns what these keys had in the state before this join of ours, and notes that it is whole then; `after` adds what follows from
/// that to the same batch. Errors: [`Error::Busy`] where the room was left and joined again meanwhile, so that another state is to be
/// learnt.
pub(crate) async fn learn(
    app: &App,
    room: RoomNum,
    join: EventNum,
    values: Vec<(StateKeyNum, StateValue)>,
    after: impl FnOnce(&mut Change) -> Result<()> + Send + 'static,
) -> Result<()> {
    let require_join = move |change: &Change| {
        let is_it = change.row.incomplete().is_some_and(|stay| stay.join == join);
        if is_it { Ok(()) } else { Err(Error::Busy { retry_after: AGAIN }) }
    };
    for some in values.chunks(LEARNED_AT_ONCE) {
        let some = some.to_vec();
        commit::in_room(app, room, move |change| {
            require_join(change)?;
            change.learn(&some)
        })
        .await?;
    }
    commit::in_room(app, room, move |change| {
        require_join(change)?;
        change.note_filled();
        after(change)
    })
    .await
}

/// Refuses a room that was joined again meanwhile, and of whose state a part is unknown again.
fn require_filled(change: &Change) -> Result<()> {
    let is_open = change.row.incomplete().is_some_and(|stay| !stay.is_filled);
    if is_open { Err(Error::Busy { retry_after: AGAIN }) } else { Ok(()) }
}

/// Judges again what came since the join, makes the room's state whole, and fires the timer of the job in the same batch, which
/// sets it anew where the state of an earlier stay is to be completed.
pub(crate) async fn revise(app: &App, room: RoomNum, timer: &Timer) -> Result<()> {
    let release = |change: &mut Change| {
        require_filled(change)?;
        change.release_servers(RELEASED_AT_ONCE)
    };
    while commit::in_room(app, room, release).await? {}
    // References changed their meaning, so that the results of resolutions that name them hold no more.
    app.rooms.resolver().recent().forget(room);
    let mut asking = Asking::of(app, room);
    let (mut from, mut passes, mut is_changed) = (EventNum(0), 1, false);
    loop {
        let (owned, loaded) = (app.clone(), asking.loaded());
        let turn = commit::in_room(app, room, move |change| {
            require_filled(change)?;
            let resolving = Resolving { loaded: loaded.as_deref(), ..owned.rooms.resolver().into() };
            change.revise(from, resolving, owned.env.now_ms())
        });
        let revision = turn.await?;
        is_changed |= revision.is_changed;
        if from != revision.next {
            asking.begin_anew();
        }
        from = revision.next;
        asking.work_out(revision.asks).await?;
        if !revision.is_end {
            continue;
        }
        if is_changed && passes < PASSES_MAX {
            (from, is_changed) = (EventNum(0), false);
            passes += 1;
            continue;
        }
        let (owned, loaded, timer) = (app.clone(), asking.loaded(), timer.clone());
        let turn = commit::in_room(app, room, move |change| {
            require_filled(change)?;
            let resolving = Resolving { loaded: loaded.as_deref(), ..owned.rooms.resolver().into() };
            let completion = change.make_whole(from, resolving)?;
            if matches!(completion, Completion::Whole)
                && timer::fire(&mut change.batch, &timer)?
                && change.row.incomplete().is_some()
            {
                // The state of an earlier stay comes next.
                let due_ms = owned.env.now_ms().saturating_add(EARLIER_MS);
                timer::set(&mut change.batch, &Job::CompleteState { room }.timer(due_ms));
            }
            Ok(completion)
        });
        match turn.await? {
            Completion::Whole => break,
            Completion::More => {}
            Completion::Resolve(question) => asking.work_out(Some(question)).await?,
        }
    }
    app.rooms.resolver().recent().forget(room);
    Ok(())
}

/// Works out answers beside the room's turns, each for the turn that follows.
pub(super) struct Asking<'a> {
    app: &'a App,
    room: RoomNum,
    worked: Option<Worked<'a>>,
    answers: usize,
}

impl<'a> Asking<'a> {
    /// Nothing was worked out yet.
    pub(super) fn of(app: &'a App, room: RoomNum) -> Self {
        Self { app, room, worked: None, answers: 0 }
    }

    /// Notes that the next question is about something else than the ones before.
    pub(super) fn begin_anew(&mut self) {
        self.answers = 0;
    }

    /// The events that were read for the last answer.
    pub(super) fn loaded(&self) -> Option<Arc<crate::rooms::resolve::Loaded>> {
        self.worked.as_ref().map(|worked| Arc::clone(&worked.loaded))
    }

    /// Works out the answer to a question, if there is one. Errors: [`Error::Busy`] where it cannot be had now.
    pub(super) async fn work_out(&mut self, question: Option<Settled>) -> Result<()> {
        // The events that were read are of use for one turn only, and dropping them lets others work something out.
        self.worked = None;
        let Some(question) = question else { return Ok(()) };
        self.answers += 1;
        if self.answers <= ANSWERS_MAX {
            self.worked = work_out(self.app, self.room, question).await?;
        }
        if self.worked.is_some() { Ok(()) } else { Err(Error::Busy { retry_after: Duration::from_secs(60) }) }
    }
}
