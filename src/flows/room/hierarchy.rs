//! Tells other servers of the rooms of a space. Rooms that this server is not in are left out.

use bytes::Bytes;
use ruma::{RoomId, ServerName};
use serde_json::{Map, Value};

use crate::{
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
pub(crate) const ANSWER_BYTES_MAX: usize = 2 << 20;

/// A room that this server follows, of which it can say what it is.
pub(crate) fn find_current(snapshot: &Snapshot, id: &RoomId) -> Result<Option<(RoomNum, RoomRow)>, Fault> {
    let Some(num) = rooms::find_room(snapshot, id)? else { return Ok(None) };
    if !vouch::is_current(snapshot, num)? {
        return Ok(None);
    }
    Ok(rooms::find_row(snapshot, num)?.map(|row| (num, row)))
}

/// The description of a room, and the events by which it names its children, where those are told.
pub(crate) fn written(summary: Map<String, Value>, children: Option<&[Child]>) -> JsonText {
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
