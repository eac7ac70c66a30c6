//! One piece of text from the model server to a client, and to 200 viewers. The simulator writes the time into each piece.

use std::time::Duration;

use anyhow::{Result, ensure};
use reliant_client::{ChatSession, Client, ClientConfig, ClientUpdate};
use reliant_types::{ChatId, TurnId, pb, unix_us};

use reliant_load::Samples;

use crate::{Bench, report::Report};

const VIEWERS: usize = 200;
const VIEWERS_PER_CONNECTION: usize = 50;
const PATIENCE: Duration = Duration::from_secs(60);

pub async fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let seconds = bench.amount.stream_seconds;
    for (key, rate) in [("chunk_ms_p50", 50), ("chunk_200_ms_p50", 200)] {
        let tokens = rate * seconds;
        let chat = chat(bench, rate, tokens).await?;
        let session = bench.ada.client.open(chat).await?;
        let turn: TurnId = send(&session).await?;
        let times = watch(session, turn).await?;
        ensure!(times.len() > tokens / 2, "only {} of {tokens} pieces carried their time", times.len());
        report.set(key, Samples::plain(times).at(0.5));
    }

    let chat = chat(bench, 50, 50 * seconds).await?;
    let mut viewers = Vec::with_capacity(VIEWERS);
    for replica in 0..bench.rig.mesh.apis.len() {
        let share = VIEWERS / bench.rig.mesh.apis.len();
        for _ in 0..share / VIEWERS_PER_CONNECTION {
            let config = ClientConfig::new(bench.rig.mesh.api_url(replica), bench.ada.token.clone());
            let client = Client::connect(config).await?;
            for _ in 0..VIEWERS_PER_CONNECTION {
                viewers.push(client.open(chat).await?);
            }
        }
    }
    ensure!(viewers.len() == VIEWERS, "{} viewers", viewers.len());
    let turn = send(&viewers[0]).await?;
    let watching = viewers.into_iter().map(|session| tokio::spawn(watch(session, turn)));
    let mut all = Vec::new();
    for times in futures::future::join_all(watching).await {
        all.extend(times??);
    }
    let samples = Samples::plain(all);
    report.set("fanout_200_ms_p50", samples.at(0.5));
    report.set("fanout_200_ms_p95", samples.at(0.95));
    Ok(())
}

async fn chat(bench: &Bench, rate: usize, tokens: usize) -> Result<ChatId> {
    let model = format!("sim/text?tokens={tokens}&rate={rate}&stamp=1");
    Ok(bench.ada.chat(&model, pb::ChatMode::Auto).await?.id.parse()?)
}

async fn send(session: &ChatSession) -> Result<TurnId> {
    let turn = session.send("go").await?.turn.unwrap_or_default();
    Ok(turn.id.parse()?)
}

/// Milliseconds from the simulator to here, of each piece.
async fn watch(mut session: ChatSession, turn: TurnId) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    let work = async {
        loop {
            let ended = session.view().turns.get(&turn.to_string()).is_some_and(|turn| turn.ended_at.is_some());
            if ended {
                return Ok::<(), anyhow::Error>(());
            }
            if let ClientUpdate::Delta(delta) = session.next().await? {
                let now = unix_us();
                for stamp in stamps(&delta.piece) {
                    times.push((now - stamp) as f64 / 1000.0);
                }
            }
        }
    };
    tokio::time::timeout(PATIENCE, work).await??;
    ensure!(session.verification().is_clean(), "the stream broke its promise: {:?}", session.verification());
    Ok(times)
}

/// The times in a piece: digits before a ';' with as many digits as microseconds since 1970 have.
fn stamps(piece: &[u8]) -> Vec<i64> {
    const DIGITS: usize = 16;
    let text = String::from_utf8_lossy(piece);
    let mut found = Vec::new();
    for part in text.split(';') {
        if let Some(digits) = part.len().checked_sub(DIGITS).and_then(|from| part.get(from..))
            && let Ok(stamp) = digits.parse()
        {
            found.push(stamp);
        }
    }
    found
}
