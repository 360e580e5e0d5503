//! Replaces a room by a new one of another version (client-server API, "Room Upgrades").
//!
//! The new room is made first. Then one change to the old room sets its tombstone and moves what names it: so the room is never
//! replaced by one that is not there. Should the work end in between, because the client goes away or the process ends, then a job that the
//! new room was made with has its maker leave it.
//!
//! The new room names the event that ends the old one. So the tombstone is built before everything else and held until the new room is
//! there, except where the new room's id is not known before it is made, and the tombstone alone links the two (room version 12).
//!
//! One replaces a room at a time, and whoever asks once more is given the room that was made first (`upgrade/before.rs`).

mod before;
mod carried;

use std::{collections::BTreeSet, time::Duration};

use ruma::{
    CanonicalJsonObject, CanonicalJsonValue, Int, OwnedEventId, OwnedRoomId, OwnedUserId, RoomId,
    RoomVersionId, UserId, api::client::room::create_room::v3::Request,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    accounts::Caller,
    error::{Error, Refusal, Result},
    flows::{
        App,
        account::carry_over,
        commit, jobs, own_events,
        room::{
            create, membership, names, presence, send,
            upgrade::{
                before::Wanted,
                carried::{Carried, raw, state_event},
            },
        },
    },
    ids::{RoomNum, UserNum},
    rooms::{
        self, aliases,
        build::Draft,
        change::{Change, countersigned::Countersigned},
        members, plan,
        policy::{self, Author},
        power::Power,
        versions,
        view::RoomView,
    },
    schema::event_types::{
        AVATAR, CANONICAL_ALIAS, CREATE, ENCRYPTION, GUEST_ACCESS, HISTORY_VISIBILITY, JOIN_RULES, NAME,
        POWER_LEVELS, SERVER_ACL, TOMBSTONE, TOPIC,
    },
    store::timer::{self, Timer},
};

/// The state that goes over to the new room, beside the power levels, and its content where the old room has none of it and
/// means something by that.
const CARRIED: [(&str, Option<(&str, &str)>); 8] = [
    (JOIN_RULES, Some(("join_rule", "invite"))),
    (HISTORY_VISIBILITY, Some(("history_visibility", "shared"))),
    (GUEST_ACCESS, Some(("guest_access", "forbidden"))),
    (SERVER_ACL, None),
    (ENCRYPTION, None),
    (NAME, None),
    (TOPIC, None),
    (AVATAR, None),
];
/// A piece of state that goes over has a content of at most this many bytes.
const CONTENT_BYTES_MAX: usize = 60 << 10;
/// The new room begins with at most this many pieces of state that the old one had.
const STATE_MAX: usize = carried::EVENTS_MAX + 100;
/// The fields of power levels that hold a level.
const LEVELS: [&str; 7] =
    ["ban", "events_default", "invite", "kick", "redact", "state_default", "users_default"];
/// The fields of power levels that hold levels by name.
const NAMED_LEVELS: [&str; 3] = ["events", "notifications", "users"];
/// The level for state of which nothing is said, and for members who may ask others in to a room that was replaced.
const MODERATOR: i64 = 50;
/// The level of who stood above all levels, in a room where nobody does.
const ADMIN: i64 = 100;

/// A request to replace a room waits at most this long for another one.
const WAITS_MAX: Duration = Duration::from_secs(30);
/// Who waited for as long may try again after this time.
const AGAIN: Duration = Duration::from_secs(5);

/// The end of a room, before it is replaced.
struct End {
    /// The id that the new room will have.
    replaced_by: OwnedRoomId,
    /// The tombstone, which is not part of the room yet.
    event: Countersigned,
}

/// The outcome of replacing a room.
enum Replaced {
    /// The new room replaces it. This is what follows for certain, and the canonical alias that the old room had, if it moves.
    Now { promised: [Option<Timer>; 2], canonical: Option<CanonicalJsonObject> },
    /// Another room was quicker.
    Before(OwnedRoomId),
}

