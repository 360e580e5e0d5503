//! Member events of ours for rooms that this server is not in. Another server, which is in the room, says where in the room's graph
//! the event stands and what allows it; all else is ours, so that nobody has us sign what we did not mean
//! (server-server API, "Joining Rooms", "Leaving Rooms", "Knocking upon a room").

use std::{borrow::Cow, time::Duration};

use federation::call::Options;
use ruma::{
    CanonicalJsonObject, OwnedEventId, OwnedRoomId, OwnedServerName, OwnedUserId, RoomVersionId, ServerName,
    api::{
        error::{ErrorKind, IncompatibleRoomVersionErrorData},
        federation::membership::{prepare_join_event, prepare_knock_event, prepare_leave_event},
    },
};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    error::{Error, Refusal, Result},
    flows::{
        App,
        remote::ask::{at_fault, failed},
    },
    ids::RoomNum,
    rooms::{
        self,
        build::{self, Draft, EVENT_BYTES_MAX, Setting},
        change::{Received, Signed},
        event,
        membership::without_profile,
        reference::{self, Hashes},
        versions,
        vouch::AUTHORISED_VIA,
    },
    schema::{
        event_types::MEMBER,
        rooms::{Membership, Resident, RoomRow},
    },
};

/// An event may cite this many others, and name this many that allow it.
const CITED_MAX: usize = 20;
/// The event of somebody who comes back at once is dated later by less than this.
const LATER_MAX_MS: u64 = 20;

/// The member event that one of our users wants to add to a room.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) room_id: OwnedRoomId,
    pub(crate) user_id: OwnedUserId,
    pub(crate) membership: Membership,
    /// The whole content, but for what the other server must add.
    pub(crate) content: CanonicalJsonObject,
}

impl Wanted {
    /// Wants a user out of a room.
    pub(crate) fn leave(room_id: OwnedRoomId, user_id: OwnedUserId) -> Self {
        let content = without_profile("leave", None);
        Self { room_id, user_id, membership: Membership::Leave, content }
    }
}

/// Where another server says that the event stands.
#[derive(Debug)]
pub(crate) struct Template {
    /// The version of the room, which we know.
    pub(crate) version: u8,
    prev: Vec<OwnedEventId>,
    auth: Vec<OwnedEventId>,
    /// The hashes of these events, where the room's version cites events with them: the word of the server that gave the template.
    hashes: Hashes,
    depth: u64,
    /// The user by whose right the room's restrictions let ours in.
    pub(crate) authorised_via: Option<OwnedUserId>,
}

/// Lists the versions of rooms that this server knows.
fn known_versions() -> Vec<RoomVersionId> {
    let known = versions::LOWEST..=versions::HIGHEST;
    known.filter_map(|version| RoomVersionId::try_from(version.to_string()).ok()).collect()
}

/// Asks a server for a template, and checks that it is one of the event that is wanted. Errors: [`Error::Refused`] with the
/// server's reason; [`Error::Remote`] for a template of anything else; 400 `M_INCOMPATIBLE_ROOM_VERSION`.
pub(crate) async fn ask(app: &App, server: &ServerName, wanted: &Wanted) -> Result<Template> {
    let (client, options) = (&app.remote.client, Options::default());
    let (room_id, user_id) = (wanted.room_id.clone(), wanted.user_id.clone());
    let (version, event) = match wanted.membership {
        Membership::Join => {
            let mut request = prepare_join_event::v1::Request::new(room_id, user_id);
            request.ver = known_versions();
            let answer = client.send(server, request, options).await.map_err(|it| failed(server, it))?;
            (answer.room_version, answer.event)
        }
        Membership::Knock => {
            let mut request = prepare_knock_event::v1::Request::new(room_id, user_id);
            request.ver = known_versions();
            let answer = client.send(server, request, options).await.map_err(|it| failed(server, it))?;
            (Some(answer.room_version), answer.event)
        }
        Membership::Leave => {
            let request = prepare_leave_event::v1::Request::new(room_id, user_id);
            let answer = client.send(server, request, options).await.map_err(|it| failed(server, it))?;
            (answer.room_version, answer.event)
        }
        Membership::Invite | Membership::Ban => {
            return Err(Error::broken("nobody gives a template for this membership"));
        }
    };
    // A server that names no version means the first one.
    let version = version.unwrap_or(RoomVersionId::V1);
    let number = versions::number(&version).ok_or_else(|| {
        let kind = ErrorKind::IncompatibleRoomVersion(IncompatibleRoomVersionErrorData::new(version.clone()));
        Refusal::new(kind, format!("The room has version {version}, which this server does not know."))
    })?;
    check_version(app, server, number, wanted)?;
    read(&event, number, wanted).map_err(|why| at_fault(server, why))
}

