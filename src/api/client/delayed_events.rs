//! Delayed events (MSC4140): scheduling an event, looking up what is scheduled, and sending, cancelling or restarting it.
//!
//! The endpoints follow the proposal of July 2026. Clients that follow an older one name the delay in the query of `/send` and `/state`,
//! and the action in a body.

use ruma::OwnedRoomId;
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use crate::{
    api::{
        Routes,
        client::{
            delay::{require_delay, scheduled, sticky_ms},
            message::EVENT,
        },
        extract::Client,
        policy::{Body, Guests, KIB},
        raw::Raw,
        reply::RawJson,
    },
    error::{Refusal, Result},
    flows::{
        App,
        limits::{Limit, Source},
        room::{
            delayed::{self, Action, Wanted},
            send,
        },
    },
    rooms,
    schema::delayed::{DelayedOutcome, DelayedRow},
    store::{Fault, Read},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(schedule).limit(Limit::Send).guests(Guests::Yes).body(EVENT).not_suspended();
    r.client(list).limit(Limit::Read).guests(Guests::Yes);
    r.client(look_up).limit(Limit::Read).guests(Guests::Yes);
    let route = r.client(act).limit(Limit::Other).guests(Guests::Yes).body(Body::Json(KIB));
    route.suspended_if(|wish| {
        serde_json::from_slice::<ToDo>(wish.body).is_ok_and(|todo| todo.action.as_deref() == Some("cancel"))
    });
    r.client(send_now).limit(Limit::Send).guests(Guests::Yes).body(Body::Json(KIB)).not_suspended();
    r.client(cancel).limit(Limit::Other).guests(Guests::Yes).body(Body::Json(KIB));
    r.client(restart).limit(Limit::Other).guests(Guests::Yes).body(Body::Json(KIB)).not_suspended();
}

endpoint!(
    /// The endpoint by which an event is scheduled.
    Schedule, PUT,
    "/_matrix/client/unstable/org.matrix.msc4140/rooms/{room_id}/delayed_event/{event_type}/{txn_id}"
);
endpoint!(
    /// The endpoint that lists what is scheduled.
    List, GET,
    "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"
);
endpoint!(
    /// The endpoint that shows one delayed event.
    LookUp, GET,
    "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}"
);
endpoint!(
    /// The endpoint of older clients, whose body names the action.
    Act, POST,
    "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}"
);
endpoint!(
    /// The endpoint that has an event sent at once.
    SendNow, POST,
    "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}/send"
);
endpoint!(
    /// The endpoint that has an event never sent.
    Cancel, POST,
    "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}/cancel"
);
endpoint!(
    /// The endpoint that begins the delay of an event anew.
    Restart, POST,
    "/_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delay_id}/restart"
);

#[derive(Deserialize)]
struct ToSchedule {
    delay_ms: u64,
    state_key: Option<String>,
    content: Box<RawValue>,
}

/// `PUT /_matrix/client/unstable/org.matrix.msc4140/rooms/{roomId}/delayed_event/{eventType}/{txnId}`
pub(crate) async fn schedule(app: App, client: Client<Raw<Schedule>>) -> Result<RawJson> {
    let request = client.request;
    let body: ToSchedule = request.json()?;
    require_delay(&app, body.delay_ms, false)?;
    let wanted = Wanted {
        room: request.id::<OwnedRoomId>(0)?,
        event_type: request.arg(1).to_owned(),
        state_key: body.state_key,
        txn: Some(request.arg(2).to_owned()),
        content: send::content(body.content.get())?,
        delay_ms: body.delay_ms,
        sticky_ms: sticky_ms(&request)?,
    };
    delayed::schedule(&app, &client.caller, wanted).await.map(|id| scheduled(&id))
}

