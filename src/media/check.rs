//! Invariants of the rows of media, which `db check` verifies.

use crate::{
    ids::UserNum,
    media::{
        Name, is_id,
        items::{self, ORIGINAL},
    },
    schema::{
        self,
        jobs::Job,
        media::{BlobState, Digest, TotalRow, UsedRow},
    },
    store::{
        self, Direction, Fault, Snapshot,
        check::{Doubts, RowCheck},
        key::Json,
    },
};

/// The checks of items, of thumbnails, of the blobs that hold their bytes, and of links.
pub fn checks() -> Vec<RowCheck> {
    blobs().into_iter().chain(items()).chain(users()).chain(links()).collect()
}

fn blobs() -> [RowCheck; 3] {
    [
        RowCheck::of(&schema::MEDIA_BLOB, |read, digest, Json(row), doubts| {
            let refs = schema::MEDIA_REF.prefix::<([u8; 32],)>(read, (digest,), Direction::Up)?.next();
            let is_needed = refs.transpose()?.is_some();
            doubts.unless(
                is_needed == (row.state == BlobState::Live),
                "its state does not fit what refers to it",
            );
            doubts.unless(
                row.due_ms.is_some() == matches!(row.state, BlobState::Pending | BlobState::Dying),
                "its state does not fit its timer",
            );
            if let Some(due_ms) = row.due_ms {
                let job = Job::TendBlob { digest: Digest(*digest), generation: row.generation };
                doubts.unless(store::timer::is_waiting(read, &job.timer(due_ms))?, "its timer is gone");
            }
            doubts.unless(schema::MEDIA_TOTAL.contains(read, ())?, "it is not counted");
            Ok(())
        }),
        RowCheck::of(&schema::MEDIA_REF, |read, (digest, server, id, kind), (), doubts| {
            let of = match kind.as_str() {
                "" => {
                    let item = schema::MEDIA_ITEM.get(read, (server, id))?;
                    item.and_then(|Json(row)| row.content).map(|content| content.digest)
                }
                ORIGINAL => schema::MEDIA_ORIGINAL.get(read, (server, id))?.map(|Json(row)| row.digest),
                kind => {
                    let row = schema::MEDIA_THUMBNAIL.get(read, (server, id, kind))?;
                    row.map(|Json(row)| row.digest)
                }
            };
            doubts.unless(of == Some(Digest(*digest)), "no such item or thumbnail has these bytes");
            doubts.unless(schema::MEDIA_BLOB.contains(read, digest)?, "there is no such blob");
            Ok(())
        }),
        RowCheck::of(&schema::MEDIA_TOTAL, |read, (), Json(row), doubts| {
            let mut all = TotalRow::default();
            for blob in schema::MEDIA_BLOB.prefix::<()>(read, (), Direction::Up)? {
                all.blobs += 1;
                all.bytes += blob?.1.0.bytes;
            }
            doubts.unless(all == *row, format!("{row:?} is said to be there, and {all:?} is"));
            Ok(())
        }),
    ]
}

fn items() -> [RowCheck; 4] {
    [
        RowCheck::of(&schema::MEDIA_ITEM, |read, (server, id), Json(row), doubts| {
            doubts.unless(is_id(id), "this is no media id");
            if let Some(content) = &row.content {
                refers(read, (&content.digest, content.bytes), (server, id, ""), doubts)?;
            }
            if let Some(user) = row.by {
                let is_listed = schema::MEDIA_OF_USER.contains(read, (user, row.at_ms, id))?;
                doubts.unless(is_listed, "its user does not list it");
                doubts.unless(schema::MEDIA_USED.contains(read, user)?, "its user does not count it");
            }
            doubts.unless(!row.is_preview || row.by.is_none(), "it is the image of a preview, and a user's");
            doubts.unless(
                row.content.is_some() || row.expires_ms.is_some(),
                "it neither has bytes nor waits for some",
            );
            if let (Some(user), Some(expires_ms)) = (row.by, row.expires_ms) {
                let job = Job::EndUnused { user, id: id.clone() };
                doubts.unless(store::timer::is_waiting(read, &job.timer(expires_ms))?, "its timer is gone");
            }
            Ok(())
        }),
        RowCheck::of(&schema::MEDIA_THUMBNAIL, |read, (server, id, kind), Json(row), doubts| {
            refers(read, (&row.digest, row.bytes), (server, id, kind), doubts)?;
            doubts.unless(schema::MEDIA_ITEM.contains(read, (server, id))?, "its item is gone");
            Ok(())
        }),
        RowCheck::of(&schema::MEDIA_ORIGINAL, |read, (server, id), Json(row), doubts| {
            refers(read, (&row.digest, row.bytes), (server, id, ORIGINAL), doubts)?;
            doubts.unless(schema::MEDIA_ITEM.contains(read, (server, id))?, "its item is gone");
            Ok(())
        }),
        RowCheck::of(&schema::MEDIA_SEEN, |read, (server, id), _, doubts| {
            doubts.unless(schema::MEDIA_ITEM.contains(read, (server, id))?, "there is no such item");
            Ok(())
        }),
    ]
}

