//! The endpoint of homeservers
//! ([`POST /_matrix/push/v1/notify`](https://spec.matrix.org/v1.19/push-gateway-api/#post_matrixpushv1notify)), as a router that the
//! homeserver mounts, or a process of its own serves.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::Response,
    routing::post,
};
use federation::{
    json::{Limits, NotRead, stream::collect},
    ports::{self, NotSent},
};
use futures_util::StreamExt;
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use crate::{
    delivery::{self, Request as Told},
    gateway::{Gateway, NO_SUCH_APP},
    lines::Reading,
    notification::{self, Device},
    outcome::Outcome,
    payer::Payer,
};

/// The path of the endpoint, which the specification prescribes.
pub const NOTIFY_PATH: &str = "/_matrix/push/v1/notify";
/// A request has at most this many bytes: an event has 64 KiB, and the rest is for its devices.
const BODY_LIMITS: Limits = Limits { bytes_max: 256 << 10, values_max: 10_000 };
/// A homeserver is answered within this time, with its body and all tries: some wait for no more than 20 seconds, and an answer that nobody hears
/// is asked for again.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// The body of a request arrives within this part of it.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// A body with more bytes than this is parsed off the threads that serve requests.
const LARGE_BYTES: usize = 16 << 10;
/// Stands for a body that was broken off because there is no memory for it.
const NO_MEMORY: &str = "there is no memory for the body";
/// A caller with too many requests is told to come back after this many milliseconds.
const RETRY_AFTER_MS: u64 = 1_000;

/// The address of whoever calls, which is put into the extensions of a request by whoever serves the router. Requests without one
/// count as those of one caller.
#[derive(Clone, Copy, Debug)]
pub struct Caller(pub IpAddr);

impl Gateway {
    /// The router of the gateway: its one path, and refusals for all else.
    pub fn router(&self) -> Router {
        let mut methods = post(notify);
        if self.serves_unified_push() {
            methods = methods.get(discover);
        }
        let no_endpoint =
            || async { refusal(StatusCode::NOT_FOUND, "M_UNRECOGNIZED", "There is no such endpoint.") };
        let no_method = || async {
            refusal(StatusCode::METHOD_NOT_ALLOWED, "M_UNRECOGNIZED", "The endpoint has no such method.")
        };
        Router::new()
            .route(NOTIFY_PATH, methods)
            .fallback(no_endpoint)
            .method_not_allowed_fallback(no_method)
            .with_state(self.clone())
    }
}

/// `GET /_matrix/push/v1/notify`
///
/// Clients of UnifiedPush ask the host of their endpoint whether there is a gateway for Matrix.
async fn discover() -> Response {
    answer(StatusCode::OK, &json!({ "gateway": "matrix", "unifiedpush": { "gateway": "matrix" } }))
}

/// `POST /_matrix/push/v1/notify`
async fn notify(State(gateway): State<Gateway>, request: Request) -> Response {
    let until = delivery::now() + ANSWER_WITHIN;
    let caller = request.extensions().get::<Caller>().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |it| it.0);
    let (payer, shared) = (Payer::of(caller), gateway.shared());
    let Some(mut reading) = shared.lines.read(payer) else { return too_many() };
    let body = match read(&gateway, &mut reading, request.into_body()).await {
        Ok(body) => body,
        Err(response) => return *response,
    };
    let Some(ticket) = reading.admit() else { return too_many() };
    let parsed = if body.len() > LARGE_BYTES {
        match shared.work(payer, move || notification::read(&body)).await {
            Some(parsed) => parsed,
            None => return too_many(),
        }
    } else {
        notification::read(&body)
    };
    let (notification, devices) = match parsed {
        Ok(parsed) => parsed,
        Err(misfit) => return refusal(StatusCode::BAD_REQUEST, misfit.errcode, misfit.why),
    };
    let request = Arc::new(Told::new(payer, notification, devices, ticket));
    let outcomes = gateway.notify(&request, until).await;
    told(&request.devices, &outcomes)
}

