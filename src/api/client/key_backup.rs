//! Server-side backups of room keys.

use std::collections::BTreeMap;

use ruma::{
    UInt,
    api::client::backup::{
        add_backup_keys, add_backup_keys_for_room, add_backup_keys_for_session, create_backup_version,
        delete_backup_keys, delete_backup_keys_for_room, delete_backup_keys_for_session,
        delete_backup_version, get_backup_info, get_backup_keys, get_backup_keys_for_room,
        get_backup_keys_for_session, get_latest_backup_info, update_backup_version,
    },
};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    api::{
        Routes,
        extract::Client,
        policy::{Body, KIB, MIB},
        raw::Raw,
        reply::{InPieces, RawJson},
    },
    encryption::backup::{self, Info, Upload, Which},
    error::{Refusal, Result},
    flows::{App, backup as flow, limits::Limit},
    json::{JsonRef, Object},
    schema::backup::{BackedUpKey, BackupRow, BackupState},
};

/// The body has room for the keys of ten thousand sessions.
const KEYS: Body = Body::Json(16 * MIB);

pub(crate) fn routes(r: &mut Routes) {
    r.client(create_backup_version).limit(Limit::Other).body(Body::Json(128 * KIB));
    r.client(get_latest_backup_info).limit(Limit::Read);
    r.client(get_backup_info).limit(Limit::Read);
    r.client(update_backup_version).limit(Limit::Other).body(Body::Json(128 * KIB));
    r.client(delete_backup_version).limit(Limit::Other);
    r.client(add_backup_keys).limit(Limit::Other).body(KEYS);
    r.client(get_backup_keys).limit(Limit::Read);
    r.client(delete_backup_keys).limit(Limit::Other);
    r.client(add_backup_keys_for_room).limit(Limit::Other).body(KEYS);
    r.client(get_backup_keys_for_room).limit(Limit::Read);
    r.client(delete_backup_keys_for_room).limit(Limit::Other);
    r.client(add_backup_keys_for_session).limit(Limit::Other).body(Body::Json(128 * KIB));
    r.client(get_backup_keys_for_session).limit(Limit::Read);
    r.client(delete_backup_keys_for_session).limit(Limit::Other);
}

#[derive(Deserialize)]
struct VersionBody {
    algorithm: String,
    auth_data: Box<RawValue>,
    version: Option<String>,
}

impl VersionBody {
    fn row(&self) -> BackupRow {
        BackupRow { algorithm: self.algorithm.clone(), auth_data: self.auth_data.get().to_owned() }
    }
}

/// `POST /_matrix/client/v3/room_keys/version`
pub(crate) async fn create_backup_version(
    app: App,
    client: Client<Raw<create_backup_version::v3::Request>>,
) -> Result<RawJson> {
    let body: VersionBody = client.request.json()?;
    let version = flow::create(&app, &client.caller, body.row()).await?;
    let mut answer = Object::new();
    answer.text("version", &version.to_string());
    Ok(RawJson(answer.finish().into()))
}

fn shown(info: &Info) -> RawJson {
    let mut shown = Object::new();
    shown.text("algorithm", &info.row.algorithm);
    shown.json("auth_data", JsonRef::stored(info.row.auth_data.as_bytes()));
    shown.number("count", info.state.keys);
    shown.text("etag", &info.state.etag.to_string());
    shown.text("version", &info.version.to_string());
    RawJson(shown.finish().into())
}

/// `GET /_matrix/client/v3/room_keys/version`
pub(crate) async fn get_latest_backup_info(
    app: App,
    client: Client<Raw<get_latest_backup_info::v3::Request>>,
) -> Result<RawJson> {
    Ok(shown(&backup::require_info(&*app.store.snapshot(), client.caller.user, None)?))
}

/// `GET /_matrix/client/v3/room_keys/version/{version}`
pub(crate) async fn get_backup_info(
    app: App,
    client: Client<Raw<get_backup_info::v3::Request>>,
) -> Result<RawJson> {
    let version = client.request.arg(0);
    Ok(shown(&backup::require_info(&*app.store.snapshot(), client.caller.user, Some(version))?))
}

/// The answer to a request that was carried out and has nothing to say.
fn done() -> RawJson {
    RawJson(Object::new().finish().into())
}

