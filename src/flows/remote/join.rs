//! Users of ours come into rooms that this server is not in (server-server API, "Joining Rooms"): a server in the room makes a
//! template, we sign the event, the server adds it to the room and hands over the room's state, and
//! `flows/room/base.rs` lays that down. Should this server end between the last two, `cut_off.rs` has others know it.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use federation::{
    call::Options,
    turns::{Turn, Turns},
};
use parking_lot::Mutex;
use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Refusal, Result},
    flows::{
        App,
        account::carry_over,
        commit, jobs,
        places::{Place, Places},
        remote::{
            ask::{at_fault, failed},
            attempts::{Attempt, Wish, left_meanwhile},
            brought::{self, Answered},
            candidates::{Candidates, find_here},
            cut_off,
            hand_over::{is_unknown, may_have_acted, put, put_with},
            held::Holding,
            late, left_out, receive,
            staged::{self, InBatch},
            stance::Stance,
            take_back::{self, TakenBack},
            take_in::{Silence, take_in},
            template::{self, Template, Wanted},
        },
        room::{base, completing, presence},
    },
    ids::{RoomNum, UserNum},
    rooms::{
        self,
        change::{Base, Change, Omitted, Outcome, Received},
        event,
        turns::JoinClaim,
    },
    schema::{
        event_types::MEMBER,
        jobs::Job,
        rooms::{Membership, Resident, RoomRow},
    },
};

/// Lay down at most this many large rooms at once, because each holds a room's state in memory.
const AT_ONCE: usize = 4;
/// It takes at least this many users to have as many laid down.
const USERS_MIN: usize = 4;
/// The state of a large room comes as more bytes than this.
const LARGE_BYTES: usize = 1 << 20;
/// At most this many wait for that, for other servers or for a join of the same room; others are told to come back.
const WAITING_MAX: usize = 512;
/// It takes at least this many users to have as many wait.
const WAITING_USERS_MIN: usize = 32;
/// Others wait this long for whoever acts on the same room by way of other servers, and then act beside them.
const OTHERS_WAIT: Duration = Duration::from_secs(10);
/// A server that took a join and has not answered after this time is not waited for alone.
const HANGS: Duration = Duration::from_secs(20);
/// Wait for this long until a room is laid down that another join brought, and look this often.
const LAID_WITHIN: Duration = Duration::from_secs(30);
const LOOKED_AT_EVERY: Duration = Duration::from_millis(100);
/// Has a server leave out the members of a room, where it knows how to.
const OMIT_MEMBERS: &str = "?omit_members=true";
/// The events that are held beside a join are stored in at most this many batches after it: ten servers that were asked and all others
/// together fill about eight.
const REST_BATCHES_MAX: usize = 16;
/// Others who are told to come back do so after this time.
const AGAIN: Duration = Duration::from_secs(10);

/// The rooms that are being joined. Clones share it.
#[derive(Clone)]
pub(crate) struct Joining(Arc<Inner>);

struct Inner {
    rooms: Turns<OwnedRoomId>,
    large: Places,
    waiting: Places,
    /// Those who refuse invitations and leave, whom joins must not hold up, nor the other way round.
    leaving: Places,
}

/// The right to act on a room by way of other servers. Whoever goes on when their request has ended keeps it, so that what it holds
/// counts for its payer until it ends itself.
pub(crate) struct Alone {
    _waiting: Place,
    /// None where whoever acts on the room before this one takes long.
    _turn: Option<Turn<OwnedRoomId>>,
}

impl Default for Joining {
    fn default() -> Self {
        let large = Places::new(AT_ONCE, USERS_MIN);
        let [waiting, leaving] = [(); 2].map(|()| Places::new(WAITING_MAX, WAITING_USERS_MIN));
        Self(Arc::new(Inner { rooms: Turns::default(), large, waiting, leaving }))
    }
}

impl Joining {
    /// Leaves a room by way of other servers, as [`Self::enter`] lets others in. Errors: as of that.
    pub(crate) async fn leave<T>(
        &self,
        app: &App,
        room: &RoomId,
        act: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let _alone = self.enter_by(app, room, &self.0.leaving).await?;
        act.await
    }

