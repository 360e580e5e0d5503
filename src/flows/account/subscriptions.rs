//! Subscribes users to threads, and unsubscribes them (MSC4306).

use ruma::{EventId, OwnedEventId, OwnedRoomId, RoomId, api::error::ErrorKind};

use crate::{
    accounts::{
        Caller,
        subscriptions::{self, Standing, Subscription},
    },
    error::{Exception, Refusal, Result},
    flows::{App, write},
    ids::{EventNum, Order, RoomNum},
    push::rules,
    rooms::{self, event::StoredEvent, relations, visibility::Sight},
    schema::push::Lane,
    store::Read,
};

/// A thread, and the sight of the user who asks for it.
struct Thread {
    room: RoomNum,
    root: EventNum,
    sight: Sight,
}

/// Finds a thread by the id of the event that it grows from, or may grow from. Errors: 404 `M_NOT_FOUND` where there is none that the
/// caller may see.
fn require_thread(
    read: &(impl Read + ?Sized),
    caller: &Caller,
    room: &RoomId,
    root: &EventId,
) -> Result<Thread> {
    let unknown = || Refusal::not_found("There is no such thread that you can see.");
    let num = rooms::find_room(read, room)?.ok_or_else(unknown)?;
    let mut sight = Sight::of(read, num, caller.user, &caller.user_id)?;
    let stored = sight.find(read, root)?.ok_or_else(unknown)?;
    // No thread grows from an event that stands in one.
    if relations::lane_of(read, num, &stored)? != Lane::MAIN {
        return Err(unknown().into());
    }
    Ok(Thread { room: num, root: stored.event(), sight })
}

/// Gives the caller's subscription to a thread. Errors: 404 `M_NOT_FOUND` where they do not subscribe to it, or may not see it.
pub(crate) fn require_subscription(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    root: &EventId,
) -> Result<Subscription> {
    let snapshot = app.store.snapshot();
    let thread = require_thread(&*snapshot, caller, room, root)?;
    let found = subscriptions::find(&*snapshot, caller.user, thread.room, thread.root)?;
    let found = found.filter(|found| found.standing.is_subscribed());
    Ok(found.ok_or_else(|| Refusal::not_found("You do not subscribe to this thread."))?)
}

/// Subscribes the caller to a thread. `cause` is the event for which a client does so by itself. Errors: 404 `M_NOT_FOUND` for a thread
/// that they may not see; 400 `M_NOT_IN_THREAD` for a cause that is not in it; 409 `M_CONFLICTING_UNSUBSCRIPTION` where they
/// have unsubscribed since the cause.
pub(crate) async fn subscribe(
    app: &App,
    caller: &Caller,
    room: OwnedRoomId,
    root: OwnedEventId,
    cause: Option<OwnedEventId>,
) -> Result<()> {
    let owned = caller.clone();
    write::for_caller(app, caller, move |_, batch| {
        let mut thread = require_thread(batch, &owned, &room, &root)?;
        let before = subscriptions::find(batch, owned.user, thread.room, thread.root)?;
        let standing = match cause {
            None => Standing::Manual,
            Some(cause) => {
                let cause = thread.sight.find(batch, &cause)?;
                let cause = require_in_thread(batch, &thread, cause)?;
                match before {
                    Some(before) if before.standing == Standing::Manual => Standing::Manual,
                    Some(before)
                        if before.standing == Standing::Unsubscribed
                            && cause.order <= Order::upto(before.position) =>
                    {
                        return Err(conflicting().into());
                    }
                    _ => Standing::Automatic,
                }
            }
        };
        subscriptions::set(batch, owned.user, thread.room, thread.root, standing)?;
        rules::follow_threads(batch, owned.user, &owned.user_id)?;
        write::wake(batch, owned.user);
        Ok(())
    })
    .await
}

fn require_in_thread(
    read: &(impl Read + ?Sized),
    thread: &Thread,
    cause: Option<StoredEvent>,
) -> Result<StoredEvent> {
    if let Some(cause) = cause
        && relations::lane_of(read, thread.room, &cause)?.root() == Some(thread.root)
    {
        return Ok(cause);
    }
    let why = "`automatic` must be the id of an event in this thread that you can see.";
    Err(Refusal::invalid_param(why).code("IO.ELEMENT.MSC4306.M_NOT_IN_THREAD").into())
}

fn conflicting() -> Refusal {
    let why = "You have unsubscribed from this thread since the event in `automatic`.";
    let refusal = Refusal::new(ErrorKind::Unknown, why).exception(Exception::Taken);
    refusal.code("IO.ELEMENT.MSC4306.M_CONFLICTING_UNSUBSCRIPTION")
}

/// Unsubscribes the caller from a thread; nothing happens where they do not subscribe to it. Errors: 404 `M_NOT_FOUND` for a thread that
/// they may not see.
pub(crate) async fn unsubscribe(
    app: &App,
    caller: &Caller,
    room: OwnedRoomId,
    root: OwnedEventId,
) -> Result<()> {
    let owned = caller.clone();
    write::for_caller(app, caller, move |_, batch| {
        let thread = require_thread(batch, &owned, &room, &root)?;
        let before = subscriptions::find(batch, owned.user, thread.room, thread.root)?;
        if before.is_some_and(|before| before.standing.is_subscribed()) {
            subscriptions::set(batch, owned.user, thread.room, thread.root, Standing::Unsubscribed)?;
            write::wake(batch, owned.user);
        }
        Ok(())
    })
    .await
}
