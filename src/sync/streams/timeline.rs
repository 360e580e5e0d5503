//! The newest events of a room that the client has not been told of.

use crate::{
    ids::{Order, RoomNum},
    rooms::{
        event::Stored,
        show::{self, Viewer},
        timeline::{self, PageToken},
        view::RoomView,
        visibility::Sight,
    },
    schema::rooms::{Membership, RoomRow},
    store::{Direction, Fault},
    sync::streams::Window,
};

/// Events looked at for one answer; filters may leave out most of them.
const LOOKED_AT_MAX: usize = 5_000;
/// Events in a row that the user may not see; there will be more of them.
const HIDDEN_MAX: usize = 200;

/// A part of a room's timeline.
#[derive(Debug)]
pub(crate) struct Timeline {
    /// Rising, each with what the user was to the room.
    pub(crate) events: Vec<(Stored, Membership)>,
    /// Whether events are left out between the last answer and these.
    pub(crate) limited: bool,
    /// Where these begin; above everything if there are none.
    pub(crate) start: Order,
    /// Up to where they were looked for.
    pub(crate) end: Order,
    /// Where `/messages` goes on.
    pub(crate) prev_batch: PageToken,
}

/// The newest events at or below `upto` and above `after` (none: from the beginning).
pub(crate) fn collect(
    window: &Window<'_>,
    num: RoomNum,
    row: &RoomRow,
    sight: &mut Sight,
    after: Option<Order>,
    upto: Order,
) -> Result<Timeline, Fault> {
    let filter = &window.ask.filter;
    let mut events = Vec::new();
    let mut limited = false;
    if filter.timeline.wants_room(&row.id) {
        let page = timeline::page(window.read, num, PageToken(upto), after.map(PageToken), Direction::Down)?;
        let (mut looked_at, mut hidden) = (0, 0);
        for stored in page {
            let stored = stored?;
            // What was back-filled is not live: /messages shows it.
            if stored.order.minor != 0 {
                continue;
            }
            looked_at += 1;
            if looked_at > LOOKED_AT_MAX || hidden > HIDDEN_MAX {
                limited = true;
                break;
            }
            let is_own_member = stored.row.state_key().is_some_and(|key| key == sight.user());
            let is_ignored = stored.row.header.state_key.is_none() && window.ignores(&stored.row.sender());
            if is_ignored || !filter.timeline.wants(&stored) {
                continue;
            }
            let (membership, sees) = sight.look(window.read, &stored)?;
            if !(sees || is_own_member && stored.membership().is_some()) {
                hidden += 1;
                continue;
            }
            hidden = 0;
            if events.len() == filter.timeline_limit {
                limited = true;
                break;
            }
            events.push((stored, membership));
        }
    }
    events.reverse();
    let start = events.first().map_or_else(|| upto.next(), |(stored, _)| stored.order);
    Ok(Timeline { limited, start, end: upto, prev_batch: PageToken::below(start), events })
}

/// The events as the client sees them.
pub(crate) fn show(
    window: &Window<'_>,
    num: RoomNum,
    row: &RoomRow,
    timeline: &Timeline,
) -> Result<Vec<String>, Fault> {
    let viewer = Viewer { until: timeline.end, ..window.viewer() };
    let view = RoomView { read: window.read, num, row };
    let shown = show::show_all(view, &timeline.events, &viewer)?;
    let events = timeline.events.iter().zip(shown);
    events.map(|((stored, _), json)| Ok(window.shaped(&*viewer.seen(view, stored)?, json.into()))).collect()
}
