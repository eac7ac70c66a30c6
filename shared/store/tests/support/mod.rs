//! One database per test, made from the migrations and dropped afterwards, on the server of `RELIANT_TEST_DATABASE_URL`.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::HashMap;
use std::time::Duration;

use reliant_store::*;
use reliant_types::{pb::chat_event::Kind, *};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, postgres::PgConnectOptions};

pub const DAY: Duration = Duration::from_secs(86_400);
pub const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

pub struct Db {
    pub store: Store,
    /// For looking behind the store.
    pub raw: PgPool,
    admin: PgConnectOptions,
    name: String,
}

impl Db {
    pub async fn new() -> Self {
        Self::with_connections(24).await
    }

    pub async fn with_connections(max_connections: u32) -> Self {
        let url = std::env::var("RELIANT_TEST_DATABASE_URL").expect(
            "RELIANT_TEST_DATABASE_URL is not set: these tests need a Postgres whose user may create databases, for example \
             postgres://postgres@127.0.0.1:5432/postgres; `make test` starts one and sets it",
        );
        let admin: PgConnectOptions = url.parse().expect("RELIANT_TEST_DATABASE_URL is not a Postgres address");
        let name = format!("reliant_test_{}", uuid::Uuid::new_v4().simple());
        let mut connection = PgConnection::connect_with(&admin).await.expect("the test server does not answer");
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        let (base, query) = url.split_once('?').map_or((url.as_str(), ""), |(base, query)| (base, query));
        let server = base.rsplit_once('/').map_or(base, |(server, _)| server);
        let url = if query.is_empty() { format!("{server}/{name}") } else { format!("{server}/{name}?{query}") };
        let config = StoreConfig { url: url.clone(), max_connections, ..Default::default() };
        let store = Store::connect(&config).await.unwrap();
        store.migrate().await.unwrap();
        let raw = PgPool::connect(&url).await.unwrap();
        Self { store, raw, admin, name }
    }

    pub async fn execute(&self, sql: &'static str) {
        sqlx::query(sql).execute(&self.raw).await.unwrap();
    }

    /// The name of the constraint that refuses this; empty: nothing did.
    pub async fn refused(&self, sql: &'static str) -> String {
        match sqlx::query(sql).execute(&self.raw).await {
            Ok(_) => String::new(),
            Err(error) => error.as_database_error().and_then(|error| error.constraint()).unwrap_or("none").to_owned(),
        }
    }

    pub async fn number(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.raw).await.unwrap()
    }
}

impl Drop for Db {
    fn drop(&mut self) {
        let (admin, name) = (self.admin.clone(), self.name.clone());
        let drop_it = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut connection = PgConnection::connect_with(&admin).await.unwrap();
                let sql = format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)");
                sqlx::query(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
            });
        };
        // A runtime cannot be made inside a runtime's thread.
        let _ = std::thread::spawn(drop_it).join();
    }
}

/// A person with a chat on a connected daemon.
pub struct World {
    pub db: Db,
    pub user: UserId,
    pub chat: ChatId,
    pub daemon: DaemonId,
    pub journal: Incarnation,
    pub gateway: InstanceId,
    pub worker: InstanceId,
    pub lease: Lease,
    /// What the worker has read of chats.
    known: tokio::sync::Mutex<HashMap<ChatId, Transcript>>,
}

impl World {
    pub async fn new() -> Self {
        let db = Db::new().await;
        let user = db.store.ensure_user("ada", "Ada", "member").await.unwrap().id;
        let (daemon, _) = db.store.register_daemon(user, "laptop", false).await.unwrap();
        let (journal, gateway) = (Incarnation::new(), InstanceId::new());
        let chat = db.store.create_chat(&new_chat(user, Some(daemon))).await.unwrap().value;
        let lease = db.store.connect_daemon(hello(user, daemon, gateway, journal, 0)).await.unwrap().value;
        let chat = chat.id.parse().unwrap();
        Self { db, user, chat, daemon, journal, gateway, worker: InstanceId::new(), lease, known: Default::default() }
    }

    pub fn store(&self) -> &Store {
        &self.db.store
    }

    pub async fn send(&self, id: &str) -> Sent {
        self.store().send_message(&message(self.user, self.chat, id)).await.unwrap().value
    }

    /// Sends a message, and returns its turn.
    pub async fn turn(&self, id: &str) -> TurnId {
        self.send(id).await.turn.id.parse().unwrap()
    }

    pub async fn step(&self) -> Step {
        self.store().next_step(self.chat, Look::Within(self.worker)).await.unwrap().value
    }

    pub async fn claim(&self, turn: TurnId, iteration: i32) -> Attempt {
        let attempt = self.claim_unread(turn, iteration).await;
        self.history(&attempt).await;
        attempt
    }

    /// As if a worker had looked at all that was wanted.
    pub async fn seen(&self) {
        self.db.execute("UPDATE chats SET seen = wanted").await;
    }

