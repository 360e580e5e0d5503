//! Email addresses and phone numbers of accounts. Addresses are added and removed by those who run this server, phone numbers are not kept,
//! and the answers say so.

use ruma::api::{
    client::account::{
        add_3pid, bind_3pid, delete_3pid, get_3pids, request_3pid_management_token_via_email,
        request_3pid_management_token_via_msisdn, request_password_change_token_via_email,
        request_password_change_token_via_msisdn, request_registration_token_via_email,
        request_registration_token_via_msisdn, unbind_3pid,
    },
    error::ErrorKind,
};
use serde_json::json;

use crate::{
    accounts::emails,
    api::{
        Routes,
        extract::{Client, Public},
        raw::Raw,
        reply::RawJson,
    },
    error::{Refusal, Result},
    flows::{App, limits::Limit},
    schema::email::AddressRow,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_3pids).limit(Limit::Read);
    r.client(refuse_change::<add_3pid::v3::Request>).limit(Limit::Other);
    r.client(refuse_change::<bind_3pid::v3::Request>).limit(Limit::Other).not_suspended();
    r.client(refuse_change::<unbind_3pid::v3::Request>).limit(Limit::Other).not_suspended();
    r.client(refuse_change::<delete_3pid::v3::Request>).limit(Limit::Other).not_suspended();
    r.public(refuse_proof::<request_3pid_management_token_via_email::v3::Request>).limit(Limit::Other);
    r.public(refuse_proof::<request_3pid_management_token_via_msisdn::v3::Request>).limit(Limit::Other);
    r.public(refuse_proof::<request_password_change_token_via_email::v3::Request>).limit(Limit::Other);
    r.public(refuse_proof::<request_password_change_token_via_msisdn::v3::Request>).limit(Limit::Other);
    r.public(refuse_proof::<request_registration_token_via_email::v3::Request>).limit(Limit::Other);
    r.public(refuse_proof::<request_registration_token_via_msisdn::v3::Request>).limit(Limit::Other);
}

fn denied() -> Refusal {
    let why =
        "E-mail addresses are added and removed by those who run this server, and it keeps no phone numbers.";
    Refusal::new(ErrorKind::ThreepidDenied, why)
}

/// `GET /_matrix/client/v3/account/3pid`
pub(crate) async fn get_3pids(app: App, client: Client<get_3pids::v3::Request>) -> Result<RawJson> {
    let addresses = emails::list(&*app.store.snapshot(), client.caller.user)?.into_iter();
    let shown = |(address, row): (String, AddressRow)| {
        json!({
            "medium": "email", "address": address, "validated_at": row.validated_ms, "added_at": row.added_ms,
        })
    };
    Ok(RawJson(json!({ "threepids": addresses.map(shown).collect::<Vec<_>>() }).to_string().into()))
}

/// Refuses to change the email addresses and phone numbers of an account: 403 `M_THREEPID_DENIED`.
async fn refuse_change<R>(_app: App, _client: Client<Raw<R>>) -> Result<RawJson> {
    Err(denied().into())
}

/// Refuses to send a proof to an email address or phone number: 403 `M_THREEPID_DENIED`.
async fn refuse_proof<R>(_app: App, _public: Public<Raw<R>>) -> Result<RawJson> {
    Err(denied().into())
}
