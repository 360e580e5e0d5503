//! Media: what is uploaded here, what is asked for, and what is fetched from other servers. Bytes go from a socket to the disk and back
//! in pieces, so that no file is ever in memory.
//!
//! Specification: client-server API, "Content repository".

pub(crate) mod avatars;
mod awaited;
mod compress;
pub(crate) mod download;
mod fetch;
pub(crate) mod keep;
pub(crate) mod link;
pub(crate) mod moving;
mod pauses;
pub mod preview;
pub(crate) mod receive;
pub(crate) mod stores;
pub(crate) mod tend;
pub(crate) mod thumbnail;
pub(crate) mod upload;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicBool},
};

use crate::{
    config::Config,
    env::{Env, payer::Payer},
    error::Result,
    flows::{
        lanes::Lanes,
        media::{
            awaited::Awaited,
            fetch::{AllGrowing, Missed, NotFetched},
            stores::Stores,
            thumbnail::Outcome,
        },
        places::Places,
    },
    ids::UserNum,
    media::{Name, blobs::Blobs, items::UserBounds},
    schema::media::Digest,
};
use federation::{joined::Joined, web::Web};
use parking_lot::Mutex;

/// The directory of media within the data directory, unless the settings name another one.
const DIRECTORY: &str = "media";
/// At most this many uploads are under way at once, because each holds a piece of its file in memory.
const UPLOADING_MAX: usize = 256;
/// It takes at least this many users to have as many under way.
const UPLOADING_PAYERS_MIN: usize = 16;
/// At most this many files of other servers begin to be fetched at once.
const QUICK_FETCHES_MAX: usize = 128;
/// It takes at least this many users to have as many begin.
const FETCHES_PAYERS_MIN: usize = 8;
/// At most this many files of other servers come slowly at once, each of which holds a piece in memory.
const SLOW_FETCHES_MAX: usize = 256;
/// A user has at most this many of them, so that those who begin find a connection.
const SLOW_FETCHES_OF_PAYER_MAX: usize = 48;
/// At most this many fetches wait for a place. A page of a room may ask for hundreds of pictures.
const WAITING_FETCHES_MAX: usize = 8_000;

/// At most this many objects are removed at once.
const REMOVING: usize = 64;

/// The part of media that lives in memory. A clone is cheap.
#[derive(Clone)]
pub struct Media(Arc<Parts>);

struct Parts {
    blobs: Blobs,
    stores: Stores,
    bounds: UserBounds,
    server_bytes_max: u64,
    /// The places of those who upload files.
    uploading: Places,
    /// The places in which files of other servers are fetched.
    fetches: Lanes,
    reserved: Mutex<Reserved>,
    /// The fetches that wait for their turn or run, each once for those who wait for it and are the same payer.
    waiting: Joined<(Name, Payer), Result<(), NotFetched>>,
    /// The files of other servers that are being fetched, each once for all who wait for it.
    fetching: Joined<Name, Result<(), NotFetched>>,
    /// The files that are being fetched and have begun to come.
    growing: AllGrowing,
    /// The fetches that failed lately, so that they are not tried again at once.
    missed: Missed,
    /// The thumbnails that are being made, each once for those who wait for it and are the same payer.
    drawing: Joined<(Name, String, Payer), Result<Outcome, NotFetched>>,
    /// Those who wait for uploads to URIs that were made before.
    awaited: Awaited,
    /// Objects are removed one at a time among those whose names begin alike.
    removing: [tokio::sync::Mutex<()>; REMOVING],
    /// Rounds through all media are known to have begun.
    is_tended: AtomicBool,
}

/// The bytes of files that are arriving, and count as if they were kept already.
#[derive(Default)]
struct Reserved {
    by_user: BTreeMap<UserNum, u64>,
    all: u64,
}

impl Media {
    /// The media of a server with these settings, and with the way to its bucket, if there is one. Nothing is read or written yet. Fails
    /// where a setting of the bucket cannot be used.
    pub fn new(config: &Config, env: &Env, bucket: Option<Web>) -> Result<Self> {
        let settings = &config.media;
        let directory = match settings.directory.as_os_str().is_empty() {
            true => config.server.data_dir.join(DIRECTORY),
            false => settings.directory.clone(),
        };
        let bounds = UserBounds {
            bytes_max: settings.user_bytes_max.bytes(),
            created_max: settings.pending_uploads_max.into(),
        };
        let blobs = Blobs::on_disk(directory);
        let stores = Stores::new(config, env, blobs.clone(), bucket)?;
        Ok(Self(Arc::new(Parts {
            blobs,
            stores,
            bounds,
            server_bytes_max: settings.server_bytes_max.bytes(),
            uploading: Places::new(UPLOADING_MAX, UPLOADING_PAYERS_MIN),
            fetches: Lanes::new((QUICK_FETCHES_MAX, FETCHES_PAYERS_MIN), SLOW_FETCHES_MAX)
                .with_waiting(WAITING_FETCHES_MAX)
                .with_slow_of_payer(SLOW_FETCHES_OF_PAYER_MAX),
            reserved: Mutex::default(),
            waiting: Joined::default(),
            fetching: Joined::default(),
            growing: AllGrowing::default(),
            missed: Missed::default(),
            drawing: Joined::default(),
            awaited: Awaited::default(),
            removing: [const { tokio::sync::Mutex::const_new(()) }; REMOVING],
            is_tended: AtomicBool::new(false),
        })))
    }

    /// The files of the disk, into which all bytes are received.
    pub(crate) fn blobs(&self) -> &Blobs {
        &self.0.blobs
    }

    /// The places where objects lie.
    pub(crate) fn stores(&self) -> &Stores {
        &self.0.stores
    }

    /// The lock under which the objects of these bytes are removed.
    fn removing(&self, digest: &Digest) -> &tokio::sync::Mutex<()> {
        let [first, ..] = digest.0;
        // There is one for each remainder.
        self.0.removing.get(usize::from(first) % REMOVING).unwrap_or(&self.0.removing[0])
    }

    /// The bounds of each user's media.
    pub(crate) fn bounds(&self) -> UserBounds {
        self.0.bounds
    }
}
