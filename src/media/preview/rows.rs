//! The rows of previews: which of them answers a request, and how they are written.
//!
//! A row is of one URL at one time. One that is not fresh any more is kept for a while, because clients ask for the preview of an old
//! message as it was at that time, and because they show its image.

use sha2::{Digest as _, Sha256};
use url::Url;

use crate::{
    json::Object,
    media::{Name, items},
    schema::{
        self,
        previews::{ImageRow, PreviewRow, Told},
    },
    store::{Batch, Direction, Fault, Read, key::Json},
};

/// A preview is told for this many milliseconds before its page is asked for again.
pub const FRESH_MS: u64 = 60 * 60 * 1_000;
/// That no preview could be made, or none with its image, is told for this many milliseconds.
pub const FAILED_MS: u64 = 5 * 60 * 1_000;
/// A preview is kept for this many milliseconds after it was fresh.
pub const KEPT_MS: u64 = 7 * 24 * 60 * 60 * 1_000;
/// An image that is older than this, in milliseconds, has lost the row of its preview: that is deleted within an hour after its time.
pub const IMAGE_KEPT_MS: u64 = FRESH_MS + KEPT_MS + 24 * 60 * 60 * 1_000;
/// At most this many rows of one URL are kept, because each look reads all of them.
pub const OF_URL_MAX: usize = 8;

/// The key of a row: the SHA-256 of its URL, and when the page was asked, in milliseconds since the epoch.
pub type Key = ([u8; 32], u64);

/// The first part of the key of each row of a URL.
pub fn digest(url: &Url) -> [u8; 32] {
    Sha256::digest(url.as_str().as_bytes()).into()
}

/// The row that answers a request for a URL now, by a client that wants the preview as it was at `ts_ms`, or as it is. None where the page
/// has to be asked.
pub fn find(
    read: &(impl Read + ?Sized),
    url: &Url,
    ts_ms: Option<u64>,
    now_ms: u64,
) -> Result<Option<PreviewRow>, Fault> {
    let mut rows = list(read, digest(url))?;
    // The clock may have gone back.
    let is_fresh = |((_, at_ms), row): &(Key, PreviewRow)| (*at_ms..row.until_ms).contains(&now_ms);
    let newest = rows.iter().position(is_fresh);
    // The row that is nearest among those of the time that was asked for.
    let as_of = ts_ms.filter(|ts_ms| *ts_ms <= now_ms).and_then(|ts_ms| {
        let is_of_then = |((_, at_ms), row): &&(Key, PreviewRow)| {
            row.told.is_some() && at_ms.saturating_sub(FRESH_MS) <= ts_ms && ts_ms < row.until_ms
        };
        let nearest = rows.iter().filter(is_of_then).min_by_key(|((_, at_ms), _)| at_ms.abs_diff(ts_ms))?;
        rows.iter().position(|row| row == nearest)
    });
    Ok(as_of.or(newest).map(|at| rows.swap_remove(at).1))
}

/// The rows of a URL, the newest first.
fn list(read: &(impl Read + ?Sized), digest: [u8; 32]) -> Result<Vec<(Key, PreviewRow)>, Fault> {
    let rows = schema::URL_PREVIEW.prefix::<([u8; 32],)>(read, (&digest,), Direction::Down)?;
    rows.map(|row| row.map(|(key, Json(row))| (key, row))).collect()
}

/// Until when a row is kept, in milliseconds since the epoch.
pub fn kept_until(row: &PreviewRow) -> u64 {
    if row.told.is_some() { row.until_ms.saturating_add(KEPT_MS) } else { row.until_ms }
}

/// The keys of all rows, and until when each is kept.
pub fn list_all(read: &(impl Read + ?Sized)) -> Result<Vec<(Key, u64)>, Fault> {
    let rows = schema::URL_PREVIEW.prefix::<()>(read, (), Direction::Up)?;
    rows.map(|row| row.map(|(key, Json(row))| (key, kept_until(&row)))).collect()
}

/// Writes a row, and deletes the oldest of its URL where there are too many. Answers the keys of those. The caller holds the server's lock.
pub fn put(batch: &mut Batch, server: &str, key: Key, row: &PreviewRow) -> Result<Vec<Key>, Fault> {
    let (digest, at_ms) = key;
    let others = list(batch, digest)?.into_iter().map(|(other, _)| other).filter(|other| *other != key);
    let excess: Vec<Key> = others.skip(OF_URL_MAX - 1).collect();
    for old in &excess {
        delete(batch, server, *old, at_ms)?;
    }
    schema::URL_PREVIEW.put(batch, (&digest, at_ms), &Json(row.clone()));
    Ok(excess)
}

