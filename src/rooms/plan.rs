//! The plan of a new room: the events that a request to create a room asks for, in the order that the specification
//! names (client-server API, "POST /createRoom").

use ruma::{
    CanonicalJsonObject, CanonicalJsonValue, Int, OwnedRoomAliasId, OwnedRoomId, OwnedUserId, RoomAliasId,
    RoomId, RoomVersionId, ServerName,
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
    config::EncryptNew,
    env::Env,
    error::{Error, Refusal, Result},
    rooms::{
        aliases,
        build::{self, Draft, Setting, Signer},
        membership,
        policy::{self, Author},
        reference,
        spaces::SPACE,
        versions,
    },
    schema::event_types::{
        AVATAR, CANONICAL_ALIAS, CREATE, ENCRYPTION, GUEST_ACCESS, HISTORY_VISIBILITY, JOIN_RULES, MEMBER,
        NAME, POWER_LEVELS, SERVER_ACL, TOMBSTONE, TOPIC,
    },
    store::{Fault, Read},
};

/// A request sets at most this many events of `initial_state`; a client that sets up a room needs some dozens.
pub const INITIAL_STATE_MAX: usize = 1_000;
/// The join rule of rooms that everybody may enter.
const PUBLIC: &str = "public";
/// The algorithm of rooms that the server has encrypted.
const ALGORITHM: &str = "m.megolm.v1.aes-sha2";
/// The key in a create event's content that makes it different from all others.
const NONCE: &str = "org.aqueduct.nonce";

/// A piece of state that the client wants in the room.
#[derive(Debug, Deserialize)]
struct InitialState {
    #[serde(rename = "type")]
    event_type: String,
    #[serde(default)]
    state_key: String,
    content: CanonicalJsonObject,
}

/// Those things about a new room that its request does not decide.
#[derive(Debug)]
pub struct Given<'a> {
    /// The name of this server.
    pub server: &'a ServerName,
    /// The version of a room whose request names none.
    pub default_version: &'a RoomVersionId,
    /// The rooms that the server has encrypted by itself.
    pub encrypt_new: EncryptNew,
    /// The request may ask for at most this many pieces of state.
    pub state_max: usize,
    /// The id that [`choose_room_id`] gave the room before, where its version lets servers choose.
    pub id: Option<OwnedRoomId>,
}

/// A request that has been checked as far as is possible without the room.
#[derive(Debug)]
pub struct Plan {
    creator: Author,
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
    /// The server has the room encrypted, unless the request says how it is to be.
    encrypts: bool,
    /// The id that was chosen for the room before, where its version lets servers choose.
    id: Option<OwnedRoomId>,
    sent_ms: u64,
}

impl Plan {
    /// Makes the plan for a request. Errors: 400 `M_UNSUPPORTED_ROOM_VERSION`, `M_BAD_JSON`, `M_INVALID_PARAM`; 413 for
    /// too much initial state.
    pub fn of(env: &Env, given: Given<'_>, creator: Author, request: Request) -> Result<Self> {
        let Given { server, default_version, encrypt_new, state_max, id } = given;
        let wanted = request.room_version.as_ref().unwrap_or(default_version).clone();
        let (version, rules) = versions::require(&wanted)?;
        if !request.invite_3pid.is_empty() {
            let message = "This server cannot invite by e-mail address or telephone number.";
            return Err(Refusal::new(ErrorKind::ThreepidDenied, message).into());
        }
        let mut invite = request.invite;
        invite.sort();
        invite.dedup();
        invite.retain(|user| *user != creator.user_id);
        let alias = request.room_alias_name.map(|name| aliases::named_here(&name, server)).transpose()?;
        let creator = Author { names: alias.clone().into_iter().collect(), ..creator };
        let mut plan = Self {
            creator,
            version,
            rules,
            preset: preset(request.preset, &request.visibility)?,
            alias,
            create: CanonicalJsonObject::new(),
            power_levels: CanonicalJsonObject::new(),
            initial_state: Vec::with_capacity(request.initial_state.len().min(state_max)),
            name: request.name,
            topic: request.topic,
            invite,
            is_direct: request.is_direct,
            is_published: is_published(&request.visibility)?,
            encrypts: false,
            id,
            sent_ms: env.event_ms(),
        };
        let creation = request.creation_content.map(|content| object(content.json().get())).transpose()?;
        plan.create = plan.create_content(env, creation.unwrap_or_default(), &wanted)?;
        let levels =
            request.power_level_content_override.map(|content| object(content.json().get())).transpose()?;
        plan.power_levels = plan.power_levels_content(levels.unwrap_or_default())?;
        if request.initial_state.len() > state_max {
            let why = format!("`initial_state` has at most {state_max} events.");
            return Err(Refusal::too_large(why).into());
        }
        for state in request.initial_state {
            plan.initial_state.push(initial_state(state.json().get())?);
        }
        // A space has no messages, and clients that do not encrypt could not add rooms to it.
        let is_space = plan.create.get("type").and_then(CanonicalJsonValue::as_str) == Some(SPACE);
        plan.encrypts = !is_space
            && match encrypt_new {
                EncryptNew::Off => false,
                EncryptNew::Invite => plan.join_rule() != PUBLIC,
                EncryptNew::All => true,
            };
        Ok(plan)
    }

