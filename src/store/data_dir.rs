//! The directory that holds everything a server keeps. One process at a time has it.

use std::{
    fmt,
    fs::{DirBuilder, File, TryLockError},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use crate::store::{Durability, Engine, Fault, Store, engine::Rocks};

/// The lock, the database, and what a restore leaves beside it.
const LOCK: &str = "lock";
const DATABASE: &str = "db";
const INCOMING: &str = "db.incoming";
const REPLACED: &str = "db.before-restore";

/// A data directory that this process, and no other, may write, until this is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: File,
}

/// Why a data directory could not be had.
#[derive(Debug)]
pub enum NotHeld {
    /// A server, or a command, is at work in it.
    InUse(PathBuf),
    /// The disk refused to read or write.
    Io(PathBuf, io::Error),
}

impl fmt::Display for NotHeld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse(path) => write!(f, "{} is in use: a server or a command runs there", path.display()),
            Self::Io(path, error) => write!(f, "{} cannot be used: {error}", path.display()),
        }
    }
}

impl std::error::Error for NotHeld {}

impl DataDir {
    /// Makes the directory where there is none, and takes it. Errors: another process has it.
    pub fn hold(path: &Path) -> Result<Self, NotHeld> {
        let io = |error| NotHeld::Io(path.to_owned(), error);
        // The directory holds the signing key and password hashes, so no other user of this machine may read it.
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io)?;
        let file =
            File::options().create(true).truncate(false).write(true).open(path.join(LOCK)).map_err(io)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: file }),
            Err(TryLockError::WouldBlock) => Err(NotHeld::InUse(path.to_owned())),
            Err(TryLockError::Error(error)) => Err(io(error)),
        }
    }

    /// The path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is a store in it.
    pub fn has_store(&self) -> bool {
        self.database().exists()
    }

    /// Opens the store, or makes a new one. Errors: a restore was interrupted, and nothing but running it again may
    /// follow; a newer version wrote it; the disk.
    pub fn open_store(&self, cache_bytes_max: usize, durability: Durability) -> Result<Store, Fault> {
        if !self.has_store() && (self.incoming().exists() || self.replaced().exists()) {
            return Err(Fault::Closed("a restore was interrupted: run it again"));
        }
        let rocks = Rocks::open(&self.database(), cache_bytes_max)?;
        Store::open(Engine::Rocks(rocks), durability)
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.path.join(DATABASE)
    }

    /// A restored database that is not complete yet.
    pub(crate) fn incoming(&self) -> PathBuf {
        self.path.join(INCOMING)
    }

    /// The database that a restore has replaced: kept until the operator deletes it, or restores again.
    pub(crate) fn replaced(&self) -> PathBuf {
        self.path.join(REPLACED)
    }
}
