//! Reads the messages of a client from its frames. Everything is checked before it is kept.

use std::{future::poll_fn, pin::Pin, task::Poll, time::Duration};

use bytes::Bytes;
use tokio::{
    io::{AsyncRead, ReadBuf},
    time::Instant,
};

use crate::{
    api::{
        budget::{Budget, Held, Line},
        socket::{
            ending::Ending,
            frames::{CONTROL_BYTES_MAX, MESSAGE_BYTES_MAX, Opcode},
        },
    },
    env::{Env, payer::Payers},
};

/// A message comes in at most this many frames, because each costs work however small it is.
const FRAMES_MAX: u32 = 1024;
/// At most this many frames within `QUIET` may say nothing: control frames, and frames without bytes.
const IDLE_FRAMES_MAX: u32 = 1_000;
/// The time after which the count of frames that say nothing begins anew.
const QUIET: Duration = Duration::from_secs(30);
/// A message must have come whole within this time, as the body of a request must.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// The stream is read in pieces of at most this many bytes, which lie on the stack.
const READ_BYTES: usize = 4 << 10;
/// The bytes of a message that has not come whole are counted in the budget beyond this number; fewer cost less than counting.
const UNCOUNTED_BYTES_MAX: usize = READ_BYTES;

/// One thing that came from the client.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::api::socket) enum Incoming {
    /// A whole message, which is valid UTF-8.
    Text(Bytes),
    /// A ping, with the bytes that its pong must have.
    Ping(Bytes),
    /// A pong, which says that the client is there.
    Pong,
    /// The client ends the socket.
    Close,
}

/// The budget of bytes in memory, and for whom a socket's bytes count.
pub(in crate::api::socket) struct Counted {
    /// The budget of the whole server.
    pub(in crate::api::socket) budget: Budget,
    /// The payers of the socket: its user and its address.
    pub(in crate::api::socket) payers: Payers,
}

/// Reads frames from a stream.
pub(in crate::api::socket) struct Reader<R> {
    stream: R,
    env: Env,
    counted: Counted,
    /// The count of the bytes in `buffer` and `message`, as far as they are counted.
    held: Option<Held>,
    /// The bytes that were read and belong to a frame that is not whole.
    buffer: Vec<u8>,
    /// The bytes of the frames that a message has so far.
    message: Vec<u8>,
    /// The number of frames that the message has so far; none while there is no message.
    frames: u32,
    /// The time since which a message or frame is not whole.
    partial_since: Option<Instant>,
    idle_frames: u32,
    counted_since: Instant,
    /// When something last came from the client.
    heard_at: Instant,
}

/// The head of a frame of a client.
#[derive(Debug)]
struct Head {
    opcode: Opcode,
    is_last: bool,
    mask: [u8; 4],
    head_bytes: usize,
    payload_bytes: usize,
}

