//! Making a preview: the page is asked for and read, what it says is chosen, and the row of it is written with its image, in one batch.

use url::Url;

use super::{
    fetch::{self, Found},
    image::{self, Image},
};
use crate::{
    error::{Error, Result},
    flows::{App, write},
    ids::UserNum,
    media::{
        Name, items,
        preview::{
            address, charset,
            choose::{self, Draft},
            oembed::Embed,
            page::Page,
            rows,
        },
    },
    schema::previews::{PreviewRow, Told},
    store::Batch,
};

/// The outcome of asking for a page.
enum Look {
    /// No preview can be made.
    Failed,
    /// The preview, with its image.
    Whole(Told, Option<Box<Image>>),
    /// The preview, without the image that it should have.
    WithoutImage(Told),
}

/// Asks for a page and writes what came of it, whether that is a preview or not. Errors: a fault of our own, or [`Error::Busy`], after
/// which nothing is written.
pub(super) async fn make(app: &App, by: UserNum, url: &Url) -> Result<PreviewRow> {
    // Somebody else may have had it made while this one waited for its place.
    let (owned, wanted) = (app.clone(), url.clone());
    let find = move || Ok(rows::find(&owned.store.view(), &wanted, None, owned.env.now_ms())?);
    if let Some(row) = app.env.blocking(find).await? {
        return Ok(row);
    }
    let look = look(app, url).await?;
    write(app, by, url, look).await
}

async fn look(app: &App, url: &Url) -> Result<Look> {
    let host = address::host(url);
    let found = match fetch::find(app, url, fetch::PAGES).await {
        Ok(found) => found,
        Err(why) => {
            tracing::debug!(host, %why, "no preview is made of a page");
            return Ok(Look::Failed);
        }
    };
    match found.kind().as_str() {
        "text/html" | "application/xhtml+xml" => look_at_page(app, found).await,
        kind if kind.starts_with("image/") => match image::take(app, found, true).await? {
            Some(image) => Ok(Look::Whole(Told::default(), Some(Box::new(image)))),
            None => Ok(Look::WithoutImage(Told::default())),
        },
        // There is nothing to say about files of other kinds.
        _ => Ok(Look::Whole(Told::default(), None)),
    }
}

async fn look_at_page(app: &App, found: Found) -> Result<Look> {
    let charset = found.charset();
    let Found { url, response } = found;
    let bytes = fetch::read_page(&app.env, response.into_body()).await;
    let page = app.env.blocking(move || Ok(Page::read(&charset::decode(&bytes, charset.as_deref())))).await?;
    let embed = match choose::find_oembed(&page, &url) {
        Some(beside) => fetch::description(app, &beside).await,
        None => None,
    };
    let choose = move || {
        let embed = embed.and_then(|bytes| Embed::read(&bytes));
        Ok(choose::choose(&page, embed.as_ref(), &url))
    };
    let Draft { told, images } = app.env.blocking(choose).await?;
    for candidate in &images {
        if let Some(image) = image::fetch(app, candidate).await? {
            return Ok(Look::Whole(told, Some(Box::new(image))));
        }
    }
    // An image that a page only shows is not missed.
    let misses = images.iter().any(|candidate| candidate.is_named);
    Ok(if misses { Look::WithoutImage(told) } else { Look::Whole(told, None) })
}

async fn write(app: &App, by: UserNum, url: &Url, look: Look) -> Result<PreviewRow> {
    let (told, image, lasts_ms) = match look {
        Look::Failed => (None, None, rows::FAILED_MS),
        Look::Whole(told, image) => (Some(told), image.map(|image| *image), rows::FRESH_MS),
        Look::WithoutImage(told) => (Some(told), None, rows::FAILED_MS),
    };
    let url = url.clone();
    let (image, put) = match image {
        Some(Image { row, content, put }) => (Some((row, content, put.object())), Some(put)),
        None => (None, None),
    };
    let build = move |app: &App, batch: &mut Batch| {
        let now_ms = app.env.now_ms();
        let server = app.config.server.name.as_str();
        let mut row =
            PreviewRow { url: url.to_string(), until_ms: now_ms.saturating_add(lasts_ms), told, image: None };
        let mut is_kept = true;
        if let Some((image, content, object)) = image {
            let name = Name { server: server.to_owned(), id: image.id.clone() };
            let at = (now_ms, app.config.media.unauthenticated);
            is_kept = items::keep_preview(batch, &name, (content, object), at)? == items::Kept::New;
            row.image = is_kept.then_some(image);
        }
        if !is_kept {
            row.until_ms = now_ms.saturating_add(rows::FAILED_MS);
        }
        app.previews.make_room(batch, server, ((rows::digest(&url), now_ms), &row), Some(by))?;
        Ok((row, is_kept))
    };
    let written = write::for_server(app, build, Error::from).await;
    let (row, is_kept) = written.inspect_err(|_| app.previews.doubt_kept())?;
    match put {
        Some(put) if is_kept => put.settle(),
        // Its bytes were being removed meanwhile, as when the disk took a day. The next look brings them again.
        Some(_) => {
            tracing::debug!(reason = "its bytes are being removed", "the image of a preview is left out")
        }
        None => {}
    }
    Ok(row)
}
