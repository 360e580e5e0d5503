//! The rule of admission, as a plain structure: who holds what of everything that all share and that runs out.
//!
//! One rule holds for each place ([`Of`]), whether it is made of requests, deliveries, look-ups or bytes:
//!
//! 1. **Nobody takes more than they leave.** A site takes a part of a place only as long as it then holds no more than was free. Alone it has
//!    half, among others as much as each of them, and whoever comes next finds something free.
//! 2. **Who holds least comes next.** Whoever waits is seated once all their places have room for them. Of those, the one comes first whose site
//!    holds the smallest part of any of these places; payers of one site come in turn, and each in the order in which they asked.
//! 3. **Who has most gives way.** Where a line is full, or a body comes in for which there is no room, the newest of the site that has most there
//!    gives up. What was sent to a provider never does.
//!
//! A ticket holds all its places or none: whoever waits for a slow host holds nothing that others could use.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    ops::Bound,
};

use crate::payer::{Payer, Site};

/// Memory of bodies is counted in pieces of this many bytes.
pub(crate) const PIECE_BYTES: usize = 4 << 10;

/// One thing that all share.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Of {
    /// Requests whose bodies are being read.
    Bodies,
    /// The memory of requests, in pieces.
    Memory,
    /// Requests whose devices are being told.
    Requests,
    /// Names of hosts of users that are looked up; each takes some seconds at most.
    LookUps,
    /// Deliveries to endpoints that users chose.
    Chosen,
    /// Deliveries to one host and port that a user chose.
    Host(String, u16),
    /// Deliveries to one address, whatever its names and ports are.
    Address(IpAddr),
    /// Deliveries to the providers of operators, for all apps.
    Fixed,
    /// The deliveries of one app to its provider, by the number of the app.
    App(usize),
    /// Messages that are being made, and large requests that are being parsed, which keep processors busy.
    Making,
}

impl Of {
    /// How much of it there is, and how many may wait for it.
    pub(crate) const fn bounds(&self) -> (usize, usize) {
        match self {
            Self::Bodies => (1_024, 0),
            Self::Memory => ((64 << 20) / PIECE_BYTES, 0),
            Self::Requests => (512, 0),
            Self::LookUps => (512, 2_048),
            Self::Chosen => (512, 2_048),
            Self::Host(..) => (32, 128),
            Self::Address(_) => (48, 128),
            Self::Fixed => (1_024, 2_048),
            Self::App(_) => (512, 1_024),
            // All who deliver may wait here, because their messages are made once they have their places.
            Self::Making => (4, 2_048),
        }
    }
}

/// The number of a ticket.
pub(crate) type Id = u64;

/// How somebody asks for places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// In line, until there is room.
    Waits,
    /// At once, and somebody who has more gives way; so does this one, later.
    GivesWay,
}

/// The answer to somebody who asks for places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// The places are taken.
    Seated(Id),
    /// The ticket stands in line; its news come later.
    Waits(Id),
    /// There is no room, not even to wait.
    Full,
}

/// A change for a ticket that was given out before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// Its turn has come.
    Seated,
    /// It has given way, and holds nothing any more.
    GaveWay,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waits,
    Seated,
    GivesWay,
}

#[derive(Debug)]
struct Ticket {
    payer: Payer,
    /// The places, and how much of each.
    places: Vec<(Of, usize)>,
    state: State,
    /// The number of the place that it watches while it waits.
    watches: usize,
}

/// The part that one site has of a place.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    taken: usize,
    waiting: usize,
    /// The payer of the site who took something last; the others come before them.
    last: Option<Payer>,
}

#[derive(Debug, Default)]
struct Place {
    taken: usize,
    waiting: usize,
    sites: BTreeMap<Site, Held>,
    /// The sites by how much each has, those that wait included.
    sizes: BTreeSet<(usize, Site)>,
    /// The tickets that wait for this place among others, or may give way.
    movable: BTreeMap<Site, BTreeSet<Id>>,
    /// The tickets that wait for just this place to become free. Each ticket watches one place that it lacks, so that nobody looks at it in vain.
    watched: BTreeMap<Site, BTreeMap<Payer, BTreeSet<Id>>>,
}

