//! The steps by which a server's name is resolved
//! ([resolving server names](https://spec.matrix.org/v1.19/server-server-api/#resolving-server-names)).
//!
//! Each step notes what it found, for an operator who asks why a server is not reached.

use futures_util::future::join_all;

use crate::{
    discovery::{
        Found, Line, NotFound, Parts, Step,
        hosts::DNS_TIMEOUT,
        name::{Host, Name},
        services,
    },
    ports::{NotResolved, Place, Service, Services, Target},
};

/// The port of a server whose name has none.
const DEFAULT_PORT: u16 = 8448;
const FEDERATION: &str = "_matrix-fed._tcp";
const DEPRECATED: &str = "_matrix._tcp";

/// The steps that follow for a host whose port is not known: by SRV, by the deprecated SRV, by the default port.
const OWN: [Step; 3] = [Step::Service, Step::DeprecatedService, Step::DefaultPort];
const DELEGATED: [Step; 3] =
    [Step::DelegatedService, Step::DelegatedDeprecatedService, Step::DelegatedDefaultPort];

/// One resolution of one name.
pub(super) struct Walk<'p> {
    parts: &'p Parts,
    /// Whether nothing that is remembered counts.
    is_fresh: bool,
    /// The result holds until then, as far as is known.
    until_ms: u64,
    pub(super) lines: Vec<Line>,
}

impl<'p> Walk<'p> {
    pub(super) fn new(parts: &'p Parts, is_fresh: bool) -> Self {
        let until_ms = parts.ports.clock.now_ms().saturating_add(super::KEPT_MAX_MS);
        Self { parts, is_fresh, until_ms, lines: Vec::new() }
    }

    /// Resolves a name. Errors: [`NotFound`].
    pub(super) async fn resolve(&mut self, name: Name) -> Result<Found, NotFound> {
        match (&name.host, name.port) {
            (Host::Literal(_), _) => self.direct(&name, Step::Literal).await,
            (Host::Dns(_), Some(_)) => self.direct(&name, Step::Port).await,
            (Host::Dns(host), None) => {
                let (answer, until_ms) = self.parts.well_known(host, self.is_fresh).await;
                self.until_ms = self.until_ms.min(until_ms);
                match answer {
                    Ok(to) => {
                        let told = format!("https://{host} delegates to {}", to.written);
                        self.note(Step::WellKnown, told);
                        self.delegated(&to).await
                    }
                    Err(why) => {
                        self.note(Step::WellKnown, format!("https://{host} does not delegate: {why}"));
                        self.by_services(host, &name.written, OWN).await
                    }
                }
            }
        }
    }

    async fn delegated(&mut self, to: &Name) -> Result<Found, NotFound> {
        match (&to.host, to.port) {
            (Host::Literal(_), _) => self.direct(to, Step::DelegatedLiteral).await,
            (Host::Dns(_), Some(_)) => self.direct(to, Step::DelegatedPort).await,
            (Host::Dns(host), None) => self.by_services(host, &to.written, DELEGATED).await,
        }
    }

    /// The host is an address, or its port is known.
    async fn direct(&mut self, name: &Name, step: Step) -> Result<Found, NotFound> {
        let port = name.port.unwrap_or(DEFAULT_PORT);
        let tls_name = match &name.host {
            Host::Literal(address) => address.to_string(),
            Host::Dns(host) => host.clone(),
        };
        self.connect_to(&name.host, port, tls_name, &name.written, step).await
    }

    async fn by_services(
        &mut self,
        host: &str,
        written: &str,
        [federation, deprecated, default]: [Step; 3],
    ) -> Result<Found, NotFound> {
        for (service, step) in [(FEDERATION, federation), (DEPRECATED, deprecated)] {
            if let Some(services) = self.services(&format!("{service}.{host}"), step).await? {
                return self.by_records(services, host, written, step).await;
            }
        }
        let name = Host::Dns(host.to_owned());
        self.connect_to(&name, DEFAULT_PORT, host.to_owned(), written, default).await
    }

