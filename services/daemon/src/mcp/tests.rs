//! MCP servers as they are: good, slow, dead and lying. The server is a script of ours; real ones come end to end.

use std::{
    collections::{BTreeMap, HashSet},
    io::{Read, Write},
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use reliant_types::{Code, limits, pb};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::stdio;
use crate::{
    config::DaemonConfig,
    mcp::trust::{pending_trust, trust},
    tools::{Outcome, sandbox::Sandbox, tests::Fixture},
};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/mcp/scripted_server.py");

fn trust_all(fixture: &Fixture) -> usize {
    let (state, root) = (fixture.dir.path().join("state"), fixture.path(""));
    let pending = pending_trust(&state, &root).unwrap();
    trust(&state, &root, &pending).unwrap();
    pending.len()
}

struct World {
    fixture: Arc<Fixture>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl World {
    fn start(servers: Value) -> Self {
        let fixture = Arc::new(Fixture::new());
        std::fs::write(fixture.path(".mcp.json"), json!({"mcpServers": servers}).to_string()).unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(fixture.toolbox.mcp.clone().run(stop.clone()));
        Self { fixture, stop, task }
    }

    async fn up(servers: Value) -> Self {
        let world = Self::start(servers);
        assert_eq!(trust_all(&world.fixture), 1);
        world.until(|w| w.names().len() >= 10).await;
        world
    }

    async fn until(&self, is: impl Fn(&Self) -> bool) {
        let wait = async {
            while !is(self) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), wait).await.expect("it comes about");
    }

    fn names(&self) -> Vec<String> {
        self.fixture.toolbox.mcp.declarations(1000).into_iter().map(|t| t.name).collect()
    }

    async fn call(&self, tool: &str) -> Outcome {
        self.fixture.run_for(&format!("mcp__s__{tool}"), json!({"text": "hi"}), Duration::from_secs(3)).await
    }

    fn starts(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.fixture.path("starts")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    async fn end(self) {
        let pids = self.starts();
        self.stop.cancel();
        self.task.await.unwrap();
        for pid in pids {
            let alive = std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "));
            assert!(!alive, "server {pid} outlived its daemon");
        }
    }
}

fn script() -> Value {
    json!({"command": "python3", "args": [SCRIPT], "env": {"GIVEN": "given"}})
}

#[tokio::test]
async fn a_server_starts_once_it_is_trusted_and_its_tools_are_offered() {
    let world = World::start(json!({"s": script()}));
    let state = world.fixture.dir.path().join("state");
    world.until(|w| w.fixture.toolbox.mcp.status().iter().any(|s| s.state == "untrusted")).await;
    assert_eq!(pending_trust(&state, &world.fixture.path("")).unwrap()[0].name, "s");
    let root = world.fixture.roots.get("").unwrap();
    let refused = world.fixture.toolbox.prepare(&root, "mcp__s__echo", "{}").unwrap_err();
    assert_eq!(refused.code, Code::McpServerUntrusted);
    assert!(world.starts().is_empty());
    assert_eq!(trust_all(&world.fixture), 1);
    world.until(|w| w.names().len() == 10).await;
    let tools = world.fixture.toolbox.mcp.declarations(1000);
    assert!(tools.iter().all(|t| !t.read_only && t.root_id == root.id));
    let rude = tools.iter().find(|t| t.name.contains("rude")).unwrap();
    assert_eq!((rude.name.as_str(), rude.description.as_str()), ("mcp__s__rude___31mname_", "bad[0m text"));
    assert_eq!(rude.input_schema_json, r#"{"type":"object"}"#);
    let echo = world.call("echo").await;
    let text = String::from_utf8(echo.content).unwrap();
    assert_eq!(echo.status, pb::ToolCallStatus::Succeeded);
    assert_eq!(text, "hi 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 given []");
    // Another content asks again, and what ran is stopped.
    std::fs::write(world.fixture.path(".mcp.json"), json!({"mcpServers": {"s": {"command": "true"}}}).to_string())
        .unwrap();
    world.until(|w| w.names().is_empty()).await;
    world.end().await;
}

#[tokio::test]
async fn what_a_server_answers_is_told_as_it_is_and_bounded() {
    let world = World::up(json!({"s": script()})).await;
    let fail = world.call("fail").await;
    assert_eq!(
        (fail.status, fail.is_error, &fail.content[..]),
        (pb::ToolCallStatus::Failed, true, &b"it did not work"[..])
    );
    let refuse = world.call("refuse").await;
    assert_eq!((refuse.status, refuse.code), (pb::ToolCallStatus::Failed, Some(Code::ToolArgumentsInvalid)));
    assert!(String::from_utf8(refuse.content).unwrap().ends_with("not so"));
    let big = world.call("big").await;
    assert!(big.content.len() <= limits::TOOL_RESULT_MAX_BYTES && big.output_bytes == 3_000_000);
    let garbage = world.call("garbage").await;
    assert_eq!(garbage.status, pb::ToolCallStatus::Failed);
    assert_eq!(world.call("huge").await.status, pb::ToolCallStatus::TimedOut);
    assert_eq!(world.call("grow").await.status, pb::ToolCallStatus::Succeeded);
    world.until(|w| w.names().contains(&"mcp__s__grown".to_owned())).await;
    assert_eq!(world.starts().len(), 1);
    world.end().await;
}

#[tokio::test]
async fn a_server_that_dies_makes_the_outcome_unknown_and_comes_back() {
    let world = World::up(json!({"s": script()})).await;
    let die = world.call("die").await;
    assert_eq!((die.status, die.cause), (pb::ToolCallStatus::OutcomeUnknown, pb::UnknownCause::ProcessDied));
    // The next call waits for it.
    let echo = world.fixture.run("mcp__s__echo", json!({"text": "again"})).await;
    assert_eq!(echo.status, pb::ToolCallStatus::Succeeded, "{}", String::from_utf8_lossy(&echo.content));
    assert_eq!(world.starts().len(), 2);
    world.end().await;
}

#[tokio::test]
async fn a_server_that_hangs_times_out_and_hears_of_it() {
    let world = World::up(json!({"s": script()})).await;
    let began = std::time::Instant::now();
    let hang = world.fixture.run_for("mcp__s__hang", json!({}), Duration::from_millis(300)).await;
    assert_eq!(hang.status, pb::ToolCallStatus::TimedOut);
    assert!(began.elapsed() < Duration::from_secs(2));
    let heard = || std::fs::read_to_string(world.fixture.path("heard")).unwrap();
    world.until(|_| heard().contains("notifications/cancelled")).await;
    let cancel = CancellationToken::new();
    let job = world.fixture.job(Duration::from_secs(60), &cancel);
    let prepared = world.fixture.toolbox.prepare(&job.root, "mcp__s__hang", "{}").unwrap();
    let soon = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        cancel.cancel();
    };
    let (outcome, ()) = tokio::join!(world.fixture.toolbox.run(prepared, job), soon);
    assert_eq!(outcome.status, pb::ToolCallStatus::Cancelled);
    world.until(|_| heard().matches("notifications/cancelled").count() == 2).await;
    world.end().await;
}

#[tokio::test]
async fn a_server_that_never_comes_up_costs_nobody_else() {
    let servers = json!({
        "s": script(),
        "silent": {"command": "python3", "args": [SCRIPT, "--silent"]},
        "missing": {"command": "/no/such/program"},
        "unset": {"command": "${NO_SUCH_VARIABLE}"},
        "web": {"type": "http", "url": "http://127.0.0.1:1/mcp"},
    });
    let world = World::start(servers);
    trust_all(&world.fixture);
    world.until(|w| w.names().len() == 10).await;
    let state = |w: &World, name: &str| w.fixture.toolbox.mcp.status().into_iter().find(|s| s.server == name).unwrap();
    world.until(|w| state(w, "missing").state == "down" && state(w, "web").state == "down").await;
    assert_eq!(state(&world, "unset").state, "refused");
    assert!(state(&world, "missing").error.contains("/no/such/program"));
    world.end().await;
}

#[tokio::test]
async fn a_server_over_http_is_called_and_its_death_is_told_as_it_is() {
    let fixture = tempfile::tempdir().unwrap();
    let script = SCRIPT.replace("scripted_server", "scripted_http_server");
    let mut server = tokio::process::Command::new("python3");
    let mut server = server.arg(script).current_dir(fixture.path()).kill_on_drop(true).spawn().unwrap();
    let port = loop {
        match std::fs::read_to_string(fixture.path().join("port")) {
            Ok(port) => break port,
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let url = format!("http://127.0.0.1:{port}/mcp");
    let world = World::start(json!({"s": {"type": "http", "url": url, "headers": {"x-key": "key"}}}));
    trust_all(&world.fixture);
    world.until(|w| w.names().len() == 2).await;
    let echo = world.call("echo").await;
    assert_eq!((echo.status, &echo.content[..]), (pb::ToolCallStatus::Succeeded, &b"hi"[..]));
    let die = world.call("die").await;
    assert_eq!(die.status, pb::ToolCallStatus::OutcomeUnknown, "{}", String::from_utf8_lossy(&die.content));
    server.wait().await.unwrap();
    // It is gone: nothing is run, and that is certain.
    let gone = world.fixture.run_for("mcp__s__echo", json!({}), Duration::from_secs(30)).await;
    let text = String::from_utf8_lossy(&gone.content);
    assert_eq!((gone.status, gone.code), (pb::ToolCallStatus::Failed, Some(Code::McpServerFailed)), "{text}");
    world.end().await;
}

#[tokio::test]
async fn a_file_that_changes_all_the_time_does_not_fill_the_memory() {
    let fixture = Fixture::new();
    let mcp = fixture.toolbox.mcp.clone();
    let stop = CancellationToken::new();
    let warned = || mcp.warned.lock().iter().map(HashSet::len).sum::<usize>();
    for n in 0..100 {
        let long = "x".repeat(100_000);
        let servers = json!({"a": {"command": format!("run {n}")}, "b": {"command": format!("${{NO_{n}_{long}}}")}});
        std::fs::write(fixture.path(".mcp.json"), json!({"mcpServers": servers}).to_string()).unwrap();
        mcp.look(&stop);
        assert_eq!(warned(), 2);
        // What stays so is not said again.
        mcp.look(&stop);
        assert_eq!(warned(), 2);
    }
    let longest = mcp.warned.lock().iter().flatten().map(String::len).max();
    assert!(longest.is_some_and(|len| len <= 2000), "{longest:?}");
}

#[tokio::test]
async fn a_redirect_does_not_take_the_headers_to_another_host() {
    let (entrance, elsewhere) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let url = format!("http://{}/mcp", entrance.local_addr().unwrap());
    let target = format!("http://{}/mcp", elsewhere.local_addr().unwrap());
    elsewhere.set_nonblocking(true).unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    std::thread::spawn(move || {
        for stream in entrance.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 4096];
            let read = stream.read(&mut head).unwrap();
            assert!(String::from_utf8_lossy(&head[..read]).contains("x-key: secret"));
            let answer = format!("HTTP/1.1 307 Elsewhere\r\nlocation: {target}\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(answer.as_bytes()).unwrap();
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let world = World::start(json!({"s": {"type": "http", "url": url, "headers": {"x-key": "secret"}}}));
    trust_all(&world.fixture);
    world.until(|w| w.fixture.toolbox.mcp.status().iter().any(|s| s.state == "down")).await;
    assert!(asked.load(Ordering::SeqCst) > 0);
    assert_eq!(elsewhere.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "nobody came");
    world.end().await;
}

#[tokio::test]
async fn a_server_whose_script_in_the_root_was_rewritten_is_not_started_again() {
    let world = World::start(json!({"s": {"command": "python3", "args": ["server.py"], "env": {"GIVEN": "given"}}}));
    std::fs::copy(SCRIPT, world.fixture.path("server.py")).unwrap();
    trust_all(&world.fixture);
    world.until(|w| w.names().len() == 10).await;
    let pid = world.starts().remove(0);
    let text = std::fs::read_to_string(SCRIPT).unwrap();
    let evil = format!("open('rewritten', 'w').close()\n{text}");
    std::fs::write(world.fixture.path("server.py"), evil).unwrap();
    world.fixture.run("shell", json!({"command": format!("kill -9 {pid}")})).await;
    world.until(|w| w.fixture.toolbox.mcp.status().iter().any(|s| s.state == "untrusted")).await;
    assert!(!world.fixture.path("rewritten").exists());
    trust_all(&world.fixture);
    world.until(|w| w.names().len() == 10).await;
    assert!(world.fixture.path("rewritten").exists());
    world.end().await;
}

#[tokio::test]
async fn a_server_is_confined_unless_it_is_named() {
    let home = std::env::home_dir().unwrap();
    let Ok(dir) = tempfile::Builder::new().prefix(".reliant-test-").tempdir_in(home) else { return };
    let root = dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(dir.path().join("secret"), "secret").unwrap();
    let sandbox = Sandbox::probe(&DaemonConfig::default(), &dir.path().join("state"));
    if !sandbox.is_on() {
        return;
    }
    let launcher = stdio::Launcher { sandbox, mark: "m".into(), unconfined: vec!["open".into()] };
    for (name, expected) in [("closed", false), ("open", true)] {
        let script = format!("cat ../secret > {name}; test -z \"$CARGO_PKG_NAME\" && touch {name}.clean");
        let args = ["-c".to_owned(), script];
        let child = stdio::Child::spawn(name, "bash", &args, &BTreeMap::new(), &root, &launcher).await.unwrap();
        let wait = async {
            while !root.join(format!("{name}.clean")).exists() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.expect(name);
        child.end().await;
        assert_eq!(std::fs::read_to_string(root.join(name)).unwrap() == "secret", expected, "{name}");
    }
}
