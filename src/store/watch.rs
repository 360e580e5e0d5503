//! Lets a test look at a store, or crash it, after each batch that is accepted: between the parts of a staged step.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;

use crate::store::Store;

type Watcher = Box<dyn FnMut(&Store) + Send>;

/// The watchers of stores, by the address of the store.
static WATCHERS: Mutex<BTreeMap<usize, Watcher>> = Mutex::new(BTreeMap::new());

impl Store {
    /// Calls this after each batch that is accepted.
    pub(crate) fn watch(&self, watcher: impl FnMut(&Self) + Send + 'static) {
        WATCHERS.lock().insert(self.address(), Box::new(watcher));
    }

    /// Calls the watcher of this store, which may write itself and is not told of that.
    pub(super) fn tell_watcher(&self) {
        let watcher = WATCHERS.lock().remove(&self.address());
        if let Some(mut watcher) = watcher {
            watcher(self);
            WATCHERS.lock().entry(self.address()).or_insert(watcher);
        }
    }

    fn address(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}
