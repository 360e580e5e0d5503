//! How much waits in the outboxes, and whose it is: whoever sends fills no outbox, and takes no place for one, beside others.
//!
//! A user may hold one part in eight of what is free afterwards. Alone, that is a ninth of all; with others who hold as much as they may, it is
//! ever less, and something is always free for the next one.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use serde::Deserialize;

/// The outbox of one server holds at most this many messages.
const MESSAGES_MAX: usize = 50_000;
/// The outbox of one server holds at most this many bytes.
const BYTES_MAX: usize = 64 << 20;
/// Messages wait for at most this many servers at once.
const SERVERS_MAX: usize = 20_000;
/// A sender may hold one part in this many of what is free.
const SHARE: usize = 8;
/// Requests for keys may fill one part in this many of an outbox, so that they leave room for the keys.
const KEY_REQUESTS_PART: usize = 2;

/// The number and the bytes of messages that wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) messages: usize,
    pub(super) bytes: usize,
}

impl Size {
    fn add(&mut self, bytes: usize) {
        self.messages += 1;
        self.bytes += bytes;
    }

    fn take(&mut self, bytes: usize) {
        self.messages = self.messages.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Whether one message more leaves free [`SHARE`] times what its sender then holds.
    fn leaves_room(self, of_sender: Self, bytes: usize, part: usize) -> bool {
        let fits = |all: usize, of_sender: usize, more: usize, max: usize| {
            max.checked_sub(all.saturating_add(more))
                .is_some_and(|free| of_sender.saturating_add(more).saturating_mul(SHARE) <= free)
        };
        fits(self.messages, of_sender.messages, 1, MESSAGES_MAX / part)
            && fits(self.bytes, of_sender.bytes, bytes, BYTES_MAX / part)
    }
}

/// A number that stands for a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Sender(u64);

impl Sender {
    /// The sender of this id.
    pub(super) fn of(user_id: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        user_id.hash(&mut hasher);
        Self(hasher.finish())
    }

    /// The sender of a message as it goes to its server.
    pub(super) fn of_message(json: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Message {
            content: Content,
        }
        #[derive(Deserialize)]
        struct Content {
            sender: String,
        }
        let message = serde_json::from_slice::<Message>(json);
        Self::of(message.as_ref().map_or("", |message| message.content.sender.as_str()))
    }
}

#[derive(Default)]
struct Outbox {
    all: Size,
    senders: BTreeMap<Sender, Size>,
}

/// The outboxes in which something waits.
#[derive(Default)]
pub(super) struct Outboxes {
    by_server: BTreeMap<String, Outbox>,
    /// In how many outboxes each sender has something.
    places: BTreeMap<Sender, usize>,
}

impl Outboxes {
    /// Whether something waits for a server.
    pub(super) fn has(&self, server: &str) -> bool {
        self.by_server.contains_key(server)
    }

    /// How much waits for a server.
    pub(super) fn size(&self, server: &str) -> Size {
        self.by_server.get(server).map(|outbox| outbox.all).unwrap_or_default()
    }

    /// Keeps room for a message, where its sender may have that.
    pub(super) fn reserve(
        &mut self,
        server: &str,
        sender: Sender,
        bytes: usize,
        is_key_request: bool,
    ) -> bool {
        let part = if is_key_request { KEY_REQUESTS_PART } else { 1 };
        let fits = match self.by_server.get(server) {
            Some(outbox) => {
                let of_sender = outbox.senders.get(&sender).copied().unwrap_or_default();
                outbox.all.leaves_room(of_sender, bytes, part)
            }
            None => {
                let places = self.places.get(&sender).copied().unwrap_or_default();
                let free = SERVERS_MAX.checked_sub(self.by_server.len() + 1);
                free.is_some_and(|free| (places + 1).saturating_mul(SHARE) <= free)
                    && Size::default().leaves_room(Size::default(), bytes, part)
            }
        };
        if fits {
            self.add(server, sender, bytes);
        }
        fits
    }

    /// Counts a message that waits.
    pub(super) fn add(&mut self, server: &str, sender: Sender, bytes: usize) {
        let outbox = self.by_server.entry(server.to_owned()).or_default();
        outbox.all.add(bytes);
        let of_sender = outbox.senders.entry(sender).or_default();
        if of_sender.messages == 0 {
            *self.places.entry(sender).or_default() += 1;
        }
        of_sender.add(bytes);
    }

    /// Counts a message that waits no more.
    pub(super) fn remove(&mut self, server: &str, sender: Sender, bytes: usize) {
        let Some(outbox) = self.by_server.get_mut(server) else { return };
        outbox.all.take(bytes);
        if let Some(of_sender) = outbox.senders.get_mut(&sender) {
            of_sender.take(bytes);
            if of_sender.messages == 0 {
                outbox.senders.remove(&sender);
                self.leave(sender);
            }
        }
        if self.by_server.get(server).is_some_and(|outbox| outbox.all.messages == 0) {
            let senders = self.by_server.remove(server).map(|outbox| outbox.senders).unwrap_or_default();
            senders.into_keys().for_each(|sender| self.leave(sender));
        }
    }

    fn leave(&mut self, sender: Sender) {
        if let Some(places) = self.places.get_mut(&sender) {
            *places = places.saturating_sub(1);
            if *places == 0 {
                self.places.remove(&sender);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sender(number: u32) -> Sender {
        Sender::of(&format!("@{number}:a.example"))
    }

    #[test]
    fn nobody_fills_an_outbox_for_the_others() {
        let mut outboxes = Outboxes::default();
        let mut counts = Vec::new();
        for user in 0..20 {
            counts.push(
                (0..2_000).filter(|_| outboxes.reserve("b.example", sender(user), 60_000, false)).count(),
            );
        }
        assert_eq!(counts[0], BYTES_MAX / 60_000 / (SHARE + 1));
        assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
        for _ in 0..counts[0] {
            outboxes.remove("b.example", sender(0), 60_000);
        }
        assert!(outboxes.reserve("b.example", sender(99), 60_000, false), "what was taken is free again");
    }

    #[test]
    fn nobody_takes_the_places_of_all_servers() {
        let mut outboxes = Outboxes::default();
        let mut name = 0;
        for user in 0..20 {
            let taken = (0..SERVERS_MAX).take_while(|_| {
                name += 1;
                outboxes.reserve(&format!("{name}.example"), sender(user), 100, false)
            });
            assert!(taken.count() > 0, "{user} finds no place");
        }
        assert!(outboxes.by_server.len() < SERVERS_MAX);
        let names: Vec<String> = outboxes.by_server.keys().cloned().collect();
        for user in 0..20 {
            names.iter().for_each(|name| outboxes.remove(name, sender(user), 100));
        }
        assert!(outboxes.by_server.is_empty() && outboxes.places.is_empty());
    }

    #[test]
    fn requests_for_keys_leave_room_for_keys_and_senders_are_read_from_messages() {
        let mut outboxes = Outboxes::default();
        let requests = (0..2_000).filter(|_| outboxes.reserve("b.example", sender(1), 60_000, true)).count();
        assert_eq!(requests, BYTES_MAX / KEY_REQUESTS_PART / 60_000 / (SHARE + 1));
        assert!(outboxes.reserve("b.example", sender(1), 60_000, false));
        let json = br#"{"content":{"messages":{"@b:b":{"*":{"sender":"@x:x"}}},"sender":"@1:a.example"},"edu_type":"m"}"#;
        assert_eq!(Sender::of_message(json), sender(1));
        assert_eq!(Sender::of_message(b"no JSON"), Sender::of(""));
    }
}
