//! Workflow code goes on with the runs that it began: every kept history replays without a difference.
#![allow(clippy::unwrap_used, reason = "a test")]

use reliant_flows::workflow::ChatWorkflow;
use temporalio_sdk::workflow_replayer::{WorkflowReplayer, WorkflowReplayerOptions};

async fn replay(history: &[u8]) -> Result<(), String> {
    let history = temporalio_client::WorkflowHistory::from_json(history).unwrap();
    let options = WorkflowReplayerOptions::new().register_workflow::<ChatWorkflow>().unwrap().build();
    WorkflowReplayer::new(options).unwrap().replay_workflow(history).await.map(drop).map_err(|error| error.to_string())
}

fn histories(folder: &str) -> Vec<(String, String)> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder);
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.display().to_string(), std::fs::read_to_string(&path).unwrap())).collect()
}

#[tokio::test]
async fn kept_histories_replay() {
    let kept = histories("histories");
    assert!(kept.len() >= 5, "the kept histories are gone");
    for (path, history) in kept {
        assert_eq!(replay(history.as_bytes()).await, Ok(()), "{path}");
        // The check itself is checked: a history of other commands is refused.
        let other = history.replace("\"name\": \"burst\"", "\"name\": \"other\"");
        let other = other.replace("\"name\":\"burst\"", "\"name\":\"other\"");
        assert_ne!(other, history);
        assert!(replay(other.as_bytes()).await.is_err(), "{path}");
    }
}

/// Runs of the shape before, with a local activity for each step: they fail at once, and the next wake begins a new run. That
/// they are refused, and not half understood, is what that rests on.
#[tokio::test]
async fn histories_of_the_shape_before_are_refused() {
    let before = histories("histories_before");
    assert!(before.len() >= 5);
    for (path, history) in before {
        assert!(replay(history.as_bytes()).await.is_err(), "{path}");
    }
}
