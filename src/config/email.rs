//! `[email]`: the mail server by which users get digests of what they have not read.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// `[email]`: the digests of notifications that users get by e-mail.
#[derive(Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Email {
    /// The mail server that takes what is sent; with none, nothing is sent and no pusher of kind `email` is taken.
    pub host: String,
    /// The port of the mail server.
    pub port: u16,
    /// Whether the connection to the mail server is encrypted, and from when on.
    pub tls: EmailTls,
    /// The name by which this server logs in there; empty where it need not.
    pub user: String,
    /// The password that belongs to `user`, where no file holds it.
    pub password: String,
    /// A file whose first line is the password; empty for none.
    pub password_file: PathBuf,
    /// The sender of mails, as `Name <address>` or an address alone.
    pub from: String,
    /// The number of seconds that the mail server may take over one mail, from connecting to it.
    pub timeout_s: u64,
    /// The number of seconds for which a notification waits to be read before a mail tells it, where the user has not said otherwise.
    pub delay_s: u64,
}

impl std::fmt::Debug for Email {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Email")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("tls", &self.tls)
            .field("user", &self.user)
            .field("password", &if self.password.is_empty() { "" } else { "(set)" })
            .field("password_file", &self.password_file)
            .field("from", &self.from)
            .field("timeout_s", &self.timeout_s)
            .field("delay_s", &self.delay_s)
            .finish()
    }
}

impl Default for Email {
    fn default() -> Self {
        Self {
            host: String::new(),
            port: 587,
            tls: EmailTls::Starttls,
            user: String::new(),
            password: String::new(),
            password_file: PathBuf::new(),
            from: String::new(),
            timeout_s: 60,
            delay_s: 600,
        }
    }
}

/// Says whether the connection to the mail server is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EmailTls {
    /// It is not, as for a mail server on the same machine.
    None,
    /// It is before anything is said but the greeting; a server that does not offer it is told nothing.
    #[default]
    Starttls,
    /// It is from the first byte on.
    Tls,
}
