//! Hashes a new password.

use crate::{accounts::passwords, env::Long, error::Result, flows::App};

/// The hash of a new password. The work waits in the queue of passwords, off the async threads. Errors: 400 for a text that
/// cannot be a password, as [`passwords::check`] says, and 429 `M_LIMIT_EXCEEDED` where too many passwords wait already, of all or
/// of the current payers.
pub(crate) async fn hash(app: &App, password: String) -> Result<String> {
    passwords::check(&password)?;
    let owned = app.clone();
    let hash = move || passwords::hash(&owned.env, &owned.config.passwords, &password);
    app.env.blocking_long(Long::Password, hash).await
}