    pub async fn claim_unread(&self, turn: TurnId, iteration: i32) -> Attempt {
        self.seen().await;
        match self.store().claim_attempt(turn, iteration, self.worker, &Default::default()).await.unwrap().value {
            Claim::Claimed(attempt) => *attempt,
            other => panic!("the round could not be claimed: {other:?}"),
        }
    }

    /// What the attempt's model reads, which is the same with what was read before and without it.
    pub async fn history(&self, attempt: &Attempt) -> History {
        let mut known = self.known.lock().await;
        let (history, _) = self.store().history(attempt, None).await.unwrap();
        let (grown, kept) = self.store().history(attempt, known.remove(&attempt.chat)).await.unwrap();
        assert_eq!(history, grown);
        known.extend(kept.map(|kept| (attempt.chat, kept)));
        history
    }

    /// The same as texts.
    pub async fn read(&self, attempt: &Attempt) -> Vec<String> {
        self.history(attempt).await.messages.iter().map(|message| text(message)).collect()
    }

    /// A message sent, the model asking for these calls; their ids.
    pub async fn asked(&self, calls: Vec<NewCall>) -> (TurnId, Vec<ToolCallId>) {
        let turn = self.turn(&uuid::Uuid::new_v4().to_string()).await;
        let attempt = self.claim(turn, 0).await;
        let committed = self.store().commit_message(answer(&attempt, "on it", calls)).await.unwrap();
        assert_eq!(committed.value, CommitOutcome::Committed { turn_ended: false });
        (turn, self.calls(turn).await.iter().map(|call| call.id.parse().unwrap()).collect())
    }

    /// One call that was sent.
    pub async fn dispatched(&self) -> (TurnId, ToolCallId, i64) {
        let (turn, calls) = self.asked(vec![call(0, "shell")]).await;
        let generation = self.dispatch(calls[0]).await;
        (turn, calls[0], generation)
    }

    pub async fn dispatch(&self, call: ToolCallId) -> i64 {
        let orders = self.store().prepare_dispatches(self.chat, &[call], &[]).await.unwrap().value;
        let [order] = &orders[..] else { panic!("the call was to be sent: {orders:?}") };
        assert_eq!(order.daemon, self.daemon);
        order.call.generation
    }

    pub async fn calls(&self, turn: TurnId) -> Vec<pb::ToolCall> {
        self.store().get_turn(self.user, turn).await.unwrap().1
    }

    /// All pages of a turn's calls, each of which must fit an answer.
    pub async fn all_calls(&self, turn: TurnId) -> Vec<pb::ToolCall> {
        let (mut calls, mut token) = (Vec::new(), String::new());
        loop {
            let page = self.store().get_turn_page(self.user, turn, 500, &token).await.unwrap();
            let (turn, tool_calls, next_page_token) = page;
            calls.extend(tool_calls.iter().cloned());
            token = next_page_token.clone();
            let answer = pb::GetTurnResponse { turn: Some(turn), tool_calls, next_page_token };
            assert!(prost::Message::encoded_len(&answer) < limits::GRPC_MESSAGE_MAX_BYTES);
            if token.is_empty() {
                return calls;
            }
        }
    }

    pub async fn turn_status(&self, turn: TurnId) -> pb::TurnStatus {
        self.store().get_turn(self.user, turn).await.unwrap().0.status()
    }

    pub async fn call_status(&self, turn: TurnId) -> pb::ToolCallStatus {
        self.calls(turn).await[0].status()
    }

    pub async fn approvals(&self) -> Vec<ApprovalId> {
        let (approvals, _) = self.store().list_approvals(self.user, Some(self.chat), false, 0, None).await.unwrap();
        approvals.iter().rev().map(|approval| approval.id.parse().unwrap()).collect()
    }

    pub async fn messages(&self) -> Vec<pb::Message> {
        self.store().list_messages(self.user, self.chat, 0, 0).await.unwrap().0
    }

    /// The chat's whole log, which must have no hole.
    pub async fn log(&self) -> Vec<pb::ChatEvent> {
        let (events, more) = self.store().events_after(self.chat, 0, 100_000).await.unwrap();
        assert!(!more, "a test's log fits one read");
        contiguous(events.iter().map(|event| event.seq));
        assert_eq!(self.store().last_seqs(&[self.chat]).await.unwrap(), [(self.chat, events.len() as i64)]);
        events
    }

    pub fn result(&self, call: ToolCallId, generation: i64, text: &str) -> pb::ToolResult {
        pb::ToolResult {
            call_id: call.to_string(),
            generation,
            status: pb::ToolCallStatus::Succeeded as i32,
            content: text.as_bytes().to_vec().into(),
            incarnation: self.journal.to_string(),
            exit_code: Some(0),
            run_us: 1_500,
            ..Default::default()
        }
    }

    pub async fn ack(&self, result: &pb::ToolResult) -> pb::AckOutcome {
        self.store().commit_result(self.daemon, result).await.unwrap().value.ack()
    }