fn users() -> [RowCheck; 2] {
    [
        RowCheck::of(&schema::MEDIA_OF_USER, |read, (user, at_ms, id), (), doubts| {
            let own = schema::SERVER_FACTS.get(read, "server_name")?.unwrap_or_default();
            let name = Name { server: own, id: id.clone() };
            let row = super::items::find(read, &name)?;
            let is_it = row.is_some_and(|row| row.by == Some(*user) && row.at_ms == *at_ms);
            doubts.unless(is_it, "there is no such item of the user");
            Ok(())
        }),
        RowCheck::of(&schema::MEDIA_USED, |read, user, Json(row), doubts| {
            let own = schema::SERVER_FACTS.get(read, "server_name")?.unwrap_or_default();
            let mut used = UsedRow::default();
            for listed in schema::MEDIA_OF_USER.prefix::<(UserNum,)>(read, (*user,), Direction::Up)? {
                let ((_, _, id), ()) = listed?;
                let name = Name { server: own.clone(), id };
                let original = super::items::find_original(read, &name)?;
                used.bytes += original.map_or(0, |content| content.bytes);
                match super::items::find(read, &name)?.and_then(|row| row.content) {
                    Some(content) => {
                        used.items += 1;
                        used.bytes += items::charged(content.bytes);
                    }
                    None => used.created += 1,
                }
            }
            doubts.unless(used == *row, format!("{row:?} is said to be there, and {used:?} is"));
            doubts.unless(schema::USERS.contains(read, *user)?, "its account is gone");
            Ok(())
        }),
    ]
}

fn links() -> [RowCheck; 2] {
    [
        RowCheck::of(&schema::MEDIA_LINK, |read, hash, Json(row), doubts| {
            let listed = schema::MEDIA_LINK_OF_USER.get(read, (row.user, &row.id))?.map(|Json(hash)| hash);
            doubts.unless(listed == Some(Digest(*hash)), "the user of the link does not list it");
            let timer = super::links::job(row).timer(row.expires_ms);
            doubts.unless(store::timer::is_waiting(read, &timer)?, "the timer of the link is gone");
            Ok(())
        }),
        RowCheck::of(&schema::MEDIA_LINK_OF_USER, |read, (user, id), Json(hash), doubts| {
            let link = schema::MEDIA_LINK.get(read, &hash.0)?.map(|Json(row)| row);
            let is_it = link.is_some_and(|row| row.user == *user && row.id == *id);
            doubts.unless(is_it, "there is no such link of the user");
            Ok(())
        }),
    ]
}

/// Checks that an item or a thumbnail refers to its blob.
fn refers(
    read: &Snapshot,
    (digest, bytes): (&Digest, u64),
    (server, id, kind): (&str, &str, &str),
    doubts: &mut Doubts,
) -> Result<(), Fault> {
    let is_said = schema::MEDIA_REF.contains(read, (&digest.0, server, id, kind))?;
    doubts.unless(is_said, "it does not refer to its blob");
    let blob = schema::MEDIA_BLOB.get(read, &digest.0)?.map(|Json(row)| row);
    let is_whole = blob.is_some_and(|row| row.bytes == bytes && row.state == BlobState::Live);
    doubts.unless(is_whole, "its blob is gone, or has another length");
    Ok(())
}
