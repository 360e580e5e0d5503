//! Turns: whoever does something with the same thing does it after one another.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Result};

/// One place for each of many things, so that what is done with the same one is done in turn.
#[derive(Debug)]
pub(crate) struct Turns<K>(Mutex<BTreeMap<K, Weak<Semaphore>>>);

impl<K> Default for Turns<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Ord> Turns<K> {
    /// Waits for the place of this one. It is free again when this is dropped.
    pub(crate) async fn enter(&self, key: K) -> Result<OwnedSemaphorePermit> {
        let place = self.of(key);
        place.acquire_owned().await.map_err(|_| Error::broken("the server stopped"))
    }

    fn of(&self, key: K) -> Arc<Semaphore> {
        let mut places = self.0.lock();
        places.retain(|_, place| place.strong_count() > 0);
        if let Some(known) = places.get(&key).and_then(Weak::upgrade) {
            return known;
        }
        let new = Arc::new(Semaphore::new(1));
        places.insert(key, Arc::downgrade(&new));
        new
    }
}
