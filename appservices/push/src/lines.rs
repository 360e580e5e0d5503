//! Waiting for places: the rule of [`crate::shares`] for callers that wait, hang up and give back.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::{
    payer::Payer,
    shares::{Asked, Id, Manner, News, Of, PIECE_BYTES, Shares},
};

/// A byte of a body counts for this many, because of what is parsed of it.
const PARSED_OF_BYTE: usize = 4;

/// All places of a gateway.
#[derive(Default)]
pub(crate) struct Lines(Mutex<State>);

#[derive(Default)]
struct State {
    shares: Shares,
    /// Those who wait for news of their tickets.
    told: BTreeMap<Id, oneshot::Sender<News>>,
}

impl State {
    fn tell(&mut self) {
        for (id, news) in self.shares.take_news() {
            if let Some(sender) = self.told.remove(&id) {
                // Who does not wait any more gives the ticket back.
                let _nobody_hears = sender.send(news);
            }
        }
    }
}

/// The places of one, or its place in line. They are given back when it is dropped.
pub(crate) struct Ticket {
    lines: Arc<Lines>,
    id: Id,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.lines.0.lock();
        state.told.remove(&self.id);
        state.shares.leave(self.id);
        state.tell();
    }
}

/// A request whose body is being read. It gives way to callers who have less.
pub(crate) struct Reading {
    ticket: Ticket,
    news: oneshot::Receiver<News>,
}

/// The memory of a body, as it grows.
pub(crate) struct Growing {
    lines: Arc<Lines>,
    id: Id,
    bytes: usize,
    pieces: usize,
}

impl Lines {
    /// Waits for these places. None where a line is full, or where this one gave way to others.
    pub(crate) async fn take(
        self: &Arc<Self>,
        payer: Payer,
        places: impl IntoIterator<Item = Of>,
    ) -> Option<Ticket> {
        let places = places.into_iter().map(|of| (of, 1)).collect();
        let (ticket, news) = {
            let mut state = self.0.lock();
            let asked = state.shares.ask(payer, places, Manner::Waits);
            let (id, news) = match asked {
                Asked::Full => return None,
                Asked::Seated(id) => (id, None),
                Asked::Waits(id) => {
                    let (sender, news) = oneshot::channel();
                    state.told.insert(id, sender);
                    (id, Some(news))
                }
            };
            state.tell();
            (Ticket { lines: Arc::clone(self), id }, news)
        };
        match news {
            None => Some(ticket),
            Some(news) => (news.await == Ok(News::Seated)).then_some(ticket),
        }
    }

    /// Takes a place to read the body of a request. None where this caller has as much as there is room for.
    pub(crate) fn read(self: &Arc<Self>, payer: Payer) -> Option<Reading> {
        let mut state = self.0.lock();
        let places = vec![(Of::Bodies, 1), (Of::Memory, 1)];
        let asked = state.shares.ask(payer, places, Manner::GivesWay);
        let (sender, news) = oneshot::channel();
        let id = match asked {
            Asked::Seated(id) => id,
            Asked::Waits(_) | Asked::Full => return None,
        };
        state.told.insert(id, sender);
        state.tell();
        Some(Reading { ticket: Ticket { lines: Arc::clone(self), id }, news })
    }
}

impl Reading {
    /// The memory that the body takes.
    pub(crate) fn memory(&self) -> Growing {
        Growing { lines: Arc::clone(&self.ticket.lines), id: self.ticket.id, bytes: 0, pieces: 1 }
    }

    /// Waits until this one is to give way to others.
    pub(crate) async fn gives_way(&mut self) {
        // Without a sender there is nobody who would say so.
        if (&mut self.news).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Takes the place of a request that is worked on, with the memory of its body. None where the caller has as many as there is room for.
    pub(crate) fn admit(self) -> Option<Ticket> {
        let has_place = self.ticket.lines.0.lock().shares.settle(self.ticket.id, &Of::Bodies, Of::Requests);
        has_place.then_some(self.ticket)
    }
}

impl Growing {
    /// Counts this many bytes more. False where there is no room for them.
    pub(crate) fn grow(&mut self, bytes: usize) -> bool {
        self.bytes = self.bytes.saturating_add(bytes);
        let pieces = self.bytes.saturating_mul(PARSED_OF_BYTE).div_ceil(PIECE_BYTES);
        let Some(more) = pieces.checked_sub(self.pieces).filter(|more| *more > 0) else { return true };
        let mut state = self.lines.0.lock();
        let has_room = state.shares.grow(self.id, &Of::Memory, more);
        state.tell();
        drop(state);
        if has_room {
            self.pieces = pieces;
        }
        has_room
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn payer(number: u8) -> Payer {
        Payer::of([192, 0, 2, number].into())
    }

    #[tokio::test]
    async fn a_place_that_is_given_back_goes_to_who_waits_and_still_wants_it() {
        let lines = Arc::new(Lines::default());
        let mut tickets = Vec::new();
        for _ in 0..Of::App(0).bounds().0 / 2 {
            tickets.push(lines.take(payer(1), [Of::App(0), Of::Fixed]).await.unwrap());
        }
        let mut gone = Box::pin(lines.take(payer(1), [Of::App(0), Of::Fixed]));
        let mut waits = Box::pin(lines.take(payer(1), [Of::App(0), Of::Fixed]));
        assert!((&mut gone).now_or_never().is_none() && (&mut waits).now_or_never().is_none());
        assert!(
            lines.take(payer(1), [Of::App(1), Of::Fixed]).await.is_some(),
            "another app has its own places"
        );
        drop(gone);
        tickets.pop();
        let ticket = waits.now_or_never().unwrap().unwrap();
        // One that was seated and hung up at the same moment leaves its place to the next.
        let mut hangs_up = Box::pin(lines.take(payer(1), [Of::App(0), Of::Fixed]));
        let mut next = Box::pin(lines.take(payer(1), [Of::App(0), Of::Fixed]));
        assert!((&mut hangs_up).now_or_never().is_none() && (&mut next).now_or_never().is_none());
        drop(ticket);
        drop(hangs_up);
        assert!(next.now_or_never().unwrap().is_some());
        drop(tickets);
        assert!(lines.0.lock().told.is_empty());
    }

    #[tokio::test]
    async fn a_body_that_is_being_read_gives_way_and_one_that_was_read_does_not() {
        let lines = Arc::new(Lines::default());
        let mut read = lines.read(payer(1)).unwrap();
        assert!(read.gives_way().now_or_never().is_none());
        let mut memory = read.memory();
        assert!(memory.grow(100 << 10));
        let admitted = read.admit().unwrap();
        let mut trickling: Vec<_> = std::iter::from_fn(|| lines.read(payer(1))).collect();
        assert_eq!(trickling.len(), Of::Bodies.bounds().0 / 2);
        let mut others = Vec::new();
        for who in 2..=20 {
            others.extend((0..30).map(|_| lines.read(payer(who)).unwrap()));
        }
        let last = trickling.last_mut().unwrap();
        assert!(last.gives_way().now_or_never().is_some(), "the newest of who has most");
        assert!(trickling.first_mut().unwrap().gives_way().now_or_never().is_none());
        let last = trickling.pop().unwrap();
        assert!(!last.memory().grow(100 << 10) && last.admit().is_none());
        drop((admitted, trickling, others));
        assert!(lines.0.lock().told.is_empty());
    }
}