impl Head {
    /// Reads a head. None if it has not come whole.
    fn read(bytes: &[u8]) -> Result<Option<Self>, Ending> {
        let [first, second, rest @ ..] = bytes else { return Ok(None) };
        // Reserved bits belong to extensions, of which none was agreed on. A client masks all that it sends.
        let has_mask = second & 0x80 != 0;
        let (0, true, Some(opcode)) = (first & 0x70, has_mask, Opcode::of(first & 0x0f)) else {
            return Err(Ending::Protocol);
        };
        let is_last = first & 0x80 != 0;
        let (length, rest) = match second & 0x7f {
            126 => match rest.split_first_chunk::<2>() {
                Some((length, rest)) => (u64::from(u16::from_be_bytes(*length)), rest),
                None => return Ok(None),
            },
            127 => match rest.split_first_chunk::<8>() {
                Some((length, rest)) => (u64::from_be_bytes(*length), rest),
                None => return Ok(None),
            },
            length => (u64::from(length), rest),
        };
        if opcode.is_control() && (!is_last || length > CONTROL_BYTES_MAX as u64) {
            return Err(Ending::Protocol);
        }
        if opcode == Opcode::Binary {
            return Err(Ending::Binary);
        }
        let payload_bytes = usize::try_from(length).unwrap_or(usize::MAX);
        if payload_bytes > MESSAGE_BYTES_MAX {
            return Err(Ending::TooLarge);
        }
        let Some((mask, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        let head_bytes = bytes.len().saturating_sub(rest.len());
        Ok(Some(Self { opcode, is_last, mask: *mask, head_bytes, payload_bytes }))
    }
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(in crate::api::socket) fn new(stream: R, env: Env, counted: Counted) -> Self {
        let now = env.instant();
        Self {
            stream,
            env,
            counted,
            held: None,
            buffer: Vec::new(),
            message: Vec::new(),
            frames: 0,
            partial_since: None,
            idle_frames: 0,
            counted_since: now,
            heard_at: now,
        }
    }

    /// When something last came from the client.
    pub(in crate::api::socket) fn heard_at(&self) -> Instant {
        self.heard_at
    }

    /// Notes that the client could not be heard until now, because it was not read from.
    pub(in crate::api::socket) fn excuse(&mut self) {
        self.heard_at = self.env.instant();
        self.partial_since = self.partial_since.and(Some(self.heard_at));
    }

    /// When a message that has not come whole must have done so.
    pub(in crate::api::socket) fn message_due(&self) -> Option<Instant> {
        self.partial_since.map(|since| since + MESSAGE_TIMEOUT)
    }

    /// Waits for the next thing that comes from the client. Nothing is lost if it is given up and called again. Errors: the
    /// reason for which the socket must end.
    pub(in crate::api::socket) async fn next(&mut self) -> Result<Incoming, Ending> {
        loop {
            if let Some(incoming) = self.parse()? {
                return Ok(incoming);
            }
            self.count().await?;
            self.fill().await?;
        }
    }

    /// Counts the bytes that are kept of a message that has not come whole.
    async fn count(&mut self) -> Result<(), Ending> {
        let kept = self.buffer.len().saturating_add(self.message.len());
        if kept <= UNCOUNTED_BYTES_MAX {
            self.held = None;
            return Ok(());
        }
        let Counted { budget, payers } = &self.counted;
        let counted = match &mut self.held {
            None => budget.reserve(*payers, Line::KnownSmall, kept).await.map(|held| self.held = Some(held)),
            Some(held) => held.grow(Line::KnownSmall, kept.saturating_sub(held.bytes())).await,
        };
        counted.map_err(|error| {
            tracing::debug!(%error, reason = "there is no room for its message", "a socket ends");
            Ending::Failed
        })
    }

    /// Reads what is there, or waits until something is.
    async fn fill(&mut self) -> Result<(), Ending> {
        let Self { stream, buffer, .. } = self;
        let read = poll_fn(|context| {
            let mut piece = [0; READ_BYTES];
            let mut piece = ReadBuf::new(&mut piece);
            match Pin::new(&mut *stream).poll_read(context, &mut piece) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Err(_)) => Poll::Ready(0),
                Poll::Ready(Ok(())) => {
                    buffer.extend_from_slice(piece.filled());
                    Poll::Ready(piece.filled().len())
                }
            }
        });
        if read.await == 0 {
            return Err(Ending::Gone);
        }
        self.heard_at = self.env.instant();
        self.partial_since.get_or_insert(self.heard_at);
        Ok(())
    }

