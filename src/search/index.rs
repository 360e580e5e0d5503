//! The index of full-text search: what is kept of a message, how it gets in and out, and how far the index has come.
//!
//! The index is made of what the store holds and may be thrown away at any time. It keeps no text as such, but the words of each
//! message and the numbers by which the message is found in the store. How far it has come is written in its own commits
//! ([`Progress`]), so that after a crash it goes on from what it really has.

use std::{
    collections::HashMap,
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::ArcSwap;
use parking_lot::{Mutex, MutexGuard};
use serde::{Deserialize, Serialize};
use tantivy::{
    IndexReader, IndexWriter, ReloadPolicy, Searcher, TantivyDocument, Term,
    collector::DocSetCollector,
    directory::RamDirectory,
    indexer::{IndexWriterOptions, LogMergePolicy, NoMergePolicy},
    query::TermQuery,
    schema::{FAST, Field, INDEXED, IndexRecordOption, STRING, Schema, TextFieldIndexing, TextOptions},
    tokenizer::{PreTokenizedString, Token},
};

use crate::{
    error::{Cause, Error, Result},
    ids::{EventNum, Order as Place, Position, RoomNum},
    search::words,
};

/// The number of what is kept of a message, and of how its words are made. An index of another number is made anew.
const LAYOUT: u32 = 4;
/// The directory of the index in the server's data directory.
const DIRECTORY: &str = "search";
/// Segments of which more than this part was deleted are written anew when others are merged.
const DELETED_MAX: f32 = 0.3;

/// The kinds of text that are searched, as the `keys` of a search name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TextKind {
    /// The text in `content.body` of `m.room.message`.
    Body,
    /// The text in `content.name` of `m.room.name`.
    Name,
    /// The text in `content.topic` of `m.room.topic`, and the plain text of its `m.topic`.
    Topic,
}

impl TextKind {
    /// All kinds of text.
    pub const ALL: [Self; 3] = [Self::Body, Self::Name, Self::Topic];

    /// The bit of this kind in the flags of a document.
    pub(super) const fn bit(self) -> u64 {
        match self {
            Self::Body => 1,
            Self::Name => 2,
            Self::Topic => 4,
        }
    }
}

/// The bit that says of a document that its content has a `url`.
pub(super) const HAS_URL: u64 = 8;

/// A text as it is indexed, with what a search asks of its event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The room of the event.
    pub room: RoomNum,
    /// The number of the event in its room.
    pub event: EventNum,
    /// The edit of which this is the text, with its anchor in the room; none for the text of the event itself.
    pub edit: Option<(EventNum, Position)>,
    /// The edits that count before this text, with their anchors: only who sees none of them finds this text. None for the newest text.
    pub later: Vec<(EventNum, Position)>,
    /// The place of the event in its room.
    pub order: Place,
    /// When the event was sent, in milliseconds since the epoch, and never later than it was indexed.
    pub sent_ms: u64,
    /// The kind of the text.
    pub kind: TextKind,
    /// Whether the content of the event has a `url`.
    pub has_url: bool,
    /// The id of the event's sender.
    pub sender: String,
    /// The text whose words are indexed.
    pub text: String,
}

/// How far an index has come. It is written in each commit of the index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    layout: u32,
    /// The incarnation of the store that was read.
    incarnation: u16,
    /// Everything of the log at or before this position is in the index, as far as `walk` has been there.
    pub position: u64,
    /// The walk over the rooms that fills a new index, where it has not ended.
    pub walk: Option<Walk>,
    /// When deleted words must be gone from the disk, too, in milliseconds since the epoch; none if nothing was deleted.
    pub scrub_by_ms: Option<u64>,
}

/// A walk over the timelines of all rooms, in the order of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walk {
    /// Events that came after this position are read from the log alone.
    pub base: u64,
    /// The room that is read.
    pub room: u64,
    /// The order up to which it was read.
    after: (u64, i32),
}

impl Walk {
    /// A walk from the first room on, over what was there at a position.
    pub fn new(base: Position) -> Self {
        Self { base: base.number(), room: 0, after: (0, i32::MIN) }
    }

    /// The order up to which the room was read.
    pub fn after(&self) -> Place {
        let (anchor, minor) = self.after;
        Place { anchor: Position::new(anchor).unwrap_or(Position::ZERO), minor }
    }

