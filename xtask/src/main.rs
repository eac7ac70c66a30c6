//! The logic behind `make`: checks that cargo does not make, and what needs a private server around it.

#![expect(clippy::print_stdout, reason = "this program talks to the person who runs it")]

mod check;
mod compare;
mod hostile;
mod imports;
mod log_fields;
mod sqlx;
mod test;
mod unused;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(about = "The logic behind make; see `make help`")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Import directions, unused dependencies, paths named in documents, lock files, leftovers.
    Check,
    /// Write .sqlx anew from the queries and the migrations, over a private Postgres.
    Sqlx {
        /// Change nothing; fail where .sqlx is not what the queries say.
        #[arg(long)]
        check: bool,
    },
    /// Measure two commits by turns and tell how they differ. Exit code 1: the second is worse; 2: it cannot be told.
    Compare(compare::Args),
    /// Run the tests of the security review's findings and say which are closed. Exit code 1: one is open.
    Hostile,
    /// Run the tests of the workspace with a private Postgres for those that need one.
    Test {
        /// Passed on to the tests: a name, or flags after `--`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse().command).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> Result<ExitCode> {
    let root = workspace_root()?;
    match command {
        Command::Check => check::run(&root)?,
        Command::Sqlx { check } => sqlx::run(&root, check).await?,
        Command::Test { args } => test::run(&root, &args).await?,
        Command::Hostile => {
            return Ok(if hostile::run(&root).await? { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Compare(args) => {
            return Ok(match compare::run(&root, args).await? {
                compare::Conclusion::NoneWorse => ExitCode::SUCCESS,
                compare::Conclusion::Worse => ExitCode::FAILURE,
                compare::Conclusion::Unclear => ExitCode::from(2),
            });
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the command was given, not where xtask was built: a binary may outlive a moved checkout.
fn workspace_root() -> Result<PathBuf> {
    let here = std::env::current_dir().context("the current directory is gone")?;
    here.ancestors()
        .find(|dir| dir.join("Cargo.lock").is_file() && dir.join("xtask").is_dir())
        .map(Path::to_owned)
        .context("run this inside the checkout")
}

/// The cargo that runs us, else the one on PATH.
fn cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