    /// The SRV records of a name; none where there are none. Errors: the domain declines the service.
    async fn services(&mut self, name: &str, step: Step) -> Result<Option<Vec<Service>>, NotFound> {
        let answer = tokio::time::timeout(DNS_TIMEOUT, self.parts.ports.resolver.services(name)).await;
        let late = || Err(NotResolved::Failed("it did not answer in time".to_owned()));
        match answer.unwrap_or_else(|_| late()) {
            Ok(Services { services, ttl_s }) => {
                self.holds_for_s(ttl_s);
                if services::declines(&services) {
                    self.note(step, format!("{name} says that there is no such service (target `.`)"));
                    return Err(NotFound::Declined { name: name.to_owned() });
                }
                let services = services::order(services, &*self.parts.ports.randomness);
                if services.is_empty() {
                    self.note(step, format!("{name} has no SRV record that can be used"));
                    return Ok(None);
                }
                let list: Vec<_> = services.iter().map(|it| format!("{}:{}", it.host, it.port)).collect();
                self.note(step, format!("{name} names {}", list.join(", ")));
                Ok(Some(services))
            }
            Err(NotResolved::Absent { ttl_s }) => {
                self.holds_for_s(ttl_s);
                self.note(step, format!("{name} has no SRV record"));
                Ok(None)
            }
            Err(NotResolved::Failed(why)) => {
                // The next step may work; what it finds is looked at again soon.
                self.holds_for_s(0);
                self.note(step, format!("{name}: DNS failed: {why}"));
                Ok(None)
            }
        }
    }

    async fn by_records(
        &mut self,
        services: Vec<Service>,
        host: &str,
        written: &str,
        step: Step,
    ) -> Result<Found, NotFound> {
        let names: Vec<_> = services.iter().map(|it| (Host::of_record(&it.host), it.port)).collect();
        let located = join_all(names.iter().map(|(host, port)| self.parts.hosts.locate(host, *port))).await;
        let mut place: Option<Place> = None;
        let mut first_error = None;
        for (service, located) in services.iter().zip(located) {
            match located {
                Ok(located) => {
                    self.holds_for_s(located.ttl_s);
                    self.note(step, located.to_string());
                    if located.is_alias {
                        let told = "{} is an alias (CNAME), which the target of an SRV record must not be";
                        self.note(step, told.replace("{}", &service.host));
                    }
                    place = Some(match place {
                        Some(place) => join(place, located.place),
                        None => located.place,
                    });
                }
                Err(error) => {
                    self.note(step, error.to_string());
                    first_error.get_or_insert(error);
                }
            }
        }
        let no_address = || NotFound::NoAddress { host: host.to_owned() };
        let place = place.ok_or_else(|| first_error.unwrap_or_else(no_address))?;
        Ok(self.found(place, host.to_owned(), written, step))
    }

    async fn connect_to(
        &mut self,
        host: &Host,
        port: u16,
        tls_name: String,
        written: &str,
        step: Step,
    ) -> Result<Found, NotFound> {
        let located = self.parts.hosts.locate(host, port).await;
        let located = located.inspect_err(|error| self.note(step, error.to_string()))?;
        self.holds_for_s(located.ttl_s);
        self.note(step, located.to_string());
        Ok(self.found(located.place, tls_name, written, step))
    }

    fn found(&self, place: Place, tls_name: String, written: &str, step: Step) -> Found {
        let target = Target { place, tls_name: Some(tls_name), host_header: written.to_owned() };
        Found { target, step, until_ms: self.until_ms }
    }

    fn note(&mut self, step: Step, told: String) {
        self.lines.push(Line { step, told });
    }

    fn holds_for_s(&mut self, ttl_s: u32) {
        let ttl_ms = u64::from(ttl_s).saturating_mul(1000).max(super::KEPT_LEAST_MS);
        self.until_ms = self.until_ms.min(self.parts.ports.clock.now_ms().saturating_add(ttl_ms));
    }
}

impl Host {
    /// The host of an SRV record that was let through, which is a name.
    fn of_record(host: &str) -> Self {
        Self::Dns(host.to_ascii_lowercase())
    }
}

fn join(place: Place, other: Place) -> Place {
    match (place, other) {
        (Place::Addresses(addresses), Place::Addresses(others)) => Place::Addresses(addresses.then(&others)),
        (Place::Names(mut names), Place::Names(others)) => {
            names.extend(others);
            Place::Names(names)
        }
        // Whether names are left to a proxy is the same for all, so the two are of one kind; the first will do.
        (place, _) => place,
    }
}
