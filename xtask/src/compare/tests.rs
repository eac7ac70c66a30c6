use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::{builds::Builds, *};

/// A bench that measures nothing and answers as one does. `{noise}`: of each figure; `{worse}`: how much more its turns
/// take; `{slices}`: whether it knows them.
const FAKE_BENCH: &str = r#"#!/usr/bin/env python3
import json, os, random, sys
random.seed({seed})
value = lambda middle: middle * random.gauss(1, {noise})
def figures():
    return {{"plain_turn_ms_p50": value(10) * {worse}, "turns_per_s_32": value(50) / {worse},
             "temporal_floor_ms_p50": value(20), "tool_turn_ms_p95": value(10) * 3 * {worse}}}
if sys.argv[1] != "--slices":
    json.dump({{**figures(), "otlp": "off"}}, open(os.environ["BENCH_OUT"], "w"))
elif not {slices}:
    sys.exit("Error: the only flag is --strict, not --slices")
else:
    print(json.dumps({{"parts": ["floors", "turns"]}}), flush=True)
    for number, line in enumerate(sys.stdin):
        print(json.dumps({{"error": "a turn failed"}} if number == {fails_at} else {{"values": figures()}}), flush=True)
"#;

#[derive(Clone, Copy)]
struct Fake {
    seed: u64,
    noise: f64,
    worse: f64,
    slices: bool,
    fails_at: i64,
}

const QUIET: Fake = Fake { seed: 1, noise: 0.02, worse: 1.0, slices: true, fails_at: -1 };

