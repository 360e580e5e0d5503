//! Deletes the content of messages whose lifetime is over, in turns of their room (`rooms/change/expire.rs`).

use crate::{
    env::Long,
    error::{Error, Result},
    flows::{App, commit},
    ids::RoomNum,
    rooms::{
        self,
        change::{
            Change,
            expire::{Walk, is_review_due},
        },
        retention::Limits,
    },
    store::timer::{self, Timer},
};

/// Go through this many rooms before looking for more.
const ROOMS_AT_ONCE: usize = 500;

/// Expires the messages of a room that are over. Answers `false` for a room that is not there any more, whose timer is nobody's.
pub(crate) async fn expire(app: &App, room: RoomNum, timer: &Timer) -> Result<bool> {
    let mut walk = Walk::default();
    loop {
        if rooms::find_row(&*app.store.snapshot(), room)?.is_none() {
            return Ok(false);
        }
        let (limits, now_ms, timer) = (Limits::from(&app.config.retention), app.env.now_ms(), timer.clone());
        let turn = commit::beside_room(app, room, move |change| {
            let is_more = change.expire_part(&limits, now_ms, &mut walk)?;
            if !is_more {
                timer::cancel(&mut change.batch, &timer);
            }
            Ok((walk, is_more))
        });
        let (left, is_more) = turn.await?;
        if !is_more {
            return Ok(true);
        }
        walk = left;
    }
}

/// Goes through all rooms, and has the messages of those looked at anew for which the operator has set another lifetime since it was
/// last done.
pub(crate) async fn review(app: &App) -> Result<()> {
    let mut after = RoomNum(0);
    loop {
        let owned = app.clone();
        let look = move || {
            let (snapshot, limits) = (owned.store.snapshot(), Limits::from(&owned.config.retention));
            let part = rooms::list_after(&*snapshot, after, ROOMS_AT_ONCE)?;
            let last = part.last().copied();
            let mut due = Vec::new();
            for room in part {
                if is_review_due(&*snapshot, room, &limits)? {
                    due.push(room);
                }
            }
            Ok((last, due))
        };
        let (last, due) = app.env.blocking_long(Long::Maintenance, look).await?;
        for room in due {
            let (limits, now_ms) = (Limits::from(&app.config.retention), app.env.now_ms());
            let turn = move |change: &mut Change| Ok(change.review_lifetimes(&limits, now_ms)?);
            match commit::beside_room(app, room, turn).await {
                Ok(()) | Err(Error::Refused(_) | Error::Busy { .. }) => {}
                Err(why) => return Err(why),
            }
        }
        let Some(last) = last else { return Ok(()) };
        after = last;
    }
}
