//! Uploads, and the endpoints for media that ask for no access token, which later ones have replaced.
//!
//! Specification: client-server API, "Content repository".

use axum::body::HttpBody;
use futures_util::TryStreamExt;
use http::{Method, Version, header};
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
        reply::{AnyFileReply, ComingReply, Conditions, FileReply, RawJson},
    },
    config::UPLOAD_BYTES_MAX,
    error::Result,
    flows::{
        App,
        limits::Limit,
        media::{
            download::{self, Given, Wish},
            thumbnail, upload,
        },
    },
    json::Object,
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
        wants_blurhash: request.query("xyz.amorgan.generate_blurhash").as_deref() == Some("true"),
    }
}

/// `POST /_matrix/media/v3/upload`
pub(crate) async fn create_content(
    app: App,
    client: Client<Raw<create_content::v3::Request>>,
) -> Result<RawJson> {
    let Client { caller, request, .. } = client;
    let wish = described(&request);
    let body = request.stream.into_data_stream().map_err(|error| error.to_string());
    let (name, blurhash) = upload::upload(&app, &caller, wish, body).await?;
    let mut answer = Object::new();
    answer.text("content_uri", &name.uri());
    Ok(uploaded(answer, blurhash))
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
    let blurhash = upload::upload_to(&app, &caller, (&server, &id), wish, body).await?;
    Ok(uploaded(Object::new(), blurhash))
}

/// The answer to an upload, with the BlurHash of the file where there is one (MSC2448).
fn uploaded(mut answer: Object, blurhash: Option<String>) -> RawJson {
    if let Some(blurhash) = blurhash {
        answer.text("xyz.amorgan.blurhash", &blurhash);
    }
    RawJson(answer.finish().into())
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
pub(crate) async fn old_download(app: App, public: Public<Raw<OldDownload>>) -> Result<AnyFileReply> {
    let (wish, how) = (old_wish(&public.request)?, how(&public.request)?);
    give(app, wish, None, how).await
}

/// `GET /_matrix/media/v3/download/{serverName}/{mediaId}/{fileName}`
pub(crate) async fn old_download_as(app: App, public: Public<Raw<OldDownloadAs>>) -> Result<AnyFileReply> {
    let (wish, how) = (old_wish(&public.request)?, how(&public.request)?);
    let name = public.request.arg(2).to_owned();
    give(app, wish, Some(name), how).await
}

/// `GET /_matrix/media/v3/thumbnail/{serverName}/{mediaId}`
pub(crate) async fn old_thumbnail(app: App, public: Public<Raw<OldThumbnail>>) -> Result<FileReply> {
    let (wish, how) = (old_wish(&public.request)?, how(&public.request)?);
    let wanted = wanted(&public.request)?;
    give_thumbnail(app, wish, wanted, how).await
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

/// How a client takes a file.
pub(super) struct How {
    conditions: Conditions,
    /// It takes a file as it comes: it asks for the file and not for its head alone, in a version of HTTP in which it notices where an answer
    /// breaks off. Before HTTP/1.1 one without a length ends as one that broke.
    may_follow: bool,
    /// It follows to where the file is given from elsewhere (MSC3860).
    may_redirect: bool,
}

/// Reads how a client takes a file. Errors: 400 `M_INVALID_PARAM`.
pub(super) fn how<E>(request: &Raw<E>) -> Result<How> {
    let is_get = request.method == Method::GET;
    // A URL elsewhere is signed for `GET` alone.
    let may_redirect = flag(request, "allow_redirect")?.unwrap_or_default() && is_get;
    let may_follow = is_get && request.version >= Version::HTTP_11;
    Ok(How { conditions: Conditions::of(&request.headers), may_follow, may_redirect })
}

/// Gives a thumbnail of a file.
pub(super) async fn give_thumbnail(app: App, wish: Wish, wanted: Wanted, how: How) -> Result<FileReply> {
    let file = thumbnail::find(&app, &wish, wanted).await?;
    let How { conditions, may_redirect, .. } = how;
    Ok(FileReply { app, file, name: None, conditions, may_redirect, is_temporary: false })
}

/// Gives a file, under another name if there is one.
pub(super) async fn give(app: App, wish: Wish, name: Option<String>, how: How) -> Result<AnyFileReply> {
    let How { conditions, may_follow, may_redirect } = how;
    let given = match conditions.want_all() && may_follow {
        true => download::find_or_follow(&app, &wish).await?,
        false => Given::Kept(download::find(&app, &wish).await?),
    };
    Ok(match given {
        Given::Kept(file) => {
            let is_temporary = false;
            let reply = FileReply { app, file, name, conditions, may_redirect, is_temporary };
            AnyFileReply::Kept(Box::new(reply))
        }
        Given::Coming(file) => AnyFileReply::Coming(ComingReply { app, file, name }),
    })
}
