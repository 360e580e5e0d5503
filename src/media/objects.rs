//! The states of blobs, so that no object is lost that something refers to, and none stays for ever that nothing does.
//!
//! Before an object is put where it belongs, its blob becomes *pending*, with a timer; once the object is there, the batch that first
//! refers to it makes it *live*. When the last reference goes, it is *dying* for an hour, and whoever brings the same bytes meanwhile
//! makes it live again. Then it is *removing*, which is never taken back: the same bytes are put under the name of a further
//! generation. So a crash between any two steps leaves a row that says what is there, and a timer that goes on.
//! Why: an object and a row cannot change in one step.
//!
//! An object lies on the disk or in a bucket, as its blob's row says. It *moves* as a further generation: that is reserved with a timer
//! which removes it, then copied, then one batch names it in the row and gives the old one a timer. So whatever ends in between, the row
//! names an object that is whole, and the other one is removed. In a bucket no name is given twice, because a request to remove an
//! object may arrive late there.

use std::ops::Bound;

use crate::{
    media::Name,
    schema::{
        self,
        jobs::Job,
        media::{BlobRow, BlobState, Digest, Home, TotalRow},
    },
    store::{Batch, Direction, Fault, Read, key::Json, timer},
};

/// A blob to which nothing refers though it was about to be is removed after this many milliseconds.
pub const PENDING_MS: u64 = 24 * 60 * 60 * 1000;
/// A blob whose last reference went is removed after this many milliseconds. Whoever reads it by then has opened its object.
pub const DYING_MS: u64 = 60 * 60 * 1000;
/// After a blob has moved, its former object stays for this many milliseconds, for those who have just looked where it lies.
pub const MOVED_MS: u64 = 30 * 60 * 1000;
/// An object of a bucket that is given up stays for this many milliseconds, so that the second is over whose name it has.
const SECOND_MS: u64 = 1_000;
/// An object of a bucket that is given up before the store has answered for it is removed after this many milliseconds: until then it may
/// still arrive.
const UNANSWERED_MS: u64 = 15 * 60 * 1000;

/// The object of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The SHA-256 of the bytes.
    pub digest: Digest,
    /// The generation of the blob.
    pub generation: u32,
    /// The place where it lies.
    pub home: Home,
}

impl ObjectName {
    /// The two folders and the name under which it lies, the same in all places.
    pub fn path(&self) -> [String; 3] {
        let digits = self.digest.to_string();
        let part = |from: usize| digits.get(from..from + 2).unwrap_or_default().to_owned();
        let folders = (part(0), part(2));
        let name = match self.generation {
            0 => digits,
            later => format!("{digits}.{later}"),
        };
        [folders.0, folders.1, name]
    }
}

/// The generation of an object that is about to be put somewhere, after those that there were.
fn next_generation(last: Option<u32>, home: Home, now_ms: u64) -> u32 {
    let next = last.map_or(0, |last| last.wrapping_add(1));
    match home {
        Home::Disk => next,
        // Between two lives of a blob are more than seconds, so that this is no name of an earlier one.
        Home::S3 => next.max(u32::try_from(now_ms / 1000).unwrap_or(u32::MAX)),
    }
}

/// A reference to a blob: an item, or a thumbnail of one.
#[derive(Clone, Copy, Debug)]
pub struct Reference<'a> {
    /// The item that refers to it.
    pub name: &'a Name,
    /// The kind of thumbnail; empty for the item itself, `original` for what it was made of.
    pub thumbnail: &'a str,
}

/// Finds the row of a blob.
pub fn find(read: &(impl Read + ?Sized), digest: &Digest) -> Result<Option<BlobRow>, Fault> {
    Ok(schema::MEDIA_BLOB.get(read, &digest.0)?.map(|Json(row)| row))
}

/// The object that holds the bytes of a blob now. None where it is not there, or not for much longer.
pub fn find_object(read: &(impl Read + ?Sized), digest: &Digest) -> Result<Option<ObjectName>, Fault> {
    let row = find(read, digest)?;
    Ok(row
        .filter(|row| matches!(row.state, BlobState::Live | BlobState::Dying))
        .map(|row| object_of(digest, &row)))
}

fn object_of(digest: &Digest, row: &BlobRow) -> ObjectName {
    ObjectName { digest: *digest, generation: row.generation, home: row.home }
}

