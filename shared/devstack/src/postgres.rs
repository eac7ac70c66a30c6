//! A private Postgres: one cluster per data directory, one superuser with a random password, TCP on 127.0.0.1 only.

use reliant_types::boxed;
use std::{
    ffi::OsString,
    fs,
    os::unix::fs::{DirBuilderExt, MetadataExt, lchown},
    path::{Path, PathBuf},
    process::Stdio,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

use crate::{
    Server, StackError,
    leash::{self, Identity, NOBODY},
    lock::write_private,
    process::{self, Launch, POLL, Process},
    tools::{PostgresTools, Tools},
};

pub(crate) const USER: &str = "reliant";
pub(crate) const DATABASE: &str = "reliant";
const MAX_CONNECTIONS: u32 = 200;
/// Said by a server whose killed predecessor's backends are not all gone yet. They will be.
pub(crate) const PREDECESSOR_LINGERS: &str = "pre-existing shared memory block";

pub(crate) struct Cluster {
    pub tools: PostgresTools,
    pub dir: PathBuf,
    pub identity: Identity,
    pub durable: bool,
}

impl Cluster {
    /// Finds the programs; makes the cluster where there is none.
    #[boxed]
    pub async fn prepare(
        tools: &Tools,
        data_dir: &Path,
        durable: bool,
        password: &str,
        deadline: Instant,
    ) -> Result<Self, StackError> {
        let dir = data_dir.join("postgres");
        // Half a cluster, left by a kill during initdb, is no cluster: initdb works in a draft that is renamed.
        let version = fs::read_to_string(dir.join("PG_VERSION")).ok().and_then(|text| text.trim().parse().ok());
        let (tools, dir, identity) = {
            let (tools, dir) = (tools.clone(), dir.clone());
            tokio::task::spawn_blocking(move || {
                let found = tools.postgres(version.map(|major| (dir.as_path(), major)))?;
                let identity = leash::unprivileged().ok_or(StackError::RootRefused)?;
                Ok::<_, StackError>((found, dir, identity))
            })
            .await
            .expect("looking for programs does not panic")?
        };
        let cluster = Self { tools, dir, identity, durable };
        if version.is_none() {
            cluster.init(data_dir, password, deadline).await?;
        } else {
            cluster.own(&cluster.dir)?;
            cluster.clear_stale_pid(deadline).await?;
        }
        Ok(cluster)
    }

    async fn init(&self, data_dir: &Path, password: &str, deadline: Instant) -> Result<(), StackError> {
        let draft = data_dir.join("postgres.new");
        let log = data_dir.join("logs/initdb.log");
        let password_file = data_dir.join("postgres.password");
        if draft.exists() {
            fs::remove_dir_all(&draft).map_err(StackError::io("remove", &draft))?;
        }
        fs::DirBuilder::new().mode(0o700).create(&draft).map_err(StackError::io("make the directory", &draft))?;
        self.own(&draft)?;
        write_private(&password_file, password.as_bytes())?;
        let mut args: Vec<OsString> = vec!["--pgdata".into(), draft.clone().into()];
        args.extend(["--username", USER, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"].map(OsString::from));
        args.extend(["--pwfile".into(), password_file.clone().into()]);
        if !self.durable {
            args.push("--no-sync".into());
        }
        let done = self.run_to_end("initdb", args, log.clone(), deadline).await;
        // The password is kept in secrets.json; this copy was for initdb's eyes.
        fs::remove_file(&password_file).map_err(StackError::io("remove", &password_file))?;
        done?;
        let create = format!("CREATE DATABASE {DATABASE};\n");
        self.single_user(&draft, &create, log)?;
        fs::rename(&draft, &self.dir).map_err(StackError::io("rename", &draft))
    }

    async fn run_to_end(
        &self,
        program: &str,
        args: Vec<OsString>,
        log: PathBuf,
        deadline: Instant,
    ) -> Result<(), StackError> {
        let mut process = Process::start(Launch {
            name: Server::Postgres.name(),
            identity: self.identity,
            program: self.tools.program(program),
            env: Vec::new(),
            inherits: None,
            working_dir: "/".into(),
            args,
            log,
            append_log: false,
        })?;
        process.until_success(deadline).await
    }

    /// A database can be made before there is a server to ask.
    fn single_user(&self, dir: &Path, sql: &str, log: PathBuf) -> Result<(), StackError> {
        let program = self.tools.program("postgres");
        let mut args: Vec<OsString> = vec!["--single".into(), "-D".into(), dir.into()];
        args.extend(["-c", "fsync=off", "-c", "log_min_messages=warning", "postgres"].map(OsString::from));
        let script = log.with_extension("sql");
        write_private(&script, sql.as_bytes())?;
        let input = fs::File::open(&script).map_err(StackError::io("open", &script))?;
        let out = fs::OpenOptions::new().append(true).open(&log).map_err(StackError::io("open", &log))?;
        let err = out.try_clone().map_err(StackError::io("open", &log))?;
        let mut leashed = leash::spawn(self.identity, &program.clone().into_os_string(), &args, move |command| {
            command.stdin(input).stdout(out).stderr(err);
        })
        .map_err(|source| StackError::Spawn { program: program.display().to_string(), source })?;
        let status = leashed.child.wait().map_err(StackError::io("wait for", &program))?;
        // Best effort: it holds no secret.
        let _ = fs::remove_file(&script);
        if status.success() {
            return Ok(());
        }
        Err(StackError::Died {
            name: Server::Postgres.name(),
            status: Some(status.to_string()),
            tail: process::tail(&log),
            log,
        })
    }

    /// Postgres insists on owning its directory; an earlier start may have run it as somebody else.
    fn own(&self, dir: &Path) -> Result<(), StackError> {
        let wanted = match self.identity {
            Identity::Same => return Ok(()),
            Identity::Namespace => 0,
            Identity::Nobody => NOBODY,
        };
        let owner = fs::metadata(dir).map_err(StackError::io("look at", dir))?.uid();
        if owner == wanted {
            Ok(())
        } else {
            chown_all(dir, wanted).map_err(StackError::io("change the owner of", dir))
        }
    }

    /// A postmaster.pid whose process is dead (or a zombie, or another program by now) would stop the next start.
    /// We hold the directory's lock, so a postmaster that does live there is one that lost its parent: it is ended.
    async fn clear_stale_pid(&self, deadline: Instant) -> Result<(), StackError> {
        let path = self.dir.join("postmaster.pid");
        let Some((pid, _)) = read_pid_file(&path) else {
            // Torn or absent; Postgres refuses an empty one.
            return match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(StackError::io("remove", path)(error))
                }
                _ => Ok(()),
            };
        };
        if process::runs(pid) && is_postgres_of(pid, &self.dir) {
            let _ = kill_process(pid, Signal::QUIT);
            while process::runs(pid) {
                if Instant::now() >= deadline {
                    let _ = kill_process(pid, Signal::KILL);
                    break;
                }
                sleep(POLL).await;
            }
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(StackError::io("remove", path)(error)),
            _ => Ok(()),
        }
    }

    pub fn launch(&self, port: u16, log: PathBuf, append_log: bool) -> Launch {
        let on_off = if self.durable { "on" } else { "off" };
        let mut args: Vec<OsString> = vec!["-D".into(), self.dir.clone().into()];
        for setting in [
            "listen_addresses=127.0.0.1".to_owned(),
            format!("port={port}"),
            "unix_socket_directories=".to_owned(),
            format!("max_connections={MAX_CONNECTIONS}"),
            format!("fsync={on_off}"),
            format!("full_page_writes={on_off}"),
            // Without it an answered commit waits in Postgres' own memory, and kill -9 would lose it.
            "synchronous_commit=on".to_owned(),
            "timezone=UTC".to_owned(),
            // Queries are short; compiling them costs more than it saves.
            "jit=off".to_owned(),
            "log_checkpoints=off".to_owned(),
            "max_wal_size=512MB".to_owned(),
        ] {
            args.extend([OsString::from("-c"), setting.into()]);
        }
        Launch {
            name: Server::Postgres.name(),
            identity: self.identity,
            program: self.tools.program("postgres"),
            env: Vec::new(),
            inherits: None,
            working_dir: "/".into(),
            args,
            log,
            append_log,
        }
    }

    /// The postmaster writes its state into its own pid file.
    pub fn is_ready(&self, pid: Pid) -> bool {
        read_pid_file(&self.dir.join("postmaster.pid")).is_some_and(|(of, status)| of == pid && status == "ready")
    }

    /// Runs SQL with psql and gives its unadorned output.
    #[boxed]
    pub async fn sql(&self, port: u16, password: &str, database: &str, sql: &str) -> Result<String, StackError> {
        let psql = self.tools.program("psql");
        let psql = if psql.is_file() { psql } else { "psql".into() };
        let output = tokio::process::Command::new(&psql)
            .args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", USER, "-d", database])
            .args(["-p", &port.to_string(), "-c", sql])
            .env("PGPASSWORD", password)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|source| StackError::Spawn { program: psql.display().to_string(), source })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned());
        }
        Err(StackError::Sql { message: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
    }
}

