//! Access tokens.

use ruma::api::error::{ErrorKind, UnknownTokenErrorData};

use crate::{
    accounts::Caller,
    error::{Refusal, Result},
    store::Read,
};

/// Who holds this access token at `now_ms`. No token has been issued as yet, so every one is unknown.
/// Errors: `M_UNKNOWN_TOKEN`.
pub fn find_caller(_read: &impl Read, _now_ms: u64, _token: &str) -> Result<Caller> {
    let kind = ErrorKind::UnknownToken(UnknownTokenErrorData::new());
    Err(Refusal::new(kind, "This access token is not known.").into())
}
