//! Changes a user's push rules, which decide what they are notified of.

use ruma::push::Ruleset;

use crate::{
    accounts::Caller,
    error::Result,
    flows::{App, write},
    push::rules,
};

/// Changes the caller's push rules under the user's lock, and wakes their polls.
pub async fn change(
    app: &App,
    caller: &Caller,
    change: impl FnOnce(&mut Ruleset) -> Result<()> + Send + 'static,
) -> Result<()> {
    let user_id = caller.user_id.clone();
    let user = caller.user;
    write::for_caller(app, caller, move |_, batch| {
        rules::change(batch, user, &user_id, change)?;
        write::wake(batch, user);
        Ok(())
    })
    .await
}
