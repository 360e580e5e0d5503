//! What a user is told of: push rules and the unread counts that follow from them.

pub mod defaults;
pub mod check;
pub mod evaluate;
pub mod pushers;
pub mod rules;
pub mod unread;

pub use unread::Push;
