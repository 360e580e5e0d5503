//! Requests that do not fit their endpoint: what is said about them.

use ruma::api::error::{DeserializationError, FromHttpRequestError};

use crate::error::Refusal;

/// Says in Matrix's words how a request does not fit its endpoint. Its body is known to be JSON.
pub(crate) fn of_request(error: FromHttpRequestError) -> Refusal {
    let FromHttpRequestError::Deserialization(error) = error else {
        return Refusal::unrecognized("The endpoint has no such method.");
    };
    match error {
        DeserializationError::Json(error) => of_body(&error),
        DeserializationError::Query(error) if is_missing(&error.to_string()) => {
            Refusal::missing_param(format!("The query of the request is incomplete: {error}."))
        }
        error => {
            Refusal::invalid_param(format!("A parameter of the path or the query cannot be read: {error}."))
        }
    }
}

/// Says how a body that is JSON does not have the form that was asked for.
pub(crate) fn of_body(error: &serde_json::Error) -> Refusal {
    let why = error.to_string();
    if is_missing(&why) {
        Refusal::missing_param(format!("The request's body is incomplete: {why}."))
    } else {
        Refusal::bad_json(format!("The request's body does not fit this endpoint: {why}."))
    }
}

fn is_missing(why: &str) -> bool {
    why.starts_with("missing field")
}