    /// Refuses the plan if it invites somebody who cannot be invited: 403 or 404.
    pub fn require_reachable(&self, read: &(impl Read + ?Sized), server: &ServerName) -> Result<()> {
        self.invite.iter().try_for_each(|user| policy::require_reachable(read, server, user))
    }

    /// Counts the memberships that the plan makes beside the creator's, wherever the request asks for them.
    pub fn count_memberships(&self) -> usize {
        let is_member = |state: &&InitialState| state.event_type == MEMBER;
        self.invite.len() + self.initial_state.iter().filter(is_member).count()
    }

    /// Counts the events that the request itself brings, which cost as much as if they were sent one by one.
    pub fn count_initial_state(&self) -> usize {
        self.initial_state.len()
    }

    /// The user who creates the room.
    pub fn creator(&self) -> &Author {
        &self.creator
    }

    /// The number of the room's version.
    pub fn version(&self) -> u8 {
        self.version
    }

    /// The alias that the room gets, if the request asks for one.
    pub fn alias(&self) -> Option<&RoomAliasId> {
        self.alias.as_deref()
    }

    /// Whether the room stands in the public directory from the beginning.
    pub fn is_published(&self) -> bool {
        self.is_published
    }

    /// The join rule that the room will have. What the request sets holds, whatever the preset is.
    fn join_rule(&self) -> &str {
        let is_rule = |state: &&InitialState| state.event_type == JOIN_RULES && state.state_key.is_empty();
        match self.initial_state.iter().rev().find(is_rule) {
            Some(state) => {
                state.content.get("join_rule").and_then(CanonicalJsonValue::as_str).unwrap_or_default()
            }
            None => self.preset_join_rule(),
        }
    }

