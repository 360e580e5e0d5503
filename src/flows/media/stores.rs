//! The wall before the places where objects lie: the local disk, and the bucket of an S3-compatible store. Whoever stores or reads an
//! object sees nothing of what is behind it. Why it stands here, and the files of the disk below: `docs/decisions/objects-in-buckets.md`.
//!
//! All bytes are received on the disk first. An object is put once it has arrived whole, and whoever puts it waits until the place says
//! that it is durable. A bucket that hangs or fails delays those who want something of it, for a bounded time, and nobody else.

mod http;
mod s3;

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use federation::web::Web;
use futures_util::{StreamExt, TryStreamExt, stream, stream::BoxStream};

use self::s3::S3;
use crate::{
    config::Config,
    env::{Env, Long},
    error::{Error, Result},
    flows::places::Place,
    media::{
        blobs::{Blobs, Object, Part, Received},
        objects::ObjectName,
        presign::Shown,
        thumbnails,
    },
    schema::media::Home,
};

/// A file on the disk is read in pieces of this many bytes, each of which is in memory until its reader has taken it.
const PIECE_BYTES: u64 = 64 << 10;
/// An object of a bucket that is needed as a file of this machine has at most this many bytes: nobody draws a thumbnail of a larger one.
const SPOOLED_BYTES_MAX: u64 = thumbnails::SOURCE_BYTES_MAX;
/// The beginning of an object that is looked at before all of it is copied has at most this many bytes.
const LOOKED_AT_BYTES: u64 = 64 << 10;
/// The name of a file for such an object has this many characters.
const SPOOL_CHARS: usize = 24;

/// All places of one server. A clone is cheap.
#[derive(Clone)]
pub(crate) struct Stores(Arc<Places>);

struct Places {
    env: Env,
    disk: Blobs,
    bucket: Option<S3>,
    /// The place of objects that are new.
    home: Home,
}

/// An object that may be read. It stays readable for a while also when it is removed meanwhile.
#[derive(Clone)]
pub(crate) struct Open(Arc<Source>);

enum Source {
    Disk(Object),
    S3 {
        stores: Stores,
        name: ObjectName,
        bytes: u64,
        /// Readers of the bucket are bounded; it is held until the object is closed.
        _place: Place,
    },
}

impl Stores {
    /// The places that the settings name: the disk's files, and the bucket that is asked over `web`. Fails where a setting of the bucket
    /// cannot be used.
    pub(super) fn new(config: &Config, env: &Env, disk: Blobs, web: Option<Web>) -> Result<Self> {
        let settings = &config.media.s3;
        let bucket = web.map(|web| S3::open(settings, env, web)).transpose()?;
        let home = if bucket.is_some() && settings.stores_new { Home::S3 } else { Home::Disk };
        Ok(Self(Arc::new(Places { env: env.clone(), disk, bucket, home })))
    }

    /// The place of objects that are new.
    pub(crate) fn home(&self) -> Home {
        self.0.home
    }

    /// Whether there is a bucket.
    pub(crate) fn has_bucket(&self) -> bool {
        self.0.bucket.is_some()
    }

    /// The bucket. Errors: [`Error::Broken`] where the settings name none, though something lies in one.
    fn bucket(&self) -> Result<&S3> {
        let why = "files of media lie in a bucket, and the settings name none: set media.s3.bucket";
        self.0.bucket.as_ref().ok_or_else(|| Error::broken(why.to_owned()))
    }

    /// Opens received bytes, which stay readable wherever they are put or thrown away.
    pub(crate) async fn open_received(&self, received: &Received) -> Result<Open> {
        let (disk, received) = (self.0.disk.clone(), received.clone());
        let open = move || Ok(disk.open_received(&received)?);
        Ok(Open::on_disk(self.0.env.blocking_long(Long::Media, open).await?))
    }

    /// Puts received bytes, which are open, where they belong, unless they are there. Once this returns, they survive a power cut, as far
    /// as the place says. Doing it twice changes nothing. Answers whether the part that held the bytes has become the object.
    pub(crate) async fn put(&self, received: Received, open: &Open, object: ObjectName) -> Result<bool> {
        let disk = self.0.disk.clone();
        match object.home {
            Home::Disk => {
                let put = move || {
                    let is_there = disk.contains(object, received.bytes)?;
                    if !is_there {
                        disk.put(received, object)?;
                    }
                    Ok(!is_there)
                };
                self.0.env.blocking_long(Long::Media, put).await
            }
            Home::S3 => {
                let bucket = self.bucket()?;
                if bucket.find(object).await? != Some(received.bytes) {
                    self.send(bucket, open, object).await?;
                }
                Ok(false)
            }
        }
    }

