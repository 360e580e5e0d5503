//! Objects on the local disk.
//!
//! `parts/` holds what is being received; an object lies in two levels of folders, as `ab/cd/abcd…` by the digits of its SHA-256, with
//! `.1` and so on at the end from the second generation on. A part is synced and then renamed, and its new folder is synced, so that
//! an object is there entirely or not at all.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use bytes::{Bytes, BytesMut};
use sha2::{Digest as _, Sha256};

use crate::{media::objects::ObjectName, schema::media::Digest};

/// Folders are open to the server's own account of the machine alone, because files of private rooms lie there.
const FOLDER_MODE: u32 = 0o700;
/// Files are open to the same account alone.
const FILE_MODE: u32 = 0o600;
/// The folder of what is being received.
const PARTS: &str = "parts";
/// A part is given to the disk each time it has grown by this many bytes, so that the end of a large upload is no long wait.
const SYNCED_EVERY_BYTES: u64 = 64 << 20;

/// A directory with objects.
pub(super) struct Disk {
    directory: PathBuf,
}

pub(super) struct Part {
    file: File,
    name: String,
    hasher: Sha256,
    bytes: u64,
    synced: u64,
}

#[derive(Debug)]
pub(super) struct Object {
    file: File,
    bytes: u64,
}

impl Disk {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn part(&self, name: &str) -> PathBuf {
        self.directory.join(PARTS).join(name)
    }

    /// The folders of an object, one in the other, and its file.
    fn place(&self, object: ObjectName) -> ([PathBuf; 2], PathBuf) {
        let [outer, inner, file] = object.path();
        let outer = self.directory.join(outer);
        let inner = outer.join(inner);
        let file = inner.join(file);
        ([outer, inner], file)
    }

