//! Shapes write the news that was collected as the JSON of an answer.

pub(crate) mod fields;
pub(crate) mod sliding;
pub(crate) mod v3;
