//! Tells services who the user is that gave them a token.

use ruma::api::{
    error::{ErrorKind, UnknownTokenErrorData},
    federation::openid::get_openid_userinfo,
};

use crate::{
    accounts::openid,
    api::{Routes, extract::Public, raw::Raw},
    error::{Refusal, Result},
    flows::{App, limits::Limit},
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(userinfo).limit(Limit::Read);
}

/// `GET /_matrix/federation/v1/openid/userinfo`
pub(crate) async fn userinfo(
    app: App,
    public: Public<Raw<get_openid_userinfo::v1::Request>>,
) -> Result<get_openid_userinfo::v1::Response> {
    let missing = || Refusal::new(ErrorKind::MissingToken, "The query parameter `access_token` is missing.");
    let token = public.request.query("access_token").ok_or_else(missing)?;
    let (server, now_ms) = (&app.config.server.name, app.env.now_ms());
    let user = openid::find_user(&*app.store.snapshot(), server, now_ms, &token)?;
    let unknown = || {
        let kind = ErrorKind::UnknownToken(UnknownTokenErrorData::new());
        Refusal::new(kind, "This token is not known, or it has expired.")
    };
    Ok(get_openid_userinfo::v1::Response::new(user.ok_or_else(unknown)?))
}
