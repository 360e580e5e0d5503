//! The profiles of users: reading them, and setting or deleting a field.

use ruma::{
    OwnedUserId,
    api::client::profile::{delete_profile_field, get_profile, get_profile_field, set_profile_field},
};
use serde_json::{Map, Value, json};

use crate::{
    accounts::{Caller, profiles},
    api::{
        Routes,
        extract::{Client, Public, guests_refused},
        policy::{Body, Guests, KIB},
        raw::Raw,
        reply::RawJson,
    },
    error::{Error, Refusal, Result},
    flows::{App, account::set_profile, limits::Limit, remote::ask},
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(get_profile).limit(Limit::Read);
    r.public(get_profile_field).limit(Limit::Read);
    // The bound is more than a profile may hold, so that a field which is too large is refused for that. Of their
    // profile, guests may change only the display name.
    r.client(set_profile_field)
        .limit(Limit::Other)
        .guests(Guests::Yes)
        .body(Body::Json(128 * KIB))
        .not_suspended();
    r.client(delete_profile_field).limit(Limit::Other).guests(Guests::Yes).not_suspended();
}

fn no_such_field() -> Error {
    Refusal::not_found("The profile has no such field.").into()
}

/// `GET /_matrix/client/v3/profile/{userId}`
pub(crate) async fn get_profile(app: App, public: Public<get_profile::v3::Request>) -> Result<RawJson> {
    let user_id = &public.request.user_id;
    if *user_id.server_name() != app.config.server.name {
        let profile = ask::profile(&app, user_id).await?;
        return Ok(RawJson(Value::Object(profile.as_ref().clone()).to_string().into()));
    }
    let snapshot = app.store.snapshot();
    let user = profiles::require_user(&*snapshot, user_id)?;
    let profile = profiles::read(&*snapshot, user)?;
    Ok(RawJson(Value::Object(profile).to_string().into()))
}

/// `GET /_matrix/client/v3/profile/{userId}/{field}`
pub(crate) async fn get_profile_field(
    app: App,
    public: Public<Raw<get_profile_field::v3::Request>>,
) -> Result<RawJson> {
    let request = public.request;
    let user_id = request.id::<OwnedUserId>(0)?;
    let field = request.arg(1);
    profiles::check_field(field)?;
    if *user_id.server_name() != app.config.server.name {
        let profile = ask::profile(&app, &user_id).await?;
        let value = profile.get(field).ok_or_else(no_such_field)?;
        return Ok(RawJson(json!({ field: value }).to_string().into()));
    }
    let snapshot = app.store.snapshot();
    let user = profiles::require_user(&*snapshot, &user_id)?;
    let Some(value) = profiles::find(&*snapshot, user, field)? else {
        return Err(no_such_field());
    };
    let value: Value = serde_json::from_slice(&value).map_err(|error| Error::broken(error.to_string()))?;
    Ok(RawJson(json!({ field: value }).to_string().into()))
}

/// `PUT /_matrix/client/v3/profile/{userId}/{field}`
pub(crate) async fn set_profile_field(
    app: App,
    client: Client<Raw<set_profile_field::v3::Request>>,
) -> Result<set_profile_field::v3::Response> {
    let (caller, request) = (client.caller, client.request);
    let field = request.arg(1);
    require_user(&caller, &request, field)?;
    profiles::check_field(field)?;
    let mut body: Map<String, Value> = request.json()?;
    let Some(value) = body.remove(field) else {
        return Err(Refusal::missing_param("The request's body lacks the field that the path names.").into());
    };
    if !body.is_empty() {
        return Err(Refusal::invalid_param(
            "The request's body must have no other field than the path names.",
        )
        .into());
    }
    set_profile::set_profile(&app, &caller, field.to_owned(), Some(value)).await?;
    Ok(set_profile_field::v3::Response::new())
}

/// `DELETE /_matrix/client/v3/profile/{userId}/{field}`
pub(crate) async fn delete_profile_field(
    app: App,
    client: Client<Raw<delete_profile_field::v3::Request>>,
) -> Result<delete_profile_field::v3::Response> {
    let (caller, request) = (client.caller, client.request);
    let field = request.arg(1);
    require_user(&caller, &request, field)?;
    profiles::check_field(field)?;
    set_profile::set_profile(&app, &caller, field.to_owned(), None).await?;
    Ok(delete_profile_field::v3::Response::new())
}

/// Refuses (403) another user's profile, and a field of their own profile that guests may not change.
fn require_user<E>(caller: &Caller, request: &Raw<E>, field: &str) -> Result<()> {
    if caller.is_guest && field != "displayname" {
        return Err(guests_refused().into());
    }
    if caller.user_id == request.id::<OwnedUserId>(0)? {
        return Ok(());
    }
    Err(Refusal::forbidden("You can only change your own profile.").into())
}
