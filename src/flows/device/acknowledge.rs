//! Deletes the messages of an inbox that their device has received, which it confirms with its next sync.

use crate::{
    accounts::Caller,
    encryption::inbox,
    error::Result,
    flows::{App, write},
    ids::Position,
    schema,
    store::Published,
};

/// Deletes all messages at or before this position, which the device has received. If there is anything to delete, answers a
/// future that resolves once that is visible. The answer to the device waits for it, so that a confirmed message is never told
/// again, not even to a client that begins anew.
pub async fn acknowledge(app: &App, caller: &Caller, upto: Position) -> Result<Option<Published>> {
    let owner = (caller.user, caller.device);
    let state = schema::INBOX_STATE.get(&*app.store.snapshot(), owner)?;
    if state.is_none_or(|state| state.messages == 0 || state.acknowledged >= upto) {
        return Ok(None);
    }
    write::note_for_caller(app, caller, move |_, note| Ok(inbox::acknowledge(note, owner, upto)?)).await
}
