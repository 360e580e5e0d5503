//! Ends an account for good, and deletes what it kept here.

use ruma::{OwnedUserId, UserId};

use crate::{
    accounts::{
        account_data, devices::Ending, emails, filters, openid, passwords, presence, profiles, subscriptions,
        users,
    },
    encryption::{backup, cross_signing, device_lists},
    error::{Error, Result},
    flows::{App, account::log_out, jobs, write},
    ids::UserNum,
    media::links,
    push::{mailboxes, pushers, rules},
    rooms::delayed,
    schema::jobs::Job,
    store::{Batch, Fault},
};

/// Ends an account: nobody can log in to it any more, its data is deleted, it leaves its rooms, and nobody else gets its name.
/// With `erase`, its events are shown redacted to users who were not in the room, and its receipts are deleted.
pub(crate) async fn deactivate(app: &App, user: UserNum, user_id: OwnedUserId, erase: bool) -> Result<()> {
    let end = move |app: &App, batch: &mut Batch| {
        users::deactivate(batch, user, erase)?;
        passwords::set(batch, user, None);
        let swept = log_out::end(app, batch, user, &user_id, &Ending::All)?;
        forget_signing_keys(batch, user, &user_id)?;
        account_data::delete_all(batch, user);
        filters::delete_all(batch, user);
        openid::delete_all(batch, user);
        profiles::delete_all(batch, user);
        rules::delete_all(batch, user);
        pushers::delete_all(batch, user)?;
        mailboxes::forget_preferences(batch, user);
        emails::remove_all(batch, user)?;
        presence::kept::forget(batch, user);
        backup::delete_all(batch, user);
        delayed::delete_all(batch, user)?;
        subscriptions::delete_all(batch, user);
        links::end_all(batch, user)?;
        let forgotten = erase.then(|| jobs::promise(app, batch, &Job::ForgetMedia { user }));
        Ok((swept, jobs::promise(app, batch, &Job::TellRooms { user }), forgotten))
    };
    let (swept, told, forgotten) = write::for_user_and_server(app, user, end, Error::from).await?;
    jobs::begin(app, swept);
    jobs::begin(app, forgotten);
    jobs::keep(app, Some(told)).await
}

/// Forgets the keys with which the user signs, and has others told if there are some.
fn forget_signing_keys(batch: &mut Batch, user: UserNum, user_id: &UserId) -> Result<(), Fault> {
    if cross_signing::delete_all(batch, user)? {
        device_lists::signing_keys_changed(batch, user, user_id, &[])?;
        write::wake_sharing(batch, user);
    }
    Ok(())
}