    /// The same walk, further on.
    #[must_use]
    pub fn at(&self, room: RoomNum, after: Place) -> Self {
        Self { base: self.base, room: room.0, after: (after.anchor.number(), after.minor) }
    }

    /// Whether the walk will still come to an event at this place, so that nobody else need index it.
    pub fn will_read(&self, room: RoomNum, order: Place) -> bool {
        order.anchor.number() <= self.base
            && (room.0 > self.room || (room.0 == self.room && order > self.after()))
    }
}

impl Progress {
    /// The beginning of an index of a store that has come to this position.
    pub fn begin(incarnation: u16, upto: Position) -> Self {
        let walk = (upto > Position::ZERO).then(|| Walk::new(upto));
        Self { layout: LAYOUT, incarnation, position: upto.number(), walk, scrub_by_ms: None }
    }

    /// The position up to which the log was read.
    pub fn position(&self) -> Position {
        Position::new(self.position).unwrap_or(Position::ZERO)
    }
}

/// Where an index is kept.
#[derive(Clone, Debug)]
pub enum Shelf {
    /// In a directory of its own below the server's data directory.
    Disk(PathBuf),
    /// In memory, for a server whose store is there.
    Memory(RamDirectory),
}

impl Shelf {
    /// The place of the index below a data directory.
    pub fn below(data_dir: &Path) -> Self {
        Self::Disk(data_dir.join(DIRECTORY))
    }
}

/// The fields of a document.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields {
    /// The words of the text, with their places.
    pub(super) text: Field,
    /// The beginnings of the words of the text.
    pub(super) beginnings: Field,
    /// The room and the event.
    key: Field,
    /// The room and the edits whose text this is, or which count before it.
    edit_key: Field,
    pub(super) room: Field,
    event: Field,
    edit: Field,
    edit_anchor: Field,
    later: Field,
    anchor: Field,
    sent: Field,
    flags: Field,
    pub(super) sender: Field,
}

/// The names of the numbers that are read for each document that fits.
pub(super) mod column {
    pub(in crate::search) const ROOM: &str = "room";
    pub(in crate::search) const EVENT: &str = "event";
    pub(in crate::search) const EDIT: &str = "edit";
    pub(in crate::search) const EDIT_ANCHOR: &str = "edit_anchor";
    pub(in crate::search) const LATER: &str = "later";
    pub(in crate::search) const ANCHOR: &str = "anchor";
    pub(in crate::search) const SENT: &str = "sent";
    pub(in crate::search) const FLAGS: &str = "flags";
}

fn schema() -> (Schema, Fields) {
    let mut schema = Schema::builder();
    let words = TextFieldIndexing::default().set_index_option(IndexRecordOption::WithFreqsAndPositions);
    let beginnings = TextFieldIndexing::default().set_index_option(IndexRecordOption::Basic);
    let fields = Fields {
        text: schema.add_text_field("text", TextOptions::default().set_indexing_options(words)),
        beginnings: schema
            .add_text_field("beginnings", TextOptions::default().set_indexing_options(beginnings)),
        key: schema.add_bytes_field("key", INDEXED),
        edit_key: schema.add_bytes_field("edit_key", INDEXED),
        room: schema.add_u64_field(column::ROOM, INDEXED | FAST),
        event: schema.add_u64_field(column::EVENT, FAST),
        edit: schema.add_u64_field(column::EDIT, FAST),
        edit_anchor: schema.add_u64_field(column::EDIT_ANCHOR, FAST),
        later: schema.add_u64_field(column::LATER, FAST),
        anchor: schema.add_u64_field(column::ANCHOR, FAST),
        sent: schema.add_u64_field(column::SENT, FAST),
        flags: schema.add_u64_field(column::FLAGS, FAST),
        sender: schema.add_text_field("sender", STRING),
    };
    (schema.build(), fields)
}

/// The key of an event of a room, by which its document is found.
fn key_of(room: RoomNum, event: EventNum) -> [u8; 16] {
    let mut key = [0; 16];
    let (of_room, of_event) = key.split_at_mut(8);
    of_room.copy_from_slice(&room.0.to_be_bytes());
    of_event.copy_from_slice(&event.0.to_be_bytes());
    key
}

/// An index that is open for searches.
struct Opened {
    index: tantivy::Index,
    reader: IndexReader,
    fields: Fields,
}