/// Shows a delayed event, with the names of the proposal of now and of the older one.
fn show(read: &(impl Read + ?Sized), id: &str, row: &DelayedRow) -> Result<Value, Fault> {
    let mut shown = json!({
        "delay_id": id,
        "room_id": row.room_id,
        "type": row.event_type,
        "delay_ms": row.delay_ms,
        "delay": row.delay_ms,
        "scheduled_at": row.scheduled_ms,
        "running_since": row.scheduled_ms,
        "content": rooms::delayed::content_of(read, row)?,
    });
    let mut add =
        |name: &str, value: Value| shown.as_object_mut().map(|shown| shown.insert(name.to_owned(), value));
    if let Some(state_key) = &row.state_key {
        add("state_key", json!(state_key));
    }
    if let Some(end) = &row.end {
        add("finalised_ts", json!(end.at_ms));
        match &end.outcome {
            DelayedOutcome::Sent(event_id) => drop(add("event_id", json!(event_id))),
            DelayedOutcome::Refused(code, why) => {
                drop(add("error", json!({ "errcode": code, "error": why })))
            }
            DelayedOutcome::Cancelled => {}
        }
    }
    Ok(shown)
}

/// `GET /_matrix/client/unstable/org.matrix.msc4140/delayed_events`
pub(crate) async fn list(app: App, client: Client<Raw<List>>) -> Result<RawJson> {
    let (store, user) = (app.store.clone(), client.caller.user);
    let json = app.env.blocking(move || {
        let snapshot = store.snapshot();
        let waiting = rooms::delayed::list_due(&*snapshot, user, u64::MAX, usize::MAX)?;
        let shown = waiting.iter().map(|(id, row)| show(&*snapshot, id, row));
        let shown = shown.collect::<Result<Vec<_>, _>>()?;
        // Older clients look for `scheduled`.
        Ok(json!({ "delayed_events": shown, "scheduled": shown }).to_string())
    });
    Ok(RawJson(json.await?.into()))
}

/// `GET /_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delayId}`
pub(crate) async fn look_up(app: App, client: Client<Raw<LookUp>>) -> Result<RawJson> {
    let id = client.request.arg(0);
    let snapshot = app.store.snapshot();
    let found = rooms::delayed::find(&*snapshot, client.caller.user, id, app.env.now_ms())?;
    let row = found.ok_or_else(delayed::unknown)?;
    Ok(RawJson(show(&*snapshot, id, &row)?.to_string().into()))
}

/// The answer to an action that was done.
fn done() -> RawJson {
    RawJson(json!({}).to_string().into())
}

#[derive(Deserialize)]
struct ToDo {
    action: Option<String>,
}

/// `POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delayId}`
pub(crate) async fn act(app: App, client: Client<Raw<Act>>) -> Result<RawJson> {
    let request = client.request;
    let action = match request.json::<ToDo>()?.action.as_deref() {
        Some("send") => {
            // It sends an event as much as the endpoint of its own does.
            app.limits.take(Limit::Send, Source::User(client.caller.user))?;
            Action::Send
        }
        Some("cancel") => Action::Cancel,
        Some("restart") => Action::Restart,
        Some(_) => {
            return Err(Refusal::invalid_param("`action` is not one of send, cancel and restart.").into());
        }
        None => return Err(Refusal::missing_param("`action` is missing: send, cancel or restart.").into()),
    };
    delayed::act(&app, &client.caller, request.arg(0).to_owned(), action).await.map(|()| done())
}

/// `POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delayId}/send`
pub(crate) async fn send_now(app: App, client: Client<Raw<SendNow>>) -> Result<RawJson> {
    let id = client.request.arg(0).to_owned();
    delayed::act(&app, &client.caller, id, Action::Send).await.map(|()| done())
}

/// `POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delayId}/cancel`
pub(crate) async fn cancel(app: App, client: Client<Raw<Cancel>>) -> Result<RawJson> {
    let id = client.request.arg(0).to_owned();
    delayed::act(&app, &client.caller, id, Action::Cancel).await.map(|()| done())
}

/// `POST /_matrix/client/unstable/org.matrix.msc4140/delayed_events/{delayId}/restart`
pub(crate) async fn restart(app: App, client: Client<Raw<Restart>>) -> Result<RawJson> {
    let id = client.request.arg(0).to_owned();
    delayed::act(&app, &client.caller, id, Action::Restart).await.map(|()| done())
}
