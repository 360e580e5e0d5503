//! The order in which the hosts of SRV records are tried ([RFC 2782](https://www.rfc-editor.org/rfc/rfc2782.html)).

use crate::ports::{Randomness, Service};

/// At most this many records are used: each host costs a look-up.
pub(super) const SERVICES_MAX: usize = 8;

/// Whether the records say that there is decidedly no such service: one record, whose host is the root.
pub(super) fn declines(services: &[Service]) -> bool {
    matches!(services, [only] if only.host.is_empty())
}

/// Orders records by priority, and those of one priority by drawing: the weight is the chance of coming first. At most
/// [`SERVICES_MAX`] are kept, and none whose host is the root or no name of a host, or whose port is none.
pub(super) fn order(mut services: Vec<Service>, randomness: &dyn Randomness) -> Vec<Service> {
    services.retain(|it| is_host(&it.host) && it.port > 0);
    // Records of equal priority are in a known order before they are drawn, so that a drawing is repeatable.
    services.sort_by(|a, b| {
        (a.priority, a.weight, &a.host, a.port).cmp(&(b.priority, b.weight, &b.host, b.port))
    });
    services.truncate(64);
    let mut ordered = Vec::new();
    while ordered.len() < SERVICES_MAX
        && let Some(priority) = services.first().map(|it| it.priority)
    {
        let same = services.iter().take_while(|it| it.priority == priority);
        let total: u64 = same.clone().map(|it| u64::from(it.weight)).sum();
        // The sum itself may be drawn, so that a record without weight has a small chance, too.
        let mut left = randomness.below(total + 1);
        let chosen = same.clone().position(|it| {
            let weight = u64::from(it.weight);
            let is_chosen = left <= weight;
            left = left.saturating_sub(weight);
            is_chosen
        });
        ordered.push(services.remove(chosen.unwrap_or(0)));
    }
    ordered
}

/// Labels in DNS may hold any bytes; those of hosts do not, and what holds a blank or a line break must reach no proxy.
pub(crate) fn is_host(name: &str) -> bool {
    let is_allowed = |it: u8| it.is_ascii_alphanumeric() || matches!(it, b'-' | b'_' | b'.');
    (1..=253).contains(&name.len()) && name.bytes().all(is_allowed) && !is_address(name)
}

/// Whether a name is an address in any form that a resolver or a proxy may know: `10.0.0.1`, `127.1`, `2130706433`, `0x7f.1`. All
/// of them end in a number, which no domain does. Such a name would lead past the guard where a proxy resolves it.
pub(super) fn is_address(name: &str) -> bool {
    let last = name.trim_end_matches('.').rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    let is_hexadecimal = |digits: &str| digits.bytes().all(|it| it.is_ascii_hexdigit());
    let is_decimal = !last.is_empty() && last.bytes().all(|it| it.is_ascii_digit());
    is_decimal || last.strip_prefix("0x").is_some_and(is_hexadecimal)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Counts up, so that a test meets every drawing.
    struct Counting(AtomicU64);

    impl Randomness for Counting {
        fn below(&self, bound: u64) -> u64 {
            self.0.fetch_add(1, Ordering::Relaxed) % bound.max(1)
        }
    }

    fn service(priority: u16, weight: u16, host: &str) -> Service {
        Service { priority, weight, port: 8448, host: host.to_owned() }
    }

    #[test]
    fn lower_priorities_come_first_and_weights_are_chances() {
        let randomness = Counting(AtomicU64::new(0));
        let services = vec![service(20, 0, "last"), service(10, 90, "often"), service(10, 9, "seldom")];
        let mut often = 0;
        for _ in 0..100 {
            let hosts: Vec<_> = order(services.clone(), &randomness).into_iter().map(|it| it.host).collect();
            assert_eq!(hosts.len(), 3);
            assert_eq!(hosts[2], "last");
            often += u32::from(hosts[0] == "often");
        }
        assert!((80..100).contains(&often), "{often}");
    }

    #[test]
    fn no_more_records_are_used_than_are_worth_a_look_up() {
        let randomness = Counting(AtomicU64::new(0));
        let many = (0..1000).map(|it| service(it, 1, &format!("h{it}"))).collect();
        let ordered = order(many, &randomness);
        assert_eq!(ordered.len(), SERVICES_MAX);
        assert_eq!(ordered[7].host, "h7");
        let useless = vec![
            service(1, 1, ""),
            service(1, 1, "a b"),
            service(1, 1, "a\r\nb"),
            Service { port: 0, ..service(1, 1, "a") },
        ];
        assert!(order(useless, &randomness).is_empty());
    }

    #[test]
    fn a_target_that_is_an_address_in_any_form_is_left_out() {
        let randomness = Counting(AtomicU64::new(0));
        for host in [
            "10.0.0.1",
            "2130706433",
            "0x7f.1",
            "127.1",
            "0X7F000001",
            "0177.0.0.1",
            "127.0.0.1.",
            "1.0x",
            "5.0.0.1",
        ] {
            assert!(order(vec![service(1, 1, host)], &randomness).is_empty(), "{host}");
        }
        for host in ["10.example", "1.2.3.4.example", "0x7f.example", "x1", "0xyz", "1a"] {
            assert_eq!(order(vec![service(1, 1, host)], &randomness).len(), 1, "{host}");
        }
    }

    #[test]
    fn a_root_alone_declines() {
        assert!(declines(&[service(0, 0, "")]));
        assert!(!declines(&[service(0, 0, ""), service(1, 0, "a")]));
        assert!(!declines(&[]));
    }
}
