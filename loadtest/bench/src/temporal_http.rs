//! How long the histories of a chat's workflow runs are, as Temporal's own HTTP API reports it.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail, ensure};
use reliant_devstack::Server;
use reliant_harness::Rig;
use reliant_types::ChatId;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const WORKFLOWS: &str = "/api/v1/namespaces/default/workflows";
const ANSWER_MAX_BYTES: u64 = 4 * 1024 * 1024;

pub struct HttpApi(SocketAddr);

impl HttpApi {
    pub async fn find() -> Result<Self> {
        let pid = Rig::shared_servers().await?.pid(Server::Temporal).context("Temporal does not run")?;
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
        let port = http_port(&line).context("Temporal was started without --http-port")?;
        Ok(Self(SocketAddr::from(([127, 0, 0, 1], port))))
    }

    /// Events of all runs of the chat's workflow so far.
    pub async fn history_events(&self, chat: ChatId) -> Result<u64> {
        let runs = self.get(&format!("{WORKFLOWS}?query=WorkflowId%3D%22chat%3A{chat}%22")).await?;
        let runs = runs["executions"].as_array().with_context(|| format!("no run of chat {chat}"))?;
        let mut events = 0;
        for run in runs {
            let run = run["execution"]["runId"].as_str().context("a run has no id")?;
            let run = self.get(&format!("{WORKFLOWS}/chat%3A{chat}?execution.runId={run}")).await?;
            // protobuf's JSON writes 64-bit numbers as text.
            let length =
                run["workflowExecutionInfo"]["historyLength"].as_str().and_then(|text| text.parse::<u64>().ok());
            events += length.context("a run has no history length")?;
        }
        Ok(events)
    }

    async fn get(&self, path: &str) -> Result<Value> {
        let mut stream = TcpStream::connect(self.0).await?;
        // In HTTP/1.0 an answer has no chunks.
        stream.write_all(format!("GET {path} HTTP/1.0\r\nhost: {}\r\n\r\n", self.0).as_bytes()).await?;
        let mut answer = String::new();
        stream.take(ANSWER_MAX_BYTES).read_to_string(&mut answer).await?;
        let Some((head, body)) = answer.split_once("\r\n\r\n") else { bail!("the answer is not HTTP") };
        let status = head.split_whitespace().nth(1).unwrap_or_default();
        ensure!(status == "200", "Temporal answered {status} to {path}: {body}");
        Ok(serde_json::from_str(body)?)
    }
}

fn http_port(command_line: &str) -> Option<u16> {
    let mut words = command_line.split('\0');
    words.find(|word| *word == "--http-port")?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_follows_its_flag() {
        assert_eq!(http_port("temporal\0server\0--http-port\x007243\0--port\x007233\0"), Some(7243));
        assert_eq!(http_port("temporal\0server\0"), None);
    }
}
