//! A private Temporal development server, with its state in one SQLite file.

use std::{ffi::OsString, path::Path, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

pub(crate) const DB_FILE: &str = "temporal.db";
const PROBE: Duration = Duration::from_secs(1);

/// With the server's defaults a turn takes 100 ms instead of 14: its queue processors poll slowly and its task
/// queues have four partitions each. The pragmas keep every acknowledged write over a kill of the server.
const DYNAMIC_CONFIG: [&str; 6] = [
    "history.transferProcessorMaxPollRPS=2000",
    "history.timerProcessorMaxPollRPS=2000",
    "matching.numTaskqueueReadPartitions=1",
    "matching.numTaskqueueWritePartitions=1",
    "history.workflowIdReuseMinimalInterval=\"0s\"",
    "history.timerProcessorMaxTimeShift=\"50ms\"",
];
const SQLITE_PRAGMAS: [&str; 2] = ["journal_mode=WAL", "synchronous=NORMAL"];

#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    pub grpc: u16,
    pub http: u16,
    pub metrics: u16,
}

pub(crate) fn args(data_dir: &Path, ports: Ports) -> Vec<OsString> {
    let mut args: Vec<OsString> =
        ["server", "start-dev", "--headless", "--ip", "127.0.0.1", "--log-level", "warn"].map(OsString::from).into();
    for (flag, port) in [("--port", ports.grpc), ("--http-port", ports.http), ("--metrics-port", ports.metrics)] {
        args.extend([OsString::from(flag), port.to_string().into()]);
    }
    args.extend(["--db-filename".into(), data_dir.join(DB_FILE).into_os_string()]);
    for pragma in SQLITE_PRAGMAS {
        args.extend(["--sqlite-pragma", pragma].map(OsString::from));
    }
    for value in DYNAMIC_CONFIG {
        args.extend(["--dynamic-config-value", value].map(OsString::from));
    }
    args
}

/// Ready is when the default namespace can be asked for: an open port alone is too early.
pub(crate) async fn is_ready(ports: Ports) -> bool {
    let ask = async {
        drop(TcpStream::connect(("127.0.0.1", ports.grpc)).await?);
        let mut stream = TcpStream::connect(("127.0.0.1", ports.http)).await?;
        let request = "GET /api/v1/namespaces/default HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut status = [0; 12];
        stream.read_exact(&mut status).await?;
        std::io::Result::Ok(&status == b"HTTP/1.1 200")
    };
    matches!(timeout(PROBE, ask).await, Ok(Ok(true)))
}
