//! What a repository's author may put into it against the daemon, and what ignore files mean.

use std::{fs::File, os::unix::fs::symlink, path::Path, time::Duration};

use reliant_types::{Code, pb};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::Fixture;

fn pipe(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// The files that `glob` finds below a path, sorted.
async fn files(fixture: &Fixture, path: &str) -> Vec<String> {
    let text = fixture.text("glob", json!({"pattern": "**/*", "path": path})).await;
    let mut files: Vec<_> = text.lines().map(str::to_owned).collect();
    files.sort_unstable();
    files
}

fn tree(fixture: &Fixture, files: &[(&str, &str)]) {
    for (path, content) in files {
        let path = fixture.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}

const USUAL: [&str; 5] = [".gitignore", "binary", "link", "src/lib.rs", "src/main.rs"];

#[tokio::test]
async fn ignore_files_that_are_no_files_are_not_opened() {
    for name in [".ignore", "src/.gitignore", "src/.ignore"] {
        for device in ["/dev/zero", "/dev/full", "/proc/self/mem"] {
            let fixture = Fixture::new();
            symlink(device, fixture.path(name)).unwrap();
            let found = files(&fixture, "").await;
            assert!(found.iter().filter(|f| f.ends_with(".rs")).count() == 2, "{name} {device}: {found:?}");
            assert!(fixture.text("grep", json!({"pattern": "fn main"})).await.contains("src/main.rs:1"));
        }
        let fixture = Fixture::new();
        pipe(&fixture.path(name));
        let outcome = fixture.run("glob", json!({"pattern": "*.rs"})).await;
        assert_eq!(outcome.status, pb::ToolCallStatus::Succeeded, "{name}: {outcome:?}");
        assert!(fixture.text("grep", json!({"pattern": "fn main"})).await.contains("src/main.rs:1"));
    }
    let fixture = Fixture::new();
    std::fs::create_dir_all(fixture.path(".git/info")).unwrap();
    pipe(&fixture.path(".git/info/exclude"));
    assert_eq!(files(&fixture, "").await, USUAL);
}

#[tokio::test]
async fn an_endless_ignore_file_costs_a_bounded_piece() {
    let fixture = Fixture::new();
    // One line of a terabyte, and more lines than are read.
    File::create(fixture.path(".ignore")).unwrap().set_len(1 << 40).unwrap();
    let mut lines = "main.rs\n".to_owned();
    lines.push_str(&"no-such-file-1234567890\n".repeat(40_000));
    tree(&fixture, &[("src/.gitignore", &lines)]);
    assert_eq!(files(&fixture, "src").await, ["src/.gitignore", "src/lib.rs"]);
}

#[tokio::test]
async fn a_deep_tree_is_walked_as_far_as_paths_reach() {
    let fixture = Fixture::new();
    let mut dir = fixture.path("deep");
    while dir.as_os_str().len() < 3900 {
        dir.push("d".repeat(20));
    }
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("leaf.txt"), "needle").unwrap();
    let found = fixture.text("grep", json!({"pattern": "needle", "files_only": true})).await;
    assert!(found.contains("leaf.txt"), "{found}");
    assert_eq!(fixture.text("glob", json!({"pattern": "leaf.txt"})).await.lines().count(), 1);
}

#[tokio::test]
async fn ignore_files_above_the_root_have_no_say() {
    let fixture = Fixture::new();
    for name in [".gitignore", ".ignore"] {
        std::fs::write(fixture.dir.path().join(name), "*\n").unwrap();
    }
    std::fs::create_dir(fixture.dir.path().join(".git")).unwrap();
    assert_eq!(files(&fixture, "").await, USUAL);
    assert!(fixture.text("grep", json!({"pattern": "fn main"})).await.contains("src/main.rs"));
}

#[tokio::test]
async fn ignore_files_mean_what_git_says() {
    let fixture = Fixture::new();
    tree(
        &fixture,
        &[
            (".gitignore", "target\n/top.log\n*.tmp\nbuild/\n!keep.tmp\n\\#odd\n# a comment\r\ndocs/*.pdf\n"),
            ("top.log", ""),
            ("sub/top.log", ""),
            ("a.tmp", ""),
            ("sub/keep.tmp", ""),
            ("sub/build/out", ""),
            ("other/build", "a file, not a directory"),
            ("#odd", ""),
            ("docs/a.pdf", ""),
            ("docs/more/b.pdf", ""),
            ("sub/.gitignore", "!b.tmp\n/only\n"),
            ("sub/b.tmp", ""),
            ("sub/only", ""),
            ("sub/in/only", ""),
            ("sub/.ignore", "c.txt\n"),
            ("sub/in/c.txt", ""),
            ("c.txt", ""),
            (".git/info/exclude", "private\n"),
            ("private", ""),
            ("nested/.git/HEAD", ""),
            ("nested/x.tmp", ""),
        ],
    );
    let expected = [
        "c.txt",
        "docs/more/b.pdf",
        "nested/x.tmp",
        "other/build",
        "sub/.gitignore",
        "sub/.ignore",
        "sub/b.tmp",
        "sub/in/only",
        "sub/keep.tmp",
        "sub/top.log",
    ];
    let found = files(&fixture, "").await;
    let found: Vec<_> = found.iter().map(String::as_str).filter(|f| !USUAL.contains(f)).collect();
    assert_eq!(found, expected);
    // From a directory inside, the files above it count as well.
    let found = files(&fixture, "sub").await;
    let below: Vec<_> = expected.into_iter().filter(|f| f.starts_with("sub/")).collect();
    assert_eq!(found, below);
    // What is named is looked into, ignored or not.
    assert_eq!(files(&fixture, "target").await, ["target/out.rs"]);
    assert!(fixture.text("grep", json!({"pattern": "hidden", "path": "target/out.rs"})).await.contains("out.rs:1"));
}

#[tokio::test]
async fn long_reads_end_with_their_call() {
    let fixture = Fixture::new();
    // Text at its head, and then as much nothing as a file may have.
    tree(&fixture, &[("long", &"line\n".repeat(4000))]);
    File::options().write(true).open(fixture.path("long")).unwrap().set_len(1 << 42).unwrap();
    let input = json!({"path": "long", "offset": 1_000_000_000_u64});
    let outcome = fixture.run_for("read_file", input, Duration::from_millis(300)).await;
    let text = String::from_utf8_lossy(&outcome.content).into_owned();
    assert_eq!(outcome.status, pb::ToolCallStatus::TimedOut);
    assert!(!text.contains("does not answer"), "the thread itself ended: {text}");
    let cancel = CancellationToken::new();
    cancel.cancel();
    for (tool, input) in [
        ("read_file", json!({"path": "long"})),
        ("grep", json!({"pattern": "x"})),
        ("grep", json!({"pattern": "x", "path": "long"})),
        ("glob", json!({"pattern": "x"})),
        ("list_dir", json!({})),
    ] {
        let job = fixture.job(Duration::from_secs(20), &cancel);
        let prepared = fixture.toolbox.prepare(&job.root, tool, &input.to_string()).unwrap();
        assert_eq!(fixture.toolbox.run(prepared, job).await.status, pb::ToolCallStatus::Cancelled, "{tool}");
    }
}

#[tokio::test]
async fn what_a_root_declares_of_itself_is_read_within_limits() {
    for kind in ["pipe", "device", "line"] {
        let fixture = Fixture::new();
        for name in ["AGENTS.md", ".mcp.json"] {
            let path = fixture.path(name);
            match kind {
                "pipe" => pipe(&path),
                "device" => symlink("/dev/zero", path).unwrap(),
                _ => File::create(path).unwrap().set_len(1 << 40).unwrap(),
            }
        }
        let root = fixture.roots.get("").unwrap();
        assert!(root.declaration().agents_md.len() <= 32 * 1024, "{kind}");
        assert!(crate::mcp::trust::pending_trust(&fixture.dir.path().join("state"), root.path()).is_err(), "{kind}");
    }
}

#[tokio::test]
async fn a_path_with_a_shells_abbreviation_is_refused_by_all_file_tools() {
    let fixture = Fixture::new();
    for path in ["~/.config/foo", "~root/x", "$HOME/x", "${HOME}/x"] {
        for (tool, input) in [
            ("read_file", json!({"path": path})),
            ("write_file", json!({"path": path, "content": "x"})),
            ("edit_file", json!({"path": path, "old_string": "a", "new_string": "b"})),
            ("list_dir", json!({"path": path})),
            ("glob", json!({"pattern": "*", "path": path})),
            ("grep", json!({"pattern": "x", "path": path})),
        ] {
            let error = fixture.error(tool, input, Code::ToolFailed).await;
            assert!(
                error.contains("relative to the project root") && error.contains(&format!("'./{path}'")),
                "{error}"
            );
        }
    }
    let mut names: Vec<_> = std::fs::read_dir(fixture.path("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort_unstable();
    assert_eq!(names, [".gitignore", "binary", "link", "src", "target"]);
    assert!(fixture.text("write_file", json!({"path": "./~x", "content": "x"})).await.starts_with("created ~x"));
}
