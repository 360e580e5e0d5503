//! `/sync`: wait, then collect. A poll subscribes first, then looks over one snapshot; when nothing is new, it sleeps.

pub mod notifier;
pub mod token;

pub use notifier::Notifier;
pub use token::SyncToken;
