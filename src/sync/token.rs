//! The token of `/sync` says how far a client has read the log, and how far it knows what is ephemeral.
//!
//! It reads `s{position}_{boot}_{ephemeral}`, then `_{inbox}` where messages to the device are behind, `_r{receipts}`
//! where receipts are behind, `_i{invites}` where invitations are behind, `_k{sticky}` where sticky events are behind, and
//! `_d{device}`. The position carries the store's incarnation in its high bits. The ephemeral counter (typing,
//! presence) lives in memory and counts within one run of the server, which the boot id names; a client with a token of
//! another run is told again what is current.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::{
    error::Refusal,
    ids::{DeviceNum, Order, Position, UserNum},
};

/// How far a client has read. Clients treat the token as an opaque string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncToken {
    /// The log is told up to and including this position.
    pub position: Position,
    /// The id of the run of the server in which `ephemeral` counts.
    pub boot: u32,
    /// Ephemeral changes are told up to and including this number.
    pub ephemeral: u64,
    /// Messages to the device are told up to here, where that is less than `position` because there were too many for
    /// one answer.
    pub inbox: Option<Position>,
    /// Receipts are told up to here in every room, where that is less than `position` because some room had too many for
    /// one answer.
    pub receipts: Option<Position>,
    /// Invitations and knocks are told up to here, where that is less than `position` because there were too many for one
    /// answer.
    pub invites: Option<Position>,
    /// Sticky events are told up to here in every room, where that is less than `position` because some room had too many for
    /// one answer.
    pub sticky: Option<Position>,
    /// The device that the token was given to, as [`SyncToken::mark`] names it. A token of another device confirms no
    /// messages, so that none is lost.
    pub device: Option<u32>,
}

/// A longer string is not read at all, because no token of this server has more bytes.
const TOKEN_BYTES_MAX: usize = 160;

impl SyncToken {
    /// Reads a token. Refuses a string that this server cannot have given: 400 `M_INVALID_PARAM`.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        Self::read(text)
            .ok_or_else(|| Refusal::invalid_param("The token is not one that this server's /sync gives."))
    }

    fn read(text: &str) -> Option<Self> {
        if text.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let mut parts = text.strip_prefix('s')?.split('_');
        let position = Position::new(number(parts.next()?, 10)?)?;
        let boot = u32::try_from(number(parts.next()?, 16)?).ok()?;
        let ephemeral = number(parts.next()?, 10)?;
        let mut part = parts.next();
        let (mut inbox, mut receipts, mut invites, mut sticky) = (None, None, None, None);
        if let Some(text) = part.filter(|text| !text.starts_with(['d', 'i', 'k', 'r'])) {
            inbox = Some(number(text, 10).and_then(Position::new)?);
            part = parts.next();
        }
        if let Some(text) = part.and_then(|text| text.strip_prefix('r')) {
            receipts = Some(number(text, 10).and_then(Position::new)?);
            part = parts.next();
        }
        if let Some(text) = part.and_then(|text| text.strip_prefix('i')) {
            invites = Some(number(text, 10).and_then(Position::new)?);
            part = parts.next();
        }
        if let Some(text) = part.and_then(|text| text.strip_prefix('k')) {
            sticky = Some(number(text, 10).and_then(Position::new)?);
            part = parts.next();
        }
        let mut device = None;
        if let Some(text) = part {
            device = Some(u32::try_from(number(text.strip_prefix('d')?, 16)?).ok()?);
        }
        let token = Self { position, boot, ephemeral, inbox, receipts, invites, sticky, device };
        parts.next().is_none().then_some(token)
    }

    /// Makes the token valid for this run of the server and this state of the store. `clamp` says where a reader at a
    /// position stands now: a position beyond what is left of its incarnation is moved back, because what came after
    /// was lost in a restore or a power cut. The counter of another run begins anew at zero; the id of that run stays,
    /// to show that what the client knows of typing and presence no longer holds.
    ///
    /// Refuses a token that lies in the future: 400 `M_INVALID_PARAM`.
    pub fn settle(
        self,
        now: Position,
        boot: u32,
        clamp: impl FnOnce(Position) -> Position,
    ) -> Result<Self, Refusal> {
        let same_run = self.boot == boot;
        if self.position.incarnation() > now.incarnation() || (same_run && self.position > now) {
            return Err(Refusal::invalid_param(
                "The token lies in the future, so this server has not given it.",
            ));
        }
        let position = clamp(self.position).min(now);
        let inbox = self.inbox.map(|inbox| inbox.min(position));
        let receipts = self.receipts.map(|receipts| receipts.min(position));
        let invites = self.invites.map(|invites| invites.min(position));
        let sticky = self.sticky.map(|sticky| sticky.min(position));
        Ok(Self {
            position,
            boot: self.boot,
            ephemeral: if same_run { self.ephemeral } else { 0 },
            inbox,
            receipts,
            invites,
            sticky,
            device: self.device,
        })
    }

    /// The position up to which messages to this device were told; zero if the token belongs to another device.
    pub fn inbox_position(&self, user: UserNum, device: DeviceNum) -> Position {
        if self.device == Some(Self::mark(user, device)) {
            self.inbox.unwrap_or(self.position)
        } else {
            Position::ZERO
        }
    }

    /// The position up to which receipts were told in every room.
    pub fn receipts_position(&self) -> Position {
        self.receipts.map_or(self.position, |receipts| receipts.min(self.position))
    }

    /// The position up to which invitations and knocks were told.
    pub fn invites_position(&self) -> Position {
        self.invites.map_or(self.position, |invites| invites.min(self.position))
    }

    /// The position up to which sticky events were told in every room.
    pub fn sticky_position(&self) -> Position {
        self.sticky.map_or(self.position, |sticky| sticky.min(self.position))
    }

    /// A short hash that tells the tokens of different devices apart without revealing the device's number.
    pub fn mark(user: UserNum, device: DeviceNum) -> u32 {
        let mut hash = Sha256::new();
        hash.update(user.0.to_be_bytes());
        hash.update(device.0.to_be_bytes());
        hash.finalize().iter().take(4).fold(0, |mark, byte| mark << 8 | u32::from(*byte))
    }

    /// The order from which `/messages` goes on: events at or below it are older than this token.
    pub fn order(&self) -> Order {
        Order::upto(self.position)
    }
}

