//! The states of blobs, so that no object is lost that something refers to, and none stays for ever that nothing does.
//!
//! Before an object is put where it belongs, its blob becomes *pending*, with a timer; once the object is there, the batch that first
//! refers to it makes it *live*. When the last reference goes, it is *dying* for an hour, and whoever brings the same bytes meanwhile
//! makes it live again. Then it is *removing*, which is never taken back: the same bytes are put under the name of a further
//! generation. So a crash between any two steps leaves a row that says what is there, and a timer that goes on.
//! Why: an object and a row cannot change in one step.

use crate::{
    media::Name,
    schema::{
        self,
        jobs::Job,
        media::{BlobRow, BlobState, Digest, TotalRow},
    },
    store::{Batch, Direction, Fault, Read, key::Json, timer},
};

/// A blob to which nothing refers though it was about to be is removed after this many milliseconds.
pub const PENDING_MS: u64 = 24 * 60 * 60 * 1000;
/// A blob whose last reference went is removed after this many milliseconds. Whoever reads it by then has opened its object.
pub const DYING_MS: u64 = 60 * 60 * 1000;

/// The object of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The SHA-256 of the bytes.
    pub digest: Digest,
    /// The generation of the blob.
    pub generation: u32,
}

/// A reference to a blob: an item, or a thumbnail of one.
#[derive(Clone, Copy, Debug)]
pub struct Reference<'a> {
    /// The item that refers to it.
    pub name: &'a Name,
    /// The kind of thumbnail; empty for the item itself.
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
        .map(|row| ObjectName { digest: *digest, generation: row.generation }))
}

/// How much all blobs take.
pub fn total(read: &(impl Read + ?Sized)) -> Result<TotalRow, Fault> {
    Ok(schema::MEDIA_TOTAL.get(read, ())?.map(|Json(row)| row).unwrap_or_default())
}

/// Announces that the object of these bytes is about to be put where it belongs. Answers its name. The caller holds the server's
/// lock, puts the object there once the batch is durable, and refers to it after that.
pub fn claim(batch: &mut Batch, digest: &Digest, bytes: u64, now_ms: u64) -> Result<ObjectName, Fault> {
    let before = find(batch, digest)?;
    let due_ms = now_ms.saturating_add(PENDING_MS);
    let row = match before {
        // Its object is there, or about to be: another one that brings the same bytes changes nothing. Where nothing refers to it yet,
        // it is given time anew.
        Some(BlobRow { state: BlobState::Live, generation, .. }) => {
            return Ok(ObjectName { digest: *digest, generation });
        }
        Some(row @ BlobRow { state: BlobState::Pending | BlobState::Dying, .. }) => {
            cancel(batch, digest, &row);
            BlobRow { state: row.state, due_ms: Some(due_ms), ..row }
        }
        // The timer of the object that is being removed goes on.
        Some(row @ BlobRow { state: BlobState::Removing, .. }) => BlobRow {
            state: BlobState::Pending,
            generation: row.generation.wrapping_add(1),
            bytes,
            due_ms: Some(due_ms),
        },
        None => {
            let total = total(batch)?;
            put_total(batch, total.blobs.saturating_add(1), total.bytes.saturating_add(bytes));
            BlobRow { state: BlobState::Pending, generation: 0, bytes, due_ms: Some(due_ms) }
        }
    };
    let name = ObjectName { digest: *digest, generation: row.generation };
    timer::set(batch, &job(name).timer(due_ms));
    schema::MEDIA_BLOB.put(batch, &digest.0, &Json(row));
    Ok(name)
}

/// Refers to an object that is where it belongs. Answers `false`, and writes nothing, where the object is being removed meanwhile:
/// then the bytes must be put there again. The caller holds the server's lock.
pub fn refer(batch: &mut Batch, object: ObjectName, by: Reference<'_>) -> Result<bool, Fault> {
    let ObjectName { digest, generation } = object;
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
    timer::set(batch, &job(ObjectName { digest: *digest, generation: row.generation }).timer(due_ms));
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
    /// It is to be removed, and nobody counts on it any more.
    Remove,
}

