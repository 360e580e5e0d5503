//! Checks the rows of delayed events.

use crate::{
    schema,
    store::{check::RowCheck, key::Json},
};

/// Lists the checks of delayed events and of the indexes that list them.
pub(super) fn checks() -> [RowCheck; 4] {
    [
        RowCheck::of(&schema::DELAYED, |read, (user, id), Json(row), doubts| {
            let id = id.as_str();
            let is_listed = match &row.end {
                None => schema::DELAYED_DUE.contains(read, (*user, row.listed_ms(), id))?,
                Some(end) => schema::DELAYED_ENDED.contains(read, (*user, end.at_ms, id))?,
            };
            doubts.unless(is_listed, "neither the events that wait nor those that have ended list it");
            doubts.unless(schema::USERS.contains(read, *user)?, "its account is gone");
            Ok(())
        }),
        RowCheck::of(&schema::DELAYED_DUE, |read, (user, listed_ms, id), listing, doubts| {
            let row = schema::DELAYED.get(read, (*user, id.as_str()))?.map(|Json(row)| row);
            let row = row.filter(|row| row.end.is_none() && row.listed_ms() == *listed_ms);
            let is_due = row.is_some_and(|row| listing.due_ms.is_none() || *listing == row.listing());
            doubts.unless(is_due, "no delayed event of this id is due then");
            Ok(())
        }),
        RowCheck::of(&schema::DELAYED_ENDED, |read, (user, at_ms, id), (), doubts| {
            let row = schema::DELAYED.get(read, (*user, id.as_str()))?;
            let is_ended = row.and_then(|Json(row)| row.end).is_some_and(|end| end.at_ms == *at_ms);
            doubts.unless(is_ended, "no delayed event of this id ended then");
            Ok(())
        }),
        RowCheck::of(&schema::DELAYED_TIMER, |read, user, _, doubts| {
            doubts.unless(schema::USERS.contains(read, *user)?, "its account is gone");
            Ok(())
        }),
    ]
}
