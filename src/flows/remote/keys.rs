//! The keys of other servers, kept in the store (server-server API, "Retrieving server keys"). They are written by notes: what
//! a crash loses is fetched again.
//!
//! Anybody can make up servers and have their keys fetched, so only so much is kept: a sweep forgets the servers whose keys were
//! not needed for long and, where there is still too much, those whose keys were needed longest ago.

use std::{collections::BTreeMap, sync::Arc};

use federation::ports::{KeyStore, StoreFailed, StoredDocument, StoredKey};
use futures_util::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use ruma::{OwnedServerSigningKeyId, ServerName, ServerSigningKeyId};

use crate::{
    env::{Env, Long},
    error::{Error, Result},
    schema::{self, remote::ServerKeyRow},
    store::{Direction, Fault, Guard, Note, Store, key::Json},
};

/// The keys of a server are kept for this long after they were needed: events of a server that is gone are checked by them.
const KEPT_MS: u64 = 90 * DAY_MS;
/// A sweep leaves at most this many keys and documents.
const ROWS_MAX: u64 = if cfg!(test) { 40 } else { 200_000 };
/// A sweep leaves at most this many bytes of documents.
const BYTES_MAX: u64 = 512 << 20;
/// Sweep after this many writes; each is of one server.
const WRITES_MAX: u64 = if cfg!(test) { 20 } else { 10_000 };
/// Forget the rows of this many servers by one note.
const FORGOTTEN_AT_ONCE: usize = 500;
/// A row says to this precision when its key was needed, so that needing a key seldom writes.
const DAY_MS: u64 = 24 * 3_600_000;

/// The rows of keys and documents.
pub(super) struct StoredKeys {
    env: Env,
    store: Store,
    /// Held while a row is read to be written anew, so that none that came in between is lost.
    writing: Arc<Mutex<Writing>>,
}

/// The writes since the last sweep.
#[derive(Debug, Default)]
struct Writing {
    count: u64,
    /// The time of the last sweep; 0 before the first one of this run.
    swept_ms: u64,
}

impl Writing {
    /// Counts a write. Says whether a sweep is due, which then counts as begun.
    fn count(&mut self, now_ms: u64) -> bool {
        self.count += 1;
        let is_due = self.count >= WRITES_MAX || now_ms.abs_diff(self.swept_ms) >= DAY_MS;
        if is_due {
            (self.count, self.swept_ms) = (0, now_ms);
        }
        is_due
    }
}

fn failed(error: Error) -> StoreFailed {
    StoreFailed(error.to_string())
}

impl StoredKeys {
    pub(super) fn new(env: Env, store: Store) -> Self {
        Self { env, store, writing: Arc::default() }
    }

    /// Writes a note. What it says is seen from now on by whoever looks here.
    async fn note(&self, build: impl FnOnce(&mut Note) + Send + 'static) -> Result<(), StoreFailed> {
        let (store, writing, now_ms) = (self.store.clone(), Arc::clone(&self.writing), self.env.now_ms());
        let noted = self.env.blocking(move || {
            let mut writing = writing.lock();
            let mut note = store.note(&Guard::own_tables());
            build(&mut note);
            drop(store.enqueue_note(note)?);
            Ok(writing.count(now_ms))
        });
        if noted.await.map_err(failed)? {
            let (env, store) = (self.env.clone(), self.store.clone());
            self.env.spawn(async move {
                let swept = env.blocking_long(Long::Maintenance, move || sweep(&store, now_ms)).await;
                if let Err(error) = swept {
                    tracing::warn!(%error, "the keys of other servers could not be swept; it is tried again later");
                }
            });
        }
        Ok(())
    }

    /// Notes that a key was needed, if the row says that this was long ago.
    fn touch(&self, server: &str, key_id: &str) -> Result<Option<StoredKey>> {
        let now_ms = self.env.now_ms();
        let find = || schema::SERVER_KEYS.get(&self.store.view(), (server, key_id));
        let Some(Json(row)) = find()? else { return Ok(None) };
        if now_ms.abs_diff(row.asked_ms) < DAY_MS {
            return Ok(Some(row.key));
        }
        let _writing = self.writing.lock();
        let Some(Json(row)) = find()? else { return Ok(None) };
        let mut note = self.store.note(&Guard::own_tables());
        let row = ServerKeyRow { asked_ms: now_ms, ..row };
        schema::SERVER_KEYS.put(&mut note, (server, key_id), &Json(row.clone()));
        drop(self.store.enqueue_note(note)?);
        Ok(Some(row.key))
    }