    /// The daemon goes, without giving its lease back.
    pub async fn daemon_goes(&self) {
        self.db.execute("UPDATE daemon_leases SET expires_at = now() - interval '1 second'").await;
    }

    /// The daemon comes back, with this journal.
    pub async fn daemon_comes(&mut self, journal: Incarnation) {
        let hello = hello(self.user, self.daemon, self.gateway, journal, self.lease.instance);
        self.lease = self.store().connect_daemon(hello).await.unwrap().value;
    }
}

pub fn contiguous(seqs: impl Iterator<Item = i64>) {
    for (expected, seq) in (1..).zip(seqs) {
        assert_eq!(seq, expected, "a hole or a duplicate in the log");
    }
}

pub fn new_chat(user: UserId, daemon: Option<DaemonId>) -> NewChat {
    NewChat {
        user,
        title: "work".into(),
        project: None,
        daemon,
        root_id: String::new(),
        model: "sim/default".into(),
        mode: pb::ChatMode::Auto,
        client_request_id: String::new(),
    }
}

pub fn hello(user: UserId, daemon: DaemonId, gateway: InstanceId, journal: Incarnation, instance: i64) -> DaemonHello {
    DaemonHello {
        daemon,
        user,
        gateway,
        incarnation: journal,
        instance,
        hostname: "laptop".into(),
        os: "linux".into(),
        version: "1".into(),
        roots: vec![pb::Root { id: "r1".into(), name: "repo".into(), path: "/src".into(), agents_md: String::new() }],
        tools: vec![pb::ToolDeclaration { name: "shell".into(), ..Default::default() }],
    }
}

pub fn message(user: UserId, chat: ChatId, id: &str) -> SendMessage {
    SendMessage {
        user,
        chat,
        client_message_id: id.into(),
        text: format!("text of {id}"),
        traceparent: TRACE.into(),
        deadline: limits::TURN_DEADLINE,
    }
}

pub fn call(index: i32, tool: &str) -> NewCall {
    NewCall {
        index,
        provider_id: format!("p{index}"),
        tool: tool.into(),
        input: r#"{"command":"true"}"#.into(),
        read_only: false,
        repeatable: false,
        needs_approval: false,
        timeout: Duration::from_secs(60),
        refused: None,
    }
}

/// One that may run beside others of its kind.
pub fn looking(index: i32, tool: &str) -> NewCall {
    NewCall { read_only: true, ..call(index, tool) }
}

pub fn asking(index: i32, tool: &str) -> NewCall {
    NewCall { needs_approval: true, ..call(index, tool) }
}

pub fn answer(attempt: &Attempt, text: &str, calls: Vec<NewCall>) -> NewAssistant {
    let uses = (0..calls.len()).map(|call| NewBlock::ToolUse { call });
    NewAssistant {
        turn: attempt.turn,
        fence: attempt.fence,
        message: attempt.message,
        iteration: attempt.iteration,
        model: attempt.model.clone(),
        blocks: std::iter::once(NewBlock::Text { text: text.into() }).chain(uses).collect(),
        stop_reason: if calls.is_empty() { pb::StopReason::EndTurn } else { pb::StopReason::ToolUse },
        usage: pb::Usage { input_tokens: 10, output_tokens: 5, ..Default::default() },
        calls,
    }
}

pub fn text(message: &pb::Message) -> String {
    use pb::content_block::Block;
    let texts = message.blocks.iter().map(|block| match &block.block {
        Some(Block::Text(text)) => text.text.clone(),
        Some(Block::ToolResult(result)) => format!("<{}>", result.content),
        Some(Block::ToolUse(call)) => format!("[{}]", call.tool),
        _ => String::new(),
    });
    texts.collect::<Vec<_>>().join("")
}

/// The kinds of events, in order.
pub fn kinds(events: &[pb::ChatEvent]) -> Vec<String> {
    let kind = |event: &pb::ChatEvent| match event.kind.as_ref().unwrap() {
        Kind::MessageCommitted(message) => {
            format!("message {}", message.role().as_str_name().trim_start_matches("ROLE_"))
        }
        Kind::MessageStarted(started) => format!("started {}", started.epoch),
        Kind::TurnChanged(turn) => format!("turn {}", turn.status().as_str_name().trim_start_matches("TURN_STATUS_")),
        Kind::ToolCallChanged(changed) => {
            let status = changed.tool_call.as_ref().unwrap().status();
            format!("call {}", status.as_str_name().trim_start_matches("TOOL_CALL_STATUS_"))
        }
        Kind::ApprovalChanged(approval) => {
            format!("approval {}", approval.status().as_str_name().trim_start_matches("APPROVAL_STATUS_"))
        }
        Kind::ChatChanged(_) => "chat".into(),
    };
    events.iter().map(kind).collect()
}

pub fn code(error: StoreError) -> Code {
    Failure::from(error).code
}
