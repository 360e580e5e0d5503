//! Events that a join left out, because the keys of their servers could not be had, are tried again in the background: the keys are
//! asked for again, ever more seldom, and what can be believed becomes part of the room's state (`rooms/change/left_out.rs`).

use std::{collections::BTreeMap, iter, sync::Arc, time::Duration};

use super::{
    fetch::{Budget, Fetch},
    verify::{self, Verified},
};
use crate::{
    error::Result,
    flows::{App, commit},
    ids::RoomNum,
    rooms::{
        self,
        change::{
            Change, Received, Signed,
            left_out::{self, LeftOut, Remembered, TAKEN_AT_ONCE},
            list_allowing, order_by_auth,
        },
    },
    schema::{
        jobs::Job,
        rooms::{Resident, RoomRow},
    },
    store::{Fault, timer},
};

/// The first try is this many milliseconds after the join.
const FIRST_MS: u64 = 10_000;
/// A try comes at the latest this many milliseconds after the one before.
const AGAIN_MS_MAX: u64 = 60 * 60 * 1000;
/// An event that could not be believed for this many milliseconds is given up: the events that wait for it are by then, too.
const KEPT_MS: u64 = 24 * 60 * 60 * 1000;

/// One try fetches what allows such events for at most this long,
const FETCHING_TAKES_MAX: Duration = Duration::from_secs(60);
/// by at most this many questions,
const REQUESTS_MAX: usize = 300;
/// and looks at most this many events that others give.
const EVENTS_MAX: usize = 1_000;

/// An event that was left out, and what has become of it: `None` while it stays.
type Tried = (Remembered, Option<Option<Received>>);

/// Remembers the events that a join leaves out with the batch that ends the join, and has them tried again.
pub(super) fn remember(app: &App, change: &mut Change, left_out: &[LeftOut]) -> Result<(), Fault> {
    let not_remembered = change.leave_out(left_out, app.env.now_ms())?;
    have_tried(app, change, left_out, not_remembered);
    Ok(())
}

/// Remembers, besides those that the join itself left out, the events that the rest of its state leaves out.
pub(super) fn remember_more(app: &App, change: &mut Change, left_out: &[LeftOut]) -> Result<(), Fault> {
    let not_remembered = change.leave_out_more(left_out, app.env.now_ms())?;
    have_tried(app, change, left_out, not_remembered);
    Ok(())
}

fn have_tried(app: &App, change: &mut Change, left_out: &[LeftOut], not_remembered: usize) {
    if not_remembered > 0 {
        tracing::warn!(room = %change.num, not_remembered, "a join left out more events than are tried again");
    }
    if !left_out.is_empty() {
        let now_ms = app.env.now_ms();
        let job = Job::TakeLeftOut { room: change.num };
        timer::set(&mut change.batch, &job.timer(now_ms.saturating_add(FIRST_MS)));
    }
}

/// Tries the events again that a join of a room left out. Gives the time after which those that are left are to be tried once more;
/// `None` where none are left. Errors: [`Error::Busy`](crate::error::Error::Busy) while the room is being joined.
pub(crate) async fn try_again(app: &App, room: RoomNum) -> Result<Option<Duration>> {
    let owned = app.clone();
    let read = move || {
        let snapshot = owned.store.snapshot();
        Ok((rooms::find_row(&*snapshot, room)?, left_out::list(&*snapshot, room)?))
    };
    let (row, remembered) = app.env.blocking(read).await?;
    let Some(row) = row.filter(|_| !remembered.is_empty()) else { return Ok(None) };
    let now_ms = app.env.now_ms();
    let is_in = matches!(row.resident, Resident::Yes | Resident::Partial);
    let (mut tried, mut signed): (Vec<Tried>, Vec<_>) = (Vec::new(), Vec::new());
    for remembered in remembered {
        let is_over = remembered.row.at_ms.saturating_add(KEPT_MS) <= now_ms || !is_in;
        match Signed::read(room, &row, &remembered.row.json) {
            Ok(event) if !is_over => {
                signed.push(event);
                tried.push((remembered, None));
            }
            _ => tried.push((remembered, Some(None))),
        }
    }
    let since_ms = tried.iter().map(|(it, _)| now_ms.saturating_sub(it.row.at_ms)).min().unwrap_or(0);
    let mut verified = verify::verify(app, row.version, signed).await?.into_iter();
    for (_, fate) in tried.iter_mut().filter(|(_, fate)| fate.is_none()) {
        *fate = match verified.next() {
            Some(Verified::Received(event)) => Some(Some(*event)),
            Some(Verified::Forged(_)) => Some(None),
            Some(Verified::Later(_)) | None => None,
        };
    }
    if is_in {
        bring_allowing(app, (room, &row), &tried).await?;
    }
    let total = tried.len();
    let done = take_in(app, (room, is_in), in_order(&row, tried)?).await?;
    if done > 0 {
        tracing::info!(%room, done, left = total - done, "events that a join left out were tried again");
        app.staged.hurry(room);
    }
    let pause_ms = since_ms.clamp(FIRST_MS, AGAIN_MS_MAX);
    Ok((done < total).then(|| Duration::from_millis(pause_ms)))
}

