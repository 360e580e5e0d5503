//! Users of ours come into rooms that this server is not in (server-server API, "Joining Rooms"): a server in the room makes a
//! template, we sign the event, the server adds it to the room and hands over the room's state, and
//! `flows/room/base.rs` lays that down.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use bytes::Bytes;
use federation::{
    call::{Failure, Options, Reply},
    turns::Turns,
};
use http::{Method, Request, header};
use ruma::{OwnedRoomId, OwnedServerName, RoomId, ServerName};
use tokio::sync::{mpsc, oneshot};

use crate::{
    error::{Error, Refusal, Result},
    flows::{
        App,
        account::carry_over,
        commit, jobs,
        places::Places,
        remote::{
            ask::{at_fault, failed},
            brought::{self, Answered},
            candidates::{Candidates, find_here},
            left_out, staged,
            take_in::{Silence, take_in},
            template::{self, Template, Wanted},
        },
        room::{base, completing},
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
/// Others who are told to come back do so after this time.
const AGAIN: Duration = Duration::from_secs(10);

/// The rooms that are being joined. Clones share it.
#[derive(Clone)]
pub(crate) struct Joining(Arc<Inner>);

struct Inner {
    rooms: Turns<OwnedRoomId>,
    large: Places,
    waiting: Places,
}

impl Default for Joining {
    fn default() -> Self {
        let (large, waiting) = (Places::new(AT_ONCE, USERS_MIN), Places::new(WAITING_MAX, WAITING_USERS_MIN));
        Self(Arc::new(Inner { rooms: Turns::default(), large, waiting }))
    }
}

impl Joining {
    /// Does something with a room by way of other servers, when nobody else does, or when whoever does takes long: what another server
    /// may delay holds nobody up. Errors: [`Error::Busy`] where too many wait.
    pub(crate) async fn alone<T>(
        &self,
        app: &App,
        room: &RoomId,
        act: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let _waiting = self.0.waiting.enter().ok_or(Error::Busy { retry_after: AGAIN })?;
        let _alone = tokio::select! {
            biased;
            alone = self.0.rooms.enter(room.to_owned()) => Some(alone),
            () = app.env.sleep(OTHERS_WAIT) => None,
        };
        act.await
    }
}

/// Joins a room by way of other servers. It goes on when the requester hangs up, because others may believe by then that the user
/// is in the room. Errors: [`Error::Refused`] with the reason that a server gave; [`Error::Remote`] where none could help.
pub(crate) async fn join(app: &App, user: UserNum, wanted: Wanted, candidates: Candidates) -> Result<()> {
    let (tell, told) = oneshot::channel();
    let owned = app.clone();
    app.env.spawn(async move {
        drop(tell.send(ask_in_turn(&owned, user, &wanted, candidates).await));
    });
    told.await.map_err(|_| app.broke_off("a join"))?
}

/// Asks one server after the other. One that took the join and does not answer is not waited for alone: nobody is in the room
/// twice, whichever answers come later.
async fn ask_in_turn(app: &App, user: UserNum, wanted: &Wanted, mut candidates: Candidates) -> Result<()> {
    let (tell, mut told) = mpsc::unbounded_channel();
    let mut under_way = 0_usize;
    loop {
        let asked = candidates.first(app, |server| async move { template::ask(app, &server, wanted).await });
        match asked.await {
            Some((server, template)) => {
                let (owned, wanted, tell) = (app.clone(), wanted.clone(), tell.clone());
                app.env.spawn(async move {
                    let joined = join_by(&owned, user, &wanted, &server, &template).await;
                    drop(tell.send((server, joined)));
                });
                under_way += 1;
            }
            None if under_way == 0 => return Err(candidates.into_error()),
            None => {}
        }
        let next = async {
            // Without another one to ask there is nothing to do but wait.
            if candidates.is_empty() { std::future::pending().await } else { app.env.sleep(HANGS).await }
        };
        tokio::select! {
            biased;
            joined = told.recv() => {
                under_way -= 1;
                match joined {
                    Some((_, Ok(()))) => return Ok(()),
                    Some((_, Err(why @ Error::Broken(_)))) => return Err(why),
                    Some((server, Err(why))) => candidates.failed(&server, why),
                    None => return Err(app.broke_off("a join")),
                }
            }
            () = next => {}
        }
    }
}

/// Joins by way of this server.
async fn join_by(
    app: &App,
    user: UserNum,
    wanted: &Wanted,
    server: &ServerName,
    template: &Template,
) -> Result<()> {
    if let Some(goes_on) = find_going_on(app, wanted, template)? {
        if goes_on.is_banned {
            return Err(Refusal::forbidden("You are banned from this room.").into());
        }
        if goes_on.is_partial {
            return come_back(app, user, goes_on.num, wanted, (server, template)).await;
        }
    }
    let event = template.sign(app, server, wanted)?;
    let mut answered = send(app, server, wanted, &event).await?;
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
        return enter(app, user, num, server, event).await;
    }
    let named = (wanted.room_id.clone(), template.version);
    let mut base = Base::new(&app.store.view(), claim, named, server.to_string())?;
    if let Some(servers) = servers {
        let us = app.config.server.name.as_str();
        let others = servers.into_iter().map(|server| server.to_string()).filter(|server| server != us);
        // The server itself is in the room, whatever it says.
        let servers = others.chain([server.to_string()]).collect();
        base = base.without_members(Omitted { us: us.to_owned(), servers });
    }
    let owned = app.clone();
    let after = move |change: &mut Change| {
        left_out::remember(&owned, change, &left_out)?;
        let completes = change.row.incomplete().is_some().then(|| {
            let job = Job::CompleteState { room: change.num };
            jobs::promise(&owned, &mut change.batch, &job)
        });
        Ok((carry_over::promise(&owned, change, user)?, completes))
    };
    let (promised, completes) = base::join(app, base, events, event, after).await?;
    jobs::begin(app, completes);
    jobs::keep(app, promised).await?;
    drop(place);
    completing::soon(app, num).await
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
    user: UserNum,
    num: RoomNum,
    wanted: &Wanted,
    (server, template): (&ServerName, &Template),
) -> Result<()> {
    // The job ends at once where nobody comes into the room after all.
    let owned = app.clone();
    let promise = move |change: &mut Change| {
        Ok(jobs::promise(&owned, &mut change.batch, &Job::CompleteState { room: change.num }))
    };
    let completes = commit::beside_room(app, num, promise).await?;
    vouched_by(app, user, num, wanted, server, template).await?;
    jobs::begin(app, Some(completes));
    completing::soon(app, num).await
}

/// Has another server let a user into a restricted room that this server is in: nobody of ours may vouch for them. It goes on when the
/// requester hangs up. Errors: as of [`join`]; [`Error::Busy`] where the event that the other server took cannot be taken here yet.
pub(crate) async fn vouched(
    app: &App,
    user: UserNum,
    num: RoomNum,
    wanted: Wanted,
    mut candidates: Candidates,
) -> Result<()> {
    let (tell, told) = oneshot::channel();
    let owned = app.clone();
    app.env.spawn(async move {
        let vouched = async {
            loop {
                let ask = |server: OwnedServerName| {
                    let (owned, wanted) = (owned.clone(), wanted.clone());
                    async move { template::ask(&owned, &server, &wanted).await }
                };
                let Some((server, template)) = candidates.first(&owned, ask).await else {
                    return Err(candidates.into_error());
                };
                match vouched_by(&owned, user, num, &wanted, &server, &template).await {
                    Ok(()) => return Ok(()),
                    Err(why @ (Error::Broken(_) | Error::Busy { .. })) => return Err(why),
                    Err(why) => candidates.failed(&server, why),
                }
            }
        };
        drop(tell.send(vouched.await));
    });
    told.await.map_err(|_| app.broke_off("a join"))?
}

async fn vouched_by(
    app: &App,
    user: UserNum,
    num: RoomNum,
    wanted: &Wanted,
    server: &ServerName,
    template: &Template,
) -> Result<()> {
    let row = rooms::require_row(&*app.store.snapshot(), num)?;
    if row.version != template.version {
        return Err(at_fault(server, "it says another version of the room than is known"));
    }
    let event = template.sign(app, server, wanted)?;
    let answered = send(app, server, wanted, &event).await?;
    let event = match (template.cosigner().filter(|it| *it != app.config.server.name), &answered.event) {
        (None, _) => event,
        (Some(_), Some(json)) => brought::cosigned(app, server, &row, &event, json).await?,
        (Some(_), None) => return Err(at_fault(server, "it did not sign a join that it vouched for")),
    };
    enter(app, user, num, server, event).await
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
async fn enter(app: &App, user: UserNum, num: RoomNum, server: &ServerName, event: Received) -> Result<()> {
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
            staged::stage(app, num, server, vec![(id, json)], true).await?;
            return Err(Error::Busy { retry_after: AGAIN });
        }
    }
    let owned = app.clone();
    let promised =
        commit::beside_room(app, num, move |change| carry_over::promise(&owned, change, user)).await?;
    jobs::keep(app, promised).await
}