/// Reads a number of letters and digits only, without sign or spaces.
fn number(digits: &str, radix: u32) -> Option<u64> {
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_alphanumeric());
    plain.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

impl fmt::Display for SyncToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}_{:x}_{}", self.position, self.boot, self.ephemeral)?;
        self.inbox.map_or(Ok(()), |inbox| write!(f, "_{inbox}"))?;
        self.receipts.map_or(Ok(()), |receipts| write!(f, "_r{receipts}"))?;
        self.invites.map_or(Ok(()), |invites| write!(f, "_i{invites}"))?;
        self.sticky.map_or(Ok(()), |sticky| write!(f, "_k{sticky}"))?;
        self.device.map_or(Ok(()), |device| write!(f, "_d{device:x}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn position(number: u64) -> Position {
        Position::new(number).unwrap()
    }

    #[test]
    fn hostile_tokens_are_refused() {
        for text in [
            "",
            "s",
            "s1",
            "s1_2",
            "s1_2_3_4_5",
            "s1_2_3_",
            "s1_2_3_d",
            "s1_2_3_d1_4",
            "s1_2_3_r",
            "s1_2_3_r4_5",
            "s1_2_3_d1_r4",
            "s1_2_3_i",
            "s1_2_3_i4_r5",
            "s1_2_3_k",
            "s1_2_3_k4_i5",
            "s1_2_3_d1_k4",
            "s1_2_3_4_d1_",
            "s-1_2_3",
            "s+1_2_3",
            "s 1_2_3",
            "1_2_3",
            "s9007199254740992_0_0",
            "s1_100000000_0",
            "s1_g_0",
            "s18446744073709551616_0_0",
            "s١_0_0",
            "t1_2_3",
            "s1_2_99999999999999999999",
        ] {
            let refused = SyncToken::parse(text).unwrap_err();
            assert_eq!(refused.kind.errcode().to_string(), "M_INVALID_PARAM", "{text}");
        }
    }

    #[test]
    fn a_token_of_an_older_incarnation_is_clamped_to_its_end() {
        let token = SyncToken {
            position: position(1500),
            boot: 7,
            ephemeral: 4,
            inbox: Some(position(1200)),
            receipts: Some(position(1300)),
            invites: Some(position(1400)),
            sticky: Some(position(1450)),
            device: Some(5),
        };
        let now = Position::first_of_incarnation(1).plus(20);
        let ended_at_1000 = |seen: Position| seen.min(position(1000));
        let settled = token.settle(now, 8, ended_at_1000).unwrap();
        assert_eq!(
            settled,
            SyncToken {
                position: position(1000),
                boot: 7,
                ephemeral: 0,
                inbox: Some(position(1000)),
                receipts: Some(position(1000)),
                invites: Some(position(1000)),
                sticky: Some(position(1000)),
                device: Some(5)
            }
        );
        let earlier = SyncToken { position: position(900), ..token };
        assert_eq!(earlier.settle(now, 8, ended_at_1000).unwrap().position, position(900));
        assert!(now.number() < 1 << 53);
    }

    #[test]
    fn the_future_of_this_run_is_refused() {
        let token = SyncToken {
            position: position(11),
            boot: 7,
            ephemeral: 0,
            inbox: None,
            receipts: None,
            invites: None,
            sticky: None,
            device: None,
        };
        assert!(token.settle(position(10), 7, |seen| seen).is_err());
        assert_eq!(token.settle(position(10), 8, |seen| seen).unwrap().position, position(10));
        let next = SyncToken { position: Position::first_of_incarnation(2), ..token };
        assert!(next.settle(position(10), 8, |seen| seen).is_err());
    }

    proptest! {
        #[test]
        fn tokens_come_back(
            number in 0_u64..1 << 53,
            boot: u32,
            ephemeral: u64,
            inbox in 0_u64..1 << 53,
            receipts in 0_u64..1 << 53,
            invites in 0_u64..1 << 53,
            sticky in 0_u64..1 << 53,
            device: Option<u32>,
        ) {
            let behind = |told: u64| (told < number).then(|| position(told));
            let (inbox, receipts, invites) = (behind(inbox), behind(receipts), behind(invites));
            let sticky = behind(sticky);
            let position = position(number);
            let token = SyncToken { position, boot, ephemeral, inbox, receipts, invites, sticky, device };
            prop_assert_eq!(SyncToken::parse(&token.to_string()).unwrap(), token);
        }

        #[test]
        fn arbitrary_strings_never_panic(text: String) {
            let _ = SyncToken::parse(&text);
        }
    }
}
