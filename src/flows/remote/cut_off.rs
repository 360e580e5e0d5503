//! Joins that the end of the server cuts off. Another server may have taken such a join before anything of it was stored here: then the user
//! is in the room for all others, and not here.
//!
//! So a job is promised before a join goes to another server ([`promise`]), and taken back in the batch with which the join counts
//! ([`take_back_in`]), or when it has come to nothing, and whoever may have taken it knows that ([`conclude`]). A job that is left over when
//! the server starts is one whose join was cut off. It looks what became of it ([`attend`]):
//!
//! - This server is in the room: what the user is there is for the room to say. Nothing is to be done.
//! - The user is joining the room anew: it looks again later.
//! - Otherwise the join is given up, as if the user had left meanwhile. The client that asked for it was not answered, and asks again if the
//!   user still wants in, which forgets that it was given up. Until then the servers that may have taken it are asked to take the user out of
//!   the room again, and the room is left where the join comes true here in spite of that (`late.rs`).
//!
//! A join for which another server vouches in a room that this server is in needs no such job: it comes with the events that stand on it.

use std::collections::BTreeSet;

use ruma::{EventId, OwnedServerName, RoomId, ServerName};

use super::{
    attempts::{Attempt, Of},
    candidates::find_here,
    late,
};
use crate::{
    error::{Error, Result},
    flows::{App, jobs, write},
    ids::UserNum,
    schema::jobs::{Job, Left},
    store::{
        Batch, Enqueued, Guard,
        timer::{self, Timer},
    },
};

/// The job is due after this many milliseconds, though the server has not ended: longer than a join mostly takes.
const DUE_MS: u64 = 15 * 60 * 1000;
/// A job whose user is still joining the room looks again after this many milliseconds.
const AGAIN_MS: u64 = 5 * 60 * 1000;
/// A job speaks of at most this many joins, and as many servers: more than are asked for one join.
const JOINS_MAX: usize = 20;
/// At most this many jobs that were left over begin when the server starts. Others begin when they are due.
const BEGUN_MAX: usize = 1_000;

/// Promises to find out what became of a join, should the server end before that is known. Durable when this returns, so that the join may
/// be sent then. Nothing is promised where this server is in the room.
pub(super) async fn promise(
    app: &App,
    (room, user): (&RoomId, UserNum),
    (join, server): (&EventId, &ServerName),
) -> Result<()> {
    if find_here(app, room)?.is_some() {
        return Ok(());
    }
    let (owned, of) = (app.clone(), (room.to_owned(), user));
    let (join, mut servers) = (join.to_owned(), BTreeSet::from([server.to_owned()]));
    let set = move || {
        owned.remote.attempts.with_cut_off(|promised| -> Result<Enqueued> {
            let mut joins = vec![join.clone()];
            let mut batch = owned.store.batch(&Guard::own_tables());
            if let Some(known) = promised.get(&of) {
                let Left { joins: others, servers: asked, .. } = left_of(known)?;
                joins.extend(others.into_iter().filter(|other| *other != join));
                servers.extend(asked);
                timer::cancel(&mut batch, known);
            }
            joins.truncate(JOINS_MAX);
            let servers = servers.into_iter().take(JOINS_MAX).collect();
            let due_ms = owned.env.now_ms().saturating_add(DUE_MS);
            let left = Left { room: of.0.clone(), joins, servers, until_ms: due_ms };
            let timer = Job::EndJoin { user, left }.timer(due_ms);
            timer::set(&mut batch, &timer);
            let enqueued = owned.store.enqueue(batch)?;
            promised.insert(of, timer);
            Ok(enqueued)
        })
    };
    let enqueued = app.env.blocking(set).await?;
    write::durable(app, Some(enqueued)).await
}

/// Takes the promise back with the batch by which the join counts.
pub(super) fn take_back_in(app: &App, batch: &mut Batch, (room, user): (&RoomId, UserNum)) {
    let promised =
        app.remote.attempts.with_cut_off(|promised| promised.get(&(room.to_owned(), user)).cloned());
    if let Some(promised) = promised {
        timer::cancel(batch, &promised);
    }
}

/// Takes the promise back at the end of an attempt, unless another one of the same user goes on. These servers may still believe that the user
/// is in the room, and are asked until they answer.
pub(super) async fn conclude(app: &App, attempt: &Attempt, unanswered: BTreeSet<OwnedServerName>) {
    if !attempt.is_only() {
        return;
    }
    let (room, user) = attempt.of();
    let Some(promised) = app.remote.attempts.with_cut_off(|promised| promised.remove(attempt.of())) else {
        return;
    };
    let concluded = async {
        if !unanswered.is_empty() {
            late::promise_of(app, *user, room, (left_of(&promised)?.joins, unanswered)).await?;
        }
        jobs::cancel(app, &promised)
    };
    if let Err(why) = concluded.await {
        tracing::warn!(%room, %user, %why, "a join has ended, and is looked after once more later");
    }
}

/// Begins the jobs that the last run of the server has left over.
pub(crate) fn begin_all(app: &App) -> Result<()> {
    let is_one = |kind| kind == Job::END_JOIN;
    for left_over in timer::list_due(&app.store.view(), u64::MAX, BEGUN_MAX, is_one)? {
        jobs::begin(app, Some(left_over));
    }
    Ok(())
}

/// Looks what became of a join, and gives it up where it came to nothing.
pub(crate) async fn attend(app: &App, user: UserNum, left: Left, timer: &Timer) -> Result<()> {
    let of: Of = (left.room.clone(), user);
    if app.remote.attempts.is_any_under_way(&left.room, user) {
        let due_ms = app.env.now_ms().saturating_add(AGAIN_MS);
        let job = Job::EndJoin { user, left };
        app.remote.attempts.with_cut_off(|promised| {
            jobs::come_back(app, timer, &job, due_ms)?;
            if promised.get(&of) == Some(timer) {
                promised.insert(of, job.timer(due_ms));
            }
            Ok(())
        })
    } else {
        if find_here(app, &left.room)?.is_none() {
            tracing::info!(room = %left.room, %user, "a join is given up that was on its way when the server ended");
            late::promise_of(app, user, &left.room, (left.joins, left.servers.into_iter().collect())).await?;
        }
        jobs::cancel(app, timer)
    }
}

/// The joins of such a job.
fn left_of(timer: &Timer) -> Result<Left> {
    let job = Job::read(timer)?;
    let Job::EndJoin { left, .. } = job else {
        return Err(Error::broken(format!("a {} job is no join that is on its way", job.name())));
    };
    Ok(left)
}
