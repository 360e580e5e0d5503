//! Writes the server's messages as frames, no faster than the client takes them, and notes since when it takes nothing.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{io::AsyncWrite, time::Instant};

use crate::{
    api::socket::{
        ending::Ending,
        frames::{CONTROL_BYTES_MAX, MESSAGE_BYTES_MAX, Opcode},
    },
    env::Env,
};

/// A client that has taken nothing for this long of what is there for it is too slow, as one that reads an answer over HTTP.
const UNREAD_MAX: Duration = Duration::from_secs(30);
/// A client that takes fewer bytes than this within `UNREAD_MAX` counts as one that takes nothing.
const TRICKLE_BYTES: usize = 16 << 10;
/// A frame of at most this many bytes is written together with its head, so that both go out in one packet.
const JOINED_BYTES_MAX: usize = 4 << 10;

/// A message on its way, in pieces that are its text together.
struct Message {
    pieces: VecDeque<Bytes>,
    has_begun: bool,
}

/// A client that does not take what is there for it.
struct Stall {
    since: Instant,
    taken_bytes: usize,
}

/// Writes frames to a stream.
pub(in crate::api::socket) struct Writer<W> {
    stream: W,
    env: Env,
    messages: VecDeque<Message>,
    /// The pong that answers the newest ping.
    pong: Option<Bytes>,
    /// Whether the client is to be asked if it is there.
    ping: bool,
    /// The frame that ends the socket.
    close: Option<Bytes>,
    /// The rest of the frame that is being written.
    current: VecDeque<Bytes>,
    is_flushed: bool,
    stall: Option<Stall>,
}

/// Writes the head of a frame, before its payload.
fn head(opcode: Opcode, is_last: bool, payload_bytes: usize) -> BytesMut {
    let mut bytes = BytesMut::with_capacity(payload_bytes.min(JOINED_BYTES_MAX).saturating_add(10));
    bytes.extend_from_slice(&[opcode.number() | if is_last { 0x80 } else { 0 }]);
    match (u8::try_from(payload_bytes), u16::try_from(payload_bytes)) {
        (Ok(short @ ..126), _) => bytes.extend_from_slice(&[short]),
        (_, Ok(length)) => {
            bytes.extend_from_slice(&[126]);
            bytes.extend_from_slice(&length.to_be_bytes());
        }
        _ => {
            bytes.extend_from_slice(&[127]);
            bytes.extend_from_slice(&(payload_bytes as u64).to_be_bytes());
        }
    }
    bytes
}