    /// Opens an object of so many bytes. None where it is not there, or not whole. Errors: [`Error::Remote`] where the bucket does not answer,
    /// [`Error::Busy`] where too many read from it.
    pub(crate) async fn open(&self, object: ObjectName, bytes: u64) -> Result<Option<Open>> {
        let source = match object.home {
            Home::Disk => {
                let disk = self.0.disk.clone();
                let open = move || Ok(disk.open(object)?.filter(|open| open.bytes() == bytes));
                self.0.env.blocking_long(Long::Media, open).await?.map(Source::Disk)
            }
            Home::S3 => {
                let bucket = self.bucket()?;
                let place = bucket.enter().await?;
                // A client that was told that a file comes can no longer be told that it does not.
                let found = bucket.find(object).await?;
                found.filter(|found| *found == bytes).map(|_| Source::S3 {
                    stores: self.clone(),
                    name: object,
                    bytes,
                    _place: place,
                })
            }
        };
        Ok(source.map(|source| Open(Arc::new(source))))
    }

    /// Removes an object for good from a place, or from wherever it may lie; nothing happens where it is gone.
    pub(crate) async fn remove(&self, object: ObjectName, from: Option<Home>) -> Result<()> {
        if from != Some(Home::S3) {
            let disk = self.0.disk.clone();
            self.0.env.blocking_long(Long::Media, move || Ok(disk.remove(object)?)).await?;
        }
        match (from, &self.0.bucket) {
            (Some(Home::Disk), _) | (None, None) => Ok(()),
            (Some(Home::S3), _) | (None, Some(_)) => self.bucket()?.remove(object).await,
        }
    }

    /// Copies an open object to another name, where it is durable once this returns. Errors: also where its bytes are not those that
    /// its name says.
    pub(crate) async fn copy(&self, from: &Open, to: ObjectName) -> Result<()> {
        let (env, disk) = (&self.0.env, &self.0.disk);
        match (to.home, &*from.0) {
            (Home::S3, Source::Disk(_)) => self.send(self.bucket()?, from, to).await,
            (Home::Disk, _) | (Home::S3, Source::S3 { .. }) => {
                let name = env.random_string(SPOOL_CHARS);
                let copied = async {
                    let part = self.fill(&name, from).await?;
                    let finish = move || Ok(part.finish()?);
                    let received = env.blocking_long(Long::Media, finish).await?;
                    if received.digest != to.digest {
                        return Err(Error::broken(format!(
                            "the object {} has other bytes than its name says",
                            to.digest
                        )));
                    }
                    let open = self.open_received(&received).await?;
                    self.put(received, &open, to).await
                };
                let copied = copied.await;
                if !matches!(copied, Ok(true)) {
                    let disk = disk.clone();
                    env.blocking_long(Long::Media, move || Ok(disk.discard(&name)?)).await?;
                }
                copied.map(drop)
            }
        }
    }

    /// Sends an open object to the bucket.
    async fn send(&self, bucket: &S3, from: &Open, to: ObjectName) -> Result<()> {
        let bytes = from.bytes();
        bucket.put(to, bytes, from.read(&self.0.env, 0..bytes)).await
    }

