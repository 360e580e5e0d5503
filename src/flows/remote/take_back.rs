//! Takes back a join that another server has taken, or may have, and that came to nothing here: else others would see a user in the
//! room who is not in it, and this server would hear of the room for nobody.

use std::{collections::BTreeSet, time::Duration};

use futures_util::future::join_all;
use ruma::{OwnedServerName, ServerName};

use crate::{
    error::Result,
    flows::{
        App,
        remote::{
            leave,
            template::{self, Wanted},
        },
    },
    rooms::membership::without_profile,
    schema::rooms::Membership,
};

/// It takes at most this long, less than those wait who join the same room meanwhile.
const TAKES_MAX: Duration = Duration::from_secs(8);

/// Has these servers take the user out of the room again, as long as `may` says so. A server that has not taken the join refuses that.
pub(super) async fn tell(
    app: &App,
    wanted: &Wanted,
    servers: BTreeSet<OwnedServerName>,
    may: impl Fn() -> bool,
) {
    let content = without_profile("leave", None);
    let wanted = Wanted { membership: Membership::Leave, content, ..wanted.clone() };
    let (wanted, may) = (&wanted, &may);
    let told = servers.iter().map(|server| async move {
        let told = tell_one(app, wanted, server, may).await;
        (server, told)
    });
    tokio::select! {
        biased;
        told = join_all(told) => {
            for (server, told) in told {
                match told {
                    Ok(()) => tracing::info!(%server, room = %wanted.room_id, "a join was taken back"),
                    Err(why) => tracing::info!(%server, room = %wanted.room_id, %why, "a join could not be taken back"),
                }
            }
        }
        () = app.env.sleep(TAKES_MAX) => {
            tracing::info!(room = %wanted.room_id, user = %wanted.user_id, "a join could not be taken back in time; others may see the user in the room");
        }
    }
}

async fn tell_one(app: &App, wanted: &Wanted, server: &ServerName, may: impl Fn() -> bool) -> Result<()> {
    let template = template::ask(app, server, wanted).await?;
    if !may() {
        return Ok(());
    }
    leave::send(app, server, wanted, &template).await.map(drop)
}
