//! Media that end: objects that nothing needs, URIs to which nobody uploads, files that were kept long enough, and what uploads have
//! left that broke off.

use std::sync::atomic::Ordering;

use crate::{
    env::Long,
    error::{Error, Result},
    flows::{
        App,
        jobs::{cancel, come_back},
        media::avatars,
        write,
    },
    ids::UserNum,
    media::{
        Name,
        items::{self, Deleted},
        objects::{self, Next, ObjectName},
        preview::rows::IMAGE_KEPT_MS,
    },
    schema::{
        jobs::Job,
        media::{Digest, ItemRow},
    },
    store::{
        Fault, Guard, Read,
        timer::{self, Timer},
    },
};

/// A round through all media begins this many milliseconds after the last one has ended.
const ROUND_EVERY_MS: u64 = 60 * 60 * 1000;
/// A round goes on after this many milliseconds, so that it disturbs nobody.
const GOES_ON_MS: u64 = 1_000;
/// A round looks at so many items at a time.
const ITEMS_AT_ONCE: usize = 500;
/// A part is thrown away if nobody has written to it for this many milliseconds: its upload has ended.
const PART_KEPT_MS: u64 = 24 * 60 * 60 * 1000;
/// This many items of a user who was erased are deleted before others have their turn.
const ERASED_AT_ONCE: usize = 100;
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// Throws away what uploads have left that were under way when the server ended, before `began_ms`.
pub(crate) async fn clear(app: &App, began_ms: u64) -> Result<()> {
    let blobs = app.media.blobs().clone();
    app.env.blocking_long(Long::Media, move || Ok(blobs.discard_before(began_ms)?)).await?;
    Ok(())
}

/// Has rounds begin, unless they have. Once they have, they go on for ever. It is called off the async threads.
pub(super) fn begin(app: &App) -> Result<()> {
    if app.media.0.is_tended.load(Ordering::Relaxed) {
        return Ok(());
    }
    if !timer::is_set(&app.store.view(), Job::TEND_MEDIA)? {
        let mut batch = app.store.batch(&Guard::own_tables());
        let job = Job::TendMedia { after: None };
        timer::set(&mut batch, &job.timer(app.env.now_ms().saturating_add(ROUND_EVERY_MS)));
        drop(app.store.enqueue(batch)?);
    }
    app.media.0.is_tended.store(true, Ordering::Relaxed);
    Ok(())
}

/// Removes the object of a blob, if nothing needs it and its time has come.
pub(crate) async fn tend_blob(app: &App, (digest, generation): (Digest, u32), timer: &Timer) -> Result<()> {
    // An object may have two timers. One that was slow must not remove what was put under the same name since the other one was done.
    let lock = app.media.removing(&digest);
    let _alone = lock.lock().await;
    let decide =
        move |app: &App, batch: &mut _| Ok(objects::tend(batch, (&digest, generation), app.env.now_ms())?);
    // Where it is to be removed, the batch that says so is durable by now.
    match write::for_server(app, decide, Error::from).await? {
        Next::Nothing => cancel(app, timer),
        Next::Later(due_ms) => come_back(app, timer, &Job::TendBlob { digest, generation }, due_ms),
        Next::Remove(from) => {
            let object = ObjectName { digest, generation, home: from.unwrap_or_default() };
            app.media.stores().remove(object, from).await?;
            let fired = timer.clone();
            let forget = move |_: &App, batch: &mut _| {
                objects::forget(batch, (&digest, generation))?;
                timer::cancel(batch, &fired);
                Ok(())
            };
            write::for_server(app, forget, Error::from).await
        }
    }
}

/// Ends a URI to which nobody has uploaded anything.
pub(crate) async fn end_unused(app: &App, user: UserNum, id: String, timer: &Timer) -> Result<()> {
    let name = Name { server: app.config.server.name.to_string(), id };
    let fired = timer.clone();
    let end = move |app: &App, batch: &mut _| {
        let now_ms = app.env.now_ms();
        let is_unused = items::find(batch, &name)?.is_some_and(|row| row.content.is_none());
        if is_unused {
            items::delete(batch, &name, Some(user), now_ms)?;
        }
        timer::cancel(batch, &fired);
        Ok(())
    };
    write::for_user_and_server(app, user, end, Error::from).await
}

