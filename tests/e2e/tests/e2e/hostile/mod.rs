//! A daemon that is broken, or means harm: what it sends changes nothing that is not its own, is told so, is counted, and
//! nobody else feels it.

mod fake;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use fake::FakeDaemon;
use pb::{connect_request::Frame as Up, connect_response::Frame as Down};
use prost::Message as _;
use reliant_devstack::resident_kib;
use reliant_harness::{DaemonOptions, Person, Rig, RigOptions, eventually};
use reliant_types::{ToolCallId, TurnId, limits, pb};
use serde_json::json;
use tokio::io::AsyncWriteExt as _;

use crate::scripts::{MODEL, PATIENCE, one_call, only_call, session};

/// The sum of a counter's values in all roles, of the series that begin like this.
async fn counted(rig: &Rig, series: &str) -> Result<f64> {
    let mut sum = 0.0;
    for role in rig.mesh.workers.iter().chain(&rig.mesh.gateways) {
        let admin = role.addresses().admin.context("a role has an admin listener")?;
        let (_, text) = reliant_devstack::http_get(admin, "/metrics").await?;
        let values = text.lines().filter(|line| line.starts_with(series)).filter_map(|line| line.rsplit(' ').next());
        sum += values.filter_map(|value| value.parse::<f64>().ok()).sum::<f64>();
    }
    Ok(sum)
}

async fn results(rig: &Rig, outcome: &str) -> Result<f64> {
    counted(rig, &format!("reliant_tool_results_total{{outcome=\"{outcome}\"}}")).await
}

async fn refused(rig: &Rig, reason: &str) -> Result<f64> {
    counted(rig, &format!("reliant_daemon_frames_refused_total{{reason=\"{reason}\"}}")).await
}

/// Counted at least once, soon.
async fn refused_soon(rig: &Rig, reason: &str) -> Result<()> {
    eventually(&format!("a refused frame: {reason}"), PATIENCE, || async {
        Ok((refused(rig, reason).await? >= 1.0).then_some(()))
    })
    .await
}