/// All places, and the tickets for them. A place that nobody holds or waits for takes no memory.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    last: Id,
    tickets: BTreeMap<Id, Ticket>,
    places: BTreeMap<Of, Place>,
    news: Vec<(Id, News)>,
}

impl Shares {
    /// Asks for these places, all at once.
    pub(crate) fn ask(&mut self, payer: Payer, places: Vec<(Of, usize)>, manner: Manner) -> Asked {
        let id = self.last + 1;
        let ticket = |state, places| Ticket { payer, places, state, watches: 0 };
        match manner {
            Manner::Waits if self.has_room(payer, &places) => {
                self.last = id;
                self.enter(id, ticket(State::Seated, places));
                Asked::Seated(id)
            }
            Manner::Waits => {
                let Some(gives_way) = self.who_leaves_the_lines(payer, &places) else { return Asked::Full };
                gives_way.into_iter().for_each(|id| self.send_away(id));
                self.last = id;
                self.enter(id, ticket(State::Waits, places));
                self.watch(id);
                Asked::Waits(id)
            }
            Manner::GivesWay => {
                if !places.iter().all(|(of, amount)| self.make_room(payer, of, *amount)) {
                    return Asked::Full;
                }
                self.last = id;
                self.enter(id, ticket(State::GivesWay, places));
                Asked::Seated(id)
            }
        }
    }

    /// Takes more of a place for a ticket that may give way. False where there is no room, or where it gave way.
    pub(crate) fn grow(&mut self, id: Id, of: &Of, amount: usize) -> bool {
        let Some(payer) = self.tickets.get(&id).map(|it| it.payer) else { return false };
        if !self.make_room(payer, of, amount) {
            return false;
        }
        let Some(mut ticket) = self.take_out(id) else { return false };
        match ticket.places.iter_mut().find(|(it, _)| it == of) {
            Some((_, held)) => *held += amount,
            None => ticket.places.push((of.clone(), amount)),
        }
        self.enter(id, ticket);
        true
    }

    /// Gives one place of a ticket for one part of another, and then the ticket gives way no more. False where there is no room for that.
    pub(crate) fn settle(&mut self, id: Id, from: &Of, to: Of) -> bool {
        let Some(payer) = self.tickets.get(&id).map(|it| it.payer) else { return false };
        if !self.may_take(payer.site(), &to, 1) {
            return false;
        }
        let Some(mut ticket) = self.take_out(id) else { return false };
        ticket.places.retain(|(of, _)| of != from);
        ticket.places.push((to, 1));
        ticket.state = State::Seated;
        self.enter(id, ticket);
        true
    }

    /// Gives back all that a ticket has, and seats those who wait for it.
    pub(crate) fn leave(&mut self, id: Id) {
        let Some(ticket) = self.take_out(id) else { return };
        if ticket.state == State::Waits {
            return;
        }
        while let Some(next) = self.next(&ticket.places) {
            let Some(mut ticket) = self.take_out(next) else { return };
            ticket.state = State::Seated;
            self.enter(next, ticket);
            self.news.push((next, News::Seated));
        }
    }

    /// Gives the changes of tickets since the last call.
    pub(crate) fn take_news(&mut self) -> Vec<(Id, News)> {
        std::mem::take(&mut self.news)
    }

    fn held(&self, of: &Of, site: Site) -> Held {
        self.places.get(of).and_then(|it| it.sites.get(&site)).copied().unwrap_or_default()
    }

    /// The first part of the rule.
    fn may_take(&self, site: Site, of: &Of, amount: usize) -> bool {
        let taken = self.places.get(of).map_or(0, |it| it.taken);
        let free = of.bounds().0.saturating_sub(taken);
        self.held(of, site).taken.saturating_add(amount) <= free
    }

