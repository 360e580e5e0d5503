//! The parameters of a request that delay the event that it sends (MSC4140), or make it sticky (MSC4354).

use ruma::api::error::ErrorKind;
use serde_json::json;

use crate::{
    api::{raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::App,
};

/// The parameter of the query by which older clients delay an event: milliseconds.
pub(super) const DELAY: &str = "org.matrix.msc4140.delay";
/// The parameter of the query that makes an event sticky (MSC4354): milliseconds.
const STICKY_DURATION: &str = "org.matrix.msc4354.sticky_duration_ms";
/// An event is sticky for at most this many milliseconds, by the proposal.
const STICKY_MS_MAX: u64 = 60 * 60 * 1000;

/// Reads a parameter of the query that is a number of milliseconds. Refuses anything else: 400 `M_INVALID_PARAM`.
pub(super) fn query_number<E>(request: &Raw<E>, name: &str) -> Result<Option<u64>> {
    let Some(text) = request.query(name) else { return Ok(None) };
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // A number that no delay could have is as good as the largest one, which is refused with the bound.
    let number = if is_number { Some(text.parse().unwrap_or(u64::MAX)) } else { None };
    number.map(Some).ok_or_else(|| {
        Refusal::invalid_param(format!("`{name}` must be a whole number of milliseconds.")).into()
    })
}

/// Reads for how long an event is to be sticky. Refuses more than an hour: 400 `M_INVALID_PARAM`.
pub(super) fn sticky_ms<E>(request: &Raw<E>) -> Result<Option<u64>> {
    let sticky_ms = query_number(request, STICKY_DURATION)?;
    if sticky_ms.is_some_and(|sticky_ms| sticky_ms > STICKY_MS_MAX) {
        let why = format!("`{STICKY_DURATION}` must be at most {STICKY_MS_MAX}, which is an hour.");
        return Err(Refusal::invalid_param(why).into());
    }
    Ok(sticky_ms)
}

/// Refuses a delay that is not within its bounds, in the form of the proposal of now or, for `older` clients, of the older one.
pub(super) fn require_delay(app: &App, delay_ms: u64, older: bool) -> Result<()> {
    let max_ms = app.config.rooms.delay_max_ms();
    if app.config.rooms.delayed_events_max == 0 {
        return Err(Refusal::forbidden("This server does not let its users schedule events.").into());
    }
    if delay_ms == 0 {
        return Err(Refusal::invalid_param("The delay must be more than 0 milliseconds.").into());
    }
    if delay_ms <= max_ms {
        return Ok(());
    }
    let why = format!("The delay must be at most {max_ms} milliseconds.");
    let mut refusal = Refusal::forbidden(why.clone());
    if older {
        refusal.kind = ErrorKind::Unknown;
        refusal.body = Some(json!({
            "errcode": "M_UNKNOWN",
            "error": why,
            "org.matrix.msc4140.errcode": "M_MAX_DELAY_EXCEEDED",
            "org.matrix.msc4140.max_delay": max_ms,
        }));
    }
    Err(refusal.into())
}

/// The answer to a request that has scheduled an event.
pub(super) fn scheduled(id: &str) -> RawJson {
    RawJson(json!({ "delay_id": id }).to_string().into())
}
