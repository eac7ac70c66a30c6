//! When all is over: every run that Temporal still has must replay with the workflow code that drove it.

use std::{path::Path, time::Duration};

use reliant_flows::{
    FlowsConfig,
    histories::{ReplayLimits, replay_chats},
};
use reliant_harness::Arena;

/// The longest of one history.
const EACH: Duration = Duration::from_secs(30);

/// What came of it.
#[derive(Debug, Default, Clone)]
pub struct Histories {
    pub replayed: usize,
    /// A line for each that differs.
    pub differing: Vec<String>,
    /// Why some were not replayed, if so.
    pub not_replayed: Option<String>,
}

/// Replays all of them and saves those that differ below `evidence`.
pub async fn check(arena: &Arena, evidence: &Path, limit: Duration) -> Histories {
    let config = FlowsConfig {
        address: arena.temporal_url(),
        task_queue: arena.task_queue().to_owned(),
        ..FlowsConfig::default()
    };
    let report = match replay_chats(&config, ReplayLimits { each: EACH, total: limit }).await {
        Ok(report) => report,
        Err(error) => {
            return Histories { not_replayed: Some(format!("none could be read: {error}")), ..Histories::default() };
        }
    };
    let mut histories = Histories { replayed: report.replayed, ..Histories::default() };
    if report.skipped > 0 {
        let why = report.skipped_because.unwrap_or_default();
        histories.not_replayed = Some(format!("{} of {}: {why}", report.skipped, report.skipped + report.replayed));
    }
    for one in report.differences {
        let place = match one.history_json.is_empty() {
            true => "not saved, others were".to_owned(),
            false => save(evidence, &one.run_id, &one.history_json),
        };
        let line = format!("{} run {}: {}; {place}", one.workflow_id, one.run_id, one.error);
        histories.differing.push(line);
    }
    histories
}

fn save(evidence: &Path, run: &str, json: &[u8]) -> String {
    let path = evidence.join(format!("differs-{run}.json"));
    let written = std::fs::create_dir_all(evidence).and_then(|()| std::fs::write(&path, json));
    match written {
        Ok(()) => format!("saved in {}", path.display()),
        Err(error) => format!("not saved in {}: {error}", path.display()),
    }
}
