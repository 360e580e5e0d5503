//! The bucket of an S3-compatible store.
//!
//! An object has the same name as on the disk, below the prefix of the settings. It is put in one request, or, where it is large, in
//! parts of which one is in memory at a time; the store shows it only once it is whole.

use std::{fmt, ops::Range, time::Duration};

use bytes::{Bytes, BytesMut};
use federation::web::Web;
use futures_util::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    BackoffConfig, GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt, PutPayload,
    RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
    path::Path,
};
use sha2::{Digest as _, Sha256};

use super::http::Client;
use crate::{
    config,
    env::Env,
    error::{Error, Result},
    flows::places::{Place, Places},
    media::{
        objects::ObjectName,
        presign::{Presigner, Shown},
    },
    schema::media::Digest,
};

/// A large object is put in parts of this many bytes. A store takes at least 5 MiB, and at most 10,000 parts.
const PART_BYTES: usize = 8 << 20;
/// At most this many objects are put at once, because each has a part in memory.
const PUTS_MAX: usize = 12;
/// It takes at least this many users, or addresses, to put as many.
const PUT_PAYERS_MIN: usize = 3;
/// A reader waits at most this long for a place.
const READER_WAITS_MAX: Duration = Duration::from_secs(30);
/// At most this many readers are there at once, each of which has a connection.
const READERS_MAX: usize = 256;
/// It takes at least this many users, or addresses, to be as many.
const READER_PAYERS_MIN: usize = 8;
/// At most this many objects are copied at once to make thumbnails of them.
const SPOOLS_MAX: usize = 8;
/// It takes at least this many users, or addresses, to have as many copied.
const SPOOL_PAYERS_MIN: usize = 2;
/// An object waits at most this long until it may be put, where others that are put take long.
const PLACE_WITHIN: Duration = Duration::from_secs(60);
/// Those who find no place are told to try again after this time.
const RETRY: Duration = Duration::from_secs(2);
/// A small request, with all that is tried again, takes at most this long.
const SMALL_WITHIN: Duration = Duration::from_secs(90);
/// One request that carries a part takes at most this long, with all that is tried again.
const PART_WITHIN: Duration = Duration::from_secs(180);
/// A request is tried again at most this often.
const RETRIES_MAX: usize = 4;
/// A request is not tried again once this time has passed.
const RETRIED_WITHIN: Duration = Duration::from_secs(60);

/// The bucket, as other parts of the sentence call it that says it could not be reached.
const CALLED: &str = "that keeps the files";

/// A bucket, and the places of those who use it.
pub(super) struct S3 {
    env: Env,
    store: AmazonS3,
    prefix: String,
    puts: Places,
    readers: Places,
    spools: Places,
    presigner: Option<Presigner>,
}

