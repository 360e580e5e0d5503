//! The operator gives the server a new signing key: it is made now and signs from the next start on, when the old one ends. Old
//! keys go on being published, so that what they signed can be checked (server-server API, "Publishing Keys").

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use federation::keys::OldKey;
use ruma::OwnedServerSigningKeyId;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Refusal, Result},
    flows::{App, write},
    schema::{self, remote::SigningKeyRow},
    store::{Batch, Direction, Read, key::Json},
};

/// At most this many old keys are published; a server that has more is told to keep its key.
const OLD_KEYS_MAX: usize = 50;

/// A key that was made, and signs from the next start on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MadeKey {
    /// The id of the new key.
    pub key_id: String,
    /// The id of the key that signs until then.
    pub replaces: String,
}

/// The key that signs from the next start on.
pub(crate) struct NextKey {
    /// Its id without `ed25519:`.
    pub(crate) version: String,
    /// Its private half, in base64.
    pub(crate) seed: String,
}

const ALGORITHM: &str = "ed25519:";

/// Makes a key that signs from the next start on. Errors: 400 where one waits already, or the server has had too many.
pub async fn make(app: &App) -> Result<MadeKey> {
    let mut seed = [0; 32];
    app.env.fill_random(&mut seed);
    let seed = STANDARD_NO_PAD.encode(seed);
    let key_id = format!("{ALGORITHM}a_{}", app.env.random_string(6));
    let replaces = app.remote.ring.own().key_id().to_string();
    let made = MadeKey { key_id: key_id.clone(), replaces };
    let build = move |_: &App, batch: &mut Batch| {
        let keys = list(batch)?;
        if let Some((waits, _)) = keys.iter().find(|(_, row)| row.seed.is_some()) {
            let why = format!("The key {waits} waits already: it signs once the server is started again.");
            return Err(Refusal::invalid_param(why).into());
        }
        if keys.len() >= OLD_KEYS_MAX {
            return Err(Refusal::invalid_param("This server has had too many signing keys.").into());
        }
        let row = SigningKeyRow { seed: Some(seed), public_key: None, expired_ms: None };
        schema::SIGNING_KEYS.put(batch, key_id.as_str(), &Json(row));
        Ok(())
    };
    write::for_server(app, build, Error::from).await?;
    Ok(made)
}

fn list(read: &(impl Read + ?Sized)) -> Result<Vec<(String, SigningKeyRow)>> {
    let rows = schema::SIGNING_KEYS.prefix::<()>(read, (), Direction::Up)?;
    Ok(rows.map(|row| row.map(|(id, Json(row))| (id, row))).collect::<Result<_, _>>()?)
}

/// Finds the key that is to sign from now on, when the server starts.
pub(crate) fn find_next(read: &(impl Read + ?Sized)) -> Result<Option<NextKey>> {
    let next = list(read)?.into_iter().find_map(|(id, row)| {
        let version = id.strip_prefix(ALGORITHM)?.to_owned();
        Some(NextKey { version, seed: row.seed? })
    });
    Ok(next)
}

/// Notes that a key signs from now on, and that the one before it ended at this time.
pub(crate) fn switch(batch: &mut Batch, next: &NextKey, old_version: &str, old_public: &[u8], now_ms: u64) {
    schema::SIGNING_KEYS.delete(batch, format!("{ALGORITHM}{}", next.version).as_str());
    let public_key = Some(STANDARD_NO_PAD.encode(old_public));
    let row = SigningKeyRow { seed: None, public_key, expired_ms: Some(now_ms) };
    schema::SIGNING_KEYS.put(batch, format!("{ALGORITHM}{old_version}").as_str(), &Json(row));
}

/// Lists the keys that have ended.
pub(crate) fn list_old(read: &(impl Read + ?Sized)) -> Result<Vec<OldKey>> {
    let mut old = Vec::new();
    for (id, row) in list(read)? {
        let (Some(public_key), Some(expired_ms)) = (row.public_key, row.expired_ms) else { continue };
        let damaged = || Error::broken("an old signing key in the store is damaged");
        let key_id = OwnedServerSigningKeyId::try_from(id).map_err(|_| damaged())?;
        let public_key = STANDARD_NO_PAD.decode(public_key).map_err(|_| damaged())?;
        let public_key = public_key.try_into().map_err(|_| damaged())?;
        old.push(OldKey { key_id, public_key, expired_ms });
    }
    Ok(old)
}
