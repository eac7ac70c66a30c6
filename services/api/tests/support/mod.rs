//! One api with people, viewers, and a producer in the place of the worker.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use parking_lot::Mutex;
use reliant_api::{ApiConfig, ApiDeps, ApiLimits};
use reliant_bus::{Bus, BusConfig, PrefixSubject, UpdateSubject};
use reliant_client::{From, View};
use reliant_devstack::{Placement, Stack, StackConfig};
use reliant_flows::{Flows, FlowsConfig};
use reliant_middleware::Jwt;
use reliant_models::{Models, ModelsConfig, ProviderConfig, ProviderKind};
use reliant_rpc as rpc;
use reliant_runtime::{Drain, Role as _};
use reliant_store::{Claim, Committed, Look, NewAssistant, NewBlock, Store, StoreConfig};
use reliant_telemetry::metrics;
use reliant_types::{ChatId, InstanceId, MessageId, Secret, TurnId, UserId, pb};
use tonic::{Request, Streaming, transport::Channel};

pub const PATIENCE: Duration = Duration::from_secs(20);
pub const MODEL: &str = "sim/text";
pub const ACCESS_TOKEN_TTL: Duration = Duration::from_secs(60);

/// One api in this process, on servers of its own.
pub struct Bench {
    _stack: Stack,
    _dir: tempfile::TempDir,
    pub store: Store,
    pub bus: Bus,
    pub jwt: Jwt,
    pub drain: Drain,
    pub url: String,
}

pub struct Person {
    pub user: UserId,
    pub token: String,
    pub channel: Channel,
}

impl Bench {
    pub async fn start() -> Result<Self> {
        Self::with(ApiLimits::default()).await
    }

    pub async fn with(limits: ApiLimits) -> Result<Self> {
        let dir = tempfile::TempDir::with_prefix("reliant-live-feed-")?;
        // Temporal is away: what is accepted is accepted all the same.
        let stack =
            Stack::start(StackConfig { temporal: Placement::Off, ..StackConfig::for_tests(dir.path()) }).await?;
        let url = stack.create_database("feed").await?;
        let store = Store::connect(&StoreConfig { url, max_connections: 8, ..StoreConfig::default() }).await?;
        store.migrate().await?;
        // There is no worker. What is wanted is looked at all the same, or the api would tell people that it is not.
        let (looking, worker) = (store.clone(), InstanceId::new());
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                for unseen in looking.unseen_chats(Duration::from_secs(2), 100).await.unwrap_or_default() {
                    let _ = looking.next_step(unseen.wake.chat, Look::Within(worker)).await;
                }
            }
        });
        let bus = Bus::connect(&BusConfig { url: stack.nats_url.clone(), ..BusConfig::default() }).await?;
        let jwt = Jwt::from_pem(&Jwt::generate_pem())?;
        let provider = ProviderConfig::new("sim", ProviderKind::OpenAi, "http://127.0.0.1:9/v1", Secret::default());
        let models = ModelsConfig { providers: vec![provider], default: MODEL.into(), ..ModelsConfig::default() };
        let flows = FlowsConfig { address: "http://127.0.0.1:9".into(), ..FlowsConfig::default() };
        let deps = ApiDeps {
            store: store.clone(),
            bus: Bus::connect(&BusConfig { url: stack.nats_url.clone(), ..BusConfig::default() }).await?,
            flows: Flows::connect(&flows).await?,
            models: Models::new(models)?,
            jwt: jwt.clone(),
            access_token_ttl: ACCESS_TOKEN_TTL,
            instance: InstanceId::new(),
        };
        let any = "127.0.0.1:0".parse()?;
        let config = ApiConfig { listen: any, admin: any, limits, ..ApiConfig::default() };
        let api = reliant_api::build(config, deps).await?;
        let url = api.public_url();
        let drain = Drain::new();
        tokio::spawn(api.run(drain.clone()));
        Ok(Self { _stack: stack, _dir: dir, store, bus, jwt, drain, url })
    }

    pub async fn person(&self, name: &str) -> Result<Person> {
        let user = self.store.ensure_user(name, name, "member").await?.id;
        let (token, _) = self.jwt.sign(name, Duration::from_secs(600))?;
        Ok(Person { user, token, channel: rpc::channel(&self.url).await? })
    }

    pub async fn hint<T>(&self, chat: ChatId, committed: Committed<T>) -> Result<T> {
        let update = pb::ChatUpdate { events: committed.events, ..Default::default() };
        self.bus.publish(&UpdateSubject { user: committed.user, chat }, &update).await?;
        Ok(committed.value)
    }
}

