//! Logs devices out, and deletes their tokens and all that belonged to them.
//!
//! One row ends the devices, however many they are ([`devices::end`]). Their own rows are swept in the same batch if they are
//! few, and otherwise afterwards in several batches; until then nobody sees them.

use ruma::UserId;

use crate::{
    accounts::{
        Caller,
        devices::{self, Ending},
        tokens, users,
    },
    encryption::{cross_signing, device_lists, inbox, keys, to_device},
    error::Result,
    flows::{App, jobs, write},
    ids::UserNum,
    push::pushers,
    schema::jobs::Job,
    store::{Batch, Wake, timer::Timer},
    sync::connections,
};

/// A batch that has swept this many rows begins no further range of devices.
const SWEPT_ROWS: usize = 1_000;
/// A batch deletes at most this many tokens of one range of devices.
const SWEPT_TOKENS: usize = 500;
/// A batch deletes at most this many rows of devices, so that it stays within the bounds of a batch whatever else it holds.
const SWEPT_DEVICES: usize = 200;

/// Logs devices of the caller out.
pub(crate) async fn log_out(app: &App, caller: &Caller, ending: Ending) -> Result<()> {
    let (user, user_id) = (caller.user, caller.user_id.clone());
    let promised =
        write::for_caller(app, caller, move |app, batch| end(app, batch, user, &user_id, &ending)).await?;
    jobs::begin(app, promised);
    Ok(())
}

/// Ends devices in a batch under their user's lock. Answers the promise to sweep their other rows, for [`jobs::begin`] once the
/// batch is accepted; none if nothing is left.
pub(crate) fn end(
    app: &App,
    batch: &mut Batch,
    user: UserNum,
    user_id: &UserId,
    ending: &Ending,
) -> Result<Option<Timer>> {
    let gone = devices::end(batch, user, ending)?;
    if gone.is_empty() {
        return Ok(None);
    }
    pushers::delete_of_ended(batch, user, &users::require(batch, user)?.ended)?;
    if cross_signing::has_lost_signature(batch, user)? {
        device_lists::signing_keys_changed(batch, user, user_id, &gone)?;
    } else {
        device_lists::changed(batch, user, user_id, &gone)?;
    }
    write::wake_sharing(batch, user);
    batch.wake(Wake::Ended { user, user_id: user_id.to_string() });
    if sweep_some(batch, user)? {
        return Ok(None);
    }
    Ok(Some(jobs::promise(app, batch, &Job::SweepDevices { user })))
}

/// Sweeps the rows of ended devices, one batch after the other, until nothing is left.
pub(crate) async fn sweep(app: &App, user: UserNum) -> Result<()> {
    while !write::for_user(app, user, move |_, batch| sweep_some(batch, user)).await? {}
    Ok(())
}

/// Deletes as many rows of ended devices as one batch takes. Answers whether nothing is left.
fn sweep_some(batch: &mut Batch, user: UserNum) -> Result<bool> {
    let mut ended = users::require(batch, user)?.ended;
    if !devices::sweep(batch, user, &ended, SWEPT_DEVICES)? {
        return Ok(false);
    }
    let (before, full) = (ended.clone(), batch.row_count() + SWEPT_ROWS);
    while let Some(range) = ended.first() {
        if batch.row_count() >= full || !tokens::sweep(batch, user, range, SWEPT_TOKENS)? {
            break;
        }
        devices::forget_seen(batch, user, range);
        inbox::sweep(batch, user, range);
        to_device::sweep(batch, user, range);
        keys::sweep(batch, user, range);
        cross_signing::sweep(batch, user, range);
        connections::sweep(batch, user, range);
        ended.remove_first();
    }
    let is_done = ended.first().is_none();
    if ended != before {
        users::set_ended(batch, user, ended)?;
    }
    Ok(is_done)
}
