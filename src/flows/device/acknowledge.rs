//! A device says, by coming back, how far it has read its inbox.

use crate::{
    accounts::Caller,
    encryption::inbox,
    error::Result,
    flows::{App, write},
    ids::Position,
    schema,
    store::Published,
};

/// The device has received all messages at or before this position: they go. Answers what resolves once that is visible, if
/// there is anything to delete: whoever answers the device waits for it, so that a message that was confirmed is never told
/// again, not even to a client that begins anew.
pub async fn acknowledge(app: &App, caller: &Caller, upto: Position) -> Result<Option<Published>> {
    let owner = (caller.user, caller.device);
    let state = schema::INBOX_STATE.get(&*app.store.snapshot(), owner)?;
    if state.is_none_or(|state| state.messages == 0 || state.acknowledged >= upto) {
        return Ok(None);
    }
    write::note_for_user(app, caller.user, move |_, note| Ok(inbox::acknowledge(note, owner, upto)?)).await
}