/// Replaces a room by a new one, and gives the id of that; of the one that replaces it already, if that is what is asked for. Errors: 403
/// `M_FORBIDDEN` for a caller who may not set the room's tombstone; 400 `M_UNSUPPORTED_ROOM_VERSION`; 400 `M_INVALID_PARAM` where the room
/// was replaced otherwise; [`Error::Busy`] where somebody else is replacing it for long; those of making a room.
pub(crate) async fn upgrade(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    version: RoomVersionId,
    additional_creators: Vec<OwnedUserId>,
) -> Result<OwnedRoomId> {
    let num = commit::require_num(app, room)?;
    let wanted = Wanted::of(&version, &additional_creators)?;
    let turns = app.rooms.turns(num);
    let _alone = tokio::select! {
        biased;
        alone = turns.replacing.lock() => alone,
        () = app.env.sleep(WAITS_MAX) => return Err(Error::Busy { retry_after: AGAIN }),
    };
    let (owned, author, asked) = (app.clone(), Author::from(caller), wanted.clone());
    if let Some(first) = app.env.blocking(move || find_first(&owned, &author, num, &asked)).await? {
        return Ok(first);
    }
    let is_id_hashed = versions::require(&version)?.1.authorization.room_create_event_id_as_room_id;
    let end = if is_id_hashed { None } else { Some(End::build(app, caller, num).await?) };
    let (owned, by, ended_by) =
        (app.clone(), caller.clone(), end.as_ref().map(|end| end.event.id().to_owned()));
    let read = move || read_request(&owned, &by, num, version, &additional_creators, ended_by);
    let request = app.env.blocking(read).await?;
    let (id, tombstone) = end.map(|end| (end.replaced_by, end.event)).unzip();
    let made = create::replacement(app, caller, request, (id, STATE_MAX)).await?;
    let new = made.room_id;
    match replace(app, caller, num, &new, (wanted, tombstone, made.abandoned)).await {
        Ok(Replaced::Now { promised, canonical }) => {
            for promised in promised {
                if let Err(error) = jobs::keep(app, promised).await {
                    tracing::info!(room = %num, %new, %error, "what follows from a replacement is done later");
                }
            }
            if let Some(canonical) = canonical {
                call(app, caller, &new, &canonical).await?;
            }
            Ok(new)
        }
        Ok(Replaced::Before(first)) => {
            abandon(app, caller.user, made.num).await?;
            Ok(first)
        }
        Err(why) => {
            abandon(app, caller.user, made.num).await?;
            Err(why)
        }
    }
}

/// Finds the room that replaces this one already, for a user who may replace it. Errors: as for [`before::find`]; 403 `M_FORBIDDEN`.
fn find_first(app: &App, author: &Author, num: RoomNum, wanted: &Wanted) -> Result<Option<OwnedRoomId>> {
    let snapshot = app.store.snapshot();
    let row = rooms::require_row(&*snapshot, num)?;
    if !members::is_joined(&*snapshot, author.user, num)? {
        return Err(commit::not_in_room().into());
    }
    let old = RoomView { read: &*snapshot, num, row: &row };
    require_may(&Power::read(old)?, &author.user_id)?;
    let Some(tombstone) = rooms::find_state(&*snapshot, num, TOMBSTONE, "")? else { return Ok(None) };
    let sender = tombstone.row.sender();
    before::find(old, author, wanted, (&sender, tombstone.row.content()))
}

/// Has a user leave a room that they made and that replaces none, because it is of use to nobody; but not where somebody else is in it.
pub(crate) async fn abandon(app: &App, user: UserNum, made: RoomNum) -> Result<()> {
    let snapshot = app.store.snapshot();
    let is_alone = members::is_joined(&*snapshot, user, made)?
        && rooms::find_row(&*snapshot, made)?.is_some_and(|row| row.joined == 1);
    if !is_alone {
        return Ok(());
    }
    let author = Author::of(&*snapshot, user)?;
    drop(snapshot);
    match membership::leave_as(app, author, made, None).await {
        Err(Error::Refused(why)) => {
            tracing::info!(room = %made, why = %why.message, "a room that replaces none is left in vain");
            Ok(())
        }
        left => left,
    }
}

/// Calls the new room by those of the old one's canonical aliases that name it by now.
async fn call(app: &App, caller: &Caller, new: &RoomId, canonical: &CanonicalJsonObject) -> Result<()> {
    let num = commit::require_num(app, new)?;
    let Some(content) = aliases::canonical_of(&*app.store.snapshot(), num, canonical)? else { return Ok(()) };
    let (event_type, state_key) = (CANONICAL_ALIAS.to_owned(), String::new());
    let piece = send::Piece { event_type, state_key, content, confirmed: Vec::new(), sticky_ms: None };
    // The aliases name the new room by now, whatever becomes of this.
    if let Err(error) = send::set_state(app, caller, new, piece).await {
        tracing::info!(%new, %error, "a new room gets no canonical alias");
    }
    Ok(())
}

