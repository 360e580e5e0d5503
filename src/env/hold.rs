//! Holds on places that a newer claim may take away. Whoever gives out the place keeps the [`Kept`] half, and whoever has the
//! place learns from [`Hold::lost`] that it was dropped.

use tokio::sync::oneshot;

/// The half that lasts as long as the place belongs to its holder.
#[derive(Debug)]
pub(crate) struct Kept {
    _dropped: oneshot::Sender<()>,
}

/// The half of the holder.
#[derive(Debug)]
pub(crate) struct Hold(oneshot::Receiver<()>);

/// Makes the two halves of a hold.
pub(crate) fn hold() -> (Kept, Hold) {
    let (dropped, lost) = oneshot::channel();
    (Kept { _dropped: dropped }, Hold(lost))
}

impl Hold {
    /// Resolves when the place was given to somebody newer.
    pub(crate) async fn lost(&mut self) {
        if (&mut self.0).await.is_ok() {
            debug_assert!(false, "nothing is ever sent");
        }
    }
}
