//! Backs a store up while it is in use, and restores it.
//!
//! A backup is a directory: `db` (a checkpoint of the database, made while the server runs) and `backup.json`, written
//! last, so that a backup without it is one that was interrupted. A restore begins a new *incarnation*: positions jump
//! above all that were ever given out, and tokens of what was lost are clamped to the restore point.

use std::{
    fmt, fs,
    fs::File,
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::store::{
    DataDir, Durability, Engine, Fault, Read, Store,
    engine::Rocks,
    head::{self, Incarnations},
};

const DATABASE: &str = "db";
const MANIFEST: &str = "backup.json";
/// This file beside the manifest has the highest incarnation that was begun from this backup.
const BEGUN: &str = "restored.json";
const FORMAT: u32 = 1;
/// The cache of a restored database while it is prepared, in bytes: little of it is read then.
const CACHE_BYTES: usize = 8 << 20;

/// The manifest says what is in a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The layout of the backup's directory.
    pub format: u32,
    /// The name of the server.
    pub server_name: String,
    /// The time at which the backup was taken, in milliseconds since the epoch.
    pub taken_at_ms: u64,
    /// Everything at or before this position is in the backup.
    pub position: u64,
    /// The incarnation of the store when the backup was taken.
    pub incarnation: u16,
    /// Whether the server's signing key is in it: then it must be kept as secret as the key.
    pub holds_signing_key: bool,
}

/// Says how far a long command has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// The present step of the command, in a few words.
    pub doing: &'static str,
    /// The amount that is done, in units of the step.
    pub done: u64,
    /// The amount there is to do, in the same units; 0 when that is not known.
    pub of: u64,
}

/// Why a backup or a restore was not done.
#[derive(Debug)]
pub enum NotDone {
    /// The directory holds something already, and a backup is not written over anything.
    Exists(PathBuf),
    /// The directory holds no backup, or an incomplete one.
    NotABackup(PathBuf),
    /// A newer version of the server took the backup.
    TooNew(PathBuf),
    /// The store is in memory only, so there is nothing on disk to copy.
    NotOnDisk,
    /// The disk refused to read or write.
    Io(PathBuf, io::Error),
    /// The store failed while it was backed up or prepared.
    Fault(Fault),
}

impl fmt::Display for NotDone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exists(path) => {
                write!(f, "{} is not empty; a backup needs an empty or a new directory", path.display())
            }
            Self::NotABackup(path) => write!(f, "{} is not a complete backup", path.display()),
            Self::TooNew(path) => write!(
                f,
                "{} was taken by a newer version of the server; restore it with that one",
                path.display()
            ),
            Self::NotOnDisk => write!(f, "a store in memory cannot be backed up"),
            Self::Io(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Fault(fault) => fault.fmt(f),
        }
    }
}

impl std::error::Error for NotDone {}