/// The index of one server. Searches read what was committed last, while one writer goes on.
pub struct Index {
    shelf: Shelf,
    writer_bytes_max: usize,
    /// Whether merges go on in threads of their own.
    merges: bool,
    opened: ArcSwap<Opened>,
    writing: Mutex<Writing>,
    is_damaged: AtomicBool,
}

/// The part of an index that is being written.
#[derive(Default)]
struct Writing {
    writer: Option<IndexWriter>,
    /// The documents of edits that were added since the last commit, which no search finds yet.
    edits: HashMap<(RoomNum, EventNum), EventNum>,
    /// The number of documents that were added or deleted since the last commit.
    changes: usize,
}

/// Makes an error of the index one of ours.
pub(super) fn broken(error: tantivy::TantivyError) -> Error {
    Error::Broken(Cause::new(format!("the index of search: {error}")))
}

fn broken_io(path: &Path, error: &io::Error) -> Error {
    Error::Broken(Cause::new(format!("the index of search at {}: {error}", path.display())))
}

impl Opened {
    /// Opens what is on the shelf, with its progress; `None` if there is no index, or none that this version can go on with.
    fn find(shelf: &Shelf) -> Result<Option<(Self, Progress)>, String> {
        let index = match shelf {
            Shelf::Disk(path) if !path.join("meta.json").exists() => return Ok(None),
            Shelf::Disk(path) => tantivy::Index::open_in_dir(path),
            Shelf::Memory(ram) if !tantivy::Index::exists(ram).unwrap_or(false) => return Ok(None),
            Shelf::Memory(ram) => tantivy::Index::open(ram.clone()),
        };
        let index = index.map_err(|error| error.to_string())?;
        let (schema, fields) = schema();
        if index.schema() != schema {
            return Err("it has other fields".to_owned());
        }
        let payload = index.load_metas().map_err(|error| error.to_string())?.payload;
        let Some(payload) = payload else { return Ok(None) };
        let progress: Progress = serde_json::from_str(&payload).map_err(|error| error.to_string())?;
        if progress.layout != LAYOUT {
            return Err(format!("it has layout {}", progress.layout));
        }
        let opened = Self::of(index, fields).map_err(|error| error.to_string())?;
        Ok(Some((opened, progress)))
    }

    fn of(index: tantivy::Index, fields: Fields) -> tantivy::Result<Self> {
        // The writer says when there is something new; nothing watches the files.
        let reader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
        Ok(Self { index, reader, fields })
    }

    /// Makes an empty index in place of what is there.
    fn create(shelf: &Shelf) -> Result<Self> {
        let (schema, fields) = schema();
        let index = match shelf {
            Shelf::Disk(path) => {
                match fs::remove_dir_all(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(broken_io(path, &error));
                    }
                    _ => {}
                }
                fs::create_dir_all(path).map_err(|error| broken_io(path, &error))?;
                tantivy::Index::create_in_dir(path, schema)
            }
            Shelf::Memory(ram) => {
                use tantivy::Directory as _;
                // The files of an index that was there are of no use to the new one, and go with the process.
                let _ = ram.delete(Path::new("meta.json"));
                tantivy::Index::create(ram.clone(), schema, tantivy::IndexSettings::default())
            }
        };
        index.and_then(|index| Self::of(index, fields)).map_err(broken)
    }
}

impl Index {
    /// Opens the index of a store with this incarnation, which has come to a position, or begins a new one: where there is none,
    /// where it cannot be read or is of another layout, and where it knows what the store does not (after a restore).
    /// Errors: no index can be made there.
    pub fn open(
        shelf: Shelf,
        writer_bytes_max: usize,
        merges: bool,
        incarnation: u16,
        upto: Position,
    ) -> Result<(Self, Progress)> {
        // Bytes that the disk has lost may also make the library panic, and then the index is made anew, too.
        let found = catch_unwind(AssertUnwindSafe(|| Opened::find(&shelf)));
        let found = found.unwrap_or_else(|_| Err("it cannot be read".to_owned()));
        let (opened, progress) = match found {
            Ok(Some((opened, progress)))
                if progress.incarnation == incarnation && progress.position <= upto.number() =>
            {
                (opened, progress)
            }
            other => {
                match other {
                    Ok(None) => tracing::debug!("there is no index of search yet"),
                    Ok(Some(_)) => {
                        tracing::info!(reason = "the store was restored", "the index of search is built anew")
                    }
                    Err(reason) => tracing::warn!(reason, "the index of search is built anew"),
                }
                (Opened::create(&shelf)?, Progress::begin(incarnation, upto))
            }
        };
        let index = Self {
            shelf,
            writer_bytes_max,
            merges,
            opened: ArcSwap::from_pointee(opened),
            writing: Mutex::default(),
            is_damaged: AtomicBool::new(false),
        };
        Ok((index, progress))
    }