async fn call_of(person: &Person, turn: TurnId, status: pb::ToolCallStatus) -> Result<pb::ToolCall> {
    eventually(&format!("a call that is {status:?}"), PATIENCE, || async {
        let request = pb::GetTurnRequest { turn_id: turn.to_string(), ..Default::default() };
        let calls = person.client.get_turn(request).await?.tool_calls;
        Ok(calls.into_iter().find(|call| call.status() == status))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn results_that_do_not_fit_change_nothing() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let (ada, eve) = (rig.person("ada").await?, rig.person("eve").await?);
    let laptop = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let journal = reliant_daemon::status(&laptop.state_dir)?.context("the daemon runs")?.incarnation;
    let mut victim = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let command = "until [ -e go ]; do sleep 0.05; done; echo mine";
    let sent = victim.send(&one_call("shell", json!({ "command": command }))).await?;
    let victims: TurnId = sent.turn.context("no turn")?.id.parse()?;
    let running = call_of(&ada, victims, pb::ToolCallStatus::Running).await?;

    // Of no call, of another's, and such as no call can have.
    let mut fake = FakeDaemon::connect(&rig, &eve, "fake").await?;
    let invented = fake.result(&ToolCallId::new().to_string(), 1, "x");
    assert_eq!(fake.offer(&invented).await?, pb::AckOutcome::Discarded);
    let forged = pb::ToolResult {
        incarnation: journal,
        daemon_id: laptop.id.clone(),
        ..fake.result(&running.id, running.generation, "forged")
    };
    assert_eq!(fake.offer(&forged).await?, pb::AckOutcome::Discarded);
    let open = pb::ToolResult { status: pb::ToolCallStatus::Running as i32, ..invented.clone() };
    assert_eq!(fake.offer(&open).await?, pb::AckOutcome::Discarded);
    let nul = pb::ToolResult { incarnation: "\0".into(), error_code: "\0".into(), ..invented.clone() };
    assert_eq!(fake.offer(&nul).await?, pb::AckOutcome::Discarded);
    for outcome in ["unknown", "foreign", "malformed"] {
        assert!(results(&rig, outcome).await? >= 1.0, "{outcome} is not counted");
    }
    fake.out.send(0, Up::Result(pb::ToolResult { call_id: "nonsense".into(), ..invented.clone() })).await?;
    refused_soon(&rig, "result").await?;
    let reply = pb::DispatchReply { call_id: running.id.clone(), generation: 1, ..Default::default() };
    fake.out
        .send(77, Up::DispatchReply(pb::DispatchReply { outcome: pb::DispatchOutcome::Tombstone as i32, ..reply }))
        .await?;
    refused_soon(&rig, "answer").await?;
    let delta = pb::Delta {
        chat_id: victim.chat().to_string(),
        block: Some(pb::BlockRef { target_id: running.id.clone(), block: 0, kind: pb::StreamKind::Stdout as i32 }),
        epoch: running.generation,
        piece: b"forged".to_vec().into(),
        ..Default::default()
    };
    let output = |user: &Person| pb::LiveOutput {
        deltas: vec![delta.clone()],
        lengths: Vec::new(),
        user_id: user.user.to_string(),
        chat_id: victim.chat().to_string(),
    };
    fake.out.send(0, Up::Output(output(&ada))).await?;
    refused_soon(&rig, "output").await?;
    // Of the own user, for another's chat: that is a subject to which nobody of that chat listens.
    fake.out.send(0, Up::Output(output(&eve))).await?;

    // Its own call: the same result twice, and another one afterwards.
    let mut chat = session(&eve, MODEL, pb::ChatMode::Auto).await?;
    let sent = chat.send(&one_call("shell", json!({ "command": "anything" }))).await?;
    let turn: TurnId = sent.turn.context("no turn")?.id.parse()?;
    let dispatch = fake.start().await?;
    let own = fake.result(&dispatch.call_id, dispatch.generation, "eve's own");
    let future = pb::ToolResult { generation: dispatch.generation + 1, ..own.clone() };
    assert_eq!(fake.offer(&future).await?, pb::AckOutcome::Discarded, "a generation that was never sent");
    assert_eq!(fake.offer(&own).await?, pb::AckOutcome::Committed);
    assert_eq!(fake.offer(&own).await?, pb::AckOutcome::Committed);
    assert_eq!(chat.wait_turn(turn, PATIENCE).await?.status(), pb::TurnStatus::Succeeded);
    let other = fake.result(&dispatch.call_id, dispatch.generation, "something else");
    assert_eq!(fake.offer(&other).await?, pb::AckOutcome::Discarded);
    let kept = call_of(&eve, turn, pb::ToolCallStatus::Succeeded).await?;
    assert_eq!(kept.result, "eve's own");
    assert!(results(&rig, "repeated").await? >= 1.0 && results(&rig, "late").await? >= 1.0);

    // After its cancel, which the daemon said it had never seen.
    let sent = chat.send(&one_call("shell", json!({ "command": "anything" }))).await?;
    let turn: TurnId = sent.turn.context("no turn")?.id.parse()?;
    let dispatch = fake.start().await?;
    call_of(&eve, turn, pb::ToolCallStatus::Running).await?;
    assert_eq!(chat.cancel(turn).await?.status(), pb::TurnStatus::Cancelled);
    loop {
        if let (id, Down::Cancel(cancel)) = fake.next().await?.context("the stream ended")? {
            fake.out.send(id, Up::CancelReply(pb::CancelReply { call_id: cancel.call_id, known: false })).await?;
            break;
        }
    }
    call_of(&eve, turn, pb::ToolCallStatus::Cancelled).await?;
    let late = fake.result(&dispatch.call_id, dispatch.generation, "too late");
    assert_eq!(fake.offer(&late).await?, pb::AckOutcome::Discarded);
    assert_ne!(call_of(&eve, turn, pb::ToolCallStatus::Cancelled).await?.result, "too late");

    // All that while the other's call ran on.
    std::fs::write(laptop.root.join("go"), "")?;
    let ended = victim.wait_turn(victims, PATIENCE).await?;
    assert_eq!(ended.status(), pb::TurnStatus::Succeeded);
    assert_eq!(call_of(&ada, victims, pb::ToolCallStatus::Succeeded).await?.result, "mine\n");
    assert!(victim.verification().is_clean(), "{:?}", victim.verification());
    Ok(())
}

/// Turns of somebody else, until told to stop. Answers the longest.
async fn neighbour(ada: Person, stop: &AtomicBool) -> Result<(usize, Duration)> {
    let (mut turns, mut longest) = (0, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
        let begun = Instant::now();
        let report = chat.send_and_wait(&one_call("shell", json!({ "command": "echo here" })), PATIENCE).await?;
        longest = longest.max(begun.elapsed());
        anyhow::ensure!(report.succeeded(), "{:?}", report.turn);
        assert_eq!(only_call(&report).result, "here\n");
        turns += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok((turns, longest))
}

const FLOOD_BYTES: usize = 2 << 30;
const FRAME_BYTES: usize = 2 << 20;
const GROWTH_MAX_KIB: u64 = 96 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn two_gigabytes_and_garbage_harm_nobody_else() -> Result<()> {
    let rig = Rig::start(RigOptions::default()).await?;
    let (ada, eve) = (rig.person("ada").await?, rig.person("eve").await?);
    let _laptop = rig.daemon(&ada, "laptop", DaemonOptions::default()).await?;
    let mut fake = FakeDaemon::connect(&rig, &eve, "fake").await?;
    let mut chat = session(&eve, MODEL, pb::ChatMode::Auto).await?;
    let sent = chat.send(&one_call("shell", json!({ "command": "anything" }))).await?;
    let turn: TurnId = sent.turn.context("no turn")?.id.parse()?;
    let dispatch = fake.start().await?;
    let roles = || rig.mesh.apis.iter().chain(&rig.mesh.workers).chain(&rig.mesh.gateways);
    let before: Vec<u64> = roles().map(|role| resident_kib(role.pid())).collect();

    let stop = AtomicBool::new(false);
    let flood = async {
        let begun = Instant::now();
        let block = pb::BlockRef { target_id: dispatch.call_id.clone(), block: 0, kind: pb::StreamKind::Stdout as i32 };
        for frame in 0..FLOOD_BYTES / FRAME_BYTES {
            let delta = pb::Delta {
                chat_id: dispatch.chat_id.clone(),
                block: Some(block.clone()),
                epoch: dispatch.generation,
                offset: (frame * FRAME_BYTES) as i64,
                piece: vec![b'x'; FRAME_BYTES].into(),
                ..Default::default()
            };
            let (user_id, chat_id) = (dispatch.user_id.clone(), dispatch.chat_id.clone());
            let output = pb::LiveOutput { deltas: vec![delta], lengths: Vec::new(), user_id, chat_id };
            fake.out.send(0, Up::Output(output)).await?;
        }
        let flooded = begun.elapsed();
        // Hellos and declarations without end; the gateway writes a row in a second, not one each.
        let declarations = pb::Declarations {
            tools: (0..5000).map(|n| pb::ToolDeclaration { name: format!("tool-{n}"), ..Default::default() }).collect(),
            roots: Vec::new(),
        };
        let stored = counted(&rig, "reliant_store_transaction_seconds_count{name=\"update_declarations\"").await?;
        for _ in 0..2000 {
            fake.out.raw(fake.hello()).await?;
        }
        for _ in 0..300 {
            fake.out.send(0, Up::Declarations(declarations.clone())).await?;
        }
        let (begun, hello) = (Instant::now(), refused(&rig, "hello"));
        assert!(hello.await? >= 1.0, "no hello was counted");
        fake.out.send(0, Up::Declarations(pb::Declarations::default())).await?;
        let written =
            counted(&rig, "reliant_store_transaction_seconds_count{name=\"update_declarations\"").await? - stored;
        assert!(
            written <= 4.0 + begun.elapsed().as_secs_f64() + flooded.as_secs_f64(),
            "{written} writes of declarations"
        );
        stop.store(true, Ordering::Relaxed);
        anyhow::Ok(flooded)
    };
    let (flooded, others) = tokio::join!(flood, neighbour(ada.clone(), &stop));
    let (flooded, (turns, longest)) = (flooded?, others?);
    for (role, before) in roles().zip(&before) {
        let grown = resident_kib(role.pid()).saturating_sub(*before);
        eprintln!("{}: {grown} KiB more after 2 GiB in {flooded:?}", role.name());
        assert!(grown < GROWTH_MAX_KIB, "{} grew by {grown} KiB", role.name());
    }
    eprintln!("{turns} turns of somebody else meanwhile, the longest took {longest:?}");
    let dropped = counted(&rig, "reliant_queue_refused_total{queue=\"tunnel_output\"}").await?;
    eprintln!("{dropped} of {} pieces were dropped, and counted", FLOOD_BYTES / FRAME_BYTES);
    assert!(dropped > 0.0, "a flood was dropped, and no metric says so");
    assert!(turns > 0 && longest < Duration::from_secs(15), "{turns} turns, the longest {longest:?}");

    // A result as large as a frame may be is shortened, a larger one is no frame.
    let large = fake.result(&dispatch.call_id, dispatch.generation, &"y".repeat(limits::GRPC_MESSAGE_MAX_BYTES));
    fake.out.send(0, Up::Result(large.clone())).await?;
    let away = fake.told_to_go().await?;
    assert!(!away.stop && away.reason.contains("4 MiB"), "{away:?}");
    refused_soon(&rig, "unreadable").await?;
    fake.again().await?;
    let fits = pb::ToolResult { content: large.content.slice(..limits::GRPC_MESSAGE_MAX_BYTES - 4096), ..large };
    assert_eq!(fake.offer(&fits).await?, pb::AckOutcome::Committed);
    assert_eq!(chat.wait_turn(turn, PATIENCE).await?.status(), pb::TurnStatus::Succeeded);
    let call = call_of(&eve, turn, pb::ToolCallStatus::Succeeded).await?;
    assert!(call.result.len() <= limits::TOOL_RESULT_MAX_BYTES, "{}", call.result.len());
    assert!(chat.verification().is_clean(), "{:?}", chat.verification());

    // Garbage, first or later; and what is not even HTTP.
    for garbage in [vec![0xff; 64], vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f], b"GET / HTTP/1.1\r\n\r\n".to_vec()] {
        fake.out.raw(garbage.clone()).await?;
        let away = fake.told_to_go().await?;
        assert!(away.reason.contains("garbage"), "{away:?}");
        let status = fake.first_frame(garbage).await;
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status:?}");
        fake.again().await?;
    }
    let bad = pb::Hello { incarnation: "'; --".into(), ..Default::default() };
    let frame = pb::ConnectRequest { frame: Some(Up::Hello(bad)), ..Default::default() };
    assert_eq!(fake.first_frame(frame.encode_to_vec()).await.code(), tonic::Code::InvalidArgument);
    let gateway = rig.mesh.gateways[0].addresses().listen.context("a gateway listens")?;
    for _ in 0..20 {
        let mut stream = tokio::net::TcpStream::connect(gateway).await?;
        // The gateway may close at the first bytes of it.
        let _ = stream.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00].repeat(10_000)).await;
    }
    assert!(refused(&rig, "unreadable").await? >= 4.0);
    let mut chat = session(&ada, MODEL, pb::ChatMode::Auto).await?;
    let report = chat.send_and_wait(&one_call("shell", json!({ "command": "echo still" })), PATIENCE).await?;
    assert_eq!(only_call(&report).result, "still\n");
    Ok(())
}
