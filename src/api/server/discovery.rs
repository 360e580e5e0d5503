//! Tells other servers what this one is, and how to check what it signs: keys, version.

use federation::keys::notary::{self, Question};
use http::Method;
use ruma::{
    OwnedServerName,
    api::federation::discovery::{get_remote_server_keys_batch, get_server_version},
};

use crate::{
    api::{
        Routes,
        extract::{Endpoint, Public},
        policy::{Body, MIB},
        raw::Raw,
        reply::RawJson,
    },
    error::{Error, Refusal, Result},
    flows::{App, limits::Limit, remote::identify::require_federation},
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(version).unlimited();
    r.public(keys).unlimited();
    r.public(query_keys).limit(Limit::Read);
    r.public(query_keys_of_many).limit(Limit::Read).body(Body::Json(MIB));
}

/// `GET /_matrix/federation/v1/version`
pub(crate) async fn version(
    _app: App,
    _public: Public<get_server_version::v1::Request>,
) -> Result<get_server_version::v1::Response> {
    let mut server = get_server_version::v1::Server::new();
    server.name = Some("Aqueduct".to_owned());
    server.version = Some(env!("CARGO_PKG_VERSION").to_owned());
    let mut response = get_server_version::v1::Response::new();
    response.server = Some(server);
    Ok(response)
}

/// The keys of this server, also at the path with the id of a key: servers that are older than version 1.6 of the
/// specification ask there, and are answered as if they named none.
pub(crate) struct Keys;

impl Endpoint for Keys {
    fn method() -> Method {
        Method::GET
    }

    fn paths() -> Vec<&'static str> {
        vec!["/_matrix/key/v2/server", "/_matrix/key/v2/server/{key_id}"]
    }
}

/// `GET /_matrix/key/v2/server`
pub(crate) async fn keys(app: App, _public: Public<Raw<Keys>>) -> Result<RawJson> {
    let document = app.remote.ring.own().document(app.env.now_ms());
    Ok(RawJson(document.to_string().into()))
}

/// The keys of another server, also at the path that older servers ask, as with [`Keys`].
pub(crate) struct QueryKeys;

impl Endpoint for QueryKeys {
    fn method() -> Method {
        Method::GET
    }

    fn paths() -> Vec<&'static str> {
        vec!["/_matrix/key/v2/query/{server_name}", "/_matrix/key/v2/query/{server_name}/{key_id}"]
    }
}

/// `GET /_matrix/key/v2/query/{serverName}`
pub(crate) async fn query_keys(app: App, public: Public<Raw<QueryKeys>>) -> Result<RawJson> {
    let server: OwnedServerName = public.request.id(0)?;
    let until = public.request.query("minimum_valid_until_ts");
    let question = Question::of_path(server, until.as_deref());
    answer(
        &app,
        question.map_err(|why| Refusal::invalid_param(format!("The question makes no sense: {why}.")))?,
    )
    .await
}

/// `POST /_matrix/key/v2/query`
pub(crate) async fn query_keys_of_many(
    app: App,
    public: Public<Raw<get_remote_server_keys_batch::v2::Request>>,
) -> Result<RawJson> {
    let question = Question::of_body(public.request.body.as_ref());
    answer(&app, question.map_err(|why| Refusal::bad_json(format!("The question makes no sense: {why}.")))?)
        .await
}

async fn answer(app: &App, question: Question) -> Result<RawJson> {
    require_federation(app)?;
    let answer = notary::answer(&app.remote.ring, &question, app.env.now_ms()).await;
    Ok(RawJson(answer.map_err(|failed| Error::broken(failed.to_string()))?.into()))
}
