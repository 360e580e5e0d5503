//! Finds documents in the index: the words of a search become a query, and the best of what fits is collected.
//!
//! A query is built from the words of the text alone, so there is no syntax that a searcher could write. All words must be there;
//! a word also stands for those that begin with it. Those are not looked up among all words of the server: each text is indexed by the
//! beginnings of its words, so that no word of a room that the searcher may not see decides what is found.
//!
//! Messages that fit are ranked by BM25 with fixed statistics: how common a word is in
//! messages that the searcher may not see has no part in it, and so the rank of a message stays what it is from page to page.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet},
    sync::Arc,
};

use tantivy::{
    DocId, Score, SegmentOrdinal, SegmentReader, Term,
    collector::{Collector, SegmentCollector},
    columnar::{Column, ColumnValues},
    query::{
        Bm25StatisticsProvider, BooleanQuery, BoostQuery, ConstScoreQuery, Occur, PhraseQuery, Query,
        TermQuery,
    },
    schema::{Field, IndexRecordOption},
};

use crate::{
    error::{Refusal, Result},
    ids::{EventNum, Position, RoomNum},
    search::{
        index::{self, Fields, HAS_URL, Index, TextKind, column},
        words::{self, Kind, Word},
    },
};

/// The text of a search has at most this many bytes.
const SEARCH_BYTES_MAX: usize = 2_000;
/// A search has at most this many different words, because each is looked up.
const WORDS_MAX: usize = 40;
/// At most this many of the documents that fit are handed on, the best ones.
pub const CANDIDATES_MAX: usize = 1_000;
/// A query names rooms to the index where there are at most this many. Otherwise the room of each document that fits is looked at.
const ROOMS_NAMED_MAX: usize = 50;
/// A word that is written as in the search counts this many times one that only begins so.
const SAME_WORD: Score = 2.0;

/// The words of a search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words(Vec<Part>);

/// A part of a search, which must be in the text.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Part {
    /// A word between spaces: the text has a word that begins so.
    Spaced(String),
    /// One character of a script without spaces, or a picture.
    Single(String),
    /// Characters of a script without spaces, as pairs of neighbours: the text has them in this order.
    Run(Vec<String>),
}

impl Words {
    /// Reads the text of a search. Refuses one that is too long: 400 `M_INVALID_PARAM`.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        if text.len() > SEARCH_BYTES_MAX {
            let why = format!(
                "`search_term` has {} bytes; a search may have at most {SEARCH_BYTES_MAX}.",
                text.len()
            );
            return Err(Refusal::invalid_param(why));
        }
        let words = words::list(text);
        let pairs: HashSet<usize> =
            words.iter().filter(|word| word.kind == Kind::Pair).map(|word| word.place).collect();
        let mut parts: Vec<Part> = Vec::new();
        let mut last_pair = None;
        for Word { text, place, kind, .. } in words {
            match kind {
                Kind::Spaced => parts.push(Part::Spaced(text)),
                // A character that is in a pair need not be asked for alone.
                Kind::Single => {
                    let is_in_pair =
                        pairs.contains(&place) || place.checked_sub(1).is_some_and(|at| pairs.contains(&at));
                    if !is_in_pair {
                        parts.push(Part::Single(text));
                    }
                }
                Kind::Pair => {
                    match parts.last_mut() {
                        Some(Part::Run(run)) if last_pair.is_some_and(|last: usize| last + 1 == place) => {
                            run.push(text);
                        }
                        _ => parts.push(Part::Run(vec![text])),
                    }
                    last_pair = Some(place);
                }
            }
        }
        let mut seen = HashSet::new();
        parts.retain(|part| seen.insert(part.clone()));
        let count: usize = parts.iter().map(Part::word_count).sum();
        if count > WORDS_MAX {
            let why =
                format!("`search_term` has {count} different words; a search may have at most {WORDS_MAX}.");
            return Err(Refusal::invalid_param(why));
        }
        Ok(Self(parts))
    }

    /// Whether there is nothing to search for.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds the parts of a text that a search has found in it, as they are written there.
    pub fn add_highlights(&self, text: &str, highlights: &mut std::collections::BTreeSet<String>) {
        let mut open: Option<(usize, usize)> = None;
        for word in words::list(text) {
            if !self.0.iter().any(|part| part.fits(&word)) {
                continue;
            }
            match &mut open {
                // The pairs of a run overlap.
                Some((_, to)) if word.from < *to => *to = word.to.max(*to),
                _ => {
                    highlights.extend(open.and_then(|(from, to)| text.get(from..to)).map(str::to_owned));
                    open = Some((word.from, word.to));
                }
            }
        }
        highlights.extend(open.and_then(|(from, to)| text.get(from..to)).map(str::to_owned));
    }
}

