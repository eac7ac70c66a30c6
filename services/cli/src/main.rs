//! `reliant`: parse, then hand over to the command.

mod args;
mod chat;
mod config;
mod daemon;
mod demo;
mod doctor;
mod front;
mod input;
mod question;
mod render;
mod server;
mod sim;
mod token;
mod trace;
mod up;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;

use crate::args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        eprintln!("reliant: another TLS provider was installed first");
        return ExitCode::FAILURE;
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if matches!(cli.command, Command::Daemon(_)) {
        // It routes frames; tools are processes or run on blocking threads. More workers only wake each other.
        runtime.worker_threads(1);
    }
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("reliant: no threads could be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(Box::pin(run(cli))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("reliant: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<()> {
    let global = cli.global;
    match cli.command {
        Command::Up(args) => up::run(global, args).await,
        Command::Chat(args) => chat::run(args).await,
        Command::Server(command) => server::run(global, command).await,
        Command::Daemon(command) => daemon::run(global, command).await,
        Command::Token(command) => token::run(command).await,
        Command::Doctor(front) => doctor::run(global, front).await,
        Command::ModelSim(args) => sim::run(global, args).await,
        Command::Demo(args) => demo::run(args).await,
        Command::Trace(args) => trace::show(args).await,
        Command::Observe(args) => trace::receive(args).await,
        Command::Migrate => {
            let config = config::Config::load(&global)?;
            let store = server::connect_store(&config).await?;
            store.migrate().await.context("the schema could not be brought up to date")?;
            up::say("the schema is up to date");
            Ok(())
        }
        Command::Config => {
            let config = config::Config::load(&global)?;
            up::say(reliant_runtime::config::redacted(&config).trim_end());
            Ok(())
        }
    }
}