/// Deletes media of a user who was erased, a part at a time.
pub(crate) async fn forget_all(app: &App, user: UserNum, timer: &Timer) -> Result<()> {
    let (snapshot, server) = (app.store.snapshot(), app.config.server.name.clone());
    let list =
        move || Ok(items::list_unprotected_of_user(&*snapshot, server.as_str(), user, ERASED_AT_ONCE)?);
    let names = app.env.blocking(list).await?;
    let is_last = names.len() < ERASED_AT_ONCE;
    for name in names {
        delete_of(app, &name, Some(user)).await?;
    }
    if is_last {
        return cancel(app, timer);
    }
    come_back(app, timer, &Job::ForgetMedia { user }, app.env.now_ms())
}

/// Goes on with a round through all media: deletes files that were kept long enough.
pub(crate) async fn tend_media(app: &App, after: Option<(String, String)>, timer: &Timer) -> Result<()> {
    let (now_ms, settings) = (app.env.now_ms(), &app.config.media);
    let (mut next, mut due_ms) = (None, now_ms.saturating_add(ROUND_EVERY_MS));
    if settings.local_kept_days > 0 || settings.remote_kept_days > 0 || settings.previews.enabled {
        let owned = app.clone();
        let look = move || {
            let after = after.map(|(server, id)| Name { server, id });
            let snapshot = owned.store.snapshot();
            let page = items::list_after(&*snapshot, after.as_ref(), ITEMS_AT_ONCE)?;
            let last =
                (page.len() == ITEMS_AT_ONCE).then(|| page.last().map(|(name, _)| name.clone())).flatten();
            let mut over = Vec::new();
            for (name, row) in page {
                if is_over(&owned, &*snapshot, &name, &row, now_ms)? {
                    over.push((name, row.by));
                }
            }
            avatars::spare(&*snapshot, &mut over, |(name, _)| name)?;
            Ok((over, last))
        };
        let (over, last) = app.env.blocking_long(Long::Media, look).await?;
        for (name, by) in over {
            tracing::debug!(uri = name.uri(), reason = "it was kept long enough", "media is deleted");
            delete_of(app, &name, by).await?;
        }
        if let Some(last) = last {
            (next, due_ms) = (Some((last.server, last.id)), now_ms.saturating_add(GOES_ON_MS));
        }
    }
    let blobs = app.media.blobs().clone();
    let before_ms = now_ms.saturating_sub(PART_KEPT_MS);
    app.env.blocking_long(Long::Media, move || Ok(blobs.discard_before(before_ms)?)).await?;
    come_back(app, timer, &Job::TendMedia { after: next }, due_ms)
}

/// Whether an item was kept long enough by the settings.
fn is_over(
    app: &App,
    read: &(impl Read + ?Sized),
    name: &Name,
    row: &ItemRow,
    now_ms: u64,
) -> Result<bool, Fault> {
    let settings = &app.config.media;
    let days = if row.by.is_some() { settings.local_kept_days } else { settings.remote_kept_days };
    // A file that is quarantined must not be fetched again.
    if row.is_protected || row.is_quarantined || row.content.is_none() {
        return Ok(false);
    }
    if row.is_preview {
        // Its preview takes it along, unless that was lost, as with a store that was restored.
        return Ok(now_ms >= row.at_ms.saturating_add(IMAGE_KEPT_MS));
    }
    if days == 0 {
        return Ok(false);
    }
    let seen_ms = items::find_seen(read, name)?.unwrap_or_default().max(row.at_ms);
    Ok(now_ms >= seen_ms.saturating_add(u64::from(days).saturating_mul(DAY_MS)))
}

/// Deletes an item with its thumbnails, whoever has it, unless it is protected.
pub(crate) async fn delete(app: &App, name: &Name) -> Result<Deleted> {
    match items::find(&*app.store.snapshot(), name)? {
        Some(row) => delete_of(app, name, row.by).await,
        None => Ok(Deleted::NoItem),
    }
}

async fn delete_of(app: &App, name: &Name, by: Option<UserNum>) -> Result<Deleted> {
    let name = name.clone();
    let delete = move |app: &App, batch: &mut _| Ok(items::delete(batch, &name, by, app.env.now_ms())?);
    match by {
        Some(user) => write::for_user_and_server(app, user, delete, Error::from).await,
        None => write::for_server(app, delete, Error::from).await,
    }
}
