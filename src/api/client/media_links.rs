//! Temporary links to files: an extension of this server, which `docs/media-links.md` specifies.

use http::{HeaderMap, Method};
use ruma::OwnedServerName;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    api::{
        Routes,
        extract::{Client, Public},
        policy::{Body, KIB},
        raw::Raw,
        reply::{Conditions, FileReply, RawJson},
    },
    error::Result,
    flows::{App, limits::Limit, media::link},
    media::{
        Name, items,
        links::{LIFETIME_DEFAULT_MS, Wish},
    },
    schema::media::LinkRow,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(make_link).limit(Limit::Other).body(Body::Json(4 * KIB)).not_suspended();
    r.client(list_links).limit(Limit::Read);
    r.client(revoke_link).limit(Limit::Other).body(Body::None);
    r.public(open_link).limit(Limit::Read);
}

/// The path below which links are opened.
const OPENED: &str = "/_aqueduct/media/v1/link/";

endpoint!(
    /// The endpoint that makes a link.
    MakeLink, POST, "/_aqueduct/client/v1/media/{server_name}/{media_id}/link"
);
endpoint!(
    /// The endpoint that lists links.
    ListLinks, GET, "/_aqueduct/client/v1/media/links"
);
endpoint!(
    /// The endpoint that revokes a link.
    RevokeLink, DELETE, "/_aqueduct/client/v1/media/links/{link_id}"
);
endpoint!(
    /// The endpoint that gives the file of a link, to everybody.
    OpenLink, GET, "/_aqueduct/media/v1/link/{token}"
);

#[derive(Deserialize)]
struct ToMake {
    expires_in_ms: Option<u64>,
    #[serde(default)]
    once: bool,
}

/// `POST /_aqueduct/client/v1/media/{serverName}/{mediaId}/link`
pub(crate) async fn make_link(app: App, client: Client<Raw<MakeLink>>) -> Result<RawJson> {
    let Client { caller, request, .. } = client;
    let server = OwnedServerName::try_from(request.arg(0)).map_err(|_| items::no_such_item())?;
    let name = Name::of(server.as_str(), request.arg(1)).ok_or_else(items::no_such_item)?;
    let body: ToMake = request.json()?;
    let lifetime_ms = body.expires_in_ms.unwrap_or(LIFETIME_DEFAULT_MS);
    let wish = Wish { lifetime_ms, is_once: body.once };
    let (token, link) = link::make(&app, &caller, name, wish).await?;
    let base = app.config.server.public_base_url.trim_end_matches('/');
    let mut answer = shown(&link);
    if let Some(fields) = answer.as_object_mut() {
        fields.insert("url".to_owned(), json!(format!("{base}{OPENED}{token}")));
    }
    Ok(RawJson(answer.to_string().into()))
}

/// A link, as its user sees it.
fn shown(link: &LinkRow) -> Value {
    let name = Name { server: link.server.clone(), id: link.media_id.clone() };
    json!({
        "link_id": link.id,
        "content_uri": name.uri(),
        "created_at": link.at_ms,
        "expires_at": link.expires_ms,
        "once": link.is_once,
    })
}

/// `GET /_aqueduct/client/v1/media/links`
pub(crate) async fn list_links(app: App, client: Client<Raw<ListLinks>>) -> Result<RawJson> {
    let links = link::list(&app, &client.caller).await?;
    let links: Vec<_> = links.iter().map(shown).collect();
    Ok(RawJson(json!({ "links": links }).to_string().into()))
}

/// `DELETE /_aqueduct/client/v1/media/links/{linkId}`
pub(crate) async fn revoke_link(app: App, client: Client<Raw<RevokeLink>>) -> Result<RawJson> {
    let Client { caller, request, .. } = client;
    link::revoke(&app, &caller, request.arg(0).to_owned()).await?;
    Ok(RawJson(json!({}).to_string().into()))
}

/// `GET /_aqueduct/media/v1/link/{token}`
pub(crate) async fn open_link(app: App, public: Public<Raw<OpenLink>>) -> Result<FileReply> {
    let request = public.request;
    let only_looks = request.method == Method::HEAD;
    let opened = link::open(&app, request.arg(0).to_owned(), only_looks).await?;
    // A file that is given once is given as a whole.
    let no_fields = HeaderMap::new();
    let conditions = Conditions::of(if opened.is_once { &no_fields } else { &request.headers });
    let file = opened.file;
    Ok(FileReply { app, file, name: None, conditions, may_redirect: false, is_temporary: true })
}
