//! Tells clients what the server is and can do: versions, well-known, capabilities.

use std::collections::BTreeMap;

use ruma::api::client::discovery::{
    discover_homeserver::{self, HomeserverInfo},
    get_capabilities, get_supported_versions,
};
use serde_json::json;

use crate::{
    api::{
        Routes,
        extract::{Client, MaybeClient, Public},
        policy::Guests,
        reply::RawJson,
    },
    config::{ROOM_VERSIONS, RendezvousMode},
    error::Result,
    flows::{App, limits::Limit},
};

/// The versions of the specification whose rules hold here. `docs/decisions/versions-that-are-named.md` says what each
/// brought and what of it this server lacks.
const VERSIONS: [&str; 22] = [
    "r0.5.0", "r0.6.0", "r0.6.1", "v1.1", "v1.2", "v1.3", "v1.4", "v1.5", "v1.6", "v1.7", "v1.8", "v1.9",
    "v1.10", "v1.11", "v1.12", "v1.13", "v1.14", "v1.15", "v1.16", "v1.17", "v1.18", "v1.19",
];

/// Features that clients look for by an unstable name, and that this server has: deleting account data (MSC3391), pages of messages
/// filtered by relations (MSC3874), invitations filtered by inviter (MSC4155) and blocked altogether (MSC4380), the state after the
/// timeline (MSC4222), subscriptions to threads (MSC4306), sticky events (MSC4354), simplified sliding sync (MSC4186).
const UNSTABLE_FEATURES: [&str; 10] = [
    "org.matrix.msc3391",
    "org.matrix.msc3874",
    "org.matrix.msc3881",
    "org.matrix.msc4155",
    "org.matrix.msc4222",
    "org.matrix.msc4306",
    "org.matrix.msc4354",
    "org.matrix.msc4380",
    "org.matrix.msc4380.stable",
    "org.matrix.simplified_msc3575",
];

/// The WebSocket of `docs/socket.md`, which a setting can turn off.
const SOCKET: &str = "aqueduct.socket.v1";

pub(crate) fn routes(r: &mut Routes) {
    r.maybe_client(versions).unlimited().guests(Guests::Yes);
    r.public(well_known).unlimited();
    r.client(capabilities).limit(Limit::Read).guests(Guests::Yes);
}

/// `GET /_matrix/client/versions`
pub(crate) async fn versions(
    app: App,
    _client: MaybeClient<get_supported_versions::Request>,
) -> Result<get_supported_versions::Response> {
    let mut response = get_supported_versions::Response::new(VERSIONS.map(str::to_owned).to_vec());
    response.unstable_features = UNSTABLE_FEATURES.map(|feature| (feature.to_owned(), true)).into();
    let keeps_redacted = app.config.rooms.redacted_events_kept_days > 0;
    response.unstable_features.insert(SOCKET.to_owned(), app.config.limits.sockets_max > 0);
    response.unstable_features.insert("fi.mau.msc2815".to_owned(), keeps_redacted);
    let has_rendezvous = app.config.rendezvous.mode == RendezvousMode::Everybody;
    response.unstable_features.insert("org.matrix.msc4108".to_owned(), has_rendezvous);
    let sends_delayed = app.config.rooms.delayed_events_max > 0;
    response.unstable_features.insert("org.matrix.msc4140".to_owned(), sends_delayed);
    Ok(response)
}

/// `GET /.well-known/matrix/client`
pub(crate) async fn well_known(
    app: App,
    _public: Public<discover_homeserver::Request>,
) -> Result<discover_homeserver::Response> {
    let base_url = app.config.server.public_base_url.clone();
    Ok(discover_homeserver::Response::new(HomeserverInfo::new(base_url)))
}

/// `GET /_matrix/client/v3/capabilities`
pub(crate) async fn capabilities(app: App, client: Client<get_capabilities::v3::Request>) -> Result<RawJson> {
    let is_user = !client.caller.is_guest;
    let available: BTreeMap<_, _> =
        ROOM_VERSIONS.iter().map(|version| (version.as_str(), "stable")).collect();
    let default = &app.config.rooms.default_version;
    // Guests may change only the display name of their profile.
    let profile_fields = if is_user {
        json!({ "enabled": true })
    } else {
        json!({ "enabled": true, "allowed": ["displayname"] })
    };
    // Capabilities are written even where they equal the default that clients assume, because some clients look for the
    // key.
    let mut capabilities = json!({
        "m.room_versions": { "default": default, "available": available },
        "m.change_password": { "enabled": is_user },
        "m.set_displayname": { "enabled": true },
        "m.set_avatar_url": { "enabled": is_user },
        "m.profile_fields": profile_fields,
        "m.3pid_changes": { "enabled": false },
        "m.get_login_token": { "enabled": false },
        "org.matrix.msc4140.delayed_events": {
            "max_delay_ms": app.config.rooms.delay_max_ms(),
            "max_scheduled": app.config.rooms.delayed_events_max,
        },
        "org.matrix.msc4155.invite_permission_config_enforced": { "enabled": true },
    });
    if let Some(capabilities) = capabilities.as_object_mut().filter(|_| client.caller.is_admin) {
        // The capability is left out where a user may do nothing of it.
        capabilities.insert("m.account_moderation".to_owned(), json!({ "suspend": true, "lock": true }));
    }
    Ok(RawJson(json!({ "capabilities": capabilities }).to_string().into()))
}
