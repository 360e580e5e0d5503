//! Walks through the rooms of a space, for clients and for other servers. Rooms that this server is not in are left out.

use std::{collections::HashSet, sync::Arc};

use bytes::Bytes;
use ruma::{OwnedRoomId, RoomId, ServerName};
use serde_json::{Map, Value};

use crate::{
    accounts::Caller,
    env::Long,
    error::{Error, Refusal, Result},
    flows::App,
    ids::RoomNum,
    json::{JsonText, Object},
    rooms::{
        self,
        spaces::{self, Asker, Child},
        vouch,
    },
    schema::rooms::RoomRow,
    store::{Fault, Snapshot},
};

/// An answer to a server has at most this many children.
const CHILDREN_MAX: usize = 1_000;
/// The rooms of an answer have at most this many bytes together; the last one may exceed it.
const ANSWER_BYTES_MAX: usize = 2 << 20;
/// A page has at most this many rooms, and as many if the client names no limit.
const PAGE_MAX: usize = 50;
/// A walk goes at most this many levels down.
const DEPTH_MAX: u64 = 20;
/// A walk through the rooms of a space ends after this many.
const WALKED_MAX: usize = 1_000;

/// A room that this server follows, of which it can say what it is.
fn find_current(snapshot: &Snapshot, id: &RoomId) -> Result<Option<(RoomNum, RoomRow)>, Fault> {
    let Some(num) = rooms::find_room(snapshot, id)? else { return Ok(None) };
    if !vouch::is_current(snapshot, num)? {
        return Ok(None);
    }
    Ok(rooms::find_row(snapshot, num)?.map(|row| (num, row)))
}

/// The description of a room, and the events by which it names its children, where those are told.
fn written(summary: Map<String, Value>, children: Option<&[Child]>) -> JsonText {
    let mut room = Object::new();
    if let Some(children) = children {
        room.list("children_state", children.iter().map(|child| &child.event));
    }
    for (name, value) in &summary {
        room.json(name, &JsonText::from(value));
    }
    room.finish()
}

/// Answers a server that asks for a space: the space, and those of its children that the server's users may enter or read.
/// Errors: 404 `M_NOT_FOUND` for a room that they may not enter or read, or that this server does not follow.
pub(crate) async fn for_server(
    app: &App,
    origin: &ServerName,
    room: &RoomId,
    suggested_only: bool,
) -> Result<Bytes> {
    let (owned, origin, room) = (app.clone(), origin.to_owned(), room.to_owned());
    let read = move || {
        let snapshot = owned.store.snapshot();
        let (asker, descriptions) = (Asker::Server(&origin), owned.rooms.descriptions());
        let unknown = || Error::from(Refusal::not_found("This server has no such room to tell of."));
        let (num, row) = find_current(&snapshot, &room)?.ok_or_else(unknown)?;
        if !spaces::may_look(&*snapshot, num, &row, asker)? {
            return Err(unknown());
        }
        let named = spaces::list_children(&*snapshot, num, suggested_only, &mut 0)?;
        let (mut children, mut inaccessible, mut bytes) = (Vec::new(), Vec::new(), 0);
        for child in named.iter().take(CHILDREN_MAX) {
            let Some((num, row)) = find_current(&snapshot, &child.room_id)? else { continue };
            if !spaces::may_look(&*snapshot, num, &row, asker)? {
                inaccessible.push(child.room_id.as_str());
            } else if bytes < ANSWER_BYTES_MAX {
                let child = written(spaces::summary(&*snapshot, descriptions, num, &row)?, None);
                bytes += child.as_str().len();
                children.push(child);
            }
        }
        let mut answer = Object::new();
        answer.list("children", &children);
        answer.texts("inaccessible_children", inaccessible);
        answer.json("room", &written(spaces::summary(&*snapshot, descriptions, num, &row)?, Some(&named)));
        Ok(answer.finish().into())
    };
    app.env.blocking_long(Long::Search, read).await
}

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

/// Gives a page of the rooms of a space that the caller may enter or read, depth first. Each room is told once. Errors: 403
/// `M_FORBIDDEN` for a space that they may not enter or read; 400 `M_INVALID_PARAM` for a token of another walk.
pub(crate) async fn for_client(app: &App, caller: &Caller, room: &RoomId, ask: Ask) -> Result<Bytes> {
    if ask.limit == Some(0) {
        return Err(Refusal::invalid_param("`limit` must be greater than 0.").into());
    }
    let start = ask.start()?;
    let (owned, user, room) = (app.clone(), caller.user, room.to_owned());
    let read = move || {
        let snapshot = owned.store.snapshot();
        let walk = Walk { app: &owned, snapshot: &snapshot, asker: Asker::User(user), ask: &ask };
        walk.page(room, start)
    };
    app.env.blocking_long(Long::Search, read).await
}

struct Walk<'a> {
    app: &'a App,
    snapshot: &'a Arc<Snapshot>,
    asker: Asker<'a>,
    ask: &'a Ask,
}

impl Walk<'_> {
    fn find(&self, id: &RoomId) -> Result<Option<(RoomNum, RoomRow)>> {
        let found = find_current(self.snapshot, id)?;
        let Some((num, row)) = found else { return Ok(None) };
        let may_look = spaces::may_look(&**self.snapshot, num, &row, self.asker)?;
        Ok(may_look.then_some((num, row)))
    }

    fn page(&self, space: OwnedRoomId, start: usize) -> Result<Bytes> {
        let hidden = || Error::from(Refusal::forbidden("You may not look at this room, or there is none."));
        self.find(&space)?.ok_or_else(hidden)?;
        let limit = self.ask.limit.and_then(|limit| usize::try_from(limit).ok());
        let end = start.saturating_add(limit.unwrap_or(PAGE_MAX).min(PAGE_MAX));
        let depth_max = self.ask.max_depth.unwrap_or(DEPTH_MAX).min(DEPTH_MAX);
        let (mut waiting, mut met) = (vec![(space, 0)], HashSet::new());
        let (mut told, mut bytes, mut count, mut next) = (Vec::new(), 0, 0, None);
        let mut looked_at = 0;
        while let Some((id, depth)) = waiting.pop() {
            if met.len() >= WALKED_MAX {
                break;
            }
            if !met.insert(id.clone()) {
                continue;
            }
            let Some((num, row)) = self.find(&id)? else { continue };
            if count >= end || bytes >= ANSWER_BYTES_MAX {
                next = Some(format!("{count}{}", self.ask.end()));
                break;
            }
            let suggested_only = self.ask.suggested_only;
            let children = spaces::list_children(&**self.snapshot, num, suggested_only, &mut looked_at)?;
            if count >= start {
                let summary = spaces::summary(&**self.snapshot, self.app.rooms.descriptions(), num, &row)?;
                let room = written(summary, Some(&children));
                bytes += room.as_str().len();
                told.push(room);
            }
            count += 1;
            if depth < depth_max {
                waiting.extend(children.into_iter().rev().map(|child| (child.room_id, depth + 1)));
            }
        }
        let mut page = Object::new();
        if let Some(next) = next {
            page.text("next_batch", &next);
        }
        page.list("rooms", &told);
        Ok(page.finish().into())
    }
}
