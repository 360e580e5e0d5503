//! Keeps the reports that users make to those who run this server.

use ruma::{EventId, RoomId};

use crate::{
    accounts::{Caller, reports},
    error::{Error, Refusal, Result},
    flows::{App, room::look, write},
    schema::reports::{ReportRow, Subject},
};

/// Requires that a user is in the room of an event and sees the event: 404 `M_NOT_FOUND` otherwise.
pub(crate) async fn require_reportable(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    event: &EventId,
) -> Result<()> {
    let is_seen = look::sees_inside(app, caller, room, event).await;
    match is_seen {
        Ok(true) => Ok(()),
        Ok(false) | Err(Error::Refused(_)) => {
            Err(Refusal::not_found("You are in no such room, or there is no such event in it.").into())
        }
        Err(error) => Err(error),
    }
}

/// Keeps a report. Errors: as of [`reports::keep`].
pub(crate) async fn keep(
    app: &App,
    caller: &Caller,
    subject: Subject,
    reason: String,
    score: Option<i64>,
) -> Result<()> {
    let (user, at_ms) = (caller.user, app.env.now_ms());
    tracing::info!(%user, subject = subject.name(), "a report is kept");
    let row = ReportRow { at_ms, subject, reason, score };
    write::for_caller(app, caller, move |_, batch| reports::keep(batch, user, row)).await
}