    /// Does something with a room by way of other servers, as [`Self::enter`] lets it. Errors: as of that.
    pub(crate) async fn alone<T>(
        &self,
        app: &App,
        room: &RoomId,
        act: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let _alone = self.enter(app, room).await?;
        act.await
    }

    /// Waits until nobody else does something with a room by way of other servers, or until whoever does takes long: what another server
    /// may delay holds nobody up. Errors: [`Error::Busy`] where too many wait.
    pub(crate) async fn enter(&self, app: &App, room: &RoomId) -> Result<Alone> {
        self.enter_by(app, room, &self.0.waiting).await
    }

    async fn enter_by(&self, app: &App, room: &RoomId, places: &Places) -> Result<Alone> {
        let waiting = places.enter().ok_or(Error::Busy { retry_after: AGAIN })?;
        let turn = tokio::select! {
            biased;
            turn = self.0.rooms.enter(room.to_owned()) => Some(turn),
            () = app.env.sleep(OTHERS_WAIT) => None,
        };
        Ok(Alone { _waiting: waiting, _turn: turn })
    }
}

/// The join that a user asked for.
struct Asked {
    user: UserNum,
    wanted: Wanted,
    stance: Stance,
    wish: Wish,
    /// The servers that have taken the join, or may have.
    taken: Mutex<BTreeSet<OwnedServerName>>,
    /// The events that other servers tell of the room meanwhile.
    holding: Holding,
    /// Whether a join that another server has taken waits here for other events.
    waits: AtomicBool,
}

impl Asked {
    fn new(app: &App, attempt: &Attempt, wanted: Wanted) -> Result<Self> {
        let (user, wish) = (attempt.user(), attempt.wish());
        let stance = Stance::find(&*app.store.snapshot(), user, &wanted.room_id)?;
        let holding = app.remote.held.begin(&wanted.room_id, user);
        let waits = AtomicBool::new(false);
        Ok(Self { user, wanted, stance, wish, taken: Mutex::default(), holding, waits })
    }

    /// Refuses where the user wants in no more. Errors: 403 `M_FORBIDDEN`.
    fn require_wanted(&self, app: &App) -> Result<()> {
        self.wish.require()?;
        self.stance.require_same(&app.store.view())
    }
}

/// Joins a room by way of other servers. It goes on when the requester hangs up or leaves, because others may believe by then that
/// the user is in the room. Where it fails, those that may have taken the join are told that the user is not in the room.
/// Errors: [`Error::Refused`] with the reason that a server gave, or because the user has left; [`Error::Remote`] where none could help.
pub(crate) async fn join(
    app: &App,
    attempt: Attempt,
    wanted: Wanted,
    candidates: Candidates,
    alone: Alone,
) -> Result<()> {
    let (tell, told) = oneshot::channel();
    let (asked, wish) = (Arc::new(Asked::new(app, &attempt, wanted)?), attempt.wish());
    let owned = app.clone();
    app.env.spawn(async move {
        let joined = ask_in_turn(&owned, &asked, candidates).await;
        let unanswered = match &joined {
            Ok(()) => {
                leave_again(&owned, &asked);
                BTreeSet::new()
            }
            // It comes true later.
            Err(_) if asked.waits.load(Ordering::Relaxed) => BTreeSet::new(),
            Err(why) => take_back(&owned, &asked, &attempt, why).await,
        };
        cut_off::conclude(&owned, &attempt, unanswered).await;
        drop((attempt, alone));
        drop(tell.send(joined));
    });
    unless_left(app, &wish, told).await
}

/// Waits for the end of a join, or until its user leaves.
async fn unless_left(app: &App, wish: &Wish, told: oneshot::Receiver<Result<()>>) -> Result<()> {
    match wish.unless_left(told).await {
        Some(told) => told.map_err(|_| app.broke_off("a join"))?,
        None => Err(left_meanwhile().into()),
    }
}

/// Has a room left again that a user left while the join was coming true.
fn leave_again(app: &App, asked: &Asked) {
    if asked.wish.has_left() {
        late::begin(app, &asked.wanted.room_id, asked.user);
    }
}