fn fake(dir: &Path, name: &str, fake: Fake) -> PathBuf {
    let dir = dir.join(name);
    fs::create_dir_all(&dir).unwrap();
    let program = dir.join("reliant-bench");
    let python_bool = if fake.slices { "True" } else { "False" };
    let text = FAKE_BENCH
        .replace("{seed}", &fake.seed.to_string())
        .replace("{noise}", &fake.noise.to_string())
        .replace("{worse}", &fake.worse.to_string())
        .replace("{slices}", python_bool)
        .replace("{fails_at}", &fake.fails_at.to_string())
        .replace("{{", "{")
        .replace("}}", "}");
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

async fn compared(a: Fake, b: Fake, rounds: usize) -> (Result<Conclusion>, serde_json::Value) {
    let dir = TempDir::new().unwrap();
    let binaries = [fake(dir.path(), "a", a), fake(dir.path(), "b", b)];
    let commits = ["a", "b"].map(|name| Commit { sha: name.repeat(40), asked: name.to_owned() });
    let parts = ["floors", "turns"].map(str::to_owned);
    let out = dir.path().join("deep/out.json");
    let conclusion = measure(&commits, &binaries, &parts, Some(rounds), &out).await;
    let json = fs::read(&out).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    (conclusion, json)
}

#[tokio::test]
async fn a_build_against_itself_shows_no_difference_and_a_planted_tenth_is_seen() {
    for seed in 0..10 {
        let (same, json) = compared(Fake { seed, ..QUIET }, Fake { seed: seed + 100, ..QUIET }, 24).await;
        assert_eq!(same.unwrap(), Conclusion::NoneWorse, "{json}");
    }
    let (slower, json) = compared(QUIET, Fake { seed: 2, worse: 1.1, ..QUIET }, 24).await;
    assert_eq!((slower.unwrap(), &json["conclusion"]), (Conclusion::Worse, &"worse".into()));
    let verdict = |name: &str| json["figures"][name]["verdict"].as_str().unwrap_or_default().to_owned();
    // A rate that falls is as bad as a time that grows; what nobody has a part in did not move.
    assert_eq!((verdict("plain_turn_ms_p50"), verdict("turns_per_s_32")), ("WORSE".to_owned(), "WORSE".to_owned()));
    assert_eq!(
        (verdict("temporal_floor_ms_p50"), verdict("tool_turn_ms_p95")),
        (String::new(), "not judged".to_owned())
    );
    let (quicker, json) = compared(Fake { worse: 1.1, ..QUIET }, Fake { seed: 2, ..QUIET }, 24).await;
    assert_eq!(quicker.unwrap(), Conclusion::NoneWorse);
    assert_eq!(json["figures"]["plain_turn_ms_p50"]["verdict"], "better");
}

#[tokio::test]
async fn an_unquiet_machine_is_said_to_be_one() {
    let noisy = Fake { noise: 0.3, ..QUIET };
    let (conclusion, json) = compared(noisy, Fake { seed: 2, ..noisy }, 8).await;
    assert_eq!(conclusion.unwrap(), Conclusion::Unclear);
    assert!(json["sentence"].as_str().unwrap().contains("too unquiet"), "{json}");
}

#[tokio::test]
async fn a_bench_without_slices_is_run_whole() {
    let old = Fake { slices: false, ..QUIET };
    let (conclusion, json) = compared(old, Fake { seed: 2, worse: 1.2, ..QUIET }, 8).await;
    assert_eq!(conclusion.unwrap(), Conclusion::Worse);
    assert_eq!(json["figures"]["plain_turn_ms_p50"]["pairs"], 8);
}

#[tokio::test]
async fn a_round_that_fails_is_measured_again() {
    let (conclusion, json) = compared(Fake { fails_at: 9, ..QUIET }, Fake { seed: 2, ..QUIET }, 24).await;
    assert_eq!(conclusion.unwrap(), Conclusion::NoneWorse);
    assert_eq!(json["figures"]["plain_turn_ms_p50"]["pairs"], 23, "the first round warms up");
}

#[tokio::test]
async fn a_part_without_slices_is_named() {
    let dir = TempDir::new().unwrap();
    let binaries = [fake(dir.path(), "a", QUIET), fake(dir.path(), "b", QUIET)];
    let commits = ["a", "b"].map(|name| Commit { sha: name.repeat(40), asked: name.to_owned() });
    let error = measure(&commits, &binaries, &["long".to_owned()], None, Path::new("/nowhere")).await.unwrap_err();
    assert!(error.to_string().contains("no slice of 'long'; A has floors, turns"), "{error:#}");
}

#[test]
fn parts_and_rounds_are_checked() {
    assert_eq!(parts_of("").unwrap(), ["floors", "turns"]);
    assert_eq!(parts_of("turns, trips").unwrap(), ["turns", "trips"]);
    assert!(parts_of("--strict").unwrap_err().to_string().contains("PARTS"));
    assert_eq!((rounds_of("").unwrap(), rounds_of("3").unwrap()), (None, Some(3)));
    for bad in ["2", "x", "100000", "-1"] {
        assert!(rounds_of(bad).unwrap_err().to_string().contains("3 to 200"), "{bad}");
    }
}

/// A repository of two small programs with the names of ours.
struct Repository(TempDir);

impl Repository {
    fn new() -> Self {
        let repository = Self(TempDir::new().unwrap());
        repository.git(&["init", "--quiet", "--initial-branch=main"]);
        repository.write("Makefile", "web:\n\t@true\n");
        repository.write("Cargo.toml", "[workspace]\nresolver = \"3\"\nmembers = [\"cli\", \"loadtest/bench\"]\n");
        for (dir, package, program) in
            [("cli", "reliant-cli", "reliant"), ("loadtest/bench", "reliant-bench", "reliant-bench")]
        {
            let manifest = format!(
                "[package]\nname = \"{package}\"\nedition = \"2024\"\n[[bin]]\nname = \"{program}\"\npath = \"main.rs\"\n"
            );
            repository.write(&format!("{dir}/Cargo.toml"), &manifest);
            repository.write(&format!("{dir}/main.rs"), "fn main() { print!(\"first\"); }\n");
        }
        let lock = "version = 4\n\n[[package]]\nname = \"reliant-bench\"\nversion = \"0.0.0\"\n\n\
                    [[package]]\nname = \"reliant-cli\"\nversion = \"0.0.0\"\n";
        repository.write("Cargo.lock", lock);
        repository.commit("first");
        repository
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn git(&self, args: &[&str]) {
        git(self.path(), args).unwrap();
    }

    fn commit(&self, message: &str) {
        self.git(&["add", "--all"]);
        let who = ["-c", "user.name=test", "-c", "user.email=test@localhost"];
        self.git(&[&who[..], &["commit", "--quiet", "--no-gpg-sign", "-m", message]].concat());
    }
}

#[test]
fn each_commit_is_built_once_from_what_git_has_of_it() {
    let (repository, dir) = (Repository::new(), TempDir::new().unwrap());
    repository.write("cli/main.rs", "fn main() { print!(\"second\"); }\n");
    repository.commit("second");
    repository.write("cli/main.rs", "not committed");
    let builds = Builds::open(repository.path(), dir.path()).unwrap();
    let said = |asked: &str| {
        let commit = commit(repository.path(), asked).unwrap();
        let kept = builds.build(&commit).unwrap();
        let said = Command::new(kept.join("reliant")).output().unwrap().stdout;
        (fs::metadata(kept.join("reliant")).unwrap().modified().unwrap(), String::from_utf8(said).unwrap())
    };
    let (second, first) = (said("HEAD"), said("HEAD~1"));
    assert_eq!((second.1.as_str(), first.1.as_str()), ("second", "first"));
    assert_eq!(said("HEAD"), second, "it is not built again");
    assert!(!dir.path().join("source").exists());
}

#[test]
fn what_cannot_be_compared_is_said_and_leaves_nothing() {
    let (repository, dir) = (Repository::new(), TempDir::new().unwrap());
    let root = repository.path();
    let error = |asked: &str| commit(root, asked).unwrap_err().to_string();
    assert!(error("nowhere").contains("no commit 'nowhere'"));
    assert!(error("--all").contains("no commit '--all'"));

    repository.git(&["rm", "--quiet", "-r", "loadtest"]);
    repository.commit("no bench");
    assert!(error("HEAD").contains("has no bench"));

    repository.git(&["checkout", "--quiet", "HEAD~1", "--", "loadtest"]);
    repository.write("cli/main.rs", "fn main() { this is no Rust }\n");
    repository.commit("broken");
    let head = commit(root, "HEAD").unwrap();
    let builds = Builds::open(root, dir.path()).unwrap();
    let broken = format!("{:#}", builds.build(&head).unwrap_err());
    assert!(broken.contains("does not build") && broken.contains("main.rs"), "{broken}");
    assert!(!dir.path().join("source").exists());
    assert!(fs::read_dir(dir.path().join("kept")).into_iter().flatten().next().is_none());

    let twice = Builds::open(root, dir.path()).unwrap_err().to_string();
    assert!(twice.contains("another comparison is running"), "{twice}");

    refuse_dirty_head(root, &[head.clone(), head.clone()]).unwrap();
    repository.write("cli/main.rs", "changed\n");
    let dirty = refuse_dirty_head(root, &[head.clone(), head.clone()]).unwrap_err().to_string();
    assert!(dirty.contains("1 files differ from 'HEAD'"), "{dirty}");
    let before = commit(root, "HEAD~2").unwrap();
    refuse_dirty_head(root, &[before.clone(), before]).unwrap();
}
