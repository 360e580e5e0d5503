//! Sends messages to devices of this server.

use std::collections::BTreeMap;

use bytes::Bytes;
use ruma::{
    OwnedUserId, TransactionId, events::AnyToDeviceEventContent, serde::Raw, to_device::DeviceIdOrAllDevices,
};

use crate::{
    accounts::{Caller, devices, users},
    encryption::to_device,
    error::{Refusal, Result},
    flows::{App, write},
    ids::UserNum,
    store::Batch,
};

/// As many messages go into one batch at most, or as many bytes; what is more follows in the next one.
const BATCH_MESSAGES_MAX: usize = 1_000;
const BATCH_BYTES_MAX: usize = 512 << 10;
/// A request names no more users and devices.
const TARGETS_MAX: usize = 10_000;

/// Who gets what.
pub(crate) type Messages =
    BTreeMap<OwnedUserId, BTreeMap<DeviceIdOrAllDevices, Raw<AnyToDeviceEventContent>>>;

struct Target {
    /// None if there is no such user here.
    user: Option<UserNum>,
    device: DeviceIdOrAllDevices,
    message: Bytes,
}

/// `PUT /sendToDevice`: once for each transaction id, however often it is asked and whatever happens meanwhile. Users and
/// devices that are not here are passed over. Errors: 413 for too large messages or full inboxes.
pub(crate) async fn send_to_device(
    app: &App,
    caller: &Caller,
    kind: String,
    txn_id: &TransactionId,
    messages: Messages,
) -> Result<()> {
    if kind.len() > 255 || txn_id.as_str().len() > 255 {
        return Err(Refusal::invalid_param("A type or a transaction id has at most 255 bytes.").into());
    }
    if messages.values().map(BTreeMap::len).sum::<usize>() > TARGETS_MAX {
        return Err(Refusal::too_large("These are too many devices for one request.").into());
    }
    let mut rest = targets(app, caller, &kind, messages)?;
    let sender = (caller.user, caller.device);
    // The order of the targets is the same for each try, so a number says how far an earlier try got.
    let mut begins = 0;
    while !rest.is_empty() {
        let later = rest.split_off(chunk(&rest));
        let now = std::mem::replace(&mut rest, later);
        let ends = begins + now.len() as u64;
        let (kind, txn_id) = (kind.clone(), txn_id.to_string());
        let locked = now.iter().filter_map(|target| target.user).chain([caller.user]).collect();
        write::for_users(app, locked, move |app, batch| {
            let served = to_device::served(batch, sender, &kind, &txn_id)?;
            if served >= ends {
                return Ok(());
            }
            for (_, target) in (begins..).zip(&now).filter(|(index, _)| *index >= served) {
                put(batch, target)?;
            }
            to_device::note_served(batch, sender, &kind, &txn_id, ends, app.env.now_ms())?;
            Ok(())
        })
        .await?;
        begins = ends;
    }
    Ok(())
}

fn targets(app: &App, caller: &Caller, kind: &str, messages: Messages) -> Result<Vec<Target>> {
    let snapshot = app.store.snapshot();
    let mut targets = Vec::new();
    for (user_id, devices) in messages {
        let user = users::find_num(&*snapshot, &user_id)?;
        for (device, content) in devices {
            // Checked for those who are not here, too: what is wrong is wrong.
            let message = to_device::message(&caller.user_id, kind, content.json())?;
            targets.push(Target { user, device, message });
        }
    }
    Ok(targets)
}

/// How many of the first targets go into one batch: at least one.
fn chunk(targets: &[Target]) -> usize {
    let mut bytes = 0;
    let fitting = targets.iter().take(BATCH_MESSAGES_MAX).take_while(|target| {
        bytes += target.message.len();
        bytes <= BATCH_BYTES_MAX
    });
    fitting.count().max(1)
}

fn put(batch: &mut Batch, target: &Target) -> Result<()> {
    let Some(user) = target.user else { return Ok(()) };
    let chosen = match &target.device {
        DeviceIdOrAllDevices::DeviceId(id) => devices::find(batch, user, id)?.into_iter().collect(),
        DeviceIdOrAllDevices::AllDevices => devices::list(batch, user)?,
    };
    for device in &chosen {
        to_device::put(batch, user, device.num, &target.message)?;
    }
    if !chosen.is_empty() {
        write::wake(batch, user);
    }
    Ok(())
}
