//! Real servers: started, killed, paused and restarted; what they had written is there afterwards.
//! Needs the servers of `make tools`.

use std::time::{Duration, Instant};

use reliant_devstack::{NatsRole, Placement, Server, Stack, StackConfig, StackError};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

#[tokio::test(flavor = "multi_thread")]
async fn data_survives_kill_9_of_each_server() {
    let dir = tempfile::tempdir().expect("tempdir");
    let begun = Instant::now();
    let stack = Stack::start(StackConfig::for_tests(dir.path())).await.expect("start");
    eprintln!("first start: {:?}", begun.elapsed());
    assert!(matches!(
        Stack::start(StackConfig::for_tests(dir.path())).await,
        Err(StackError::AlreadyRunning { pid: Some(_), .. })
    ));

    stack.sql("reliant", "CREATE TABLE kept (n int); INSERT INTO kept VALUES (42)").await.expect("sql");
    let port = stack.port(Server::Temporal).expect("ours");
    let http = temporal_http(&dir);
    register_namespace(http, "kept").await;

    for server in Server::ALL {
        let before = stack.pid(server).expect("runs");
        stack.kill(server).expect("ours");
        assert_eq!(stack.pid(server), None);
        let begun = Instant::now();
        stack.restart(server).await.expect("restart");
        eprintln!("{server} is back after {:?}", begun.elapsed());
        assert_ne!(stack.pid(server).expect("runs"), before);
    }
    assert_eq!(stack.port(Server::Temporal), Some(port));
    assert_eq!(stack.sql("reliant", "SELECT n FROM kept").await.expect("sql"), "42");
    assert!(namespace_exists(http, "kept").await);

    stack.create_database("first").await.expect("create");
    stack.sql("first", "CREATE TABLE t (n int); INSERT INTO t VALUES (1)").await.expect("sql");
    stack.database_from_template("first", "second").await.expect("clone");
    assert_eq!(stack.sql("second", "SELECT n FROM t").await.expect("sql"), "1");
    assert!(matches!(stack.create_database("a b").await, Err(StackError::DatabaseName { .. })));
    stack.stop().await;

    let begun = Instant::now();
    let stack = Stack::start(StackConfig::for_tests(dir.path())).await.expect("start again");
    eprintln!("later start: {:?}", begun.elapsed());
    assert_eq!(stack.sql("reliant", "SELECT n FROM kept").await.expect("sql"), "42");
    stack.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_server_is_silent_and_comes_back() {
    let dir = tempfile::tempdir().expect("tempdir");
    let config = StackConfig { temporal: Placement::Off, ..StackConfig::for_tests(dir.path()) };
    let stack = Stack::start(config).await.expect("start");
    stack.pause(Server::Postgres).expect("ours");
    let asked = tokio::time::timeout(Duration::from_millis(500), stack.sql("reliant", "SELECT 1")).await;
    assert!(asked.is_err(), "a paused Postgres answered");
    stack.resume(Server::Postgres).expect("ours");
    assert_eq!(stack.sql("reliant", "SELECT 1").await.expect("sql"), "1");
    assert!(matches!(stack.kill(Server::Temporal), Err(StackError::NotOurs { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_pid_file_does_not_stop_the_next_start() {
    let dir = tempfile::tempdir().expect("tempdir");
    let config =
        || StackConfig { temporal: Placement::Off, nats: Placement::Off, ..StackConfig::for_tests(dir.path()) };
    let stack = Stack::start(config()).await.expect("start");
    let pid_file = dir.path().join("postgres/postmaster.pid");
    let text = std::fs::read_to_string(&pid_file).expect("pid file");
    stack.kill(Server::Postgres).expect("ours");
    drop(stack);
    // A process that lives, and is no Postgres: this one.
    let (_, rest) = text.split_once('\n').expect("lines");
    std::fs::write(&pid_file, format!("{}\n{rest}", std::process::id())).expect("write");
    Stack::start(config()).await.expect("start after an unclean end").stop().await;
    // A zombie.
    let mut child = std::process::Command::new("true").spawn().expect("true");
    std::fs::write(&pid_file, format!("{}\n{rest}", child.id())).expect("write");
    Stack::start(config()).await.expect("start beside a zombie").stop().await;
    child.wait().expect("wait");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_nats_role_is_held_to_its_subjects() {
    let dir = tempfile::tempdir().expect("tempdir");
    let config =
        StackConfig { temporal: Placement::Off, postgres: Placement::Off, ..StackConfig::for_tests(dir.path()) };
    let stack = Stack::start(config).await.expect("start");
    let port = stack.port(Server::Nats).expect("ours");
    for (role, line, allowed) in [
        (NatsRole::Local, "SUB reliant.v1.result.a.b 1", true),
        (NatsRole::Local, "SUB other 1", false),
        (NatsRole::Worker, "SUB reliant.v1.result.*.* workers 1", true),
        (NatsRole::Gateway, "SUB reliant.v1.result.*.* 1", false),
        (NatsRole::Gateway, "SUB reliant.v1.tool.a 1", true),
        (NatsRole::Api, "SUB _INBOX_worker.x 1", false),
        (NatsRole::Api, "SUB _INBOX_api.x 1", true),
    ] {
        let user = stack.nats_user(role).expect("private");
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("connect");
        let connect = format!(
            "CONNECT {{\"verbose\":true,\"user\":\"{}\",\"pass\":\"{}\"}}\r\n{line}\r\nPING\r\n",
            user.name, user.password
        );
        stream.write_all(connect.as_bytes()).await.expect("write");
        let mut said = String::new();
        while !said.contains("PONG") {
            let mut bytes = [0; 4096];
            let read = stream.read(&mut bytes).await.expect("read");
            assert_ne!(read, 0, "the server hung up: {said}");
            said.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
        assert_eq!(!said.contains("Permissions Violation"), allowed, "{role:?} {line}: {said}");
    }
}

/// The child's own port is not public; its arguments say it.
fn temporal_http(dir: &tempfile::TempDir) -> u16 {
    for entry in std::fs::read_dir("/proc").expect("proc").flatten() {
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let args: Vec<String> =
            line.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect();
        if args.contains(&dir.path().join("temporal.db").display().to_string()) {
            let at = args.iter().position(|arg| arg == "--http-port").expect("flag");
            return args[at + 1].parse().expect("port");
        }
    }
    panic!("no Temporal process found");
}

async fn register_namespace(port: u16, name: &str) {
    let body = format!(r#"{{"namespace":"{name}","workflowExecutionRetentionPeriod":"86400s"}}"#);
    let said = http(port, "POST", "/api/v1/namespaces", &body).await;
    assert!(said.contains("HTTP/1.1 200"), "{said}");
}

async fn namespace_exists(port: u16, name: &str) -> bool {
    http(port, "GET", &format!("/api/v1/namespaces/{name}"), "").await.contains("HTTP/1.1 200")
}

async fn http(port: u16, method: &str, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("connect");
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.expect("write");
    let mut said = Vec::new();
    stream.read_to_end(&mut said).await.expect("read");
    String::from_utf8_lossy(&said).into_owned()
}