/// `PUT /_matrix/client/v3/room_keys/version/{version}`
pub(crate) async fn update_backup_version(
    app: App,
    client: Client<Raw<update_backup_version::v3::Request>>,
) -> Result<RawJson> {
    let body: VersionBody = client.request.json()?;
    let version = client.request.arg(0).to_owned();
    if body.version.as_ref().is_some_and(|in_body| *in_body != version) {
        return Err(Refusal::invalid_param("`version` in the body must be the one in the path.").into());
    }
    flow::update(&app, &client.caller, version, body.row()).await.map(|()| done())
}

/// `DELETE /_matrix/client/v3/room_keys/version/{version}`
pub(crate) async fn delete_backup_version(
    app: App,
    client: Client<Raw<delete_backup_version::v3::Request>>,
) -> Result<RawJson> {
    let version = client.request.arg(0).to_owned();
    flow::delete(&app, &client.caller, version).await.map(|()| done())
}

/// The parameter `version` of the query. Refuses a request without it: 400 `M_MISSING_PARAM`.
fn version_of<E>(request: &Raw<E>) -> Result<String> {
    let missing = || Refusal::missing_param("`version` is missing in the query: the version of the backup.");
    Ok(request.query("version").ok_or_else(missing)?)
}

/// The room that the path of a request names.
fn room_of<E>(request: &Raw<E>) -> Result<String> {
    let room = request.arg(0);
    backup::check_names(room, None)?;
    Ok(room.to_owned())
}

/// The room and the session that the path of a request names.
fn session_of<E>(request: &Raw<E>) -> Result<(String, String)> {
    let (room, session) = (request.arg(0), request.arg(1));
    backup::check_names(room, Some(session))?;
    Ok((room.to_owned(), session.to_owned()))
}

#[derive(Deserialize)]
struct KeyBody<'a> {
    first_message_index: UInt,
    forwarded_count: UInt,
    is_verified: bool,
    #[serde(borrow)]
    session_data: &'a RawValue,
}

#[derive(Deserialize)]
struct RoomBody<'a> {
    #[serde(borrow)]
    sessions: BTreeMap<String, KeyBody<'a>>,
}

#[derive(Deserialize)]
struct AllBody<'a> {
    #[serde(borrow)]
    rooms: BTreeMap<String, RoomBody<'a>>,
}

/// Reads keys out of a body. Their data stays where it is in the body, and is not copied.
struct Uploads<'a, E> {
    request: &'a Raw<E>,
    read: Vec<Upload>,
}

impl<'a, E> Uploads<'a, E> {
    fn of(request: &'a Raw<E>) -> Self {
        Self { request, read: Vec::new() }
    }

    fn add(&mut self, room: &str, session: String, key: &KeyBody<'a>) -> Result<()> {
        let session_data = self.request.body.bytes().slice_ref(key.session_data.get().as_bytes());
        backup::check_upload(room, &session, &session_data)?;
        let key = BackedUpKey {
            is_verified: key.is_verified,
            first_message_index: key.first_message_index.into(),
            forwarded_count: key.forwarded_count.into(),
            session_data,
        };
        self.read.push(Upload { room: room.to_owned(), session, key });
        Ok(())
    }

    fn add_room(&mut self, room: &str, body: RoomBody<'a>) -> Result<()> {
        body.sessions.into_iter().try_for_each(|(session, key)| self.add(room, session, &key))
    }
}

/// The answer to a request that has changed keys, or might have.
fn changed(state: BackupState) -> RawJson {
    let mut answer = Object::new();
    answer.number("count", state.keys);
    answer.text("etag", &state.etag.to_string());
    RawJson(answer.finish().into())
}

/// `PUT /_matrix/client/v3/room_keys/keys`
pub(crate) async fn add_backup_keys(
    app: App,
    client: Client<Raw<add_backup_keys::v3::Request>>,
) -> Result<RawJson> {
    let version = version_of(&client.request)?;
    let caller = client.caller;
    let read = move || {
        let mut uploads = Uploads::of(&client.request);
        let body: AllBody<'_> = client.request.body.read()?;
        body.rooms.into_iter().try_for_each(|(room, body)| uploads.add_room(&room, body))?;
        Ok(uploads.read)
    };
    let uploads = app.env.blocking(read).await?;
    flow::put_keys(&app, &caller, version, uploads).await.map(changed)
}

