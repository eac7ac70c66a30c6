//! The tools as calls meet them, in a real directory with real processes.

mod hostile;
mod together;

use std::{
    os::unix::fs::symlink,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use reliant_types::{Code, ToolCallId, limits, pb};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{Job, Outcome, Toolbox, process, sandbox::Sandbox, tree};
use crate::{
    config::{DaemonConfig, RootConfig},
    mcp::Mcp,
    output::{LiveHub, Outputs},
    roots::Roots,
};

/// A root with a few files, and all that a call needs.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub roots: Roots,
    pub outputs: Arc<Outputs>,
    pub hub: Arc<LiveHub>,
    pub toolbox: Toolbox,
}

impl Fixture {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["root/src", "state/outputs", "state/running"] {
            std::fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        let write = |path: &str, text: &str| std::fs::write(dir.path().join("root").join(path), text).unwrap();
        write("src/main.rs", "fn main() {\n    println!(\"hello\");\n}\n");
        write("src/lib.rs", "pub fn one() -> i32 { 1 }\npub fn two() -> i32 { 2 }\n");
        write(".gitignore", "target\n");
        write("binary", "a\0b");
        std::fs::create_dir(dir.path().join("root/target")).unwrap();
        write("target/out.rs", "fn hidden() {}\n");
        std::fs::write(dir.path().join("secret"), "secret").unwrap();
        symlink("../secret", dir.path().join("root/link")).unwrap();
        let roots = Roots::open(&[RootConfig { name: "r".into(), path: dir.path().join("root") }]).unwrap();
        let state = dir.path().join("state");
        let config = DaemonConfig { landlock: false, ..DaemonConfig::default() };
        let sandbox = Sandbox::probe(&config, &state);
        let toolbox = Toolbox {
            mcp: Mcp::new(&config, roots.clone(), state.clone(), sandbox.clone()),
            files: Arc::default(),
            sandbox,
            bench_tools: true,
        };
        let outputs = Arc::new(Outputs::new(state.join("outputs"), 1 << 30));
        Self { dir, roots, outputs, hub: Arc::default(), toolbox }
    }

    pub fn path(&self, inside: &str) -> PathBuf {
        self.dir.path().join("root").join(inside)
    }

    pub fn job(&self, timeout: Duration, cancel: &CancellationToken) -> Job {
        let call = ToolCallId::new();
        Job {
            call,
            turn_id: "turn".into(),
            iteration: 1,
            index: 2,
            root: self.roots.get("").unwrap(),
            timeout,
            cancel: cancel.clone(),
            output: self.outputs.begin(call, 1, "chat", "user", ""),
            hub: self.hub.clone(),
            traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into(),
            running_dir: self.dir.path().join("state/running"),
        }
    }

    /// The same, for a call of another chat than the usual one.
    pub async fn run_in(&self, chat: &str, tool: &str, input: Value) -> Outcome {
        let job = self.job(Duration::from_secs(20), &CancellationToken::new());
        let job = Job { output: self.outputs.begin(ToolCallId::new(), 1, chat, "user", ""), ..job };
        let prepared = self.toolbox.prepare(&job.root, tool, &input.to_string()).unwrap();
        self.toolbox.run(prepared, job).await
    }

    pub async fn run(&self, tool: &str, input: Value) -> Outcome {
        self.run_for(tool, input, Duration::from_secs(20)).await
    }

    pub async fn run_for(&self, tool: &str, input: Value, timeout: Duration) -> Outcome {
        let job = self.job(timeout, &CancellationToken::new());
        let prepared = self.toolbox.prepare(&job.root, tool, &input.to_string()).unwrap();
        self.toolbox.run(prepared, job).await
    }

    async fn text(&self, tool: &str, input: Value) -> String {
        let outcome = self.run(tool, input).await;
        String::from_utf8_lossy(&outcome.content).into_owned()
    }

    /// Runs and expects the tool's own error.
    async fn error(&self, tool: &str, input: Value, code: Code) -> String {
        let outcome = self.run(tool, input).await;
        assert_eq!(
            (outcome.status, outcome.code, outcome.is_error),
            (pb::ToolCallStatus::Failed, Some(code), true),
            "{outcome:?}"
        );
        String::from_utf8_lossy(&outcome.content).into_owned()
    }
}

