//! `/keys/changes`: the `device_lists` of `/sync`, from one token to another.

use std::{cell::OnceCell, collections::BTreeSet};

use ruma::api::client::filter::FilterDefinition;

use crate::{
    accounts::Caller,
    rooms::erased::Erased,
    store::{Fault, Read, Snapshot},
    sync::{
        Inner, SyncToken,
        news::News,
        sent::SentMembers,
        streams::{Moment, Window, account_data, device_lists, device_lists::Shares},
        v3::{self, Ask},
    },
};

/// The answer, as JSON.
pub(super) fn collect(
    polls: &Inner,
    read: &Snapshot,
    caller: Caller,
    from: SyncToken,
    to: SyncToken,
) -> Result<String, Fault> {
    let ask = Ask::new(caller, Some(from), &FilterDefinition::default());
    // What is looked at here is told to nobody, so it is not remembered as told.
    let sent = SentMembers::default();
    let window = Window {
        read,
        ask: &ask,
        since: Some(from),
        from: from.position,
        upto: to.position.min(read.upto()),
        moment: Moment::default(),
        ephemeral: &polls.ephemeral,
        ignored: BTreeSet::new(),
        now_ms: polls.env.now_ms(),
        sent: &sent,
        push: &polls.push,
        reader: OnceCell::new(),
        erased: Erased::default(),
    };
    let nothing = || r#"{"changed":[],"left":[]}"#.to_owned();
    if window.from >= window.upto {
        return Ok(nothing());
    }
    let news = News::find(read, ask.caller.user, window.from, window.upto, &BTreeSet::new())?;
    let mut shares = Shares::default();
    v3::list_rooms(&window, &news.rooms, &mut account_data::ByRoom::new(), &mut shares)?;
    Ok(device_lists::collect(&window, news.device_lists, shares)?.unwrap_or_else(nothing))
}