impl Part {
    fn word_count(&self) -> usize {
        match self {
            Self::Spaced(_) | Self::Single(_) => 1,
            Self::Run(pairs) => pairs.len(),
        }
    }

    /// Whether a word of a text is one that this part looks for.
    fn fits(&self, word: &Word) -> bool {
        match (self, word.kind) {
            (Self::Spaced(text), Kind::Spaced) if words::is_beginning(text) => word.text.starts_with(text),
            (Self::Spaced(text), Kind::Spaced) => word.text == *text,
            (Self::Single(text), Kind::Single) => word.text == *text,
            (Self::Run(pairs), Kind::Pair) => pairs.contains(&word.text),
            _ => false,
        }
    }
}

/// The order in which results come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrderBy {
    /// The best fit comes first.
    Rank,
    /// The newest comes first.
    Recent,
}

/// The place of a document among all that fit: the greater comes first. A page goes on below the last key of the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The bits of the score, which are in the order of scores; 0 where the newest comes first.
    pub score: u32,
    /// When the event was sent, in milliseconds since the epoch.
    pub sent_ms: u64,
    /// The number of the event's room.
    pub room: u64,
    /// The number of the event in its room.
    pub event: u64,
}

/// A room in which is searched, and the part of it in which something may be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The number of the room.
    pub room: RoomNum,
    /// Only events whose anchors are in one of these ranges are found, by the newest text among those of edits that are there, too: the first
    /// and the last of each range, rising.
    pub seen: Vec<(Position, Position)>,
}

impl Scope {
    fn sees(&self, anchor: u64) -> bool {
        let at = self.seen.partition_point(|(_, last)| last.number() < anchor);
        self.seen.get(at).is_some_and(|(first, _)| first.number() <= anchor)
    }
}

/// A question to the index.
#[derive(Clone, Debug)]
pub struct Question<'q> {
    /// The words that must be in the text.
    pub words: &'q Words,
    /// The rooms in which is searched, by rising number.
    pub rooms: &'q [Scope],
    /// The kinds of text that are searched.
    pub kinds: &'q [TextKind],
    /// Whether the content must have a `url`, or must not.
    pub url: Option<bool>,
    /// The only senders whose events are found.
    pub senders: Option<&'q [String]>,
    /// Events of these senders are not found.
    pub not_senders: &'q [String],
    /// The order in which results come.
    pub order_by: OrderBy,
    /// Only what comes after this key is handed on.
    pub after: Option<Key>,
}

/// A document that fits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Its place among all that fit.
    pub key: Key,
    /// How well it fits.
    pub score: Score,
    /// The edit of which it holds the text, if it is not that of the event itself.
    pub edit: Option<EventNum>,
}

impl Candidate {
    /// The room of the event.
    pub fn room(&self) -> RoomNum {
        RoomNum(self.key.room)
    }

    /// The number of the event in its room.
    pub fn event(&self) -> EventNum {
        EventNum(self.key.event)
    }
}

/// The documents that fit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// The best of them, at most [`CANDIDATES_MAX`].
    pub candidates: Vec<Candidate>,
    /// Whether there are more than these.
    pub is_more: bool,
    /// The number of all that fit, by room, whatever page is asked for.
    pub counts: HashMap<RoomNum, u64>,
}

/// Asks the index. Errors: it cannot be read.
pub fn find(index: &Index, question: &Question<'_>) -> Result<Found> {
    if question.words.is_empty() || question.rooms.is_empty() || question.kinds.is_empty() {
        return Ok(Found::default());
    }
    let (searcher, fields) = index.searcher();
    let query = query(fields, question);
    let best = Best {
        rooms: question.rooms.into(),
        kinds: question.kinds.iter().fold(0, |kinds, kind| kinds | kind.bit()),
        url: question.url,
        order_by: question.order_by,
        after: question.after,
    };
    searcher.search_with_statistics_provider(&query, &best, &Fixed).map_err(index::broken)
}

