//! Fires durable timers when they are due, a bounded number a second.

use std::time::Duration;

use crate::{
    error::Result,
    flows::{
        App,
        account::{carry_over, follow_up},
    },
    rooms::redact,
    store::{
        NotAccepted, Store, tail,
        timer::{self, FIRED_A_SECOND_MAX, Timer, TimerKind},
    },
};

/// It looks no more often than this, so that a bounded number fires a second.
const LOOKS_AT_MOST_EVERY: Duration = Duration::from_secs(1);
/// It looks at least this often: the wall clock may have jumped.
const LOOKS_AT_LEAST_EVERY: Duration = Duration::from_secs(60);
const HOUR_MS: u64 = 60 * 60 * 1000;

/// Starts the worker.
pub(crate) fn start(app: &App) {
    app.env.spawn(run(app.clone()));
}

/// Sleeps until the next timer is due, or one is set that may be due sooner: nothing ticks while nothing is due.
async fn run(app: App) {
    loop {
        let (fires, now_ms) = (app.clone(), app.env.now_ms());
        let fire = move || {
            fire_due(&fires.store, now_ms, |promised| match promised.kind {
                TimerKind::CarryOver => {
                    carry_over::resume(&fires, promised);
                    Ok(())
                }
                _ => follow_up::resume(&fires, promised),
            })
        };
        let next_ms = app.env.blocking(fire).await.unwrap_or_else(|error| {
            tracing::error!(%error, "timers that are due could not be fired; they wait");
            None
        });
        app.env.sleep(LOOKS_AT_MOST_EVERY).await;
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

/// Fires what is due; answers when the next timer is. A plain function: a clock that stands still cannot keep it busy.
/// `keep` keeps promises of flows.
fn fire_due(store: &Store, now_ms: u64, keep: impl Fn(&Timer) -> Result<()>) -> Result<Option<u64>> {
    let view = store.view();
    if !timer::is_set(&view, TimerKind::TrimLog)? {
        let mut batch = store.batch();
        timer::set(&mut batch, &trim_log_at(now_ms));
        drop(store.enqueue(batch)?);
    }
    for timer in timer::list_due(&view, now_ms, FIRED_A_SECOND_MAX)? {
        match timer.kind {
            TimerKind::TrimLog => trim_log(store, &timer, now_ms)?,
            TimerKind::TellRooms | TimerKind::CarryOver => keep(&timer)?,
            TimerKind::ForgetOriginal => forget_original(store, &timer)?,
        }
    }
    Ok(timer::find_next_due_ms(&view)?)
}

fn trim_log_at(due_ms: u64) -> Timer {
    Timer { due_ms, kind: TimerKind::TrimLog, key: Vec::new(), content: bytes::Bytes::new() }
}

fn trim_log(store: &Store, timer: &Timer, now_ms: u64) -> Result<()> {
    // More to trim: again at the next look. Nothing: in an hour.
    let (mut batch, again_ms) = match tail::trim(store, now_ms)? {
        Some(batch) => (batch, now_ms + 1),
        None => (store.batch(), now_ms + HOUR_MS),
    };
    timer::fire(&mut batch, timer);
    timer::set(&mut batch, &trim_log_at(again_ms));
    match store.enqueue(batch) {
        // Somebody else has fired it.
        Ok(_) | Err(NotAccepted::Conflict(_)) => Ok(()),
        Err(other) => Err(other.into()),
    }
}

fn forget_original(store: &Store, timer: &Timer) -> Result<()> {
    let mut batch = store.batch();
    timer::fire(&mut batch, timer);
    redact::forget_original(&mut batch, timer)?;
    match store.enqueue(batch) {
        // Somebody else has fired it.
        Ok(_) | Err(NotAccepted::Conflict(_)) => Ok(()),
        Err(other) => Err(other.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::Config,
        env::Env,
        ids::UserNum,
        server::Server,
        store::{Direction, Durability, Engine, LogEntry, cursor, engine::Memory, tables},
    };

    #[test]
    fn the_log_is_trimmed_by_a_timer_that_sets_itself_again() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let mut batch = store.batch();
        batch.position(&LogEntry::Account { user: UserNum(1) });
        let enqueued = store.enqueue(batch).unwrap();
        let mut batch = store.batch();
        cursor::advance(&mut batch, "reader", enqueued.base);
        drop(store.enqueue(batch).unwrap());
        let entries = || tables::LOG.prefix::<()>(&store.view(), (), Direction::Up).unwrap().count();
        store.flush().unwrap();
        for now_ms in [1, 2, 3, 4] {
            fire_due(&store, now_ms, |_| Ok(())).unwrap();
            store.flush().unwrap();
        }
        assert_eq!(entries(), 0);
        let next = timer::find_next_due_ms(&*store.snapshot()).unwrap().unwrap();
        assert!(next > HOUR_MS, "{next}");
        fire_due(&store, HOUR_MS, |_| Ok(())).unwrap();
        assert_eq!(timer::find_next_due_ms(&store.view()).unwrap(), Some(next));
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_that_is_set_while_the_worker_sleeps_fires_when_it_is_due() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let env = Env::simulated(1, 0);
        let server = Server::start(Config::default(), env.clone(), store).unwrap();
        let store = server.app().store.clone();
        env.sleep(Duration::from_millis(20_500)).await;
        let promised = Timer {
            due_ms: env.now_ms() + 5_000,
            kind: TimerKind::TellRooms,
            key: 7_u64.to_be_bytes().to_vec(),
            content: bytes::Bytes::new(),
        };
        let mut batch = store.batch();
        timer::set(&mut batch, &promised);
        drop(store.enqueue(batch).unwrap());
        let next = || timer::find_next_due_ms(&*store.snapshot()).unwrap().unwrap();
        env.sleep(Duration::from_millis(4_500)).await;
        assert_eq!(next(), promised.due_ms);
        env.sleep(Duration::from_millis(2_000)).await;
        assert!(next() > promised.due_ms, "it has fired and set itself again");
    }
}
