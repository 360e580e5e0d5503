//! The reasons why a batch is not accepted, and the errors that these become.

use std::time::Duration;

use bytes::Bytes;

use crate::{
    error::{Error, Refusal},
    store::Fault,
};

/// Why a batch was not accepted.
#[derive(Debug)]
pub enum NotAccepted {
    /// A precondition does not hold, because somebody else was first.
    Conflict(Conflict),
    /// It is above [`BATCH_BYTES_MAX`](crate::store::BATCH_BYTES_MAX) or [`BATCH_ROWS_MAX`](crate::store::BATCH_ROWS_MAX).
    TooLarge,
    /// This table is written without the lock of its domain. It is a fault of the code, which tests find.
    Unguarded(&'static str),
    /// Too much waits for the disk. The caller may try again in a moment.
    Busy,
    /// The positions that were reserved for a staged step are past, so the step has to be made again.
    Overtaken,
    /// The store itself failed.
    Fault(Fault),
}

/// A precondition that does not hold.
#[derive(Debug, Clone)]
pub struct Conflict {
    /// The table of the row that was expected.
    pub table: &'static str,
    /// The row that is there instead; [`Table::conflicting`](crate::store::Table::conflicting) reads it.
    pub found: Option<Bytes>,
}

impl From<NotAccepted> for Error {
    fn from(why: NotAccepted) -> Self {
        match why {
            NotAccepted::Conflict(conflict) => Self::broken(format!(
                "two writers changed table {} at the same time, though one lock should keep them apart",
                conflict.table
            )),
            NotAccepted::TooLarge => Refusal::too_large(
                "This request would write too much at once. Split it into several smaller requests.",
            )
            .into(),
            NotAccepted::Unguarded(table) => {
                Self::broken(format!("a batch writes without the lock that it needs: {table}"))
            }
            NotAccepted::Busy | NotAccepted::Overtaken => Self::Busy { retry_after: Duration::from_secs(1) },
            NotAccepted::Fault(fault) => fault.into(),
        }
    }
}
