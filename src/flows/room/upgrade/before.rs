//! The room that replaces another one already. Whoever asks once more for the same, because the answer was lost or somebody else was
//! quicker, is given that room: a second one would be named by the tombstone, and the first one by the aliases.

use std::collections::BTreeSet;

use ruma::{OwnedRoomId, OwnedUserId, RoomVersionId, UserId};
use serde::Deserialize;

use crate::{
    error::{Refusal, Result},
    flows::account::carry_over,
    rooms::{self, policy::Author, power::Power, versions, view::RoomView},
    schema::{
        event_types::{CREATE, MEMBER, TOMBSTONE},
        rooms::Membership,
    },
    store::{Fault, Read},
};

/// The room that is asked for.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    version: u8,
    /// Its creators beside the one who makes it, in versions that have such.
    creators: BTreeSet<OwnedUserId>,
}

impl Wanted {
    /// The room that a request asks for. Errors: 400 `M_UNSUPPORTED_ROOM_VERSION`.
    pub(super) fn of(version: &RoomVersionId, creators: &[OwnedUserId]) -> Result<Self> {
        let (version, rules) = versions::require(version)?;
        let has_creators = rules.authorization.additional_room_creators;
        let creators = creators.iter().filter(|_| has_creators).cloned().collect();
        Ok(Self { version, creators })
    }
}

/// A tombstone of a room: its sender and its content.
pub(super) type Tombstone<'a> = (&'a str, &'a str);

/// Finds the room that replaces this one, as both of them say, if it is as it is wanted to be. It was made by whoever set the
/// tombstone and could still set it, so that nobody's word puts a room in the place of this one who could not do that anyway; and the
/// author is not banned from it.
///
/// Errors: 400 `M_INVALID_PARAM` where the one that is there is otherwise: the names of the old room are those of that one by now, and a
/// second one would be named by the tombstone alone.
pub(super) fn find(
    old: RoomView<'_, impl Read + ?Sized>,
    author: &Author,
    wanted: &Wanted,
    (ended_by, tombstone): Tombstone<'_>,
) -> Result<Option<OwnedRoomId>> {
    let read = old.read;
    let Some(id) = carry_over::replacement(tombstone) else { return Ok(None) };
    let Some(num) = rooms::find_room(read, &id)? else { return Ok(None) };
    let Some(row) = rooms::find_row(read, num)? else { return Ok(None) };
    let Some(create) = rooms::find_state(read, num, CREATE, "")? else { return Ok(None) };
    let replaces = carry_over::predecessor(create.row.content()).is_some_and(|named| named == old.row.id);
    if !replaces || create.row.sender() != ended_by || !row.resident.is_in() || row.joined == 0 {
        return Ok(None);
    }
    let Ok(maker) = <&UserId>::try_from(ended_by) else { return Ok(None) };
    let may_still = Power::read(old)?.may_send_state(maker, TOMBSTONE)? && !is_banned(old, maker)?;
    if !may_still || is_banned(RoomView { read, num, row: &row }, &author.user_id)? {
        return Ok(None);
    }
    if row.version == wanted.version && creators(create.row.content()) == wanted.creators {
        return Ok(Some(id));
    }
    let why = format!("The room was replaced by {id}, of version {}; replace that one.", row.version);
    Err(Refusal::invalid_param(why).into())
}

/// Whether a user is banned from a room.
fn is_banned(room: RoomView<'_, impl Read + ?Sized>, user: &UserId) -> Result<bool, Fault> {
    let member = rooms::find_state(room.read, room.num, MEMBER, user.as_str())?;
    Ok(member.and_then(|member| member.membership()) == Some(Membership::Ban))
}

/// The additional creators that a create event names.
fn creators(create: &str) -> BTreeSet<OwnedUserId> {
    #[derive(Deserialize)]
    struct Create {
        #[serde(default)]
        additional_creators: BTreeSet<OwnedUserId>,
    }
    serde_json::from_str(create).map(|create: Create| create.additional_creators).unwrap_or_default()
}