    fn has_room(&self, payer: Payer, places: &[(Of, usize)]) -> bool {
        places.iter().all(|(of, amount)| self.may_take(payer.site(), of, *amount))
    }

    /// The second part of the rule: the one who is seated next where these places have become free.
    fn next(&mut self, freed: &[(Of, usize)]) -> Option<Id> {
        let mut best: Option<(usize, Id)> = None;
        for (of, _) in freed {
            let sites = self.places.get(of).map(|it| it.watched.keys().copied().collect::<Vec<_>>());
            for site in sites.unwrap_or_default() {
                let first = if self.may_take(site, of, 1) { self.first_with_room(of, site) } else { None };
                let found = first.and_then(|id| Some((self.part_of(self.tickets.get(&id)?), id)));
                best = [best, found].into_iter().flatten().min();
            }
        }
        best.map(|(_, id)| id)
    }

    /// The first ticket of a site that waits for this place alone, of its payers in turn. Those that lack another place watch that one from
    /// now on.
    fn first_with_room(&mut self, of: &Of, site: Site) -> Option<Id> {
        loop {
            let place = self.places.get(of)?;
            let payers = place.watched.get(&site)?;
            let last = place.sites.get(&site).and_then(|it| it.last);
            let after = last.and_then(|last| payers.range((Bound::Excluded(last), Bound::Unbounded)).next());
            let id = *after.or_else(|| payers.iter().next())?.1.first()?;
            if self.watch(id) {
                return Some(id);
            }
        }
    }

    /// Has a ticket watch a place that it lacks. True where it lacks none.
    fn watch(&mut self, id: Id) -> bool {
        let Some(ticket) = self.tickets.get(&id) else { return false };
        let (payer, before) = (ticket.payer, ticket.watches);
        let lacks = ticket.places.iter().position(|(of, amount)| !self.may_take(payer.site(), of, *amount));
        let Some(lacks) = lacks else { return true };
        let name = |at: usize| ticket.places.get(at).map(|(of, _)| of.clone());
        let (from, to) = (name(before), name(lacks));
        if let Some(place) = from.and_then(|of| self.places.get_mut(&of)) {
            place.forget_watching(payer, id);
        }
        if let Some(place) = to.and_then(|of| self.places.get_mut(&of)) {
            place.watched.entry(payer.site()).or_default().entry(payer).or_default().insert(id);
        }
        if let Some(ticket) = self.tickets.get_mut(&id) {
            ticket.watches = lacks;
        }
        false
    }

    /// The largest part, in millionths, that the site of a ticket holds of its places.
    fn part_of(&self, ticket: &Ticket) -> usize {
        let part = |of: &Of| {
            self.held(of, ticket.payer.site()).taken.saturating_mul(1_000_000) / of.bounds().0.max(1)
        };
        ticket.places.iter().map(|(of, _)| part(of)).max().unwrap_or(0)
    }

    /// The third part of the rule: the ticket that gives way first, and how much its site has there.
    fn who_has_most(&self, of: &Of) -> Option<(usize, Id)> {
        let place = self.places.get(of)?;
        place.sizes.iter().rev().find_map(|(size, site)| Some((*size, *place.movable.get(site)?.last()?)))
    }

    /// Those who leave full lines so that this payer may wait there. None where the payer has as much as anybody.
    fn who_leaves_the_lines(&self, payer: Payer, places: &[(Of, usize)]) -> Option<BTreeSet<Id>> {
        let mut leave = BTreeSet::new();
        for (of, _) in places {
            if self.places.get(of).map_or(0, |it| it.waiting) < of.bounds().1 {
                continue;
            }
            let held = self.held(of, payer.site());
            let (most, id) = self.who_has_most(of)?;
            if held.taken + held.waiting + 1 >= most {
                return None;
            }
            leave.insert(id);
        }
        Some(leave)
    }

    /// Sends those away who have most, until there is room for this payer. False where there can be none.
    fn make_room(&mut self, payer: Payer, of: &Of, amount: usize) -> bool {
        while !self.may_take(payer.site(), of, amount) {
            match self.who_has_most(of) {
                Some((most, id)) if self.held(of, payer.site()).taken.saturating_add(amount) < most => {
                    self.send_away(id);
                }
                Some(_) | None => return false,
            }
        }
        true
    }