    fn share(&self) -> Self {
        Self { env: self.env.clone(), store: self.store.clone(), writing: Arc::clone(&self.writing) }
    }
}

/// The rows that are kept of one server.
#[derive(Default)]
struct Kept {
    rows: u64,
    bytes: u64,
    /// The time at which a key of the server was needed last, or one was fetched.
    needed_ms: u64,
}

/// Forgets the servers whose keys were not needed for long, and of the others so many that the rest is within its bounds.
fn sweep(store: &Store, now_ms: u64) -> Result<()> {
    let mut servers: BTreeMap<String, Kept> = BTreeMap::new();
    list(store, &mut servers)?;
    let (mut rows, mut bytes) = (0_u64, 0_u64);
    for kept in servers.values() {
        (rows, bytes) = (rows.saturating_add(kept.rows), bytes.saturating_add(kept.bytes));
    }
    let mut servers: Vec<(String, Kept)> = servers.into_iter().collect();
    servers.sort_by_key(|(_, kept)| kept.needed_ms);
    let doomed = servers.iter().take_while(|(_, kept)| {
        let is_doomed =
            kept.needed_ms.saturating_add(KEPT_MS) < now_ms || rows > ROWS_MAX || bytes > BYTES_MAX;
        if is_doomed {
            (rows, bytes) = (rows.saturating_sub(kept.rows), bytes.saturating_sub(kept.bytes));
        }
        is_doomed
    });
    let doomed: Vec<&str> = doomed.map(|(server, _)| server.as_str()).collect();
    for some in doomed.chunks(FORGOTTEN_AT_ONCE) {
        let mut note = store.note(&Guard::own_tables());
        for server in some {
            schema::SERVER_KEYS.delete_prefix::<(String,)>(&mut note, (*server,));
            schema::SERVER_DOCUMENTS.delete(&mut note, *server);
        }
        drop(store.enqueue_note(note)?);
    }
    tracing::debug!(servers = doomed.len(), "the keys of servers are forgotten");
    Ok(())
}

fn list(store: &Store, servers: &mut BTreeMap<String, Kept>) -> Result<(), Fault> {
    let view = store.view();
    for row in schema::SERVER_KEYS.prefix::<()>(&view, (), Direction::Up)? {
        let ((server, _), Json(row)) = row?;
        let kept = servers.entry(server).or_default();
        kept.rows += 1;
        kept.needed_ms = kept.needed_ms.max(row.asked_ms).max(row.key.fetched_ms);
    }
    for row in schema::SERVER_DOCUMENTS.prefix::<()>(&view, (), Direction::Up)? {
        let (server, Json(document)) = row?;
        let kept = servers.entry(server).or_default();
        kept.rows += 1;
        kept.bytes = kept.bytes.saturating_add(document.json.len() as u64);
        kept.needed_ms = kept.needed_ms.max(document.fetched_ms);
    }
    Ok(())
}