impl Person {
    pub fn ask<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        assert!(rpc::authorize(&mut request, &self.token));
        request
    }

    pub async fn chat(&self) -> Result<ChatId> {
        let mut chats = rpc::chat_service_client::ChatServiceClient::new(self.channel.clone());
        let request = pb::CreateChatRequest { title: "test".into(), model: MODEL.into(), ..Default::default() };
        let made = chats.create_chat(self.ask(request)).await?.into_inner();
        Ok(made.chat.context("no chat")?.id.parse()?)
    }

    pub async fn send(&self, chat: ChatId, text: &str) -> Result<TurnId, tonic::Status> {
        let mut messages = rpc::message_service_client::MessageServiceClient::new(self.channel.clone())
            .max_encoding_message_size(usize::MAX);
        let request = pb::SendMessageRequest {
            chat_id: chat.to_string(),
            client_message_id: uuid::Uuid::now_v7().to_string(),
            text: text.into(),
        };
        let sent = messages.send_message(self.ask(request)).await?.into_inner();
        Ok(sent.turn.and_then(|turn| turn.id.parse().ok()).expect("a turn with an id"))
    }

    pub async fn subscribe(
        &self,
        request: pb::SubscribeRequest,
    ) -> Result<Streaming<pb::SubscribeResponse>, tonic::Status> {
        let mut updates = rpc::update_service_client::UpdateServiceClient::new(self.channel.clone());
        Ok(updates.subscribe(self.ask(request)).await?.into_inner())
    }

    pub async fn view(&self, chat: ChatId, from: From) -> Result<Viewer> {
        let mut view = View::new();
        view.follow(chat, from);
        self.watch(chat, view).await
    }

    /// The user's feed: from now on, or after a cursor.
    pub async fn feed(&self, chat: ChatId, after: Option<(i64, i64)>) -> Result<Viewer> {
        let mut view = View::new();
        view.follow_feed(after);
        self.watch(chat, view).await
    }

    /// Begins with a view, or goes on with one.
    pub async fn watch(&self, chat: ChatId, mut view: View) -> Result<Viewer> {
        let stream = self.subscribe(view.begin_stream()).await?;
        Ok(Viewer { chat, view, stream })
    }
}

/// A viewer whose every update is checked.
pub struct Viewer {
    pub chat: ChatId,
    pub view: View,
    pub stream: Streaming<pb::SubscribeResponse>,
}

impl Viewer {
    pub async fn until(&mut self, what: &str, done: impl Fn(&View) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !done(&self.view) {
            let left = deadline.saturating_duration_since(Instant::now());
            let next = tokio::time::timeout(left, self.stream.next()).await;
            let update = next.with_context(|| format!("waited for {what}: {:?}", self.view.verification()))?;
            let applied = self.view.apply(update.context("the stream ended")??);
            anyhow::ensure!(!applied.heal, "a hole: {:?}", self.view.verification());
        }
        anyhow::ensure!(self.view.verification().is_clean(), "{what}: {:?}", self.view.verification());
        Ok(())
    }

    pub async fn seq(&mut self, seq: i64) -> Result<()> {
        let chat = self.chat;
        self.until("an event", |view| view.chat(chat).and_then(|chat| chat.last_seq) >= Some(seq)).await
    }

    pub async fn feed_seq(&mut self, seq: i64) -> Result<()> {
        self.until("a feed event", |view| view.feed().and_then(|feed| feed.last_seq) >= Some(seq)).await?;
        // A viewer that counts past what there is would pass for one that has it.
        anyhow::ensure!(self.view.feed().and_then(|feed| feed.last_seq) == Some(seq), "it is past event {seq}");
        Ok(())
    }

    pub async fn caught_up(&mut self) -> Result<()> {
        self.until("the end of what is stored", View::is_caught_up).await
    }

    /// Until the one live text has so many bytes.
    pub async fn live(&mut self, bytes: usize) -> Result<()> {
        let chat = self.chat;
        self.until("live text", |view| {
            view.chat(chat).is_some_and(|chat| chat.live().values().any(|block| block.bytes.len() >= bytes))
        })
        .await
    }
}

/// A model's message as a worker writes it; answers refills.
pub struct Producer {
    pub user: UserId,
    pub chat: ChatId,
    pub turn: TurnId,
    pub message: MessageId,
    pub fence: i64,
    pub text: Arc<Mutex<String>>,
    pub refills: Arc<Mutex<usize>>,
}