    pub(super) fn begin(&self, name: &str) -> io::Result<Part> {
        let parts = self.directory.join(PARTS);
        if !parts.is_dir() {
            DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(&parts)?;
            sync(&self.directory)?;
            if let Some(above) = self.directory.parent().filter(|above| !above.as_os_str().is_empty()) {
                sync(above)?;
            }
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(FILE_MODE)
            .open(parts.join(name))?;
        Ok(Part { file, name: name.to_owned(), hasher: Sha256::new(), bytes: 0, synced: 0 })
    }

    pub(super) fn put(&self, part: &str, object: ObjectName) -> io::Result<()> {
        let (folders, file) = self.place(object);
        let mut above = self.directory.as_path();
        for folder in &folders {
            match DirBuilder::new().mode(FOLDER_MODE).create(folder) {
                // The one who has made it may not have synced it yet.
                Ok(()) => sync(above)?,
                Err(_) if folder.is_dir() => sync(above)?,
                Err(error) => return Err(error),
            }
            above = folder;
        }
        match fs::rename(self.part(part), &file) {
            // It was put there before.
            Err(error) if error.kind() == io::ErrorKind::NotFound && file.is_file() => {}
            other => other?,
        }
        sync(above)
    }

    pub(super) fn contains(&self, object: ObjectName, bytes: u64) -> io::Result<bool> {
        let ([_, inner], file) = self.place(object);
        match fs::metadata(file) {
            Ok(found) if found.is_file() && found.len() == bytes => {
                // The one who has put it there may not have synced its folder yet.
                sync(&inner)?;
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn discard(&self, name: &str) -> io::Result<()> {
        unless_gone(fs::remove_file(self.part(name)))
    }

    pub(super) fn discard_before(&self, before_ms: u64) -> io::Result<usize> {
        let parts = match fs::read_dir(self.directory.join(PARTS)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            parts => parts?,
        };
        let mut count = 0;
        for part in parts {
            let part = part?;
            let written = part.metadata().and_then(|found| found.modified());
            let written = written.ok().and_then(|it| it.duration_since(UNIX_EPOCH).ok());
            if written.is_none_or(|written| written.as_millis() < u128::from(before_ms)) {
                unless_gone(fs::remove_file(part.path()))?;
                count += 1;
            }
        }
        Ok(count)
    }

    pub(super) fn open_part(&self, name: &str) -> io::Result<Object> {
        Object::of(File::open(self.part(name))?)
    }

    pub(super) fn open(&self, object: ObjectName) -> io::Result<Option<Object>> {
        match File::open(self.place(object).1) {
            Ok(file) => Object::of(file).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn remove(&self, object: ObjectName) -> io::Result<()> {
        let ([_, inner], file) = self.place(object);
        unless_gone(fs::remove_file(file))?;
        // Its row goes next, so that a power cut must not bring it back.
        unless_gone(sync(&inner))
    }
}

impl Part {
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.bytes = self.bytes.saturating_add(bytes.len() as u64);
        if self.bytes - self.synced >= SYNCED_EVERY_BYTES {
            self.file.sync_data()?;
            self.synced = self.bytes;
        }
        Ok(())
    }

    pub(super) fn into_object(self) -> io::Result<Object> {
        Object::of(self.file)
    }

    pub(super) fn finish(self) -> io::Result<(Digest, u64, String)> {
        self.file.sync_all()?;
        Ok((Digest(self.hasher.finalize().into()), self.bytes, self.name))
    }
}

impl Object {
    fn of(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn read(&self, from: u64, length: usize) -> io::Result<Bytes> {
        let mut bytes = BytesMut::zeroed(length);
        self.file.read_exact_at(&mut bytes, from)?;
        Ok(bytes.freeze())
    }

    pub(super) fn reader(&self) -> io::Result<BufReader<Reader>> {
        let file = self.file.try_clone()?;
        Ok(BufReader::new(Reader { file, at: 0, bytes: self.bytes }))
    }
}

/// Reads an object from its beginning. It has a place of its own in the file, which open files that are copies of each other share.
pub(super) struct Reader {
    file: File,
    at: u64,
    bytes: u64,
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = self.file.read_at(into, self.at)?;
        self.at = self.at.saturating_add(length as u64);
        Ok(length)
    }
}

impl Seek for Reader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.bytes.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// Makes the entries of a folder safe from a power cut.
fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn unless_gone(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{media::blobs::Blobs, schema::media::Home};

    fn object(received: &super::super::Received, generation: u32) -> ObjectName {
        ObjectName { digest: received.digest, generation, home: Home::Disk }
    }

    #[test]
    fn what_is_put_is_read_and_what_is_removed_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::on_disk(directory.path().join("media"));
        assert_eq!(blobs.discard_before(u64::MAX).unwrap(), 0, "there is no directory yet");
        let mut part = blobs.begin("a").unwrap();
        part.write(b"hello ").unwrap();
        part.write(b"world").unwrap();
        let received = part.finish().unwrap();
        assert_eq!(received.bytes, 11);
        assert_eq!(
            received.digest.to_string(),
            "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9"
        );
        let first = object(&received, 0);
        assert!(blobs.open(first).unwrap().is_none() && !blobs.contains(first, 11).unwrap());
        blobs.put(received, first).unwrap();
        let path = directory.path().join("media/b9/4d").join(first.digest.to_string());
        assert_eq!(fs::read(path).unwrap(), b"hello world");
        assert!(blobs.contains(first, 11).unwrap() && !blobs.contains(first, 10).unwrap());
        let open = blobs.open(first).unwrap().unwrap();
        assert_eq!((open.bytes(), &open.read(6, 5).unwrap()[..]), (11, &b"world"[..]));
        assert!(open.read(6, 6).is_err(), "it ends before");
        let (mut one, mut other, mut last) = (open.reader().unwrap(), open.reader().unwrap(), [0; 5]);
        one.read_exact(&mut last).unwrap();
        other.seek(SeekFrom::End(-5)).unwrap();
        other.read_exact(&mut last).unwrap();
        assert_eq!(&last, b"world");
        other.seek_relative(-11).unwrap();
        assert!(other.seek(SeekFrom::Current(-1)).is_err(), "nothing stands before the beginning");
        one.read_exact(&mut last).unwrap();
        assert_eq!(&last, b" worl", "readers do not disturb each other");
        blobs.remove(first).unwrap();
        blobs.remove(first).unwrap();
        assert!(blobs.open(first).unwrap().is_none());
        let mut text = String::new();
        open.reader().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello world", "whoever reads it reads on");
    }

    #[test]
    fn generations_are_files_of_their_own_and_two_may_put_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::on_disk(directory.path().to_owned());
        let received = |name| blobs.begin(name).unwrap().finish().unwrap();
        let (a, b, c) = (received("a"), received("b"), received("c"));
        let (first, second) = (object(&a, 0), object(&a, 1));
        blobs.put(a, first).unwrap();
        blobs.put(b, first).unwrap();
        blobs.put(c, second).unwrap();
        blobs.remove(first).unwrap();
        assert!(blobs.open(first).unwrap().is_none() && blobs.open(second).unwrap().is_some());
    }

    #[test]
    fn received_bytes_are_read_before_they_belong_anywhere() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::on_disk(directory.path().to_owned());
        let mut part = blobs.begin("a").unwrap();
        part.write(b"hello").unwrap();
        let received = part.finish().unwrap();
        let open = blobs.open_received(&received).unwrap();
        assert_eq!((open.bytes(), &open.read(1, 4).unwrap()[..]), (5, &b"ello"[..]));
        let mut part = blobs.begin("b").unwrap();
        blobs.discard("b").unwrap();
        part.write(b"spooled").unwrap();
        let spooled = part.into_object().unwrap();
        let mut text = String::new();
        spooled.reader().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!((spooled.bytes(), text.as_str()), (7, "spooled"));
        assert_eq!(fs::read_dir(directory.path().join(PARTS)).unwrap().count(), 1, "it has no name");
    }

    #[test]
    fn parts_are_discarded_once_nobody_writes_to_them() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::on_disk(directory.path().to_owned());
        drop(blobs.begin("a").unwrap());
        assert!(blobs.begin("a").is_err(), "a name is taken once");
        assert_eq!(blobs.discard_before(0).unwrap(), 0);
        assert_eq!(blobs.discard_before(u64::MAX).unwrap(), 1);
        drop(blobs.begin("b").unwrap());
        blobs.discard("b").unwrap();
        blobs.discard("b").unwrap();
        assert_eq!(fs::read_dir(directory.path().join(PARTS)).unwrap().count(), 0);
    }
}
