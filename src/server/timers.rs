//! Fires durable timers that are due, a bounded number a second. `flows/follow_up.rs` knows what each timer is for.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    error::Result,
    flows::{
        App, follow_up, jobs, media,
        remote::{cut_off, late},
        room::expire,
    },
    schema::jobs::Job,
    server::Lead,
    store::timer::FIRED_A_SECOND_MAX,
};

/// The worker looks no more often than this, so that a bounded number of timers fires a second.
const LOOKS_AT_MOST_EVERY: Duration = Duration::from_secs(1);
/// The worker looks at least this often, because the wall clock may have jumped.
const LOOKS_AT_LEAST_EVERY: Duration = Duration::from_secs(60);

/// Starts the worker on the node that leads, so that a timer fires once.
pub(crate) fn start(app: &App, _lead: &Lead) {
    let (tending, began_ms) = (app.clone(), app.env.now_ms());
    app.env.spawn(async move {
        if let Err(error) = media::tend::clear(&tending, began_ms).await {
            tracing::error!(%error, "what uploads have left could not be thrown away; the next start tries again");
        }
    });
    app.env.spawn(run(app.clone()));
}

/// Fires timers, and sleeps until the next one is due or one is set that may be due sooner, so that nothing ticks in
/// between.
async fn run(app: App) {
    let trims = app.clone();
    if let Err(error) = app.env.blocking(move || follow_up::begin_trimming(&trims)).await {
        tracing::error!(%error, "the timer that trims the log could not be set; it is set at the next start");
    }
    // They may have been put off for long by a failure that the new start mends.
    if let Err(error) = jobs::begin_of_kind(&app, Job::COMPLETE_STATE) {
        tracing::error!(%error, "rooms of which a part of the state is known could not be looked up; their timers are due later");
    }
    if let Err(error) = late::look_up(&app) {
        tracing::error!(%error, "rooms that were left while they were joined could not be looked up; their timers are due later");
    }
    if let Err(error) = cut_off::begin_all(&app) {
        tracing::error!(%error, "joins that the last run of the server has cut off could not be looked up; their timers are due later");
    }
    if let Err(error) = expire::review(&app).await {
        tracing::error!(%error, "rooms could not be gone through for messages whose lifetime is over; the next start tries again");
    }
    loop {
        let until = app.env.instant() + LOOKS_AT_MOST_EVERY;
        let next_ms = begin_due(&app, until).await.unwrap_or_else(|error| {
            tracing::error!(%error, "due timers could not be looked up; the next look tries again");
            None
        });
        app.env.sleep(until.saturating_duration_since(app.env.instant())).await;
        let left = next_ms.map_or(LOOKS_AT_LEAST_EVERY, |next_ms| {
            Duration::from_millis(next_ms.saturating_sub(app.env.now_ms())).min(LOOKS_AT_LEAST_EVERY)
        });
        tokio::select! {
            biased;
            () = app.store.timer_set() => {}
            () = app.env.sleep(left) => {}
        }
    }
}