impl Producer {
    pub async fn start(bench: &Bench, person: &Person, chat: ChatId, turn: TurnId) -> Result<Self> {
        let instance = InstanceId::new();
        let mut requests = bench.bus.subscribe(&PrefixSubject { producer: instance.into() }).await?;
        bench.bus.flush().await;
        // As the worker does: queued turns become running ones first.
        let stepped = bench.store.next_step(chat, Look::Within(InstanceId::new())).await?;
        bench.hint(chat, stepped).await?;
        let claim = bench.store.claim_attempt(turn, 0, instance, &Default::default()).await?;
        let Claim::Claimed(attempt) = bench.hint(chat, claim).await? else { anyhow::bail!("not claimed") };
        let text = Arc::<Mutex<String>>::default();
        let refills = Arc::<Mutex<usize>>::default();
        let producer = Self {
            user: person.user,
            chat,
            turn,
            message: attempt.message,
            fence: attempt.fence,
            text: text.clone(),
            refills: refills.clone(),
        };
        let (bus, message, epoch) = (bench.bus.clone(), attempt.message, attempt.fence);
        tokio::spawn(async move {
            while let Some(request) = requests.next().await {
                *refills.lock() += 1;
                let from = if request.message.block < 0 { 0 } else { request.message.from_offset as usize };
                let piece = text.lock()[from..].to_owned();
                let deltas = vec![delta(chat, message, epoch, from, &piece)];
                let _ = request.reply(&bus, &pb::PrefixReply { found: true, deltas }).await;
            }
        });
        Ok(producer)
    }

    /// Writes a piece; `heard`: how often its hint arrives.
    pub async fn write(&self, bench: &Bench, piece: &str, heard: usize) -> Result<()> {
        let offset = {
            let mut text = self.text.lock();
            let offset = text.len();
            text.push_str(piece);
            offset
        };
        let deltas = vec![delta(self.chat, self.message, self.fence, offset, piece)];
        let update = pb::ChatUpdate { deltas, ..Default::default() };
        for _ in 0..heard {
            bench.bus.publish(&UpdateSubject { user: self.user, chat: self.chat }, &update).await?;
        }
        Ok(())
    }

    pub async fn lengths(&self, bench: &Bench) -> Result<()> {
        let length = pb::BlockLength {
            chat_id: self.chat.to_string(),
            block: Some(block(self.message)),
            epoch: self.fence,
            length: self.written() as i64,
        };
        let update = pb::ChatUpdate { lengths: vec![length], ..Default::default() };
        bench.bus.publish(&UpdateSubject { user: self.user, chat: self.chat }, &update).await?;
        Ok(())
    }

    pub fn written(&self) -> usize {
        self.text.lock().len()
    }

    pub fn refills(&self) -> usize {
        *self.refills.lock()
    }

    pub async fn commit(&self, bench: &Bench, heard: bool) -> Result<()> {
        let text = self.text.lock().clone();
        let committed = bench
            .store
            .commit_message(NewAssistant {
                turn: self.turn,
                fence: self.fence,
                message: self.message,
                iteration: 0,
                model: MODEL.into(),
                blocks: vec![NewBlock::Text { text }],
                stop_reason: pb::StopReason::EndTurn,
                usage: pb::Usage::default(),
                calls: Vec::new(),
            })
            .await?;
        if heard {
            bench.hint(self.chat, committed).await?;
        }
        Ok(())
    }
}

pub fn block(message: MessageId) -> pb::BlockRef {
    pb::BlockRef { target_id: message.to_string(), block: 0, kind: pb::StreamKind::Text as i32 }
}

pub fn delta(chat: ChatId, message: MessageId, epoch: i64, offset: usize, piece: &str) -> pb::Delta {
    pb::Delta {
        chat_id: chat.to_string(),
        block: Some(block(message)),
        epoch,
        offset: offset as i64,
        piece: piece.to_owned().into(),
        produced_unix_us: reliant_types::unix_us(),
        ..Default::default()
    }
}

pub async fn feed_seq(bench: &Bench, person: &Person) -> Result<i64> {
    Ok(bench.store.feed_seqs(&[person.user]).await?.first().context("no user")?.1)
}

/// How many cursors could not be used, for a reason.
pub fn unusable(reason: &str) -> u64 {
    metrics::VIEWER_RESYNCS.with_label_values(&[reason]).get()
}

pub async fn last_seq(bench: &Bench, chat: ChatId) -> Result<i64> {
    Ok(bench.store.last_seqs(&[chat]).await?.first().context("no chat")?.1)
}
