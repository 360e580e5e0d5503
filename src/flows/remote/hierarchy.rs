//! Walks through the rooms of a space for a client, or says what one room is. Other servers are asked for the rooms that this one
//! is not in.

use std::{collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use federation::{call::Options, json::Limits};
use ruma::{
    OwnedRoomId, OwnedServerName, RoomAliasId, RoomId, RoomOrAliasId, api::federation::space::get_hierarchy,
    room::RoomType,
};

use super::{
    ask::{self, ANSWERS, Named},
    candidates::{self, Candidates},
    spaces::{Question, Room, Told},
};
use crate::{
    accounts::Caller,
    env::Long,
    error::{Error, Refusal, Result},
    flows::{
        App,
        room::hierarchy::{ANSWER_BYTES_MAX, find_current, written},
    },
    ids::UserNum,
    json::{JsonText, Object},
    rooms::{
        self, members,
        spaces::{self, Asker, Child},
    },
    schema::rooms::Membership,
};

/// A page has at most this many rooms, and as many if the client names no limit.
const PAGE_MAX: usize = 50;
/// A walk goes at most this many levels down.
const DEPTH_MAX: u64 = 20;
/// A walk through the rooms of a space ends after this many.
const WALKED_MAX: usize = 1_000;
/// For one page other servers are asked at most this many questions; the next page goes on with the answers that are kept.
const QUESTIONS_MAX: usize = 10;
/// A page waits for the answers of other servers for at most this long altogether.
const ANSWERS_TAKE_MAX: Duration = Duration::from_secs(25);
/// An answer has at most this many bytes.
const ANSWER_LIMITS: Limits = Limits::bytes(4 << 20);
/// An answer is kept for this time.
const KEPT: Duration = Duration::from_secs(300);
/// A room of which nobody could tell anything is asked for again after this time.
const UNKNOWN_KEPT: Duration = Duration::from_secs(60);

/// A client's question for the rooms of a space.
pub(crate) struct Ask {
    pub(crate) limit: Option<u64>,
    pub(crate) max_depth: Option<u64>,
    pub(crate) suggested_only: bool,
    pub(crate) from: Option<String>,
}

impl Ask {
    /// Where the page begins: after this many rooms.
    fn start(&self) -> Result<usize> {
        let Some(from) = &self.from else { return Ok(0) };
        let start = from.strip_suffix(&self.end()).and_then(|start| start.parse().ok());
        let refusal =
            "`from` is no token of this walk; `suggested_only` and `max_depth` must stay what they were.";
        start.ok_or_else(|| Refusal::invalid_param(refusal).into())
    }

    /// The end of a token, which holds what may not change between pages.
    fn end(&self) -> String {
        let depth = self.max_depth.map_or_else(String::new, |depth| depth.to_string());
        format!("~{}~{depth}", u8::from(self.suggested_only))
    }
}

/// Gives a page of the rooms of a space that the caller may enter or read, depth first. Each room is told once. A page is shorter
/// where other servers have to be asked for many rooms. Errors: 403 `M_FORBIDDEN` for a space that they may not enter or read;
/// 400 `M_INVALID_PARAM` for a token of another walk.
pub(crate) async fn for_client(app: &App, caller: &Caller, room: &RoomId, ask: Ask) -> Result<Bytes> {
    if ask.limit == Some(0) {
        return Err(Refusal::invalid_param("`limit` must be greater than 0.").into());
    }
    let start = ask.start()?;
    let limit = ask.limit.and_then(|limit| usize::try_from(limit).ok());
    let mut walk = Walk {
        user: caller.user,
        start,
        end: start.saturating_add(limit.unwrap_or(PAGE_MAX).min(PAGE_MAX)),
        depth_max: ask.max_depth.unwrap_or(DEPTH_MAX).min(DEPTH_MAX),
        waiting: vec![Waiting::at(room.to_owned(), 0)],
        met: HashSet::new(),
        looked_at: 0,
        told: Vec::new(),
        bytes: 0,
        count: 0,
        ask,
        is_unfinished: false,
    };
    let until = app.env.uptime().saturating_add(ANSWERS_TAKE_MAX);
    let mut questions = 0;
    let mut answer = None;
    loop {
        let owned = app.clone();
        let go_on = move || {
            if let Some((waiting, told)) = answer {
                walk.tell_abroad(&owned, &waiting, told)?;
            }
            let abroad = walk.go_on(&owned)?;
            Ok((walk, abroad))
        };
        let abroad;
        (walk, abroad) = app.env.blocking_long(Long::Search, go_on).await?;
        let Some(waiting) = abroad else { break };
        let question = walk.question(app, &waiting);
        let known = app.remote.asking.spaces().find(&question, app.env.uptime());
        // That nobody told anything counts for the pages of one walk only: the next walk may be made because that has changed.
        let told = match known.filter(|known| known.is_some() || walk.start > 0) {
            Some(known) => known,
            None => {
                let left = until.saturating_sub(app.env.uptime());
                if questions == QUESTIONS_MAX || left.is_zero() {
                    walk.is_unfinished = true;
                    break;
                }
                questions += 1;
                ask_for(app, question, left).await
            }
        };
        answer = Some((waiting, told));
    }
    walk.page()
}

/// Says what a room is to somebody who may enter or read it, and their own membership there. Other servers are asked for users only.
/// Errors: 404 `M_NOT_FOUND` for a room that they may not enter or read, or that nobody knows.
pub(crate) async fn summary(
    app: &App,
    caller: Option<&Caller>,
    name: &RoomOrAliasId,
    via: Vec<OwnedServerName>,
) -> Result<Bytes> {
    let is_ours =
        <&RoomAliasId>::try_from(name).map_or(true, |alias| alias.server_name() == app.config.server.name);
    if caller.is_none() && !is_ours {
        return Err(unknown());
    }
    let Named { room_id, servers } = candidates::find_named(app, name, via).await?;
    let user = caller.map(|caller| caller.user);
    let (owned, id) = (app.clone(), room_id.clone());
    let read_here = move || {
        let snapshot = owned.store.snapshot();
        let Some((num, row)) = find_current(&snapshot, &id)? else { return Ok(None) };
        if !spaces::may_look(&*snapshot, num, &row, user.map_or(Asker::Anybody, Asker::User))? {
            return Err(unknown());
        }
        Ok(Some(spaces::summary(&*snapshot, owned.rooms.descriptions(), num, &row)?))
    };
    let mut summary = app.env.blocking(read_here).await?;
    if let (None, Some(user)) = (&summary, user) {
        let via = candidates::candidates(app, &room_id, servers)?.into_servers();
        let question = Question { room_id: room_id.clone(), suggested_only: false, via };
        let known = app.remote.asking.spaces().find(&question, app.env.uptime()).flatten();
        let told = match known {
            Some(known) => Some(known),
            None => ask_for(app, question, ANSWERS_TAKE_MAX).await,
        };
        let told = told.ok_or_else(unknown)?;
        if !spaces::may_look_abroad(&*app.store.snapshot(), user, &told.room.summary)? {
            return Err(unknown());
        }
        summary = Some(told.room.told.clone());
    }
    let mut summary = summary.ok_or_else(unknown)?;
    if let Some(user) = user {
        let snapshot = app.store.snapshot();
        let room = rooms::find_room(&*snapshot, &room_id)?;
        let row = room.map(|room| members::find(&*snapshot, user, room)).transpose()?.flatten();
        let membership = row.map_or(Membership::Leave, |row| row.membership);
        summary.insert("membership".to_owned(), membership.as_str().into());
    }
    Ok(String::from(written(summary, None)).into())
}

/// Asks the servers of a room for it, and keeps what they tell.
async fn ask_for(app: &App, question: Question, takes_max: Duration) -> Option<Arc<Told>> {
    let mut candidates = Candidates::of(app, question.via.iter().cloned());
    let ask = |server: OwnedServerName| {
        let mut request = get_hierarchy::v1::Request::new(question.room_id.clone());
        request.suggested_only = question.suggested_only;
        let question = &question;
        async move {
            let options = Options { limits: ANSWER_LIMITS, ..ANSWERS };
            let answer = ask::ask(app, &server, request, options).await?;
            Told::read(question, answer).ok_or_else(|| ask::at_fault(&server, "it told of another room"))
        }
    };
    let told = tokio::select! {
        biased;
        told = candidates.first(app, ask) => told.map(|(_, told)| Arc::new(told)),
        () = app.env.sleep(takes_max) => None,
    };
    let bytes = question.byte_count() + told.as_ref().map_or(0, |told| told.byte_count);
    let kept = if told.is_some() { KEPT } else { UNKNOWN_KEPT };
    app.remote.asking.spaces().keep(question, told.clone(), bytes, app.env.uptime() + kept);
    told
}

/// A room that a walk has yet to look at.
struct Waiting {
    id: OwnedRoomId,
    depth: u64,
    /// The servers that may know it.
    via: Vec<OwnedServerName>,
    /// The room as the server that told of the parent describes it.
    hint: Option<Arc<Room>>,
    /// The server that told of the parent says that nobody here can come into it.
    is_inaccessible: bool,
}

impl Waiting {
    fn at(id: OwnedRoomId, depth: u64) -> Self {
        Self { id, depth, via: Vec::new(), hint: None, is_inaccessible: false }
    }
}

struct Walk {
    ask: Ask,
    user: UserNum,
    /// The page tells of the rooms from this one on, and before that one.
    start: usize,
    end: usize,
    depth_max: u64,
    waiting: Vec<Waiting>,
    met: HashSet<OwnedRoomId>,
    looked_at: usize,
    told: Vec<JsonText>,
    bytes: usize,
    count: usize,
    is_unfinished: bool,
}

impl Walk {
    /// Goes on until the page is full, the walk ends, or a room comes of which other servers must be asked. Gives that room.
    fn go_on(&mut self, app: &App) -> Result<Option<Waiting>> {
        let snapshot = app.store.snapshot();
        while !self.is_unfinished
            && let Some(waiting) = self.waiting.pop()
        {
            if self.met.len() >= WALKED_MAX {
                break;
            }
            if !self.met.insert(waiting.id.clone()) {
                continue;
            }
            let Some((num, row)) = find_current(&snapshot, &waiting.id)? else {
                if waiting.is_inaccessible {
                    continue;
                }
                let is_space = |room: &Arc<Room>| room.summary.room_type == Some(RoomType::Space);
                match &waiting.hint {
                    Some(hint) if !is_space(hint) => {
                        let hint = Arc::clone(hint);
                        self.tell_hint(app, &hint)?;
                    }
                    // Nobody is asked only to learn whether there is another page.
                    _ if self.count >= self.end => self.is_unfinished = true,
                    _ => return Ok(Some(waiting)),
                }
                continue;
            };
            if !spaces::may_look(&*snapshot, num, &row, Asker::User(self.user))? {
                if waiting.depth == 0 {
                    return Err(hidden());
                }
                continue;
            }
            let children =
                spaces::list_children(&*snapshot, num, self.ask.suggested_only, &mut self.looked_at)?;
            let tell = || {
                let summary = spaces::summary(&*snapshot, app.rooms.descriptions(), num, &row)?;
                Ok(written(summary, Some(&children)))
            };
            if self.tell(tell)? {
                self.follow(waiting.depth, children.iter(), |_, _| {});
            }
        }
        Ok(None)
    }

    /// Tells a room, unless an earlier page did. Gives false where the page is full.
    fn tell(&mut self, write: impl FnOnce() -> Result<JsonText>) -> Result<bool> {
        if self.count >= self.end || self.bytes >= ANSWER_BYTES_MAX {
            self.is_unfinished = true;
            return Ok(false);
        }
        if self.count >= self.start {
            let room = write()?;
            self.bytes += room.as_str().len();
            self.told.push(room);
        }
        self.count += 1;
        Ok(true)
    }

    /// Has the walk go to the children of a room next.
    fn follow<'a>(
        &mut self,
        depth: u64,
        children: impl DoubleEndedIterator<Item = &'a Child>,
        know: impl Fn(&Child, &mut Waiting),
    ) {
        if depth >= self.depth_max {
            return;
        }
        for child in children.rev() {
            let mut waiting = Waiting::at(child.room_id.clone(), depth + 1);
            waiting.via.clone_from(&child.via);
            know(child, &mut waiting);
            self.waiting.push(waiting);
        }
    }

    /// Tells a room of which only the server of its parent told.
    fn tell_hint(&mut self, app: &App, hint: &Room) -> Result<()> {
        if spaces::may_look_abroad(&*app.store.snapshot(), self.user, &hint.summary)? {
            self.tell(|| Ok(written(hint.told.clone(), Some(&[]))))?;
        }
        Ok(())
    }

    /// Goes on at a room with what another server told of it.
    fn tell_abroad(&mut self, app: &App, waiting: &Waiting, told: Option<Arc<Told>>) -> Result<()> {
        let is_seen = match &told {
            Some(told) => spaces::may_look_abroad(&*app.store.snapshot(), self.user, &told.room.summary)?,
            None => false,
        };
        match told {
            Some(told) if is_seen => {
                if self.tell(|| Ok(written(told.room.told.clone(), Some(&told.children))))? {
                    self.follow(waiting.depth, told.children.iter(), |child, waiting| {
                        waiting.hint = told.rooms.get(&child.room_id).cloned();
                        waiting.is_inaccessible = told.inaccessible.contains(&child.room_id);
                    });
                }
                Ok(())
            }
            None if let Some(hint) = &waiting.hint => self.tell_hint(app, hint),
            _ if waiting.depth == 0 => Err(hidden()),
            _ => Ok(()),
        }
    }

    fn question(&self, app: &App, waiting: &Waiting) -> Question {
        let mut via = waiting.via.clone();
        // The server that made a room of the older versions stands in its id.
        if let Some(server) = waiting.id.server_name()
            && !via.iter().any(|known| known == server)
        {
            via.push(server.to_owned());
        }
        via.retain(|server| *server != app.config.server.name);
        Question { room_id: waiting.id.clone(), suggested_only: self.ask.suggested_only, via }
    }

    fn page(self) -> Result<Bytes> {
        let mut page = Object::new();
        if self.is_unfinished {
            page.text("next_batch", &format!("{}{}", self.count, self.ask.end()));
        }
        page.list("rooms", &self.told);
        Ok(page.finish().into())
    }
}

fn unknown() -> Error {
    Refusal::not_found("There is no such room, or you may not look at it.").into()
}

fn hidden() -> Error {
    Refusal::forbidden("You may not look at this room, or there is none.").into()
}
