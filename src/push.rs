//! Push rules decide what a user is told of; unread counts follow from them.

pub mod catch_up;
pub mod check;
pub mod classes;
mod compiled;
mod condition;
pub mod defaults;
pub mod digest;
mod floors;
pub mod gather;
mod glob;
mod lanes;
mod looker;
pub mod mailboxes;
pub mod notice;
pub mod notified;
pub mod places;
pub mod plan;
pub mod pushers;
pub mod reader;
pub mod rules;
mod scene;
pub mod unread;
mod walk;

pub use reader::{Push, Reader};