    fn send_away(&mut self, id: Id) {
        self.leave(id);
        self.news.push((id, News::GaveWay));
    }

    fn enter(&mut self, id: Id, ticket: Ticket) {
        let (payer, site) = (ticket.payer, ticket.payer.site());
        for (of, amount) in &ticket.places {
            let place = self.places.entry(of.clone()).or_default();
            let waits = ticket.state == State::Waits;
            place.change(site, |held| {
                if waits {
                    held.waiting += 1;
                } else {
                    (held.taken, held.last) = (held.taken + amount, Some(payer));
                }
            });
            let (taken, waiting) = if waits { (0, 1) } else { (*amount, 0) };
            (place.taken, place.waiting) = (place.taken + taken, place.waiting + waiting);
            if ticket.state != State::Seated {
                place.movable.entry(site).or_default().insert(id);
            }
        }
        self.tickets.insert(id, ticket);
    }

    fn take_out(&mut self, id: Id) -> Option<Ticket> {
        let ticket = self.tickets.remove(&id)?;
        let site = ticket.payer.site();
        for (at, (of, amount)) in ticket.places.iter().enumerate() {
            let Some(place) = self.places.get_mut(of) else { continue };
            let (taken, waiting) = if ticket.state == State::Waits { (0, 1) } else { (*amount, 0) };
            place.taken = place.taken.saturating_sub(taken);
            place.waiting = place.waiting.saturating_sub(waiting);
            place.change(site, |held| {
                held.taken = held.taken.saturating_sub(taken);
                held.waiting = held.waiting.saturating_sub(waiting);
            });
            let ids = place.movable.get_mut(&site);
            if ids.is_some_and(|ids| ids.remove(&id) && ids.is_empty()) {
                place.movable.remove(&site);
            }
            if ticket.state == State::Waits && at == ticket.watches {
                place.forget_watching(ticket.payer, id);
            }
            if place.taken + place.waiting == 0 {
                self.places.remove(of);
            }
        }
        Some(ticket)
    }
}

impl Place {
    /// Changes what a site has, and its place among the others.
    fn change(&mut self, site: Site, change: impl FnOnce(&mut Held)) {
        let held = self.sites.entry(site).or_default();
        self.sizes.remove(&(held.taken + held.waiting, site));
        change(held);
        match held.taken + held.waiting {
            0 => drop(self.sites.remove(&site)),
            size => drop(self.sizes.insert((size, site))),
        }
    }