/// Holds the version that a server gives to what is known of the room, before anything is signed: once the room has the event, it is too
/// late to find out that the rest cannot be believed.
fn check_version(app: &App, server: &ServerName, version: u8, wanted: &Wanted) -> Result<()> {
    if !versions::may_have_id(version, &wanted.room_id) {
        let why = format!("its template is of room version {version}, whose rooms have no such id");
        return Err(at_fault(server, why));
    }
    if rooms::is_known_otherwise(&*app.store.snapshot(), &wanted.room_id, version)? {
        return Err(at_fault(server, "its template is of another version of the room than is known"));
    }
    Ok(())
}

#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow, rename = "type")]
    event_type: Cow<'a, str>,
    #[serde(borrow)]
    room_id: Cow<'a, str>,
    #[serde(borrow)]
    sender: Cow<'a, str>,
    #[serde(borrow)]
    state_key: Cow<'a, str>,
    #[serde(borrow)]
    content: &'a RawValue,
    #[serde(borrow)]
    prev_events: Vec<&'a RawValue>,
    #[serde(borrow)]
    auth_events: Vec<&'a RawValue>,
    depth: u64,
}

#[derive(Deserialize)]
struct Content {
    #[serde(default)]
    join_authorised_via_users_server: Option<OwnedUserId>,
}

/// Reads a template. Gives what is wrong with it where it is not one of the event that is wanted.
fn read(json: &RawValue, version: u8, wanted: &Wanted) -> Result<Template, String> {
    if json.get().len() > EVENT_BYTES_MAX {
        return Err("its template is larger than events may be".to_owned());
    }
    let told = |error: serde_json::Error| format!("its template is no member event: {error}");
    let fields: Fields<'_> = serde_json::from_str(json.get()).map_err(told)?;
    let content: Content = serde_json::from_str(fields.content.get()).map_err(told)?;
    let user = wanted.user_id.as_str();
    let wrong = [
        ("type", &*fields.event_type, MEMBER),
        ("room_id", &*fields.room_id, wanted.room_id.as_str()),
        ("sender", &*fields.sender, user),
        ("state_key", &*fields.state_key, user),
    ];
    if let Some((field, ..)) = wrong.iter().find(|(_, is, should)| is != should) {
        return Err(format!("its template is of another event than was asked for: `{field}` differs"));
    }
    if event::membership_of(fields.content.get()) != Some(wanted.membership) {
        return Err("its template is of another event than was asked for: `membership` differs".to_owned());
    }
    if fields.prev_events.len() > CITED_MAX || fields.auth_events.len() > CITED_MAX {
        return Err("its template cites more events than an event may".to_owned());
    }
    let mut hashes = Hashes::new();
    let mut cited = |events: Vec<&RawValue>| -> Option<Vec<OwnedEventId>> {
        events.into_iter().map(|event| reference::read_cited(event, version, &mut hashes)).collect()
    };
    let cited = cited(fields.prev_events).zip(cited(fields.auth_events));
    let Some((prev, auth)) = cited.filter(|(prev, _)| !prev.is_empty()) else {
        return Err("its template cites what is no event of the room's version".to_owned());
    };
    let is_restricted =
        versions::find_rules(version).is_some_and(|rules| rules.authorization.restricted_join_rule);
    let authorised_via = content
        .join_authorised_via_users_server
        .filter(|_| is_restricted && wanted.membership == Membership::Join);
    if authorised_via.as_ref().is_some_and(|by| by.server_name() == wanted.user_id.server_name()) {
        // Nobody of ours is in the room, and our signature would stand for one who is.
        return Err("its template has a user of this server vouch for the join".to_owned());
    }
    Ok(Template {
        version,
        prev,
        auth,
        hashes,
        depth: fields.depth.min(versions::depth_max(version)),
        authorised_via,
    })
}

