//! Ends an account for good.

use ruma::OwnedUserId;
use tokio::sync::oneshot;

use crate::{
    accounts::{account_data, devices, filters, passwords, profiles, users},
    error::{Error, Result},
    flows::{App, log_out, membership, write},
    ids::UserNum,
};

/// Ends an account: nobody can log in to it any more, what it kept here goes, it leaves its rooms, and nobody else gets its
/// name. With `erase`, whoever was not in a room sees what it wrote there redacted.
pub(crate) async fn deactivate(app: &App, user: UserNum, user_id: OwnedUserId, erase: bool) -> Result<()> {
    let of = user_id.clone();
    write::for_user(app, user, move |app, batch| {
        users::deactivate(batch, user, erase)?;
        passwords::set(batch, user, None);
        let all = devices::list(batch, user)?;
        log_out::end_all(app, batch, user, &of, &all)?;
        account_data::delete_all(batch, user);
        filters::delete_all(batch, user);
        profiles::delete_all(batch, user);
        Ok(())
    })
    .await?;
    let (done, all_left) = oneshot::channel();
    let house = app.clone();
    // A task of its own: a client that goes away does not stop it between two rooms.
    app.env.spawn(async move {
        drop(done.send(membership::leave_all(&house, user, &user_id).await));
    });
    all_left.await.map_err(|_| Error::broken("the server stops"))?
}
