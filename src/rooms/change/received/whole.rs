//! Events of which only the redacted form is here, because they came with content that did not fit their hash. Servers that know a redaction
//! give events so, and whoever likes may take the content away of what they pass on. Whatever came first, the event counts as its
//! sender wrote it: once it comes whole, it takes the place of what was left of it.

use std::{borrow::Cow, collections::BTreeMap};

use super::{Change, Received, Signed, signed::is_stub_of};
use crate::{
    error::Result,
    ids::{EventNum, RoomNum},
    rooms::{
        admit::{self, Evidence, Verdict},
        event::{self, Event},
        redact, relations, rules,
        state::{self, Sketch},
    },
    schema,
    schema::{
        rooms::{AsideRow, Place, RoomRow},
        state::StateRef,
    },
    store::{Fault, Read},
};

/// Whether an event came whole of which only the redacted form is here, and no redaction is known.
pub fn completes(
    read: &(impl Read + ?Sized),
    room: &RoomRow,
    num: RoomNum,
    signed: &Signed,
) -> Result<bool, Fault> {
    if signed.is_redacted() {
        return Ok(false);
    }
    let Some(known) = event::find_num(read, num, &signed.unverified().id)? else { return Ok(false) };
    let kept = event::require_kept(read, num, known)?;
    Ok(is_stub_of(&kept.row, signed.json(), rules(room)?))
}

impl Change {
    /// Finds what is here of an event that comes now, like [`Change::find_known`], after the whole of it has taken the place of what
    /// was left of it. In a room whose servers choose ids, another event of the same id may be here: that one stays, and the one that
    /// comes now counts as known, never as the outlier whose place it would take.
    pub(in crate::rooms::change) fn find_received(
        &mut self,
        received: &Received,
    ) -> Result<Option<(EventNum, Option<AsideRow>)>> {
        let key = received.key(self.num);
        let Some(known) = self.find_known(&key)? else { return Ok(None) };
        if !self.is_here(known.0, received)? {
            let why = "another event of its id came before";
            tracing::debug!(room = %self.num, event = %received.id(), why, "an event is not taken");
            return Ok(Some((known.0, None)));
        }
        if !self.take_whole(known.0, received)? {
            return Ok(Some(known));
        }
        Ok(self.find_known(&key)?)
    }

    /// Whether the event that was found by the key of this one is this one.
    pub(in crate::rooms::change) fn is_here(
        &self,
        known: EventNum,
        received: &Received,
    ) -> Result<bool, Fault> {
        let kept = event::require_kept(&self.batch, self.num, known)?;
        Ok(received.is_in(&kept.row, self.rules()))
    }

    /// Takes an event whole of which only the redacted form is here, unless a redaction is known that left it so. One that was
    /// rejected as it was is forgotten, so that it is judged anew, unless a state names it. Gives whether anything changed.
    fn take_whole(&mut self, num: EventNum, received: &Received) -> Result<bool> {
        if received.is_cut() {
            return Ok(false);
        }
        let stored = event::require(&self.batch, self.num, num)?;
        if !is_stub_of(&stored.row, received.json(), self.rules()) {
            return Ok(false);
        }
        tracing::debug!(room = %self.num, event = %received.id(), "an event comes whole of which the redacted form was here");
        let place = schema::PLACE.get(&self.batch, (self.num, num))?;
        let mut whole = redact::with_json(&stored, received.json())?;
        if matches!(place, Some(Place::Timeline(_))) {
            let before = match stored.row.header.before {
                Some(before) => state::canonical(&self.batch, self.num, before)?,
                None => state::just_below(&self.batch, self.num, stored.order)?,
            };
            if !self.is_allowed_whole(received.event(), before)? {
                return Ok(false);
            }
            // In older versions the redacted form of a redaction does not say what it redacts.
            let redaction = self.judge_redaction(received.event(), before)?;
            whole.row.header.unseen |= !redaction.is_shown();
            self.replace_event(&whole);
            if !whole.row.header.unseen {
                relations::index(&mut self.batch, self.num, &whole)?;
            }
            self.carry_out(redaction, &whole)?;
        } else {
            let aside = schema::ASIDE.get(&self.batch, (self.num, num))?;
            // A rejected event without a key is named by no state.
            let is_unnamed = |aside: &AsideRow| aside.rejected && aside.row.header.state_key.is_none();
            if let Some(aside) = aside.filter(is_unnamed) {
                let mut count = self.count_aside()?;
                self.forget_aside(&aside, &mut count);
                schema::ASIDE_COUNT.put(&mut self.batch, self.num, &count);
                return Ok(true);
            }
            let is_allowed = match stored.row.header.before {
                Some(before) => self.is_allowed_whole(received.event(), before)?,
                // An outlier is judged by the events that allow it, until it gets its place.
                None => {
                    let auth = self.known_auth_events(received.event())?;
                    let rules = &self.rules().authorization;
                    admit::lacking(received.event(), &auth, &BTreeMap::new()).is_none()
                        && admit::check_at_auth_events(received.event(), rules, &auth).is_ok()
                }
            };
            if !is_allowed {
                return Ok(false);
            }
            self.replace_aside(&whole)?;
        }
        self.follow_other_form(&whole)?;
        Ok(true)
    }

    /// Gives the whole of an event of which only the redacted form came now, where an outlier holds it. Other servers hide from
    /// us what our users may not see, and a state event that a join brought in full must not lose its content by that.
    pub(super) fn whole<'e>(
        &self,
        received: &'e Received,
        outlier: Option<&AsideRow>,
    ) -> Result<Cow<'e, Received>, Fault> {
        let Some(outlier) = outlier.filter(|outlier| received.is_cut() && !outlier.row.is_redacted()) else {
            return Ok(Cow::Borrowed(received));
        };
        let whole = received.with_json(self.num, &self.row, outlier.row.json.clone());
        whole.map(Cow::Owned).map_err(|_| Fault::Corrupt("an event that is kept is not in the form of one"))
    }

    /// Whether the rules allow the whole event where its redacted form is part of the room. They look at some content that redaction
    /// takes away, so that what is left of an event may be allowed and the whole forbidden. Then it stays as it is.
    fn is_allowed_whole(&self, event: &Event, before: StateRef) -> Result<bool> {
        let auth = self.known_auth_events(event)?;
        let at = Sketch::from(before);
        let mut state = self.auth_state(event, &at)?;
        self.presume(event, &auth, &at, &mut state)?;
        let (rules, prev) = (&self.rules().authorization, BTreeMap::new());
        let evidence = Evidence { rules, auth: &auth, prev: &prev, before: &state, current: None };
        let is_allowed = matches!(admit::admit(event, &evidence), Verdict::Accept);
        if !is_allowed {
            tracing::debug!(room = %self.num, event = %event.id, "an event stays redacted: the rules forbid the whole of it");
        }
        Ok(is_allowed)
    }
}
