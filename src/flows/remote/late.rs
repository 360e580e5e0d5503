//! Leaves a room again that a user left while a join of theirs was on its way. Another server may have taken the join by then, and it
//! comes true here whenever that server tells it, or what it waits for. The job that leaves the room is promised with the leave, begins
//! whenever a join of a user of ours is accepted that another server tells (`flows/room/ingest.rs`), and looks once in a while beside
//! that.
//!
//! Joins that the end of the server has cut off go the same way (`cut_off.rs`).
//!
//! It goes by the ids of those joins, so that a user who came back by another one stays in the room. As long as this server is not in the
//! room itself, it asks the servers that were asked to let the user in to take them out again: others may see the user there, and nobody
//! here could leave a room that is not here.

use std::collections::BTreeSet;

use ruma::{OwnedEventId, OwnedServerName, RoomId};

use crate::{
    error::{Error, Result},
    flows::{
        App, jobs,
        remote::{
            attempts::Sent,
            candidates::find_here,
            take_back::{self, TakenBack},
            template::Wanted,
        },
        room::membership,
        write,
    },
    ids::UserNum,
    rooms::{self, policy::Author},
    schema::jobs::{Job, Left},
    store::{Guard, timer},
};

/// A join that came to nothing within this many milliseconds is not waited for any longer.
const KEPT_MS: u64 = 7 * 24 * 60 * 60 * 1000;
/// Look after this many milliseconds at first, and then ever more seldom.
const FIRST_MS: u64 = 10_000;
/// Look at least this often, in milliseconds.
const AGAIN_MS_MAX: u64 = 60 * 60 * 1000;
/// A server that was asked to let a user in may do so within this many milliseconds.
const TAKES_A_JOIN_MS: u64 = 15 * 60 * 1000;
/// Remember at most this many joins of a user to a room.
const JOINS_MAX: usize = 20;
/// At most this many such jobs are looked up when the server starts.
const LOOKED_UP_MAX: usize = 10_000;

/// Promises that a room is left again once one of these joins comes true. Durable when this returns.
pub(crate) async fn promise(app: &App, user: UserNum, room: &RoomId, sent: Sent) -> Result<()> {
    if sent.is_empty() {
        return Ok(());
    }
    let (joins, servers): (Vec<_>, Vec<_>) = sent.into_iter().unzip();
    promise_of(app, user, room, (joins, servers.into_iter().collect())).await
}

/// Like [`promise`], where any of these servers may have taken any of these joins.
pub(super) async fn promise_of(
    app: &App,
    user: UserNum,
    room: &RoomId,
    (mut joins, mut servers): (Vec<OwnedEventId>, BTreeSet<OwnedServerName>),
) -> Result<()> {
    let (owned, room) = (app.clone(), room.to_owned());
    let set = move || {
        let (attempts, now_ms) = (&owned.remote.attempts, owned.env.now_ms());
        let mut batch = owned.store.batch(&Guard::own_tables());
        if let Some(known) = attempts.find_late(&room, user) {
            if let Job::LeaveAgain { left, .. } = Job::read(&known)? {
                let others: Vec<_> = left.joins.into_iter().filter(|join| !joins.contains(join)).collect();
                joins.extend(others);
                servers.extend(left.servers);
            }
            timer::cancel(&mut batch, &known);
        }
        joins.truncate(JOINS_MAX);
        let servers = servers.into_iter().take(JOINS_MAX).collect();
        let left = Left { room: room.clone(), joins, servers, until_ms: now_ms.saturating_add(KEPT_MS) };
        let timer = Job::LeaveAgain { user, left }.timer(now_ms.saturating_add(FIRST_MS));
        timer::set(&mut batch, &timer);
        let enqueued = owned.store.enqueue(batch)?;
        attempts.keep_late(&room, user, timer);
        Ok(enqueued)
    };
    let enqueued = app.env.blocking(set).await?;
    write::durable(app, Some(enqueued)).await
}

