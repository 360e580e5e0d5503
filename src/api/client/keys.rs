//! The keys of end-to-end encryption: uploading, querying and claiming them, and whose have changed.

use ruma::api::client::keys::{
    claim_keys, get_key_changes, get_keys, upload_keys, upload_signatures, upload_signing_keys,
};
use serde::Deserialize;
use serde_json::{json, value::RawValue};

use crate::{
    api::{
        Routes,
        client::wordless,
        extract::Client,
        policy::{self, Guests, KIB, MIB},
        raw::Raw,
        reply::{InPieces, RawJson},
    },
    encryption::{
        cross_signing::{SigningKey, SigningKeys, Usage},
        keys::Keys,
        uploads::Upload,
    },
    error::Result,
    flows::{
        App,
        keys::{self, Signed},
        limits::Limit,
    },
    json::Object,
    sync::SyncToken,
};

pub(crate) fn routes(r: &mut Routes) {
    let route = r.client(upload_keys).limit(Limit::Other).guests(Guests::Yes);
    route.body(policy::Body::Json(256 * KIB)).suspended_if(wordless::are_keys_of_device);
    // A client asks for the keys of everybody in a large room at once.
    r.client(get_keys).limit(Limit::Read).guests(Guests::Yes).body(policy::Body::Json(MIB));
    r.client(claim_keys).limit(Limit::Other).guests(Guests::Yes).body(policy::Body::Json(MIB));
    r.client(get_key_changes).limit(Limit::Read);
    // A wrong password is counted besides, where it is checked.
    r.client(upload_signing_keys).limit(Limit::Other).suspended_if(wordless::are_signing_keys);
    r.client(upload_signatures).limit(Limit::Other).body(policy::Body::Json(MIB));
}

/// A key with which a user signs, as a client sends it.
type Sent = ruma::serde::Raw<ruma::encryption::CrossSigningKey>;

/// The body of an upload. Keys are kept as the text that they came as, because they are signed.
#[derive(Deserialize)]
struct Body {
    device_keys: Option<Box<RawValue>>,
    #[serde(default)]
    one_time_keys: Option<Keys>,
    #[serde(default)]
    fallback_keys: Option<Keys>,
}

/// `POST /_matrix/client/v3/keys/upload`
pub(crate) async fn upload_keys(app: App, client: Client<Raw<upload_keys::v3::Request>>) -> Result<RawJson> {
    let body: Body = client.request.json()?;
    let upload = Upload {
        device_keys: body.device_keys.filter(|keys| keys.get() != "null"),
        one_time_keys: body.one_time_keys.unwrap_or_default(),
        fallback_keys: body.fallback_keys.unwrap_or_default(),
    };
    let counts = keys::upload(&app, &client.caller, upload).await?;
    let mut shown = counts.one_time;
    // Clients look for this algorithm before they have any key of it, and take a missing count for "as before".
    shown.entry("signed_curve25519".to_owned()).or_default();
    Ok(RawJson(json!({ "one_time_key_counts": shown }).to_string().into()))
}

/// `POST /_matrix/client/v3/keys/query`
pub(crate) async fn get_keys(app: App, client: Client<get_keys::v3::Request>) -> Result<InPieces> {
    let get_keys::v3::Request { timeout, device_keys, .. } = client.request;
    let (first, rest) = keys::query(&app, &client.caller, device_keys, timeout).await?;
    Ok(InPieces::of(first, rest, |rest| rest.next()))
}

/// `POST /_matrix/client/v3/keys/claim`
pub(crate) async fn claim_keys(app: App, client: Client<claim_keys::v3::Request>) -> Result<RawJson> {
    let wanted = client.request.one_time_keys;
    Ok(RawJson(keys::claim(&app, &client.caller, wanted).await?))
}

/// `GET /_matrix/client/v3/keys/changes`
pub(crate) async fn get_key_changes(
    app: App,
    client: Client<get_key_changes::v3::Request>,
) -> Result<RawJson> {
    let settle = |token: &str| app.polls.settle(SyncToken::parse(token)?);
    let (from, to) = (settle(&client.request.from)?, settle(&client.request.to)?);
    Ok(RawJson(app.polls.key_changes(client.caller, from, to).await?))
}

/// `POST /_matrix/client/v3/keys/device_signing/upload`
pub(crate) async fn upload_signing_keys(
    app: App,
    client: Client<Raw<upload_signing_keys::v3::Request>>,
) -> Result<upload_signing_keys::v3::Response> {
    let (caller, request) = (client.caller, client.request.read_confirmed()?);
    let read = |key: Option<Sent>, usage| {
        key.map(|key| SigningKey::read(key.json(), &caller.user_id, usage)).transpose()
    };
    let keys = SigningKeys {
        master: read(request.master_key, Usage::Master)?,
        self_signing: read(request.self_signing_key, Usage::SelfSigning)?,
        user_signing: read(request.user_signing_key, Usage::UserSigning)?,
    };
    keys::upload_signing_keys(&app, &caller, keys, request.auth.as_ref()).await?;
    Ok(upload_signing_keys::v3::Response::new())
}

/// `POST /_matrix/client/v3/keys/signatures/upload`
pub(crate) async fn upload_signatures(
    app: App,
    client: Client<Raw<upload_signatures::v3::Request>>,
) -> Result<RawJson> {
    let signed: Signed = client.request.json()?;
    let failures = keys::upload_signatures(&app, &client.caller, signed).await?;
    let mut shown = Object::new();
    shown.json("failures", &failures.show());
    Ok(RawJson(shown.finish().into()))
}
