//! The log goes to standard error, as text or JSON. Panics are logged at any level.

use std::{
    panic,
    sync::atomic::{AtomicU64, Ordering},
};

use tracing_subscriber::{EnvFilter, fmt, fmt::format::FmtSpan};

use crate::{
    config::{Log, LogFormat},
    error::{Error, Result},
};

/// The panics since the start of the process, which number their log lines.
static PANICS: AtomicU64 = AtomicU64::new(0);

/// Begins logging. May be called once in a process.
pub fn begin(log: &Log) -> Result<()> {
    // A bare level is meant for this server; libraries are logged from warnings on.
    let directives = match log.level.as_str() {
        bare if !bare.contains(['=', ',']) && bare != "off" => format!("warn,aqueduct={bare}"),
        given => given.to_owned(),
    };
    let filter = EnvFilter::try_new(&directives)
        .map_err(|error| Error::broken(format!("log.level {directives:?} is not understood: {error}")))?;
    let builder = fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_span_events(FmtSpan::NONE)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let begun = match log.format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    begun.map_err(|error| Error::broken(format!("logging cannot begin: {error}")))?;
    tell_panics(log.format);
    Ok(())
}

/// Logs panics around the filter, because a panic is a fault of ours that no level may hide.
fn tell_panics(format: LogFormat) {
    panic::set_hook(Box::new(move |info| {
        let number = PANICS.fetch_add(1, Ordering::Relaxed) + 1;
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let payload = info.payload();
        let why = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("for an unknown reason");
        let message = format!("thread {thread:?} panicked at {place}: {why}");
        match format {
            LogFormat::Text => eprintln!("ERROR {message} (panic {number} since the start)"),
            LogFormat::Json => {
                eprintln!(
                    "{}",
                    serde_json::json!({ "level": "ERROR", "message": message, "panics": number })
                );
            }
        }
    }));
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a process of its own has no Env")]
mod tests {
    use std::process::Command;

    use super::*;

    /// The level and the format of the log, set in the process that panics.
    const PANIC_AT: &str = "AQUEDUCT_TEST_PANIC_AT";

    /// Runs a process that logs at this level and in which a thread panics, and returns its log.
    fn log_of_a_panic(level: &str, format: &str) -> String {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "server::logging::tests::panics_where_it_is_asked_to", "--nocapture"])
            .env(PANIC_AT, format!("{level} {format}"))
            .output()
            .unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "the process ended with its thread: {log}");
        log
    }

    #[test]
    fn panics_where_it_is_asked_to() {
        let Ok(asked) = std::env::var(PANIC_AT) else { return };
        let (level, format) = asked.split_once(' ').unwrap();
        let format = if format == "json" { LogFormat::Json } else { LogFormat::Text };
        begin(&Log { level: level.to_owned(), format, ..Log::default() }).unwrap();
        tracing::error!("an error that level off hides");
        std::thread::spawn(|| panic!("on purpose")).join().unwrap_err();
    }

    #[test]
    fn a_panic_is_logged_at_every_level() {
        for (level, format) in
            [("off", "text"), ("off", "json"), ("error", "text"), ("info", "text"), ("aqueduct=off", "json")]
        {
            let log = log_of_a_panic(level, format);
            let line = log.lines().find(|line| line.contains("panicked")).unwrap_or_default();
            assert!(line.contains("on purpose") && line.contains("logging.rs"), "{level} {format}: {log}");
            let is_json = serde_json::from_str::<serde_json::Value>(line).is_ok();
            assert_eq!(is_json, format == "json", "{line}");
            assert_eq!(log.contains("level off hides"), matches!(level, "error" | "info"), "{level}: {log}");
        }
    }
}
