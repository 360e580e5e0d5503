//! The previews of URLs, at their endpoint and at the one that it has replaced.
//!
//! Specification: client-server API, "Content repository", `GET /media/preview_url`.

use ruma::api::client::authenticated_media::get_media_preview;

use crate::{
    accounts::Caller,
    api::{Routes, extract::Client, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{App, limits::Limit, media::preview},
};

endpoint!(
    /// The preview of a URL, by the name that the endpoint had before those of media asked for access tokens.
    OldPreview, GET, "/_matrix/media/v3/preview_url", "/_matrix/media/r0/preview_url"
);

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_media_preview).limit(Limit::Other);
    r.client(old_preview).limit(Limit::Other);
}

/// `GET /_matrix/client/v1/media/preview_url`
pub(crate) async fn get_media_preview(
    app: App,
    client: Client<Raw<get_media_preview::v1::Request>>,
) -> Result<RawJson> {
    let (url, ts_ms) = asked(&client.request)?;
    tell(&app, &client.caller, &url, ts_ms).await
}

/// `GET /_matrix/media/v3/preview_url`
pub(crate) async fn old_preview(app: App, client: Client<Raw<OldPreview>>) -> Result<RawJson> {
    let (url, ts_ms) = asked(&client.request)?;
    tell(&app, &client.caller, &url, ts_ms).await
}

/// The URL, and the time of which its preview is asked for, in milliseconds since the epoch.
fn asked<E>(request: &Raw<E>) -> Result<(String, Option<u64>)> {
    let url = request.query("url").ok_or_else(|| Refusal::missing_param("`url` is missing."))?;
    let ts_ms = request.query("ts").map(|ts| {
        let wrong = |_| Refusal::invalid_param("`ts` is not a time in milliseconds since the epoch.");
        ts.parse::<u64>().map_err(wrong)
    });
    Ok((url, ts_ms.transpose()?))
}

async fn tell(app: &App, caller: &Caller, url: &str, ts_ms: Option<u64>) -> Result<RawJson> {
    let preview = preview::preview(app, caller, url, ts_ms).await?;
    Ok(RawJson(preview.into()))
}