impl From<Fault> for NotDone {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Adds the path to an error of the disk.
fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, NotDone> {
    result.map_err(|error| NotDone::Io(path.to_owned(), error))
}

/// Backs the store up into a directory that is empty or not there, while everything goes on. What was acknowledged
/// before the call is in it.
pub fn back_up(
    store: &Store,
    to: &Path,
    server_name: &str,
    now_ms: u64,
    holds_signing_key: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Manifest, NotDone> {
    let Engine::Rocks(rocks) = store.engine() else { return Err(NotDone::NotOnDisk) };
    // Nobody else on this machine may read it, because the signing key is in there.
    at(to, fs::DirBuilder::new().recursive(true).mode(0o700).create(to))?;
    if at(to, fs::read_dir(to))?.next().is_some() {
        return Err(NotDone::Exists(to.to_owned()));
    }
    let manifest = Manifest {
        format: FORMAT,
        server_name: server_name.to_owned(),
        taken_at_ms: now_ms,
        position: store.snapshot().upto().number(),
        incarnation: store.incarnation(),
        holds_signing_key,
    };
    progress(Progress { doing: "taking a checkpoint", done: 0, of: 0 });
    rocks.checkpoint(&to.join(DATABASE))?;
    let files = list_files(&to.join(DATABASE))?;
    for (done, file) in files.iter().enumerate() {
        progress(Progress { doing: "making the backup durable", done: done as u64, of: files.len() as u64 });
        sync(file)?;
    }
    sync(&to.join(DATABASE))?;
    write_json(&to.join(MANIFEST), &manifest)?;
    sync(to)?;
    progress(Progress { doing: "done", done: 1, of: 1 });
    Ok(manifest)
}

/// Reads what a backup says of itself.
pub fn read_manifest(from: &Path) -> Result<Manifest, NotDone> {
    let path = from.join(MANIFEST);
    if !path.exists() || !from.join(DATABASE).is_dir() {
        return Err(NotDone::NotABackup(from.to_owned()));
    }
    let manifest: Manifest = serde_json::from_slice(&at(&path, fs::read(&path))?)
        .map_err(|_| NotDone::NotABackup(from.to_owned()))?;
    if manifest.format > FORMAT { Err(NotDone::TooNew(from.to_owned())) } else { Ok(manifest) }
}

/// The outcome of a restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The backup it came from.
    pub manifest: Manifest,
    /// The incarnation that it began.
    pub incarnation: u16,
    /// The directory in which the database that was there before is kept, if there was one.
    pub replaced: Option<PathBuf>,
}

/// Puts a backup in place of the store in a data directory, as a new incarnation. It is refused beside a running
/// server, for nobody can hold the directory then. Interrupted, it leaves the old store, or is to be run again.
///
/// `prepare` runs over the restored store before it goes live, and commits and flushes what must be different in a new
/// incarnation: one-time keys that may have been handed out already go, device lists are announced again.
pub fn restore(
    from: &Path,
    into: &DataDir,
    prepare: &mut dyn FnMut(&Store) -> Result<(), Fault>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Restored, NotDone> {
    let manifest = read_manifest(from)?;
    let incoming = into.incoming();
    if incoming.exists() {
        at(&incoming, fs::remove_dir_all(&incoming))?;
    }
    let lived = newest_incarnation(from, into, &manifest)?;
    copy(&from.join(DATABASE), &incoming, progress)?;
    progress(Progress { doing: "beginning a new incarnation", done: 0, of: 0 });
    let incarnation = begin_incarnation(&incoming, lived, prepare)?;
    // This is written before the store goes live, because a second restore of this backup must not begin the same incarnation.
    // Should the backup be on a read-only disk, the store that is replaced still knows.
    let _ = write_json(&from.join(BEGUN), &incarnation);
    let replaced = into.replaced();
    let had_store = into.has_store();
    if had_store {
        if replaced.exists() {
            at(&replaced, fs::remove_dir_all(&replaced))?;
        }
        at(&replaced, fs::rename(into.database(), &replaced))?;
    }
    at(&incoming, fs::rename(&incoming, into.database()))?;
    sync(into.path())?;
    progress(Progress { doing: "done", done: 1, of: 1 });
    Ok(Restored { manifest, incarnation, replaced: replaced.exists().then_some(replaced) })
}

/// The highest incarnation that anyone may have seen positions of.
fn newest_incarnation(from: &Path, into: &DataDir, manifest: &Manifest) -> Result<u16, NotDone> {
    let begun = fs::read(from.join(BEGUN)).ok().and_then(|json| serde_json::from_slice(&json).ok());
    let mut newest = manifest.incarnation.max(begun.unwrap_or(0));
    for database in [into.database(), into.replaced()] {
        // A store that cannot be read is often the reason for the restore, so it does not stop it.
        if database.exists()
            && let Ok(rocks) = Rocks::open(&database, CACHE_BYTES)
            && let Ok(snapshot) = head::read(&Engine::Rocks(rocks))
            && let Ok(incarnations) = Incarnations::read(&snapshot)
        {
            newest = newest.max(incarnations.current());
        }
    }
    Ok(newest)
}

fn begin_incarnation(
    database: &Path,
    lived: u16,
    prepare: &mut dyn FnMut(&Store) -> Result<(), Fault>,
) -> Result<u16, NotDone> {
    let engine = Engine::Rocks(Rocks::open(database, CACHE_BYTES)?);
    let ended = head::read(&engine)?.position;
    let store = Store::open(engine, Durability::Fsync)?;
    let incarnation = store.begin_incarnation(lived, ended)?;
    prepare(&store)?;
    while store.queue_depth() > 0 {
        store.flush()?;
    }
    Ok(incarnation)
}

fn list_files(directory: &Path) -> Result<Vec<PathBuf>, NotDone> {
    let mut files = Vec::new();
    for entry in at(directory, fs::read_dir(directory))? {
        let path = at(directory, entry)?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn copy(from: &Path, to: &Path, progress: &mut dyn FnMut(Progress)) -> Result<(), NotDone> {
    let files = list_files(from)?;
    let sizes = files.iter().map(|file| at(file, file.metadata()).map(|metadata| metadata.len()));
    let sizes: Vec<u64> = sizes.collect::<Result<_, _>>()?;
    let (mut done, of) = (0, sizes.iter().sum());
    at(to, fs::create_dir_all(to))?;
    for (file, size) in files.iter().zip(sizes) {
        progress(Progress { doing: "copying", done, of });
        let Some(name) = file.file_name() else { continue };
        let copy = to.join(name);
        at(&copy, fs::copy(file, &copy))?;
        sync(&copy)?;
        done += size;
    }
    sync(to)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), NotDone> {
    let json = at(path, serde_json::to_vec_pretty(value).map_err(io::Error::from))?;
    at(path, fs::write(path, json))?;
    sync(path)
}

/// Makes a file, or the names in a directory, survive a power cut.
fn sync(path: &Path) -> Result<(), NotDone> {
    at(path, File::open(path).and_then(|file| file.sync_all()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::Position,
        store::{Guard, LogEntry, NotHeld, check, tables},
    };

    fn commit(store: &Store, count: u64) -> Position {
        for _ in 0..count {
            let mut batch = store.batch(&Guard::alone());
            batch.position(&LogEntry::Server);
            drop(store.enqueue(batch).unwrap());
        }
        store.flush().unwrap();
        store.snapshot().upto()
    }

    fn own_tables() -> Vec<&'static tables::TableInfo> {
        tables::TABLES.iter().collect()
    }

    fn open(dir: &DataDir) -> Store {
        dir.open_store(1 << 20, Durability::Fsync).unwrap()
    }

    #[test]
    fn a_restore_goes_back_and_no_position_is_given_out_twice() {
        let temporary = tempfile::tempdir().unwrap();
        let (data, backup) = (temporary.path().join("data"), temporary.path().join("backup"));
        let dir = DataDir::hold(&data).unwrap();
        let store = open(&dir);
        let kept = commit(&store, 100);
        let manifest = back_up(&store, &backup, "example.org", 7, false, &mut |_| ()).unwrap();
        assert_eq!(manifest.position, kept.number());
        let lost = commit(&store, 500);
        assert_eq!(lost.number(), 600);
        drop(store);

        let mut prepared = 0;
        let mut prepare = |store: &Store| {
            assert_eq!(store.snapshot().upto(), Position::first_of_incarnation(store.incarnation()));
            prepared += 1;
            drop(store.enqueue(store.batch(&Guard::alone())).unwrap());
            Ok(())
        };
        let restored = restore(&backup, &dir, &mut prepare, &mut |_| ()).unwrap();
        assert_eq!((restored.incarnation, prepared), (1, 1));
        let store = open(&dir);
        assert_eq!(store.incarnation(), 1);
        // The clients of this test synced into what is lost, or to before it.
        assert_eq!(store.clamp(lost), kept);
        assert_eq!(store.clamp(Position::new(30).unwrap()).number(), 30);
        let next = commit(&store, 1);
        assert!(next > lost && next.number() < 1 << 53);
        assert_eq!(store.clamp(next), next);
        // Such a client gets everything that came after the restore, and nothing else.
        let after = |position| {
            let bound = std::ops::Bound::Excluded(position);
            let up = crate::store::Direction::Up;
            let read = store.snapshot();
            let rows = tables::LOG.range::<Position>(&*read, bound, std::ops::Bound::Unbounded, up);
            rows.unwrap().map(|row| row.unwrap().0).collect::<Vec<_>>()
        };
        assert_eq!(after(store.clamp(lost)), [next]);
        assert_eq!(
            check::check(&store, &own_tables(), &check::checks, &mut |_| ()).unwrap().findings,
            [""; 0]
        );

        // A second restore from the same backup does not begin the incarnation again that just lived.
        let seen = commit(&store, 50);
        drop(store);
        let restored = restore(&backup, &dir, &mut |_| Ok(()), &mut |_| ()).unwrap();
        assert_eq!(restored.incarnation, 2);
        let store = open(&dir);
        assert_eq!(store.clamp(seen), kept);
        assert!(commit(&store, 1) > seen);
        drop(store);
        // A restore into another place begins the next incarnation too, though only the backup knows of the others there.
        let elsewhere = DataDir::hold(&temporary.path().join("elsewhere")).unwrap();
        assert_eq!(restore(&backup, &elsewhere, &mut |_| Ok(()), &mut |_| ()).unwrap().incarnation, 3);
    }

    #[test]
    fn a_backup_is_taken_while_commits_go_on_and_holds_all_that_was_acknowledged_before() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::hold(&temporary.path().join("data")).unwrap();
        let store = open(&dir);
        commit(&store, 10);
        let stop = std::sync::atomic::AtomicBool::new(false);
        let backup = temporary.path().join("backup");
        let manifest = std::thread::scope(|threads| {
            threads.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    commit(&store, 3);
                }
            });
            let manifest = back_up(&store, &backup, "example.org", 0, false, &mut |_| ()).unwrap();
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
            manifest
        });
        assert!(matches!(
            back_up(&store, &backup, "example.org", 0, false, &mut |_| ()),
            Err(NotDone::Exists(_))
        ));
        let into = DataDir::hold(&temporary.path().join("twin")).unwrap();
        restore(&backup, &into, &mut |_| Ok(()), &mut |_| ()).unwrap();
        let twin = open(&into);
        let up = crate::store::Direction::Up;
        let log = tables::LOG.prefix::<()>(&*twin.snapshot(), (), up).unwrap().count() as u64;
        assert!(log >= manifest.position && manifest.position >= 10);
        assert_eq!(check::check(&twin, &own_tables(), &check::checks, &mut |_| ()).unwrap().faults, 0);
    }

    #[test]
    fn a_directory_is_held_by_one_and_an_interrupted_restore_is_not_taken_for_a_new_server() {
        let temporary = tempfile::tempdir().unwrap();
        let data = temporary.path().join("data");
        let dir = DataDir::hold(&data).unwrap();
        assert!(matches!(DataDir::hold(&data), Err(NotHeld::InUse(_))));
        fs::create_dir(dir.incoming()).unwrap();
        assert!(dir.open_store(1 << 20, Durability::Fsync).is_err());
        let nothing = temporary.path().join("nothing");
        assert!(matches!(restore(&nothing, &dir, &mut |_| Ok(()), &mut |_| ()), Err(NotDone::NotABackup(_))));
        drop(dir);
        drop(DataDir::hold(&data).unwrap());
    }
}
