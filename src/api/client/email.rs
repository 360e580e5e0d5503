//! The wishes of users for the digests of notifications that they are mailed. The specification has nothing for it, so that these endpoints are
//! this server's own (`docs/email.md`).

use serde::Deserialize;
use serde_json::json;

use crate::{
    api::{Routes, extract::Client, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{App, account::pushers as flow, limits::Limit},
    push::mailboxes::{self, DELAY_MS_MAX, DELAY_MS_MIN},
    schema::email::PreferencesRow,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_preferences).limit(Limit::Read);
    r.client(set_preferences).limit(Limit::Other);
}

/// The path of a user's wishes.
const PREFERENCES: &str = "/_aqueduct/client/v1/email_preferences";

endpoint!(
    /// The endpoint that reads what the caller wishes.
    GetPreferences, GET, PREFERENCES
);
endpoint!(
    /// The endpoint that sets what the caller wishes.
    SetPreferences, PUT, PREFERENCES
);

/// The wishes as a client writes them.
#[derive(Deserialize)]
struct Wishes {
    enabled: Option<bool>,
    delay_ms: Option<u64>,
    only_highlights: Option<bool>,
}

fn shown(app: &App, wishes: &PreferencesRow) -> RawJson {
    let delay_ms = wishes.delay_ms.unwrap_or(app.config.email.delay_s.saturating_mul(1_000));
    let shown = json!({
        "enabled": wishes.enabled, "delay_ms": delay_ms, "only_highlights": wishes.only_highlights,
    });
    RawJson(shown.to_string().into())
}

/// `GET /_aqueduct/client/v1/email_preferences`
pub(crate) async fn get_preferences(app: App, client: Client<Raw<GetPreferences>>) -> Result<RawJson> {
    Ok(shown(&app, &mailboxes::preferences(&*app.store.snapshot(), client.caller.user)?))
}

/// `PUT /_aqueduct/client/v1/email_preferences`
///
/// Fields that are left out, or null, get their defaults. Errors: 400 `M_INVALID_PARAM` for a delay out of bounds.
pub(crate) async fn set_preferences(app: App, client: Client<Raw<SetPreferences>>) -> Result<RawJson> {
    let Wishes { enabled, delay_ms, only_highlights } = client.request.json()?;
    if delay_ms.is_some_and(|delay_ms| !(DELAY_MS_MIN..=DELAY_MS_MAX).contains(&delay_ms)) {
        let why = format!("`delay_ms` must be from {DELAY_MS_MIN} to {DELAY_MS_MAX}, or left out.");
        return Err(Refusal::invalid_param(why).into());
    }
    let wishes = PreferencesRow {
        enabled: enabled.unwrap_or(true),
        delay_ms,
        only_highlights: only_highlights.unwrap_or(false),
    };
    flow::set_preferences(&app, &client.caller, wishes.clone()).await?;
    Ok(shown(&app, &wishes))
}