    fn preset_join_rule(&self) -> &'static str {
        if self.preset == RoomPreset::PublicChat { PUBLIC } else { "invite" }
    }

    fn is_trusted(&self) -> bool {
        self.preset == RoomPreset::TrustedPrivateChat
    }

    fn has_privileged_creators(&self) -> bool {
        self.rules.authorization.explicitly_privilege_room_creators
    }

    fn create_content(
        &self,
        env: &Env,
        mut content: CanonicalJsonObject,
        version: &RoomVersionId,
    ) -> Result<CanonicalJsonObject> {
        content.insert("room_version".to_owned(), version.as_str().into());
        content.remove("creator");
        if !self.rules.authorization.use_room_create_sender {
            content.insert("creator".to_owned(), self.creator.user_id.as_str().into());
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
            // The room's id is the hash of this event. Two rooms that one user makes in one millisecond with the same
            // content must not get the same id (docs/decisions/unique-create-events.md).
            content.insert(NONCE.to_owned(), env.random_string(16).into());
        }
        Ok(content)
    }

    fn power_levels_content(&self, levels: CanonicalJsonObject) -> Result<CanonicalJsonObject> {
        let tombstone = if self.has_privileged_creators() { 150 } else { 100 };
        let invite = if self.preset == RoomPreset::PublicChat { 50 } else { 0 };
        let mut users = serde_json::Map::new();
        if !self.has_privileged_creators() {
            users.insert(self.creator.user_id.to_string(), 100.into());
            if self.is_trusted() {
                users.extend(self.invite.iter().map(|user| (user.to_string(), 100.into())));
            }
        }
        let content = json!({
            "ban": 50, "kick": 50, "redact": 50, "invite": invite,
            "events_default": 0, "state_default": 50, "users_default": 0,
            "historical": 100,
            "events": {
                AVATAR: 50, CANONICAL_ALIAS: 50, NAME: 50,
                ENCRYPTION: 100, HISTORY_VISIBILITY: 100, POWER_LEVELS: 100,
                SERVER_ACL: 100, TOMBSTONE: tombstone,
            },
            "users": users,
        });
        let mut content = object(&content.to_string())?;
        let names_tombstone = matches!(
            levels.get("events"),
            Some(CanonicalJsonValue::Object(events)) if events.contains_key(TOMBSTONE)
        );
        content.extend(levels);
        // A level that the request itself names stays as it is.
        if self.has_privileged_creators() && !names_tombstone {
            raise_tombstone(&mut content);
        }
        Ok(content)
    }

    /// Drafts the create event, with which the room begins.
    pub fn create_draft(&self) -> Draft {
        self.draft(CREATE, "", self.create.clone())
    }

    /// Gives the id of the room that begins with the create event `create`.
    pub fn room_id(&self, env: &Env, signer: &Signer, create: &Draft) -> Result<OwnedRoomId> {
        if self.rules.authorization.room_create_event_id_as_room_id {
            let setting = Setting {
                room_id: None,
                rules: self.rules,
                prev: &[],
                auth: &[],
                hashes: reference::NO_HASHES,
                depth: 1,
            };
            let built = build::build(signer, create, &setting, self.version)?;
            return valid(built.event.id.as_str().replacen('$', "!", 1));
        }
        match &self.id {
            Some(id) => Ok(id.clone()),
            None => choose_room_id(env, signer.server()),
        }
    }

    fn draft(&self, event_type: &str, state_key: &str, content: CanonicalJsonObject) -> Draft {
        Draft::state(self.creator.user_id.clone(), event_type, state_key, content, self.sent_ms)
    }

    /// Drafts all events after the create event, in order. `read` has the profiles that member events show.
    pub fn list_drafts(&self, read: &(impl Read + ?Sized)) -> Result<Vec<Draft>> {
        let creator = &self.creator.user_id;
        let mut drafts = vec![
            self.draft(MEMBER, creator.as_str(), membership::content(read, creator, "join", None)?),
            self.draft(POWER_LEVELS, "", self.power_levels.clone()),
        ];
        if let Some(alias) = &self.alias {
            let content = object(&json!({ "alias": alias }).to_string())?;
            drafts.push(self.draft(CANONICAL_ALIAS, "", content));
        }
        drafts.extend(self.list_preset()?);
        drafts.extend(self.list_initial_state()?);
        if let Some(name) = &self.name {
            drafts.push(self.draft(NAME, "", object(&json!({ "name": name }).to_string())?));
        }
        if let Some(topic) = &self.topic {
            let content = json!({
                "topic": topic, "m.topic": { "m.text": [{ "body": topic, "mimetype": "text/plain" }] },
            });
            drafts.push(self.draft(TOPIC, "", object(&content.to_string())?));
        }
        let is_ours = |user: &&OwnedUserId| user.server_name() == self.creator.user_id.server_name();
        for user in self.invite.iter().filter(is_ours) {
            drafts.push(self.draft(MEMBER, user.as_str(), self.invitation(read, user)?));
        }
        Ok(drafts)
    }

    /// Lists the users of other servers whom the plan invites. Their servers are told once the room is there.
    pub fn list_invited_elsewhere(
        &self,
        read: &(impl Read + ?Sized),
    ) -> Result<Vec<(OwnedUserId, CanonicalJsonObject)>, Fault> {
        let is_elsewhere = |user: &&OwnedUserId| user.server_name() != self.creator.user_id.server_name();
        let invited = self.invite.iter().filter(is_elsewhere);
        invited.map(|user| Ok((user.clone(), self.invitation(read, user)?))).collect()
    }

    /// Drafts the state that the preset and the settings of the server ask for, except for keys that the client sets itself.
    fn list_preset(&self) -> Result<Vec<Draft>> {
        let is_public = self.preset == RoomPreset::PublicChat;
        let mut contents = vec![
            (JOIN_RULES, json!({ "join_rule": self.preset_join_rule() })),
            (HISTORY_VISIBILITY, json!({ "history_visibility": "shared" })),
        ];
        // A room that says nothing of guests is closed to them, as the preset of public rooms wants it.
        if !is_public {
            contents.push((GUEST_ACCESS, json!({ "guest_access": "can_join" })));
        }
        if self.encrypts {
            contents.push((ENCRYPTION, json!({ "algorithm": ALGORITHM })));
        }
        let mut drafts = Vec::new();
        for (event_type, content) in contents {
            let is_set = |state: &InitialState| {
                state.event_type == event_type
                    && state.state_key.is_empty()
                    && !self.is_without_algorithm(state)
            };
            if !self.initial_state.iter().any(is_set) {
                drafts.push(self.draft(event_type, "", object(&content.to_string())?));
            }
        }
        Ok(drafts)
    }

    /// Whether this is an event of encryption by which nothing is encrypted, in a room that the server has encrypted.
    fn is_without_algorithm(&self, state: &InitialState) -> bool {
        let algorithm = state.content.get("algorithm").and_then(CanonicalJsonValue::as_str);
        self.encrypts && state.event_type == ENCRYPTION && algorithm.is_none_or(str::is_empty)
    }

    /// Drafts the state that the client asks for, except for a name and a topic, which have fields of their own, and for encryption
    /// without an algorithm, in whose place the server's stands.
    fn list_initial_state(&self) -> Result<Vec<Draft>> {
        let mut drafts = Vec::new();
        for state in &self.initial_state {
            let is_overridden = state.state_key.is_empty()
                && (state.event_type == NAME && self.name.is_some()
                    || state.event_type == TOPIC && self.topic.is_some()
                    || self.is_without_algorithm(state));
            if state.event_type == CREATE {
                return Err(Refusal::new(
                    ErrorKind::InvalidRoomState,
                    "`initial_state` cannot contain `m.room.create`; use `creation_content`.",
                )
                .into());
            }
            if !is_overridden {
                drafts.push(self.draft(&state.event_type, &state.state_key, state.content.clone()));
            }
        }
        Ok(drafts)
    }

    fn invitation(
        &self,
        read: &(impl Read + ?Sized),
        user: &OwnedUserId,
    ) -> Result<CanonicalJsonObject, Fault> {
        let mut content = membership::content(read, user, "invite", None)?;
        if self.is_direct {
            content.insert("is_direct".to_owned(), true.into());
        }
        Ok(content)
    }
}

