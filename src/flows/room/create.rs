//! Creating a room: everything the request asks for, in one batch, so that nobody ever sees half a room.

use std::sync::Arc;

use ruma::{
    CanonicalJsonObject, CanonicalJsonValue, OwnedRoomAliasId, OwnedRoomId, OwnedUserId, RoomAliasId, RoomId,
    RoomVersionId,
    api::{
        client::room::{
            Visibility,
            create_room::v3::{Request, RoomPreset},
        },
        error::ErrorKind,
    },
    room_version_rules::RoomVersionRules,
};
use serde::Deserialize;
use serde_json::json;

use crate::{
    accounts::{Caller, account_data},
    error::{Error, Refusal, Result},
    flows::{App, account::carry_over, commit, follow_up, room::membership},
    ids::RoomNum,
    rooms::{
        aliases,
        build::{self, Draft, Setting, Signer},
        change::Change,
        directory,
        turns::Seat,
        versions,
    },
    store::{Domain, NotAccepted},
};

/// Creates a room. Errors: 400 `M_UNSUPPORTED_ROOM_VERSION`, `M_ROOM_IN_USE`, `M_INVALID_ROOM_STATE`; 413 `M_TOO_LARGE`.
pub(crate) async fn create(app: &App, caller: &Caller, request: Request) -> Result<OwnedRoomId> {
    let plan = Plan::of(app, caller, request)?;
    let num = app.rooms.next_num(&app.store.view())?;
    let plan = Arc::new(plan);
    let (inner, beginning, creator) = (app.clone(), Arc::clone(&plan), caller.user);
    let begin = move |app: &App, seat| beginning.begin(app, seat, num);
    let work = move |change: &mut Change| {
        plan.fill(&inner, change)?;
        let promised = carry_over::promise(&inner, change, creator)?;
        Ok((change.row.id.clone(), promised))
    };
    // The alias and the directory are the server's.
    let created = commit::in_turn(app, num, Domain::Server, begin, work, or_in_use).await;
    let (room_id, promised) = created?;
    if let Some(promised) = promised {
        follow_up::keep(app, promised).await?;
    }
    Ok(room_id)
}

fn or_in_use(why: NotAccepted) -> Error {
    match why {
        NotAccepted::Conflict(conflict) if aliases::is_taken(&conflict) => in_use().into(),
        other => other.into(),
    }
}

fn in_use() -> Refusal {
    Refusal::new(ErrorKind::RoomInUse, "The alias is taken.")
}

/// A piece of state that the client wants in the room.
#[derive(Debug, Deserialize)]
struct InitialState {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    state_key: String,
    content: CanonicalJsonObject,
}

/// A request that has been checked as far as it can be without the room.
struct Plan {
    creator: OwnedUserId,
    version: u8,
    rules: &'static RoomVersionRules,
    preset: RoomPreset,
    alias: Option<OwnedRoomAliasId>,
    /// The content of the create event.
    create: CanonicalJsonObject,
    power_levels: CanonicalJsonObject,
    initial_state: Vec<InitialState>,
    name: Option<String>,
    topic: Option<String>,
    invite: Vec<OwnedUserId>,
    is_direct: bool,
    is_published: bool,
    sent_ms: u64,
}

impl Plan {
    fn of(app: &App, caller: &Caller, request: Request) -> Result<Self> {
        let wanted = request.room_version.unwrap_or_else(|| app.config.rooms.default_version.clone());
        let unsupported = || {
            let message = format!("This server does not speak room version {wanted}.");
            Error::from(Refusal::new(ErrorKind::UnsupportedRoomVersion, message))
        };
        let version = versions::number(&wanted).ok_or_else(unsupported)?;
        let rules = versions::find_rules(version).ok_or_else(unsupported)?;
        if !request.invite_3pid.is_empty() {
            let message = "This server cannot invite by e-mail address or telephone number.";
            return Err(Refusal::new(ErrorKind::ThreepidDenied, message).into());
        }
        let snapshot = app.store.snapshot();
        for user in &request.invite {
            commit::require_reachable(&*snapshot, app.rooms.signer().server(), user)?;
        }
        let is_published = request.visibility == Visibility::Public;
        let preset = request.preset.unwrap_or(match request.visibility {
            Visibility::Public => RoomPreset::PublicChat,
            _ => RoomPreset::PrivateChat,
        });
        if !matches!(
            preset,
            RoomPreset::PrivateChat | RoomPreset::PublicChat | RoomPreset::TrustedPrivateChat
        ) {
            return Err(Refusal::invalid_param("There is no such preset.").into());
        }
        let alias = request.room_alias_name.map(|name| alias(app, &name)).transpose()?;
        let mut invite = request.invite;
        invite.sort();
        invite.dedup();
        invite.retain(|user| *user != caller.user_id);

        let mut plan = Self {
            creator: caller.user_id.clone(),
            version,
            rules,
            preset,
            alias,
            create: CanonicalJsonObject::new(),
            power_levels: CanonicalJsonObject::new(),
            initial_state: Vec::with_capacity(request.initial_state.len()),
            name: request.name,
            topic: request.topic,
            invite,
            is_direct: request.is_direct,
            is_published,
            sent_ms: app.env.event_ms(),
        };
        let creation = request.creation_content.map(|content| object(content.json().get())).transpose()?;
        plan.create = plan.create_content(app, creation.unwrap_or_default(), &wanted)?;
        let levels =
            request.power_level_content_override.map(|content| object(content.json().get())).transpose()?;
        plan.power_levels = plan.power_levels_content(levels.unwrap_or_default())?;
        for state in request.initial_state {
            let state: InitialState = serde_json::from_str(state.json().get()).map_err(|error| {
                Refusal::bad_json(format!("A state event of `initial_state` is not one: {error}."))
            })?;
            plan.initial_state.push(state);
        }
        Ok(plan)
    }

