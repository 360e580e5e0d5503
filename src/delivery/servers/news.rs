//! Gives what users do at this moment, who types and who is online, to the queues of other servers. It is gathered for a moment,
//! and what has changed again by then is told once.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use ruma::OwnedServerName;

use crate::{
    accounts::presence::ROOMS_MAX,
    delivery::servers::{edus, shared::Shared},
    error::Result,
    rooms::{self, members},
};

/// Ephemeral news is gathered for this long.
const GATHERED_FOR: Duration = Duration::from_millis(200);
/// The presence of at most this many users is told at once.
const USERS_AT_ONCE: usize = 20;
/// A change of presence waits this long for what else is told to a server.
const PRESENCE_WAITS_MS: u64 = 2_000;

/// Tells other servers of ephemeral news until the server ends.
pub(super) async fn tell(shared: Arc<Shared>) {
    loop {
        shared.news.notified().await;
        loop {
            shared.env.sleep(GATHERED_FOR).await;
            let owned = Arc::clone(&shared);
            let told = shared.env.blocking(move || tell_some(&owned)).await;
            shared.turns.notify_one();
            match told {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    tracing::debug!(%error, "other servers were not told who types or is online");
                    break;
                }
            }
        }
    }
}

/// Tells some of what was asked for, and whether more is left.
fn tell_some(shared: &Shared) -> Result<bool> {
    let (typing, presence, is_more) = {
        let mut asked = shared.asked.lock();
        let typing = std::mem::take(&mut asked.typing);
        let mut presence = Vec::new();
        while presence.len() < USERS_AT_ONCE
            && let Some(one) = asked.presence.pop_first()
        {
            presence.push(one);
        }
        (typing, presence, !asked.presence.is_empty())
    };
    let snapshot = shared.store.snapshot();
    for (room, user_id, types) in typing {
        let Some(row) = rooms::find_row(&*snapshot, room)? else { continue };
        let servers = shared.planner.lock().of_room(&snapshot, room)?;
        let edu = edus::typing(room, row.id.as_str(), user_id.as_str(), types);
        let mut board = shared.board.lock();
        for server in servers.iter() {
            board.offer_edu(server, edu.clone(), None);
        }
    }
    let at_ms = shared.env.now_ms() + PRESENCE_WAITS_MS;
    for (user, (user_id, told)) in presence {
        let mut servers = BTreeSet::<OwnedServerName>::new();
        for room in members::list_joined_rooms(&*snapshot, user)?.into_iter().take(ROOMS_MAX) {
            servers.extend(shared.planner.lock().of_room(&snapshot, room)?.iter().cloned());
        }
        let edu = edus::presence(&user_id, &told);
        let mut board = shared.board.lock();
        for server in &servers {
            board.offer_edu(server, edu.clone(), Some(at_ms));
        }
    }
    Ok(is_more)
}
