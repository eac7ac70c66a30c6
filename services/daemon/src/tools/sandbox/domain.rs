//! One Landlock domain: its rules, and the thread that is bound by them and starts commands.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, fstat, openat},
    thread::{CapabilitySet, remove_capability_from_bounding_set},
};
use tokio::{
    process::{Child, Command},
    sync::{mpsc, oneshot},
};

use super::{super::tree, Network};

/// What is asked for; an older kernel gives as much of it as it has.
const ABI_WANTED: ABI = ABI::V9;
/// Commands that wait for their start.
const STARTS_MAX: usize = 64;
/// Directories with sockets of the system that name lookups need.
const SOCKETS: &[&str] = &["/run/systemd/resolve", "/run/nscd"];
/// What a command that runs as root could otherwise use to look into processes outside, whatever Landlock says.
const CAPABILITIES_DROPPED: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::PERFMON)
    .union(CapabilitySet::BPF)
    .union(CapabilitySet::SYS_MODULE)
    .union(CapabilitySet::SYS_RAWIO)
    .union(CapabilitySet::SYS_BOOT)
    .union(CapabilitySet::CHECKPOINT_RESTORE);

/// Device, inode, rights.
type Identity = (u64, u64, BitFlags<AccessFs>);

#[derive(Debug, Default)]
pub struct Rules(Vec<(OwnedFd, Identity)>);

impl Rules {
    /// A path that is not there needs no rule.
    pub fn read(&mut self, paths: impl IntoIterator<Item = impl AsRef<Path>>) {
        for path in paths {
            let sockets = SOCKETS.iter().any(|dir| Path::new(dir) == path.as_ref());
            let more = if sockets { AccessFs::ResolveUnix.into() } else { BitFlags::EMPTY };
            self.add(open(path.as_ref()), AccessFs::from_read(ABI_WANTED) | more);
        }
    }

    pub fn write(&mut self, paths: impl IntoIterator<Item = impl AsRef<Path>>) {
        for path in paths {
            self.write_fd(open(path.as_ref()));
        }
    }

    /// Sockets are left out: those that a command may talk to are its own, which need no rule.
    pub fn write_fd(&mut self, fd: Option<OwnedFd>) {
        self.add(fd, AccessFs::from_all(ABI_WANTED) & !BitFlags::from(AccessFs::ResolveUnix));
    }

    fn add(&mut self, fd: Option<OwnedFd>, access: BitFlags<AccessFs>) {
        let Some((fd, stat)) = fd.and_then(|fd| Some((fstat(&fd).ok()?, fd))).map(|(stat, fd)| (fd, stat)) else {
            return;
        };
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let access = if is_dir { access } else { access & AccessFs::from_file(ABI_WANTED) };
        self.0.push((fd, (stat.st_dev, stat.st_ino, access)));
    }

    fn identities(&self) -> Vec<Identity> {
        self.0.iter().map(|(_, identity)| *identity).collect()
    }
}

fn open(path: &Path) -> Option<OwnedFd> {
    openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()
}

struct Start {
    command: Command,
    started: oneshot::Sender<io::Result<Child>>,
}

#[derive(Debug, Clone)]
pub struct Domain {
    identities: Vec<Identity>,
    starts: mpsc::Sender<Start>,
}

impl std::fmt::Debug for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Start")
    }
}

impl Domain {
    /// Starts the thread; it ends with the last handle.
    pub fn start(rules: Rules, network: Network) -> io::Result<Self> {
        let (starts, mut waiting) = mpsc::channel::<Start>(STARTS_MAX);
        let identities = rules.identities();
        let reactor = tokio::runtime::Handle::current();
        std::thread::Builder::new().name("sandbox".into()).spawn(move || {
            let _reactor = reactor.enter();
            drop_capabilities();
            let bound = bind_this_thread(&rules, network).map_err(|e| format!("Landlock refused its rules: {e}"));
            drop(rules);
            while let Some(Start { mut command, started }) = waiting.blocking_recv() {
                let child = match &bound {
                    Ok(_) => tree::spawn(&mut command),
                    Err(error) => Err(io::Error::other(error.clone())),
                };
                let _ = started.send(child);
            }
        })?;
        Ok(Self { identities, starts })
    }

    pub fn has(&self, rules: &Rules) -> bool {
        self.identities == rules.identities() && !self.starts.is_closed()
    }

    pub async fn spawn(&self, command: Command) -> io::Result<Child> {
        let ended = || io::Error::other("the starting thread ended");
        let (started, child) = oneshot::channel();
        self.starts.send(Start { command, started }).await.map_err(|_| ended())?;
        child.await.unwrap_or_else(|_| Err(ended()))
    }
}

fn bind_this_thread(rules: &Rules, network: Network) -> Result<RestrictionStatus, RulesetError> {
    let mut set = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI_WANTED))?
        .scope(Scope::from_all(ABI_WANTED))?;
    if network == Network::None {
        set = set.handle_access(AccessNet::from_all(ABI_WANTED))?;
    }
    let mut created = set.create()?;
    for (fd, (_, _, access)) in &rules.0 {
        created = created.add_rule(PathBeneath::new(fd.as_fd(), *access))?;
    }
    created.restrict_self()
}

/// The bounding set limits what a program of root gets; for others there is nothing to drop.
fn drop_capabilities() {
    if rustix::process::geteuid().is_root() {
        for capability in CAPABILITIES_DROPPED.iter() {
            // A container may have dropped it before.
            let _ = remove_capability_from_bounding_set(capability);
        }
    }
}

/// The ABI that this kernel enforces, 0 for none. On a thread that ends right after, since there is no way back.
pub fn probe() -> i32 {
    let bind = || {
        let mut rules = Rules::default();
        rules.write(["/tmp"]);
        bind_this_thread(&rules, Network::Open)
    };
    match std::thread::spawn(bind).join() {
        Ok(Ok(RestrictionStatus { ruleset, landlock: LandlockStatus::Available { effective_abi, .. }, .. }))
            if ruleset != RulesetStatus::NotEnforced =>
        {
            effective_abi as i32
        }
        _ => 0,
    }
}