/// Asks one server after the other. One that took the join and does not answer is not waited for alone. The first that succeeds ends
/// the others, so that none answers when the user is somewhere else by then.
async fn ask_in_turn(app: &App, asked: &Arc<Asked>, mut candidates: Candidates) -> Result<()> {
    let (tell, mut told) = mpsc::unbounded_channel();
    let others = CancellationToken::new();
    let _ended_with_this = others.clone().drop_guard();
    let mut under_way = 0_usize;
    loop {
        let wanted = &asked.wanted;
        let template =
            candidates.first(app, |server| async move { template::ask(app, &server, wanted).await });
        match asked.wish.unless_left(template).await.flatten() {
            Some((server, template)) => {
                let (owned, asked, tell, others) =
                    (app.clone(), Arc::clone(asked), tell.clone(), others.clone());
                app.env.spawn(async move {
                    let joined =
                        others.run_until_cancelled(join_by(&owned, &asked, &server, &template)).await;
                    if let Some(joined) = joined {
                        drop(tell.send((server, joined)));
                    }
                });
                under_way += 1;
            }
            None if under_way == 0 => {
                asked.wish.require()?;
                return Err(candidates.into_error());
            }
            None => {}
        }
        let next = async {
            // Without another one to ask there is nothing to do but wait.
            if candidates.is_empty() || asked.wish.has_left() {
                std::future::pending().await
            } else {
                app.env.sleep(HANGS).await
            }
        };
        tokio::select! {
            biased;
            joined = told.recv() => {
                under_way -= 1;
                match joined {
                    Some((_, Ok(()))) => return Ok(()),
                    Some((_, Err(why @ Error::Broken(_)))) => return Err(why),
                    // Nobody else is asked for a join that waits here, and comes true.
                    Some((_, Err(why))) if asked.waits.load(Ordering::Relaxed) => return Err(why),
                    Some((server, Err(why))) => candidates.failed(&server, why),
                    None => return Err(app.broke_off("a join")),
                }
                // Nobody is asked to let a user in who wants in no more.
                asked.require_wanted(app)?;
            }
            () = next => {}
        }
    }
}

/// Tells the servers that may have taken a join that the user is not in the room after all, unless this server is in the room, which
/// says what the user is there, or the user joins it meanwhile. Gives those that have not answered to that.
async fn take_back(app: &App, asked: &Asked, attempt: &Attempt, why: &Error) -> BTreeSet<OwnedServerName> {
    let mut servers = std::mem::take(&mut *asked.taken.lock());
    let may = || attempt.is_only() && matches!(find_here(app, &asked.wanted.room_id), Ok(None));
    if servers.is_empty() || !may() {
        return BTreeSet::new();
    }
    tracing::info!(room = %asked.wanted.room_id, user = %asked.wanted.user_id, %why, "a join is taken back that other servers may have taken");
    let wanted = Wanted::leave(asked.wanted.room_id.clone(), asked.wanted.user_id.clone());
    let told = take_back::tell(app, &wanted, servers.clone(), may).await;
    if !may() {
        return BTreeSet::new();
    }
    servers.retain(|server| matches!(told.get(server), Some(TakenBack::Failed) | None));
    servers
}