/// Line 1: pid; line 8: status.
fn read_pid_file(path: &Path) -> Option<(Pid, String)> {
    let text = fs::read_to_string(path).ok()?;
    let mut lines = text.lines();
    let pid = Pid::from_raw(lines.next()?.trim().parse().ok()?)?;
    Some((pid, lines.nth(6).unwrap_or_default().trim().to_owned()))
}

fn is_postgres_of(pid: Pid, dir: &Path) -> bool {
    let Ok(line) = fs::read(format!("/proc/{}/cmdline", pid.as_raw_pid())) else { return false };
    let args: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    args.first().is_some_and(|program| program.ends_with(b"postgres"))
        && args.contains(&dir.as_os_str().as_encoded_bytes())
}

fn chown_all(path: &Path, owner: u32) -> std::io::Result<()> {
    lchown(path, Some(owner), Some(owner))?;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            chown_all(&entry?.path(), owner)?;
        }
    }
    Ok(())
}

/// Names go into SQL and URLs unquoted.
pub(crate) fn check_name(name: &str) -> Result<(), StackError> {
    let fits = !name.is_empty()
        && name.len() <= 63
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    if fits { Ok(()) } else { Err(StackError::DatabaseName { name: name.chars().take(80).collect() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_need_quoting_are_refused() {
        assert!(check_name("reliant_test_1").is_ok());
        for bad in ["", "a-b", "A", "x\"; DROP", &"a".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_pid_file_is_read() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("postmaster.pid");
        fs::write(&path, "123\n/data\n1700000000\n5432\n\n127.0.0.1\n  1 2\nready   \n").expect("write");
        assert_eq!(read_pid_file(&path), Some((Pid::from_raw(123).expect("pid"), "ready".to_owned())));
        fs::write(&path, "").expect("write");
        assert_eq!(read_pid_file(&path), None);
    }
}
