//! Push gateways are told what our users are to be notified of (push gateway API).
//!
//! One reader follows the log ([`reader`]) and offers to each pusher whatever may concern its user ([`board`]); it also says for whom there
//! may be something to mail (`delivery/mail.rs`). Pushers get turns
//! ([`send`]) in lines in which a gateway that hangs holds up no other ([`lines`]); what is sent is decided just before
//! (`push/plan.rs`). All of that is memory: a pusher has a row that says how far it has come, and the reader's cursor stands
//! before all that waits in memory alone. A pusher whose gateway does not take something is marked as behind, and is told the newest
//! notification of each room, and how much is unread, once the gateway is there again.

mod board;
mod lines;
mod reader;
mod send;
mod shared;

use std::sync::Arc;

use federation::web::Web;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::{
    accounts::users,
    delivery::{
        gateways::{
            board::Board,
            shared::{READER, Shared, list_stored},
        },
        mail::{Accounts, Mailboxes, Mails},
    },
    env::Env,
    error::Result,
    ids::Position,
    metrics::Metrics,
    push::{Push, places, pushers},
    store::{Guard, Read, Store, cursor, tail},
};

pub use shared::Owners;

/// Nothing older than this is pushed, so that the log need not be read further back.
const OLD_MS: u64 = 24 * 60 * 60 * 1000;
/// One batch gives places to at most this many pushers.
const BEGUN_AT_ONCE: usize = 1_000;

/// Tells push gateways. Cheap to clone.
#[derive(Clone)]
pub struct Gateways(Arc<Shared>);

impl Gateways {
    /// A handle that does nothing yet: [`Gateways::start`] begins.
    pub fn new(env: Env, store: Store, metrics: Metrics, push: Push, web: Web, mails: Mails) -> Self {
        let (board, turns) = (Mutex::default(), Notify::new());
        Self(Arc::new(Shared { env, store, metrics, push, web, mails, board, turns }))
    }

    /// Begins to tell gateways, from where the last run ended, and those who are mailed. `written` says that the log has grown. Only the
    /// node that leads calls this, before anybody sets a pusher.
    pub fn start(
        &self,
        written: watch::Receiver<()>,
        owners: Arc<dyn Owners>,
        accounts: Arc<dyn Accounts>,
    ) -> Result<()> {
        self.restore()?;
        let shared = &self.0;
        shared.mails.start(accounts);
        shared.env.spawn(send::give_turns(Arc::clone(shared), owners));
        shared.env.spawn(reader::follow(Arc::clone(shared), written));
        Ok(())
    }

    fn restore(&self) -> Result<()> {
        let shared = &self.0;
        loop {
            let guard = Guard::own_tables();
            let mut batch = shared.store.batch(&guard);
            let snapshot = shared.store.snapshot();
            let has_more = places::begin_old(&mut batch, snapshot.upto(), BEGUN_AT_ONCE)?;
            if cursor::find(&batch, READER)?.is_none() {
                // It is as durable as whatever comes after it, so that nothing is missed if the first notes are lost.
                cursor::advance(&mut batch, READER, snapshot.upto());
            }
            if batch.row_count() > 0 {
                drop(shared.store.enqueue(batch)?);
            }
            if !has_more {
                break;
            }
        }
        // The places that were just given are accepted and not published yet.
        let (view, snapshot) = (shared.store.view(), shared.store.snapshot());
        let now_ms = shared.env.now_ms();
        let oldest = tail::position_at(&*snapshot, now_ms.saturating_sub(OLD_MS))?;
        let read = match cursor::find(&*snapshot, READER)? {
            Some(read) => read.max(oldest),
            None => snapshot.upto(),
        };
        let mut board = Board::of_log(read);
        for user in pushers::list_users(&view)? {
            let account = users::find(&view, user)?;
            let user_id = account.map(|account| account.user_id);
            let stored = list_stored(&view, user)?;
            shared.mails.reload(user, user_id.clone(), Mailboxes::list(&view, user)?);
            board.reload(user, user_id, stored, now_ms);
        }
        *shared.board.lock() = board;
        Ok(())
    }

    /// The number of pushers that are on, and how many of these are behind because their gateways do not take what they are sent.
    pub fn count(&self) -> (usize, usize) {
        self.0.board.lock().count()
    }

    /// The position up to which everything was told or is marked as missed.
    pub fn told_upto(&self) -> Position {
        self.0.board.lock().told_upto()
    }
}