/// Whether an item that comes with these bytes is quarantined. Those that had them before are not: anybody can bring what others have, and
/// must not have it taken from them by that.
pub fn is_quarantined(read: &(impl Read + ?Sized), digest: &Digest) -> Result<bool, Fault> {
    Ok(find(read, digest)?.is_some_and(|row| row.is_quarantined))
}

/// Notes whether items that come with these bytes are quarantined. The caller holds the server's lock.
pub fn quarantine(batch: &mut Batch, digest: &Digest, is_quarantined: bool) -> Result<(), Fault> {
    if let Some(row) = find(batch, digest)? {
        schema::MEDIA_BLOB.put(batch, &digest.0, &Json(BlobRow { is_quarantined, ..row }));
    }
    Ok(())
}

/// How much all blobs take.
pub fn total(read: &(impl Read + ?Sized)) -> Result<TotalRow, Fault> {
    Ok(schema::MEDIA_TOTAL.get(read, ())?.map(|Json(row)| row).unwrap_or_default())
}

/// Announces that the object of these bytes is about to be put where it belongs, which is `home` for bytes that are new. Answers its
/// name. The caller holds the server's lock, puts the object there once the batch is durable, and refers to it after that.
pub fn claim(
    batch: &mut Batch,
    digest: &Digest,
    bytes: u64,
    (now_ms, home): (u64, Home),
) -> Result<ObjectName, Fault> {
    let before = find(batch, digest)?;
    let due_ms = now_ms.saturating_add(PENDING_MS);
    let row = match before {
        // Its object is there, or about to be: another one that brings the same bytes changes nothing. Where nothing refers to it yet,
        // it is given time anew.
        Some(row @ BlobRow { state: BlobState::Live, .. }) => return Ok(object_of(digest, &row)),
        Some(row @ BlobRow { state: BlobState::Pending | BlobState::Dying, .. }) => {
            cancel(batch, digest, &row);
            BlobRow { state: row.state, due_ms: Some(due_ms), ..row }
        }
        // The timer of the object that is being removed goes on.
        Some(row @ BlobRow { state: BlobState::Removing, .. }) => BlobRow {
            state: BlobState::Pending,
            generation: next_generation(Some(row.generation.max(row.reserved)), home, now_ms),
            bytes,
            due_ms: Some(due_ms),
            home,
            reserved: row.reserved,
            is_quarantined: row.is_quarantined,
        },
        None => {
            let total = total(batch)?;
            put_total(batch, total.blobs.saturating_add(1), total.bytes.saturating_add(bytes));
            let generation = next_generation(None, home, now_ms);
            BlobRow { due_ms: Some(due_ms), ..pending(generation, home, bytes) }
        }
    };
    let name = object_of(digest, &row);
    timer::set(batch, &job(name).timer(due_ms));
    schema::MEDIA_BLOB.put(batch, &digest.0, &Json(row));
    Ok(name)
}

/// Refers to an object that is where it belongs. Answers `false`, and writes nothing, where the object is being removed meanwhile:
/// then the bytes must be put there again. The caller holds the server's lock.
pub fn refer(batch: &mut Batch, object: ObjectName, by: Reference<'_>) -> Result<bool, Fault> {
    let ObjectName { digest, generation, .. } = object;
    let Some(row) = find(batch, &digest)?.filter(|row| row.generation == generation) else {
        return Ok(false);
    };
    match row.state {
        BlobState::Removing => return Ok(false),
        BlobState::Live => {}
        BlobState::Pending | BlobState::Dying => {
            cancel(batch, &digest, &row);
            schema::MEDIA_BLOB.put(
                batch,
                &digest.0,
                &Json(BlobRow { state: BlobState::Live, due_ms: None, ..row }),
            );
        }
    }
    let Name { server, id } = by.name;
    schema::MEDIA_REF.put(batch, (&digest.0, server, id, by.thumbnail), &());
    Ok(true)
}

/// The row of a blob whose object is about to be put somewhere for the first time, and has no timer yet.
fn pending(generation: u32, home: Home, bytes: u64) -> BlobRow {
    let state = BlobState::Pending;
    BlobRow { state, generation, bytes, due_ms: None, is_quarantined: false, home, reserved: 0 }
}

/// When an object is removed that is given up now: milliseconds since the epoch. `is_put` says that its place has answered for it.
pub fn give_up_due_ms(home: Home, is_put: bool, now_ms: u64) -> u64 {
    now_ms.saturating_add(match (home, is_put) {
        (Home::Disk, _) => 0,
        (Home::S3, true) => SECOND_MS,
        (Home::S3, false) => UNANSWERED_MS,
    })
}

