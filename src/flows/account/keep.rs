//! Stores the data that a user's clients keep here: account data, tags, filters.

use bytes::Bytes;
use ruma::{OwnedRoomId, RoomId};
use serde_json::{Map, Value};

use crate::{
    accounts::{Caller, account_data, filters, invites, openid},
    error::{Error, Refusal, Result},
    flows::{App, write},
    ids::UserNum,
    rooms::{self, members},
    schema::event_types::TAG,
    store::Read,
};

/// A room has at most this many tags, for they are one object of account data.
const TAGS_MAX: usize = 100;
/// A tag has at most this many bytes (the specification's bound).
const TAG_BYTES_MAX: usize = 255;

/// Stores account data, global or for a room. Errors: 403 `M_FORBIDDEN` for a room that the user was never in or invited to, 413
/// `M_TOO_LARGE`.
pub(crate) async fn keep_account_data(
    app: &App,
    caller: &Caller,
    room: Option<OwnedRoomId>,
    event_type: String,
    content: Bytes,
) -> Result<()> {
    let user = caller.user;
    if room.is_none() {
        invites::check_config(&event_type, &content)?;
    }
    write::for_caller(app, caller, move |_, batch| {
        if let Some(room) = &room {
            require_related(batch, user, room)?;
        }
        account_data::put(batch, user, room.as_deref(), &event_type, content)?;
        write::wake(batch, user);
        Ok(())
    })
    .await
}

/// Deletes account data, global or of a room (MSC3391). Clients learn it by an empty object. Nothing happens where there is none.
pub(crate) async fn delete_account_data(
    app: &App,
    caller: &Caller,
    room: Option<OwnedRoomId>,
    event_type: String,
) -> Result<()> {
    let user = caller.user;
    write::for_caller(app, caller, move |_, batch| {
        if account_data::find(batch, user, room.as_deref(), &event_type)?.is_some() {
            account_data::put(batch, user, room.as_deref(), &event_type, Bytes::from_static(b"{}"))?;
            write::wake(batch, user);
        }
        Ok(())
    })
    .await
}

/// Refuses rooms that the user was never in or invited to, or has forgotten: 403 `M_FORBIDDEN`. Unknown rooms are answered in
/// the same way, so that nobody learns which rooms there are.
fn require_related(read: &(impl Read + ?Sized), user: UserNum, room: &RoomId) -> Result<()> {
    let row = match rooms::find_room(read, room)? {
        Some(num) => members::find(read, user, num)?,
        None => None,
    };
    if row.is_some_and(|row| !row.forgotten) {
        return Ok(());
    }
    tracing::debug!(%user, %room, reason = "unrelated room", "account data is refused");
    Err(Refusal::forbidden("You can keep account data only for rooms that you are or were in.").into())
}

/// Sets a tag of a room, or deletes it if `info` is none. Errors: 400 for a tag that is too long, 403 for a room that the user
/// was never in or invited to, 413 for too many tags.
pub(crate) async fn change_tag(
    app: &App,
    caller: &Caller,
    room: OwnedRoomId,
    tag: String,
    info: Option<Value>,
) -> Result<()> {
    if tag.len() > TAG_BYTES_MAX {
        return Err(Refusal::invalid_param("A tag has at most 255 bytes.").into());
    }
    let user = caller.user;
    write::for_caller(app, caller, move |_, batch| {
        let before = account_data::find(batch, user, Some(&room), TAG)?;
        let mut content: Map<String, Value> = match &before {
            // A client may have written other JSON over the account data API; tags that cannot be read are replaced.
            Some(row) => serde_json::from_slice(&row.content).unwrap_or_default(),
            None => Map::new(),
        };
        let tags = content.entry("tags").or_insert_with(|| Value::Object(Map::new()));
        if !tags.is_object() {
            *tags = Value::Object(Map::new());
        }
        let Some(tags) = tags.as_object_mut() else { return Err(Error::broken("tags are an object")) };
        let changed = match info {
            Some(info) => {
                require_related(batch, user, &room)?;
                if tags.len() >= TAGS_MAX && !tags.contains_key(&tag) {
                    return Err(Refusal::too_large(format!("A room has at most {TAGS_MAX} tags.")).into());
                }
                tags.insert(tag, info.clone()).as_ref() != Some(&info)
            }
            None => tags.remove(&tag).is_some(),
        };
        if changed {
            let content = Value::Object(content).to_string().into();
            account_data::put(batch, user, Some(&room), TAG, content)?;
            write::wake(batch, user);
        }
        Ok(())
    })
    .await
}

/// Makes a token by which the caller shows another service who they are.
pub(crate) async fn make_openid_token(app: &App, caller: &Caller) -> Result<String> {
    let made_for = caller.clone();
    write::for_caller(app, caller, move |app, batch| Ok(openid::make(batch, &app.env, &made_for)?)).await
}

/// Stores a filter of the caller and answers its id.
pub(crate) async fn keep_filter(app: &App, caller: &Caller, json: Bytes) -> Result<String> {
    let user = caller.user;
    write::for_caller(app, caller, move |_, batch| filters::put(batch, user, json)).await
}
