//! Uploads, and the endpoints for media that ask for no access token, which later ones have replaced.
//!
//! Specification: client-server API, "Content repository".

use axum::body::HttpBody;
use bytes::Bytes;
use futures_util::TryStreamExt;
use http::{HeaderMap, header};
use ruma::{
    MilliSecondsSinceUnixEpoch, OwnedServerName, UInt,
    api::client::media::{create_content, create_content_async, create_mxc_uri},
};
use serde_json::json;

use crate::{
    api::{
        Routes,
        extract::{Client, Endpoint, Public},
        parameters::{flag, waits, wanted},
        policy::Body,
        raw::Raw,
        reply::{Conditions, FileReply, RawJson},
    },
    config::UPLOAD_BYTES_MAX,
    error::Result,
    flows::{
        App,
        limits::Limit,
        media::{
            download::{self, Wish},
            thumbnail, upload,
        },
    },
    media::{Name, items, thumbnails::Wanted},
};

endpoint!(
    /// The settings for media, by the name that they had before access tokens were asked for.
    OldConfig, GET, "/_matrix/media/v3/config", "/_matrix/media/r0/config"
);
endpoint!(
    /// A file, for everybody.
    OldDownload,
    GET,
    "/_matrix/media/v3/download/{server_name}/{media_id}",
    "/_matrix/media/r0/download/{server_name}/{media_id}"
);
endpoint!(
    /// A file under another name, for everybody.
    OldDownloadAs,
    GET,
    "/_matrix/media/v3/download/{server_name}/{media_id}/{filename}",
    "/_matrix/media/r0/download/{server_name}/{media_id}/{filename}"
);

endpoint!(
    /// A thumbnail, for everybody.
    OldThumbnail,
    GET,
    "/_matrix/media/v3/thumbnail/{server_name}/{media_id}",
    "/_matrix/media/r0/thumbnail/{server_name}/{media_id}"
);

/// Uploads are bounded by a setting; this is the most that it can say.
const UPLOAD: Body = Body::Streamed(UPLOAD_BYTES_MAX.bytes() as usize);

pub(crate) fn routes(r: &mut Routes) {
    r.client(create_content).limit(Limit::Other).body(UPLOAD);
    r.client(create_content_async).limit(Limit::Other).body(UPLOAD);
    r.client(create_mxc_uri).limit(Limit::Other);
    r.client(old_config).limit(Limit::Read);
    r.public(old_download).limit(Limit::Read);
    r.public(old_download_as).limit(Limit::Read);
    r.public(old_thumbnail).limit(Limit::Read);
}

/// The description of an upload, as its header fields and its query give it.
fn described<E>(request: &Raw<E>) -> upload::Wish {
    let content_type = request.headers.get(header::CONTENT_TYPE).and_then(|it| it.to_str().ok());
    let announced = request.headers.get(header::CONTENT_LENGTH).and_then(|it| it.to_str().ok()?.parse().ok());
    upload::Wish {
        content_type: content_type.map(str::to_owned),
        file_name: request.query("filename"),
        announced: request.stream.size_hint().exact().or(announced),
    }
}

/// `POST /_matrix/media/v3/upload`
pub(crate) async fn create_content(
    app: App,
    client: Client<Raw<create_content::v3::Request>>,
) -> Result<create_content::v3::Response> {
    let Client { caller, request, .. } = client;
    let wish = described(&request);
    let body = request.stream.into_data_stream().map_err(|error| error.to_string());
    let name = upload::upload(&app, &caller, wish, body).await?;
    Ok(create_content::v3::Response::new(name.uri().into()))
}

/// `PUT /_matrix/media/v3/upload/{serverName}/{mediaId}`
pub(crate) async fn create_content_async(
    app: App,
    client: Client<Raw<create_content_async::v3::Request>>,
) -> Result<RawJson> {
    let Client { caller, request, .. } = client;
    let (server, id) = (request.arg(0).to_owned(), request.arg(1).to_owned());
    let wish = described(&request);
    let body = request.stream.into_data_stream().map_err(|error| error.to_string());
    upload::upload_to(&app, &caller, (&server, &id), wish, body).await?;
    Ok(RawJson(Bytes::from_static(b"{}")))
}