    fn forget_watching(&mut self, payer: Payer, id: Id) {
        let Some(payers) = self.watched.get_mut(&payer.site()) else { return };
        if payers.get_mut(&payer).is_some_and(|ids| ids.remove(&id) && ids.is_empty()) {
            payers.remove(&payer);
        }
        if payers.is_empty() {
            self.watched.remove(&payer.site());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payer(number: u8) -> Payer {
        Payer::of([192, 0, 2, number].into())
    }

    fn host() -> Of {
        Of::Host("push.example".to_owned(), 443)
    }

    fn ask(shares: &mut Shares, who: u8, of: Of) -> Asked {
        shares.ask(payer(who), vec![(of, 1)], Manner::Waits)
    }

    /// The tickets that somebody gets for this until they have to wait.
    fn take_all(shares: &mut Shares, who: Payer, places: &[(Of, usize)]) -> Vec<Id> {
        let mut ids = Vec::new();
        loop {
            match shares.ask(who, places.to_vec(), Manner::Waits) {
                Asked::Seated(id) => ids.push(id),
                Asked::Waits(id) => {
                    shares.leave(id);
                    return ids;
                }
                Asked::Full => return ids,
            }
        }
    }

    fn waits(asked: Asked) -> Id {
        let Asked::Waits(id) = asked else { panic!("{asked:?}") };
        id
    }

    #[test]
    fn alone_a_payer_has_half_and_among_others_each_leaves_room_for_one_more() {
        for of in [host(), Of::App(0), Of::LookUps, Of::Chosen, Of::Requests] {
            let mut shares = Shares::default();
            let room = of.bounds().0;
            assert_eq!(take_all(&mut shares, payer(1), &[(of.clone(), 1)]).len(), room / 2, "{of:?}");
            assert_eq!(take_all(&mut shares, payer(2), &[(of.clone(), 1)]).len(), room / 4, "{of:?}");
            assert!(matches!(shares.ask(payer(3), vec![(of, 1)], Manner::Waits), Asked::Seated(_)));
        }
    }

    #[test]
    fn payers_of_one_site_have_one_share() {
        let mut shares = Shares::default();
        let of = |net: u16| Payer::of([0x2001, 0xdb8, 0, net, 0, 0, 0, 1].into());
        let mut taken = 0;
        for net in 0..64 {
            taken += take_all(&mut shares, of(net), &[(host(), 1)]).len();
        }
        assert_eq!(taken, 16, "64 networks of one site hold half");
        assert_eq!(take_all(&mut shares, payer(1), &[(host(), 1)]).len(), 8);
    }

    #[test]
    fn whoever_holds_least_comes_next_however_many_others_wait() {
        let mut shares = Shares::default();
        // Five payers take all there is, and the first fills the line.
        let mut held: Vec<_> =
            (1..=6).flat_map(|who| take_all(&mut shares, payer(who), &[(host(), 1)])).collect();
        assert_eq!(held.len(), 32);
        let first: Vec<_> = (0..60).map(|_| waits(ask(&mut shares, 1, host()))).collect();
        let newcomer = waits(ask(&mut shares, 9, host()));
        shares.leave(held.remove(0));
        assert_eq!(shares.take_news(), [(newcomer, News::Seated)]);
        // The first waits on as long as it holds more than is free.
        shares.leave(held.remove(0));
        assert!(shares.take_news().is_empty());
        first.into_iter().chain(held).chain([newcomer]).for_each(|id| shares.leave(id));
        assert!(shares.places.is_empty() && shares.tickets.is_empty());
    }

    #[test]
    fn within_a_site_payers_come_in_turn() {
        let mut shares = Shares::default();
        let of = |net: u16| Payer::of([0x2001, 0xdb8, 0, net, 0, 0, 0, 1].into());
        let mut held = take_all(&mut shares, of(1), &[(host(), 1)]);
        let one_more = waits(shares.ask(of(1), vec![(host(), 1)], Manner::Waits));
        let neighbour = waits(shares.ask(of(2), vec![(host(), 1)], Manner::Waits));
        shares.leave(held.remove(0));
        assert_eq!(shares.take_news(), [(neighbour, News::Seated)]);
        shares.leave(held.remove(0));
        assert_eq!(shares.take_news(), [(one_more, News::Seated)]);
    }

    #[test]
    fn who_has_most_gives_way_in_a_full_line_and_nobody_gives_way_to_who_has_more() {
        let mut shares = Shares::default();
        let line = host().bounds().1;
        take_all(&mut shares, payer(1), &[(host(), 1)]);
        let first: Vec<_> = (0..line).map(|_| waits(ask(&mut shares, 1, host()))).collect();
        assert_eq!(ask(&mut shares, 1, host()), Asked::Full);
        take_all(&mut shares, payer(2), &[(host(), 1)]);
        let second = waits(ask(&mut shares, 2, host()));
        assert_eq!(shares.take_news(), [(first[line - 1], News::GaveWay)]);
        // They share the line in the end, and then the second gives way, too.
        let more = (0..line).map(|_| ask(&mut shares, 2, host())).filter(|it| matches!(it, Asked::Waits(_)));
        assert!((line / 2..line / 2 + 8).contains(&(more.count() + 1)));
        assert!(shares.tickets.contains_key(&second));
    }

    #[test]
    fn a_ticket_that_waits_for_one_place_holds_no_other() {
        let mut shares = Shares::default();
        let slow = |name: u8| {
            vec![
                (Of::Host(format!("slow{name}"), 443), 1),
                (Of::Address([198, 51, 100, 1].into()), 1),
                (Of::Chosen, 1),
            ]
        };
        let mut held = Vec::new();
        for name in 0..60 {
            held.extend(take_all(&mut shares, payer(1), &slow(name)));
        }
        assert_eq!(held.len(), 24, "half of the address, whatever its names are");
        let waiting: Vec<_> =
            (0..100).map(|name| waits(shares.ask(payer(1), slow(name), Manner::Waits))).collect();
        assert_eq!(shares.places[&Of::Chosen].taken, 24);
        let other = vec![(Of::Host("other".to_owned(), 443), 1), (Of::Chosen, 1)];
        assert!(matches!(shares.ask(payer(1), other, Manner::Waits), Asked::Seated(_)));
        shares.leave(held.remove(0));
        assert_eq!(shares.take_news().len(), 1);
        // The one that was seated is among those that waited, and the others leave without having held anything.
        waiting.into_iter().for_each(|id| shares.leave(id));
        assert_eq!(shares.places[&Of::Chosen].waiting, 0);
    }

    #[test]
    fn the_part_of_the_narrowest_place_decides_who_comes_next() {
        let mut shares = Shares::default();
        let to = |host: Of| vec![(host, 1), (Of::Chosen, 1)];
        // A large homeserver delivers to many hosts, and a small caller to this one alone.
        for number in 0..100 {
            shares.ask(payer(1), to(Of::Host(format!("h{number}"), 443)), Manner::Waits);
        }
        let mut held = take_all(&mut shares, payer(2), &to(host()));
        for who in 3..=7 {
            held.extend(take_all(&mut shares, payer(who), &to(host())));
        }
        assert_eq!(held.len(), 32);
        let small = waits(shares.ask(payer(2), to(host()), Manner::Waits));
        let large = waits(shares.ask(payer(1), to(host()), Manner::Waits));
        shares.leave(held.remove(0));
        assert_eq!(shares.take_news(), [(large, News::Seated)]);
        assert!(shares.tickets[&small].state == State::Waits);
    }

    #[test]
    fn bodies_that_trickle_give_way_and_requests_that_are_worked_on_do_not() {
        let mut shares = Shares::default();
        let body = || vec![(Of::Bodies, 1), (Of::Memory, 1)];
        let mut begun = 0;
        for who in 0..100 {
            for _ in 0..2_000 {
                match shares.ask(payer(who), body(), Manner::GivesWay) {
                    Asked::Seated(_) => begun += 1,
                    Asked::Waits(_) => panic!("nobody waits"),
                    Asked::Full => break,
                }
            }
        }
        let gave_way = shares.take_news().len();
        assert_eq!(shares.tickets.len(), begun - gave_way);
        let least = shares.places[&Of::Bodies].sites.values().map(|it| it.taken).min().unwrap();
        assert!(least >= 5, "a hundred callers have about ten each, and the last has {least}");
        let Asked::Seated(id) = shares.ask(payer(200), body(), Manner::GivesWay) else { panic!("no room") };
        assert!(shares.grow(id, &Of::Memory, 10) && shares.settle(id, &Of::Bodies, Of::Requests));
        assert_eq!(shares.places[&Of::Memory].sites[&payer(200).site()].taken, 11);
        assert!(!shares.places[&Of::Bodies].sites.contains_key(&payer(200).site()));
        shares.take_news();
        for who in 201..=250 {
            shares.ask(payer(who), body(), Manner::GivesWay);
        }
        assert!(shares.take_news().iter().all(|(gone, _)| *gone != id));
        shares.leave(id);
        assert!(!shares.places.contains_key(&Of::Requests));
        assert!(!shares.grow(id, &Of::Memory, 1), "a ticket that left holds nothing more");
    }

    #[test]
    fn memory_is_shared_as_places_are() {
        let mut shares = Shares::default();
        let mut pieces = Vec::new();
        for who in 1..=2 {
            let mut held = 0;
            while let Asked::Seated(id) = shares.ask(payer(who), vec![(Of::Memory, 1)], Manner::GivesWay) {
                if !shares.grow(id, &Of::Memory, 255) {
                    break;
                }
                held += 256;
            }
            pieces.push(held);
        }
        let room = Of::Memory.bounds().0;
        assert_eq!(pieces[0], room / 2);
        // The second takes from the first what it takes beyond the rest, until both have as much.
        assert!(pieces[1] >= room / 4, "{pieces:?}");
        let taken: usize = shares.places[&Of::Memory].sites.values().map(|it| it.taken).sum();
        assert!(taken <= room && taken == shares.places[&Of::Memory].taken);
    }

    #[test]
    fn nobody_is_looked_at_who_waits_for_something_else() {
        let mut shares = Shares::default();
        let to = |name: &str, number: u8| {
            vec![
                (Of::Host(format!("{name}{number}"), 443), 1),
                (Of::Address([10, 0, 0, number].into()), 1),
                (Of::Chosen, 1),
            ]
        };
        // Everything that waits lacks its host, and so watches that.
        for number in 0..6 {
            take_all(&mut shares, payer(1), &to("slow", number));
            for _ in 0..100 {
                waits(shares.ask(payer(1), to("slow", number), Manner::Waits));
            }
        }
        let watched =
            |shares: &Shares, of: &Of| shares.places[of].watched.values().flat_map(BTreeMap::values).count();
        assert_eq!(watched(&shares, &Of::Chosen), 0);
        let Asked::Seated(id) = shares.ask(payer(2), to("well", 9), Manner::Waits) else { panic!("no room") };
        shares.leave(id);
        assert!(shares.take_news().is_empty());
        assert_eq!(shares.places[&Of::Host("slow0".to_owned(), 443)].waiting, 100);
    }

    #[test]
    fn nothing_is_taken_twice_or_lost_whatever_happens() {
        let mut shares = Shares::default();
        let (mut seed, mut seated, mut waiting) = (7_u64, BTreeSet::new(), BTreeSet::new());
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..4_000 {
            let number = u16::try_from(random(9)).unwrap();
            let who = match number {
                0..=4 => Payer::of([10, 0, 0, number.to_be_bytes()[1]].into()),
                _ => Payer::of([0x2001, 0xdb8, 0, number, 0, 0, 0, 1].into()),
            };
            let host = Of::Host(format!("h{}", random(3)), 443);
            let address = Of::Address([10, 1, 0, u8::try_from(random(2)).unwrap()].into());
            if random(5) < 3 {
                match shares.ask(who, vec![(host, 1), (address, 1), (Of::Chosen, 1)], Manner::Waits) {
                    Asked::Seated(id) => drop(seated.insert(id)),
                    Asked::Waits(id) => drop(waiting.insert(id)),
                    Asked::Full => {}
                }
            } else {
                let all: Vec<_> = seated.iter().chain(&waiting).copied().collect();
                if let Some(id) = all.get(usize::try_from(random(1 + all.len() as u64)).unwrap()) {
                    seated.remove(id);
                    waiting.remove(id);
                    shares.leave(*id);
                }
            }
            for (id, news) in shares.take_news() {
                assert!(waiting.remove(&id), "news are for those who wait");
                if news == News::Seated {
                    seated.insert(id);
                }
            }
            assert_eq!(shares.tickets.len(), seated.len() + waiting.len());
            for (of, place) in &shares.places {
                assert!(place.taken <= of.bounds().0 && place.waiting <= of.bounds().1, "{of:?}");
            }
            let idle = waiting.iter().find(|id| {
                let ticket = &shares.tickets[id];
                shares.has_room(ticket.payer, &ticket.places)
            });
            assert_eq!(idle, None, "nobody waits for what is free");
        }
        seated.into_iter().chain(waiting).for_each(|id| shares.leave(id));
        shares.take_news();
    }
}