/// Fetches the events that allow those which can be believed by now, where they are neither here nor among those that were left out:
/// they got lost on the way at that time, too.
async fn bring_allowing(app: &App, (room, row): (RoomNum, &RoomRow), tried: &[Tried]) -> Result<()> {
    let received: Vec<&Received> = tried.iter().filter_map(|(_, fate)| fate.as_ref()?.as_ref()).collect();
    let budget = Budget::new(app, FETCHING_TAKES_MAX, REQUESTS_MAX, EVENTS_MAX);
    let mut fetch = Fetch::begin(app, room, Vec::new(), budget).await?;
    let first = fetch.servers.clone();
    for event in &received {
        let mut allowing = list_allowing(row, event.event())?;
        allowing.retain(|id| !received.iter().any(|other| other.id() == id));
        let lacking = fetch.list_unknown(allowing).await?;
        if lacking.is_empty() {
            continue;
        }
        // The server of its sender has them.
        let of = event.event().sender.server_name();
        fetch.servers =
            iter::once(of.to_owned()).chain(first.iter().filter(|it| *it != of).cloned()).collect();
        fetch.bring_auth(event.id(), lacking).await?;
    }
    Ok(())
}

/// Sorts the events that have come to something: each after those that allow it.
fn in_order(row: &RoomRow, tried: Vec<Tried>) -> Result<Vec<(Remembered, Option<Received>)>> {
    let (mut named, mut order) = (Vec::new(), Vec::new());
    let mut events = BTreeMap::new();
    for (at, (remembered, fate)) in tried.into_iter().enumerate() {
        match fate {
            Some(Some(event)) => {
                named.push((event.id().to_owned(), list_allowing(row, event.event())?));
                order.push(at);
                events.insert(at, (remembered, Some(event)));
            }
            Some(None) => {
                events.insert(at, (remembered, None));
            }
            None => {}
        }
    }
    let sorted = order_by_auth(&named).into_iter();
    let sorted: Vec<usize> = sorted.filter_map(|place| order.get(place).copied()).collect();
    let mut sorted: Vec<_> = sorted.into_iter().filter_map(|at| events.remove(&at)).collect();
    sorted.extend(events.into_values());
    Ok(sorted)
}

/// Takes in events in turns of the room. Gives how many are remembered no longer.
async fn take_in(
    app: &App,
    (room, is_in): (RoomNum, bool),
    events: Vec<(Remembered, Option<Received>)>,
) -> Result<usize> {
    let mut done = 0;
    for some in events.chunks(TAKEN_AT_ONCE) {
        // A state that is resolved meanwhile would be remembered under references to states that now say more.
        let _resolving = Arc::clone(&app.rooms.turns(room).resolving).lock_owned().await;
        let (owned, some) = (app.clone(), some.to_vec());
        let take = move |change: &mut Change| {
            owned.rooms.resolver().recent().forget(room);
            change.take_left_out(&some)
        };
        done += if is_in {
            commit::in_room(app, room, take).await?
        } else {
            commit::beside_room(app, room, take).await?
        };
    }
    Ok(done)
}