    /// Takes frames from what was read, up to the first thing that they say.
    fn parse(&mut self) -> Result<Option<Incoming>, Ending> {
        loop {
            let Some(head) = Head::read(&self.buffer)? else { return Ok(None) };
            self.check(&head)?;
            let end = head.head_bytes.saturating_add(head.payload_bytes);
            let Some(payload) = self.buffer.get_mut(head.head_bytes..end) else { return Ok(None) };
            for (byte, mask) in payload.iter_mut().zip(head.mask.iter().cycle()) {
                *byte ^= mask;
            }
            let is_control = head.opcode.is_control();
            let control = if is_control { Bytes::copy_from_slice(payload) } else { Bytes::new() };
            if !is_control {
                self.message.extend_from_slice(payload);
                self.frames = self.frames.saturating_add(1);
            }
            self.buffer.drain(..end);
            if self.buffer.is_empty() {
                self.buffer = Vec::new();
            }
            if is_control || head.payload_bytes == 0 {
                self.note_idle_frame()?;
            }
            let incoming = match head.opcode {
                Opcode::Close => Incoming::Close,
                Opcode::Ping => Incoming::Ping(control),
                Opcode::Pong => Incoming::Pong,
                Opcode::Continuation | Opcode::Text | Opcode::Binary if !head.is_last => continue,
                Opcode::Continuation | Opcode::Text | Opcode::Binary => {
                    self.frames = 0;
                    let message = std::mem::take(&mut self.message);
                    if std::str::from_utf8(&message).is_err() {
                        return Err(Ending::NotText);
                    }
                    Incoming::Text(message.into())
                }
            };
            if self.buffer.is_empty() && self.frames == 0 {
                self.partial_since = None;
            } else if !is_control {
                // The next message has begun already, and has all of its time.
                self.partial_since = Some(self.env.instant());
            }
            return Ok(Some(incoming));
        }
    }

    /// Refuses a frame that has no place after the frames before it, or for which its message has no room.
    fn check(&self, head: &Head) -> Result<(), Ending> {
        if head.opcode.is_control() {
            return Ok(());
        }
        let goes_on = head.opcode == Opcode::Continuation;
        if goes_on != (self.frames > 0) {
            return Err(Ending::Protocol);
        }
        if self.frames >= FRAMES_MAX {
            return Err(Ending::Flood);
        }
        if self.message.len().saturating_add(head.payload_bytes) > MESSAGE_BYTES_MAX {
            return Err(Ending::TooLarge);
        }
        Ok(())
    }