impl S3 {
    /// The bucket of these settings, which is asked over `web`. Nothing is asked yet. Fails where a setting cannot be used.
    pub(super) fn open(settings: &config::S3, env: &Env, web: Web) -> Result<Self> {
        let broken = |key: &str, why: &dyn fmt::Display| {
            Error::broken(format!("media.s3.{key} cannot be used: {why}"))
        };
        let secret = settings.secret().map_err(|error| broken("secret_access_key_file", &error))?;
        if secret.is_empty() {
            return Err(broken("secret_access_key_file", &"the file is empty"));
        }
        let url = settings.bucket_url().ok_or_else(|| broken("endpoint", &"it is no URL"))?;
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: RETRIES_MAX,
            retry_timeout: RETRIED_WITHIN,
        };
        let store = AmazonS3Builder::new()
            .with_http_connector(Client::new(env.clone(), web))
            .with_endpoint(url.as_str().trim_end_matches('/'))
            // The URL names the bucket, wherever that stands.
            .with_virtual_hosted_style_request(true)
            .with_allow_http(true)
            .with_bucket_name(&settings.bucket)
            .with_region(&settings.region)
            .with_access_key_id(&settings.access_key_id)
            .with_secret_access_key(&secret)
            // Not every store knows how to delete many at once.
            .with_disable_bulk_delete(true)
            .with_retry(retry)
            .build()
            .map_err(|error| broken("bucket", &error))?;
        let redirect = settings.redirect.then(|| settings.redirect_url()).flatten();
        let key = (settings.access_key_id.as_str(), secret.as_str());
        let presigner =
            redirect.map(|url| Presigner::new(url, &settings.region, key, settings.redirect_lifetime()));
        Ok(Self {
            env: env.clone(),
            store,
            prefix: settings.prefix.clone(),
            puts: Places::new(PUTS_MAX, PUT_PAYERS_MIN),
            readers: Places::new(READERS_MAX, READER_PAYERS_MIN),
            spools: Places::new(SPOOLS_MAX, SPOOL_PAYERS_MIN),
            presigner,
        })
    }

    /// The name of an object in the bucket.
    fn name(&self, object: ObjectName) -> String {
        let [outer, inner, file] = object.path();
        let path = format!("{outer}/{inner}/{file}");
        if self.prefix.is_empty() { path } else { format!("{}/{path}", self.prefix) }
    }

    fn path(&self, object: ObjectName) -> Path {
        Path::from(self.name(object))
    }

    /// Waits for a place for a reader, in turn with others. Errors: [`Error::Busy`] where there is none for long.
    pub(super) async fn enter(&self) -> Result<Place> {
        tokio::select! {
            biased;
            place = self.readers.wait() => Ok(place),
            () = self.env.sleep(READER_WAITS_MAX) => Err(Error::Busy { retry_after: RETRY }),
        }
    }

    /// Waits for a place for somebody who copies an object to the disk for a while.
    pub(super) async fn enter_spool(&self) -> Place {
        self.spools.wait().await
    }

    /// The number of bytes of an object. None where it is not there.
    pub(super) async fn find(&self, object: ObjectName) -> Result<Option<u64>> {
        let path = self.path(object);
        match self.within(SMALL_WITHIN, self.store.head(&path)).await? {
            Ok(found) => Ok(Some(found.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Puts an object of so many bytes there. Once this returns, the store has said that it is durable. Errors: [`Error::Busy`] where too
    /// many are put already; also where the bytes are not those that the name says.
    pub(super) async fn put(
        &self,
        object: ObjectName,
        bytes: u64,
        pieces: BoxStream<'static, Result<Bytes>>,
    ) -> Result<()> {
        let _place = tokio::select! {
            biased;
            place = self.puts.wait() => place,
            () = self.env.sleep(PLACE_WITHIN) => return Err(Error::Busy { retry_after: RETRY }),
        };
        let mut parts = Parts { pieces, hasher: Sha256::new(), bytes: 0 };
        let path = self.path(object);
        let first = parts.next().await?;
        if bytes <= first.len() as u64 {
            parts.require(object.digest, bytes)?;
            let put = self.store.put(&path, PutPayload::from_bytes(first));
            return self.within(PART_WITHIN, put).await?.map(drop).map_err(|error| failed(&error));
        }
        let begun = self.store.put_multipart(&path);
        let upload = self.within(SMALL_WITHIN, begun).await?.map_err(|error| failed(&error))?;
        let mut begun = Begun { env: self.env.clone(), upload: Some(upload) };
        if let Some(upload) = &mut begun.upload {
            self.put_parts(upload.as_mut(), first, parts, (object.digest, bytes)).await?;
        }
        begun.upload = None;
        Ok(())
    }

    async fn put_parts(
        &self,
        upload: &mut dyn MultipartUpload,
        first: Bytes,
        mut parts: Parts,
        (digest, bytes): (Digest, u64),
    ) -> Result<()> {
        let mut part = first;
        while !part.is_empty() {
            let put = upload.put_part(PutPayload::from_bytes(part));
            self.within(PART_WITHIN, put).await?.map_err(|error| failed(&error))?;
            part = parts.next().await?;
        }
        parts.require(digest, bytes)?;
        let complete = upload.complete();
        self.within(PART_WITHIN, complete).await?.map(drop).map_err(|error| failed(&error))
    }

    /// Reads a part of an object, as the store sends it. Errors: also for one that is not there.
    pub(super) async fn read(
        &self,
        object: ObjectName,
        part: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes>>> {
        let options = GetOptions { range: Some(GetRange::Bounded(part)), ..GetOptions::default() };
        let path = self.path(object);
        let got = self.within(SMALL_WITHIN, self.store.get_opts(&path, options)).await?;
        let got = got.map_err(|error| failed(&error))?;
        Ok(got.into_stream().map_err(|error| failed(&error)).boxed())
    }

    /// Removes an object; nothing happens where it is gone.
    pub(super) async fn remove(&self, object: ObjectName) -> Result<()> {
        let path = self.path(object);
        match self.within(SMALL_WITHIN, self.store.delete(&path)).await? {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed(&error)),
        }
    }

    /// The URL at which an object may be read for a while, if the settings want that. The answer has these header fields.
    pub(super) fn presigned(&self, object: ObjectName, shown: Shown<'_>, now_ms: u64) -> Option<String> {
        Some(self.presigner.as_ref()?.url(&self.name(object), shown, now_ms))
    }

    /// Waits for this long at most.
    async fn within<T>(
        &self,
        longest: Duration,
        work: impl Future<Output = object_store::Result<T>>,
    ) -> Result<object_store::Result<T>> {
        tokio::select! {
            biased;
            done = work => Ok(done),
            () = self.env.sleep(longest) => Err(unreachable("it did not answer in time")),
        }
    }
}

/// An upload in parts. The store is told when it breaks off, also where nobody waits for it any more; a rule of the bucket's removes what
/// is left of those that end with this process.
struct Begun {
    env: Env,
    upload: Option<Box<dyn MultipartUpload>>,
}

impl Drop for Begun {
    fn drop(&mut self) {
        let Some(mut upload) = self.upload.take() else { return };
        let env = self.env.clone();
        self.env.spawn(async move {
            let aborted = tokio::select! {
                biased;
                aborted = upload.abort() => aborted.map_err(|error| error.to_string()),
                () = env.sleep(SMALL_WITHIN) => Err("the store did not answer in time".to_owned()),
            };
            if let Err(why) = aborted {
                tracing::info!(why, "parts of an upload that broke off stay in the bucket");
            }
        });
    }
}

/// The parts in which an object is put.
struct Parts {
    pieces: BoxStream<'static, Result<Bytes>>,
    hasher: Sha256,
    bytes: u64,
}

impl Parts {
    /// The next part; empty after the last one.
    async fn next(&mut self) -> Result<Bytes> {
        let mut part = BytesMut::new();
        while part.len() < PART_BYTES {
            let Some(piece) = self.pieces.next().await.transpose()? else { break };
            self.hasher.update(&piece);
            self.bytes = self.bytes.saturating_add(piece.len() as u64);
            part.extend_from_slice(&piece);
        }
        Ok(part.freeze())
    }

    /// Requires that all parts were the bytes that they should be.
    fn require(&self, digest: Digest, bytes: u64) -> Result<()> {
        if self.bytes != bytes || Digest(self.hasher.clone().finalize().into()) != digest {
            return Err(Error::broken(format!("the object {digest} has other bytes than its name says")));
        }
        Ok(())
    }
}

fn failed(error: &object_store::Error) -> Error {
    let mut told = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_told = cause.to_string();
        if !told.contains(&cause_told) {
            told = format!("{told}: {cause_told}");
        }
        source = cause.source();
    }
    unreachable(&told)
}

fn unreachable(why: &str) -> Error {
    Error::Remote { server: CALLED.to_owned(), cause: why.to_owned() }
}