fn control(opcode: Opcode, payload: &[u8]) -> Bytes {
    debug_assert!(payload.len() <= CONTROL_BYTES_MAX, "a control frame is small");
    let mut frame = head(opcode, true, payload.len());
    frame.extend_from_slice(payload);
    frame.freeze()
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(in crate::api::socket) fn new(stream: W, env: Env) -> Self {
        Self {
            stream,
            env,
            messages: VecDeque::new(),
            pong: None,
            ping: false,
            close: None,
            current: VecDeque::new(),
            is_flushed: true,
            stall: None,
        }
    }

    /// Adds a message, in pieces that are its text together. They are not copied.
    pub(in crate::api::socket) fn say(&mut self, pieces: Vec<Bytes>) {
        let pieces: VecDeque<_> = pieces.into_iter().filter(|piece| !piece.is_empty()).collect();
        self.messages.push_back(Message { pieces, has_begun: false });
    }

    /// Answers a ping. A pong that is not on its way yet is left out, because the last one counts.
    pub(in crate::api::socket) fn pong(&mut self, payload: Bytes) {
        self.pong = Some(payload);
    }

    /// Asks the client whether it is there.
    pub(in crate::api::socket) fn ping(&mut self) {
        self.ping = true;
    }

    /// Ends the socket after the frame that is being written. Messages that have not been written are dropped.
    pub(in crate::api::socket) fn close(&mut self, ending: Ending) {
        self.messages.clear();
        self.pong = None;
        self.ping = false;
        let why = ending.why();
        let payload = ending.code().map(|code| [&code.to_be_bytes(), why.as_bytes()].concat());
        self.close = payload.map(|payload| control(Opcode::Close, &payload));
        self.stall = None;
    }

    /// The number of messages that are not written yet.
    pub(in crate::api::socket) fn message_count(&self) -> usize {
        self.messages.len()
    }

    /// Whether everything is written.
    pub(in crate::api::socket) fn is_done(&self) -> bool {
        let has_control = self.pong.is_some() || self.ping || self.close.is_some();
        self.is_flushed && self.current.is_empty() && self.messages.is_empty() && !has_control
    }

    /// When the client must have taken more.
    pub(in crate::api::socket) fn reading_due(&self) -> Option<Instant> {
        self.stall.as_ref().map(|stall| stall.since + UNREAD_MAX)
    }

    /// Writes until everything is written. It goes on where it was when it is given up and called again. Errors: the connection
    /// is gone.
    pub(in crate::api::socket) async fn write(&mut self) -> Result<(), Ending> {
        let written = poll_fn(|context| {
            let polled = self.poll(context);
            if polled.is_pending() {
                let since = self.env.instant();
                self.stall.get_or_insert(Stall { since, taken_bytes: 0 });
            } else {
                self.stall = None;
            }
            polled
        });
        written.await.map_err(|_| Ending::Gone)
    }

    /// Ends the stream, so that the client sees that nothing more comes.
    pub(in crate::api::socket) async fn shut_down(&mut self) {
        let _ = poll_fn(|context| Pin::new(&mut self.stream).poll_shutdown(context)).await;
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.current.is_empty() {
                self.load();
            }
            let Some(front) = self.current.front_mut() else { break };
            match Pin::new(&mut self.stream).poll_write(context, front) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::Error::other("nothing more is taken"))),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(bytes)) => {
                    front.advance(bytes.min(front.len()));
                    if front.is_empty() {
                        self.current.pop_front();
                    }
                    self.is_flushed = false;
                    self.note_taken(bytes);
                }
            }
        }
        // An idle socket needs no room for messages, so that it is freed.
        self.current = VecDeque::new();
        self.messages = VecDeque::new();
        if !self.is_flushed {
            match Pin::new(&mut self.stream).poll_flush(context) {
                Poll::Ready(flushed) => {
                    flushed?;
                    self.is_flushed = true;
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(()))
    }

    fn note_taken(&mut self, bytes: usize) {
        let Some(stall) = &mut self.stall else { return };
        stall.taken_bytes = stall.taken_bytes.saturating_add(bytes);
        if stall.taken_bytes >= TRICKLE_BYTES {
            self.stall = None;
        }
    }

    /// Makes the next frame, if there is one.
    fn load(&mut self) {
        let small = if let Some(close) = self.close.take() {
            Some(close)
        } else if let Some(payload) = self.pong.take() {
            Some(control(Opcode::Pong, &payload))
        } else {
            std::mem::take(&mut self.ping).then(|| control(Opcode::Ping, b""))
        };
        if let Some(frame) = small {
            self.current.push_back(frame);
            return;
        }
        let Some(message) = self.messages.front_mut() else { return };
        let (mut payload, mut room) = (Vec::new(), MESSAGE_BYTES_MAX);
        while room > 0
            && let Some(piece) = message.pieces.front_mut()
        {
            let part = piece.split_to(piece.len().min(room));
            room = room.saturating_sub(part.len());
            if piece.is_empty() {
                message.pieces.pop_front();
            }
            payload.push(part);
        }
        let is_last = message.pieces.is_empty();
        let opcode = if message.has_begun { Opcode::Continuation } else { Opcode::Text };
        message.has_begun = true;
        if is_last {
            self.messages.pop_front();
        }
        let payload_bytes = MESSAGE_BYTES_MAX.saturating_sub(room);
        let mut frame = head(opcode, is_last, payload_bytes);
        if payload_bytes <= JOINED_BYTES_MAX {
            payload.iter().for_each(|part| frame.extend_from_slice(part));
            payload.clear();
        }
        self.current.push_back(frame.freeze());
        self.current.extend(payload);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that a client gets, when it takes all of them.
    async fn written(say: impl FnOnce(&mut Writer<&mut Vec<u8>>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, Env::simulated(1, 0));
        say(&mut writer);
        assert!(!writer.is_done());
        writer.write().await.unwrap();
        assert!(writer.is_done());
        bytes
    }

    #[tokio::test(start_paused = true)]
    async fn small_messages_are_one_frame_and_large_ones_several() {
        let small =
            written(|it| it.say(vec![Bytes::from_static(b"{\"a\":"), Bytes::from_static(b"1}")])).await;
        assert_eq!(small, [&[0x81, 7][..], b"{\"a\":1}"].concat());
        let middle = written(|it| it.say(vec![Bytes::from(vec![b'a'; 200])])).await;
        assert_eq!(middle[..4], [0x81, 126, 0, 200]);
        let pieces = || vec![Bytes::from(vec![b'a'; 100_000]), Bytes::new(), Bytes::from(vec![b'b'; 50_000])];
        let large = written(|it| it.say(pieces())).await;
        let (mut rest, mut heads, mut payload) = (large.as_slice(), Vec::new(), Vec::new());
        while let [first, length, after @ ..] = rest {
            let (length, after) = match length {
                126 => (usize::from(u16::from_be_bytes([after[0], after[1]])), &after[2..]),
                127 => (u64::from_be_bytes(after[..8].try_into().unwrap()) as usize, &after[8..]),
                length => (usize::from(*length), after),
            };
            heads.push((*first, length));
            payload.extend_from_slice(&after[..length]);
            rest = &after[length..];
        }
        assert_eq!(heads, [(0x01, 65_536), (0x00, 65_536), (0x80, 18_928)]);
        assert_eq!(payload, pieces().concat());
    }

    #[tokio::test(start_paused = true)]
    async fn control_frames_go_first_and_only_the_last_pong_is_sent() {
        let bytes = written(|it| {
            it.say(vec![Bytes::from_static(b"{}")]);
            it.ping();
            it.pong(Bytes::from_static(b"1"));
            it.pong(Bytes::from_static(b"2"));
        });
        assert_eq!(bytes.await, [&[0x8a, 1][..], b"2", &[0x89, 0, 0x81, 2], b"{}"].concat());
        let bytes = written(|it| {
            it.say(vec![Bytes::from_static(b"{}")]);
            it.close(Ending::Closed);
        });
        assert_eq!(bytes.await, [0x88, 2, 0x03, 0xe8]);
    }

    #[test]
    fn reasons_fit_into_a_close_frame() {
        for ending in [
            Ending::Gone,
            Ending::Closed,
            Ending::Protocol,
            Ending::Binary,
            Ending::NotText,
            Ending::Flood,
            Ending::TooLarge,
            Ending::Failed,
            Ending::Stopping,
            Ending::Replaced,
            Ending::LoggedOut,
            Ending::Expired,
            Ending::Deactivated,
            Ending::Locked,
            Ending::Slow,
            Ending::Silent,
        ] {
            assert!(ending.why().len() + 2 <= CONTROL_BYTES_MAX, "{ending:?}");
        }
    }
}