/// Gives up an object of so many bytes that was put where it belongs, unless something refers to it: a timer removes it at `due_ms`. It does
/// so in any state, because another claim may have begun to count on the object meanwhile, or an earlier removal ended before it was put.
/// The caller holds the server's lock.
pub fn give_up(batch: &mut Batch, object: ObjectName, bytes: u64, due_ms: u64) -> Result<(), Fault> {
    let ObjectName { digest, generation, home } = object;
    let row = match find(batch, &digest)? {
        Some(row) if row.generation != generation => {
            // Where the blob has moved, the former object stays for those who have just looked where it lies.
            let spared_ms = if row.state == BlobState::Live { MOVED_MS } else { 0 };
            timer::set(batch, &job(object).timer(due_ms.saturating_add(spared_ms)));
            return Ok(());
        }
        Some(BlobRow { state: BlobState::Live | BlobState::Dying, .. }) => return Ok(()),
        Some(BlobRow { state: BlobState::Removing, .. }) => None,
        Some(row @ BlobRow { state: BlobState::Pending, .. }) => {
            cancel(batch, &digest, &row);
            Some(row)
        }
        None => {
            let total = total(batch)?;
            put_total(batch, total.blobs.saturating_add(1), total.bytes.saturating_add(bytes));
            Some(pending(generation, home, bytes))
        }
    };
    if let Some(row) = row {
        schema::MEDIA_BLOB.put(batch, &digest.0, &Json(BlobRow { due_ms: Some(due_ms), ..row }));
    }
    timer::set(batch, &job(object).timer(due_ms));
    Ok(())
}

/// Takes a reference back. The blob begins to die with its last one. The caller holds the server's lock.
pub fn release(batch: &mut Batch, digest: &Digest, by: Reference<'_>, now_ms: u64) -> Result<(), Fault> {
    let Name { server, id } = by.name;
    schema::MEDIA_REF.delete(batch, (&digest.0, server, id, by.thumbnail));
    let is_needed = schema::MEDIA_REF
        .prefix::<([u8; 32],)>(batch, (&digest.0,), Direction::Up)?
        .next()
        .transpose()?
        .is_some();
    let Some(row) = find(batch, digest)?.filter(|row| row.state == BlobState::Live && !is_needed) else {
        return Ok(());
    };
    let due_ms = now_ms.saturating_add(DYING_MS);
    timer::set(batch, &job(object_of(digest, &row)).timer(due_ms));
    let row = BlobRow { state: BlobState::Dying, due_ms: Some(due_ms), ..row };
    schema::MEDIA_BLOB.put(batch, &digest.0, &Json(row));
    Ok(())
}

/// The next step for an object whose timer is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Something needs it, or it is gone.
    Nothing,
    /// Its time has not come.
    Later(u64),
    /// It is to be removed from this place, or from wherever it may lie, and nobody counts on it any more.
    Remove(Option<Home>),
}

/// Decides on the object of this generation, whose timer is due. Where it is to be removed, the batch says so, and it is removed once
/// that is durable. The caller holds the server's lock.
pub fn tend(batch: &mut Batch, (digest, generation): (&Digest, u32), now_ms: u64) -> Result<Next, Fault> {
    let Some(row) = find(batch, digest)? else {
        // A copy may be left of a move that broke off. The first generation is no copy, and comes again with the same bytes.
        return Ok(if generation == 0 { Next::Nothing } else { Next::Remove(None) });
    };
    if row.generation != generation {
        // Only an object that was being removed, or has moved, is followed by one of another generation; and a copy that has an earlier
        // or a later one is of a move that broke off.
        return Ok(Next::Remove(None));
    }
    match (row.state, row.due_ms) {
        (BlobState::Live, _) => Ok(Next::Nothing),
        (BlobState::Removing, _) => Ok(Next::Remove(Some(row.home))),
        (BlobState::Pending | BlobState::Dying, Some(due_ms)) if due_ms > now_ms => Ok(Next::Later(due_ms)),
        (BlobState::Pending | BlobState::Dying, _) => {
            let row = BlobRow { state: BlobState::Removing, due_ms: None, ..row };
            schema::MEDIA_BLOB.put(batch, &digest.0, &Json(row.clone()));
            Ok(Next::Remove(Some(row.home)))
        }
    }
}

