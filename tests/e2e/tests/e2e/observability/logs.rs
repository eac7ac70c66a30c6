//! An error is one line of JSON with its causes, and leads to its trace.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use reliant_devstack::Server;
use reliant_harness::{DaemonOptions, Rig, RigOptions, eventually};
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

/// A line of this role and level, whose error holds all of these.
async fn said(rig: &Rig, role: &str, level: &str, message: &str, error: &[&str]) -> Result<Value> {
    let fits = |line: &Value| error.iter().all(|part| text(line, "error").contains(part));
    such(rig, role, level, message, fits).await
}

async fn such(rig: &Rig, role: &str, level: &str, message: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
    let what = format!("the line '{message}' of {role}");
    let found = eventually(&what, PATIENCE, || async {
        Ok(lines(rig)?.into_iter().find(|line| says(line, role, level, message) && fits(line)))
    });
    found.await.with_context(|| {
        let all = lines(rig).unwrap_or_default();
        let errors: Vec<_> = all.iter().filter(|line| !line["error"].is_null()).map(Value::to_string).collect();
        format!("no such line; those with an error are:\n{}", errors.join("\n"))
    })
}

fn says(line: &Value, role: &str, level: &str, message: &str) -> bool {
    let service = format!("reliant-{role}");
    (text(line, "service"), text(line, "level"), text(line, "message")) == (service.as_str(), level, message)
}

#[track_caller]
fn leads_to_its_trace(line: &Value) {
    assert_eq!((text(line, "trace_id").len(), text(line, "span_id").len()), (32, 16), "{line}");
}

fn is_loud(line: &Value) -> bool {
    matches!(text(line, "level"), "WARN" | "ERROR")
}

fn how_often(rig: &Rig, role: &str, level: &str, message: &str) -> Result<usize> {
    Ok(lines(rig)?.iter().filter(|line| says(line, role, level, message)).count())
}

/// Of all loud lines of the trace that `line` leads to, it alone tells of this cause, under whatever message.
fn is_the_only_one(rig: &Rig, line: &Value, cause: &str) -> Result<()> {
    let is_same = |other: &&Value| {
        is_loud(other) && other["trace_id"] == line["trace_id"] && text(other, "error").contains(cause)
    };
    let all = lines(rig)?;
    let same: Vec<_> = all.iter().filter(is_same).map(Value::to_string).collect();
    anyhow::ensure!(same == [line.to_string()], "not one line, but:\n{}", same.join("\n"));
    Ok(())
}

/// The same words twice in one trace are one error that was logged on its way, too.
#[track_caller]
fn none_is_said_twice(lines: &[Value]) {
    let mut said: BTreeMap<(&str, &str), Vec<&Value>> = BTreeMap::new();
    let in_traces = lines.iter().filter(|line| is_loud(line) && !line["trace_id"].is_null());
    for line in in_traces.filter(|line| !line["error"].is_null()) {
        said.entry((text(line, "trace_id"), text(line, "error"))).or_default().push(line);
    }
    assert!(said.len() > 2, "hardly an error was provoked: {said:?}");
    for (error, lines) in said {
        assert_eq!(lines.len(), 1, "{error:?} stands on {lines:#?}");
    }
}

/// What the gateway of this rig counts as failed, once it has counted any.
async fn renewals_that_failed(rig: &Rig) -> Result<usize> {
    const SERIES: &str = "reliant_lease_renewals_total{outcome=\"failed\"} ";
    let admin = rig.mesh.gateways[0].addresses().admin.context("a role has an admin listener")?;
    let scraped = reliant_devstack::http_get(admin, "/metrics").await?.1;
    let value = scraped.lines().find_map(|line| line.strip_prefix(SERIES)).unwrap_or("0");
    Ok(value.parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_is_one_line_with_its_causes_and_leads_to_its_trace() -> Result<()> {
    let config = "[telemetry]\nlog = \"info,reliant_api=debug,reliant_daemon=debug\"\n".to_owned();
    let (mut rig, sink) = traced(RigOptions { config, ..Default::default() }).await?;
    let ada = rig.person("ada").await?;
    let _daemon = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;

    // The provider says no.
    let mut chat = session(&ada, "sim/fault?kind=401", pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait("marked-question", PATIENCE).await?;
    assert_eq!(report.turn.status(), pb::TurnStatus::Failed);
    let line = said(&rig, "worker", "WARN", "a turn failed", &["status 401", "Incorrect API key"]).await?;
    leads_to_its_trace(&line);
    is_the_only_one(&rig, &line, "Incorrect API key")?;
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
    let line = said(&rig, "worker", "WARN", "the model call is tried again", &["status 503"]).await?;
    leads_to_its_trace(&line);
    is_the_only_one(&rig, &line, "status 503")?;

    // Postgres lets nobody in.
    rig.close_database(true).await?;
    let request = pb::ListChatsRequest::default();
    assert!(ada.client.list_chats(request.clone()).await.is_err());
    let refused = "is not currently accepting connections";
    let is_asked = |line: &Value| text(line, "name") == "list_chats";
    let line = such(&rig, "api", "ERROR", "the database refused a statement", is_asked).await?;
    leads_to_its_trace(&line);
    is_the_only_one(&rig, &line, refused)?;
    assert_eq!(text(&line, "error").matches(refused).count(), 1, "{line}");

    // A gateway cannot renew its daemons' leases: as many lines as it counts failures.
    let unrenewed = "leases were not renewed; tried again";
    said(&rig, "gateway", "WARN", unrenewed, &[refused]).await?;
    eventually("a line for each lease renewal that failed, and no other", PATIENCE, || async {
        let counted = renewals_that_failed(&rig).await?;
        Ok((counted > 0 && how_often(&rig, "gateway", "WARN", unrenewed)? == counted).then_some(()))
    })
    .await?;
    rig.close_database(false).await?;
    eventually("an api that has its database again", PATIENCE, || async {
        Ok(ada.client.list_chats(request.clone()).await.ok())
    })
    .await?;

    // NATS is away: what a hint could not tell is found by viewers, and is said at debug.
    rig.nats.kill(Server::Nats)?;
    ada.chat("sim/default", pb::ChatMode::Auto).await?;
    let message = "a hint was not published; viewers will find what it told of";
    said(&rig, "api", "DEBUG", message, &["NATS"]).await?;

    // A daemon's gateway is gone: it says so once, however often it dials.
    let unconnected = "not connected";
    let before = how_often(&rig, "daemon", "WARN", unconnected)?;
    rig.mesh.gateways[0].kill();
    eventually("a daemon that has dialled in vain for some time", PATIENCE, || async {
        Ok((how_often(&rig, "daemon", "DEBUG", unconnected)? >= 3).then_some(()))
    })
    .await?;
    assert_eq!(how_often(&rig, "daemon", "WARN", unconnected)?, before + 1);

    let all = lines(&rig)?;
    none_is_said_twice(&all);
    for line in all.iter().filter(|line| is_loud(line)) {
        assert!(!text(line, "error").contains('\n'), "{line}");
    }
    let whole = all.iter().map(Value::to_string).collect::<String>();
    for secret in ["marked-question", ada.token.as_str(), "Bearer ", "postgres://"] {
        let at = whole.find(secret);
        assert!(at.is_none(), "'{secret}' was logged: {}", at.map_or("", |at| &whole[at.saturating_sub(300)..at]));
    }
    Ok(())
}
