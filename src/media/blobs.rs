//! Objects on the local disk, and the parts into which all bytes are received, wherever they are kept after that. Whoever asks where an
//! object lies, on the disk or in a bucket, goes through `flows/media/stores.rs`. These functions read and write files, so that they
//! are called off the async threads.

pub mod disk;

use std::{io, path::PathBuf, sync::Arc};

use bytes::Bytes;

use crate::{
    media::{blobs::disk::Disk, objects::ObjectName},
    schema::media::Digest,
};

/// The files of one server. A clone is cheap.
#[derive(Clone)]
pub struct Blobs(Arc<Disk>);

/// Bytes that are being received into a file of their own.
pub struct Part(disk::Part);

/// Bytes that were received and are safe on the disk, and belong nowhere yet.
#[derive(Clone, Debug)]
pub struct Received {
    /// The SHA-256 of the bytes.
    pub digest: Digest,
    /// The number of the bytes.
    pub bytes: u64,
    part: String,
}

/// An object that is open for reading. It stays readable also when it is removed meanwhile.
#[derive(Debug)]
pub struct Object(disk::Object);

impl Blobs {
    /// The objects in a directory, which is made when the first one comes.
    pub fn on_disk(directory: PathBuf) -> Self {
        Self(Arc::new(Disk::new(directory)))
    }

    /// Begins to receive bytes under a name that no other part has. Errors: as of the file system.
    pub fn begin(&self, name: &str) -> io::Result<Part> {
        self.0.begin(name).map(Part)
    }

    /// Puts received bytes where they belong, in one step. Once this returns, they survive a power cut. Doing it twice changes nothing.
    pub fn put(&self, received: Received, object: ObjectName) -> io::Result<()> {
        self.0.put(&received.part, object)
    }

    /// Opens received bytes that were not put anywhere yet, to send them elsewhere.
    pub fn open_received(&self, received: &Received) -> io::Result<Object> {
        self.0.open_part(&received.part).map(Object)
    }

    /// Whether an object of so many bytes is there.
    pub fn contains(&self, object: ObjectName, bytes: u64) -> io::Result<bool> {
        self.0.contains(object, bytes)
    }

    /// Throws the part of this name away; nothing happens where it is gone.
    pub fn discard(&self, name: &str) -> io::Result<()> {
        self.0.discard(name)
    }

    /// Throws away parts that nobody has written to since this time, in milliseconds since the epoch. Answers their number.
    pub fn discard_before(&self, before_ms: u64) -> io::Result<usize> {
        self.0.discard_before(before_ms)
    }

    /// Opens an object. None where it is not there.
    pub fn open(&self, object: ObjectName) -> io::Result<Option<Object>> {
        Ok(self.0.open(object)?.map(Object))
    }

    /// Removes an object for good; nothing happens where it is gone.
    pub fn remove(&self, object: ObjectName) -> io::Result<()> {
        self.0.remove(object)
    }
}

impl Part {
    /// Appends bytes to the part.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write(bytes)
    }

    /// Reads what was written so far, which nobody keeps: once its name is discarded, it is gone when it is closed, or the server ends.
    pub fn into_object(self) -> io::Result<Object> {
        self.0.into_object().map(Object)
    }

    /// Makes what was received safe from a power cut.
    pub fn finish(self) -> io::Result<Received> {
        let (digest, bytes, part) = self.0.finish()?;
        Ok(Received { digest, bytes, part })
    }
}

impl Object {
    /// The number of its bytes.
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Reads so many bytes from a place on. Errors: also where it ends before.
    pub fn read(&self, from: u64, length: usize) -> io::Result<Bytes> {
        self.0.read(from, length)
    }

    /// Reads it from its beginning on, for decoders.
    pub fn reader(&self) -> io::Result<impl io::BufRead + io::Seek + use<>> {
        self.0.reader()
    }
}