/// Sends the event of a join, in the older form of the endpoint where the server does not know the newer one.
async fn send(app: &App, server: &ServerName, wanted: &Wanted, event: &Received) -> Result<Answered> {
    let (room_id, id) = (wanted.room_id.as_str(), event.id().as_str());
    let (path, options) = (["v2", "send_join", room_id, id], Options::whole_state());
    match put_with(app, server, (&path, OMIT_MEMBERS), event.json(), options).await {
        Ok(reply) => Answered::read(reply.answer, false).map_err(|why| at_fault(server, why)),
        Err(failure) if is_unknown(&failure) => {
            let reply =
                put(app, server, &["v1", "send_join", room_id, id], event.json(), Options::whole_state())
                    .await;
            let reply = reply.map_err(|failure| failed(server, failure))?;
            Answered::read(reply.answer, true).map_err(|why| at_fault(server, why))
        }
        Err(failure) => Err(failed(server, failure)),
    }
}

/// Sends an event of ours to this path below that of the server-server API.
pub(super) async fn put(
    app: &App,
    server: &ServerName,
    path: &[&str],
    event: &Bytes,
    options: Options,
) -> Result<Reply, Failure> {
    put_with(app, server, (path, ""), event, options).await
}

/// Like [`put`], with a query.
async fn put_with(
    app: &App,
    server: &ServerName,
    (path, query): (&[&str], &str),
    event: &Bytes,
    options: Options,
) -> Result<Reply, Failure> {
    let mut uri = "/_matrix/federation".to_owned();
    for part in path {
        uri.push('/');
        uri.extend(encoded(part));
    }
    uri.push_str(query);
    let request = Request::builder().method(Method::PUT).uri(uri);
    let request = request.header(header::CONTENT_TYPE, "application/json").body(event.clone());
    let request = request.map_err(|error| Failure::BadRequest(error.to_string()))?;
    app.remote.client.send_signed(server, request, options).await
}

/// A part of a path, in which only what every server reads alike stands for itself.
fn encoded(part: &str) -> impl Iterator<Item = char> {
    part.bytes().flat_map(|byte| {
        let is_plain = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        let encoded = if is_plain { char::from(byte).to_string() } else { format!("%{byte:02X}") };
        encoded.chars().collect::<Vec<_>>()
    })
}

/// Whether a server does not know an endpoint.
pub(super) fn is_unknown(failure: &Failure) -> bool {
    match failure {
        Failure::Refused { status, errcode, .. } => {
            let code = errcode.as_deref();
            code == Some("M_UNRECOGNIZED") || (code.is_none() && matches!(status.as_u16(), 404 | 405))
        }
        _ => false,
    }
}