/// Deletes a row and its image, unless an operator protects that. The caller holds the server's lock.
pub fn delete(batch: &mut Batch, server: &str, (digest, at_ms): Key, now_ms: u64) -> Result<(), Fault> {
    let Some(Json(row)) = schema::URL_PREVIEW.get(batch, (&digest, at_ms))? else { return Ok(()) };
    if let Some(name) = row.image.and_then(|image| Name::of(server, &image.id)) {
        // An image that is quarantined stays, so that it is not given again with the next preview.
        if !items::find(batch, &name)?.is_some_and(|item| item.is_quarantined) {
            items::delete(batch, &name, None, now_ms)?;
        }
    }
    schema::URL_PREVIEW.delete(batch, (&digest, at_ms));
    Ok(())
}

/// The preview as clients get it, if the row has one. The image is told while it is an item that is given to whoever asks.
pub fn answer(read: &(impl Read + ?Sized), server: &str, row: &PreviewRow) -> Result<Option<Object>, Fault> {
    let Some(told) = &row.told else { return Ok(None) };
    let image = row.image.as_ref().and_then(|image| Some((Name::of(server, &image.id)?, image)));
    let image = match image {
        Some((name, image)) => {
            let item = items::find(read, &name)?;
            let is_given = item.is_some_and(|item| item.content.is_some() && !item.is_quarantined);
            is_given.then_some((name, image))
        }
        None => None,
    };
    let mut answer = Object::new();
    write_told(told, image.is_some(), &mut answer);
    if let Some((name, image)) = image {
        write_image(&name, image, &mut answer);
    }
    Ok(Some(answer))
}

fn write_told(told: &Told, has_image: bool, to: &mut Object) {
    let alt = told.image_alt.as_ref().filter(|_| has_image);
    for (name, value) in [
        ("og:title", told.title.as_ref()),
        ("og:description", told.description.as_ref()),
        ("og:site_name", told.site.as_ref()),
        ("og:type", told.kind.as_ref()),
        ("og:url", told.url.as_ref()),
        ("og:locale", told.locale.as_ref()),
        ("og:image:alt", alt),
    ] {
        if let Some(value) = value {
            to.text(name, value);
        }
    }
}

