//! Tends the sticky events of a room (MSC4354): judges those again that were soft-failed, when the membership of their senders has
//! changed, and forgets what has ceased to be sticky.

use super::revise::Asking;
use crate::{
    error::{Error, Result},
    flows::{App, commit},
    ids::{EventNum, RoomNum},
    rooms::{
        change::received::Step,
        resolve::{Resolving, Settled},
        sticky,
    },
    schema::jobs::Job,
    store::timer::{self, Timer},
};

/// Judge at most this many events again in one turn of the room.
const AT_ONCE: usize = 20;
/// Where others hold up the turns that judge events again, they are given up after so many, and come next time.
const TURNS_MAX: usize = 200;

/// The outcome of one turn that judges events again.
struct Turn {
    /// The event up to which it came.
    after: Option<(String, EventNum)>,
    /// The question that has to be answered before the next turn.
    asks: Option<Settled>,
    is_end: bool,
}

/// Judges the soft-failed sticky events of a room again, forgets what is old, and fires the timer.
pub(crate) async fn tend(app: &App, room: RoomNum, fired: Timer) -> Result<()> {
    match reconsider(app, room).await {
        // A room that this server has left has nothing to judge.
        Ok(()) | Err(Error::Refused(_)) => {}
        Err(other) => return Err(other),
    }
    let owned = app.clone();
    commit::beside_room(app, room, move |change| {
        let again_ms = sticky::forget_old(&mut change.batch, room, owned.env.now_ms())?;
        if timer::fire(&mut change.batch, &fired)?
            && let Some(again_ms) = again_ms
        {
            timer::set(&mut change.batch, &Job::TendSticky { room }.timer(again_ms));
        }
        Ok(())
    })
    .await
}

async fn reconsider(app: &App, room: RoomNum) -> Result<()> {
    if !sticky::has_soft_failed(&app.store.view(), room)? {
        return Ok(());
    }
    let mut asking = Asking::of(app, room);
    let mut after: Option<(String, EventNum)> = None;
    for _ in 0..TURNS_MAX {
        let (owned, loaded, from) = (app.clone(), asking.loaded(), after.clone());
        let turn = commit::in_room(app, room, move |change| {
            let now_ms = owned.env.now_ms();
            let mut turn = Turn { after: from, asks: None, is_end: true };
            let place = turn.after.as_ref().map(|(sender, event)| (sender.as_str(), *event));
            let some = sticky::list_soft_failed(&change.batch, room, place, AT_ONCE)?;
            turn.is_end = some.len() < AT_ONCE;
            for (sender, event, until_ms) in some {
                let resolving = Resolving { loaded: loaded.as_deref(), ..owned.rooms.resolver().into() };
                match if until_ms > now_ms { change.reconsider(event, resolving, now_ms)? } else { None } {
                    None => turn.after = Some((sender, event)),
                    Some(first) => {
                        turn.is_end = false;
                        if let Step::Resolve(question, _) = first {
                            turn.asks = Some(question);
                        }
                        break;
                    }
                }
            }
            Ok(turn)
        });
        let turn = turn.await?;
        if after != turn.after {
            asking.begin_anew();
        }
        after = turn.after;
        if turn.is_end {
            return Ok(());
        }
        asking.work_out(turn.asks).await?;
    }
    Ok(())
}