/// Joins by way of this server.
async fn join_by(app: &App, asked: &Arc<Asked>, server: &ServerName, template: &Template) -> Result<()> {
    let (user, wanted) = (asked.user, &asked.wanted);
    if let Some(goes_on) = find_going_on(app, wanted, template)? {
        if goes_on.is_banned {
            return Err(Refusal::forbidden("You are banned from this room.").into());
        }
        if goes_on.is_partial {
            return come_back(app, asked, goes_on.num, (server, template)).await;
        }
    }
    let event = template.sign(app, server, wanted)?;
    let mut answered = send(app, server, asked, &event).await?;
    asked.wish.require()?;
    brought::learn_keys(app, template.version, &answered).await?;
    let servers = answered.servers.take();
    let snapshot = app.store.snapshot();
    let known = rooms::find_room(&*snapshot, &wanted.room_id)?;
    let num = known.map_or_else(|| app.rooms.next_num(&app.store.view()), Ok)?;
    drop(snapshot);
    let row = RoomRow::new(wanted.room_id.clone(), template.version, Resident::Joining);
    let event = match (template.cosigner().filter(|it| *it != app.config.server.name), &answered.event) {
        (None, _) => event,
        (Some(_), Some(json)) => brought::cosigned(app, server, &row, &event, json).await?,
        (Some(_), None) => return Err(at_fault(server, "it did not sign a join that it vouched for")),
    };
    // From here on nobody waits for another server: what is left is to read what was given.
    let place = match answered.byte_count() > LARGE_BYTES {
        true => Some(app.remote.joining.0.large.wait().await),
        false => None,
    };
    let (events, left_out) = brought::believed(app, server, (num, &row), answered).await?;
    let claim = claim(app, num).await?;
    if let Some(num) = find_here(app, &wanted.room_id)? {
        // Another join was quicker, which did not wait for this one.
        drop((claim, events));
        return enter(app, asked, num, server, event).await;
    }
    let _settling = asked.wish.settle()?;
    let named = (wanted.room_id.clone(), template.version);
    let mut base = Base::new(&app.store.view(), claim, named, server.to_string())?;
    if let Some(servers) = servers {
        let us = app.config.server.name.as_str();
        let others = servers.into_iter().map(|server| server.to_string()).filter(|server| server != us);
        // The server itself is in the room, whatever it says.
        let servers = others.chain([server.to_string()]).collect();
        base = base.without_members(Omitted { us: us.to_owned(), servers });
    }
    let (owned, of_turn) = (app.clone(), Arc::clone(asked));
    let after = move |change: &mut Change| {
        // Nothing of the room changes in its turn, and what this turn writes is not seen yet.
        of_turn.require_wanted(&owned)?;
        cut_off::take_back_in(&owned, &mut change.batch, (&of_turn.wanted.room_id, user));
        left_out::remember(&owned, change, &left_out)?;
        let held = store_held(&owned, change, &of_turn)?;
        let completes = change.row.incomplete().is_some().then(|| {
            let job = Job::CompleteState { room: change.num };
            jobs::promise(&owned, &mut change.batch, &job)
        });
        Ok((carry_over::promise(&owned, change, user)?, completes, held))
    };
    let (promised, completes, held) = base::join(app, base, events, event, after).await?;
    drop(held);
    jobs::begin(app, completes);
    // Events that were answered as taken are stored before anything is waited for, because until then they end with this run of the server.
    take_rest(app, asked, num).await;
    // The join counts, whatever becomes of what follows from it.
    let kept = jobs::keep(app, promised).await;
    drop(place);
    let told = completing::soon(app, num).await;
    take_rest(app, asked, num).await;
    for why in [kept, told].into_iter().filter_map(Result::err) {
        tracing::warn!(room = %wanted.room_id, %why, "a room is joined, and not all that follows from it is done");
    }
    Ok(())
}

/// A room that nobody of ours is in, and in which nothing happened since, by the place that another server gives to a join: it stands on
/// just the events that are the room's last ones here.
struct GoingOn {
    num: RoomNum,
    /// Whether the room was joined without its members, which were never learnt.
    is_partial: bool,
    /// Whether the user who wants to join is banned there.
    is_banned: bool,
}

fn find_going_on(app: &App, wanted: &Wanted, template: &Template) -> Result<Option<GoingOn>> {
    let snapshot = app.store.snapshot();
    let Some(num) = rooms::find_room(&*snapshot, &wanted.room_id)? else { return Ok(None) };
    let row = rooms::require_row(&*snapshot, num)?;
    if !row.resident.is_in() || row.version != template.version {
        return Ok(None);
    }
    let heads: BTreeSet<_> = row.heads.iter().map(|head| event::event_id(&head.key, row.version)).collect();
    if heads != template.list_prev().iter().cloned().collect() {
        return Ok(None);
    }
    let member = rooms::find_state(&*snapshot, num, MEMBER, wanted.user_id.as_str())?;
    let is_banned = member.and_then(|event| event.membership()) == Some(Membership::Ban);
    Ok(Some(GoingOn { num, is_partial: row.resident == Resident::Partial, is_banned }))
}

