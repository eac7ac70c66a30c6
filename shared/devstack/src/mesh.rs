//! Role processes of a local mesh: `reliant server …`, `reliant daemon start`, `reliant model-sim`, started from one
//! binary, bound to this process's life, and steerable one by one. `reliant up` and the tests share this.
//!
//! A role writes its bound addresses to a file once it listens; it is ready when its admin listener says so.

use reliant_types::boxed;
use std::{
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, timeout},
};

use crate::{
    StackError,
    leash::Identity,
    process::{Launch, Process},
};

/// What a role tells about its listeners.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Addresses {
    /// Where clients connect; none for a role without a front listener.
    pub listen: Option<SocketAddr>,
    /// `/health`, `/ready`, `/metrics`; none for a role without them.
    pub admin: Option<SocketAddr>,
}

impl Addresses {
    /// Writes the file a mesh waits for, whole or not at all.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let draft = path.with_extension("draft");
        std::fs::write(&draft, serde_json::to_vec(self).map_err(std::io::Error::other)?)?;
        std::fs::rename(draft, path)
    }
}

/// One process of the binary.
#[derive(Debug, Clone)]
pub struct RoleSpec {
    /// Names logs and files, for example `api-0`.
    pub name: String,
    /// For errors: `api`, `worker`, …
    pub role: &'static str,
    pub binary: PathBuf,
    /// Without `--address-file`, which is added where `addresses` is set.
    pub args: Vec<OsString>,
    pub env: Vec<(OsString, OsString)>,
    /// Variables of this process that the role gets; `None`: all.
    pub inherits: Option<Vec<String>>,
    /// The role tells its addresses, and has an admin listener.
    pub addresses: bool,
    /// Holds the log and the address file.
    pub dir: PathBuf,
    /// A user's daemon works where its person does.
    pub working_dir: PathBuf,
}

/// Ends with this value; [`RoleProcess::stop`] lets it drain first.
#[derive(Debug)]
pub struct RoleProcess {
    spec: RoleSpec,
    process: Process,
    addresses: Addresses,
}

impl RoleProcess {
    /// Starts it and waits until it is ready.
    #[boxed]
    pub async fn start(spec: RoleSpec, patience: Duration) -> Result<Self, StackError> {
        Self::launch(spec, patience, false).await
    }

    async fn launch(spec: RoleSpec, patience: Duration, append_log: bool) -> Result<Self, StackError> {
        let deadline = Instant::now() + patience;
        let address_file = spec.dir.join(format!("{}.addresses.json", spec.name));
        match std::fs::remove_file(&address_file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(StackError::io("remove", &address_file)(error));
            }
            _ => {}
        }
        let mut args = spec.args.clone();
        if spec.addresses {
            args.push("--address-file".into());
            args.push(address_file.clone().into());
        }
        let process = Process::start(Launch {
            name: spec.role,
            identity: Identity::Same,
            program: spec.binary.clone(),
            args,
            env: spec.env.clone(),
            inherits: spec.inherits.clone(),
            working_dir: spec.working_dir.clone(),
            log: spec.dir.join("logs").join(format!("{}.log", spec.name)),
            append_log,
        })?;
        let mut role = Self { spec, process, addresses: Addresses::default() };
        if role.spec.addresses {
            role.process.until_ready(deadline, || async { address_file.exists() }).await?;
            let bytes = std::fs::read(&address_file).map_err(StackError::io("read", &address_file))?;
            role.addresses = serde_json::from_slice(&bytes)
                .map_err(|error| StackError::io("read", &address_file)(std::io::Error::other(error)))?;
            if let Some(admin) = role.addresses.admin {
                role.process.until_ready(deadline, || is_ready(admin)).await?;
            }
        }
        Ok(role)
    }

    /// Starts the same process again, on the same addresses, after it ended.
    #[boxed]
    pub async fn restart(&mut self, patience: Duration) -> Result<(), StackError> {
        self.process.kill_now();
        let mut spec = self.spec.clone();
        // The addresses stay what others know: the last value of a repeated flag wins.
        if let Some(listen) = self.addresses.listen {
            let key = match spec.role {
                "model-sim" => format!("--listen={listen}"),
                role => format!("--set={role}.listen={listen}"),
            };
            spec.args.push(key.into());
        }
        if let Some(admin) = self.addresses.admin {
            spec.args.push(format!("--set={}.admin={admin}", spec.role).into());
        }
        let own = self.spec.clone();
        // Where this fails, all stays as it was and may be tried again.
        *self = Self::launch(spec, patience, true).await?;
        self.spec = own;
        Ok(())
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    pub fn pid(&self) -> u32 {
        self.process.pid().as_raw_pid() as u32
    }

    pub fn log(&self) -> PathBuf {
        self.spec.dir.join("logs").join(format!("{}.log", self.spec.name))
    }

    pub fn is_alive(&mut self) -> bool {
        self.process.is_alive()
    }

    /// How it ended, where it has: an error is any other end than with the code 0.
    pub fn end(&mut self) -> Option<Result<(), StackError>> {
        self.process.end()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process.kill_now();
    }

    /// SIGTERM, and nothing more: the caller watches it drain.
    pub fn terminate(&self) {
        let _ = kill_process(self.process.pid(), Signal::TERM);
    }

    pub fn pause(&self) {
        self.process.pause();
    }

    pub fn resume(&self) {
        self.process.resume();
    }

    /// Whether the kernel refuses every write of this process to a file, as a full disk would. What it started before is
    /// not concerned; what it starts meanwhile is.
    #[cfg(target_os = "linux")]
    pub fn refuse_writes(&self, refused: bool) -> std::io::Result<()> {
        use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
        let own = getrlimit(Resource::Fsize);
        let limit = if refused { Rlimit { current: Some(0), ..own } } else { own };
        prlimit(Some(self.process.pid()), Resource::Fsize, limit)?;
        Ok(())
    }

    #[cfg(not(target_os = "linux"))]
    pub fn refuse_writes(&self, _refused: bool) -> std::io::Result<()> {
        Err(std::io::Error::other("another process' limits can be set on Linux alone"))
    }

    /// Lets it drain, at most so long.
    #[boxed]
    pub async fn stop(&mut self, patience: Duration) {
        self.process.stop(Signal::TERM, patience).await;
    }
}

/// Whether `/ready` answers 200.
#[boxed]
pub async fn is_ready(admin: SocketAddr) -> bool {
    timeout(Duration::from_secs(3), http_get(admin, "/ready"))
        .await
        .is_ok_and(|answer| answer.is_ok_and(|(status, _)| status == 200))
}

/// A plain HTTP/1.1 GET of an admin page: status and body.
#[boxed]
pub async fn http_get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    const ANSWER_MAX_BYTES: u64 = 4 * 1024 * 1024;
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX_BYTES).read_to_end(&mut answer).await?;
    let text = String::from_utf8_lossy(&answer);
    let status = text.split_whitespace().nth(1).and_then(|word| word.parse().ok());
    let (_, body) = text.split_once("\r\n\r\n").unwrap_or_default();
    match status {
        Some(status) => Ok((status, body.to_owned())),
        None => Err(std::io::Error::other("the answer is not HTTP")),
    }
}

/// Resident memory of a process, in KiB; 0 once it is gone.
pub fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}