    /// Begins the index anew, with nothing in it.
    pub fn begin_anew(&self, incarnation: u16, upto: Position) -> Result<Progress> {
        let mut writing = self.writing.lock();
        if let Some(writer) = std::mem::take(&mut *writing).writer {
            // A merge that goes on would write among the files of the new index. Its own outcome is of no interest.
            let _ = writer.wait_merging_threads();
        }
        self.opened.store(Arc::new(Opened::create(&self.shelf)?));
        self.is_damaged.store(false, Ordering::Relaxed);
        Ok(Progress::begin(incarnation, upto))
    }

    /// Notes that the index could not be read, so that it is built anew.
    pub fn set_damaged(&self) {
        self.is_damaged.store(true, Ordering::Relaxed);
    }

    /// Whether the index could not be read since it was opened.
    pub fn is_damaged(&self) -> bool {
        self.is_damaged.load(Ordering::Relaxed)
    }

    /// The documents as they were committed last.
    pub(super) fn searcher(&self) -> (Searcher, Fields) {
        let opened = self.opened.load();
        (opened.reader.searcher(), opened.fields)
    }

    /// The number of documents that a search looks through.
    pub fn document_count(&self) -> u64 {
        self.searcher().0.num_docs()
    }

    /// The index, for one who changes it. Nobody else writes meanwhile.
    pub fn write(&self) -> Change<'_> {
        Change { index: self, writing: self.writing.lock() }
    }

    /// Forgets what was not committed, and closes the writer; the next change opens it again.
    pub fn close_writer(&self) {
        *self.writing.lock() = Writing::default();
    }
}

fn token(text: String, position: usize) -> Token {
    Token { offset_from: 0, offset_to: 0, position, text, position_length: 1 }
}

/// Changes to the index that become visible together.
pub struct Change<'a> {
    index: &'a Index,
    writing: MutexGuard<'a, Writing>,
}

