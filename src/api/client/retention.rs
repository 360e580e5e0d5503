//! Tells clients for how long this server keeps messages (MSC1763).

use serde_json::{Map, Value, json};

use crate::{
    api::{Routes, extract::Client, raw::Raw, reply::RawJson},
    error::Result,
    flows::{App, limits::Limit},
    rooms::retention::Limits,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(configuration).limit(Limit::Read);
}

endpoint!(
    /// The endpoint by its unstable path; it has no stable one yet, and ruma does not know it.
    Configuration, GET,
    "/_matrix/client/unstable/org.matrix.msc1763/retention/configuration"
);

/// `GET /_matrix/client/unstable/org.matrix.msc1763/retention/configuration`
pub(crate) async fn configuration(app: App, _client: Client<Raw<Configuration>>) -> Result<RawJson> {
    let Limits { default_ms, min_ms, max_ms } = Limits::from(&app.config.retention);
    let (mut policies, mut limits, mut bounds) = (Map::new(), Map::new(), Map::new());
    if let Some(default_ms) = default_ms {
        policies.insert("*".to_owned(), json!({ "max_lifetime": default_ms }));
    }
    for (name, bound) in [("min", min_ms), ("max", max_ms)] {
        bounds.extend(bound.map(|bound| (name.to_owned(), Value::from(bound))));
    }
    if !bounds.is_empty() {
        limits.insert("max_lifetime".to_owned(), bounds.into());
    }
    Ok(RawJson(json!({ "policies": policies, "limits": limits }).to_string().into()))
}
