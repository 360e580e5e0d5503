//! Use cases of accounts: people make, change and end them, and keep data in them.

pub(crate) mod carry_over;
pub mod change_password;
pub mod confirm;
pub mod deactivate;
mod guess;
pub mod keep;
pub mod log_in;
pub mod log_out;
mod password;
pub mod push_rules;
pub(crate) mod pushers;
pub mod register;
pub mod seen;
pub mod set_profile;
pub(crate) mod standing;
pub(crate) mod subscriptions;