/// Builds the query of a question.
fn query(fields: Fields, question: &Question<'_>) -> BooleanQuery {
    let mut clauses: Vec<(Occur, Box<dyn Query>)> = Vec::new();
    for part in &question.words.0 {
        let query = match part {
            Part::Spaced(word) => beginning(fields, word),
            Part::Single(text) => term(fields.text, text),
            Part::Run(pairs) => run(fields.text, pairs),
        };
        clauses.push((Occur::Must, query));
    }
    if question.rooms.len() <= ROOMS_NAMED_MAX {
        let rooms = question.rooms.iter().map(|scope| Term::from_field_u64(fields.room, scope.room.0));
        clauses.push((Occur::Must, any_of(rooms)));
    }
    if let Some(senders) = question.senders {
        let senders = senders.iter().map(|sender| Term::from_field_text(fields.sender, sender));
        clauses.push((Occur::Must, any_of(senders)));
    }
    if !question.not_senders.is_empty() {
        let senders = question.not_senders.iter().map(|sender| Term::from_field_text(fields.sender, sender));
        clauses.push((Occur::MustNot, any_of(senders)));
    }
    BooleanQuery::new(clauses)
}

fn term(field: Field, text: &str) -> Box<dyn Query> {
    Box::new(TermQuery::new(Term::from_field_text(field, text), IndexRecordOption::WithFreqs))
}

/// A query for one of these terms that has no part in how well a document fits.
fn any_of(terms: impl Iterator<Item = Term>) -> Box<dyn Query> {
    let any =
        terms.map(|term| -> Box<dyn Query> { Box::new(TermQuery::new(term, IndexRecordOption::Basic)) });
    Box::new(ConstScoreQuery::new(Box::new(BooleanQuery::union(any.collect())), 0.0))
}

fn run(field: Field, pairs: &[String]) -> Box<dyn Query> {
    match pairs {
        [pair] => term(field, pair),
        pairs => {
            Box::new(PhraseQuery::new(pairs.iter().map(|pair| Term::from_field_text(field, pair)).collect()))
        }
    }
}

/// A query for a word, and for all that begin with it.
fn beginning(fields: Fields, word: &str) -> Box<dyn Query> {
    let same = term(fields.text, word);
    if !words::is_beginning(word) {
        return same;
    }
    let begins = Term::from_field_text(fields.beginnings, word);
    let any: Vec<Box<dyn Query>> = vec![
        Box::new(BoostQuery::new(same, SAME_WORD)),
        Box::new(TermQuery::new(begins, IndexRecordOption::Basic)),
    ];
    Box::new(BooleanQuery::union(any))
}

/// The statistics by which all searches rank: none of them tells anything of messages that the searcher may not see.
struct Fixed;

impl Bm25StatisticsProvider for Fixed {
    fn total_num_tokens(&self, _: Field) -> tantivy::Result<u64> {
        // A message has about twelve words.
        Ok(24)
    }

    fn total_num_docs(&self) -> tantivy::Result<u64> {
        Ok(2)
    }

    fn doc_freq(&self, _: &Term) -> tantivy::Result<u64> {
        Ok(1)
    }
}

/// Collects the best documents.
struct Best {
    rooms: Arc<[Scope]>,
    kinds: u64,
    url: Option<bool>,
    order_by: OrderBy,
    after: Option<Key>,
}

/// The best documents of one segment.
struct BestOfSegment {
    rooms: Arc<[Scope]>,
    kinds: u64,
    url: Option<bool>,
    order_by: OrderBy,
    after: Option<Key>,
    columns: Columns,
    /// The place of the last document's room among the rooms, because neighbours are mostly of one room.
    last: usize,
    /// The worst candidate is on top.
    best: BinaryHeap<Reverse<Ranked>>,
    is_more: bool,
    counts: Vec<u64>,
}

struct Columns {
    room: Arc<dyn ColumnValues<u64>>,
    event: Arc<dyn ColumnValues<u64>>,
    edit: Arc<dyn ColumnValues<u64>>,
    edit_anchor: Arc<dyn ColumnValues<u64>>,
    /// None where no document of the segment has a later text.
    later: Option<Column<u64>>,
    anchor: Arc<dyn ColumnValues<u64>>,
    sent: Arc<dyn ColumnValues<u64>>,
    flags: Arc<dyn ColumnValues<u64>>,
}

/// A candidate, in the order of keys.
#[derive(Clone, Copy, Debug)]
struct Ranked(Candidate);

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.0.key == other.0.key
    }
}

impl Eq for Ranked {}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.key.cmp(&other.0.key)
    }
}

