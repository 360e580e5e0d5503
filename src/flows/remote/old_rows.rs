//! Old rows of what is remembered of other servers, which are looked over some at once.

use crate::{
    error::Result,
    flows::App,
    store::{Fault, Guard, Note},
};

/// Has `forget` look at so many rows, and delete those that are old. Answers the key of the last one, if there may be more.
pub(super) fn look_over<K, R>(
    app: &App,
    rows: impl Iterator<Item = Result<(K, R), Fault>>,
    count: usize,
    mut forget: impl FnMut(&mut Note, &K, R) -> Result<(), Fault>,
) -> Result<Option<K>> {
    let (mut note, mut last, mut seen) = (app.store.note(&Guard::own_tables()), None, 0);
    for row in rows.take(count) {
        let (key, row) = row?;
        forget(&mut note, &key, row)?;
        seen += 1;
        last = Some(key);
    }
    if note.row_count() > 0 {
        drop(app.store.enqueue_note(note)?);
    }
    Ok(last.filter(|_| seen == count))
}