impl Template {
    /// A place just after an event that was told of from outside the room, for an event of which nobody else hears.
    pub(crate) fn after(version: u8, event: &str) -> Option<Self> {
        #[derive(Deserialize)]
        struct Deep {
            depth: u64,
        }
        let id = Signed::find_id(version, event.as_bytes())?;
        let depth = serde_json::from_str::<Deep>(event).ok()?.depth;
        let depth = depth.saturating_add(1).min(versions::depth_max(version));
        let hash = reference::hash(event.as_bytes(), versions::find_rules(version)?)?;
        let hashes = Hashes::from([(id.clone(), Some(reference::encode(&hash)))]);
        Some(Self { version, prev: vec![id.clone()], auth: vec![id], hashes, depth, authorised_via: None })
    }

    /// The ids of the events on which the event stands.
    pub(crate) fn list_prev(&self) -> &[OwnedEventId] {
        &self.prev
    }

    /// The server that must sign the event beside us, because one of its users vouches for ours.
    pub(crate) fn cosigner(&self) -> Option<OwnedServerName> {
        self.authorised_via.as_ref().map(|user| user.server_name().to_owned())
    }

    /// Builds and signs the event. `server` is at fault where it does not get the form that events have.
    pub(crate) fn sign(&self, app: &App, server: &ServerName, wanted: &Wanted) -> Result<Received> {
        let mut content = wanted.content.clone();
        content.remove(AUTHORISED_VIA);
        if let Some(user) = &self.authorised_via {
            content.insert(AUTHORISED_VIA.to_owned(), user.as_str().into());
        }
        let now_ms = app.env.event_ms();
        // A user who comes back at once may be given the template of the first time. The time tells the two events apart, because an
        // event that the room has already would change nothing.
        let snapshot = app.store.snapshot();
        let room = rooms::find_room(&*snapshot, &wanted.room_id)?;
        for sent_ms in now_ms..now_ms + LATER_MAX_MS {
            let event = self.sign_at(app, server, wanted, (content.clone(), sent_ms))?;
            let known = room.map(|room| event::find_num(&*snapshot, room, event.id())).transpose()?;
            if known.flatten().is_none() {
                return Ok(event);
            }
        }
        Err(Error::Busy { retry_after: Duration::from_millis(LATER_MAX_MS) })
    }

    fn sign_at(
        &self,
        app: &App,
        server: &ServerName,
        wanted: &Wanted,
        (content, sent_ms): (CanonicalJsonObject, u64),
    ) -> Result<Received> {
        let user_id = &wanted.user_id;
        let draft = Draft::state(user_id.clone(), MEMBER, user_id.as_str(), content, sent_ms);
        let rules =
            versions::find_rules(self.version).ok_or_else(|| Error::broken("a version is unknown"))?;
        let setting = Setting {
            room_id: Some(&*wanted.room_id),
            rules,
            prev: &self.prev,
            auth: &self.auth,
            hashes: &self.hashes,
            depth: self.depth,
        };
        let built = build::build(app.rooms.signer(), &draft, &setting, self.version)?;
        let row = RoomRow::new(wanted.room_id.clone(), self.version, Resident::No);
        Received::check(RoomNum(0), &row, built.hash, built.json)
            .map_err(|why| at_fault(server, format!("its template makes no event: {}", why.message)))
    }
}