impl KeyStore for StoredKeys {
    fn find_key<'a>(
        &'a self,
        server: &'a ServerName,
        key_id: &'a ServerSigningKeyId,
    ) -> BoxFuture<'a, Result<Option<StoredKey>, StoreFailed>> {
        let (own, server, key_id) = (self.share(), server.to_string(), key_id.to_string());
        let find = move || own.touch(&server, &key_id);
        async move { self.env.blocking(find).await.map_err(failed) }.boxed()
    }

    fn put_keys<'a>(
        &'a self,
        server: &'a ServerName,
        keys: Vec<(OwnedServerSigningKeyId, StoredKey)>,
    ) -> BoxFuture<'a, Result<(), StoreFailed>> {
        let (server, asked_ms) = (server.to_string(), self.env.now_ms());
        let build = move |note: &mut Note| {
            for (key_id, key) in keys {
                let row = ServerKeyRow { key, asked_ms };
                schema::SERVER_KEYS.put(note, (server.as_str(), key_id.as_str()), &Json(row));
            }
        };
        self.note(build).boxed()
    }

    fn find_document<'a>(
        &'a self,
        server: &'a ServerName,
    ) -> BoxFuture<'a, Result<Option<StoredDocument>, StoreFailed>> {
        let (store, server) = (self.store.clone(), server.to_string());
        let find = move || {
            let row = schema::SERVER_DOCUMENTS.get(&store.view(), server.as_str())?;
            Ok(row.map(|Json(document)| document))
        };
        async move { self.env.blocking(find).await.map_err(failed) }.boxed()
    }

    fn put_document<'a>(
        &'a self,
        server: &'a ServerName,
        document: StoredDocument,
    ) -> BoxFuture<'a, Result<(), StoreFailed>> {
        let server = server.to_string();
        let build = move |note: &mut Note| {
            schema::SERVER_DOCUMENTS.put(note, server.as_str(), &Json(document));
        };
        self.note(build).boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::{Durability, Engine, engine::Memory};

    fn keys() -> StoredKeys {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
        StoredKeys::new(Env::simulated(1, 1_000_000), store)
    }

    async fn fetch(keys: &StoredKeys, number: u64) {
        let server = format!("s{number}.example");
        let server = <&ServerName>::try_from(server.as_str()).unwrap();
        let now_ms = keys.env.now_ms();
        let key = StoredKey {
            public_key: [7; 32],
            valid_until_ms: now_ms + 1,
            expired_ms: None,
            fetched_ms: now_ms,
        };
        let document =
            StoredDocument { json: "{}".to_owned(), valid_until_ms: now_ms + 1, fetched_ms: now_ms };
        keys.put_keys(server, vec![(key_id(), key)]).await.unwrap();
        keys.put_document(server, document).await.unwrap();
    }

    fn key_id() -> OwnedServerSigningKeyId {
        "ed25519:k".try_into().unwrap()
    }

    /// Lists the numbers of the servers of which anything is kept.
    fn kept(keys: &StoredKeys) -> Vec<u64> {
        let mut servers = BTreeMap::new();
        list(&keys.store, &mut servers).unwrap();
        assert!(servers.values().all(|kept| kept.rows == 2), "a key goes with its document");
        let number = |server: &String| server[1..].split('.').next().unwrap().parse().unwrap();
        let mut numbers: Vec<u64> = servers.keys().map(number).collect();
        numbers.sort_unstable();
        numbers
    }

    async fn days(keys: &StoredKeys, count: u64) {
        keys.env.sleep(Duration::from_millis(count * DAY_MS)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn keys_that_nobody_needs_are_forgotten_after_a_season_and_others_stay() {
        let keys = keys();
        for number in 0..3 {
            fetch(&keys, number).await;
        }
        // One of the servers is gone, and its old events are checked all the same.
        for _ in 0..4 {
            days(&keys, 30).await;
            let server = <&ServerName>::try_from("s1.example").unwrap();
            assert!(keys.find_key(server, &key_id()).await.unwrap().is_some());
        }
        fetch(&keys, 9).await;
        tokio::task::yield_now().await;
        days(&keys, 1).await;
        assert_eq!(kept(&keys), [1, 9]);
    }

    #[tokio::test(start_paused = true)]
    async fn however_many_servers_somebody_makes_up_a_bounded_number_of_keys_is_kept() {
        let keys = keys();
        for number in 0..100 {
            fetch(&keys, number).await;
            keys.env.sleep(Duration::from_millis(10)).await;
            assert!(kept(&keys).len() as u64 * 2 <= ROWS_MAX + 2 * WRITES_MAX);
        }
        let kept = kept(&keys);
        assert!(kept.contains(&99) && !kept.contains(&0), "{kept:?}");
    }

    #[tokio::test]
    async fn rows_of_before_are_read() {
        let json = r#"{"public_key":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"valid_until_ms":2,"expired_ms":null,"fetched_ms":1}"#;
        let row: ServerKeyRow = serde_json::from_str(json).unwrap();
        assert_eq!((row.key.fetched_ms, row.asked_ms), (1, 0));
        let written = serde_json::to_string(&ServerKeyRow { asked_ms: 5, ..row.clone() }).unwrap();
        assert_eq!(
            serde_json::from_str::<ServerKeyRow>(&written).unwrap(),
            ServerKeyRow { asked_ms: 5, ..row }
        );
    }
}
