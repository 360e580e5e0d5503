//! The token of `/sync`: how far a client has read the log, and how far what is ephemeral.
//!
//! `s{position}_{boot}_{ephemeral}`. The position carries the store's incarnation in its high bits. The ephemeral
//! counter (typing, presence) lives in memory and counts within one run of the server, which the boot id names; a token
//! of another run is told again what is current.

use std::fmt;

use crate::{
    error::Refusal,
    ids::{Order, Position},
};

/// How far a client has read. Clients keep it as an opaque string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncToken {
    /// Everything in the log at or before this was told.
    pub position: Position,
    /// The run of the server in which `ephemeral` counts.
    pub boot: u32,
    /// Everything ephemeral up to this number was told.
    pub ephemeral: u64,
}

/// Longer strings are no tokens of ours.
const TOKEN_BYTES_MAX: usize = 64;

impl SyncToken {
    /// Reads a token. Refuses whatever this server cannot have given: 400 `M_INVALID_PARAM`.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        Self::read(text).ok_or_else(|| Refusal::invalid_param("This is not a token of this server's /sync."))
    }

    fn read(text: &str) -> Option<Self> {
        if text.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let mut parts = text.strip_prefix('s')?.split('_');
        let position = Position::new(number(parts.next()?, 10)?)?;
        let boot = u32::try_from(number(parts.next()?, 16)?).ok()?;
        let ephemeral = number(parts.next()?, 10)?;
        parts.next().is_none().then_some(Self { position, boot, ephemeral })
    }

    /// The token as it holds for this run of the server and this state of the store: a position of an older
    /// incarnation is clamped to where that one ended (what came after it was lost in the restore), and counters of
    /// another run begin anew. `last_of_incarnation` says where an older incarnation ended.
    ///
    /// Refuses (400 `M_INVALID_PARAM`) what lies in this run's future.
    pub fn settle(
        self,
        now: Position,
        boot: u32,
        last_of_incarnation: impl FnOnce(u64) -> Option<Position>,
    ) -> Result<Self, Refusal> {
        let same_run = self.boot == boot;
        let incarnation = self.position.incarnation();
        let position = if incarnation > now.incarnation() || (same_run && self.position > now) {
            return Err(Refusal::invalid_param("This token lies in the future."));
        } else if incarnation < now.incarnation() {
            last_of_incarnation(incarnation).map_or(self.position, |last| self.position.min(last))
        } else {
            // A power cut may have taken what was not synced: go on from what is left.
            self.position.min(now)
        };
        Ok(Self { position, boot, ephemeral: if same_run { self.ephemeral } else { 0 } })
    }

    /// Where `/messages` goes on from this token: everything at or before it is older.
    pub fn order(&self) -> Order {
        Order::upto(self.position)
    }
}

/// Digits only: no sign, no spaces.
fn number(digits: &str, radix: u32) -> Option<u64> {
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_alphanumeric());
    plain.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

impl fmt::Display for SyncToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}_{:x}_{}", self.position, self.boot, self.ephemeral)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn position(number: u64) -> Position {
        Position::new(number).unwrap()
    }

    fn no_incarnation(_: u64) -> Option<Position> {
        None
    }

    #[test]
    fn hostile_tokens_are_refused() {
        for text in [
            "", "s", "s1", "s1_2", "s1_2_3_4", "s-1_2_3", "s+1_2_3", "s 1_2_3", "1_2_3", "s9007199254740992_0_0",
            "s1_100000000_0", "s1_g_0", "s18446744073709551616_0_0", "s١_0_0", "t1_2_3", "s1_2_99999999999999999999",
        ] {
            let refused = SyncToken::parse(text).unwrap_err();
            assert_eq!(refused.kind.errcode().to_string(), "M_INVALID_PARAM", "{text}");
        }
    }

    #[test]
    fn a_token_of_an_older_incarnation_is_clamped_to_its_end() {
        let token = SyncToken { position: position(1500), boot: 7, ephemeral: 4 };
        let now = Position::first_of_incarnation(1).plus(20);
        let settled = token.settle(now, 8, |incarnation| (incarnation == 0).then(|| position(1000))).unwrap();
        assert_eq!(settled, SyncToken { position: position(1000), boot: 8, ephemeral: 0 });
        let earlier = SyncToken { position: position(900), ..token };
        assert_eq!(earlier.settle(now, 8, |_| Some(position(1000))).unwrap().position, position(900));
        assert!(now.number() < 1 << 53);
    }

    #[test]
    fn the_future_of_this_run_is_refused() {
        let token = SyncToken { position: position(11), boot: 7, ephemeral: 0 };
        assert!(token.settle(position(10), 7, no_incarnation).is_err());
        assert_eq!(token.settle(position(10), 8, no_incarnation).unwrap().position, position(10));
        let next = SyncToken { position: Position::first_of_incarnation(2), ..token };
        assert!(next.settle(position(10), 8, no_incarnation).is_err());
    }

    proptest! {
        #[test]
        fn tokens_come_back(number in 0_u64..1 << 53, boot: u32, ephemeral: u64) {
            let token = SyncToken { position: position(number), boot, ephemeral };
            prop_assert_eq!(SyncToken::parse(&token.to_string()).unwrap(), token);
        }

        #[test]
        fn arbitrary_strings_never_panic(text: String) {
            let _ = SyncToken::parse(&text);
        }
    }
}
