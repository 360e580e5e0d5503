//! Subscribing to threads (MSC4306), and the list of what changed in that (MSC4308).

use ruma::{OwnedEventId, OwnedRoomId};
use serde::Deserialize;
use serde_json::json;

use crate::{
    accounts::subscriptions::Standing,
    api::{
        Routes,
        extract::Client,
        policy::{Body, KIB},
        raw::Raw,
        reply::RawJson,
    },
    error::{Refusal, Result},
    flows::{App, account::subscriptions, limits::Limit},
    ids::Position,
    store::Read,
    sync::subscriptions as changes,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_subscription).limit(Limit::Read);
    r.client(subscribe).limit(Limit::Other).body(Body::Json(4 * KIB));
    r.client(unsubscribe).limit(Limit::Other).body(Body::Json(KIB));
    r.client(list_changes).limit(Limit::Read);
}

/// The path of the subscription to a thread.
const SUBSCRIPTION: &str =
    "/_matrix/client/unstable/io.element.msc4306/rooms/{room_id}/thread/{event_id}/subscription";

endpoint!(
    /// The endpoint that shows the subscription to a thread.
    GetSubscription, GET, SUBSCRIPTION
);
endpoint!(
    /// The endpoint that subscribes to a thread.
    Subscribe, PUT, SUBSCRIPTION
);
endpoint!(
    /// The endpoint that unsubscribes from a thread.
    Unsubscribe, DELETE, SUBSCRIPTION
);
endpoint!(
    /// The endpoint that lists changes of subscriptions.
    ListChanges, GET, "/_matrix/client/unstable/io.element.msc4308/thread_subscriptions"
);

/// The room and the root that the path of a request names. A root that can be no event is answered as one that is not there.
fn thread_of<E>(request: &Raw<E>) -> Result<(OwnedRoomId, OwnedEventId)> {
    let room = request.id(0)?;
    let root = request.id(1).map_err(|_| Refusal::not_found("There is no such thread."))?;
    Ok((room, root))
}

/// `GET /_matrix/client/unstable/io.element.msc4306/rooms/{roomId}/thread/{eventId}/subscription`
pub(crate) async fn get_subscription(app: App, client: Client<Raw<GetSubscription>>) -> Result<RawJson> {
    let (room, root) = thread_of(&client.request)?;
    let found = subscriptions::require_subscription(&app, &client.caller, &room, &root)?;
    let is_automatic = found.standing == Standing::Automatic;
    Ok(RawJson(json!({ "automatic": is_automatic }).to_string().into()))
}

#[derive(Deserialize)]
struct ToSubscribe {
    automatic: Option<OwnedEventId>,
}

/// `PUT /_matrix/client/unstable/io.element.msc4306/rooms/{roomId}/thread/{eventId}/subscription`
pub(crate) async fn subscribe(app: App, client: Client<Raw<Subscribe>>) -> Result<RawJson> {
    let (room, root) = thread_of(&client.request)?;
    let body: ToSubscribe = client.request.json()?;
    subscriptions::subscribe(&app, &client.caller, room, root, body.automatic).await?;
    Ok(RawJson(json!({}).to_string().into()))
}

/// `DELETE /_matrix/client/unstable/io.element.msc4306/rooms/{roomId}/thread/{eventId}/subscription`
pub(crate) async fn unsubscribe(app: App, client: Client<Raw<Unsubscribe>>) -> Result<RawJson> {
    let (room, root) = thread_of(&client.request)?;
    subscriptions::unsubscribe(&app, &client.caller, room, root).await?;
    Ok(RawJson(json!({}).to_string().into()))
}

/// Reads a parameter of the query that says how far back a page goes. Refuses what is no token: 400 `M_INVALID_PARAM`.
fn position_of<E>(request: &Raw<E>, name: &str) -> Result<Option<Position>> {
    let Some(text) = request.query(name) else { return Ok(None) };
    let odd = || Refusal::invalid_param(format!("`{name}` is not a token of this list or of a sync."));
    Ok(Some(changes::read_token(&text).ok_or_else(odd)?))
}

/// `GET /_matrix/client/unstable/io.element.msc4308/thread_subscriptions`
pub(crate) async fn list_changes(app: App, client: Client<Raw<ListChanges>>) -> Result<RawJson> {
    let request = client.request;
    match request.query("dir").as_deref() {
        Some("b") => {}
        Some(_) => return Err(Refusal::invalid_param("`dir` must be b.").into()),
        None => return Err(Refusal::missing_param("`dir` is missing; it must be b.").into()),
    }
    let (from, to) = (position_of(&request, "from")?, position_of(&request, "to")?);
    let limit = match request.query("limit").map(|limit| limit.parse::<usize>()) {
        None => changes::CHANGES_DEFAULT,
        Some(Ok(limit)) if limit > 0 => limit,
        Some(_) => return Err(Refusal::invalid_param("`limit` must be a number above zero.").into()),
    };
    let (store, user) = (app.store.clone(), client.caller.user);
    let json = app.env.blocking(move || {
        let snapshot = store.snapshot();
        let upto = from.unwrap_or(Position::MAX).min(snapshot.upto());
        let page = changes::collect(&*snapshot, user, (to.unwrap_or_default(), upto), limit)?;
        Ok(page.json("end"))
    });
    Ok(RawJson(json.await?.into()))
}
