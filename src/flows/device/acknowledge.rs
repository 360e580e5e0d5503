//! A device says, by coming back, how far it has read its inbox.

use crate::{
    accounts::Caller,
    encryption::inbox,
    error::Result,
    flows::{App, write},
    ids::Position,
    schema,
};

/// The device has received all messages at or before this position: they go. Nobody waits for the disk; what is not
/// deleted by then is deleted the next time, and told to nobody.
pub async fn acknowledge(app: &App, caller: &Caller, upto: Position) -> Result<()> {
    let (user, device) = (caller.user, caller.device);
    let state = schema::INBOX_STATE.get(&*app.store.snapshot(), (user, device))?;
    if state.is_none_or(|state| state.messages == 0 || state.acknowledged >= upto) {
        return Ok(());
    }
    write::note_for_user(app, user, move |_, note| Ok(inbox::acknowledge(note, (user, device), upto)?))
        .await
        .map(drop)
}
