//! Takes back a join that another server has taken, or may have, and that came to nothing here: else others would see a user in the
//! room who is not in it, and this server would hear of the room for nobody.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures_util::future::join_all;
use parking_lot::Mutex;
use ruma::{OwnedServerName, ServerName};

use crate::{
    error::{Error, Result},
    flows::{
        App,
        remote::{
            leave,
            template::{self, Wanted},
        },
    },
};

/// It takes at most this long, less than those wait who join the same room meanwhile.
const TAKES_MAX: Duration = Duration::from_secs(8);

/// The answer of a server to the wish to have a user taken out of a room again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TakenBack {
    /// The user has left the room there.
    Done,
    /// It refuses, as servers do that have not taken the join.
    Refused,
    /// It did not answer, or not with sense.
    Failed,
}

/// Has these servers take the user out of the room again, as long as `may` says so. A server that has not taken the join refuses that.
/// Gives what each did that answered in time.
pub(super) async fn tell(
    app: &App,
    wanted: &Wanted,
    servers: BTreeSet<OwnedServerName>,
    may: impl Fn() -> bool,
) -> BTreeMap<OwnedServerName, TakenBack> {
    let (wanted, may, done) = (wanted, &may, Mutex::new(BTreeMap::new()));
    let done_by = &done;
    let told = servers.iter().map(|server| async move {
        let told = match tell_one(app, wanted, server, may).await {
            Ok(true) => {
                tracing::info!(%server, room = %wanted.room_id, "a join was taken back");
                TakenBack::Done
            }
            Ok(false) => TakenBack::Failed,
            Err(why) => {
                tracing::info!(%server, room = %wanted.room_id, %why, "a join could not be taken back");
                if matches!(why, Error::Refused(_)) { TakenBack::Refused } else { TakenBack::Failed }
            }
        };
        done_by.lock().insert(server.clone(), told);
    });
    tokio::select! {
        biased;
        _ = join_all(told) => {}
        () = app.env.sleep(TAKES_MAX) => {
            tracing::info!(room = %wanted.room_id, user = %wanted.user_id, "a join could not be taken back in time; others may see the user in the room");
        }
    }
    done.into_inner()
}

/// Gives `false` where it is wanted no more.
async fn tell_one(app: &App, wanted: &Wanted, server: &ServerName, may: impl Fn() -> bool) -> Result<bool> {
    let template = template::ask(app, server, wanted).await?;
    if !may() {
        return Ok(false);
    }
    leave::send(app, server, wanted, &template).await.map(|_| true)
}
