//! Logs devices out: their tokens, and all that belonged to them, go.

use ruma::{OwnedDeviceId, UserId};

use crate::{
    accounts::{
        Caller, account_data,
        devices::{self, Device},
        tokens,
    },
    encryption::{device_lists, inbox, keys, to_device},
    error::Result,
    flows::{App, write},
    ids::UserNum,
    push::pushers,
    store::Batch,
};

/// Which devices are logged out.
pub(crate) enum Which {
    /// The caller's own.
    Own,
    /// All of the user's.
    All,
    /// All but the caller's own.
    Others,
    /// These; ids that the user has no device for are passed over.
    These(Vec<OwnedDeviceId>),
}

/// Logs devices of the caller out.
pub(crate) async fn log_out(app: &App, caller: &Caller, which: Which) -> Result<()> {
    let (user, user_id, own) = (caller.user, caller.user_id.clone(), caller.device);
    write::for_user(app, user, move |_, batch| {
        let chosen: Vec<Device> = devices::list(batch, user)?
            .into_iter()
            .filter(|device| match &which {
                Which::Own => device.num == own,
                Which::All => true,
                Which::Others => device.num != own,
                Which::These(ids) => ids.contains(&device.id),
            })
            .collect();
        end_all(batch, user, &user_id, &chosen)
    })
    .await
}

/// Ends these devices of a user, in the user's batch.
pub(crate) fn end_all(batch: &mut Batch, user: UserNum, user_id: &UserId, chosen: &[Device]) -> Result<()> {
    for device in chosen {
        tokens::revoke(batch, user, device.num)?;
        inbox::delete_all(batch, (user, device.num));
        to_device::delete_all(batch, (user, device.num));
        keys::delete_all(batch, (user, device.num));
        pushers::delete_of_device(batch, user, device.num)?;
        account_data::delete(batch, user, &account_data::settings_of_device(&device.id))?;
        devices::delete(batch, user, device);
    }
    if !chosen.is_empty() {
        device_lists::changed(batch, user, user_id)?;
        write::wake_sharing(batch, user)?;
    }
    Ok(())
}
