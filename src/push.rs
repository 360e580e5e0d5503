//! Push rules decide what a user is told of; unread counts follow from them.

pub mod check;
pub mod classes;
mod compiled;
mod condition;
pub mod defaults;
mod floors;
mod glob;
mod lanes;
pub mod notice;
pub mod notified;
pub mod places;
pub mod plan;
pub mod pushers;
pub mod reader;
pub mod rules;
mod scene;
pub mod unread;

pub use reader::{Push, Reader};