    fn note_idle_frame(&mut self) -> Result<(), Ending> {
        let now = self.env.instant();
        if now.saturating_duration_since(self.counted_since) >= QUIET {
            self.counted_since = now;
            self.idle_frames = 0;
        }
        self.idle_frames = self.idle_frames.saturating_add(1);
        if self.idle_frames > IDLE_FRAMES_MAX { Err(Ending::Flood) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;
    use crate::metrics::Metrics;

    /// A frame as a client sends it.
    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [7, 11, 13, 17];
        let mut bytes = vec![first];
        match payload.len() {
            length @ ..126 => bytes.push(0x80 | length as u8),
            length @ ..65_536 => {
                bytes.push(0x80 | 126);
                bytes.extend((length as u16).to_be_bytes());
            }
            length => {
                bytes.push(0x80 | 127);
                bytes.extend((length as u64).to_be_bytes());
            }
        }
        bytes.extend(mask);
        bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        bytes
    }

    /// Everything that these bytes say, up to the reason for which the socket ends.
    fn read(bytes: &[u8]) -> (Vec<Incoming>, Ending) {
        let env = Env::simulated(1, 0);
        let counted = Counted {
            budget: Budget::new(env.clone(), Metrics::new(), 64 << 20),
            payers: Payers::of_request(None, [192, 0, 2, 1].into()),
        };
        let mut reader = Reader::new(bytes, env, counted);
        let mut said = Vec::new();
        loop {
            match reader.next().now_or_never().expect("a slice is read at once") {
                Ok(incoming) => said.push(incoming),
                Err(ending) => return (said, ending),
            }
        }
    }

    fn text(text: &str) -> Incoming {
        Incoming::Text(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[tokio::test(start_paused = true)]
    async fn messages_are_read_whole_and_in_parts() {
        let parts = [
            frame(0x81, b"{}"),
            frame(0x01, &"a\u{e4}".as_bytes()[..2]),
            frame(0x89, b"ping"),
            frame(0x00, b""),
            frame(0x80, &"a\u{e4}".as_bytes()[2..]),
            frame(0x8a, b""),
            frame(0x81, &[b'x'; MESSAGE_BYTES_MAX]),
            frame(0x88, b"\x03\xe8"),
        ];
        let large = Incoming::Text(vec![b'x'; MESSAGE_BYTES_MAX].into());
        let ping = Incoming::Ping(Bytes::from_static(b"ping"));
        let expected = [text("{}"), ping, text("a\u{e4}"), Incoming::Pong, large, Incoming::Close];
        assert_eq!(read(&parts.concat()), (expected.into(), Ending::Gone));
    }

    #[tokio::test(start_paused = true)]
    async fn frames_that_cannot_be_end_the_socket() {
        let mut unmasked = frame(0x81, b"a");
        unmasked[1] &= 0x7f;
        // The length of this frame has its highest bit set, and nothing follows it.
        let endless = [0x81, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0].to_vec();
        let cases = [
            ("reserved bit", frame(0xc1, b"a"), Ending::Protocol),
            ("unknown kind", frame(0x83, b"a"), Ending::Protocol),
            ("unknown control", frame(0x8b, b""), Ending::Protocol),
            ("no mask", unmasked, Ending::Protocol),
            ("nothing to go on with", frame(0x80, b"a"), Ending::Protocol),
            ("a message in a message", [frame(0x01, b"a"), frame(0x81, b"b")].concat(), Ending::Protocol),
            ("a ping in parts", frame(0x09, b""), Ending::Protocol),
            ("a large ping", frame(0x89, &[0; 126]), Ending::Protocol),
            ("bytes", frame(0x82, b"{}"), Ending::Binary),
            ("no text", frame(0x81, b"\xff"), Ending::NotText),
            ("half a character", frame(0x81, &"\u{e4}".as_bytes()[..1]), Ending::NotText),
            ("too large", frame(0x81, &[b'a'; MESSAGE_BYTES_MAX + 1]), Ending::TooLarge),
            ("endless", endless, Ending::TooLarge),
            (
                "too large in parts",
                [frame(0x01, &[b'a'; MESSAGE_BYTES_MAX]), frame(0x80, b"a")].concat(),
                Ending::TooLarge,
            ),
            ("cut off", frame(0x81, b"abc")[..5].to_vec(), Ending::Gone),
        ];
        for (name, bytes, ending) in cases {
            assert_eq!(read(&bytes), (vec![], ending), "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pieces_are_bounded() {
        let begun = |count: u32| {
            let rest = (1..count).map(|_| frame(0x00, b"a")).collect::<Vec<_>>().concat();
            [frame(0x01, b"a"), rest].concat()
        };
        let most = [begun(FRAMES_MAX - 1), frame(0x80, b"a")].concat();
        assert_eq!(read(&most).0, [text(&"a".repeat(FRAMES_MAX as usize))]);
        assert_eq!(read(&[begun(FRAMES_MAX), frame(0x80, b"a")].concat()), (vec![], Ending::Flood));
        for idle in [frame(0x89, b""), frame(0x8a, b"x"), frame(0x81, b"")] {
            let (said, ending) = read(&idle.repeat(IDLE_FRAMES_MAX as usize));
            assert_eq!((said.len(), ending), (IDLE_FRAMES_MAX as usize, Ending::Gone));
            assert_eq!(read(&idle.repeat(IDLE_FRAMES_MAX as usize + 1)).1, Ending::Flood);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async { read(&bytes) });
        }

        #[test]
        fn a_text_comes_through_however_it_is_cut(
            said in "[a-z\u{e4}\u{20ac}\u{1f600}]{0,400}",
            cuts in proptest::collection::vec(0..400_usize, 0..8),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let bytes = said.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|at| at.min(bytes.len())).collect();
            cuts.sort_unstable();
            let ends = cuts.iter().copied().chain([bytes.len()]);
            let begins = [0].into_iter().chain(cuts.iter().copied());
            let count = cuts.len();
            let frames = begins.zip(ends).enumerate().map(|(at, (begin, end))| {
                let opcode = u8::from(at == 0);
                let last = if at == count { 0x80 } else { 0 };
                frame(opcode | last, &bytes[begin..end])
            });
            let sent = frames.collect::<Vec<_>>().concat();
            let got = runtime.block_on(async { read(&sent) });
            prop_assert_eq!(got, (vec![text(&said)], Ending::Gone));
        }
    }
}
