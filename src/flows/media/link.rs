//! Temporary links to files: made by whoever has uploaded a file or by an admin, opened by whoever has the link.

use std::time::Duration;

use crate::{
    accounts::Caller,
    error::{Error, Result},
    flows::{
        App,
        media::download::{self, File},
        write,
    },
    ids::UserNum,
    media::{
        Name,
        links::{self, Wish},
    },
    schema::media::LinkRow,
    store::timer::{self, Timer},
};

/// Makes a link of the caller to a file. Answers its token, which nobody learns again. Errors: as of [`links::make`].
pub(crate) async fn make(app: &App, caller: &Caller, name: Name, wish: Wish) -> Result<(String, LinkRow)> {
    let (token, id) = links::draw(&app.env);
    let (by, secret) = ((caller.user, caller.is_admin), token.clone());
    let row = write::for_caller(app, caller, move |app, batch| {
        links::make(batch, by, &name, (secret.as_str(), id.as_str()), (wish, app.env.now_ms()))
    });
    let row = row.await?;
    tracing::debug!(user = %caller.user, id = row.id, "a link to a file is made");
    Ok((token, row))
}

/// Lists the links of the caller that have not ended.
pub(crate) async fn list(app: &App, caller: &Caller) -> Result<Vec<LinkRow>> {
    let (snapshot, user, now_ms) = (app.store.snapshot(), caller.user, app.env.now_ms());
    let list = move || {
        let mut links = links::list(&*snapshot, user)?;
        links.retain(|link| link.expires_ms > now_ms);
        Ok(links)
    };
    app.env.blocking(list).await
}

/// Revokes a link of the caller. Errors: 404 `M_NOT_FOUND` where the caller has no such link.
pub(crate) async fn revoke(app: &App, caller: &Caller, id: String) -> Result<()> {
    let user = caller.user;
    let ended = write::for_caller(app, caller, move |_, batch| Ok(links::end(batch, user, &id)?)).await?;
    if ended { Ok(()) } else { Err(links::no_such_link().into()) }
}

/// A file that a link gives.
pub(crate) struct Opened {
    /// The file, open for reading.
    pub(crate) file: File,
    /// The link was for this opening alone, so that the file is given as a whole.
    pub(crate) is_once: bool,
}

/// Opens the file of a link. A link that is for one opening is used up by it, durably, before anything of the file is given; `only_looks`
/// is a request for the header fields, which uses up nothing. Errors: 404 `M_NOT_FOUND`, whatever the reason.
pub(crate) async fn open(app: &App, token: String, only_looks: bool) -> Result<Opened> {
    let (owned, now_ms) = (app.clone(), app.env.now_ms());
    let find = move || Ok(links::find(&*owned.store.snapshot(), &token, now_ms)?);
    let link = app.env.blocking(find).await?.ok_or_else(links::no_such_link)?;
    let name = Name { server: link.server.clone(), id: link.media_id.clone() };
    let wish = download::Wish { name, waits: Duration::ZERO, allow_remote: false, is_open_only: false };
    let file = download::find(app, &wish).await.map_err(|error| match error.refusal() {
        Some(_) => Error::from(links::no_such_link()),
        None => error,
    })?;
    if link.is_once && !only_looks {
        let (user, id) = (link.user, link.id);
        let use_up = move |_: &App, batch: &mut _| Ok(links::end(batch, user, &id)?);
        // If two open it at once, one of them finds it gone.
        if !write::for_user(app, user, use_up).await? {
            return Err(links::no_such_link().into());
        }
    }
    Ok(Opened { file, is_once: link.is_once })
}

/// Forgets a link whose time is over.
pub(crate) async fn end(app: &App, user: UserNum, id: String, timer: &Timer) -> Result<()> {
    let fired = timer.clone();
    let end = move |_: &App, batch: &mut _| {
        links::end(batch, user, &id)?;
        timer::cancel(batch, &fired);
        Ok(())
    };
    write::for_user(app, user, end).await
}
