//! The operator's commands for the e-mail addresses of accounts. Whoever adds an address vouches that it is the user's.

use ruma::OwnedUserId;
use serde::{Deserialize, Serialize};

use crate::{
    accounts::emails,
    error::{Error, Refusal, Result},
    flows::{
        App,
        operator::accounts::{require_live, require_user},
        write,
    },
    push::pushers::{self, EMAIL_APP_ID},
    store::Batch,
};

/// A command for the e-mail addresses of an account.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "email")]
pub enum EmailCommand {
    /// Adds an address to an account.
    Add {
        /// Localpart or user id.
        name: String,
        /// The address, in any case of letters.
        address: String,
    },
    /// Removes an address from an account, and ends the digests that are mailed there.
    Remove {
        /// Localpart or user id.
        name: String,
        /// The address, in any case of letters.
        address: String,
    },
    /// Lists the addresses of an account.
    List {
        /// Localpart or user id.
        name: String,
    },
}

/// The e-mail addresses of an account, as they are after the command.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EmailsOf {
    /// The user id of the account.
    pub user_id: OwnedUserId,
    /// The addresses, in the order of the alphabet.
    pub addresses: Vec<EmailEntry>,
}

/// An e-mail address in a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EmailEntry {
    /// The address in its canonical form.
    pub address: String,
    /// When it was added, in milliseconds since the epoch.
    pub added_ms: u64,
}

/// Carries out a command. Errors: 400 for what is no address; 404 for an account that does not exist, or that has no such address; 409 for an
/// address that another account has; 413 for too many.
pub async fn operate(app: &App, command: EmailCommand) -> Result<EmailsOf> {
    let name = match command {
        EmailCommand::Add { name, address } => {
            let ((user, _), address) = (require_live(app, &name)?, emails::canonical(&address)?);
            let now_ms = app.env.now_ms();
            let add = move |_: &App, batch: &mut Batch| emails::add(batch, user, &address, now_ms);
            write::for_user_and_server(app, user, add, Error::from).await?;
            name
        }
        EmailCommand::Remove { name, address } => {
            let ((user, user_id), address) = (require_user(app, &name)?, emails::canonical(&address)?);
            let remove = move |_: &App, batch: &mut Batch| {
                if !emails::remove(batch, user, &address)? {
                    let why = format!("{user_id} has no e-mail address {address}.");
                    return Err(Refusal::not_found(why).into());
                }
                Ok(pushers::delete(batch, user, EMAIL_APP_ID, &address)?)
            };
            write::for_user_and_server(app, user, remove, Error::from).await?;
            name
        }
        EmailCommand::List { name } => name,
    };
    let (user, user_id) = require_user(app, &name)?;
    let rows = emails::list(&*app.store.snapshot(), user)?.into_iter();
    let addresses = rows.map(|(address, row)| EmailEntry { address, added_ms: row.added_ms }).collect();
    Ok(EmailsOf { user_id, addresses })
}
