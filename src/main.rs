//! The command line: serve (the default), and the operator's commands.

use std::{path::PathBuf, process::ExitCode};

use aqueduct::{
    config::{Config, Problem},
    server,
};
use clap::{Parser, Subcommand};

/// Memory goes back to the system after a burst, sooner than with the system's allocator.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Exit code of what was refused; clap's own for wrong usage is 2.
const REFUSED: u8 = 1;

/// A Matrix homeserver.
#[derive(Parser)]
#[command(name = "aqueduct", version, about)]
struct Cli {
    /// The settings.
    #[arg(long, global = true, value_name = "FILE", default_value = "conduit.toml")]
    config: PathBuf,
    /// Answer in JSON, for programs.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the server (the default).
    Serve,
    /// Settings.
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Check the settings, and change nothing.
    Check,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            if cli.json {
                println!("{}", serde_json::json!({ "ok": false, "error": why }));
            } else {
                eprintln!("aqueduct: {why}");
            }
            ExitCode::from(REFUSED)
        }
    }
}

fn run(cli: &Cli) -> Result<(), String> {
    let config = Config::load(&cli.config, variables()).map_err(|problem: Problem| problem.to_string())?;
    match &cli.command {
        None | Some(Command::Serve) => {
            server::logging::begin(&config.log).map_err(|error| error.to_string())?;
            runtime()?.block_on(server::serve(config)).map_err(|error| error.to_string())
        }
        Some(Command::Config(ConfigCommand::Check)) => {
            answer(cli, &format!("{}: all settings are good", cli.config.display()));
            Ok(())
        }
    }
}

/// Says what was done.
fn answer(cli: &Cli, text: &str) {
    if cli.json {
        println!("{}", serde_json::json!({ "ok": true, "message": text }));
    } else {
        println!("{text}");
    }
}

/// The environment, as far as it is text.
fn variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("aqueduct")
        .build()
        .map_err(|error| format!("the runtime cannot start: {error}"))
}
