//! The figures that the server counts about itself. Every part may add to them; the metrics listener shows them in the
//! format of Prometheus.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// The figures of one server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

/// The labels of a count of requests: method, template of the route, status of the answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: String,
    route: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    route: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheLabels {
    cache: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct JobLabels {
    job: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct QueueLabels {
    queue: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EduLabels {
    kind: &'static str,
    taken: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PushLabels {
    kind: &'static str,
    outcome: &'static str,
}

#[derive(Debug)]
struct Inner {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    request_seconds: Family<RouteLabels, Histogram>,
    panics: Counter,
    connections: Gauge<i64, AtomicI64>,
    sockets: Gauge<i64, AtomicI64>,
    bytes_in_flight: Gauge<i64, AtomicI64>,
    flush_batches: Histogram,
    flush_bytes: Histogram,
    flush_rows: Histogram,
    flush_seconds: Histogram,
    fsyncs: Counter,
    queue_depth: Family<QueueLabels, Gauge<i64, AtomicI64>>,
    cache_hits: Family<CacheLabels, Counter<u64, AtomicU64>>,
    cache_misses: Family<CacheLabels, Counter<u64, AtomicU64>>,
    resolutions: Counter,
    resolution_seconds: Histogram,
    resolution_events: Histogram,
    rate_limited: Family<RouteLabels, Counter>,
    to_device_dropped: Family<ReasonLabels, Counter>,
    jobs_given_up: Family<JobLabels, Counter>,
    inbound_events: Family<OutcomeLabels, Counter>,
    inbound_edus: Family<EduLabels, Counter>,
    federation_pdus: Counter,
    federation_edus: Counter,
    federation_transactions: Counter,
    federation_failures: Counter,
    federation_waiting: Gauge<i64, AtomicI64>,
    federation_failing: Gauge<i64, AtomicI64>,
    federation_lag: Gauge<i64, AtomicI64>,
    pushes_sent: Counter,
    pushes_failed: Counter,
    mails_sent: Counter,
    mails_failed: Counter,
    pushers: Gauge<i64, AtomicI64>,
    pushers_behind: Gauge<i64, AtomicI64>,
    push_gateway_devices: Family<PushLabels, Counter>,
}

/// The buckets of times, in seconds: from 0.1 ms to 26 s, each four times the one before.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.0001, 4.0, 10))
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Makes the figures of a server that starts: all of them are zero.
    pub fn new() -> Self {
        let mut inner = Inner {
            registry: Registry::with_prefix("aqueduct"),
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(seconds),
            panics: Counter::default(),
            connections: Gauge::default(),
            sockets: Gauge::default(),
            bytes_in_flight: Gauge::default(),
            flush_batches: Histogram::new(exponential_buckets(1.0, 2.0, 10)),
            flush_bytes: Histogram::new(exponential_buckets(256.0, 4.0, 9)),
            flush_rows: Histogram::new(exponential_buckets(4.0, 4.0, 7)),
            flush_seconds: seconds(),
            fsyncs: Counter::default(),
            queue_depth: Family::default(),
            cache_hits: Family::default(),
            cache_misses: Family::default(),
            resolutions: Counter::default(),
            resolution_seconds: seconds(),
            resolution_events: Histogram::new(exponential_buckets(4.0, 4.0, 9)),
            rate_limited: Family::default(),
            to_device_dropped: Family::default(),
            jobs_given_up: Family::default(),
            inbound_events: Family::default(),
            inbound_edus: Family::default(),
            federation_pdus: Counter::default(),
            federation_edus: Counter::default(),
            federation_transactions: Counter::default(),
            federation_failures: Counter::default(),
            federation_waiting: Gauge::default(),
            federation_failing: Gauge::default(),
            federation_lag: Gauge::default(),
            pushes_sent: Counter::default(),
            pushes_failed: Counter::default(),
            mails_sent: Counter::default(),
            mails_failed: Counter::default(),
            pushers: Gauge::default(),
            pushers_behind: Gauge::default(),
            push_gateway_devices: Family::default(),
        };
        inner.register();
        Self(Arc::new(inner))
    }

    /// Counts a request that was answered with this status after this time.
    pub fn request(&self, method: &http::Method, route: &'static str, status: u16, took: Duration) {
        // Methods come from outside: only those that are routed get a series of their own.
        let method = match *method {
            http::Method::GET | http::Method::PUT | http::Method::POST | http::Method::DELETE => {
                method.as_str()
            }
            http::Method::HEAD => "HEAD",
            _ => "other",
        };
        let labels = RequestLabels { method: method.to_owned(), route, status };
        self.0.requests.get_or_create(&labels).inc();
        self.0.request_seconds.get_or_create(&RouteLabels { route }).observe(took.as_secs_f64());
    }

    /// Counts a handler that panicked, which is a fault of ours.
    pub fn panic(&self) {
        self.0.panics.inc();
    }

    /// Counts a request that was refused because requests of its kind came too fast.
    pub fn rate_limited(&self, route: &'static str) {
        self.0.rate_limited.get_or_create(&RouteLabels { route }).inc();
    }

    /// Counts messages that, for this reason, did not reach their device or left its inbox unread.
    pub fn to_device_dropped(&self, reason: &'static str, count: usize) {
        self.0.to_device_dropped.get_or_create(&ReasonLabels { reason }).inc_by(count as u64);
    }

    /// Counts a job of this kind that failed so often that it is not tried again.
    pub fn job_given_up(&self, job: &'static str) {
        self.0.jobs_given_up.get_or_create(&JobLabels { job }).inc();
    }

    /// Counts an event that another server sent, by what became of it.
    pub fn inbound_event(&self, outcome: &'static str) {
        self.0.inbound_events.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// Counts an ephemeral message of this kind that another server sent, by whether it was taken.
    pub fn inbound_edu(&self, kind: &'static str, is_taken: bool) {
        let taken = if is_taken { "yes" } else { "no" };
        self.0.inbound_edus.get_or_create(&EduLabels { kind, taken }).inc();
    }

    /// Counts a transaction that another server has taken, with its events and pieces of ephemeral news.
    pub fn told_server(&self, pdus: usize, edus: usize) {
        self.0.federation_transactions.inc();
        self.0.federation_pdus.inc_by(pdus as u64);
        self.0.federation_edus.inc_by(edus as u64);
    }

    /// Counts that another server did not take what it was to be told.
    pub fn server_failed(&self) {
        self.0.federation_failures.inc();
    }

    /// Counts a request to a push gateway, which the gateway took or did not take.
    pub fn pushed(&self, is_taken: bool) {
        let counter = if is_taken { &self.0.pushes_sent } else { &self.0.pushes_failed };
        counter.inc();
    }

    /// Counts a mail that the mail server took or did not take.
    pub fn mailed(&self, is_taken: bool) {
        let counter = if is_taken { &self.0.mails_sent } else { &self.0.mails_failed };
        counter.inc();
    }

    /// Sets how many pushers are on, and how many of these are behind because their gateways do not take what they are sent.
    pub fn pushers(&self, all: usize, behind: usize) {
        self.0.pushers.set(i64::try_from(all).unwrap_or(i64::MAX));
        self.0.pushers_behind.set(i64::try_from(behind).unwrap_or(i64::MAX));
    }

    /// Sets for how many other servers something waits or that do not answer, how many do not answer, and how many positions of
    /// the log are still to be told.
    pub fn servers_waiting(&self, waiting: usize, failing: usize, lag: u64) {
        self.0.federation_waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        self.0.federation_failing.set(i64::try_from(failing).unwrap_or(i64::MAX));
        self.0.federation_lag.set(i64::try_from(lag).unwrap_or(i64::MAX));
    }

    /// Counts a device that the push gateway has dealt with, by the kind of its app and by what became of it.
    pub fn gateway_pushed(&self, kind: &'static str, outcome: &'static str) {
        self.0.push_gateway_devices.get_or_create(&PushLabels { kind, outcome }).inc();
    }

    /// Counts a connection that was opened (1) or closed (-1).
    pub fn connections(&self, change: i64) {
        self.0.connections.inc_by(change);
    }

    /// Counts a WebSocket that was opened (1) or closed (-1).
    pub fn sockets(&self, change: i64) {
        self.0.sockets.inc_by(change);
    }

    /// Adds to the bytes of bodies and answers in memory; a number below zero takes away.
    pub fn bytes_in_flight(&self, change: i64) {
        self.0.bytes_in_flight.inc_by(change);
    }

    /// Counts one flush of the store: its batches, rows, bytes and time.
    pub fn flush(&self, batches: usize, rows: usize, bytes: usize, synced: bool, took: Duration) {
        self.0.flush_batches.observe(batches as f64);
        self.0.flush_rows.observe(rows as f64);
        self.0.flush_bytes.observe(bytes as f64);
        self.0.flush_seconds.observe(took.as_secs_f64());
        if synced {
            self.0.fsyncs.inc();
        }
    }

    /// Sets the number of items that wait in this queue now.
    pub fn queue_depth(&self, queue: &'static str, depth: usize) {
        let depth = i64::try_from(depth).unwrap_or(i64::MAX);
        self.0.queue_depth.get_or_create(&QueueLabels { queue }).set(depth);
    }

    /// Counts a lookup in a cache, by whether it found something.
    pub fn cache(&self, cache: &'static str, hit: bool) {
        let family = if hit { &self.0.cache_hits } else { &self.0.cache_misses };
        family.get_or_create(&CacheLabels { cache }).inc();
    }

    /// Counts a resolution of a room's states, with the events and headers that were read for it.
    pub fn resolution(&self, took: Duration, events: usize) {
        self.0.resolutions.inc();
        self.0.resolution_seconds.observe(took.as_secs_f64());
        self.0.resolution_events.observe(events as f64);
    }

    /// Writes all figures in the text format of OpenMetrics.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing into a String cannot fail; were it to, what was written is shown.
        let _ = encode(&mut text, &self.0.registry);
        text
    }
}

impl Inner {
    fn register(&mut self) {
        let Self { registry: r, .. } = self;
        r.register("http_requests", "Requests answered", self.requests.clone());
        r.register_with_unit(
            "http_request_duration",
            "How long requests took",
            Unit::Seconds,
            self.request_seconds.clone(),
        );
        r.register("http_panics", "Handlers that panicked", self.panics.clone());
        r.register("http_rate_limited", "Requests refused for their speed", self.rate_limited.clone());
        r.register(
            "to_device_dropped",
            "Messages between devices that a full inbox did not keep",
            self.to_device_dropped.clone(),
        );
        r.register(
            "jobs_given_up",
            "Jobs that failed too often to be tried again",
            self.jobs_given_up.clone(),
        );
        r.register("inbound_events", "Events that other servers sent", self.inbound_events.clone());
        r.register("inbound_edus", "Ephemeral messages that other servers sent", self.inbound_edus.clone());
        let tx = self.federation_transactions.clone();
        r.register("federation_transactions_sent", "Transactions that other servers have taken", tx);
        r.register(
            "federation_pdus_sent",
            "Events that other servers have taken",
            self.federation_pdus.clone(),
        );
        r.register(
            "federation_edus_sent",
            "Ephemeral news that other servers have taken",
            self.federation_edus.clone(),
        );
        r.register(
            "federation_failures",
            "Times that another server did not take what it was to be told",
            self.federation_failures.clone(),
        );
        r.register("pushes_sent", "Requests that push gateways took", self.pushes_sent.clone());
        r.register("pushes_failed", "Requests that push gateways did not take", self.pushes_failed.clone());
        r.register("mails_sent", "Mails that the mail server took", self.mails_sent.clone());
        r.register("mails_failed", "Mails that the mail server did not take", self.mails_failed.clone());
        r.register("pushers", "Pushers that are on", self.pushers.clone());
        r.register(
            "pushers_behind",
            "Pushers whose gateways do not take what they are sent",
            self.pushers_behind.clone(),
        );
        r.register(
            "federation_servers_waiting",
            "Servers for which something waits or that do not answer",
            self.federation_waiting.clone(),
        );
        r.register(
            "federation_servers_failing",
            "Servers that do not answer",
            self.federation_failing.clone(),
        );
        r.register(
            "federation_lag_positions",
            "Positions of the log that are still to be told to other servers",
            self.federation_lag.clone(),
        );
        r.register(
            "push_gateway_devices",
            "Devices that the push gateway has dealt with",
            self.push_gateway_devices.clone(),
        );
        r.register("http_connections", "Connections open now", self.connections.clone());
        r.register("sockets", "WebSockets open now", self.sockets.clone());
        r.register_with_unit(
            "http_in_flight",
            "Bytes of bodies and answers in memory now",
            Unit::Bytes,
            self.bytes_in_flight.clone(),
        );
        r.register("store_flush_batches", "Batches written at once", self.flush_batches.clone());
        r.register("store_flush_rows", "Rows written at once", self.flush_rows.clone());
        r.register_with_unit(
            "store_flush_size",
            "Bytes written at once",
            Unit::Bytes,
            self.flush_bytes.clone(),
        );
        r.register_with_unit(
            "store_flush_duration",
            "How long one write took, with its fsync",
            Unit::Seconds,
            self.flush_seconds.clone(),
        );
        r.register("store_fsyncs", "Writes that were synced", self.fsyncs.clone());
        r.register("queue_depth", "Items that wait", self.queue_depth.clone());
        r.register("cache_hits", "Found in a cache", self.cache_hits.clone());
        r.register("cache_misses", "Not found in a cache", self.cache_misses.clone());
        r.register("state_resolutions", "State resolutions", self.resolutions.clone());
        r.register_with_unit(
            "state_resolution_duration",
            "How long state resolutions took",
            Unit::Seconds,
            self.resolution_seconds.clone(),
        );
        r.register(
            "state_resolution_events",
            "Events and headers read for a state resolution",
            self.resolution_events.clone(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_names_and_units_of_prometheus() {
        let metrics = Metrics::new();
        metrics.request(&http::Method::GET, "/_matrix/client/versions", 200, Duration::from_millis(2));
        metrics.request(&http::Method::from_bytes(b"ODD").unwrap(), "/", 405, Duration::ZERO);
        metrics.flush(3, 20, 1000, true, Duration::from_millis(1));
        metrics.queue_depth("store", 7);
        metrics.cache("events", true);
        metrics.resolution(Duration::from_millis(1), 30);
        metrics.connections(1);
        metrics.to_device_dropped("inbox_full", 2);
        metrics.job_given_up("tell_rooms");
        metrics.inbound_event("taken");
        metrics.inbound_edu("typing", false);
        metrics.bytes_in_flight(9);
        metrics.told_server(5, 2);
        metrics.server_failed();
        metrics.servers_waiting(3, 1, 4);
        metrics.pushed(true);
        metrics.pushed(false);
        metrics.mailed(true);
        metrics.mailed(false);
        metrics.mailed(false);
        metrics.pushers(6, 2);
        metrics.gateway_pushed("fcm", "gone");
        let text = metrics.text();
        for line in [
            r#"aqueduct_http_requests_total{method="GET",route="/_matrix/client/versions",status="200"} 1"#,
            r#"aqueduct_http_requests_total{method="other",route="/",status="405"} 1"#,
            "aqueduct_store_flush_batches_sum 3.0",
            "aqueduct_store_flush_duration_seconds_count 1",
            "aqueduct_store_fsyncs_total 1",
            r#"aqueduct_queue_depth{queue="store"} 7"#,
            r#"aqueduct_cache_hits_total{cache="events"} 1"#,
            "aqueduct_state_resolutions_total 1",
            "aqueduct_state_resolution_duration_seconds_count 1",
            "aqueduct_state_resolution_events_sum 30.0",
            "aqueduct_http_connections 1",
            r#"aqueduct_to_device_dropped_total{reason="inbox_full"} 2"#,
            r#"aqueduct_jobs_given_up_total{job="tell_rooms"} 1"#,
            r#"aqueduct_inbound_events_total{outcome="taken"} 1"#,
            r#"aqueduct_inbound_edus_total{kind="typing",taken="no"} 1"#,
            "aqueduct_http_in_flight_bytes 9",
            "aqueduct_federation_transactions_sent_total 1",
            "aqueduct_federation_pdus_sent_total 5",
            "aqueduct_federation_edus_sent_total 2",
            "aqueduct_federation_failures_total 1",
            "aqueduct_federation_servers_waiting 3",
            "aqueduct_federation_servers_failing 1",
            "aqueduct_federation_lag_positions 4",
            "aqueduct_pushes_sent_total 1",
            "aqueduct_pushes_failed_total 1",
            "aqueduct_mails_sent_total 1",
            "aqueduct_mails_failed_total 2",
            "aqueduct_pushers 6",
            "aqueduct_pushers_behind 2",
            r#"aqueduct_push_gateway_devices_total{kind="fcm",outcome="gone"} 1"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
