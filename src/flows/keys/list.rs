//! The whole device list of a user of ours, for another server that keeps it up to date by the changes that it is told
//! (server-server API, "Device Management"). It comes in pieces, so that its size costs the server no memory.

use bytes::Bytes;
use ruma::{OwnedDeviceId, OwnedUserId};
use serde_json::Value;

use super::require_own;
use crate::{
    accounts::{devices, users},
    encryption::{device_lists, keys},
    error::{Refusal, Result},
    flows::App,
    ids::UserNum,
    json::{JsonRef, JsonText, Object, Pieces},
};

/// A piece ends once it has this many bytes.
const PIECE_BYTES: usize = 256 << 10;
/// A piece ends once it has looked at this many devices.
const PIECE_DEVICES: usize = 1_000;

/// A device list, as far as it is still to be written.
pub(crate) struct List {
    app: App,
    user: UserNum,
    user_id: OwnedUserId,
    after: Option<OwnedDeviceId>,
    pieces: Pieces,
}

/// Begins the device list of a user: its first piece, and the list for the rest, if there is more. Devices without keys are left
/// out, because nobody can encrypt for them. Errors: 403 `M_FORBIDDEN` for a user of another server, 404 `M_NOT_FOUND` for
/// one whom this server does not have.
pub(crate) async fn list_for_server(app: &App, user_id: OwnedUserId) -> Result<(Bytes, Option<Box<List>>)> {
    require_own(app, std::iter::once(&*user_id))?;
    let owned = app.clone();
    let begin = move || {
        let snapshot = owned.store.snapshot();
        let Some(user) = users::find_num(&*snapshot, &user_id)? else {
            return Err(Refusal::not_found("This server has no such user.").into());
        };
        // The number is that of the first piece. A change that comes while the other pieces are written is told with the number of the
        // one before it, so that the other server takes it, whether it stands in the list already or not.
        let changed = device_lists::find_changed(&*snapshot, &user_id)?;
        let stream_id = changed.map_or(0, |position| position.number());
        let mut pieces = Pieces::object();
        pieces.field("user_id", &JsonText::string(user_id.as_str()));
        pieces.field("stream_id", &JsonText::from(&Value::from(stream_id)));
        let keys = device_lists::find_signing_keys(&*snapshot, (user, &user_id))?;
        for (name, key) in [("master_key", keys.master), ("self_signing_key", keys.self_signing)] {
            if let Some(key) = key {
                pieces.field(name, JsonRef::stored(key.as_str().as_bytes()));
            }
        }
        pieces.open_list("devices");
        let list = Box::new(List { app: owned.clone(), user, user_id, after: None, pieces });
        drop(snapshot);
        list.write_piece()
    };
    app.env.blocking(begin).await
}

impl List {
    /// Writes the next piece, off the async threads, and answers the list for the rest, if there is more.
    pub(crate) async fn next(self: Box<Self>) -> Result<(Bytes, Option<Box<Self>>)> {
        let env = self.app.env.clone();
        env.blocking(move || self.write_piece()).await
    }

    fn write_piece(mut self: Box<Self>) -> Result<(Bytes, Option<Box<Self>>)> {
        let snapshot = self.app.store.snapshot();
        let page = devices::list_after(&*snapshot, self.user, self.after.as_deref(), PIECE_DEVICES)?;
        let mut goes_on_after = page.goes_on_after;
        for device in page.devices {
            if let Some(keys) =
                keys::find_device_keys(&*snapshot, (&self.user_id, (self.user, device.num)), None)?
            {
                let mut shown = Object::new();
                shown.text("device_id", device.id.as_str());
                if let Some(name) = &device.display_name {
                    shown.text("device_display_name", name);
                }
                shown.json("keys", &JsonText::from(&keys));
                self.pieces.item(&shown.finish());
            }
            if self.pieces.byte_count() >= PIECE_BYTES {
                goes_on_after = Some(device.id);
                break;
            }
        }
        if goes_on_after.is_none() {
            return Ok((self.pieces.finish(), None));
        }
        self.after = goes_on_after;
        let piece = self.pieces.take();
        Ok((piece, Some(self)))
    }
}
