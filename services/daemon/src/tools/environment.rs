//! The environment of what the daemon starts: harmless variables, those that the configuration names, nothing else.

use std::ffi::OsString;

use reliant_types::environment::passes;
use tokio::process::Command;

#[derive(Debug, Clone, Default)]
pub struct Environment {
    named: Vec<String>,
}

impl Environment {
    pub fn new(named: &[String]) -> Self {
        Self { named: named.to_vec() }
    }

    /// Gives a command this environment in the place of the daemon's. What the caller sets afterwards is added.
    pub fn apply(&self, command: &mut Command) {
        let passing = |name: &OsString| name.to_str().is_some_and(|name| passes(name, &self.named));
        command.env_clear().envs(std::env::vars_os().filter(|(name, _)| passing(name)));
    }
}

/// Closes this process's environment and memory to other processes of the same user. Without Landlock a command that
/// runs as root can read both all the same.
pub fn hide_own_environment() {
    let hidden = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    if let Err(error) = hidden {
        tracing::debug!(error = %reliant_telemetry::chain(&error), "other processes of this user can read the daemon's environment");
    }
}

#[cfg(test)]
mod tests {
    use reliant_types::environment::is_harmless;

    use super::*;

    #[tokio::test]
    async fn a_child_gets_harmless_and_named_variables_only() {
        // Cargo sets these for every test.
        let names = |environment: Environment| async move {
            let mut command = Command::new("env");
            environment.apply(&mut command);
            let output = command.output().await.unwrap().stdout;
            let lines = String::from_utf8(output).unwrap();
            lines.lines().filter_map(|line| Some(line.split_once('=')?.0.to_owned())).collect::<Vec<_>>()
        };
        let usual = names(Environment::default()).await;
        assert!(usual.contains(&"PATH".to_owned()) && !usual.contains(&"CARGO_PKG_NAME".to_owned()), "{usual:?}");
        assert!(usual.iter().all(|name| is_harmless(name)), "{usual:?}");
        let more = names(Environment::new(&["CARGO_PKG_NAME".into()])).await;
        assert!(more.contains(&"CARGO_PKG_NAME".to_owned()) && !more.contains(&"CARGO_PKG_VERSION".to_owned()));
    }
}
