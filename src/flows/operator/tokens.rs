//! The operator's commands for registration tokens.

use serde::{Deserialize, Serialize};

use crate::{
    accounts::registration,
    error::{Error, Result},
    flows::{App, write},
    schema::accounts::RegistrationTokenRow,
};

/// A token that is made here has this many characters.
const TOKEN_CHARS: usize = 24;

/// A registration token in a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenEntry {
    /// The text of the token.
    pub token: String,
    /// How many accounts were made with it.
    pub uses: u64,
    /// The number of accounts that may be made with it; any number if this is none.
    pub uses_max: Option<u64>,
    /// When it ends, in milliseconds since the epoch; never, if none.
    pub expires_ms: Option<u64>,
    /// The number of seconds until it ends; 0 if it has ended.
    pub ends_in_s: Option<u64>,
}

impl TokenEntry {
    fn new(token: String, row: &RegistrationTokenRow, now_ms: u64) -> Self {
        let ends_in_s = row.expires_ms.map(|end| end.saturating_sub(now_ms) / 1000);
        Self { token, uses: row.uses, uses_max: row.uses_max, expires_ms: row.expires_ms, ends_in_s }
    }
}

/// Makes a registration token. Errors: 400 for a token that exists, is no valid token, or could never be used.
pub async fn create_token(
    app: &App,
    token: Option<String>,
    uses_max: Option<u64>,
    expires_in_s: Option<u64>,
) -> Result<TokenEntry> {
    let token = token.unwrap_or_else(|| app.env.random_string(TOKEN_CHARS));
    let now_ms = app.env.now_ms();
    let expires_ms = expires_in_s.map(|seconds| now_ms.saturating_add(seconds.saturating_mul(1000)));
    let row = RegistrationTokenRow { created_ms: now_ms, uses_max, uses: 0, expires_ms };
    let (name, kept) = (token.clone(), row.clone());
    write::for_server(app, move |_, batch| registration::create_token(batch, &name, &kept), Error::from)
        .await?;
    Ok(TokenEntry::new(token, &row, now_ms))
}

/// Lists all registration tokens, also those that have ended.
pub fn list_tokens(app: &App) -> Result<Vec<TokenEntry>> {
    let now_ms = app.env.now_ms();
    let tokens = registration::list_tokens(&*app.store.snapshot())?.into_iter();
    Ok(tokens.map(|(token, row)| TokenEntry::new(token, &row, now_ms)).collect())
}

/// Ends a registration token. Errors: 404 for one that does not exist.
pub async fn revoke_token(app: &App, token: String) -> Result<TokenEntry> {
    let now_ms = app.env.now_ms();
    let name = token.clone();
    let row =
        write::for_server(app, move |_, batch| registration::revoke_token(batch, &name), Error::from).await?;
    Ok(TokenEntry::new(token, &row, now_ms))
}
