//! Media: what is uploaded here, what is asked for, and what is fetched from other servers. Bytes go from a socket to the disk and back
//! in pieces, so that no file is ever in memory.
//!
//! Specification: client-server API, "Content repository".

pub(crate) mod download;
mod fetch;
pub(crate) mod keep;
pub mod preview;
pub(crate) mod receive;
pub(crate) mod tend;
pub(crate) mod thumbnail;
pub(crate) mod upload;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicBool},
};

use federation::joined::Joined;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::{
    config::Config,
    flows::{
        media::{fetch::NotFetched, thumbnail::Outcome},
        places::Places,
    },
    ids::UserNum,
    media::{Name, blobs::Blobs, items::UserBounds},
};

/// The directory of media within the data directory, unless the settings name another one.
const DIRECTORY: &str = "media";
/// At most this many uploads and fetches are under way at once, because each holds a piece of its file in memory.
const ARRIVING_MAX: usize = 256;
/// It takes at least this many users to have as many under way.
const ARRIVING_PAYERS_MIN: usize = 16;

/// The part of media that lives in memory. A clone is cheap.
#[derive(Clone)]
pub struct Media(Arc<Parts>);

struct Parts {
    blobs: Blobs,
    bounds: UserBounds,
    server_bytes_max: u64,
    /// The places of those who bring files.
    arriving: Places,
    reserved: Mutex<Reserved>,
    /// The files of other servers that are being fetched, each once for all who wait for it.
    fetching: Joined<Name, Result<(), NotFetched>>,
    /// The thumbnails that are being made, each once for all who wait for it.
    drawing: Joined<(Name, String), Result<Outcome, NotFetched>>,
    /// Notified when something was uploaded to a URI that was made before.
    uploaded: Notify,
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
    /// The media of a server with these settings. Nothing is read or written yet.
    pub fn new(config: &Config) -> Self {
        let settings = &config.media;
        let directory = match settings.directory.as_os_str().is_empty() {
            true => config.server.data_dir.join(DIRECTORY),
            false => settings.directory.clone(),
        };
        let bounds = UserBounds {
            bytes_max: settings.user_bytes_max.bytes(),
            created_max: settings.pending_uploads_max.into(),
        };
        Self(Arc::new(Parts {
            blobs: Blobs::on_disk(directory),
            bounds,
            server_bytes_max: settings.server_bytes_max.bytes(),
            arriving: Places::new(ARRIVING_MAX, ARRIVING_PAYERS_MIN),
            reserved: Mutex::default(),
            fetching: Joined::default(),
            drawing: Joined::default(),
            uploaded: Notify::new(),
            is_tended: AtomicBool::new(false),
        }))
    }

    /// The objects on the disk.
    pub(crate) fn blobs(&self) -> &Blobs {
        &self.0.blobs
    }

    /// The bounds of each user's media.
    pub(crate) fn bounds(&self) -> UserBounds {
        self.0.bounds
    }
}
