//! Creates rooms. Everything that the request asks for becomes visible at once, so that nobody ever sees half a room. A room
//! that is larger than a batch is staged in parts.

use std::sync::Arc;

use ruma::{
    CanonicalJsonObject, OwnedRoomId, OwnedUserId,
    api::{client::room::create_room::v3::Request, error::ErrorKind},
};

use crate::{
    accounts::Caller,
    config::EncryptNew,
    error::{Error, Refusal, Result},
    flows::{
        App,
        commit::{self, ServerLock},
        jobs,
        limits::{Limit, Source},
    },
    ids::RoomNum,
    rooms::{
        aliases,
        build::Draft,
        change::Change,
        directory,
        plan::{Given, INITIAL_STATE_MAX, Plan},
        policy::{self, Author},
        turns::Seat,
    },
    schema::jobs::Job,
    store::{NotAccepted, timer::Timer},
};

/// The events that a room gets when it is replaced: its tombstone, and its canonical alias and power levels as they are from then on.
const OF_REPLACED_ROOM: usize = 3;

/// A room that was created.
pub(crate) struct Created {
    pub(crate) num: RoomNum,
    pub(crate) room_id: OwnedRoomId,
    /// The users of other servers who are to be invited, with the contents of their member events.
    pub(crate) invited_elsewhere: Vec<(OwnedUserId, CanonicalJsonObject)>,
    /// The job by which the maker leaves a room that replaces another one; the batch that names the room there cancels it.
    pub(crate) abandoned: Option<Timer>,
}

/// Creates a room. Each membership that it begins with counts against the creator's limit. Errors: 400
/// `M_UNSUPPORTED_ROOM_VERSION`, `M_ROOM_IN_USE`, `M_INVALID_ROOM_STATE`; 413 `M_TOO_LARGE`; 429 `M_LIMIT_EXCEEDED`.
///
/// Users of other servers are left to be invited, because their servers take part in that.
pub(crate) async fn create(app: &App, caller: &Caller, request: Request) -> Result<Created> {
    make(app, caller, request, Kind::New).await
}

/// Like [`create`], for a room that takes the place of another one. It is encrypted as the request says, whatever the settings say of new
/// rooms, because encryption cannot be taken back from those who go over to it. It gets the id that was chosen for it before, if one was,
/// and may begin with as much state as this: it is not for its maker to ask for less of what the other room has.
pub(crate) async fn replacement(
    app: &App,
    caller: &Caller,
    request: Request,
    (id, state_max): (Option<OwnedRoomId>, usize),
) -> Result<Created> {
    make(app, caller, request, Kind::Replacement { id, state_max }).await
}

/// Why a room is made.
enum Kind {
    /// A client asks for it.
    New,
    /// It replaces another room.
    Replacement { id: Option<OwnedRoomId>, state_max: usize },
}