/// Comes back into a room that was left before its members were known, and in which nothing happened since. What the server brings
/// would say nothing that is not here, so that the room goes on as it is, and its members are those before the earlier join.
async fn come_back(
    app: &App,
    asked: &Arc<Asked>,
    num: RoomNum,
    (server, template): (&ServerName, &Template),
) -> Result<()> {
    // The job ends at once where nobody comes into the room after all.
    let owned = app.clone();
    let promise = move |change: &mut Change| {
        Ok(jobs::promise(&owned, &mut change.batch, &Job::CompleteState { room: change.num }))
    };
    let completes = commit::beside_room(app, num, promise).await?;
    vouched_by(app, asked, num, server, template).await?;
    jobs::begin(app, Some(completes));
    completing::soon(app, num).await
}

/// Has another server let a user into a restricted room that this server is in: nobody of ours may vouch for them. It goes on when the
/// requester hangs up. Errors: as of [`join`]; [`Error::Busy`] where the event that the other server took cannot be taken here yet.
pub(crate) async fn vouched(
    app: &App,
    attempt: Attempt,
    num: RoomNum,
    wanted: Wanted,
    mut candidates: Candidates,
    alone: Alone,
) -> Result<()> {
    let (tell, told) = oneshot::channel();
    let (asked, wish) = (Arc::new(Asked::new(app, &attempt, wanted)?), attempt.wish());
    let owned = app.clone();
    app.env.spawn(async move {
        let vouched = async {
            loop {
                asked.wish.require()?;
                let ask = |server: OwnedServerName| {
                    let (owned, wanted) = (&owned, &asked.wanted);
                    async move { template::ask(owned, &server, wanted).await }
                };
                let template = asked.wish.unless_left(candidates.first(&owned, ask)).await;
                let Some((server, template)) = template.flatten() else {
                    asked.wish.require()?;
                    return Err(candidates.into_error());
                };
                match vouched_by(&owned, &asked, num, &server, &template).await {
                    Ok(()) => return Ok(()),
                    Err(why @ (Error::Broken(_) | Error::Busy { .. })) => return Err(why),
                    Err(why) => candidates.failed(&server, why),
                }
            }
        };
        let vouched = vouched.await;
        if vouched.is_ok() {
            leave_again(&owned, &asked);
        }
        drop((attempt, alone));
        drop(tell.send(vouched));
    });
    unless_left(app, &wish, told).await
}

async fn vouched_by(
    app: &App,
    asked: &Arc<Asked>,
    num: RoomNum,
    server: &ServerName,
    template: &Template,
) -> Result<()> {
    let row = rooms::require_row(&*app.store.snapshot(), num)?;
    if row.version != template.version {
        return Err(at_fault(server, "it says another version of the room than is known"));
    }
    let event = template.sign(app, server, &asked.wanted)?;
    let answered = send(app, server, asked, &event).await?;
    let event = match (template.cosigner().filter(|it| *it != app.config.server.name), &answered.event) {
        (None, _) => event,
        (Some(_), Some(json)) => brought::cosigned(app, server, &row, &event, json).await?,
        (Some(_), None) => return Err(at_fault(server, "it did not sign a join that it vouched for")),
    };
    enter(app, asked, num, server, event).await
}

/// Waits for the right to lay a room down. Errors: [`Error::Busy`] where that takes long.
async fn claim(app: &App, num: RoomNum) -> Result<JoinClaim> {
    let until = app.env.uptime() + LAID_WITHIN;
    loop {
        if let Some(claim) = app.rooms.turns(num).claim_join() {
            return Ok(claim);
        }
        if app.env.uptime() >= until {
            return Err(Error::Busy { retry_after: AGAIN });
        }
        app.env.sleep(LOOKED_AT_EVERY).await;
    }
}

