//! The keys of other servers, kept in the store (server-server API, "Retrieving server keys"). They are written by notes: what
//! a crash loses is fetched again.

use federation::ports::{KeyStore, StoreFailed, StoredDocument, StoredKey};
use futures_util::{FutureExt, future::BoxFuture};
use ruma::{OwnedServerSigningKeyId, ServerName, ServerSigningKeyId};

use crate::{
    env::Env,
    error::{Error, Result},
    schema,
    store::{Guard, Note, Store, key::Json},
};

/// The rows of keys and documents.
pub(super) struct StoredKeys {
    pub(super) env: Env,
    pub(super) store: Store,
}

fn failed(error: Error) -> StoreFailed {
    StoreFailed(error.to_string())
}

impl StoredKeys {
    /// Writes a note. What it says is seen from now on by whoever looks here.
    async fn note(&self, build: impl FnOnce(&mut Note) + Send + 'static) -> Result<(), StoreFailed> {
        let store = self.store.clone();
        let noted = self.env.blocking(move || {
            let mut note = store.note(&Guard::own_tables());
            build(&mut note);
            drop(store.enqueue_note(note)?);
            Ok(())
        });
        noted.await.map_err(failed)
    }
}

impl KeyStore for StoredKeys {
    fn find_key<'a>(
        &'a self,
        server: &'a ServerName,
        key_id: &'a ServerSigningKeyId,
    ) -> BoxFuture<'a, Result<Option<StoredKey>, StoreFailed>> {
        let (store, server, key_id) = (self.store.clone(), server.to_string(), key_id.to_string());
        let find = move || {
            let row = schema::SERVER_KEYS.get(&store.view(), (server.as_str(), key_id.as_str()))?;
            Ok(row.map(|Json(key)| key))
        };
        async move { self.env.blocking(find).await.map_err(failed) }.boxed()
    }

    fn put_keys<'a>(
        &'a self,
        server: &'a ServerName,
        keys: Vec<(OwnedServerSigningKeyId, StoredKey)>,
    ) -> BoxFuture<'a, Result<(), StoreFailed>> {
        let server = server.to_string();
        let build = move |note: &mut Note| {
            for (key_id, key) in keys {
                schema::SERVER_KEYS.put(note, (server.as_str(), key_id.as_str()), &Json(key));
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
