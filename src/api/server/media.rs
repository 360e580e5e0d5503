//! Files that other servers ask for, because their users do.
//!
//! Specification: server-server API, "Content repository".

use ruma::api::federation::authenticated_media::{get_content, get_content_thumbnail};

use crate::{
    api::{
        Routes,
        extract::{Endpoint, Server},
        parameters::{waits, wanted},
        raw::Raw,
        reply::Multipart,
    },
    error::Result,
    flows::{
        App,
        limits::Limit,
        media::{
            download::{self, File, Wish},
            thumbnail,
        },
    },
    media::{Name, items},
};

/// A boundary has this many characters, each a letter or a digit: it occurs in no file.
const BOUNDARY_CHARS: usize = 32;

pub(crate) fn routes(r: &mut Routes) {
    r.server(content).limit(Limit::Read);
    r.server(content_thumbnail).limit(Limit::Read);
}

/// Reads which file a request asks for: other servers are given those of this server alone.
fn wish<E: Endpoint>(app: &App, request: &Raw<E>) -> Result<Wish> {
    let name = Name::of(app.config.server.name.as_str(), request.arg(0)).ok_or_else(items::no_such_item)?;
    Ok(Wish { name, waits: waits(request)?, allow_remote: false, is_open_only: false })
}

fn answer(app: App, file: File) -> Multipart {
    let boundary = app.env.random_string(BOUNDARY_CHARS);
    Multipart { app, file, boundary }
}

/// `GET /_matrix/federation/v1/media/download/{mediaId}`
pub(crate) async fn content(app: App, server: Server<Raw<get_content::v1::Request>>) -> Result<Multipart> {
    let wish = wish(&app, &server.request)?;
    let file = download::find(&app, &wish).await?;
    Ok(answer(app, file))
}

/// `GET /_matrix/federation/v1/media/thumbnail/{mediaId}`
pub(crate) async fn content_thumbnail(
    app: App,
    server: Server<Raw<get_content_thumbnail::v1::Request>>,
) -> Result<Multipart> {
    let wish = wish(&app, &server.request)?;
    let file = thumbnail::find(&app, &wish, wanted(&server.request)?).await?;
    Ok(answer(app, file))
}
