//! Events that servers gave and that nobody can believe, for now or at all.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use ruma::{EventId, OwnedEventId};

use crate::rooms::change::left_out::{LEFT_OUT_BYTES_MAX, LEFT_OUT_MAX};

/// Remember the ids of at most this many events that could not be believed.
const UNBELIEVED_MAX: usize = 20_000;

/// Events that servers gave, and that could not be believed.
#[derive(Default)]
pub(in crate::flows::remote) struct Unbelieved {
    /// Those that may be believed later, because the keys of a server could not be had, or an event that allows them.
    later: BTreeMap<OwnedEventId, Bytes>,
    later_bytes: usize,
    /// The ids of all of them.
    ids: BTreeSet<OwnedEventId>,
}

impl Unbelieved {
    pub(super) fn note(&mut self, id: OwnedEventId) {
        if self.ids.len() < UNBELIEVED_MAX {
            self.ids.insert(id);
        }
    }

    /// Notes an event that may be believed later, as canonical JSON.
    pub(in crate::flows::remote) fn note_later(&mut self, id: OwnedEventId, json: &Bytes) {
        let fits = self.later.len() < LEFT_OUT_MAX && self.later_bytes + json.len() <= LEFT_OUT_BYTES_MAX;
        if fits && !self.later.contains_key(&id) {
            self.later_bytes += json.len();
            // The bytes of the answer go when it was read, so that these are copied.
            self.later.insert(id.clone(), Bytes::copy_from_slice(json));
        }
        self.note(id);
    }

    /// Whether somebody gave an event, which nobody can believe for now.
    pub(in crate::flows::remote) fn contains(&self, id: &EventId) -> bool {
        self.ids.contains(id)
    }

    /// Lists the events that may be believed later, as canonical JSON.
    pub(in crate::flows::remote) fn list_later(&self) -> Vec<(OwnedEventId, Bytes)> {
        self.later.iter().map(|(id, json)| (id.clone(), json.clone())).collect()
    }
}
