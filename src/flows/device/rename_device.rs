//! Changes the display name of a device.

use ruma::OwnedDeviceId;

use crate::{
    accounts::{Caller, devices},
    encryption::device_lists,
    error::Result,
    flows::{App, write},
};

/// Changes the display name of one of the caller's devices; without a name, nothing changes. Errors: 404 if there is no such
/// device.
pub(crate) async fn rename_device(
    app: &App,
    caller: &Caller,
    id: OwnedDeviceId,
    display_name: Option<String>,
) -> Result<()> {
    let (user, user_id) = (caller.user, caller.user_id.clone());
    write::for_caller(app, caller, move |_, batch| {
        let device = devices::require(batch, user, &id)?;
        if display_name.is_none() || display_name == device.display_name {
            return Ok(());
        }
        devices::rename(batch, user, &id, display_name)?;
        // Others are shown the name together with the device's keys.
        device_lists::changed(batch, user, &user_id, &[id])?;
        write::wake_sharing(batch, user);
        Ok(())
    })
    .await
}
