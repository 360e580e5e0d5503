//! The lasting identity of this server: its name and its signing key. Both are kept in the store, so that a backup of
//! the store is a backup of the server (`docs/decisions/signing-key-in-the-store.md`).

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use ruma::signatures::Ed25519KeyPair;

use crate::{
    config::Config,
    env::Env,
    error::{Error, Result},
    flows::operator::signing_keys::{self, NextKey},
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
        let current = parse(&stored)?;
        return match signing_keys::find_next(&*snapshot)? {
            Some(next) if lead.is_some() => switch(env, store, &current, &next),
            _ => Ok(current),
        };
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

/// Gives the server the key that was made for it. From this moment on the old one signs nothing.
fn switch(env: &Env, store: &Store, old: &Ed25519KeyPair, next: &NextKey) -> Result<Ed25519KeyPair> {
    let stored = format!("{} {}", next.version, next.seed);
    let key = parse(&stored)?;
    // The server does not run yet, so that nobody else writes.
    let mut batch = store.batch(&Guard::alone());
    batch.position(&LogEntry::Server);
    SERVER_FACTS.put(&mut batch, KEY, &stored);
    signing_keys::switch(&mut batch, next, old.version(), &old.public_key(), env.now_ms());
    drop(store.enqueue(batch)?);
    store.flush()?;
    tracing::info!(key = next.version, "the server signs with a new key from now on");
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        server::Server,
        store::{Durability, Engine, engine::Memory},
    };

    #[tokio::test(start_paused = true)]
    async fn a_new_key_signs_from_the_next_start_on_and_the_old_one_is_still_published() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let start = |seed| {
            let lead = Some(Lead::of_only_node());
            Server::start(Config::default(), Env::simulated(seed, 1_000 * seed), store.clone(), lead).unwrap()
        };
        let document = |server: &Server| server.app().remote.ring.own().document(server.app().env.now_ms());
        let server = start(1);
        let first = server.app().remote.ring.own().key_id().to_string();
        let made = signing_keys::make(server.app()).await.unwrap();
        assert_eq!(made.replaces, first);
        assert!(signing_keys::make(server.app()).await.is_err(), "one waits already");
        assert_eq!(server.app().remote.ring.own().key_id().to_string(), first, "it signs until the end");
        server.stop().await.unwrap();
        let server = start(2);
        assert_eq!(server.app().remote.ring.own().key_id().to_string(), made.key_id);
        assert_eq!(format!("ed25519:{}", server.app().signing.version()), made.key_id);
        let told: serde_json::Value = serde_json::from_str(&document(&server)).unwrap();
        assert!(told["verify_keys"][&made.key_id].is_object());
        assert_eq!(told["old_verify_keys"][&first]["expired_ts"], 2_000);
        server.stop().await.unwrap();
        let server = start(3);
        let again = signing_keys::make(server.app()).await.unwrap();
        server.stop().await.unwrap();
        let server = start(4);
        let told: serde_json::Value = serde_json::from_str(&document(&server)).unwrap();
        assert!(told["verify_keys"][&again.key_id].is_object());
        assert_eq!(told["old_verify_keys"].as_object().unwrap().len(), 2);
    }
}
