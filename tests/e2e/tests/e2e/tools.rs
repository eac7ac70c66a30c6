//! The daemon's own tools, through the whole line, with the input that breaks careless ones.

use anyhow::{Context as _, Result};
use reliant_client::ChatSession;
use reliant_harness::{DaemonOptions, Rig, RigOptions, TestDaemon};
use reliant_types::{limits, pb};
use serde_json::{Value, json};

use crate::scripts::{MODEL, PATIENCE, one_call, only_call, session};

/// The most memory that a process ever had.
fn peak_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

struct Desk {
    _rig: Rig,
    daemon: TestDaemon,
    session: ChatSession,
}

impl Desk {
    async fn open(files: Vec<(&'static str, String)>) -> Result<Self> {
        let rig = Rig::start(RigOptions::default()).await?;
        let ada = rig.person("ada").await?;
        let daemon = rig.daemon(&ada, "laptop", DaemonOptions { files, ..Default::default() }).await?;
        let session = session(&ada, MODEL, pb::ChatMode::Auto).await?;
        Ok(Self { _rig: rig, daemon, session })
    }

    /// Runs one call; its turn must come to a good end whatever became of the call.
    async fn call(&mut self, tool: &str, args: Value) -> Result<pb::ToolCall> {
        let report = self.session.send_and_wait(&one_call(tool, args), PATIENCE).await?;
        assert!(report.succeeded(), "{tool}: {:?}", report.turn);
        Ok(only_call(&report).clone())
    }

    async fn refused(&mut self, tool: &str, args: Value, code: &str) -> Result<()> {
        let call = self.call(tool, args.clone()).await?;
        assert!(call.is_error && call.error_code == code, "{tool} {args}: expected {code}, got {call:?}");
        assert!(call.result.len() > 20, "{tool}: no sentence in {:?}", call.result);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn file_tools_work_on_the_root() -> Result<()> {
    let mut desk = Desk::open(vec![("src/a.rs", "fn one() {}\nfn two() {}\n".into())]).await?;
    let done = |call: &pb::ToolCall| assert!(!call.is_error, "{call:?}");
    let call = desk.call("read_file", json!({ "path": "src/a.rs" })).await?;
    assert!(call.result.contains("fn two()"), "{call:?}");
    done(&desk.call("write_file", json!({ "path": "new/deep/b.txt", "content": "hello\n" })).await?);
    let edit = json!({ "path": "src/a.rs", "old_string": "one", "new_string": "uno" });
    done(&desk.call("edit_file", edit).await?);
    assert_eq!(std::fs::read_to_string(desk.daemon.root.join("src/a.rs"))?, "fn uno() {}\nfn two() {}\n");
    for (tool, args, expected) in [
        ("list_dir", json!({ "path": "." }), "src"),
        ("glob", json!({ "pattern": "**/*.rs" }), "src/a.rs"),
        ("grep", json!({ "pattern": "fn t.o" }), "src/a.rs"),
    ] {
        let call = desk.call(tool, args).await?;
        done(&call);
        assert!(call.read_only && call.result.contains(expected), "{tool}: {call:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_calls_get_a_sentence_and_a_code() -> Result<()> {
    let mut desk = Desk::open(vec![("twice.txt", "x\nx\n".into())]).await?;
    std::os::unix::fs::symlink("/etc", desk.daemon.root.join("escape"))?;
    desk.refused("no_such_tool", json!({}), "TOOL_UNKNOWN").await?;
    desk.refused("read_file", json!({ "path": 7 }), "TOOL_ARGUMENTS_INVALID").await?;
    desk.refused("shell", json!({}), "TOOL_ARGUMENTS_INVALID").await?;
    desk.refused("read_file", json!({ "path": "../../../etc/passwd" }), "PATH_OUTSIDE_ROOT").await?;
    desk.refused("read_file", json!({ "path": "/etc/passwd" }), "PATH_OUTSIDE_ROOT").await?;
    desk.refused("write_file", json!({ "path": "escape/reliant", "content": "" }), "PATH_OUTSIDE_ROOT").await?;
    desk.refused("edit_file", json!({ "path": "twice.txt", "old_string": "x", "new_string": "y" }), "TOOL_FAILED")
        .await?;
    desk.refused("read_file", json!({ "path": "absent.txt" }), "TOOL_FAILED").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_and_broken_output_is_cut_and_never_lost_silently() -> Result<()> {
    let mut desk = Desk::open(vec![]).await?;
    desk.call("shell", json!({ "command": "echo warm" })).await?;
    let before = peak_kib(desk.daemon.process.pid())?;
    let call =
        desk.call("shell", json!({ "command": "yes 0123456789 | head -c 104857600; echo; echo the-end" })).await?;
    let grown = peak_kib(desk.daemon.process.pid())? - before;
    assert!(grown < 48 * 1024, "the daemon grew by {grown} KiB for 100 MB of output");
    assert_eq!(call.status(), pb::ToolCallStatus::Succeeded, "{}", call.error_code);
    assert!(call.output_bytes > 100_000_000, "{}", call.output_bytes);
    assert!(call.result.len() <= limits::TOOL_RESULT_MAX_BYTES, "{}", call.result.len());
    assert!(call.result.contains("the-end"), "the tail is kept");
    let call = desk.call("shell", json!({ "command": r"printf '\xff\xfe\x00 bytes'" })).await?;
    assert_eq!(call.status(), pb::ToolCallStatus::Succeeded);
    assert_eq!(call.result, "\u{fffd}\u{fffd}\u{fffd} bytes", "what is no text is marked, what is text is kept");
    let call = desk.call("shell", json!({ "command": "exit 3" })).await?;
    assert_eq!(call.exit_code, Some(3), "{call:?}");
    let call = desk.call("shell", json!({ "command": "sleep 60", "timeout_seconds": 1 })).await?;
    assert_eq!(call.status(), pb::ToolCallStatus::TimedOut, "{call:?}");
    Ok(())
}
