//! Shapes: how an answer writes the news that was collected.

pub(crate) mod fields;
pub(crate) mod v3;