/// Forgets an object that was removed. The caller holds the server's lock.
pub fn forget(batch: &mut Batch, (digest, generation): (&Digest, u32)) -> Result<(), Fault> {
    let row = find(batch, digest)?;
    let row = row.filter(|row| row.generation == generation && row.state == BlobState::Removing);
    if let Some(row) = row {
        schema::MEDIA_BLOB.delete(batch, &digest.0);
        let total = total(batch)?;
        put_total(batch, total.blobs.saturating_sub(1), total.bytes.saturating_sub(row.bytes));
    }
    Ok(())
}

/// A move of a live blob that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moving {
    /// The object that the blob has.
    pub from: ObjectName,
    /// The object that its bytes are copied to.
    pub to: ObjectName,
    /// The number of the bytes.
    pub bytes: u64,
    /// The copy is removed then, unless the blob has moved by then: milliseconds since the epoch.
    pub due_ms: u64,
}

/// Announces that the object of a blob is about to be copied to another place. None where the blob is there, or does not live. The
/// caller holds the server's lock, copies the object once the batch is durable, and calls [`end_move`] after that.
pub fn begin_move(
    batch: &mut Batch,
    digest: &Digest,
    to: Home,
    now_ms: u64,
) -> Result<Option<Moving>, Fault> {
    let row = find(batch, digest)?.filter(|row| row.state == BlobState::Live && row.home != to);
    let Some(row) = row else { return Ok(None) };
    let reserved = next_generation(Some(row.generation.max(row.reserved)), to, now_ms);
    let due_ms = now_ms.saturating_add(PENDING_MS);
    let (from, bytes) = (object_of(digest, &row), row.bytes);
    let to = ObjectName { digest: *digest, generation: reserved, home: to };
    timer::set(batch, &job(to).timer(due_ms));
    schema::MEDIA_BLOB.put(batch, &digest.0, &Json(BlobRow { reserved, ..row }));
    Ok(Some(Moving { from, to, bytes, due_ms }))
}

/// Has a blob lie where its object was copied to. Answers `false`, and writes nothing, where the blob died meanwhile, or the copy was
/// given up: then a timer removes the copy. The caller holds the server's lock.
pub fn end_move(batch: &mut Batch, moving: &Moving, now_ms: u64) -> Result<bool, Fault> {
    let Moving { from, to, due_ms, .. } = moving;
    let row = find(batch, &from.digest)?;
    let row = row.filter(|row| row.state == BlobState::Live && row.generation == from.generation);
    let is_kept = now_ms < *due_ms && timer::is_waiting(batch, &job(*to).timer(*due_ms))?;
    let Some(row) = row.filter(|_| is_kept) else { return Ok(false) };
    timer::cancel(batch, &job(*to).timer(*due_ms));
    timer::set(batch, &job(*from).timer(now_ms.saturating_add(MOVED_MS)));
    let row = BlobRow { generation: to.generation, home: to.home, ..row };
    schema::MEDIA_BLOB.put(batch, &from.digest.0, &Json(row));
    Ok(true)
}

/// Lists blobs in the order of their digests, after one, at most so many.
pub fn list_after(
    read: &(impl Read + ?Sized),
    after: Option<Digest>,
    blobs_max: usize,
) -> Result<Vec<(Digest, BlobRow)>, Fault> {
    let low = after.as_ref().map_or(Bound::Unbounded, |digest| Bound::Excluded(&digest.0));
    let rows = schema::MEDIA_BLOB.range::<[u8; 32]>(read, low, Bound::Unbounded, Direction::Up)?;
    rows.take(blobs_max).map(|row| row.map(|(digest, Json(row))| (Digest(digest), row))).collect()
}

fn put_total(batch: &mut Batch, blobs: u64, bytes: u64) {
    schema::MEDIA_TOTAL.put(batch, (), &Json(TotalRow { blobs, bytes }));
}

fn job(object: ObjectName) -> Job {
    Job::TendBlob { digest: object.digest, generation: object.generation }
}