impl Change<'_> {
    fn writer(&mut self) -> Result<&mut IndexWriter> {
        if self.writing.writer.is_none() {
            let options = IndexWriterOptions::builder()
                .num_worker_threads(1)
                .num_merge_threads(1)
                .memory_budget_per_thread(self.index.writer_bytes_max)
                .build();
            let opened = self.index.opened.load();
            let writer: IndexWriter = opened.index.writer_with_options(options).map_err(broken)?;
            if self.index.merges {
                let mut policy = LogMergePolicy::default();
                policy.set_del_docs_ratio_before_merge(DELETED_MAX);
                writer.set_merge_policy(Box::new(policy));
            } else {
                writer.set_merge_policy(Box::new(NoMergePolicy));
            }
            self.writing.writer = Some(writer);
        }
        self.writing.writer.as_mut().ok_or_else(|| Error::broken("the index of search has no writer"))
    }

    fn fields(&self) -> Fields {
        self.index.opened.load().fields
    }

    fn delete(&mut self, term: Term) -> Result<()> {
        self.writer()?.delete_term(term);
        self.writing.changes += 1;
        Ok(())
    }

    /// Adds a document, which must not be in the index. An event has one for its own text, and one for that of each edit.
    pub fn add(&mut self, document: &Document) -> Result<()> {
        let Document { room, event, edit, later, order, sent_ms, kind, has_url, sender, text } = document;
        let words = words::list(text);
        if words.is_empty() {
            return Ok(());
        }
        let beginnings = words::list_beginnings(&words);
        let beginnings = beginnings.into_iter().map(|beginning| token(beginning.to_owned(), 0)).collect();
        let tokens = words.into_iter().map(|word| token(word.text, word.place)).collect();
        let fields = self.fields();
        let mut made = TantivyDocument::default();
        // The words are all that is kept, so the text itself need not come along.
        made.add_pre_tokenized_text(fields.text, PreTokenizedString { text: String::new(), tokens });
        let tokens = beginnings;
        made.add_pre_tokenized_text(fields.beginnings, PreTokenizedString { text: String::new(), tokens });
        made.add_bytes(fields.key, &key_of(*room, *event));
        for (edit, _) in edit.iter().chain(later) {
            made.add_bytes(fields.edit_key, &key_of(*room, *edit));
            self.writing.edits.insert((*room, *edit), *event);
        }
        made.add_u64(fields.room, room.0);
        made.add_u64(fields.event, event.0);
        made.add_u64(fields.edit, edit.map_or(0, |(edit, _)| edit.0));
        made.add_u64(fields.edit_anchor, edit.map_or(0, |(_, anchor)| anchor.number()));
        for (_, anchor) in later {
            made.add_u64(fields.later, anchor.number());
        }
        made.add_u64(fields.anchor, order.anchor.number());
        made.add_u64(fields.sent, *sent_ms);
        made.add_u64(fields.flags, kind.bit() | if *has_url { HAS_URL } else { 0 });
        made.add_text(fields.sender, sender);
        self.writer()?.add_document(made).map_err(broken)?;
        self.writing.changes += 1;
        Ok(())
    }

    /// Deletes the documents of an event, if there are some.
    pub fn delete_event(&mut self, room: RoomNum, event: EventNum) -> Result<()> {
        self.delete(Term::from_field_bytes(self.fields().key, &key_of(room, event)))
    }

    /// Deletes the documents whose text is that of this edit or older, and answers the events that it edited.
    pub fn delete_edit(&mut self, room: RoomNum, edit: EventNum) -> Result<Vec<EventNum>> {
        let mut edited: Vec<EventNum> = self.writing.edits.get(&(room, edit)).copied().into_iter().collect();
        let (searcher, fields) = self.index.searcher();
        let term = Term::from_field_bytes(fields.edit_key, &key_of(room, edit));
        let query = TermQuery::new(term.clone(), IndexRecordOption::Basic);
        for address in searcher.search(&query, &DocSetCollector).map_err(broken)? {
            let events = searcher.segment_reader(address.segment_ord).fast_fields().u64(column::EVENT);
            edited.extend(events.map_err(broken)?.first(address.doc_id).map(EventNum));
        }
        edited.sort_unstable();
        edited.dedup();
        if !edited.is_empty() {
            self.delete(term)?;
        }
        Ok(edited)
    }

    /// Deletes all documents of a room.
    pub fn delete_room(&mut self, room: RoomNum) -> Result<()> {
        self.delete(Term::from_field_u64(self.fields().room, room.0))
    }

    /// Deletes all documents of a sender.
    pub fn delete_sender(&mut self, sender: &str) -> Result<()> {
        self.delete(Term::from_field_text(self.fields().sender, sender))
    }

    /// The number of documents that were added or deleted since the last commit.
    pub fn count(&self) -> usize {
        self.writing.changes
    }

    /// Makes the changes durable and visible, together with how far the index has come.
    pub fn commit(&mut self, progress: &Progress) -> Result<()> {
        let payload = serde_json::to_string(progress)
            .map_err(|error| Error::broken(format!("the progress of search cannot be written: {error}")))?;
        let writer = self.writer()?;
        let mut commit = writer.prepare_commit().map_err(broken)?;
        commit.set_payload(&payload);
        commit.commit().map_err(broken)?;
        self.index.opened.load().reader.reload().map_err(broken)?;
        self.writing.edits.clear();
        self.writing.changes = 0;
        Ok(())
    }

    /// Writes anew what holds deleted words, so that nothing of them is left in the files. Nothing may be uncommitted.
    pub fn scrub(&mut self) -> Result<()> {
        debug_assert_eq!(self.writing.changes, 0, "what is uncommitted is not scrubbed");
        let opened = self.index.opened.load_full();
        // A merge that goes on takes segments away, and so does one that begins meanwhile.
        if let Some(writer) = self.writing.writer.take() {
            writer.wait_merging_threads().map_err(broken)?;
        }
        let writer = self.writer()?;
        writer.set_merge_policy(Box::new(NoMergePolicy));
        let segments = opened.index.searchable_segment_metas().map_err(broken)?;
        for segment in segments.into_iter().filter(|segment| segment.has_deletes()) {
            writer.merge(&[segment.id()]).wait().map_err(broken)?;
        }
        opened.reader.reload().map_err(broken)?;
        writer.garbage_collect_files().wait().map_err(broken)?;
        // The next change opens a writer that merges again.
        self.writing.writer = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