/// `POST /_matrix/media/v1/create`
pub(crate) async fn create_mxc_uri(
    app: App,
    client: Client<Raw<create_mxc_uri::v1::Request>>,
) -> Result<create_mxc_uri::v1::Response> {
    let (name, expires_ms) = upload::create(&app, &client.caller).await?;
    let mut response = create_mxc_uri::v1::Response::new(name.uri().into());
    response.unused_expires_at = Some(MilliSecondsSinceUnixEpoch(UInt::new_saturating(expires_ms)));
    Ok(response)
}

/// `GET /_matrix/media/v3/config`
pub(crate) async fn old_config(app: App, _client: Client<Raw<OldConfig>>) -> Result<RawJson> {
    Ok(config(&app))
}

/// The bounds of uploads that clients are told.
pub(super) fn config(app: &App) -> RawJson {
    RawJson(json!({ "m.upload.size": app.config.media.upload_bytes_max.bytes() }).to_string().into())
}

/// `GET /_matrix/media/v3/download/{serverName}/{mediaId}`
pub(crate) async fn old_download(app: App, public: Public<Raw<OldDownload>>) -> Result<FileReply> {
    let wish = old_wish(&public.request)?;
    give(app, wish, None, &public.request.headers).await
}

/// `GET /_matrix/media/v3/download/{serverName}/{mediaId}/{fileName}`
pub(crate) async fn old_download_as(app: App, public: Public<Raw<OldDownloadAs>>) -> Result<FileReply> {
    let wish = old_wish(&public.request)?;
    let name = public.request.arg(2).to_owned();
    give(app, wish, Some(name), &public.request.headers).await
}

/// `GET /_matrix/media/v3/thumbnail/{serverName}/{mediaId}`
pub(crate) async fn old_thumbnail(app: App, public: Public<Raw<OldThumbnail>>) -> Result<FileReply> {
    let wish = old_wish(&public.request)?;
    let wanted = wanted(&public.request)?;
    give_thumbnail(app, wish, wanted, &public.request.headers).await
}

/// Reads a request of one of the old endpoints.
pub(super) fn old_wish<E: Endpoint>(request: &Raw<E>) -> Result<Wish> {
    let allow_remote = flag(request, "allow_remote")?.unwrap_or(true);
    Ok(Wish { allow_remote, is_open_only: true, ..wish(request)? })
}

/// Reads which file a request asks for. Errors: 404 `M_NOT_FOUND` for what can be no file, 400 `M_INVALID_PARAM`.
pub(super) fn wish<E: Endpoint>(request: &Raw<E>) -> Result<Wish> {
    let server = OwnedServerName::try_from(request.arg(0)).map_err(|_| items::no_such_item())?;
    let name = Name::of(server.as_str(), request.arg(1)).ok_or_else(items::no_such_item)?;
    Ok(Wish { name, waits: waits(request)?, allow_remote: true, is_open_only: false })
}

/// Gives a thumbnail of a file.
pub(super) async fn give_thumbnail(
    app: App,
    wish: Wish,
    wanted: Wanted,
    fields: &HeaderMap,
) -> Result<FileReply> {
    let conditions = Conditions::of(fields);
    let file = thumbnail::find(&app, &wish, wanted).await?;
    Ok(FileReply { app, file, name: None, conditions })
}

/// Gives a file, under another name if there is one.
pub(super) async fn give(
    app: App,
    wish: Wish,
    name: Option<String>,
    fields: &HeaderMap,
) -> Result<FileReply> {
    let conditions = Conditions::of(fields);
    let file = download::find(&app, &wish).await?;
    Ok(FileReply { app, file, name, conditions })
}