impl End {
    /// Chooses the id of the room that will replace this one, and builds the tombstone that names it.
    async fn build(app: &App, caller: &Caller, num: RoomNum) -> Result<Self> {
        let replaced_by = plan::choose_room_id(&app.env, app.rooms.signer().server())?;
        let (owned, author, new) = (app.clone(), Author::from(caller), replaced_by.clone());
        let event = own_events::build_ahead(app, num, move |change: &mut Change| {
            let power = change.power()?;
            require_may(&power, &author.user_id)?;
            let (content, now_ms) = (tombstone(&new)?, owned.env.event_ms());
            let draft = Draft::state(author.user_id.clone(), TOMBSTONE, "", content, now_ms);
            let signer = owned.rooms.signer();
            policy::approve(change, signer.server(), &author, draft)?.build_ahead(change, signer)
        });
        Ok(Self { event: event.await?, replaced_by })
    }
}

fn tombstone(new: &RoomId) -> Result<CanonicalJsonObject> {
    let content = json!({ "body": "This room has been replaced", "replacement_room": new });
    object(&content).ok_or_else(|| Error::broken("a tombstone has odd content"))
}

/// Reads the old room, and gives the request that makes the new one. `ended_by` is the old one's tombstone, where its id is known.
fn read_request(
    app: &App,
    caller: &Caller,
    num: RoomNum,
    version: RoomVersionId,
    additional_creators: &[OwnedUserId],
    ended_by: Option<OwnedEventId>,
) -> Result<Request> {
    let snapshot = app.store.snapshot();
    let row = rooms::require_row(&*snapshot, num)?;
    if !members::is_joined(&*snapshot, caller.user, num)? {
        return Err(commit::not_in_room().into());
    }
    let power = Power::read(RoomView { read: &*snapshot, num, row: &row })?;
    require_may(&power, &caller.user_id)?;
    let content = |event_type: &str| -> Result<Option<Value>> {
        let stored = rooms::find_state(&*snapshot, num, event_type, "")?;
        Ok(stored.and_then(|stored| serde_json::from_str(stored.row.content()).ok()))
    };
    let mut request = Request::new();
    let create = content(CREATE)?.unwrap_or_default();
    let rules = &versions::require(&version)?.1.authorization;
    let mut predecessor = Map::from_iter([("room_id".to_owned(), json!(row.id))]);
    predecessor.extend(ended_by.map(|event| ("event_id".to_owned(), json!(event))));
    let mut creation = Map::from_iter([("predecessor".to_owned(), Value::Object(predecessor))]);
    for field in ["type", "m.federate"] {
        if let Some(value) = create.get(field) {
            creation.insert(field.to_owned(), value.clone());
        }
    }
    if rules.additional_room_creators && !additional_creators.is_empty() {
        creation.insert("additional_creators".to_owned(), json!(additional_creators));
    }
    let creation = Value::Object(creation);
    request.creation_content = Some(raw(&creation)?);
    for (event_type, fallback) in CARRIED {
        let carried =
            content(event_type)?.filter(|content| content.as_object().is_some_and(|it| !it.is_empty()));
        let carried = carried.or_else(|| fallback.map(|(field, value)| json!({ (field): value })));
        if let Some(carried) = carried {
            // The event is longer in the new room where its sender's name is.
            if carried.to_string().len() > CONTENT_BYTES_MAX {
                let why = format!(
                    "The room's `{event_type}` has more than {CONTENT_BYTES_MAX} bytes; make it shorter to replace the room."
                );
                return Err(Refusal::too_large(why).into());
            }
            request.initial_state.push(state_event(event_type, "", &carried)?);
        }
    }
    let mut carried = Carried::default();
    carried.add_children(&*snapshot, num)?;
    let mut creators = BTreeSet::new();
    let mut stood_above = Vec::new();
    if rules.explicitly_privilege_room_creators {
        creators.insert(&*caller.user_id);
        creators.extend(additional_creators.iter().map(|user| &**user));
    } else {
        // Who stood above all levels keeps a high one where nobody stands above them any more.
        stood_above = power.list_privileged_creators();
    }
    let levels = content(POWER_LEVELS)?.and_then(|levels| object(&levels));
    let levels = levels.map(|levels| Levels::carried(levels, &caller.user_id, &creators, &stood_above));
    let maker = &*caller.user_id;
    let stands_above = |user: &UserId| {
        let exceeds = |levels: &Levels| creators.contains(maker) || levels.of(maker) > levels.of(user);
        !creators.contains(user) && levels.as_ref().is_none_or(exceeds)
    };
    carried.add_bans(&*snapshot, num, stands_above)?;
    request.initial_state.extend(carried.into_events()?);
    if let Some(levels) = &levels {
        request.power_level_content_override = Some(raw(&levels.first)?);
        if let Some(last) = &levels.last {
            request.initial_state.push(state_event(POWER_LEVELS, "", last)?);
        }
    }
    request.room_version = Some(version);
    Ok(request)
}