/// Decides on an object whose timer is due. Where it is to be removed, the batch says so, and it is removed once that is durable. The
/// caller holds the server's lock.
pub fn tend(batch: &mut Batch, object: ObjectName, now_ms: u64) -> Result<Next, Fault> {
    let Some(row) = find(batch, &object.digest)? else { return Ok(Next::Nothing) };
    if row.generation != object.generation {
        // Only an object that was being removed is followed by one of another generation.
        return Ok(Next::Remove);
    }
    match (row.state, row.due_ms) {
        (BlobState::Live, _) => Ok(Next::Nothing),
        (BlobState::Removing, _) => Ok(Next::Remove),
        (BlobState::Pending | BlobState::Dying, Some(due_ms)) if due_ms > now_ms => Ok(Next::Later(due_ms)),
        (BlobState::Pending | BlobState::Dying, _) => {
            let row = BlobRow { state: BlobState::Removing, due_ms: None, ..row };
            schema::MEDIA_BLOB.put(batch, &object.digest.0, &Json(row));
            Ok(Next::Remove)
        }
    }
}

/// Forgets an object that was removed. The caller holds the server's lock.
pub fn forget(batch: &mut Batch, object: ObjectName) -> Result<(), Fault> {
    let row = find(batch, &object.digest)?;
    let row = row.filter(|row| row.generation == object.generation && row.state == BlobState::Removing);
    if let Some(row) = row {
        schema::MEDIA_BLOB.delete(batch, &object.digest.0);
        let total = total(batch)?;
        put_total(batch, total.blobs.saturating_sub(1), total.bytes.saturating_sub(row.bytes));
    }
    Ok(())
}

fn put_total(batch: &mut Batch, blobs: u64, bytes: u64) {
    schema::MEDIA_TOTAL.put(batch, (), &Json(TotalRow { blobs, bytes }));
}

fn job(object: ObjectName) -> Job {
    Job::TendBlob { digest: object.digest, generation: object.generation }
}

fn cancel(batch: &mut Batch, digest: &Digest, row: &BlobRow) {
    if let Some(due_ms) = row.due_ms {
        let object = ObjectName { digest: *digest, generation: row.generation };
        timer::cancel(batch, &job(object).timer(due_ms));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    const DIGEST: Digest = Digest([7; 32]);

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
            self.write(|batch| claim(batch, &DIGEST, 10, now_ms).unwrap())
        }

        fn tend(&self, object: ObjectName, now_ms: u64) -> Next {
            self.write(|batch| tend(batch, object, now_ms).unwrap())
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
        assert_eq!(scene.tend(object, 5 + DYING_MS), Next::Remove);
        assert_eq!(scene.state(), Some(BlobState::Removing));
        assert_eq!(scene.tend(object, 0), Next::Remove, "after a crash, it is removed again");
        scene.write(|batch| forget(batch, object).unwrap());
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
        assert_eq!(scene.tend(old, PENDING_MS), Next::Remove);
        assert!(!scene.refer(old, &scene.first), "its object may be gone");
        let new = scene.claim(PENDING_MS);
        assert_eq!(new.generation, old.generation + 1);
        assert!(!scene.refer(old, &scene.first) && scene.refer(new, &scene.first));
        assert_eq!(scene.tend(old, u64::MAX), Next::Remove);
        scene.write(|batch| forget(batch, old).unwrap());
        assert_eq!((scene.state(), scene.total()), (Some(BlobState::Live), (1, 10)));
    }

    #[test]
    fn whoever_never_comes_back_leaves_nothing() {
        let scene = Scene::new();
        let object = scene.claim(0);
        assert_eq!(scene.claim(5), object, "two bring the same bytes at once");
        assert_eq!(scene.timers(), 1);
        assert_eq!(scene.tend(object, PENDING_MS), Next::Later(5 + PENDING_MS));
        assert_eq!(scene.tend(object, 5 + PENDING_MS), Next::Remove);
    }
}