/// Chooses the id of a new room, for versions in which servers do.
pub fn choose_room_id(env: &Env, server: &ServerName) -> Result<OwnedRoomId> {
    valid(format!("!{}:{server}", env.random_string(18)))
}

fn valid(id: String) -> Result<OwnedRoomId> {
    RoomId::parse(id).map_err(|_| Error::broken("a new room has no valid id"))
}

fn is_published(visibility: &Visibility) -> Result<bool, Refusal> {
    match visibility {
        Visibility::Public => Ok(true),
        Visibility::Private => Ok(false),
        _ => Err(Refusal::invalid_param("`visibility` must be `public` or `private`.")),
    }
}

fn preset(wanted: Option<RoomPreset>, visibility: &Visibility) -> Result<RoomPreset, Refusal> {
    let preset = wanted.unwrap_or(match visibility {
        Visibility::Public => RoomPreset::PublicChat,
        _ => RoomPreset::PrivateChat,
    });
    match preset {
        RoomPreset::PrivateChat | RoomPreset::PublicChat | RoomPreset::TrustedPrivateChat => Ok(preset),
        _ => Err(Refusal::invalid_param("`preset` is not one of the presets that the specification names.")),
    }
}

fn initial_state(json: &str) -> Result<InitialState, Refusal> {
    serde_json::from_str(json).map_err(|error| {
        Refusal::bad_json(format!("`initial_state` contains something that is not a state event: {error}."))
    })
}

fn object(json: &str) -> Result<CanonicalJsonObject, Refusal> {
    serde_json::from_str(json).map_err(|error| {
        Refusal::bad_json(format!(
            "`creation_content` or `power_level_content_override` cannot be used: {error}."
        ))
    })
}

/// Keeps the level for tombstones above that for all other state, which the specification demands where creators have a level
/// of their own: other levels that the request brings may have exceeded it or taken it out.
fn raise_tombstone(content: &mut CanonicalJsonObject) {
    let default = match content.get("state_default") {
        Some(CanonicalJsonValue::Integer(level)) => i64::from(*level),
        // A level that is no integer is refused later.
        _ => 50,
    };
    let Some(CanonicalJsonValue::Object(events)) = content.get_mut("events") else { return };
    let is_higher = |level: &CanonicalJsonValue| matches!(level, CanonicalJsonValue::Integer(level) if i64::from(*level) > default);
    if events.get(TOMBSTONE).is_some_and(is_higher) {
        return;
    }
    if let Ok(level) = Int::try_from(default.saturating_add(50).max(150)) {
        events.insert(TOMBSTONE.to_owned(), CanonicalJsonValue::Integer(level));
    }
}
