//! The log: standard error, text or JSON. Panics are told at any level.

use std::{
    panic,
    sync::atomic::{AtomicU64, Ordering},
};

use tracing_subscriber::{EnvFilter, fmt, fmt::format::FmtSpan};

use crate::{
    config::{Log, LogFormat},
    error::{Error, Result},
};

/// Panics since the start.
static PANICS: AtomicU64 = AtomicU64::new(0);

/// Begins logging. Once a process.
pub fn begin(log: &Log) -> Result<()> {
    // A bare level is about this server; libraries speak up from warnings on.
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

/// A panic is a fault of ours that no level may hide, so it does not go through the filter.
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
