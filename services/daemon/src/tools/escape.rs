//! Attempts to get out of the sandbox, each a script that a shell command runs, and usual work that must go on inside.
//!
//! An attempt succeeds where its script exits with 0, prints the canary, or changes or ends what lies outside.

use std::{
    io::Write as _,
    os::linux::net::SocketAddrExt as _,
    os::unix::fs::{PermissionsExt, symlink},
    os::unix::net::{SocketAddr, UnixListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::process::Command;

use super::sandbox::{Kind, Network, Sandbox};
use crate::config::DaemonConfig;

const CANARY: &str = "canary-0f3b";
const PATIENCE: Duration = Duration::from_secs(30);

/// A home with secrets and another project, and a root beside them.
struct World {
    dir: tempfile::TempDir,
    victim: tokio::process::Child,
    _abstract_socket: UnixListener,
    socket: String,
    tcp: std::net::TcpListener,
}

impl World {
    /// `None` where there is no Landlock to be tested.
    fn new() -> Option<(Self, PathBuf)> {
        let home = std::env::home_dir()?;
        let dir = tempfile::Builder::new().prefix(".reliant-escape-").tempdir_in(home).ok()?;
        let root = dir.path().join("root");
        for sub in ["root", "state", "other/.git/hooks", "cargo/registry/src/x", "outside"] {
            std::fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        for file in
            ["secret", "other/.git/config", "cargo/registry/src/x/build.rs", "state/trust.json", "outside/run.sh"]
        {
            std::fs::write(dir.path().join(file), CANARY).unwrap();
        }
        let executable = dir.path().join("outside/run.sh");
        std::fs::write(&executable, format!("#!/bin/sh\necho {CANARY}\n")).unwrap();
        std::fs::set_permissions(&executable, PermissionsExt::from_mode(0o755)).unwrap();
        symlink("../secret", root.join("link")).unwrap();
        symlink("..", root.join("up")).unwrap();
        let socket = format!("reliant-escape-{}", dir.path().file_name()?.to_string_lossy());
        let address = SocketAddr::from_abstract_name(socket.as_bytes()).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let victim = Command::new("sleep").arg("600").env("SECRET", CANARY).kill_on_drop(true).spawn().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Some((Self { dir, victim, _abstract_socket: listener, socket, tcp }, root))
    }

    fn sandbox(&self, network: Network) -> Sandbox {
        Sandbox::probe(&DaemonConfig { network, ..DaemonConfig::default() }, &self.dir.path().join("state"))
    }

    /// Whether the script ended well, and what it printed. `O` is the directory around the root, `V` a process outside,
    /// `S` an abstract socket, `T` a TCP port.
    async fn run(&self, sandbox: &Sandbox, root: &Path, script: &str) -> (bool, String) {
        let mut command = Command::new("bash");
        sandbox.environment().apply(&mut command);
        command
            .args(["-c", script])
            .current_dir(root)
            .env("O", self.dir.path())
            .env("V", self.victim.id().unwrap().to_string())
            .env("D", std::process::id().to_string())
            .env("S", &self.socket)
            .env("T", self.tcp.local_addr().unwrap().port().to_string())
            .env("HOME", std::env::home_dir().unwrap())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let child = sandbox.spawn(Kind::Shell, command, root, &[]).await.unwrap();
        let pid = child.id().unwrap();
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await.expect(script).unwrap();
        super::tree::forget(pid);
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    fn intact(&mut self) -> bool {
        let same = |file: &str| std::fs::read_to_string(self.dir.path().join(file)).is_ok_and(|text| text == CANARY);
        let files = ["secret", "other/.git/config", "cargo/registry/src/x/build.rs", "state/trust.json"];
        files.into_iter().all(same)
            && std::fs::read_dir(self.dir.path()).unwrap().count() == 6
            && std::fs::read_dir(self.dir.path().join("other/.git/hooks")).unwrap().count() == 0
            && self.victim.try_wait().unwrap().is_none()
    }
}

const PY_TIOCSTI: &str = "python3 -c 'import fcntl,os,sys
for n in [\"/dev/tty\",\"/dev/console\",\"/dev/tty1\"]+[\"/dev/pts/%d\"%i for i in range(9)]:
  try: f=os.open(n,os.O_RDWR)
  except OSError: continue
  try: fcntl.ioctl(f,0x5412,b\"x\")
  except OSError: continue
  sys.exit(0)
sys.exit(1)'";
const PY_ABSTRACT: &str =
    "python3 -c 'import os,socket; s=socket.socket(socket.AF_UNIX); s.connect(\"\\0\"+os.environ[\"S\"])'";

const ATTEMPTS: &[(&str, &str)] = &[
    ("read beside the root", "cat ../secret"),
    ("read by an absolute path", "cat \"$O/secret\""),
    ("read through a link", "cat link"),
    ("read through a link to a directory", "cat up/secret"),
    ("read through a link of one's own", "ln -s \"$O/secret\" own && cat own"),
    ("read through the working directory of /proc", "cat /proc/self/cwd/../secret"),
    ("read through the root of /proc", "cat \"/proc/self/root$O/secret\""),
    ("read through the root of a process outside", "cat \"/proc/$V/root$O/secret\""),
    ("read through the working directory of a process outside", "ls /proc/$V/cwd/"),
    ("read in a session of its own", "setsid -w cat ../secret"),
    ("read with an empty environment", "env -i /bin/cat ../secret"),
    ("read from python", "python3 -c 'print(open(\"../secret\").read())'"),
    ("read by a program's own include", "make -f ../secret -n 2>&1 | grep canary"),
    ("read by a shell's source", ". ../secret 2>&1 | grep canary"),
    ("list beside the root", "ls .."),
    ("list the home directory", "ls ~"),
    ("find in the home directory", "find ~ -maxdepth 2 -name 'id_*' | grep ."),
    ("hard link to a file outside", "ln ../secret mine && cat mine"),
    ("rename a file in", "mv ../secret mine"),
    ("rename a file out", "echo x > new && mv new ../new"),
    ("write beside the root", "echo x > ../new"),
    ("append outside", "echo x >> ../secret"),
    ("truncate outside", "truncate -s 0 ../secret"),
    ("truncate through a link", ": > link"),
    ("remove outside", "rm ../secret"),
    ("remove a directory outside", "rmdir ../outside || rm -r ../outside"),
    ("make a directory outside", "mkdir ../d"),
    ("make a pipe outside", "mkfifo ../p"),
    ("make a link outside", "ln -s x ../l"),
    ("change rights outside", "echo x > ../other/.git/hooks/pre-commit && chmod 755 ../other/.git/hooks/pre-commit"),
    ("write another repository's settings", "git config -f ../other/.git/config core.fsmonitor x"),
    ("write a cached source", "echo x >> ../cargo/registry/src/x/build.rs"),
    ("write the trust file", "echo x > ../state/trust.json"),
    ("read the state directory", "cat ../state/trust.json"),
    ("write the system", "echo x > /etc/reliant-escape"),
    ("write a start file of the shell", "echo x >> ~/.bashrc"),
    ("write the person's cargo home", "echo x > ~/.cargo/reliant-escape || mkdir ~/.cargo/registry/reliant-escape"),
    ("write the person's caches", "mkdir -p ~/.cache/reliant-escape"),
    ("read cargo's credentials", "cat ~/.cargo/credentials.toml"),
    ("read git's credentials", "cat ~/.config/git/credentials ~/.git-credentials"),
    ("list ssh keys", "ls ~/.ssh"),
    ("run a program outside", "../outside/run.sh"),
    ("interpret a program outside", "sh ../outside/run.sh"),
    ("run through the loader", "cp ../outside/run.sh . && ./run.sh"),
    ("claim a worktree of another repository", "echo 'gitdir: ../other/.git' > .git; echo x > ../other/.git/hooks/x"),
    ("signal a process outside", "kill -0 $V"),
    ("end a process outside", "kill -9 $V"),
    ("end the daemon", "kill -0 $D || kill -0 $PPID"),
    ("stop a process outside", "kill -STOP $V"),
    ("end all processes by python", "python3 -c 'import os; os.kill(int(os.environ[\"V\"]), 15)'"),
    ("read the environment of a process outside", "tr '\\0' '\\n' < /proc/$V/environ | grep canary"),
    ("read the daemon's environment", "cat /proc/$D/environ | grep -q ."),
    ("read the memory of a process outside", "head -c 1 /proc/$V/mem"),
    ("read the memory map of a process outside", "grep . /proc/$V/maps"),
    ("read through the descriptors of the daemon", "readlink /proc/$D/fd/0 || cat /proc/$D/fd/3"),
    (
        "trace a process outside",
        "python3 -c 'import ctypes,os,sys; l=ctypes.CDLL(None); \
                                 sys.exit(l.ptrace(16, int(os.environ[\"V\"]), 0, 0) != 0)'",
    ),
    ("open the terminal", "exec 3<>/dev/tty"),
    ("type into a terminal", PY_TIOCSTI),
    ("make a terminal", "exec 3<>/dev/ptmx"),
    ("connect to an abstract socket", PY_ABSTRACT),
    ("mount", "mkdir m && mount --bind .. m"),
    ("mount in a namespace of its own", "unshare -Urm sh -c 'mount --bind .. /mnt && cat /mnt/secret'"),
    ("enter a process's namespaces", "nsenter -t $V -m true"),
    ("change the root", "chroot .. /secret"),
    ("sudo", "sudo -n true"),
    ("read a disk", "head -c 1 /dev/sda || head -c 1 /dev/vda || head -c 1 /dev/nvme0n1"),
    ("read the kernel's memory", "head -c 1 /dev/mem || head -c 1 /proc/kcore"),
    ("write a kernel setting", "echo 0 > /proc/sys/kernel/randomize_va_space"),
    ("write a core pattern", "echo '|/bin/x' > /proc/sys/kernel/core_pattern"),
];

#[tokio::test]
async fn no_attempt_gets_out() {
    let Some((mut world, root)) = World::new() else { return };
    let sandbox = world.sandbox(Network::Open);
    if sandbox.level() < 6 {
        return;
    }
    let mut escaped = Vec::new();
    for (name, script) in ATTEMPTS {
        let (succeeded, output) = world.run(&sandbox, &root, script).await;
        if succeeded || output.contains(CANARY) || !world.intact() {
            escaped.push(format!("{name}: {output}"));
        }
    }
    assert!(escaped.is_empty(), "{} got out:\n{}", escaped.len(), escaped.join("\n"));
}

#[tokio::test]
async fn a_closed_network_has_no_tcp_and_an_open_one_has() {
    let Some((world, root)) = World::new() else { return };
    let connect = "exec 3<>/dev/tcp/127.0.0.1/$T";
    let open = world.sandbox(Network::Open);
    if open.level() < 4 {
        return;
    }
    assert!(world.run(&open, &root, connect).await.0);
    assert!(!world.run(&world.sandbox(Network::None), &root, connect).await.0);
}

const WORK: &[(&str, &str)] = &[
    ("write and read", "mkdir -p d && echo hi > d/f && mv d/f d/g && test \"$(cat d/g)\" = hi && rm -r d"),
    ("temporary files", "f=$(mktemp) && echo x > $f && rm $f && d=$(mktemp -d) && touch $d/x && rm -r $d"),
    (
        "pipes and descriptors",
        "seq 1000 | sort -n | tail -1 | grep -q 1000 && cat <(echo a) <(echo b) | wc -l | grep -q 2",
    ),
    ("here documents", "cat <<< x | grep -q x"),
    ("devices", "echo x > /dev/null && head -c 4 /dev/urandom | wc -c | grep -q 4 && echo x > /dev/stderr"),
    (
        "shared memory",
        "python3 -c 'import multiprocessing.shared_memory as s; m=s.SharedMemory(create=True,size=9); m.close(); m.unlink()'",
    ),
    ("worker processes", "python3 -c 'import multiprocessing as m; p=m.Pool(2); print(p.map(abs,[-1]))'"),
    ("signals to one's own", "sleep 60 & kill $! && ! wait $!"),
    ("a later command ends an earlier one's server", "cat server.pid | xargs kill"),
    (
        "sockets of one's own",
        "python3 -c 'import socket as s; a=s.socket(s.AF_UNIX); a.bind(\"\\0own\"); a.listen(); \
                              b=s.socket(s.AF_UNIX); b.connect(\"\\0own\"); c=s.socket(s.AF_UNIX); c.bind(\"sock\"); \
                              c.listen(); d=s.socket(s.AF_UNIX); d.connect(\"sock\")'",
    ),
    (
        "a local server",
        "python3 -c 'import socket as s; a=s.create_server((\"127.0.0.1\",0)); s.create_connection(a.getsockname())'",
    ),
    (
        "git",
        "mkdir repo && cd repo && git init -q && echo x > f && git add f && \
             git -c user.name=a -c user.email=a@b commit -qm x && git log --oneline | grep -q x && git status -s",
    ),
    ("git worktree beneath the root", "cd repo && git worktree add -q ../tree && cd ../tree && git status -s"),
    ("make", "printf 'all:\\n\\techo made > out\\n' > Makefile && make -s && grep -q made out"),
    ("a C compiler", "! command -v cc >/dev/null || (echo 'int main(){return 0;}' > a.c && cc -o a a.c && ./a)"),
    (
        "python's virtual environments",
        "python3 -m venv --without-pip v && ./v/bin/python -c 'import sys; print(sys.prefix)'",
    ),
    ("node", "! command -v node >/dev/null || node -e 'require(\"fs\").writeFileSync(\"n\", \"1\")'"),
    (
        "caches",
        "test -w \"$XDG_CACHE_HOME\" && mkdir -p \"$XDG_CACHE_HOME/x\" && touch \"$npm_config_cache/x\" \"$GOCACHE/x\"",
    ),
    (
        "cargo without the network",
        "mkdir -p c/src && cd c && printf '[package]\\nname = \"c\"\\nversion = \"0.1.0\"\\nedition = \"2021\"\\n\
             [dependencies]\\ncfg-if = \"1\"\\n[workspace]\\n' > Cargo.toml && echo 'fn main() { cfg_if::cfg_if! { if #[cfg(unix)] { println!(\"built\") } } }' > src/main.rs && \
             CARGO_TARGET_DIR=t cargo run -q --offline | grep -q built",
    ),
    (
        "the clock and the machine",
        "date && nproc && uname -a && id && ps aux | grep -q . && df . && cat /proc/cpuinfo /proc/meminfo | grep -q .",
    ),
    ("archives", "tar cf a.tar d* Makefile 2>/dev/null; tar tf a.tar && gzip -k a.tar && gunzip -t a.tar.gz"),
    ("rights", "touch r && chmod 755 r && test -x r"),
    ("a script of one's own", "printf '#!/bin/sh\\necho ran\\n' > s.sh && chmod +x s.sh && ./s.sh | grep -q ran"),
];

#[tokio::test]
async fn usual_work_goes_on_inside() {
    let Some((world, root)) = World::new() else { return };
    let sandbox = world.sandbox(Network::Open);
    if !sandbox.is_on() {
        return;
    }
    writeln!(std::fs::File::create(root.join("start.sh")).unwrap(), "sleep 600 & echo $! > server.pid").unwrap();
    world.run(&sandbox, &root, "bash start.sh > /dev/null 2>&1").await;
    let mut failed = Vec::new();
    for (name, script) in WORK {
        let (succeeded, output) = world.run(&sandbox, &root, script).await;
        if !succeeded {
            failed.push(format!("{name}: {output}"));
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}