/// `PUT /_matrix/client/v3/room_keys/keys/{roomId}`
pub(crate) async fn add_backup_keys_for_room(
    app: App,
    client: Client<Raw<add_backup_keys_for_room::v3::Request>>,
) -> Result<RawJson> {
    let (version, room) = (version_of(&client.request)?, room_of(&client.request)?);
    let caller = client.caller;
    let read = move || {
        let mut uploads = Uploads::of(&client.request);
        uploads.add_room(&room, client.request.body.read()?)?;
        Ok(uploads.read)
    };
    let uploads = app.env.blocking(read).await?;
    flow::put_keys(&app, &caller, version, uploads).await.map(changed)
}

/// `PUT /_matrix/client/v3/room_keys/keys/{roomId}/{sessionId}`
pub(crate) async fn add_backup_keys_for_session(
    app: App,
    client: Client<Raw<add_backup_keys_for_session::v3::Request>>,
) -> Result<RawJson> {
    let (version, (room, session)) = (version_of(&client.request)?, session_of(&client.request)?);
    let uploads = {
        let mut uploads = Uploads::of(&client.request);
        uploads.add(&room, session, &client.request.body.read()?)?;
        uploads.read
    };
    flow::put_keys(&app, &client.caller, version, uploads).await.map(changed)
}

/// `GET /_matrix/client/v3/room_keys/keys`
pub(crate) async fn get_backup_keys(
    app: App,
    client: Client<Raw<get_backup_keys::v3::Request>>,
) -> Result<InPieces> {
    let version = version_of(&client.request)?;
    let (first, rest) = flow::list(&app, &client.caller, version, None).await?;
    Ok(InPieces::of(first, rest, |rest| rest.next()))
}

/// `GET /_matrix/client/v3/room_keys/keys/{roomId}`
pub(crate) async fn get_backup_keys_for_room(
    app: App,
    client: Client<Raw<get_backup_keys_for_room::v3::Request>>,
) -> Result<InPieces> {
    let (version, room) = (version_of(&client.request)?, room_of(&client.request)?);
    let (first, rest) = flow::list(&app, &client.caller, version, Some(room)).await?;
    Ok(InPieces::of(first, rest, |rest| rest.next()))
}

/// `GET /_matrix/client/v3/room_keys/keys/{roomId}/{sessionId}`
pub(crate) async fn get_backup_keys_for_session(
    app: App,
    client: Client<Raw<get_backup_keys_for_session::v3::Request>>,
) -> Result<RawJson> {
    let (version, (room, session)) = (version_of(&client.request)?, session_of(&client.request)?);
    let (snapshot, user) = (app.store.snapshot(), client.caller.user);
    let version = backup::require(&*snapshot, user, &version)?;
    let key = backup::find_key(&*snapshot, user, version, (&room, &session))?;
    Ok(RawJson(flow::show(&key.ok_or_else(backup::no_such_key)?).into()))
}

/// `DELETE /_matrix/client/v3/room_keys/keys`
pub(crate) async fn delete_backup_keys(
    app: App,
    client: Client<Raw<delete_backup_keys::v3::Request>>,
) -> Result<RawJson> {
    let version = version_of(&client.request)?;
    flow::delete_keys(&app, &client.caller, version, Which::All).await.map(changed)
}

/// `DELETE /_matrix/client/v3/room_keys/keys/{roomId}`
pub(crate) async fn delete_backup_keys_for_room(
    app: App,
    client: Client<Raw<delete_backup_keys_for_room::v3::Request>>,
) -> Result<RawJson> {
    let (version, room) = (version_of(&client.request)?, room_of(&client.request)?);
    flow::delete_keys(&app, &client.caller, version, Which::Room(room)).await.map(changed)
}

/// `DELETE /_matrix/client/v3/room_keys/keys/{roomId}/{sessionId}`
pub(crate) async fn delete_backup_keys_for_session(
    app: App,
    client: Client<Raw<delete_backup_keys_for_session::v3::Request>>,
) -> Result<RawJson> {
    let (version, (room, session)) = (version_of(&client.request)?, session_of(&client.request)?);
    let which = Which::Session(room, session);
    flow::delete_keys(&app, &client.caller, version, which).await.map(changed)
}
