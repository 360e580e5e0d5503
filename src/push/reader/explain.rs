//! The rule by which an event notifies one user, for gateways, for the list of notifications and for operators who ask why.

use std::sync::Arc;

use super::{EVENT_STEPS, Place, Reader};
use crate::{
    json::JsonText,
    push::{
        classes::{self, Class},
        compiled::{Compiled, Local, Rule, Threads},
        condition::{Halt, Owner},
        defaults,
        glob::Steps,
        lanes::Lanes,
        scene::Scene,
    },
    rooms::{event::StoredEvent, relations},
    schema::{
        push::{Lane, Outcome},
        rooms::RoomRow,
    },
    store::{Fault, Read},
};

/// The rule by which an event notifies a user, and its effect.
#[derive(Clone, Debug)]
pub struct Explained {
    /// The id of the rule that the event meets.
    pub rule_id: String,
    /// The list of actions that the rule names.
    pub actions: Arc<JsonText>,
    /// The effect of the actions on counts.
    pub outcome: Outcome,
}

impl Reader<'_> {
    /// The rule of the user that an event of a room meets, with the tweaks that a gateway is told; none if the event meets no
    /// rule, is redacted, or comes from somebody whom the user ignores.
    pub fn explain(
        &self,
        read: &(impl Read + ?Sized),
        place: Place<'_>,
        stored: &StoredEvent,
    ) -> Result<Option<Explained>, Fault> {
        if self.own.ignored.contains(&*stored.row.sender()) || stored.row.is_redacted() {
            return Ok(None);
        }
        let Some(scene) = Scene::of_past(read, place.num, place.row, stored) else { return Ok(None) };
        let mut owner = Owner::new(self.user_id);
        let lane = relations::lane_of(read, place.num, stored)?;
        if self.own.asks_for_threads && lane != Lane::MAIN {
            let of = (self.user, place.num);
            owner.set_subscribed(Some(Lanes::of(Class::Default).is_subscribed(read, of, lane)?));
        }
        self.find_rule(place.row, (&scene, lane), &owner)
    }

    /// The rule of the user that an event meets. One that takes too many steps notifies as it counts: as it does for the class that comes
    /// closest, by the rule that the server itself has for it.
    pub(super) fn find_rule<R: Read + ?Sized>(
        &self,
        room: &RoomRow,
        (scene, lane): (&Scene<'_, R>, Lane),
        owner: &Owner<'_>,
    ) -> Result<Option<Explained>, Fault> {
        let default = || Compiled::new(&defaults::default_rules(self.user_id), self.user_id);
        let rules = self.own.rules.as_ref().unwrap_or_else(|| self.defaults.get_or_init(default));
        let local = rules.in_room(room.id.as_str());
        let explained = |rule: &Rule, outcome| Explained {
            rule_id: rule.id.clone(),
            actions: Arc::clone(&rule.actions),
            outcome,
        };
        let mut look = self.steps.borrow_mut();
        let allowed = EVENT_STEPS.min(look.left());
        let mut steps = Steps::new(allowed);
        let judged = local.judge(scene, owner, &mut steps);
        let taken = allowed.saturating_sub(steps.left());
        // If too few steps are left, the next event ends the look.
        look.take(usize::try_from(taken).unwrap_or(usize::MAX)).unwrap_or(());
        match judged {
            Ok(rule) => Ok(rule.map(|rule| explained(rule, rule.outcome))),
            Err(Halt::Fault(fault)) => Err(fault),
            Err(Halt::OutOfSteps) => {
                let (subscribed, otherwise) = self.judge_by_class(&local, scene, lane)?;
                let outcome = if owner.is_subscribed() == Some(true) { subscribed } else { otherwise };
                let defaults = self.defaults.get_or_init(default);
                let judged = defaults.everywhere().judge(scene, owner, &mut Steps::new(EVENT_STEPS));
                let rule = judged.ok().flatten().filter(|_| outcome.notify);
                Ok(rule.map(|rule| explained(rule, outcome)))
            }
        }
    }

    /// The effect of an event on the user's counts for who subscribes to its thread, and for who does not, by the class that comes closest
    /// to the user's rules.
    pub(super) fn judge_by_class<R: Read + ?Sized>(
        &self,
        rules: &Local<'_>,
        scene: &Scene<'_, R>,
        lane: Lane,
    ) -> Result<(Outcome, Outcome), Fault> {
        let outcomes = classes::judge_for(scene, lane, self.user_id)?;
        let (others, threads) = rules.apart_from_threads();
        Ok(match threads {
            Threads::BySubscription if lane != Lane::MAIN => (outcomes.subscribed, outcomes.mentions),
            Threads::BySubscription | Threads::AsOthers | Threads::Otherwise => {
                let outcome = Class::closest_to(&others).outcome(outcomes);
                (outcome, outcome)
            }
        })
    }
}
