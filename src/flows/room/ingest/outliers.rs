//! Takes in events that others need and that get no place in their room's graph, in turns of the room.

use std::{collections::VecDeque, time::Duration};

use crate::{
    error::Result,
    flows::{App, commit},
    ids::RoomNum,
    rooms::change::{Change, Outcome, Received},
};

/// A turn that has taken this long takes in no further event.
const TURN_TAKES_MAX: Duration = Duration::from_millis(10);
/// A turn takes in no further event once its batch has this many rows.
const TURN_ROWS: usize = 2_000;
/// A turn takes in no further event once its batch has this many bytes.
const TURN_BYTES: usize = 512 << 10;
/// A turn takes in at most this many events.
const TURN_EVENTS_MAX: usize = 200;

/// The reason for which events are taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum For {
    /// Other events name them among their auth events. A room keeps few such events.
    Auth,
    /// They are part of a state that is fetched, or allow such events. The caller bounds them.
    State,
}

/// Takes these events in as outliers, in their order, and answers when the outcomes are durable and visible. An event must come
/// after those that allow it.
pub(crate) async fn take_outliers(
    app: &App,
    room: RoomNum,
    events: Vec<Received>,
    for_what: For,
) -> Result<Vec<Outcome>> {
    let mut waiting: VecDeque<Received> = events.into();
    let mut outcomes = Vec::with_capacity(waiting.len());
    while !waiting.is_empty() {
        let owned = app.clone();
        let turn = commit::in_room(app, room, move |change: &mut Change| {
            let began = owned.env.instant();
            let mut done = Vec::new();
            let is_full = |change: &Change, done: usize| {
                done >= TURN_EVENTS_MAX
                    || change.batch.row_count() > TURN_ROWS
                    || change.batch.byte_count() > TURN_BYTES
                    || owned.env.instant().saturating_duration_since(began) > TURN_TAKES_MAX
            };
            while let Some(event) = waiting.pop_front() {
                done.push(match for_what {
                    For::Auth => change.receive_outlier(&event)?,
                    For::State => change.receive_fetched(&event)?,
                });
                if is_full(change, done.len()) {
                    break;
                }
            }
            Ok((waiting, done))
        });
        let (left, done) = turn.await?;
        waiting = left;
        outcomes.extend(done);
    }
    Ok(outcomes)
}

/// Keeps an event as an outlier if the events that allow it forbid it; [`Outcome::Need`] or [`Outcome::Unknown`] if not.
pub(crate) async fn reject_by_auth(app: &App, room: RoomNum, event: Received) -> Result<Outcome> {
    commit::in_room(app, room, move |change| change.reject_by_auth(&event)).await
}

/// Keeps an event as a rejected outlier, because one that it names among those that allow it is of another room.
pub(crate) async fn reject_for_other_room(app: &App, room: RoomNum, event: Received) -> Result<Outcome> {
    commit::in_room(app, room, move |change| change.reject_for_other_room(&event)).await
}