    fn is_trusted(&self) -> bool {
        self.preset == RoomPreset::TrustedPrivateChat
    }

    fn has_privileged_creators(&self) -> bool {
        self.rules.authorization.explicitly_privilege_room_creators
    }

    fn create_content(
        &self,
        app: &App,
        mut content: CanonicalJsonObject,
        version: &RoomVersionId,
    ) -> Result<CanonicalJsonObject> {
        content.insert("room_version".to_owned(), version.as_str().into());
        content.remove("creator");
        if !self.rules.authorization.use_room_create_sender {
            content.insert("creator".to_owned(), self.creator.as_str().into());
        }
        if self.rules.authorization.additional_room_creators && self.is_trusted() && !self.invite.is_empty() {
            let named = content.entry("additional_creators".to_owned());
            let named = named.or_insert_with(|| CanonicalJsonValue::Array(Vec::new()));
            let CanonicalJsonValue::Array(named) = named else {
                return Err(Refusal::bad_json("`additional_creators` is not a list.").into());
            };
            for user in &self.invite {
                if !named.iter().any(|name| name.as_str() == Some(user.as_str())) {
                    named.push(user.as_str().into());
                }
            }
        }
        if self.rules.authorization.room_create_event_id_as_room_id {
            // The room's id is the hash of this event. Two rooms that one user makes in one millisecond with the
            // same content must not be one (docs/decisions/unique-create-events.md).
            content.insert(NONCE.to_owned(), app.env.random_string(16).into());
        }
        Ok(content)
    }

    fn power_levels_content(&self, levels: CanonicalJsonObject) -> Result<CanonicalJsonObject> {
        let tombstone = if self.has_privileged_creators() { 150 } else { 100 };
        let invite = if self.preset == RoomPreset::PublicChat { 50 } else { 0 };
        let mut users = serde_json::Map::new();
        if !self.has_privileged_creators() {
            users.insert(self.creator.to_string(), 100.into());
            if self.is_trusted() {
                users.extend(self.invite.iter().map(|user| (user.to_string(), 100.into())));
            }
        }
        let content = json!({
            "ban": 50, "kick": 50, "redact": 50, "invite": invite,
            "events_default": 0, "state_default": 50, "users_default": 0,
            "historical": 100,
            "events": {
                "m.room.avatar": 50, "m.room.canonical_alias": 50, "m.room.name": 50,
                "m.room.encryption": 100, "m.room.history_visibility": 100, "m.room.power_levels": 100,
                "m.room.server_acl": 100, "m.room.tombstone": tombstone,
            },
            "users": users,
        });
        let mut content = object(&content.to_string())?;
        content.extend(levels);
        Ok(content)
    }

    /// The room with its create event.
    fn begin(&self, app: &App, seat: Seat, num: RoomNum) -> Result<Change> {
        let signer = app.rooms.signer();
        let draft = self.draft("m.room.create", "", self.create.clone());
        let id = self.room_id(app, signer, &draft)?;
        let mut change = Change::begin_room(&app.store, seat, num, id, self.version)?;
        change.add(signer, &draft, None).map_err(invalid_state)?;
        Ok(change)
    }

