//! The lasting identity of this server: its name and its signing key. Both are kept in the store, so that a backup of
//! the store is a backup of the server (`docs/decisions/signing-key-in-the-store.md`).

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use ruma::signatures::Ed25519KeyPair;

use crate::{
    config::Config,
    env::Env,
    error::{Error, Result},
    schema::SERVER_FACTS,
    server::Lead,
    store::{Guard, LogEntry, Store},
};

const NAME: &str = "server_name";
const KEY: &str = "signing_key";

/// Checks the name against the one in the store, and reads the signing key; the node that leads writes both into a new
/// store. Fails if the store belongs to a server of another name, or if it has no key and this node does not lead.
pub(super) fn open(config: &Config, env: &Env, store: &Store, lead: Option<&Lead>) -> Result<Ed25519KeyPair> {
    let snapshot = store.snapshot();
    let name = config.server.name.as_str();
    if let Some(known) = SERVER_FACTS.get(&*snapshot, NAME)?
        && known != name
    {
        return Err(Error::broken(format!(
            "server.name is {name:?}, but the data belongs to {known:?}; a server can't change its name, because its \
             users, rooms and signatures carry it: set server.name to {known:?}, or use another server.data_dir"
        )));
    }
    if let Some(stored) = SERVER_FACTS.get(&*snapshot, KEY)? {
        return parse(&stored);
    }
    if lead.is_none() {
        return Err(Error::broken("the store has no signing key yet; only the node that leads may make one"));
    }
    let mut seed = [0; 32];
    env.fill_random(&mut seed);
    let stored = format!("a_{} {}", env.random_string(4), STANDARD_NO_PAD.encode(seed));
    let key = parse(&stored)?;
    // The server does not run yet, so that nobody else writes.
    let mut batch = store.batch(&Guard::alone());
    batch.position(&LogEntry::Server);
    SERVER_FACTS.put(&mut batch, NAME, &name.to_owned());
    SERVER_FACTS.put(&mut batch, KEY, &stored);
    drop(store.enqueue(batch)?);
    store.flush()?;
    Ok(key)
}

fn parse(stored: &str) -> Result<Ed25519KeyPair> {
    let damaged = || Error::broken("the signing key in the store is damaged");
    let (version, seed) = stored.split_once(' ').ok_or_else(damaged)?;
    let seed: [u8; 32] =
        STANDARD_NO_PAD.decode(seed).map_err(|_| damaged())?.try_into().map_err(|_| damaged())?;
    let document = pkcs8(seed);
    Ed25519KeyPair::from_der(&document, version.to_owned()).map_err(|_| damaged())
}

/// Writes the seed in the form in which key pairs are exchanged (RFC 8410, section 7).
fn pkcs8(seed: [u8; 32]) -> Vec<u8> {
    let mut document =
        vec![0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    document.extend(seed);
    document
}
