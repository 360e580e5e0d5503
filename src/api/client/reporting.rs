//! Reports of events, rooms and users to those who run this server.
//!
//! Specification: client-server API, "Reporting Content".

use ruma::{
    OwnedEventId, OwnedRoomId, OwnedUserId,
    api::client::{
        reporting::report_user,
        room::{report_content, report_room},
    },
};
use serde::Deserialize;

use crate::{
    api::{Routes, extract::Client, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{App, limits::Limit, report},
    schema::reports::Subject,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(report_content).limit(Limit::Other);
    r.client(report_room).limit(Limit::Other);
    r.client(report_user).limit(Limit::Other);
}

/// The body of a report. It is read here and not by ruma, so that a missing field can be named.
#[derive(Deserialize)]
struct Said {
    reason: Option<String>,
    /// How bad it is, in versions of the specification before 1.18.
    score: Option<i64>,
}

/// Takes the reason of a report that must give one, if only an empty one.
fn require_reason(said: Said) -> Result<String> {
    said.reason.ok_or_else(|| Refusal::missing_param("`reason` is missing; it may be empty.").into())
}

fn done() -> RawJson {
    RawJson(bytes::Bytes::from_static(b"{}"))
}

/// `POST /_matrix/client/v3/rooms/{roomId}/report/{eventId}`
pub(crate) async fn report_content(
    app: App,
    client: Client<Raw<report_content::v3::Request>>,
) -> Result<RawJson> {
    let Client { caller, request, .. } = client;
    let (room, event): (OwnedRoomId, OwnedEventId) = (request.id(0)?, request.id(1)?);
    let said: Said = request.json()?;
    report::require_reportable(&app, &caller, &room, &event).await?;
    let subject = Subject::Event { room_id: room, event_id: event };
    report::keep(&app, &caller, subject, said.reason.unwrap_or_default(), said.score).await?;
    Ok(done())
}

/// `POST /_matrix/client/v3/rooms/{roomId}/report`
pub(crate) async fn report_room(app: App, client: Client<Raw<report_room::v3::Request>>) -> Result<RawJson> {
    let Client { caller, request, .. } = client;
    let subject = Subject::Room { room_id: request.id(0)? };
    // Whether there is such a room is not said, and a room may be reported that only other servers know.
    report::keep(&app, &caller, subject, require_reason(request.json()?)?, None).await?;
    Ok(done())
}

/// `POST /_matrix/client/v3/users/{userId}/report`
pub(crate) async fn report_user(app: App, client: Client<Raw<report_user::v3::Request>>) -> Result<RawJson> {
    let Client { caller, request, .. } = client;
    let user_id: OwnedUserId = request.id(0)?;
    let subject = Subject::User { user_id };
    report::keep(&app, &caller, subject, require_reason(request.json()?)?, None).await?;
    Ok(done())
}