    /// Writes an object to a part of this name.
    async fn fill(&self, name: &str, from: &Open) -> Result<Part> {
        let (env, disk, owned) = (&self.0.env, self.0.disk.clone(), name.to_owned());
        let mut part = env.blocking_long(Long::Media, move || Ok(disk.begin(&owned)?)).await?;
        let mut pieces = from.read(env, 0..from.bytes());
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            let write = move || {
                part.write(&piece)?;
                Ok(part)
            };
            part = env.blocking_long(Long::Media, write).await?;
        }
        Ok(part)
    }

    /// An open object as a file of this machine, for decoders: that of the disk, or a copy that is gone once it is closed. None for one
    /// of a bucket that is too large for that. Errors: 400 `M_UNKNOWN` for one of a bucket that does not begin as an image.
    pub(crate) async fn local(&self, open: &Open) -> Result<Option<Local>> {
        let bytes = match &*open.0 {
            Source::Disk(_) => return Ok(Some(Local::OnDisk(open.clone()))),
            Source::S3 { bytes, .. } => *bytes,
        };
        if bytes > SPOOLED_BYTES_MAX {
            return Ok(None);
        }
        // Whatever is no image is not copied, however often somebody asks for a thumbnail of it.
        let mut begin = Vec::new();
        let mut pieces = open.read(&self.0.env, 0..bytes.min(LOOKED_AT_BYTES));
        while let Some(piece) = pieces.next().await {
            begin.extend_from_slice(&piece?);
        }
        drop(pieces);
        if !thumbnails::begins_as_image(&begin) {
            return Err(thumbnails::no_thumbnail().into());
        }
        let place = self.bucket()?.enter_spool().await;
        let (env, name) = (&self.0.env, self.0.env.random_string(SPOOL_CHARS));
        let filled = self.fill(&name, open).await;
        let disk = self.0.disk.clone();
        let close = move || {
            disk.discard(&name)?;
            Ok(filled?.into_object()?)
        };
        let copied = env.blocking_long(Long::Media, close).await?;
        Ok(Some(Local::Copied { object: copied, _place: place }))
    }

    /// The URL at which an open object may be read for a while, where the settings want that and it lies in the bucket. The answer has
    /// these header fields.
    pub(crate) fn presigned(&self, open: &Open, shown: Shown<'_>) -> Option<String> {
        match &*open.0 {
            Source::Disk(_) => None,
            Source::S3 { name, .. } => self.0.bucket.as_ref()?.presigned(*name, shown, self.0.env.now_ms()),
        }
    }
}

/// An object as a file of this machine.
pub(crate) enum Local {
    /// The object itself is one.
    OnDisk(Open),
    /// A copy, which has no name.
    Copied {
        object: Object,
        /// There is a bound on the copies that are there at once.
        _place: Place,
    },
}

impl Local {
    /// The file. None where it is none of this machine.
    pub(crate) fn object(&self) -> Option<&Object> {
        match self {
            Self::Copied { object, .. } => Some(object),
            Self::OnDisk(open) => match &*open.0 {
                Source::Disk(object) => Some(object),
                Source::S3 { .. } => None,
            },
        }
    }
}

impl Open {
    /// An object of the disk.
    pub(crate) fn on_disk(object: Object) -> Self {
        Self(Arc::new(Source::Disk(object)))
    }

    /// The number of its bytes.
    pub(crate) fn bytes(&self) -> u64 {
        match &*self.0 {
            Source::Disk(object) => object.bytes(),
            Source::S3 { bytes, .. } => *bytes,
        }
    }

    /// Reads a part of it, a piece at a time as they are asked for.
    pub(crate) fn read(&self, env: &Env, part: Range<u64>) -> BoxStream<'static, Result<Bytes>> {
        if part.is_empty() {
            return stream::empty().boxed();
        }
        let open = self.clone();
        match &*self.0 {
            Source::Disk(_) => {
                let env = env.clone();
                let pieces = stream::try_unfold(part, move |left| {
                    let (env, open) = (env.clone(), open.clone());
                    async move {
                        let length = left.end.saturating_sub(left.start).min(PIECE_BYTES);
                        if length == 0 {
                            return Ok(None);
                        }
                        let from = left.start;
                        let read = move || open.read_at(from, usize::try_from(length).unwrap_or_default());
                        let piece = env.blocking_long(Long::Media, read).await?;
                        Ok(Some((piece, from + length..left.end)))
                    }
                });
                pieces.boxed()
            }
            Source::S3 { stores, name, .. } => {
                let (stores, name) = (stores.clone(), *name);
                let begin = async move {
                    let pieces = stores.bucket()?.read(name, part).await?;
                    // The place of the reader is held as long as pieces come.
                    Ok::<_, Error>(pieces.map(move |piece| {
                        let _held = &open;
                        piece
                    }))
                };
                stream::once(begin).try_flatten().boxed()
            }
        }
    }

    /// Reads so many bytes of a file of the disk. It is called off the async threads.
    fn read_at(&self, from: u64, length: usize) -> Result<Bytes> {
        match &*self.0 {
            Source::Disk(object) => Ok(object.read(from, length)?),
            Source::S3 { .. } => {
                Err(Error::broken("an object of a bucket is no file of the disk".to_owned()))
            }
        }
    }
}
