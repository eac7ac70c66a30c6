//! A daemon that is none: it says hello, and then whatever a test wants, frames that are garbage among it.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::{SinkExt as _, channel::mpsc};
use pb::{connect_request::Frame as Up, connect_response::Frame as Down};
use prost::Message as _;
use reliant_harness::{Person, Rig, within};
use reliant_types::{Incarnation, pb};
use tonic::{
    Status, Streaming,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

const ANSWER: Duration = Duration::from_secs(20);
const FRAMES_WAITING: usize = 8;

/// Bytes as they are.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(buffer, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut item = vec![0; bytes::Buf::remaining(buffer)];
        bytes::Buf::copy_to_slice(buffer, &mut item);
        Ok(Some(item))
    }
}

/// The way in which frames leave; may be used beside the daemon itself.
#[derive(Clone)]
pub struct Out(mpsc::Sender<Vec<u8>>);

impl Out {
    /// Waits while the gateway takes nothing; an error once the stream is gone.
    pub async fn raw(&mut self, bytes: Vec<u8>) -> Result<()> {
        within("room on the stream", ANSWER, self.0.send(bytes)).await?.context("the stream is gone")
    }

    pub async fn send(&mut self, request_id: u64, frame: Up) -> Result<()> {
        self.raw(pb::ConnectRequest { trace: None, request_id, frame: Some(frame) }.encode_to_vec()).await
    }
}

pub struct FakeDaemon {
    pub id: String,
    pub incarnation: String,
    pub out: Out,
    from: Streaming<Vec<u8>>,
    token: String,
    address: String,
}

impl FakeDaemon {
    /// Registers for this person, dials and is welcomed.
    pub async fn connect(rig: &Rig, person: &Person, name: &str) -> Result<Self> {
        let request = pb::RegisterDaemonRequest { name: name.to_owned(), replace: true };
        let made = person.client.register_daemon(request).await?;
        let (incarnation, address) = (Incarnation::new().to_string(), rig.mesh.gateway_url(0));
        let (out, from) = dial(&address, &made.token, hello(&incarnation)).await?;
        let mut fake = Self { id: made.daemon_id, incarnation, out, from, token: made.token, address };
        fake.welcomed().await?;
        rig.connected(person, &fake.id, true).await?;
        Ok(fake)
    }

    async fn welcomed(&mut self) -> Result<()> {
        match self.next().await? {
            Some((_, Down::Welcome(_))) => Ok(()),
            other => bail!("no welcome, but {other:?}"),
        }
    }

    /// Dials anew, as a daemon whose stream was lost.
    pub async fn again(&mut self) -> Result<()> {
        (self.out, self.from) = dial(&self.address, &self.token, hello(&self.incarnation)).await?;
        self.welcomed().await
    }

    /// What the gateway answers to these bytes where a hello belongs.
    pub async fn first_frame(&self, bytes: Vec<u8>) -> Status {
        match dial(&self.address, &self.token, bytes).await {
            Err(error) => error.downcast().unwrap_or_else(|error| Status::unknown(format!("{error:#}"))),
            Ok(_) => Status::ok("it was let in"),
        }
    }

    pub fn hello(&self) -> Vec<u8> {
        hello(&self.incarnation)
    }

    /// The next frame; None: the stream has ended.
    pub async fn next(&mut self) -> Result<Option<(u64, Down)>> {
        match within("a frame of the gateway", ANSWER, self.from.message()).await? {
            Ok(Some(bytes)) => {
                let response = pb::ConnectResponse::decode(bytes.as_slice())?;
                Ok(Some((response.request_id, response.frame.context("an empty frame")?)))
            }
            Ok(None) | Err(_) => Ok(None),
        }
    }

    /// Waits for the next dispatch, and says that the call has started.
    pub async fn start(&mut self) -> Result<pb::Dispatch> {
        loop {
            let (id, frame) = self.next().await?.context("the stream ended")?;
            if let Down::Dispatch(dispatch) = frame {
                let reply = pb::DispatchReply {
                    call_id: dispatch.call_id.clone(),
                    generation: dispatch.generation,
                    outcome: pb::DispatchOutcome::Started as i32,
                    incarnation: self.incarnation.clone(),
                    ..Default::default()
                };
                self.out.send(id, Up::DispatchReply(reply)).await?;
                return Ok(dispatch);
            }
        }
    }

    /// Offers a result and waits for its acknowledgement.
    pub async fn offer(&mut self, result: &pb::ToolResult) -> Result<pb::AckOutcome> {
        self.out.send(0, Up::Result(result.clone())).await?;
        loop {
            match self.next().await?.context("the stream ended")? {
                (_, Down::ResultAck(ack)) if ack.call_id == result.call_id => return Ok(ack.outcome()),
                _ => {}
            }
        }
    }

    /// A result of the call, as a daemon would make it.
    pub fn result(&self, call: &str, generation: i64, content: &str) -> pb::ToolResult {
        pb::ToolResult {
            call_id: call.to_owned(),
            generation,
            status: pb::ToolCallStatus::Succeeded as i32,
            content: content.as_bytes().to_vec().into(),
            incarnation: self.incarnation.clone(),
            output_bytes: content.len() as i64,
            run_us: 1000,
            ..Default::default()
        }
    }

    /// Reads to the end of the stream. Answers why the gateway ended it.
    pub async fn told_to_go(&mut self) -> Result<pb::GoAway> {
        let mut told = None;
        while let Some((_, frame)) = self.next().await? {
            if let Down::GoAway(away) = frame {
                told = Some(away);
            }
        }
        told.context("the stream ended without a reason")
    }
}

fn hello(incarnation: &str) -> Vec<u8> {
    let hello = pb::Hello {
        incarnation: incarnation.to_owned(),
        hostname: "nowhere".into(),
        roots: vec![pb::Root { id: "root".into(), name: "root".into(), path: "/".into(), ..Default::default() }],
        tools: vec![pb::ToolDeclaration {
            name: "shell".into(),
            input_schema_json: r#"{"type":"object"}"#.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    pb::ConnectRequest { trace: None, request_id: 0, frame: Some(Up::Hello(hello)) }.encode_to_vec()
}

async fn dial(address: &str, token: &str, first: Vec<u8>) -> Result<(Out, Streaming<Vec<u8>>)> {
    let mut client = tonic::client::Grpc::new(reliant_rpc::channel(address).await?);
    client.ready().await?;
    let (mut sender, frames) = mpsc::channel(FRAMES_WAITING);
    sender.send(first).await?;
    let mut request = tonic::Request::new(frames);
    anyhow::ensure!(reliant_rpc::authorize(&mut request, token), "the token fits no header");
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/reliant.v1.TunnelService/Connect");
    let answered = within("the gateway's answer", ANSWER, client.streaming(request, path, Raw)).await??;
    Ok((Out(sender), answered.into_inner()))
}