    fn room_id(&self, app: &App, signer: &Signer, create: &Draft) -> Result<OwnedRoomId> {
        let id = if self.rules.authorization.room_create_event_id_as_room_id {
            let setting = Setting { room_id: None, rules: self.rules, prev: &[], auth: &[], depth: 1 };
            let built = build::build(signer, create, &setting, self.version)?;
            built.event.id.as_str().replacen('$', "!", 1)
        } else {
            format!("!{}:{}", app.env.random_string(18), signer.server())
        };
        RoomId::parse(id).map_err(|_| Error::broken("a new room has no valid id"))
    }

    fn draft(&self, kind: &str, state_key: &str, content: CanonicalJsonObject) -> Draft {
        Draft::state(self.creator.clone(), kind, state_key, content, self.sent_ms)
    }

    /// Everything after the create event, in the order that the specification names.
    fn fill(&self, app: &App, change: &mut Change) -> Result<()> {
        let signer = app.rooms.signer();
        let add = |change: &mut Change, kind: &str, state_key: &str, content: CanonicalJsonObject| {
            change.add(signer, &self.draft(kind, state_key, content), None).map_err(invalid_state)
        };
        let creator = self.creator.as_str();
        let joined = membership::content(&change.batch, &self.creator, "join", None)?;
        add(change, "m.room.member", creator, joined)?;
        add(change, "m.room.power_levels", "", self.power_levels.clone())?;
        if let Some(alias) = &self.alias {
            if aliases::find(&change.batch, alias)?.is_some() {
                return Err(in_use().into());
            }
            aliases::add(&mut change.batch, alias, change.num, &self.creator);
            add(change, "m.room.canonical_alias", "", object(&json!({ "alias": alias }).to_string())?)?;
        }
        let (join_rule, guest_access) = if self.preset == RoomPreset::PublicChat {
            ("public", "forbidden")
        } else {
            ("invite", "can_join")
        };
        for (kind, content) in [
            ("m.room.join_rules", json!({ "join_rule": join_rule })),
            ("m.room.history_visibility", json!({ "history_visibility": "shared" })),
            ("m.room.guest_access", json!({ "guest_access": guest_access })),
        ] {
            // What the client sets itself need not be set twice.
            if !self.initial_state.iter().any(|state| state.kind == kind && state.state_key.is_empty()) {
                add(change, kind, "", object(&content.to_string())?)?;
            }
        }
        for state in &self.initial_state {
            let overridden = state.state_key.is_empty()
                && (state.kind == "m.room.name" && self.name.is_some()
                    || state.kind == "m.room.topic" && self.topic.is_some());
            if state.kind == "m.room.create" {
                return Err(Refusal::new(ErrorKind::InvalidRoomState, "A room has one create event.").into());
            }
            if !overridden {
                add(change, &state.kind, &state.state_key, state.content.clone())?;
            }
        }
        if let Some(name) = &self.name {
            add(change, "m.room.name", "", object(&json!({ "name": name }).to_string())?)?;
        }
        if let Some(topic) = &self.topic {
            let content = json!({
                "topic": topic, "m.topic": { "m.text": [{ "body": topic, "mimetype": "text/plain" }] },
            });
            add(change, "m.room.topic", "", object(&content.to_string())?)?;
        }
        for user in &self.invite {
            account_data::check_invite(&change.batch, user)?;
            let mut content = membership::content(&change.batch, user, "invite", None)?;
            if self.is_direct {
                content.insert("is_direct".to_owned(), true.into());
            }
            add(change, "m.room.member", user.as_str(), content)?;
        }
        if self.is_published {
            directory::publish(&mut change.batch, change.num, true);
        }
        Ok(())
    }
}

/// The key in a create event's content that tells it from all others.
const NONCE: &str = "org.aqueduct.nonce";

/// What the rules of a room forbid is, while it is created, a fault of the request: 400 `M_INVALID_ROOM_STATE`.
fn invalid_state(error: Error) -> Error {
    match error {
        Error::Refused(refusal) if refusal.kind == ErrorKind::Forbidden => {
            Refusal::new(ErrorKind::InvalidRoomState, refusal.message).into()
        }
        other => other,
    }
}

fn alias(app: &App, name: &str) -> Result<OwnedRoomAliasId> {
    let odd = || Error::from(Refusal::invalid_param("This cannot be the name of an alias."));
    if name.is_empty() || name.contains(':') || name.contains(char::is_whitespace) || name.contains('\0') {
        return Err(odd());
    }
    RoomAliasId::parse(format!("#{name}:{}", app.rooms.signer().server())).map_err(|_| odd())
}

fn object(json: &str) -> Result<CanonicalJsonObject, Refusal> {
    serde_json::from_str(json)
        .map_err(|error| Refusal::bad_json(format!("This is not the content of an event: {error}.")))
}