/// Forgets that a user left a room, who wants in again by whichever join comes true now.
pub(crate) fn forget(app: &App, room: &RoomId, user: UserNum) -> Result<()> {
    let Some(timer) = app.remote.attempts.forget_late(room, user) else { return Ok(()) };
    let mut note = app.store.note(&Guard::own_tables());
    timer::cancel(&mut note, &timer);
    drop(app.store.enqueue_note(note)?);
    Ok(())
}

/// Begins the job that leaves a room again. Answers whether there is one.
pub(crate) fn begin(app: &App, room: &RoomId, user: UserNum) -> bool {
    let job = app.remote.attempts.find_late(room, user);
    let is_one = job.is_some();
    jobs::begin(app, job);
    is_one
}

/// Finds the jobs that an earlier run of the server promised.
pub(crate) fn look_up(app: &App) -> Result<()> {
    let is_one = |kind| kind == Job::LEAVE_AGAIN;
    for timer in timer::list_due(&app.store.view(), u64::MAX, LOOKED_UP_MAX, is_one)? {
        if let Job::LeaveAgain { user, left } = Job::read(&timer)? {
            app.remote.attempts.keep_late(&left.room, user, timer);
        }
    }
    Ok(())
}

/// Leaves the room if one of the joins has come true, or has others take the user out. Gives the job that looks again, with its time in
/// milliseconds since the epoch; none where there is nothing to look for any more.
pub(crate) async fn attend(app: &App, user: UserNum, mut left: Left) -> Result<Option<(Job, u64)>> {
    let snapshot = app.store.snapshot();
    let author = Author::of(&*snapshot, user)?;
    if find_here(app, &left.room)?.is_none() {
        drop(snapshot);
        take_out(app, &author, &mut left).await;
    } else if let Some(num) = rooms::find_room(&*snapshot, &left.room)? {
        drop(snapshot);
        match membership::leave_if_by(app, author, num, left.joins.clone()).await {
            Ok(true) => tracing::info!(room = %left.room, %user, "a room is left again that was joined late"),
            Ok(false) => {}
            Err(Error::Refused(why)) => {
                tracing::debug!(room = %left.room, %user, why = %why.message, "a room is not left again");
            }
            Err(why) => return Err(why),
        }
    }
    let now_ms = app.env.now_ms();
    let ends_in_ms = left.until_ms.saturating_sub(now_ms);
    if ends_in_ms == 0 {
        app.remote.attempts.forget_late(&left.room, user);
        return Ok(None);
    }
    let age_ms = KEPT_MS.saturating_sub(ends_in_ms);
    let next_ms = now_ms.saturating_add(age_ms.clamp(FIRST_MS, AGAIN_MS_MAX));
    let room = left.room.clone();
    let job = Job::LeaveAgain { user, left };
    // A user who came back meanwhile wants that it is found no more.
    if app.remote.attempts.find_late(&room, user).is_some() {
        app.remote.attempts.keep_late(&room, user, job.timer(next_ms));
    }
    Ok(Some((job, next_ms)))
}

/// Has the servers that may have taken a join take the user out of the room again. Those that did are asked no more; one that says that it
/// has not taken the join may do so yet, for as long as it may take over that.
async fn take_out(app: &App, author: &Author, left: &mut Left) {
    let (attempts, user) = (&app.remote.attempts, author.user);
    let still = || attempts.find_late(&left.room, user).is_some() && !attempts.is_under_way(&left.room, user);
    if left.servers.is_empty() || !still() {
        return;
    }
    let _resting = jobs::rest();
    let wanted = Wanted::leave(left.room.clone(), author.user_id.clone());
    let servers = left.servers.iter().cloned().collect();
    let done = take_back::tell(app, &wanted, servers, still).await;
    let age_ms = KEPT_MS.saturating_sub(left.until_ms.saturating_sub(app.env.now_ms()));
    left.servers.retain(|server| match done.get(server) {
        Some(TakenBack::Done) => false,
        Some(TakenBack::Refused) => age_ms < TAKES_A_JOIN_MS,
        Some(TakenBack::Failed) | None => true,
    });
}