/// Reads the body within bounds. It gives way to callers who have less under way.
async fn read(gateway: &Gateway, reading: &mut Reading, body: Body) -> Result<bytes::Bytes, Box<Response>> {
    let mut memory = reading.memory();
    let pieces = body.into_data_stream().map(move |piece| match piece {
        Ok(piece) if memory.grow(piece.len()) => Ok(piece),
        Ok(_) => Err(NotSent::Broken(NO_MEMORY.to_owned())),
        Err(_) => Err(NotSent::Broken(String::new())),
    });
    let collecting = collect(ports::Body::new(pieces), BODY_LIMITS, &gateway.shared().bodies);
    let late = || refusal(StatusCode::REQUEST_TIMEOUT, "M_UNKNOWN", "The body did not arrive in time.");
    let answer = tokio::select! {
        biased;
        () = reading.gives_way() => return Err(Box::new(too_many())),
        answer = tokio::time::timeout(BODY_TIMEOUT, collecting) => answer.map_err(|_| Box::new(late()))?,
    };
    let answer = answer.map_err(|error| {
        Box::new(match error {
            NotRead::TooLarge(_) => refusal(
                StatusCode::PAYLOAD_TOO_LARGE,
                "M_TOO_LARGE",
                "A notification has at most 256 KiB, 10,000 values and 128 levels.",
            ),
            NotRead::Broken(NotSent::Broken(why)) if why == NO_MEMORY => too_many(),
            NotRead::Broken(_) => refusal(StatusCode::BAD_REQUEST, "M_NOT_JSON", "The body broke off."),
            NotRead::Stalled => late(),
            NotRead::NoMemory => too_many(),
        })
    })?;
    Ok(answer.bytes().clone())
}

/// The answer to the homeserver. A failure that may pass has it ask again, and then nobody is told twice; a push key is rejected only
/// if the provider says that it is gone.
fn told(devices: &[Device], outcomes: &[Outcome]) -> Response {
    let failed: Vec<_> = outcomes
        .iter()
        .filter_map(|it| match it {
            Outcome::Failed { retry_after, .. } => Some(retry_after.unwrap_or_default()),
            Outcome::Delivered
            | Outcome::Skipped
            | Outcome::Gone
            | Outcome::Unfit(_)
            | Outcome::Refused(_) => None,
        })
        .collect();
    if let Some(wait) = failed.into_iter().max() {
        let why = "The provider cannot be reached now, or has too much to do. Ask again later.";
        let mut response = refusal(StatusCode::BAD_GATEWAY, "M_UNKNOWN", why);
        if !wait.is_zero() {
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        return response;
    }
    let refused = |it: &Outcome| match it {
        Outcome::Refused(why) => Some(*why),
        Outcome::Delivered
        | Outcome::Skipped
        | Outcome::Gone
        | Outcome::Unfit(_)
        | Outcome::Failed { .. } => None,
    };
    let reasons: Option<Vec<_>> = outcomes.iter().map(refused).collect();
    if let Some(why) = reasons.and_then(|it| it.first().copied()) {
        return match why {
            NO_SUCH_APP => refusal(StatusCode::NOT_FOUND, "M_NOT_FOUND", why),
            _ => refusal(StatusCode::BAD_REQUEST, "M_INVALID_PARAM", why),
        };
    }
    let gone = devices.iter().zip(outcomes).filter(|(_, outcome)| **outcome == Outcome::Gone);
    let rejected: BTreeSet<_> = gone.map(|(device, _)| device.pushkey.as_str()).collect();
    answer(StatusCode::OK, &json!({ "rejected": rejected }))
}

fn too_many() -> Response {
    let body = json!({
        "errcode": "M_LIMIT_EXCEEDED", "error": "Too many notifications at once.", "retry_after_ms": RETRY_AFTER_MS,
    });
    let mut response = answer(StatusCode::TOO_MANY_REQUESTS, &body);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_MS / 1_000));
    response
}

fn refusal(status: StatusCode, errcode: &str, why: &str) -> Response {
    answer(status, &json!({ "errcode": errcode, "error": why }))
}

fn answer(status: StatusCode, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