/// Takes in the join of a user of ours that another server has let into a room which this server is in.
async fn enter(
    app: &App,
    asked: &Arc<Asked>,
    num: RoomNum,
    server: &ServerName,
    event: Received,
) -> Result<()> {
    asked.stance.require_same(&app.store.view())?;
    // The other server tells everybody of the join, so that whoever has left by now leaves the room again.
    let _settling = asked.wish.settle_anyway();
    let (id, json) = (event.id().to_owned(), event.json().clone());
    // The other server tells the rest of the room.
    let taken = take_in(app, num, server, vec![event.let_in()], Silence::FetchesState).await?.pop();
    match taken {
        Some(Outcome::Accepted(_) | Outcome::Known(_)) => {}
        Some(Outcome::Aside(_, why)) => {
            return Err(at_fault(
                server,
                format!("it let a user of ours join, which the room does not allow: {why}"),
            ));
        }
        _ => {
            // A join that nobody wants any more is not waited for. Where it comes by way of others, the room is left again.
            asked.wish.require()?;
            app.remote.attempts.note_waits(app, &asked.wanted.room_id, asked.user, (&id, server));
            let kept = staged::stage(app, num, server, vec![(id, json)], true).await?;
            asked.waits.store(kept == [true], Ordering::Relaxed);
            // Events that were told beside the join were answered as taken.
            take_rest(app, asked, num).await;
            return Err(Error::Busy { retry_after: AGAIN });
        }
    }
    take_rest(app, asked, num).await;
    Ok(())
}

/// Stores the events that are still held, those for which the batch of the join had no room and those that came until the room was here
/// for everybody, and shows what was said of the presence of users who are in it. The join counts by now, so that it does not fail
/// with any of that.
async fn take_rest(app: &App, asked: &Arc<Asked>, num: RoomNum) {
    let take = async {
        for (user_id, said) in asked.holding.take_presence() {
            presence::tell_elsewhere(app, user_id, said).await?;
        }
        for _ in 0..REST_BATCHES_MAX {
            if asked.holding.is_empty() {
                break;
            }
            let (owned, asked) = (app.clone(), Arc::clone(asked));
            let store = move |change: &mut Change| store_held(&owned, change, &asked);
            drop(commit::beside_room(app, num, store).await?);
        }
        Ok::<(), Error>(())
    };
    if let Err(why) = take.await {
        tracing::warn!(room = %asked.wanted.room_id, %why, "events could not be stored that others told of a room while it was joined");
    }
}

/// Stores events that other servers told of the room since the join was asked for, to be taken in like others that waited: as many as
/// the batch has room for.
fn store_held(app: &App, change: &mut Change, asked: &Asked) -> Result<InBatch> {
    let events = asked.holding.take(staged::bytes_left(change));
    let events = receive::sort_held(change, events)?;
    Ok(staged::stage_in_batch(app, change, events))
}

/// Sends the event of a join, in the older form of the endpoint where the server does not know the newer one. Notes that the server has
/// taken it, unless it is certain that it has not.
async fn send(app: &App, server: &ServerName, asked: &Asked, event: &Received) -> Result<Answered> {
    let (room_id, id) = (asked.wanted.room_id.as_str(), event.id().as_str());
    cut_off::promise(app, (&asked.wanted.room_id, asked.user), (event.id(), server)).await?;
    asked.wish.note_sent(event.id(), server)?;
    asked.taken.lock().insert(server.to_owned());
    asked.holding.note_asked(server);
    let (path, options) = (["v2", "send_join", room_id, id], Options::whole_state());
    let mut sent = put_with(app, server, (&path, OMIT_MEMBERS), event.json(), options).await;
    let is_older = sent.as_ref().is_err_and(is_unknown);
    if is_older {
        sent =
            put(app, server, &["v1", "send_join", room_id, id], event.json(), Options::whole_state()).await;
    }
    let reply = sent.map_err(|failure| {
        if !may_have_acted(&failure) {
            asked.taken.lock().remove(server);
        }
        failed(server, failure)
    })?;
    Answered::read(reply.answer, is_older).map_err(|why| at_fault(server, why))
}
