//! An error is one line of JSON with its causes, and leads to its trace.

use anyhow::{Context as _, Result};
use reliant_devstack::Server;
use reliant_harness::{Rig, RigOptions, eventually};
use reliant_types::pb;
use serde_json::Value;

use super::traced;
use crate::scripts::{PATIENCE, session};

/// Every line of every role, each of which must be one JSON object.
fn lines(rig: &Rig) -> Result<Vec<Value>> {
    let mut lines = Vec::new();
    for entry in std::fs::read_dir(rig.dir().join("logs"))? {
        let path = entry?.path();
        let text = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
        // The last one may be half written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            let line: Value = serde_json::from_str(line).with_context(|| format!("{}: {line}", path.display()))?;
            lines.push(line);
        }
    }
    Ok(lines)
}

fn text<'a>(line: &'a Value, key: &str) -> &'a str {
    line[key].as_str().unwrap_or_default()
}

/// A line of this level, whose error holds all of these.
async fn said(rig: &Rig, level: &str, message: &str, error: &[&str]) -> Result<Value> {
    let what = format!("the line '{message}'");
    let found = eventually(&what, PATIENCE, || async {
        let fits = |line: &Value| {
            text(line, "level") == level
                && text(line, "message") == message
                && error.iter().all(|part| text(line, "error").contains(part))
        };
        Ok(lines(rig)?.into_iter().find(fits))
    });
    found.await.with_context(|| {
        let all = lines(rig).unwrap_or_default();
        let errors: Vec<_> = all.iter().filter(|line| !line["error"].is_null()).map(Value::to_string).collect();
        format!("no such line; those with an error are:\n{}", errors.join("\n"))
    })
}

#[track_caller]
fn leads_to_its_trace(line: &Value) {
    assert_eq!((text(line, "trace_id").len(), text(line, "span_id").len()), (32, 16), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_is_one_line_with_its_causes_and_leads_to_its_trace() -> Result<()> {
    let config = "[telemetry]\nlog = \"info,reliant_api=debug\"\n".to_owned();
    let (rig, sink) = traced(RigOptions { config, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;

    // The provider says no.
    let mut chat = session(&ada, "sim/fault?kind=401", pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait("marked-question", PATIENCE).await?;
    assert_eq!(report.turn.status(), pb::TurnStatus::Failed);
    let line = said(&rig, "WARN", "a turn failed", &["status 401", "Incorrect API key"]).await?;
    leads_to_its_trace(&line);
    assert_eq!(
        (text(&line, "trace_id"), text(&line, "turn.id")),
        (report.turn.trace_id.as_str(), report.turn.id.as_str())
    );
    let logs = sink.logs(&report.turn.trace_id);
    let exported = eventually("the same line at the collector", PATIENCE, || async {
        Ok(sink.logs(&report.turn.trace_id).into_iter().find(|log| log.message == "a turn failed"))
    });
    assert_eq!(exported.await.with_context(|| format!("{logs:?}"))?.span_id, text(&line, "span_id"));

    // It fails, and is asked again.
    let mut chat = session(&ada, "sim/fault?kind=503&times=1&retry_after=0.1", pb::ChatMode::Auto).await?;
    assert!(chat.send_and_wait("marked-question", PATIENCE).await?.succeeded());
    leads_to_its_trace(&said(&rig, "WARN", "the model call is tried again", &["status 503"]).await?);

    // Postgres lets nobody in.
    rig.close_database(true).await?;
    let request = pb::ListChatsRequest::default();
    assert!(ada.client.list_chats(request.clone()).await.is_err());
    let refused = "is not currently accepting connections";
    let line =
        said(&rig, "ERROR", "a request failed in the store", &["the database refused a statement: ", refused]).await?;
    leads_to_its_trace(&line);
    assert_eq!(text(&line, "error").matches(refused).count(), 1, "{line}");
    rig.close_database(false).await?;
    eventually("an api that has its database again", PATIENCE, || async {
        Ok(ada.client.list_chats(request.clone()).await.ok())
    })
    .await?;

    // NATS is away: what a hint could not tell is found by viewers, and is said at debug.
    rig.nats.kill(Server::Nats)?;
    ada.chat("sim/default", pb::ChatMode::Auto).await?;
    let message = "a hint was not published; viewers will find what it told of";
    said(&rig, "DEBUG", message, &["NATS"]).await?;

    let all = lines(&rig)?;
    for line in all.iter().filter(|line| matches!(text(line, "level"), "WARN" | "ERROR")) {
        assert!(!text(line, "error").contains('\n'), "{line}");
    }
    let whole = all.iter().map(Value::to_string).collect::<String>();
    for secret in ["marked-question", ada.token.as_str(), "Bearer ", "postgres://"] {
        let at = whole.find(secret);
        assert!(at.is_none(), "'{secret}' was logged: {}", at.map_or("", |at| &whole[at.saturating_sub(300)..at]));
    }
    Ok(())
}
