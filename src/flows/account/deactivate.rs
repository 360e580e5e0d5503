//! Ends an account for good, and deletes what it kept here.

use ruma::OwnedUserId;

use crate::{
    accounts::{
        account_data, devices::Ending, filters, openid, passwords, presence, profiles, subscriptions, users,
    },
    encryption::backup,
    error::Result,
    flows::{App, account::log_out, jobs, keys, write},
    ids::UserNum,
    push::rules,
    rooms::delayed,
    schema::jobs::Job,
};

/// Ends an account: nobody can log in to it any more, its data is deleted, it leaves its rooms, and nobody else gets its name.
/// With `erase`, its events are shown redacted to users who were not in the room, and its receipts are deleted.
pub(crate) async fn deactivate(app: &App, user: UserNum, user_id: OwnedUserId, erase: bool) -> Result<()> {
    let (swept, told) = write::for_user(app, user, move |app, batch| {
        users::deactivate(batch, user, erase)?;
        passwords::set(batch, user, None);
        let swept = log_out::end(app, batch, user, &user_id, &Ending::All)?;
        keys::forget(batch, user, &user_id)?;
        account_data::delete_all(batch, user);
        filters::delete_all(batch, user);
        openid::delete_all(batch, user);
        profiles::delete_all(batch, user);
        rules::delete_all(batch, user);
        presence::kept::forget(batch, user);
        backup::delete_all(batch, user);
        delayed::delete_all(batch, user)?;
        subscriptions::delete_all(batch, user);
        Ok((swept, jobs::promise(app, batch, &Job::TellRooms { user })))
    })
    .await?;
    jobs::begin(app, swept);
    jobs::keep(app, Some(told)).await
}
