//! Users who are away are mailed digests of what they have not read.
//!
//! The reader of the log that tells push gateways also tells this part for whom there may be news ([`Mails::offer`]). For each pusher of kind
//! `email` a time stands in memory at which it is looked at ([`board`]); what is told then, and whether anything is, is found in the user's
//! rooms (`push/digest.rs`), so that nothing is lost with the memory: after a restart each pusher is looked at. One worker ([`send`]) mails
//! one digest after the other over a connection of its own ([`smtp`]). How far a pusher has come is durable before the next mail is sent, so
//! that a crash repeats one mail at most; but a mail server that has a mail and does not say whether it takes it is waited for beside the next
//! mails, and has the same mail again after a crash. A mail server that hangs or is not there has the worker wait, and nobody else.

mod board;
mod compose;
mod send;
mod smtp;

use std::sync::Arc;

use futures_util::future::BoxFuture;
use lettre::message::Mailbox;
use parking_lot::Mutex;
use ruma::OwnedUserId;
use tokio::sync::Notify;

use crate::{
    config::Config,
    delivery::mail::{
        board::{Key, Watchers},
        compose::Letterhead,
        send::Shared,
        smtp::Smtp,
    },
    env::Env,
    error::{Error, Result},
    ids::UserNum,
    metrics::Metrics,
    push::{Push, mailboxes, pushers},
    schema::push::PusherRow,
    store::{Fault, Read, Store},
};

pub(crate) use compose::escaped;

/// Those who may write the rows of users.
pub trait Accounts: Send + Sync {
    /// Deletes a pusher whose address takes no mail, unless it was set anew since it was this row. Answers whether it is deleted.
    fn delete_refused(
        &self,
        user: UserNum,
        app_id: String,
        pushkey: String,
        row: PusherRow,
    ) -> BoxFuture<'_, Result<bool>>;
}

/// The pushers of kind `email` of one user that are on.
#[derive(Clone, Debug, Default)]
pub struct Mailboxes {
    /// The app id and the pushkey of each.
    pub keys: Vec<(String, String)>,
    /// The time for which the user has a notification wait to be read, in milliseconds; none for what the settings say.
    pub delay_ms: Option<u64>,
}

impl Mailboxes {
    /// Those that the store has.
    pub fn list(read: &(impl Read + ?Sized), user: UserNum) -> Result<Self, Fault> {
        let pushers = pushers::list(read, user)?.into_iter();
        let keys: Vec<_> =
            pushers.filter(|(_, row)| row.is_email() && row.is_enabled).map(|(key, _)| key).collect();
        let delay_ms = if keys.is_empty() { None } else { mailboxes::preferences(read, user)?.delay_ms };
        Ok(Self { keys, delay_ms })
    }
}

/// Mails digests. Cheap to clone.
#[derive(Clone)]
pub struct Mails(Option<Arc<Shared>>);

impl Mails {
    /// A handle that does nothing yet: [`Mails::start`] begins. Without a mail server in the settings it never does anything. Fails where the
    /// password or the certificate authorities cannot be read.
    pub fn open(config: &Config, env: &Env, store: &Store, metrics: &Metrics, push: &Push) -> Result<Self> {
        let settings = &config.email;
        if settings.host.is_empty() {
            return Ok(Self(None));
        }
        let from: Mailbox = settings
            .from
            .parse()
            .map_err(|error| Error::broken(format!("email.from cannot be used: {error}")))?;
        let smtp = Smtp::open(config, env, &from)?;
        let letterhead = Letterhead {
            from,
            server: config.server.name.to_string(),
            base_url: config.server.public_base_url.trim_end_matches('/').to_owned(),
        };
        let shared = Shared {
            env: env.clone(),
            store: store.clone(),
            metrics: metrics.clone(),
            push: push.clone(),
            smtp,
            letterhead,
            delay_ms: settings.delay_s.saturating_mul(1_000),
            board: Mutex::default(),
            turns: Notify::new(),
        };
        Ok(Self(Some(Arc::new(shared))))
    }

    /// Whether mails are sent at all.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Begins to mail. Only the node that leads calls this.
    pub(super) fn start(&self, accounts: Arc<dyn Accounts>) {
        if let Some(shared) = &self.0 {
            shared.env.spawn(send::work(Arc::clone(shared), accounts));
        }
    }

    /// The users who have pushers of kind `email` that are on.
    pub(super) fn watchers(&self) -> Watchers {
        self.0.as_ref().map(|shared| shared.board.lock().watchers()).unwrap_or_default()
    }

    /// Takes over the pushers of a user as the store has them. Those that are new are looked at soon.
    pub(super) fn reload(&self, user: UserNum, user_id: Option<OwnedUserId>, mailboxes: Mailboxes) {
        let Some(shared) = &self.0 else { return };
        let delay_ms = mailboxes.delay_ms.unwrap_or(shared.delay_ms);
        let keys = if user_id.is_some() { mailboxes.keys } else { Vec::new() };
        let keys: Vec<Key> = keys.into_iter().map(|(app_id, pushkey)| (user, app_id, pushkey)).collect();
        shared.board.lock().reload((user, user_id), keys, delay_ms, shared.env.now_ms());
        shared.turns.notify_one();
    }

    /// There may be news for a user.
    pub(super) fn offer(&self, user: UserNum) {
        let Some(shared) = &self.0 else { return };
        if shared.board.lock().offer(user, shared.env.now_ms()) {
            shared.turns.notify_one();
        }
    }

    /// The number of pushers of kind `email` that are on.
    pub fn count(&self) -> usize {
        self.0.as_ref().map_or(0, |shared| shared.board.lock().count())
    }
}