/// Begins the jobs that are due. Those for which there is no place begin as others end, until the time of the next look; returns when
/// the next timer is due.
async fn begin_due(app: &App, until: Instant) -> Result<Option<u64>> {
    let (looks, now_ms) = (app.clone(), app.env.now_ms());
    let mut due = app.env.blocking(move || jobs::list_due(&looks, now_ms, FIRED_A_SECOND_MAX)).await?;
    loop {
        let begins = app.clone();
        due = app.env.blocking(move || jobs::begin_due(&begins, due)).await?;
        let left = until.saturating_duration_since(app.env.instant());
        if due.is_empty() || left.is_zero() {
            return Ok(due.next_ms);
        }
        tokio::select! {
            biased;
            () = app.running.ended() => {}
            () = app.env.sleep(left) => return Ok(due.next_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        config::Config,
        env::Env,
        ids::UserNum,
        schema::jobs::Job,
        server::{Lead, Server},
        store::{
            self, Direction, Durability, Engine, Guard, LogEntry, Store, cursor,
            engine::Memory,
            timer::{self, Timer, TimerRow},
        },
    };

    fn server() -> (Server, Store, Env) {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let env = Env::simulated(1, 0);
        let server =
            Server::start(Config::default(), env.clone(), store.clone(), Some(Lead::of_only_node())).unwrap();
        (server, store, env)
    }

    fn set(store: &Store, timer: &Timer) {
        let mut batch = store.batch(&Guard::own_tables());
        timer::set(&mut batch, timer);
        drop(store.enqueue(batch).unwrap());
    }

    /// Lists the timers of a kind: when each is due, and how often it has failed.
    fn waiting(store: &Store, kind: u8) -> Vec<(u64, u32)> {
        let all = timer::list_due(&store.view(), u64::MAX, 1_000, |of| of == kind).unwrap();
        all.into_iter().map(|timer| (timer.due_ms, timer.row.tries)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_log_is_trimmed_by_a_timer_that_sets_itself_again() {
        let (_server, store, env) = server();
        env.sleep(Duration::from_secs(10)).await;
        let mut batch = store.batch(&Guard::own_tables());
        let user = UserNum(1);
        batch.position(&LogEntry::Account { user });
        let base = store.enqueue(batch).unwrap().base;
        let mut note = store.note(&Guard::own_tables());
        cursor::advance(&mut note, "reader", base);
        drop(store.enqueue_note(note).unwrap());
        let entry = || store::tables::LOG.get(&store.view(), base).unwrap();
        env.sleep(Duration::from_secs(10)).await;
        // The last look was before there was anything to trim.
        assert!(entry().is_some());
        env.sleep(Duration::from_secs(60 * 60)).await;
        assert_eq!(entry(), None);
        let left = store::tables::LOG.prefix::<()>(&store.view(), (), Direction::Up).unwrap().count();
        assert_eq!(left, 0);
        let next = waiting(&store, Job::TrimLog.kind());
        assert!(next.len() == 1 && next[0].0 > env.now_ms(), "{next:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_that_is_set_while_the_worker_sleeps_fires_when_it_is_due() {
        let (_server, store, env) = server();
        env.sleep(Duration::from_millis(20_500)).await;
        let due_ms = env.now_ms() + 5_000;
        let job = Job::TellRooms { user: UserNum(7) };
        set(&store, &job.timer(due_ms));
        env.sleep(Duration::from_millis(4_500)).await;
        assert_eq!(waiting(&store, job.kind()), [(due_ms, 0)]);
        env.sleep(Duration::from_millis(2_000)).await;
        // The job fails, because there is no such user.
        assert_eq!(waiting(&store, job.kind())[0].1, 1, "it has failed, and was put off");
    }

    #[tokio::test(start_paused = true)]
    async fn jobs_that_fail_are_put_off_longer_each_time_and_given_up_in_the_end() {
        let (server, store, env) = server();
        env.sleep(Duration::from_millis(10)).await;
        let job = Job::TellRooms { user: UserNum(7) };
        // There are more broken timers than a second fires, all due before the only one that can be done.
        let torn = |number: u64| Timer {
            due_ms: 1,
            kind: job.kind(),
            key: vec![u8::try_from(number % 7).unwrap(), u8::try_from(number / 7).unwrap()],
            row: TimerRow { tries: 0, content: Bytes::new() },
        };
        let mut batch = store.batch(&Guard::own_tables());
        let torn_count = 2 * timer::FIRED_A_SECOND_MAX as u64;
        (0..torn_count).for_each(|number| timer::set(&mut batch, &torn(number)));
        drop(store.enqueue(batch).unwrap());
        set(&store, &Timer { due_ms: 2, ..Job::TrimLog.timer(2) });
        env.sleep(Duration::from_secs(60)).await;
        assert!(waiting(&store, Job::TrimLog.kind()).iter().all(|(due_ms, _)| *due_ms > 2));
        let failing = waiting(&store, job.kind());
        assert_eq!(failing.len() as u64, torn_count);
        assert!(failing.iter().all(|(_, tries)| (1..=4).contains(tries)), "{failing:?}");
        env.sleep(Duration::from_secs(24 * 60 * 60)).await;
        let failing = waiting(&store, job.kind());
        let tries: Vec<_> = failing.iter().map(|(_, tries)| *tries).collect();
        assert!(tries.iter().all(|tries| (10..=20).contains(tries)), "{tries:?}");
        // A job that fails for more than a week is given up, and said; a job that recurs goes on.
        env.sleep(Duration::from_secs(14 * 24 * 60 * 60)).await;
        assert_eq!(waiting(&store, job.kind()), []);
        let text = server.app().metrics.text();
        let given_up = format!("aqueduct_jobs_given_up_total{{job=\"unreadable\"}} {torn_count}");
        assert!(text.contains(&given_up), "{text}");
        assert!(!waiting(&store, Job::TrimLog.kind()).is_empty());
    }
}
