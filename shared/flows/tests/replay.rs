//! Workflow code that was released must go on with the runs it began: every kept history replays without a difference.
#![allow(clippy::unwrap_used, reason = "a test")]

use reliant_flows::workflow::ChatWorkflow;
use temporalio_sdk::workflow_replayer::{WorkflowReplayer, WorkflowReplayerOptions};

async fn replay(history: &[u8]) -> Result<(), String> {
    let history = temporalio_client::WorkflowHistory::from_json(history).unwrap();
    let options = WorkflowReplayerOptions::new().register_workflow::<ChatWorkflow>().unwrap().build();
    WorkflowReplayer::new(options).unwrap().replay_workflow(history).await.map(drop).map_err(|error| error.to_string())
}

#[tokio::test]
async fn kept_histories_replay() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/histories");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let history = std::fs::read_to_string(&path).unwrap();
        assert_eq!(replay(history.as_bytes()).await, Ok(()), "{}", path.display());
        // The check itself is checked: a history of other commands is refused.
        let other = history
            .replace("\"name\": \"call_model\"", "\"name\": \"call_other\"")
            .replace("\"name\":\"call_model\"", "\"name\":\"call_other\"");
        assert_ne!(other, history);
        assert!(replay(other.as_bytes()).await.is_err(), "{}", path.display());
        count += 1;
    }
    assert!(count >= 5, "the kept histories are gone");
}
