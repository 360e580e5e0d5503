//! Those who wait for uploads to URIs that were made before, each for one URI: an upload wakes nobody else.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::media::Name;

/// The URIs that somebody waits for.
#[derive(Debug, Default)]
pub(super) struct Awaited(Mutex<BTreeMap<Name, Weak<Notify>>>);

/// The wait for one URI. The last one of a URI takes it away when it is dropped.
pub(super) struct Waits<'a> {
    all: &'a Awaited,
    name: Name,
    /// Notified when something was uploaded to the URI.
    pub(super) uploaded: Arc<Notify>,
}

impl Awaited {
    /// Begins to wait for an upload to a URI.
    pub(super) fn wait(&self, name: &Name) -> Waits<'_> {
        let mut all = self.0.lock();
        let uploaded = all.get(name).and_then(Weak::upgrade).unwrap_or_default();
        all.insert(name.clone(), Arc::downgrade(&uploaded));
        Waits { all: self, name: name.clone(), uploaded }
    }

    /// Wakes those who wait for this URI.
    pub(super) fn notify(&self, name: &Name) {
        let uploaded = self.0.lock().get(name).and_then(Weak::upgrade);
        if let Some(uploaded) = uploaded {
            uploaded.notify_waiters();
        }
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let mut all = self.all.0.lock();
        if Arc::strong_count(&self.uploaded) == 1 {
            all.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn an_upload_wakes_those_alone_who_wait_for_it() {
        let awaited = Awaited::default();
        let name = |id| Name::of("a.example", id).unwrap();
        let (one, same, other) =
            (awaited.wait(&name("1")), awaited.wait(&name("1")), awaited.wait(&name("2")));
        let mut waits = [&one, &same, &other].map(|waits| Box::pin(waits.uploaded.notified()));
        assert!(waits.iter_mut().all(|waits| waits.now_or_never().is_none()));
        awaited.notify(&name("1"));
        assert_eq!(waits.each_mut().map(|waits| waits.now_or_never().is_some()), [true, true, false]);
        drop(waits);
        drop(one);
        assert_eq!(awaited.0.lock().len(), 2, "another one waits");
        drop((same, other));
        assert!(awaited.0.lock().is_empty());
    }
}