fn cancel(batch: &mut Batch, digest: &Digest, row: &BlobRow) {
    if let Some(due_ms) = row.due_ms {
        timer::cancel(batch, &job(object_of(digest, row)).timer(due_ms));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    const DIGEST: Digest = Digest([7; 32]);
    const HERE: Next = Next::Remove(Some(Home::Disk));

    struct Scene {
        store: Store,
        first: Name,
        second: Name,
    }

    impl Scene {
        fn new() -> Self {
            let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
            let name = |id| Name::of("a.example", id).unwrap();
            Self { store, first: name("1"), second: name("2") }
        }

        fn write<T>(&self, change: impl FnOnce(&mut Batch) -> T) -> T {
            let mut batch = self.store.batch(&Guard::alone());
            let answer = change(&mut batch);
            drop(self.store.enqueue(batch).unwrap());
            self.store.flush().unwrap();
            answer
        }

        fn refer(&self, object: ObjectName, name: &Name) -> bool {
            self.write(|batch| refer(batch, object, Reference { name, thumbnail: "" }).unwrap())
        }

        fn release(&self, name: &Name, now_ms: u64) {
            self.write(|batch| release(batch, &DIGEST, Reference { name, thumbnail: "" }, now_ms).unwrap());
        }

        fn claim(&self, now_ms: u64) -> ObjectName {
            self.write(|batch| claim(batch, &DIGEST, 10, (now_ms, Home::Disk)).unwrap())
        }

        fn tend(&self, object: ObjectName, now_ms: u64) -> Next {
            self.write(|batch| tend(batch, (&DIGEST, object.generation), now_ms).unwrap())
        }

        fn state(&self) -> Option<BlobState> {
            find(&*self.store.snapshot(), &DIGEST).unwrap().map(|row| row.state)
        }

        fn timers(&self) -> usize {
            timer::list_due(&*self.store.snapshot(), u64::MAX, 99, |_| true).unwrap().len()
        }

        fn total(&self) -> (u64, u64) {
            let total = total(&*self.store.snapshot()).unwrap();
            (total.blobs, total.bytes)
        }
    }

    #[test]
    fn a_blob_lives_as_long_as_something_refers_to_it_and_dies_an_hour_after() {
        let scene = Scene::new();
        let object = scene.claim(0);
        assert_eq!((scene.state(), scene.timers(), scene.total()), (Some(BlobState::Pending), 1, (1, 10)));
        assert_eq!(find_object(&*scene.store.snapshot(), &DIGEST).unwrap(), None);
        assert!(scene.refer(object, &scene.first));
        assert_eq!((scene.state(), scene.timers()), (Some(BlobState::Live), 0));
        assert_eq!(scene.claim(1), object, "the same bytes are there");
        assert!(scene.refer(object, &scene.second));
        scene.release(&scene.first, 5);
        assert_eq!((scene.state(), scene.timers()), (Some(BlobState::Live), 0), "another one needs it");
        scene.release(&scene.second, 5);
        assert_eq!((scene.state(), scene.timers()), (Some(BlobState::Dying), 1));
        assert_eq!(find_object(&*scene.store.snapshot(), &DIGEST).unwrap(), Some(object));
        assert_eq!(scene.tend(object, 5 + DYING_MS - 1), Next::Later(5 + DYING_MS));
        assert_eq!(scene.tend(object, 5 + DYING_MS), HERE);
        assert_eq!(scene.state(), Some(BlobState::Removing));
        assert_eq!(scene.tend(object, 0), HERE, "after a crash, it is removed again");
        scene.write(|batch| forget(batch, (&DIGEST, object.generation)).unwrap());
        assert_eq!((scene.state(), scene.total()), (None, (0, 0)));
        assert_eq!(scene.tend(object, u64::MAX), Next::Nothing);
    }

    #[test]
    fn the_same_bytes_revive_a_dying_blob() {
        let scene = Scene::new();
        let object = scene.claim(0);
        assert!(scene.refer(object, &scene.first));
        scene.release(&scene.first, 0);
        assert_eq!(scene.claim(10), object);
        assert_eq!(
            scene.tend(object, DYING_MS),
            Next::Later(10 + PENDING_MS),
            "somebody is about to need it"
        );
        assert!(scene.refer(object, &scene.second));
        assert_eq!((scene.state(), scene.timers()), (Some(BlobState::Live), 0));
        assert_eq!(scene.tend(object, u64::MAX), Next::Nothing);
    }

    #[test]
    fn what_is_being_removed_is_never_counted_on_again() {
        let scene = Scene::new();
        let old = scene.claim(0);
        assert_eq!(scene.tend(old, PENDING_MS), HERE);
        assert!(!scene.refer(old, &scene.first), "its object may be gone");
        let new = scene.claim(PENDING_MS);
        assert_eq!(new.generation, old.generation + 1);
        assert!(!scene.refer(old, &scene.first) && scene.refer(new, &scene.first));
        assert_eq!(scene.tend(old, u64::MAX), Next::Remove(None));
        scene.write(|batch| forget(batch, (&DIGEST, old.generation)).unwrap());
        assert_eq!((scene.state(), scene.total()), (Some(BlobState::Live), (1, 10)));
    }

    #[test]
    fn an_object_that_is_given_up_is_removed_at_once_unless_something_needs_it() {
        let scene = Scene::new();
        let give_up =
            |object, now_ms| scene.write(|batch| super::give_up(batch, object, 10, now_ms).unwrap());
        let object = scene.claim(0);
        give_up(object, 7);
        assert_eq!((scene.state(), scene.timers()), (Some(BlobState::Pending), 1));
        assert_eq!(scene.tend(object, 7), HERE);
        // It is put there again after it was removed, by whoever was slow, and must go again.
        give_up(object, 8);
        assert_eq!(scene.tend(object, 8), HERE);
        scene.write(|batch| forget(batch, (&DIGEST, object.generation)).unwrap());
        give_up(object, 9);
        assert_eq!((scene.state(), scene.total()), (Some(BlobState::Pending), (1, 10)));
        // Another one brings the same bytes meanwhile.
        assert_eq!(scene.claim(9), object);
        assert!(scene.refer(object, &scene.first));
        give_up(object, 10);
        assert_eq!((scene.state(), scene.tend(object, u64::MAX)), (Some(BlobState::Live), Next::Nothing));
    }

    #[test]
    fn an_object_that_is_given_up_after_its_blob_has_moved_stays_for_those_who_look_at_it() {
        let scene = Scene::new();
        let object = scene.claim(0);
        assert!(scene.refer(object, &scene.first));
        scene.write(|batch| quarantine(batch, &DIGEST, true).unwrap());
        let moving = scene.begin_move(Home::S3, 0).unwrap();
        assert!(scene.end_move(&moving, 0));
        assert!(is_quarantined(&*scene.store.snapshot(), &DIGEST).unwrap(), "its bytes are the same");
        assert!(!scene.refer(object, &scene.second));
        scene.write(|batch| super::give_up(batch, object, 10, 5).unwrap());
        let due = timer::list_due(&*scene.store.snapshot(), u64::MAX, 99, |_| true).unwrap();
        let due: Vec<_> = due.iter().map(|timer| timer.due_ms).collect();
        assert_eq!(due, [MOVED_MS, 5 + MOVED_MS]);
        assert_eq!((scene.object(), scene.state()), (moving.to, Some(BlobState::Live)));
    }

    #[test]
    fn an_object_of_a_bucket_that_is_given_up_leaves_its_name_to_nobody() {
        let scene = Scene::new();
        let claim = |now_ms| scene.write(|batch| claim(batch, &DIGEST, 10, (now_ms, Home::S3)).unwrap());
        let object = claim(1_700_000_000_000);
        assert_eq!(give_up_due_ms(Home::Disk, false, 7), 7);
        let due_ms = give_up_due_ms(Home::S3, true, 1_700_000_000_000);
        scene.write(|batch| super::give_up(batch, object, 10, due_ms).unwrap());
        assert_eq!(scene.tend(object, due_ms - 1), Next::Later(due_ms));
        assert_eq!(scene.tend(object, due_ms), Next::Remove(Some(Home::S3)));
        scene.write(|batch| forget(batch, (&DIGEST, object.generation)).unwrap());
        assert_eq!(claim(due_ms).generation, object.generation + 1);
        assert!(give_up_due_ms(Home::S3, false, 0) > 10 * 60 * 1000, "it may still arrive");
    }

    #[test]
    fn whoever_never_comes_back_leaves_nothing() {
        let scene = Scene::new();
        let object = scene.claim(0);
        assert_eq!(scene.claim(5), object, "two bring the same bytes at once");
        assert_eq!(scene.timers(), 1);
        assert_eq!(scene.tend(object, PENDING_MS), Next::Later(5 + PENDING_MS));
        assert_eq!(scene.tend(object, 5 + PENDING_MS), HERE);
    }

    impl Scene {
        fn begin_move(&self, to: Home, now_ms: u64) -> Option<Moving> {
            self.write(|batch| begin_move(batch, &DIGEST, to, now_ms).unwrap())
        }

        fn end_move(&self, moving: &Moving, now_ms: u64) -> bool {
            self.write(|batch| end_move(batch, moving, now_ms).unwrap())
        }

        fn object(&self) -> ObjectName {
            find_object(&*self.store.snapshot(), &DIGEST).unwrap().unwrap()
        }

        fn tend_both(&self, moving: &Moving, now_ms: u64) -> (Next, Next) {
            (self.tend(moving.from, now_ms), self.tend(moving.to, now_ms))
        }
    }

    #[test]
    fn a_blob_moves_as_a_further_generation_and_back() {
        let scene = Scene::new();
        let object = scene.claim(0);
        assert_eq!(scene.begin_move(Home::S3, 0), None, "nothing refers to it yet");
        assert!(scene.refer(object, &scene.first));
        assert_eq!(scene.begin_move(Home::Disk, 0), None, "it is there");
        let now_ms = 1_700_000_000_000;
        let moving = scene.begin_move(Home::S3, now_ms).unwrap();
        assert_eq!((moving.from, moving.bytes, scene.object()), (object, 10, object));
        assert_eq!((moving.to.home, moving.to.generation), (Home::S3, 1_700_000_000));
        assert!(scene.end_move(&moving, now_ms));
        assert_eq!((scene.object(), scene.timers(), scene.total()), (moving.to, 1, (1, 10)));
        assert_eq!(scene.tend_both(&moving, now_ms + MOVED_MS), (Next::Remove(None), Next::Nothing));
        assert!(!scene.end_move(&moving, now_ms), "it has moved");
        let back = scene.begin_move(Home::Disk, now_ms).unwrap();
        assert_eq!((back.from, back.to.generation), (moving.to, moving.to.generation + 1));
        assert!(scene.end_move(&back, now_ms));
        assert_eq!(scene.object(), back.to);
    }

    #[test]
    fn a_move_that_breaks_off_leaves_the_blob_where_it_is() {
        let scene = Scene::new();
        let object = scene.claim(0);
        assert!(scene.refer(object, &scene.first));
        let broken_off = scene.begin_move(Home::S3, 0).unwrap();
        let again = scene.begin_move(Home::S3, 0).unwrap();
        assert_ne!(again.to.generation, broken_off.to.generation, "no copy goes over another");
        assert!(!scene.end_move(&broken_off, broken_off.due_ms), "its copy may be gone");
        assert!(scene.end_move(&again, 5));
        assert_eq!(scene.tend_both(&broken_off, PENDING_MS), (Next::Remove(None), Next::Remove(None)));
        assert_eq!(scene.object(), again.to);
    }

    #[test]
    fn a_blob_that_dies_while_it_moves_stays_dead_and_its_copy_goes() {
        let scene = Scene::new();
        let object = scene.claim(0);
        assert!(scene.refer(object, &scene.first));
        let moving = scene.begin_move(Home::S3, 0).unwrap();
        scene.release(&scene.first, 0);
        assert!(!scene.end_move(&moving, 1));
        assert_eq!(scene.tend(object, DYING_MS), HERE);
        let new = scene.claim(DYING_MS);
        assert!(new.generation > moving.to.generation, "the name of a copy is not given again");
        assert!(scene.refer(new, &scene.first));
        assert!(!scene.end_move(&moving, DYING_MS));
        assert_eq!(scene.tend_both(&moving, PENDING_MS), (Next::Remove(None), Next::Remove(None)));
        assert_eq!(scene.tend(new, u64::MAX), Next::Nothing);
    }

    #[test]
    fn in_a_bucket_no_name_is_given_twice() {
        let scene = Scene::new();
        let claim = |now_ms| scene.write(|batch| claim(batch, &DIGEST, 10, (now_ms, Home::S3)).unwrap());
        let first = claim(1_000_000);
        assert_eq!((first.home, first.generation), (Home::S3, 1_000));
        assert_eq!(scene.tend(first, u64::MAX), Next::Remove(Some(Home::S3)));
        scene.write(|batch| forget(batch, (&DIGEST, first.generation)).unwrap());
        assert_eq!(scene.tend(first, u64::MAX), Next::Remove(None), "nothing is known of it any more");
        assert_eq!(claim(PENDING_MS).generation, 86_400);
        assert_eq!(first.path()[2], format!("{DIGEST}.1000"));
    }
}