fn write_image(name: &Name, image: &ImageRow, to: &mut Object) {
    to.text("og:image", &name.uri());
    to.text("og:image:type", &image.content_type);
    if let Some((width, height)) = image.size {
        to.number("og:image:width", width.into());
        to.number("og:image:height", height.into());
    }
    to.number("matrix:image:size", image.bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        media::preview::address,
        store::{Durability, Engine, Guard, Store, engine::Memory},
    };

    struct Scene {
        store: Store,
        url: Url,
    }

    impl Scene {
        fn new() -> Self {
            let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
            Self { store, url: address::parse("https://a.example/").unwrap() }
        }

        fn write<T>(&self, change: impl FnOnce(&mut Batch) -> T) -> T {
            let mut batch = self.store.batch(&Guard::alone());
            let answer = change(&mut batch);
            drop(self.store.enqueue(batch).unwrap());
            self.store.flush().unwrap();
            answer
        }

        fn put(&self, at_ms: u64, title: Option<&str>) -> Vec<u64> {
            let lasts = if title.is_some() { FRESH_MS } else { FAILED_MS };
            let told = title.map(|title| Told { title: Some(title.to_owned()), ..Told::default() });
            let row = PreviewRow { url: self.url.to_string(), until_ms: at_ms + lasts, told, image: None };
            let deleted =
                self.write(|batch| put(batch, "a.example", (digest(&self.url), at_ms), &row).unwrap());
            deleted.into_iter().map(|(_, at_ms)| at_ms).collect()
        }

        /// The title of what is found; `Some(None)` for a failure that is remembered.
        fn find(&self, ts_ms: Option<u64>, now_ms: u64) -> Option<Option<String>> {
            let row = find(&*self.store.snapshot(), &self.url, ts_ms, now_ms).unwrap();
            row.map(|row| row.told.and_then(|told| told.title))
        }
    }

    const DAY: u64 = 24 * 60 * 60 * 1_000;

    #[test]
    fn a_preview_is_told_while_it_is_fresh() {
        let scene = Scene::new();
        assert_eq!(scene.find(None, DAY), None);
        scene.put(DAY, Some("first"));
        let first = Some(Some("first".to_owned()));
        assert_eq!(scene.find(None, DAY), first);
        assert_eq!(scene.find(None, DAY + FRESH_MS - 1), first);
        assert_eq!(scene.find(None, DAY + FRESH_MS), None);
        assert_eq!(scene.find(None, DAY - 1), None, "the clock has gone back");
        scene.put(DAY + FRESH_MS, None);
        assert_eq!(scene.find(None, DAY + FRESH_MS), Some(None), "a failure is remembered");
        assert_eq!(scene.find(None, DAY + FRESH_MS + FAILED_MS), None);
        let other = address::parse("https://b.example/").unwrap();
        assert_eq!(find(&*scene.store.snapshot(), &other, None, DAY).unwrap(), None);
    }

    #[test]
    fn a_preview_of_an_earlier_time_is_told_as_it_was_then() {
        let scene = Scene::new();
        scene.put(DAY, Some("first"));
        scene.put(2 * DAY, Some("second"));
        scene.put(3 * DAY, None);
        let title = |ts_ms| scene.find(Some(ts_ms), 3 * DAY + 1);
        let some = |title: &str| Some(Some(title.to_owned()));
        assert_eq!(title(DAY), some("first"));
        assert_eq!(title(DAY + FRESH_MS - 1), some("first"));
        assert_eq!(
            title(DAY - FRESH_MS),
            some("first"),
            "the page was asked for the message an hour after it"
        );
        assert_eq!(title(2 * DAY - 1), some("second"));
        assert_eq!(title(DAY + FRESH_MS), Some(None), "nothing is known of then, so that the newest counts");
        assert_eq!(title(0), Some(None));
        assert_eq!(title(u64::MAX), Some(None), "a time that has not come is now");
        assert_eq!(scene.find(Some(0), 9 * DAY), None);
    }

    #[test]
    fn a_url_has_a_bounded_number_of_rows() {
        let scene = Scene::new();
        for number in 0..20 {
            let deleted = scene.put(DAY + number, Some("x"));
            let expected: Vec<u64> = (number >= 8).then(|| DAY + number - 8).into_iter().collect();
            assert_eq!(deleted, expected);
        }
        assert_eq!(scene.put(DAY + 19, Some("again")), [] as [u64; 0]);
        assert_eq!(list_all(&*scene.store.snapshot()).unwrap().len(), OF_URL_MAX);
        let first = (digest(&scene.url), DAY + 19);
        scene.write(|batch| delete(batch, "a.example", first, DAY).unwrap());
        scene.write(|batch| delete(batch, "a.example", first, DAY).unwrap());
        assert_eq!(list_all(&*scene.store.snapshot()).unwrap().len(), OF_URL_MAX - 1);
    }

    #[test]
    fn an_answer_holds_what_is_there_and_nothing_else() {
        let scene = Scene::new();
        let some = |text: &str| Some(text.to_owned());
        let told = Told { title: some("a\"b"), image_alt: some("alt"), ..Told::default() };
        let image = ImageRow {
            id: "x".to_owned(),
            content_type: "image/png".to_owned(),
            bytes: 5,
            size: Some((1, 2)),
        };
        let row = PreviewRow { url: String::new(), until_ms: 1, told: Some(told), image: Some(image) };
        let answer = |row: &PreviewRow| {
            let answer = answer(&*scene.store.snapshot(), "a.example", row).unwrap();
            answer.map(|answer| answer.finish().as_str().to_owned())
        };
        // The image is no item any more.
        assert_eq!(answer(&row).unwrap(), r#"{"og:title":"a\"b"}"#);
        assert_eq!(answer(&PreviewRow { told: Some(Told::default()), ..row.clone() }).unwrap(), "{}");
        assert_eq!(answer(&PreviewRow { told: None, ..row.clone() }), None);
        let mut object = Object::new();
        write_told(row.told.as_ref().unwrap(), true, &mut object);
        write_image(&Name::of("a.example", "x").unwrap(), row.image.as_ref().unwrap(), &mut object);
        assert_eq!(
            object.finish().as_str(),
            r#"{"og:title":"a\"b","og:image:alt":"alt","og:image":"mxc://a.example/x","og:image:type":"image/png","og:image:width":1,"og:image:height":2,"matrix:image:size":5}"#
        );
    }
}