async fn make(app: &App, caller: &Caller, request: Request, kind: Kind) -> Result<Created> {
    let num = app.rooms.next_num(&app.store.view())?;
    let (owned, author) = (app.clone(), Author::from(caller));
    let replaces = matches!(kind, Kind::Replacement { .. });
    let plan = move || {
        let server = owned.rooms.signer().server();
        let source = Source::User(author.user);
        let default_version = &owned.config.rooms.default_version;
        let (encrypt_new, state_max, id) = match kind {
            Kind::New => (owned.config.rooms.encrypt_new, INITIAL_STATE_MAX, None),
            Kind::Replacement { id, state_max } => (EncryptNew::Off, state_max, id),
        };
        let given = Given { server, default_version, encrypt_new, state_max, id };
        let plan = Plan::of(&owned.env, given, author, request)?;
        let (memberships, events) = (plan.count_memberships(), plan.count_initial_state());
        if replaces {
            // Nobody can replace a room in parts, so that a large one must not be refused for ever. It is paid for in full afterwards; its
            // members are bans, each of which is among the events, too.
            owned.limits.take_following(Limit::Membership, source, memberships)?;
            owned.limits.take_whole(Limit::Send, source, events + OF_REPLACED_ROOM)?;
        } else {
            owned.limits.take_more(Limit::Membership, source, memberships)?;
            owned.limits.take_more(Limit::Send, source, events)?;
        }
        plan.require_reachable(&*owned.store.snapshot(), server)?;
        Ok(plan)
    };
    let plan = Arc::new(app.env.blocking(plan).await?);
    let abandoned = replaces.then_some(Job::AbandonRoom { user: caller.user, room: num });
    let (owned, beginning, made) = (app.clone(), Arc::clone(&plan), Arc::clone(&plan));
    let begin = move |app: &App, seat| begin(app, &beginning, seat, num);
    let work = move |change: &mut Change, server: &mut ServerLock<'_>| {
        fill(&owned, &plan, change)?;
        // The alias and the directory belong to the server. Its lock comes last, because others wait for it.
        if plan.alias().is_some() || plan.is_published() {
            server.take(change);
            name_and_list(&plan, change)?;
        }
        let abandoned = abandoned.as_ref().map(|job| jobs::promise(&owned, &mut change.batch, job));
        Ok((change.row.id.clone(), abandoned))
    };
    let created = commit::in_turn(app, num, begin, work, or_in_use).await;
    if created.is_err() {
        commit::clear_unfinished_in(app, num).await;
    }
    let invited_elsewhere = made.list_invited_elsewhere(&*app.store.snapshot())?;
    let (room_id, abandoned) = created?;
    Ok(Created { num, room_id, invited_elsewhere, abandoned })
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

/// Begins the change that makes the room, with its create event.
fn begin(app: &App, plan: &Plan, seat: Seat, num: RoomNum) -> Result<Change> {
    let create = plan.create_draft();
    let id = plan.room_id(&app.env, app.rooms.signer(), &create)?;
    let mut change = Change::begin_room(&app.store, seat, num, id, plan.version())?;
    add(app, plan, &mut change, create)?;
    Ok(change)
}

/// Adds all events after the create event.
fn fill(app: &App, plan: &Plan, change: &mut Change) -> Result<()> {
    if let Some(alias) = plan.alias()
        && aliases::find(&change.batch, alias)?.is_some()
    {
        return Err(in_use().into());
    }
    for draft in plan.list_drafts(&change.batch)? {
        add(app, plan, change, draft)?;
        change.cut_if_large()?;
    }
    Ok(())
}

/// Adds the alias and the entry in the directory. They are written with the last part, so that nobody finds the room before.
fn name_and_list(plan: &Plan, change: &mut Change) -> Result<()> {
    if let Some(alias) = plan.alias()
        && aliases::find(&change.batch, alias)?.is_some()
    {
        return Err(in_use().into());
    }
    if let Some(alias) = plan.alias() {
        aliases::add(&mut change.batch, alias, change.num, &plan.creator().user_id);
    }
    if plan.is_published() {
        directory::publish(&mut change.batch, change.num, true);
    }
    Ok(())
}

/// Adds an event after the gate has approved it.
fn add(app: &App, plan: &Plan, change: &mut Change, draft: Draft) -> Result<()> {
    let signer = app.rooms.signer();
    let approved = policy::approve(change, signer.server(), plan.creator(), draft)
        .map_err(|error| invalid_state(error, &ErrorKind::BadJson))?;
    approved.add(change, signer).map_err(|error| invalid_state(error, &ErrorKind::Forbidden))?;
    Ok(())
}

/// Turns a refusal of this kind into 400 `M_INVALID_ROOM_STATE`: while a room is created, an event that is invalid or forbidden
/// by the room's rules is a fault of the request.
fn invalid_state(error: Error, kind: &ErrorKind) -> Error {
    match error {
        Error::Refused(refusal) if refusal.kind == *kind => {
            Refusal::new(ErrorKind::InvalidRoomState, refusal.message).into()
        }
        other => other,
    }
}
