//! Parameters in the query of requests for files, which clients and servers give alike.

use std::time::Duration;

use crate::{
    api::raw::Raw,
    error::{Refusal, Result},
    media::thumbnails::Wanted,
};

/// An upload is waited for so long for those who say nothing of it.
const WAITS_DEFAULT: Duration = Duration::from_secs(20);

/// Reads how long an upload is waited for.
pub(crate) fn waits<E>(request: &Raw<E>) -> Result<Duration> {
    Ok(number(request, "timeout_ms")?.map_or(WAITS_DEFAULT, Duration::from_millis))
}

/// Reads which thumbnail a request asks for. Errors: 400 `M_MISSING_PARAM`, `M_INVALID_PARAM`.
pub(crate) fn wanted<E>(request: &Raw<E>) -> Result<Wanted> {
    let side = |name: &str| -> Result<u64> {
        let missing = || Refusal::missing_param(format!("The query parameter `{name}` is missing."));
        Ok(number(request, name)?.ok_or_else(missing)?)
    };
    let method = request.query("method");
    let is_animated = flag(request, "animated")?.unwrap_or_default();
    Wanted::new(side("width")?, side("height")?, method.as_deref(), is_animated)
}

/// Reads a number in the query. Errors: 400 `M_INVALID_PARAM` for what is none.
fn number<E>(request: &Raw<E>, name: &str) -> Result<Option<u64>> {
    let Some(text) = request.query(name) else { return Ok(None) };
    let number = text.parse().map_err(|_| {
        Refusal::invalid_param(format!("The query parameter `{name}` is no whole number from 0 on."))
    })?;
    Ok(Some(number))
}

/// Reads `true` or `false` in the query. Errors: 400 `M_INVALID_PARAM` for anything else.
pub(crate) fn flag<E>(request: &Raw<E>, name: &str) -> Result<Option<bool>> {
    match request.query(name).as_deref() {
        None => Ok(None),
        Some("true") => Ok(Some(true)),
        Some("false") => Ok(Some(false)),
        Some(_) => {
            let why = format!("The query parameter `{name}` is neither `true` nor `false`.");
            Err(Refusal::invalid_param(why).into())
        }
    }
}