fn require_may(power: &Power, user: &UserId) -> Result<()> {
    if power.may_send_state(user, TOMBSTONE)? {
        return Ok(());
    }
    Err(Refusal::forbidden("Your power level does not suffice to replace this room.").into())
}

/// The power levels of a new room.
struct Levels {
    /// The levels while the room is made, so that its maker may set all that goes over.
    first: Value,
    /// The levels that the room is left with, where they are others.
    last: Option<Value>,
}

impl Levels {
    /// The level of a user while the room is made.
    fn of(&self, user: &UserId) -> i64 {
        let own = self.first.get("users").and_then(|users| users.get(user.as_str()));
        let level = own.or_else(|| self.first.get("users_default"));
        level.and_then(Value::as_i64).unwrap_or_default()
    }

    /// Carries levels over for the user who makes the new room. `creators` stand above all levels in it, and `stood_above` did so
    /// in the old one.
    fn carried(
        levels: CanonicalJsonObject,
        maker: &UserId,
        creators: &BTreeSet<&UserId>,
        stood_above: &[OwnedUserId],
    ) -> Self {
        let mut levels = as_integers(levels);
        let needed = needed(&levels);
        let users = levels.entry("users".to_owned());
        let users = users.or_insert_with(|| CanonicalJsonValue::Object(CanonicalJsonObject::new()));
        let mut first = None;
        if let CanonicalJsonValue::Object(users) = users {
            for user in stood_above {
                users.insert(user.to_string(), level(needed.max(ADMIN)));
            }
            users.retain(|user, _| !creators.iter().any(|creator| creator.as_str() == user));
            let own = users.get(maker.as_str()).and_then(CanonicalJsonValue::as_integer).map(i64::from);
            if !creators.contains(maker) && own.is_none_or(|own| own < needed) {
                let mut raised = users.clone();
                raised.insert(maker.to_string(), level(needed));
                first = Some(raised);
            }
        }
        let last = json!(levels);
        match first {
            None => Self { first: last, last: None },
            Some(users) => {
                levels.insert("users".to_owned(), CanonicalJsonValue::Object(users));
                Self { first: json!(levels), last: Some(last) }
            }
        }
    }
}

/// Writes levels that are texts, as rooms before version 10 have them, as the numbers that they mean. Fields that hold none go.
fn as_integers(mut levels: CanonicalJsonObject) -> CanonicalJsonObject {
    let number = |value: &CanonicalJsonValue| match value {
        CanonicalJsonValue::Integer(_) => Some(value.clone()),
        CanonicalJsonValue::String(text) => {
            let number = text.trim().parse::<i64>().ok()?;
            Some(CanonicalJsonValue::Integer(Int::new(number)?))
        }
        _ => None,
    };
    levels.retain(|field, value| {
        if LEVELS.contains(&field.as_str()) {
            let Some(number) = number(value) else { return false };
            *value = number;
        } else if NAMED_LEVELS.contains(&field.as_str()) {
            let CanonicalJsonValue::Object(named) = value else { return false };
            named.retain(|_, value| number(value).map(|number| *value = number).is_some());
        }
        true
    });
    levels
}

/// The level that may set all that goes over, and whatever else the levels name.
fn needed(levels: &CanonicalJsonObject) -> i64 {
    let single = |field: &str| levels.get(field).and_then(CanonicalJsonValue::as_integer).map(i64::from);
    let named = levels.get("events").and_then(CanonicalJsonValue::as_object);
    let named = named.into_iter().flat_map(|named| named.values());
    let named = named.filter_map(|value| value.as_integer().map(i64::from));
    // A user may give nobody more than they have.
    let users = levels.get("users").and_then(CanonicalJsonValue::as_object);
    let users = users.into_iter().flat_map(|users| users.values());
    let users = users.filter_map(|value| value.as_integer().map(i64::from));
    let all = LEVELS.iter().filter_map(|field| single(field)).chain(named).chain(users);
    all.max().unwrap_or_default().max(MODERATOR)
}