impl Collector for Best {
    type Fruit = Found;
    type Child = BestOfSegment;

    fn for_segment(&self, _: SegmentOrdinal, segment: &SegmentReader) -> tantivy::Result<BestOfSegment> {
        let column =
            |name| Ok::<_, tantivy::TantivyError>(segment.fast_fields().u64(name)?.first_or_default_col(0));
        let columns = Columns {
            room: column(column::ROOM)?,
            event: column(column::EVENT)?,
            edit: column(column::EDIT)?,
            edit_anchor: column(column::EDIT_ANCHOR)?,
            later: segment.fast_fields().column_opt(column::LATER)?,
            anchor: column(column::ANCHOR)?,
            sent: column(column::SENT)?,
            flags: column(column::FLAGS)?,
        };
        Ok(BestOfSegment {
            rooms: Arc::clone(&self.rooms),
            kinds: self.kinds,
            url: self.url,
            order_by: self.order_by,
            after: self.after,
            columns,
            last: 0,
            best: BinaryHeap::new(),
            is_more: false,
            counts: vec![0; self.rooms.len()],
        })
    }

    fn requires_scoring(&self) -> bool {
        true
    }

    fn merge_fruits(&self, segments: Vec<(Vec<Candidate>, bool, Vec<u64>)>) -> tantivy::Result<Found> {
        let mut found = Found::default();
        for (candidates, is_more, counts) in segments {
            found.candidates.extend(candidates);
            found.is_more |= is_more;
            for (scope, count) in self.rooms.iter().zip(counts).filter(|(_, count)| *count > 0) {
                *found.counts.entry(scope.room).or_default() += count;
            }
        }
        found.candidates.sort_by_key(|candidate| Reverse(candidate.key));
        found.is_more |= found.candidates.len() > CANDIDATES_MAX;
        found.candidates.truncate(CANDIDATES_MAX);
        Ok(found)
    }
}

impl BestOfSegment {
    /// Finds the place of a document's room among those in which is searched, if it may be found there.
    fn find_room(&mut self, doc: DocId) -> Option<usize> {
        let room = self.columns.room.get_val(doc);
        let is_at = |scope: &Scope| scope.room.0 == room;
        if !self.rooms.get(self.last).is_some_and(is_at) {
            self.last = self.rooms.binary_search_by_key(&room, |scope| scope.room.0).ok()?;
        }
        let scope = self.rooms.get(self.last)?;
        // Each searcher finds one text of an event: the newest of those that they see.
        let is_seen = scope.sees(self.columns.anchor.get_val(doc))
            && (self.columns.edit.get_val(doc) == 0 || scope.sees(self.columns.edit_anchor.get_val(doc)));
        let later = self.columns.later.as_ref();
        let is_newest = later.is_none_or(|later| !later.values_for_doc(doc).any(|anchor| scope.sees(anchor)));
        (is_seen && is_newest).then_some(self.last)
    }
}

impl SegmentCollector for BestOfSegment {
    type Fruit = (Vec<Candidate>, bool, Vec<u64>);

    fn collect(&mut self, doc: DocId, score: Score) {
        let Some(at) = self.find_room(doc) else { return };
        let flags = self.columns.flags.get_val(doc);
        let is_asked_for =
            flags & self.kinds != 0 && self.url.is_none_or(|has_url| (flags & HAS_URL != 0) == has_url);
        if !is_asked_for {
            return;
        }
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
        }
        let key = Key {
            score: match self.order_by {
                OrderBy::Rank => score.max(0.0).to_bits(),
                OrderBy::Recent => 0,
            },
            sent_ms: self.columns.sent.get_val(doc),
            room: self.columns.room.get_val(doc),
            event: self.columns.event.get_val(doc),
        };
        if self.after.is_some_and(|after| key >= after) {
            return;
        }
        if self.best.len() >= CANDIDATES_MAX {
            self.is_more = true;
            if self.best.peek().is_some_and(|Reverse(worst)| worst.0.key >= key) {
                return;
            }
            self.best.pop();
        }
        let edit = Some(EventNum(self.columns.edit.get_val(doc))).filter(|edit| edit.0 > 0);
        self.best.push(Reverse(Ranked(Candidate { key, score, edit })));
    }

    fn harvest(self) -> Self::Fruit {
        let candidates = self.best.into_iter().map(|Reverse(Ranked(candidate))| candidate).collect();
        (candidates, self.is_more, self.counts)
    }
}

#[cfg(test)]
mod tests;
