//! Files of the media repository, for callers with an access token.
//!
//! Specification: client-server API, "Content repository".

use ruma::api::client::authenticated_media::{
    get_content, get_content_as_filename, get_content_thumbnail, get_media_config,
};

use crate::{
    api::{
        Routes,
        client::media::{config, give, give_thumbnail, how, wish},
        extract::Client,
        parameters::wanted,
        policy::Guests,
        raw::Raw,
        reply::{AnyFileReply, FileReply, RawJson},
    },
    error::Result,
    flows::{App, limits::Limit},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_media_config).limit(Limit::Read);
    r.client(get_content).limit(Limit::Read).guests(Guests::Yes);
    r.client(get_content_as_filename).limit(Limit::Read).guests(Guests::Yes);
    r.client(get_content_thumbnail).limit(Limit::Read).guests(Guests::Yes);
}

/// `GET /_matrix/client/v1/media/config`
pub(crate) async fn get_media_config(
    app: App,
    _client: Client<Raw<get_media_config::v1::Request>>,
) -> Result<RawJson> {
    Ok(config(&app))
}

/// `GET /_matrix/client/v1/media/download/{serverName}/{mediaId}`
pub(crate) async fn get_content(
    app: App,
    client: Client<Raw<get_content::v1::Request>>,
) -> Result<AnyFileReply> {
    let (wish, how) = (wish(&client.request)?, how(&client.request)?);
    give(app, wish, None, how).await
}

/// `GET /_matrix/client/v1/media/download/{serverName}/{mediaId}/{fileName}`
pub(crate) async fn get_content_as_filename(
    app: App,
    client: Client<Raw<get_content_as_filename::v1::Request>>,
) -> Result<AnyFileReply> {
    let (wish, how) = (wish(&client.request)?, how(&client.request)?);
    let name = client.request.arg(2).to_owned();
    give(app, wish, Some(name), how).await
}

/// `GET /_matrix/client/v1/media/thumbnail/{serverName}/{mediaId}`
pub(crate) async fn get_content_thumbnail(
    app: App,
    client: Client<Raw<get_content_thumbnail::v1::Request>>,
) -> Result<FileReply> {
    let (wish, how) = (wish(&client.request)?, how(&client.request)?);
    let wanted = wanted(&client.request)?;
    give_thumbnail(app, wish, wanted, how).await
}
