//! Users of other servers come, go and knock by way of this server.

use http::Method;
use ruma::api::federation::membership::{
    create_join_event, create_knock_event, create_leave_event, prepare_join_event, prepare_knock_event,
    prepare_leave_event,
};

use crate::{
    api::{
        Routes,
        extract::{Endpoint, Server},
        policy::{Body, KIB},
        raw::Raw,
        reply::{InPieces, RawJson},
    },
    error::Result,
    flows::{
        App,
        limits::Limit,
        remote::{
            admit_member::{self, Move, Sent},
            whole_state::Form,
        },
    },
    json::Object,
};

/// An event with all that may stand around it, and the spaces and escapes that it may be written with.
const EVENT: Body = Body::Json(256 * KIB);

pub(crate) fn routes(r: &mut Routes) {
    r.server(make_join).limit(Limit::Other);
    r.server(make_leave).limit(Limit::Other);
    r.server(make_knock).limit(Limit::Other);
    r.server(send_join).limit(Limit::Membership).body(EVENT);
    r.server(send_join_v1).limit(Limit::Membership).body(EVENT);
    r.server(send_leave).limit(Limit::Membership).body(EVENT);
    r.server(send_leave_v1).limit(Limit::Membership).body(EVENT);
    r.server(send_knock).limit(Limit::Membership).body(EVENT);
}

/// Makes the template that a server asks for. `default` is the room version that it speaks if it names none.
async fn template<E>(
    app: App,
    server: Server<Raw<E>>,
    wanted: Move,
    default: Option<&str>,
) -> Result<RawJson> {
    let request = server.request;
    let mut versions = default.map(|_| request.query_all("ver"));
    if let (Some(versions), Some(default)) = (&mut versions, default)
        && versions.is_empty()
    {
        versions.push(default.to_owned());
    }
    let (room, user) = (request.id::<ruma::OwnedRoomId>(0)?, request.id(1)?);
    let made = admit_member::template(&app, &server.origin, &room, user, wanted, versions).await?;
    Ok(RawJson(made))
}

/// Reads the event that a server sends.
fn sent<E>(server: Server<Raw<E>>) -> Result<Sent> {
    let request = server.request;
    let id = request.arg(1).to_owned();
    Ok(Sent { origin: server.origin, room: request.id(0)?, id, json: request.body.bytes() })
}

/// `GET /_matrix/federation/v1/make_join/{roomId}/{userId}`
pub(crate) async fn make_join(
    app: App,
    server: Server<Raw<prepare_join_event::v1::Request>>,
) -> Result<RawJson> {
    template(app, server, Move::Join, Some("1")).await
}

/// `GET /_matrix/federation/v1/make_leave/{roomId}/{userId}`
pub(crate) async fn make_leave(
    app: App,
    server: Server<Raw<prepare_leave_event::v1::Request>>,
) -> Result<RawJson> {
    template(app, server, Move::Leave, None).await
}

/// `GET /_matrix/federation/v1/make_knock/{roomId}/{userId}`
pub(crate) async fn make_knock(
    app: App,
    server: Server<Raw<prepare_knock_event::v1::Request>>,
) -> Result<RawJson> {
    template(app, server, Move::Knock, Some("1")).await
}

/// `PUT /_matrix/federation/v2/send_join/{roomId}/{eventId}`
pub(crate) async fn send_join(
    app: App,
    server: Server<Raw<create_join_event::v2::Request>>,
) -> Result<InPieces> {
    let omit_members = server.request.query("omit_members").is_some_and(|value| value == "true");
    let (first, rest) = admit_member::join(&app, sent(server)?, omit_members, Form::Object).await?;
    Ok(InPieces::of(first, rest, |rest| rest.next()))
}

/// The first version of the endpoint for joins, which older servers still call.
pub(crate) struct SendJoinV1;

impl Endpoint for SendJoinV1 {
    fn method() -> Method {
        Method::PUT
    }

    fn paths() -> Vec<&'static str> {
        vec!["/_matrix/federation/v1/send_join/{room_id}/{event_id}"]
    }
}

/// `PUT /_matrix/federation/v1/send_join/{roomId}/{eventId}`
pub(crate) async fn send_join_v1(app: App, server: Server<Raw<SendJoinV1>>) -> Result<InPieces> {
    let (first, rest) = admit_member::join(&app, sent(server)?, false, Form::Listed).await?;
    Ok(InPieces::of(first, rest, |rest| rest.next()))
}

/// `PUT /_matrix/federation/v2/send_leave/{roomId}/{eventId}`
pub(crate) async fn send_leave(
    app: App,
    server: Server<Raw<create_leave_event::v2::Request>>,
) -> Result<RawJson> {
    admit_member::leave(&app, sent(server)?).await?;
    Ok(RawJson(Object::new().finish().into()))
}

/// The first version of the endpoint for leaving, which older servers still call.
pub(crate) struct SendLeaveV1;

impl Endpoint for SendLeaveV1 {
    fn method() -> Method {
        Method::PUT
    }

    fn paths() -> Vec<&'static str> {
        vec!["/_matrix/federation/v1/send_leave/{room_id}/{event_id}"]
    }
}

/// `PUT /_matrix/federation/v1/send_leave/{roomId}/{eventId}`
pub(crate) async fn send_leave_v1(app: App, server: Server<Raw<SendLeaveV1>>) -> Result<RawJson> {
    admit_member::leave(&app, sent(server)?).await?;
    Ok(RawJson(serde_json::json!([200, {}]).to_string().into()))
}

/// `PUT /_matrix/federation/v1/send_knock/{roomId}/{eventId}`
pub(crate) async fn send_knock(
    app: App,
    server: Server<Raw<create_knock_event::v1::Request>>,
) -> Result<RawJson> {
    let shown = admit_member::knock(&app, sent(server)?).await?;
    let mut answer = Object::new();
    answer.list("knock_room_state", &shown);
    Ok(RawJson(answer.finish().into()))
}
