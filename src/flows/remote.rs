//! Other servers: how this server is known to them, how it knows them, and what they ask of it.

pub(crate) mod admit_member;
pub(crate) mod ask;
pub(crate) mod ask_keys;
pub(crate) mod attempts;
pub(crate) mod backfill;
mod brought;
pub(crate) mod candidates;
pub(crate) mod canonical;
pub(crate) mod check;
pub(crate) mod cut_off;
mod edus;
mod ended;
mod entries;
pub(crate) mod fetch;
mod fetch_keys;
pub(crate) mod forget;
pub mod gaps;
mod hand_over;
mod held;
pub(crate) mod hierarchy;
pub(crate) mod history;
pub(crate) mod identify;
pub(crate) mod invite;
pub(crate) mod join;
mod judge;
mod kept;
mod keys;
pub(crate) mod knock;
pub(crate) mod late;
pub(crate) mod leave;
pub(crate) mod left_out;
mod lists;
mod old_rows;
mod outside;
pub(crate) mod ports;
pub(crate) mod payers;
pub(crate) mod query;
pub(crate) mod rest_of_state;
pub(crate) mod read_back;
pub mod receive;
mod remembered;
mod spaces;
pub mod staged;
mod stance;
pub(crate) mod states;
mod strangers;
mod take_back;
pub mod take_in;
pub(crate) mod template;
mod tenants;
pub(crate) mod third_party;
pub(crate) mod verify;
pub(crate) mod whole_state;
mod withdrawn;

use std::sync::Arc;

use federation::{
    call::Caller,
    client::Client,
    discovery::Discovery,
    guard::{self, Guard, ServerList},
    keys::{OldKey, OwnKeys, Ring},
    ports::Ports,
    web::Web,
};
use ruma::{OwnedServerName, signatures::Ed25519KeyPair};

use crate::{
    config::Config,
    env::Env,
    error::{Error, Result},
    store::Store,
};

/// The ways to other servers. Cheap to clone.
#[derive(Clone)]
pub struct Remote {
    /// Sends requests, signed with our keys.
    pub client: Client,
    /// Finds the keys of other servers, and holds ours.
    pub ring: Ring,
    /// Asks for pages of the web.
    pub(crate) web: Web,
    /// The servers that somebody speaks for and whose keys are not known yet.
    strangers: Arc<strangers::Strangers>,
    /// The rooms of other servers that users of ours are coming into.
    pub(crate) joining: join::Joining,
    /// The joins and knocks of users of ours that are under way.
    pub(crate) attempts: attempts::Attempts,
    /// The events of rooms that users of ours are coming into.
    held: held::Held,
    /// The invitations that servers withdrew again.
    withdrawn: withdrawn::Withdrawn,
    /// The questions that anybody may have us ask.
    pub(crate) asking: ask::Asking,
    /// The device lists of users of other servers that are to be asked for again.
    pub(crate) lists: lists::Lists,
    /// The memory that answers about keys take.
    pub(crate) answers: ask_keys::AnswerMemory,
}

impl Remote {
    /// Opens the ways to other servers over the network of `env`, with the key that signs and those that have ended. Fails where
    /// a setting cannot be used.
    pub fn open(
        config: &Config,
        env: &Env,
        store: &Store,
        (signing, old): (Ed25519KeyPair, Vec<OldKey>),
    ) -> Result<Self> {
        let broken = |error: &dyn std::fmt::Display| Error::broken(error.to_string());
        let own = OwnKeys::new(config.server.name.clone(), signing, old).map_err(|it| broken(&it))?;
        let own = Arc::new(own);
        let network = ports::open(config, env)?;
        let doors = Arc::new(ports::Doors(env.clone()));
        let ports = Ports {
            clock: doors.clone(),
            randomness: doors.clone(),
            payers: doors,
            resolver: network.resolver,
            transport: network.transport,
            keys: Arc::new(keys::StoredKeys::new(env.clone(), store.clone())),
        };
        let guard = |allowed: &[String]| {
            let allowed = allowed.iter().map(|network| guard::parse_network(network));
            let allowed = allowed.collect::<std::result::Result<_, _>>().map_err(|it| broken(&it))?;
            Ok::<_, Error>(Guard::new(allowed))
        };
        // Networks in which other servers may be have nothing to show to users, so that no page is looked at there.
        let (of_servers, of_pages) = match config.outbound.allow_private_addresses {
            true => {
                let all = ["0.0.0.0/0".to_owned(), "::/0".to_owned()];
                (guard(&all)?, guard(&all)?)
            }
            false => (guard(&config.federation.networks_allowed)?, Guard::default()),
        };
        let servers = ServerList::new(&config.federation.allow, &config.federation.deny);
        let through_proxy = !config.federation.proxy.is_empty();
        let web = Web::new(Arc::clone(&ports.resolver), network.web, of_pages, through_proxy);
        let discovery = Discovery::new(ports.clone(), of_servers, through_proxy);
        let caller = Caller::new(ports, discovery, servers);
        let notaries: Vec<OwnedServerName> = config.federation.notaries.clone();
        let ring = Ring::new(caller.clone(), Arc::clone(&own), notaries);
        Ok(Self {
            client: Client::new(caller, own),
            ring,
            web,
            strangers: Arc::default(),
            joining: join::Joining::default(),
            withdrawn: withdrawn::Withdrawn::default(),
            attempts: attempts::Attempts::default(),
            held: held::Held::default(),
            asking: ask::Asking::default(),
            lists: lists::Lists::default(),
            answers: ask_keys::AnswerMemory::default(),
        })
    }
}
