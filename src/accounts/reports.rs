//! Reports that users make to those who run this server, of events, rooms and other users. The room is not told, nor is whoever is
//! reported. They are kept until an operator dismisses them, also where the one who made them is gone.

use crate::{
    error::{Refusal, Result},
    ids::UserNum,
    schema::{
        self,
        reports::{ReportRow, Subject},
    },
    store::{Batch, Direction, Fault, Read, key::Json},
};

/// A user has at most this many reports that nobody has dismissed, because each takes disk, and somebody has to read it.
pub const REPORTS_MAX: usize = 1_000;
/// The reason of a report has at most this many bytes, so that reports can be listed together.
pub const REASON_BYTES_MAX: usize = 8 << 10;
/// An id of a room, event or user that is reported has at most this many bytes.
const ID_BYTES_MAX: usize = 255;

/// Whether the ids of what is reported are no longer than ids are.
fn is_short(subject: &Subject) -> bool {
    let lengths = match subject {
        Subject::Event { room_id, event_id } => [room_id.as_str().len(), event_id.as_str().len()],
        Subject::Room { room_id } => [room_id.as_str().len(), 0],
        Subject::User { user_id } => [user_id.as_str().len(), 0],
    };
    lengths.into_iter().all(|length| length <= ID_BYTES_MAX)
}

/// Keeps a report. A second report of the same thing by the same user takes the place of the first. The caller holds the user's
/// lock. Errors: 413 `M_TOO_LARGE` for a reason that is too long, 403 `M_FORBIDDEN` if the user has reported too much.
pub fn keep(batch: &mut Batch, user: UserNum, row: ReportRow) -> Result<()> {
    if row.reason.len() > REASON_BYTES_MAX {
        let why = format!("`reason` has {} bytes; {REASON_BYTES_MAX} are allowed.", row.reason.len());
        return Err(Refusal::too_large(why).into());
    }
    if !is_short(&row.subject) {
        return Err(Refusal::invalid_param("The id of what is reported is too long.").into());
    }
    let name = row.subject.name();
    if !schema::REPORTS.contains(batch, (user, name.as_str()))? {
        let rows = schema::REPORTS.prefix::<(UserNum,)>(batch, (user,), Direction::Up)?;
        let count = rows.take(REPORTS_MAX).try_fold(0, |count, row| row.map(|_| count + 1))?;
        if count == REPORTS_MAX {
            tracing::debug!(%user, reason = "quota", "a report is refused");
            let why = "You have made as many reports as this server keeps of one user.";
            return Err(Refusal::forbidden(why).into());
        }
    }
    schema::REPORTS.put(batch, (user, name.as_str()), &Json(row));
    Ok(())
}

/// Lists all reports, each with who made it: by user, and of each user by what is reported.
pub fn list(
    read: &(impl Read + ?Sized),
) -> Result<impl Iterator<Item = Result<(UserNum, ReportRow), Fault>> + '_, Fault> {
    let rows = schema::REPORTS.prefix::<()>(read, (), Direction::Up)?;
    Ok(rows.map(|row| row.map(|((user, _), Json(row))| (user, row))))
}

/// Deletes a report of a user by the name of what it is about. Answers whether it was there. The caller holds the user's lock.
pub fn dismiss(batch: &mut Batch, user: UserNum, name: &str) -> Result<bool, Fault> {
    let is_there = schema::REPORTS.contains(batch, (user, name))?;
    if is_there {
        schema::REPORTS.delete(batch, (user, name));
    }
    Ok(is_there)
}