#[tokio::test]
async fn bad_arguments_are_refused_before_anything_runs() {
    let fixture = Fixture::new();
    let root = fixture.roots.get("").unwrap();
    for (tool, input, code) in [
        ("fly", "{}", Code::ToolUnknown),
        ("mcp__no__tool", "{}", Code::ToolUnknown),
        ("shell", "{}", Code::ToolArgumentsInvalid),
        ("shell", "{", Code::ToolArgumentsInvalid),
        ("shell", "[]", Code::ToolArgumentsInvalid),
        ("shell", r#"{"command": "ls", "root": "/"}"#, Code::ToolArgumentsInvalid),
        ("shell", r#"{"command": "  "}"#, Code::ToolArgumentsInvalid),
        ("shell", r#"{"command": 7}"#, Code::ToolArgumentsInvalid),
        ("edit_file", r#"{"path": "a", "old_string": "", "new_string": "x"}"#, Code::ToolArgumentsInvalid),
        ("grep", r#"{"pattern": "("}"#, Code::ToolArgumentsInvalid),
        ("glob", r#"{"pattern": "a{"}"#, Code::ToolArgumentsInvalid),
    ] {
        let failure = fixture.toolbox.prepare(&root, tool, input).unwrap_err();
        assert_eq!(failure.code, code, "{tool} {input}: {failure}");
    }
    let huge = format!(r#"{{"command": "{}"}}"#, "x".repeat(limits::TOOL_INPUT_MAX_BYTES));
    assert!(fixture.toolbox.prepare(&root, "shell", &huge).is_err());
    assert!(fixture.toolbox.prepare(&root, "list_dir", "").is_ok());
}

#[test]
fn declared_schemas_are_valid_and_say_what_is_read_only() {
    let fixture = Fixture::new();
    let tools = fixture.toolbox.declarations();
    let read_only: Vec<_> = tools.iter().filter(|t| t.read_only).map(|t| t.name.as_str()).collect();
    assert_eq!(read_only, ["read_file", "list_dir", "glob", "grep"]);
    for tool in &tools {
        let schema: Value = serde_json::from_str(&tool.input_schema_json).unwrap();
        assert!(crate::mcp::is_schema(&schema), "{}", tool.name);
        assert_eq!(schema["additionalProperties"], json!(false));
    }
}

#[tokio::test]
async fn the_shell_tells_output_exit_code_and_its_call() {
    let fixture = Fixture::new();
    let outcome = fixture.run("shell", json!({"command": "echo out; echo err >&2; exit 3"})).await;
    let text = String::from_utf8(outcome.content).unwrap();
    assert!(text.contains("out\n") && text.contains("err\n") && text.ends_with("[exit code 3]"), "{text}");
    assert_eq!((outcome.status, outcome.exit_code, outcome.code), (pb::ToolCallStatus::Failed, Some(3), None));
    assert_eq!(outcome.output_bytes, 8);
    assert_eq!(fixture.text("shell", json!({"command": "true"})).await, "(no output)");
    let env = fixture
        .text(
            "shell",
            json!({"command": "echo $RELIANT_TURN_ID.$RELIANT_ITERATION.$RELIANT_CALL_INDEX $TRACEPARENT; pwd; cat"}),
        )
        .await;
    assert!(
        env.starts_with("turn.1.2 00-4bf92f35")
            && env.contains(fixture.path("").to_str().unwrap().trim_end_matches('/')),
        "{env}"
    );
    let outcome = fixture.run("shell", json!({"command": "kill -9 $$"})).await;
    assert_eq!((outcome.status, outcome.exit_code), (pb::ToolCallStatus::Failed, Some(137)));
}

#[tokio::test]
async fn a_timeout_kills_all_that_was_started() {
    let fixture = Fixture::new();
    let began = Instant::now();
    // One child ignores TERM, one left the group.
    let script = "trap '' TERM; (sleep 30; touch late) & setsid bash -c 'sleep 30; touch late' & echo begun; sleep 30; touch late";
    let outcome = fixture.run("shell", json!({"command": script, "timeout_seconds": 1})).await;
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    assert_eq!((outcome.status, outcome.code), (pb::ToolCallStatus::TimedOut, Some(Code::ToolTimedOut)));
    let text = String::from_utf8(outcome.content).unwrap();
    assert!(text.starts_with("begun\n[timed out after 1 s"), "{text}");
    assert_eq!(std::fs::read_dir(fixture.dir.path().join("state/running")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_cancel_ends_a_call_in_well_under_a_second() {
    let fixture = Fixture::new();
    for script in ["sleep 60", "trap '' TERM; while true; do sleep 1; done"] {
        let cancel = CancellationToken::new();
        let job = fixture.job(Duration::from_secs(60), &cancel);
        let prepared = fixture.toolbox.prepare(&job.root, "shell", &json!({"command": script}).to_string()).unwrap();
        let stop = async {
            tokio::time::sleep(Duration::from_millis(150)).await;
            cancel.cancel();
            Instant::now()
        };
        let (outcome, asked) = tokio::join!(fixture.toolbox.run(prepared, job), stop);
        assert!(asked.elapsed() < Duration::from_millis(900), "{:?}", asked.elapsed());
        assert_eq!(outcome.status, pb::ToolCallStatus::Cancelled);
    }
}

#[tokio::test]
async fn a_background_process_does_not_hold_the_call() {
    let fixture = Fixture::new();
    let began = Instant::now();
    let outcome = fixture.run("shell", json!({"command": "sleep 5 & echo started"})).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let text = String::from_utf8(outcome.content.to_vec()).unwrap();
    let note = "[1 process of it still runs in the background, until the daemon stops]";
    assert_eq!((outcome.status, text), (pb::ToolCallStatus::Succeeded, format!("started\n{note}")));
}

/// Waits for a file of the root with a pid in it.
async fn pid_in(fixture: &Fixture, file: &str) -> u32 {
    let read = async {
        loop {
            let text = std::fs::read_to_string(fixture.path(file)).unwrap_or_default();
            if let Ok(pid) = text.trim().parse() {
                return pid;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), read).await.expect(file)
}

fn lives(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z"))
}

/// Leaves its group, its session, its parent and its environment.
fn runaway(file: &str) -> String {
    format!("(env -i setsid sh -c 'echo $$ > {file}; trap \"\" TERM; while :; do sleep 1; done' > /dev/null 2>&1 &); ")
}

#[tokio::test]
async fn a_stopped_call_takes_its_runaways_with_it_and_leaves_those_of_others() {
    tree::adopt_orphans();
    let fixture = Fixture::new();
    let kept =
        fixture.run("shell", json!({"command": runaway("kept") + "until test -s kept; do sleep 0.01; done"})).await;
    let kept_pid = pid_in(&fixture, "kept").await;
    let text = String::from_utf8(kept.content.to_vec()).unwrap();
    assert!(text.contains("still run"), "{text}");

    for (file, timeout, ending) in [("a", 60_000, "sleep 60"), ("b", 1_000, "sleep 60"), ("c", 60_000, "kill -9 $$")] {
        let cancel = CancellationToken::new();
        let job = fixture.job(Duration::from_millis(timeout), &cancel);
        let script = format!("{}until test -s {file}; do sleep 0.01; done; {ending}", runaway(file));
        let prepared = fixture.toolbox.prepare(&job.root, "shell", &json!({"command": script}).to_string()).unwrap();
        let stop = async {
            let pid = pid_in(&fixture, file).await;
            if file == "a" {
                cancel.cancel();
            }
            pid
        };
        let (outcome, pid) = tokio::join!(fixture.toolbox.run(prepared, job), stop);
        let text = String::from_utf8(outcome.content.to_vec()).unwrap();
        match file {
            "a" | "b" => assert!(!lives(pid) && text.contains("all it started were killed"), "{text}"),
            _ => assert!(text.contains("still run"), "{text}"),
        }
        assert!(lives(kept_pid), "{file}");
    }
    let running = fixture.dir.path().join("state/running");
    assert_eq!(std::fs::read_dir(&running).unwrap().count(), 2);
    tokio::task::spawn_blocking(move || process::forget_running(&running, &tree::kill_background())).await.unwrap();
    assert!(!lives(kept_pid) && !lives(pid_in(&fixture, "c").await));
    assert_eq!(std::fs::read_dir(fixture.dir.path().join("state/running")).unwrap().count(), 0);
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_hundred_megabytes_of_output_stay_out_of_memory() {
    let fixture = Fixture::new();
    let before = resident_kib();
    let script = "head -c 100000000 /dev/zero | tr '\\0' x; echo; echo the end";
    let job = fixture.job(Duration::from_secs(60), &CancellationToken::new());
    let (call, output) = (job.call, job.output.clone());
    let prepared = fixture.toolbox.prepare(&job.root, "shell", &json!({"command": script}).to_string()).unwrap();
    let outcome = fixture.toolbox.run(prepared, job).await;
    assert!(resident_kib() < before + 40_000, "{} KiB more", resident_kib() - before);
    assert_eq!(outcome.output_bytes, 100_000_009);
    assert!(outcome.content.len() <= limits::TOOL_RESULT_MAX_BYTES);
    let text = String::from_utf8(outcome.content).unwrap();
    assert!(text.starts_with("xxx") && text.ends_with("the end\n") && text.contains("of 100000009 bytes left out"));
    fixture.outputs.end(&output, Duration::ZERO);
    let read = |offset| fixture.outputs.read(&pb::OutputRequest { call_id: call.to_string(), offset, length: 1 << 20 });
    assert_eq!(read(50_000_000).data.len(), 256 * 1024);
    assert_eq!(read(0).total_bytes as u64, limits::TOOL_OUTPUT_KEEP_MAX_BYTES);
}

#[tokio::test]
async fn output_that_is_no_text_arrives_as_it_is() {
    let fixture = Fixture::new();
    let outcome = fixture.run("shell", json!({"command": "printf 'a\\xff\\xfe\\0b'"})).await;
    assert_eq!(outcome.content, b"a\xff\xfe\0b");
}

#[tokio::test]
async fn files_are_read_by_lines() {
    let fixture = Fixture::new();
    let text = fixture.text("read_file", json!({"path": "src/main.rs"})).await;
    assert_eq!(text, "     1\tfn main() {\n     2\t    println!(\"hello\");\n     3\t}\n");
    let text = fixture.text("read_file", json!({"path": "src/main.rs", "offset": 2, "limit": 1})).await;
    assert_eq!(text, "     2\t    println!(\"hello\");\n[more lines follow; go on with offset 3]");
    std::fs::write(fixture.path("long"), format!("{}\n", "y".repeat(3_000_000))).unwrap();
    assert!(fixture.text("read_file", json!({"path": "long"})).await.contains("bytes more]"));
    std::fs::write(fixture.path("many"), "line\n".repeat(100_000)).unwrap();
    let outcome = fixture.run("read_file", json!({"path": "many", "limit": 100_000})).await;
    assert!(outcome.content.len() <= limits::TOOL_RESULT_MAX_BYTES && outcome.content.ends_with(b"]"));
    std::fs::write(fixture.path("empty"), "").unwrap();
    assert!(fixture.text("read_file", json!({"path": "empty"})).await.contains("empty"));
    assert!(fixture.error("read_file", json!({"path": "binary"}), Code::ToolFailed).await.contains("binary"));
    assert!(fixture.error("read_file", json!({"path": "nope"}), Code::ToolFailed).await.contains("does not exist"));
    assert!(
        fixture
            .error("read_file", json!({"path": "src/main.rs", "offset": 9}), Code::ToolFailed)
            .await
            .contains("3 lines")
    );
    for path in ["../secret", "link", "/etc/passwd"] {
        fixture.error("read_file", json!({"path": path}), Code::PathOutsideRoot).await;
    }
}

#[tokio::test]
async fn files_are_written_whole_and_inside() {
    let fixture = Fixture::new();
    let text = fixture.text("write_file", json!({"path": "new/deep/file.txt", "content": "a\nb\n"})).await;
    assert_eq!(text, "created new/deep/file.txt (2 lines, 4 bytes)");
    assert_eq!(std::fs::read_to_string(fixture.path("new/deep/file.txt")).unwrap(), "a\nb\n");
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(fixture.path("src/main.rs"), std::fs::Permissions::from_mode(0o755)).unwrap();
    assert!(fixture.text("write_file", json!({"path": "src/main.rs", "content": "x"})).await.starts_with("replaced"));
    assert_eq!(fixture.path("src/main.rs").metadata().unwrap().permissions().mode() & 0o777, 0o755);
    for path in ["../new", "/tmp/new", "link/new"] {
        let outcome = fixture.run("write_file", json!({"path": path, "content": "x"})).await;
        assert!(outcome.is_error, "{path}");
    }
    fixture.run("write_file", json!({"path": "link", "content": "x"})).await;
    assert_eq!(std::fs::read_to_string(fixture.dir.path().join("secret")).unwrap(), "secret");
    let left: Vec<_> = std::fs::read_dir(fixture.path("src")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[tokio::test]
async fn edits_are_exact_and_say_what_is_wrong() {
    let fixture = Fixture::new();
    let edit = |old: &str, new: &str, all: bool| json!({"path": "src/lib.rs", "old_string": old, "new_string": new, "replace_all": all});
    assert_eq!(
        fixture.text("edit_file", edit("two() -> i32 { 2 }", "two() -> i32 { 3 }", false)).await,
        "edited src/lib.rs at line 2"
    );
    let error = fixture.error("edit_file", edit("-> i32", "-> u32", false), Code::ToolFailed).await;
    assert!(error.contains("2 times") && error.contains("lines 1, 2") && error.contains("replace_all"), "{error}");
    assert_eq!(
        fixture.text("edit_file", edit("-> i32", "-> u32", true)).await,
        "edited src/lib.rs at 2 places, the first at line 1"
    );
    let error = fixture.error("edit_file", edit("pub  fn one()", "x", false), Code::ToolFailed).await;
    assert!(error.contains("white space"), "{error}");
    let error = fixture.error("edit_file", edit("nowhere", "x", false), Code::ToolFailed).await;
    assert!(error.contains("does not occur"), "{error}");
    assert_eq!(
        std::fs::read_to_string(fixture.path("src/lib.rs")).unwrap(),
        "pub fn one() -> u32 { 1 }\npub fn two() -> u32 { 3 }\n"
    );
    std::fs::write(fixture.path("dos"), "a\r\nb\r\n").unwrap();
    let error = fixture
        .error("edit_file", json!({"path": "dos", "old_string": "a\nb", "new_string": "c"}), Code::ToolFailed)
        .await;
    assert!(error.contains("Windows"), "{error}");
    fixture.error("edit_file", json!({"path": "binary", "old_string": "a", "new_string": "c"}), Code::ToolFailed).await;
    fixture
        .error("edit_file", json!({"path": "../secret", "old_string": "s", "new_string": "c"}), Code::PathOutsideRoot)
        .await;
}

#[tokio::test]
async fn directories_are_listed_and_searched() {
    let fixture = Fixture::new();
    let text = fixture.text("list_dir", json!({})).await;
    assert_eq!(text, "src/\ntarget/\n.gitignore (7 bytes)\nbinary (3 bytes)\nlink -> ../secret\n");
    assert!(fixture.error("list_dir", json!({"path": "nope"}), Code::ToolFailed).await.contains("does not exist"));
    fixture.error("list_dir", json!({"path": ".."}), Code::PathOutsideRoot).await;

    let text = fixture.text("glob", json!({"pattern": "*.rs"})).await;
    let mut found: Vec<_> = text.lines().collect();
    found.sort_unstable();
    assert_eq!(found, ["src/lib.rs", "src/main.rs"]);
    assert_eq!(fixture.text("glob", json!({"pattern": "m*.rs", "path": "src"})).await, "src/main.rs\n");
    assert_eq!(fixture.text("glob", json!({"pattern": "nope/**"})).await, "no file fits nope/**");

    let text = fixture.text("grep", json!({"pattern": r"fn \w+\(\)"})).await;
    let mut found: Vec<_> = text.lines().collect();
    found.sort_unstable();
    assert_eq!(found[0], "src/lib.rs:1:pub fn one() -> i32 { 1 }");
    assert_eq!(found.len(), 3, "what is ignored stays out: {text}");
    assert_eq!(
        fixture.text("grep", json!({"pattern": "HELLO", "ignore_case": true, "files_only": true})).await,
        "src/main.rs\n"
    );
    let text = fixture.text("grep", json!({"pattern": "hello", "context": 1, "path": "src/main.rs"})).await;
    assert_eq!(text, "src/main.rs-1-fn main() {\nsrc/main.rs:2:    println!(\"hello\");\nsrc/main.rs-3-}\n");
    assert!(fixture.text("grep", json!({"pattern": "fn", "limit": 1})).await.contains("only the first 1 matches"));
    assert_eq!(
        fixture.text("grep", json!({"pattern": "one()", "literal": true, "glob": "*.rs"})).await.lines().count(),
        1
    );
    assert_eq!(fixture.text("grep", json!({"pattern": "fn", "glob": "*.py"})).await, "nothing matches fn");
    fixture.error("grep", json!({"pattern": "secret", "path": ".."}), Code::PathOutsideRoot).await;
    assert_eq!(fixture.text("grep", json!({"pattern": "secret"})).await, "nothing matches secret");
}
