//! The operator's commands for reports: reading them, and deleting those that were dealt with.

use std::cmp::Reverse;

use ruma::OwnedUserId;
use serde::{Deserialize, Serialize};

use super::accounts::require_user;
use crate::{
    accounts::{reports, users},
    error::{Refusal, Result},
    flows::{App, write},
    schema::reports::ReportRow,
};

/// A list has at most this many reports, because it is held in memory: the newest.
const LISTED_MAX: usize = 10_000;

/// A report, as it is listed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reported {
    /// The user who made it.
    pub by: OwnedUserId,
    /// The name of the thing that is reported, by which the report is dismissed.
    pub about: String,
    /// The report, as it was made.
    #[serde(flatten)]
    pub report: ReportRow,
    /// How many seconds ago it was made.
    pub made_s_ago: u64,
}

/// A report that was deleted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Dismissed {
    /// The user who made it.
    pub by: OwnedUserId,
    /// The name of the thing that was reported.
    pub about: String,
}

/// Lists the reports of all users, the newest first.
pub async fn list(app: &App) -> Result<Vec<Reported>> {
    let (snapshot, now_ms) = (app.store.snapshot(), app.env.now_ms());
    let list = move || {
        let mut found = Vec::new();
        for row in reports::list(&*snapshot)? {
            found.push(row?);
            if found.len() == 2 * LISTED_MAX {
                newest(&mut found);
            }
        }
        newest(&mut found);
        let told = found.into_iter().map(|(user, report)| {
            let by = users::require(&*snapshot, user)?.user_id;
            let made_s_ago = now_ms.saturating_sub(report.at_ms) / 1000;
            Ok(Reported { by, about: report.subject.name(), report, made_s_ago })
        });
        told.collect()
    };
    app.env.blocking(list).await
}

fn newest<T>(found: &mut Vec<(T, ReportRow)>) {
    found.sort_by_key(|(_, report)| Reverse(report.at_ms));
    found.truncate(LISTED_MAX);
}

/// Deletes a report that was dealt with. Errors: 404 `M_NOT_FOUND` if it is not there.
pub async fn dismiss(app: &App, by: &str, about: &str) -> Result<Dismissed> {
    let (user, user_id) = require_user(app, by)?;
    let name = about.to_owned();
    let is_gone = write::for_user(app, user, move |_, batch| Ok(reports::dismiss(batch, user, &name)?));
    if !is_gone.await? {
        return Err(Refusal::not_found(format!("{user_id} has not reported {about}.")).into());
    }
    Ok(Dismissed { by: user_id, about: about.to_owned() })
}