fn level(level: i64) -> CanonicalJsonValue {
    CanonicalJsonValue::Integer(Int::new_saturating(level))
}

fn object(value: &Value) -> Option<CanonicalJsonObject> {
    CanonicalJsonObject::deserialize(value).ok()
}

/// Sets the tombstone of the old room, takes its members the right to write there, as far as the caller may, and moves its aliases
/// and its place in the directory to the new room; but not where it was replaced meanwhile as it is wanted to be.
async fn replace(
    app: &App,
    caller: &Caller,
    num: RoomNum,
    new: &RoomId,
    (wanted, built, abandoned): (Wanted, Option<Countersigned>, Option<Timer>),
) -> Result<Replaced> {
    let (owned, author, new) = (app.clone(), Author::from(caller), new.to_owned());
    presence::note_active(app, caller);
    let work = move |change: &mut Change| {
        let power = change.power()?;
        require_may(&power, &author.user_id)?;
        if let Some(old) = change.state(TOMBSTONE, "")? {
            let tombstone = (old.parsed.sender.as_str(), old.parsed.content.get());
            let first = before::find(change.view(), &author, &wanted, tombstone)?;
            if let Some(first) = first {
                return Ok(Replaced::Before(first));
            }
        }
        let to = rooms::find_room(&change.batch, &new)?;
        let to = to.ok_or_else(|| Error::broken("a room that was just made is not there"))?;
        let add = |change: &mut Change, event_type: &str, content: CanonicalJsonObject| -> Result<()> {
            let now_ms = owned.env.event_ms();
            let draft = Draft::state(author.user_id.clone(), event_type, "", content, now_ms);
            let signer = owned.rooms.signer();
            policy::approve(change, signer.server(), &author, draft)?.add(change, signer)?;
            Ok(())
        };
        add(change, TOMBSTONE, tombstone(&new)?)?;
        // The job that abandons the new room may have been quicker, where a policy server was waited for.
        if let Some(timer) = &abandoned
            && !timer::fire(&mut change.batch, timer)?
        {
            return Err(Error::Busy { retry_after: AGAIN });
        }
        let settings = carry_over::promise_to_author(&owned, change, author.user)?;
        let canonical = change.state(CANONICAL_ALIAS, "")?;
        let canonical: Option<CanonicalJsonObject> =
            canonical.and_then(|event| serde_json::from_str(event.parsed.content.get()).ok());
        let canonical = match canonical {
            Some(content) => aliases::canonical_of(&change.batch, change.num, &content)?,
            None => None,
        };
        let moved = names::move_to(&owned, change, to, canonical.as_ref())?;
        if canonical.is_some() && power.may_send_state(&author.user_id, CANONICAL_ALIAS)? {
            add(change, CANONICAL_ALIAS, CanonicalJsonObject::new())?;
        }
        if let Some(levels) = silenced(change, &power, &author.user_id)? {
            add(change, POWER_LEVELS, levels)?;
        }
        Ok(Replaced::Now { promised: [moved, settings], canonical })
    };
    own_events::in_room_and_server(app, num, built.into_iter().collect(), work).await
}

/// The power levels of the old room with which ordinary members no longer send or invite; `None` where they cannot already, or where
/// the user may not change that.
fn silenced(change: &mut Change, power: &Power, user: &UserId) -> Result<Option<CanonicalJsonObject>> {
    let Some(levels) = change.state(POWER_LEVELS, "")? else { return Ok(None) };
    let Ok(mut levels) = serde_json::from_str::<CanonicalJsonObject>(levels.parsed.content.get()) else {
        return Ok(None);
    };
    let single = |levels: &CanonicalJsonObject, field: &str| {
        levels.get(field).and_then(CanonicalJsonValue::as_integer).map_or(0, i64::from)
    };
    let least = single(&levels, "users_default").saturating_add(1).max(MODERATOR);
    let low = ["events_default", "invite"].into_iter().filter(|field| single(&levels, field) < least);
    let low: Vec<&str> = low.collect();
    let Some(level) = Int::new(least) else { return Ok(None) };
    if low.is_empty() || !power.may_send_state(user, POWER_LEVELS)? || power.of_user(user)? < level {
        return Ok(None);
    }
    for field in low {
        levels.insert(field.to_owned(), CanonicalJsonValue::Integer(level));
    }
    Ok(Some(levels))
}
