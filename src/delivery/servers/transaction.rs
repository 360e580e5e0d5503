//! Transactions: the events and the ephemeral news that go to another server in one request
//! ([specification](https://spec.matrix.org/v1.19/server-server-api/#transactions)). Events go as they are stored, byte for byte.

use bytes::Bytes;
use federation::queue::{EDUS_MAX, PDUS_MAX};
use ruma::ServerName;

use crate::{
    delivery::servers::outbox::JsonOfEdu,
    ids::Position,
    json::{JsonRef, Object},
};

/// A transaction has about this many bytes at most, because the other server reads it whole; one event or piece of news fits.
pub(super) const BYTES_MAX: usize = 512 << 10;

/// An event as it is stored.
#[derive(Clone, Debug)]
pub(super) struct JsonOfPdu(pub(super) Bytes);

impl<'a> From<&'a JsonOfPdu> for JsonRef<'a> {
    fn from(pdu: &'a JsonOfPdu) -> Self {
        Self::stored(&pdu.0)
    }
}

/// A piece of ephemeral news, with its place where it comes from the outbox.
#[derive(Clone, Debug)]
pub(super) struct News {
    pub(super) json: JsonOfEdu,
    pub(super) outbox: Option<Position>,
}

/// A transaction before it is sent.
#[derive(Clone, Debug, Default)]
pub(super) struct Transaction {
    pub(super) pdus: Vec<JsonOfPdu>,
    pub(super) edus: Vec<News>,
    bytes: usize,
}

impl Transaction {
    /// The messages of the outbox in it.
    pub(super) fn outbox(&self) -> Vec<Position> {
        self.edus.iter().filter_map(|edu| edu.outbox).collect()
    }

    /// The first and the second half of it; `None` where it has only one thing in it, or nothing.
    pub(super) fn halves(&self) -> Option<[Self; 2]> {
        let count = self.pdus.len() + self.edus.len();
        if count < 2 {
            return None;
        }
        let middle = count / 2;
        let (pdus, edus) = (middle.min(self.pdus.len()), middle.saturating_sub(self.pdus.len()));
        let ((pdus, more_pdus), (edus, more_edus)) = (self.pdus.split_at(pdus), self.edus.split_at(edus));
        let half = |pdus: &[JsonOfPdu], edus: &[News]| Self {
            pdus: pdus.to_vec(),
            edus: edus.to_vec(),
            bytes: self.bytes,
        };
        Some([half(pdus, edus), half(more_pdus, more_edus)])
    }

    /// The body of the request.
    pub(super) fn body(&self, us: &ServerName, now_ms: u64) -> Bytes {
        let mut body = Object::with_capacity(self.bytes + 256);
        if !self.edus.is_empty() {
            body.list("edus", self.edus.iter().map(|edu| &edu.json));
        }
        body.text("origin", us.as_str());
        body.number("origin_server_ts", now_ms);
        body.list("pdus", &self.pdus);
        body.finish().into()
    }

    fn has_room(&self, bytes: usize, is_pdu: bool) -> bool {
        let is_full = if is_pdu { self.pdus.len() >= PDUS_MAX } else { self.edus.len() >= EDUS_MAX };
        let is_empty = self.pdus.is_empty() && self.edus.is_empty();
        is_empty || (!is_full && self.bytes + bytes <= BYTES_MAX)
    }
}

/// Parts events and news into transactions, in their order.
pub(super) fn part(pdus: Vec<JsonOfPdu>, edus: Vec<News>) -> Vec<Transaction> {
    let mut parts: Vec<Transaction> = Vec::new();
    let mut open = Transaction::default();
    for pdu in pdus {
        if !open.has_room(pdu.0.len(), true) {
            parts.push(std::mem::take(&mut open));
        }
        open.bytes += pdu.0.len();
        open.pdus.push(pdu);
    }
    for edu in edus {
        if !open.has_room(edu.json.0.len(), false) {
            parts.push(std::mem::take(&mut open));
        }
        open.bytes += edu.json.0.len();
        open.edus.push(edu);
    }
    if !open.pdus.is_empty() || !open.edus.is_empty() {
        parts.push(open);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pdu(bytes: usize) -> JsonOfPdu {
        JsonOfPdu(format!("\"{}\"", "x".repeat(bytes - 2)).into())
    }

    #[test]
    fn transactions_are_bounded_in_events_news_and_bytes_and_lose_nothing() {
        let news = |number: u64| News {
            json: JsonOfEdu(number.to_string().into()),
            outbox: Some(Position::ZERO.plus(number)),
        };
        let parts = part(vec![pdu(10); 120], (0..150).map(news).collect());
        let counts: Vec<_> = parts.iter().map(|it| (it.pdus.len(), it.edus.len())).collect();
        assert_eq!(counts, [(50, 0), (50, 0), (20, 100), (0, 50)]);
        assert_eq!(parts.last().unwrap().outbox().first().unwrap().number(), 100);
        let parts = part(vec![pdu(BYTES_MAX * 2), pdu(300 << 10), pdu(300 << 10)], Vec::new());
        assert_eq!(parts.len(), 3);
        assert!(part(Vec::new(), Vec::new()).is_empty());
    }

    #[test]
    fn halves_are_all_of_it_in_its_order() {
        let news = |number: u64| News { json: JsonOfEdu(number.to_string().into()), outbox: None };
        for (pdu_count, edu_count) in [(0, 0), (1, 0), (0, 1), (1, 1), (3, 0), (0, 3), (2, 5), (5, 2)] {
            let pdus: Vec<_> = (0..pdu_count).map(|number| pdu(10 + number)).collect();
            let whole = part(pdus, (0..edu_count).map(news).collect()).pop().unwrap_or_default();
            let Some(halves) = whole.halves() else {
                assert!(pdu_count as u64 + edu_count < 2);
                continue;
            };
            let sizes = |of: &Transaction| of.pdus.iter().map(|it| it.0.len()).collect::<Vec<_>>();
            let texts = |of: &Transaction| of.edus.iter().map(|it| it.json.0.clone()).collect::<Vec<_>>();
            assert_eq!([sizes(&halves[0]), sizes(&halves[1])].concat(), sizes(&whole));
            assert_eq!([texts(&halves[0]), texts(&halves[1])].concat(), texts(&whole));
            assert!(halves.iter().all(|half| half.pdus.len() + half.edus.len() > 0));
        }
    }

    #[test]
    fn the_body_holds_events_as_they_are_stored() {
        let parts = part(vec![JsonOfPdu(Bytes::from_static(b"{\"b\":1,\"a\":2}"))], Vec::new());
        let body = parts[0].body("a.example".try_into().unwrap(), 5);
        assert_eq!(body, "{\"origin\":\"a.example\",\"origin_server_ts\":5,\"pdus\":[{\"b\":1,\"a\":2}]}");
    }
}
