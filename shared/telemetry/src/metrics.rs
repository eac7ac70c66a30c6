//! Every metric, declared once; its doc comment is its help text. Labels have few values: never a user, chat, daemon
//! or trace id, and tool names only through [`tool_label`].

use crate::chain;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use prometheus::{Counter, Gauge, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};
use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

/// For anything that a person or a caller waits for: 0.5 ms to 30 s.
pub const SECONDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0];
/// For hops within the mesh: 50 µs to 1 s.
pub const HOP_SECONDS: &[f64] =
    &[0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
/// For model calls, tools and turns: 5 ms to an hour.
pub const LONG_SECONDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0];

/// What a dashboard or a test needs to know of a metric.
#[derive(Debug, Clone, Copy)]
pub struct Declared {
    pub name: &'static str,
    pub kind: &'static str,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

trait Metric: Sized {
    const KIND: &'static str;
    fn declare(name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> prometheus::Result<Self>;
}

macro_rules! kinds {
    ($($kind:ty, $name:literal, |$n:ident, $h:ident, $l:ident, $b:ident| $make:expr;)*) => {$(
        impl Metric for $kind {
            const KIND: &'static str = $name;
            fn declare($n: &str, $h: &str, $l: &[&str], $b: &[f64]) -> prometheus::Result<Self> { $make }
        }
    )*};
}

kinds! {
    Counter, "counter", |n, h, _l, _b| Counter::new(n, h);
    IntCounter, "counter", |n, h, _l, _b| IntCounter::new(n, h);
    IntCounterVec, "counter", |n, h, l, _b| IntCounterVec::new(prometheus::Opts::new(n, h), l);
    Gauge, "gauge", |n, h, _l, _b| Gauge::new(n, h);
    IntGauge, "gauge", |n, h, _l, _b| IntGauge::new(n, h);
    IntGaugeVec, "gauge", |n, h, l, _b| IntGaugeVec::new(prometheus::Opts::new(n, h), l);
    Histogram, "histogram", |n, h, _l, b| Histogram::with_opts(prometheus::HistogramOpts::new(n, h).buckets(b.to_vec()));
    HistogramVec, "histogram", |n, h, l, b| HistogramVec::new(prometheus::HistogramOpts::new(n, h).buckets(b.to_vec()), l);
}

static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    let registry = Registry::new();
    #[cfg(target_os = "linux")]
    registry
        .register(Box::new(crate::process::ProcessCollector::for_self().expect("its names are valid")))
        .expect("the registry is empty");
    registry
});

macro_rules! metrics {
    ($($(#[doc = $help:literal])+ pub static $id:ident: $kind:ty = ($name:literal, [$($label:literal),*] $(, $buckets:expr)?);)*) => {
        $(
            $(#[doc = $help])+
            pub static $id: LazyLock<$kind> = LazyLock::new(|| {
                let buckets: &[f64] = &[];
                $(let buckets: &[f64] = { let _ = buckets; $buckets };)?
                let metric = <$kind as Metric>::declare($name, concat!($($help),+).trim(), &[$($label),*], buckets)
                    .expect("declared names and labels are valid; a test reads them all");
                REGISTRY.register(Box::new(metric.clone())).expect("each name is declared once");
                metric
            });
        )*

        /// Every declared metric, in the order of this file.
        pub const DECLARED: &[Declared] = &[$(Declared {
            name: $name,
            kind: <$kind as Metric>::KIND,
            labels: &[$($label),*],
            help: concat!($($help),+),
        }),*];

        fn force() {
            $(LazyLock::force(&$id);)*
        }
    };
}

metrics! {
    // --- RPC
    /// Time of an RPC at its server, to its end or to the end of its stream, by method and gRPC status (CANCELLED where the caller left).
    pub static RPC_SERVER_DURATION: HistogramVec = ("rpc_server_call_duration_seconds", ["rpc_method", "rpc_response_status_code"], SECONDS);
    /// Time of an RPC at its client.
    pub static RPC_CLIENT_DURATION: HistogramVec = ("rpc_client_call_duration_seconds", ["rpc_method", "rpc_response_status_code"], SECONDS);
    /// RPCs under way, by method.
    pub static RPC_SERVER_INFLIGHT: IntGaugeVec = ("reliant_rpc_inflight", ["rpc_method"]);
    /// RPCs refused before their handler, by layer (load_shed, rate_limit, auth, auth_failures, timeout).
    pub static RPC_REFUSED: IntCounterVec = ("reliant_rpc_refused_total", ["layer"]);
    /// Panics caught in RPC handlers and tasks.
    pub static PANICS: IntCounter = ("reliant_panics_total", []);

    // --- bus
    /// Time of a publish or request on NATS, by subject template, operation (publish, request, reply) and outcome (ok, no_responders, timeout, disconnected, busy, too_large, undecodable, no_reply_subject, refused, cancelled).
    pub static BUS_DURATION: HistogramVec = ("messaging_client_operation_duration_seconds", ["messaging_destination_template", "messaging_operation_name", "outcome"], HOP_SECONDS);
    /// From a message's receipt until its receiver is done with it, by subject template; of a request, until it is answered.
    pub static BUS_PROCESS: HistogramVec = ("messaging_process_duration_seconds", ["messaging_destination_template"], HOP_SECONDS);
    /// Messages handed to a subscriber, by subject template.
    pub static BUS_CONSUMED: IntCounterVec = ("messaging_client_consumed_messages_total", ["messaging_destination_template"]);
    /// Messages that could not be decoded or had a foreign subject, by subject template.
    pub static BUS_UNDECODABLE: IntCounterVec = ("reliant_bus_undecodable_total", ["messaging_destination_template"]);
    /// Messages dropped because a subscription's buffer was full.
    pub static BUS_SLOW_CONSUMER: IntCounter = ("reliant_bus_slow_consumer_drops_total", []);
    /// Times the NATS connection was lost.
    pub static BUS_DISCONNECTS: IntCounter = ("reliant_bus_disconnects_total", []);
    /// Errors said by the NATS server (permissions, limits).
    pub static BUS_SERVER_ERRORS: IntCounter = ("reliant_bus_server_errors_total", []);
    /// 1 while the NATS connection stands.
    pub static BUS_CONNECTED: IntGauge = ("reliant_bus_connected", []);

    // --- turns
    /// Where a turn's time goes; the phases of a turn that succeeded add up to it. accept: read and checked by the api. held: for a place among the turns of all users. enqueue: stored, and until a worker was told. pickup: until a worker took a round up. retry: lost with attempts that failed or whose worker died, until the one that succeeded. context: history read and request made. model_first_token, model_stream: the provider. approval_wait: for a person. tool_route, tool_run, tool_return: to the daemon (or waiting for it), on it, and back; of parallel calls the one that ended last. persist: storing the answer. fanout: from an api replica's receipt of the turn's end to its viewers.
    pub static TURN_PHASE: HistogramVec = ("reliant_turn_phase_seconds", ["phase"], LONG_SECONDS);
    /// Whole turns, from accepted to ended, by end (succeeded, failed, cancelled).
    pub static TURN_DURATION: HistogramVec = ("reliant_turn_seconds", ["status"], LONG_SECONDS);
    /// Turns that failed, by error code.
    pub static TURN_FAILED: IntCounterVec = ("reliant_turn_failed_total", ["code"]);
    /// Chats whose turn waits for a place, because others of the same user are at work; counted up to 10,000.
    pub static TURNS_HELD: IntGauge = ("reliant_turns_held", []);
    /// Places of model calls, by state (taken, room): those at work, and those there are (the workers' slots without the reserve).
    pub static MODEL_PLACES: IntGaugeVec = ("reliant_model_places", ["state"]);
    /// Model attempts that took over from one that died or was given up.
    pub static TURN_TAKEOVERS: IntCounter = ("reliant_turn_takeovers_total", []);
    /// Turns that were given up because each worker that prepared them ended or stood still just then.
    pub static TURNS_DEADLY: IntCounter = ("reliant_turns_deadly_total", []);
    /// Bursts of chats and their parts, by kind (burst, next_step, dispatch) and outcome (ok, failed, cancelled).
    pub static TURN_STEP: HistogramVec = ("reliant_turn_step_seconds", ["step", "outcome"], SECONDS);

    // --- model
    /// From the request to the first piece of a model's answer.
    pub static MODEL_FIRST_TOKEN: HistogramVec = ("reliant_model_first_token_seconds", ["provider", "model"], LONG_SECONDS);
    /// A model call from request to end, by outcome (ok, failed, cancelled).
    pub static MODEL_DURATION: HistogramVec = ("gen_ai_client_operation_duration_seconds", ["provider", "model", "outcome"], LONG_SECONDS);
    /// Tokens as the provider counted them, by kind (input, output, cache_read, cache_write, reasoning).
    pub static MODEL_TOKENS: IntCounterVec = ("reliant_model_tokens_total", ["provider", "model", "kind"]);
    /// Millionths of a US dollar, by the configured prices.
    pub static MODEL_COST: IntCounterVec = ("reliant_model_cost_microusd_total", ["provider", "model"]);
    /// Model requests tried again, by reason (rate_limited, server_error, cut, stall, garbage, connect).
    pub static MODEL_RETRIES: IntCounterVec = ("reliant_model_retries_total", ["provider", "reason"]);
    /// Ends of model answers, by stop reason (end_turn, tool_use, max_tokens, content_filter, unspecified).
    pub static MODEL_STOPS: IntCounterVec = ("reliant_model_stops_total", ["provider", "model", "reason"]);
    /// Histories that had to be shortened to fit the model's window.
    pub static MODEL_SHORTENED: IntCounter = ("reliant_model_history_shortened_total", []);

    // --- tools
    /// Tool calls that ended, by tool (our own by name, else mcp or other) and status (succeeded, failed, cancelled, timed_out, outcome_unknown), with the time that they ran; 0 for those that never began.
    pub static TOOL_RUN: HistogramVec = ("reliant_tool_run_seconds", ["tool", "status"], LONG_SECONDS);
    /// Dispatches of tool calls, by outcome (started, attached, finished, tombstone, refused, away, timeout, failed).
    pub static TOOL_DISPATCH: IntCounterVec = ("reliant_tool_dispatch_total", ["outcome"]);
    /// Calls whose outcome cannot be known, by cause (process_died, journal_lost, daemon_away).
    pub static TOOL_UNKNOWN: IntCounterVec = ("reliant_tool_outcome_unknown_total", ["cause"]);
    /// Results received, by what became of them. committed: it ended its call. repeated: it had done so before. late: the call had ended otherwise. foreign: of another daemon's or journal's call. unknown: of no call. malformed: of no call that can be. failed, undelivered: not stored or not taken now; it comes again.
    pub static TOOL_RESULTS: IntCounterVec = ("reliant_tool_results_total", ["outcome"]);
    /// Dispatch leaving the worker to the result arriving there, with the tool's own time.
    pub static TOOL_ROUND_TRIP: Histogram = ("reliant_tool_round_trip_seconds", [], LONG_SECONDS);

    // --- viewers
    /// From a person's click until the first piece of the answer was painted, as web pages tell it.
    pub static PAGE_FIRST_TEXT: Histogram = ("reliant_page_first_text_seconds", [], LONG_SECONDS);
    /// Open update streams.
    pub static VIEWERS: IntGauge = ("reliant_viewers", []);
    /// Updates given to viewers, by kind (event, delta, feed, replayed to one who joins or resumes, heartbeat).
    pub static VIEWER_UPDATES: IntCounterVec = ("reliant_viewer_updates_total", ["kind"]);
    /// From a piece's birth at its producer to the viewer's queue, where the clocks agree.
    pub static VIEWER_LAG: Histogram = ("reliant_viewer_lag_seconds", [], HOP_SECONDS);
    /// Live pieces dropped because a viewer was too slow.
    pub static VIEWER_DROPS: IntCounter = ("reliant_viewer_drops_total", []);
    /// Refills of live text from its producer, by outcome (filled, gone, away).
    pub static VIEWER_REFILLS: IntCounterVec = ("reliant_viewer_refills_total", ["outcome"]);
    /// What viewers were given again, by reason. gap, poll, resume, lagged: events were missing, and the log was read. future, too_old, other_log: the viewer's cursor is past the log's end, too far behind it, or of another log, and it began anew with the state.
    pub static VIEWER_RESYNCS: IntCounterVec = ("reliant_viewer_resyncs_total", ["reason"]);

    // --- daemons
    /// Daemon streams this gateway holds.
    pub static DAEMONS_CONNECTED: IntGauge = ("reliant_daemons_connected", []);
    /// Frames of daemons that were not taken, by reason. result: names no call. answer: to nothing that was asked, or too late. output: for a chat or user that is not its owner's. hello: a second one. empty: nothing, or of a newer version. unreadable: garbage, or larger than a frame may be; it ends the stream.
    pub static DAEMON_FRAMES_REFUSED: IntCounterVec = ("reliant_daemon_frames_refused_total", ["reason"]);
    /// Daemon streams that ended, by reason (closed, replaced, outdated, revoked, token_expired, lease_lost, bus_away, drained, unreadable, refused).
    pub static DAEMON_STREAM_ENDS: IntCounterVec = ("reliant_daemon_stream_ends_total", ["reason"]);
    /// Daemons that came with another journal than the stored one: it was lost or reset, or two machines use one daemon. What ran under the old one is of unknown outcome.
    pub static DAEMON_JOURNALS_REPLACED: IntCounter = ("reliant_daemon_journals_replaced_total", []);
    /// Requests to daemons whose answer is awaited.
    pub static DAEMON_PENDING: IntGauge = ("reliant_daemon_pending_requests", []);
    /// A request to a daemon over its stream, by frame (dispatch, cancel, output, prefix) and outcome (answered, unanswered, cancelled).
    pub static DAEMON_REQUEST: HistogramVec = ("reliant_daemon_request_seconds", ["frame", "outcome"], HOP_SECONDS);
    /// Leases refused or lost, because a newer instance or another gateway holds them.
    pub static LEASE_CONFLICTS: IntCounter = ("reliant_lease_conflicts_total", []);
    /// Lease renewals of a gateway, by outcome (ok, failed, bus_away).
    pub static LEASE_RENEWALS: IntCounterVec = ("reliant_lease_renewals_total", ["outcome"]);
    /// Reconnects of this daemon.
    pub static DAEMON_RECONNECTS: IntCounter = ("reliant_daemon_reconnects_total", []);
    /// Calls in this daemon's journal, by state (running, unacknowledged).
    pub static JOURNAL_CALLS: IntGaugeVec = ("reliant_journal_calls", ["state"]);
    /// A synced write of the daemon's journal.
    pub static JOURNAL_COMMIT: Histogram = ("reliant_journal_commit_seconds", [], HOP_SECONDS);

    // --- queues, relay, tasks, storage
    /// Entries in a bounded queue, or places taken, by queue; where a process has several of a name, of the fullest one. Read at the scrape.
    pub static QUEUE_DEPTH: IntGaugeVec = ("reliant_queue_depth", ["queue"]);
    /// Room in one such queue.
    pub static QUEUE_LIMIT: IntGaugeVec = ("reliant_queue_limit", ["queue"]);
    /// Entries refused or dropped because a bounded queue was full, by queue.
    pub static QUEUE_REFUSED: IntCounterVec = ("reliant_queue_refused_total", ["queue"]);
    /// Chats woken again by the relay, by reason (unseen, stale, retry, orphaned; held: they got a place).
    pub static RELAY_REWAKES: IntCounterVec = ("reliant_relay_rewakes_total", ["reason"]);
    /// Chats that something is wanted of and that no worker has looked at for over 10 s, while they do not wait for admission; counted up to 10,000.
    pub static CHATS_UNSEEN: IntGauge = ("reliant_chats_unseen", []);
    /// Unseen chats that the relay found, by what Temporal said of their run (none, waiting, task_scheduled, task_started, burst_scheduled, burst_started, foreign, unknown).
    pub static CHATS_UNSEEN_FOUND: IntCounterVec = ("reliant_chats_unseen_found_total", ["state"]);
    /// Runs of chats that the relay ended and began anew from Postgres, by cause (failing_tasks, lost_task, deaf, foreign).
    pub static RUNS_BEGUN_ANEW: IntCounterVec = ("reliant_chat_runs_begun_anew_total", ["cause"]);
    /// Model calls that this worker takes on at one time: fewer while it is late.
    pub static WORKER_SLOTS: IntGauge = ("reliant_worker_model_slots", []);
    /// What the median round took beside its model and its tools, of the last seconds.
    pub static WORKER_OVERHEAD: Gauge = ("reliant_worker_round_overhead_seconds", []);
    /// Wakes of chat workflows, by outcome (ok, failed, cancelled).
    pub static WAKES: HistogramVec = ("reliant_wake_seconds", ["outcome"], SECONDS);
    /// A transaction of the store, by name and outcome (ok, refused, unavailable, failed, cancelled).
    pub static STORE_DURATION: HistogramVec = ("reliant_store_transaction_seconds", ["name", "outcome"], HOP_SECONDS);
    /// Getting a connection to the database with a transaction begun on it; the wait for a free one is part of it.
    pub static STORE_ACQUIRE: Histogram = ("reliant_store_acquire_seconds", [], HOP_SECONDS);
    /// Database connections, by state (idle, used, max: those that this process may have).
    pub static STORE_CONNECTIONS: IntGaugeVec = ("reliant_store_connections", ["state"]);
    /// Spans and log records that the collector did not take, by signal (traces, logs).
    pub static OTLP_LOST: IntCounterVec = ("reliant_otlp_lost_total", ["signal"]);
    /// Spans of processes that died, sent by this one, by signal (traces).
    pub static OTLP_ADOPTED: IntCounterVec = ("reliant_otlp_adopted_total", ["signal"]);
    /// Background tasks that ended otherwise than asked, by kind.
    pub static TASK_FAILURES: IntCounterVec = ("reliant_task_failures_total", ["kind"]);

    // --- Temporal's worker core, under the names that Temporal's SDKs have in common
    /// Free places for tasks, by kind of worker (WorkflowWorker, ActivityWorker, LocalActivityWorker).
    pub static TEMPORAL_SLOTS_AVAILABLE: IntGaugeVec = ("temporal_worker_task_slots_available", ["worker_type"]);
    /// Places for tasks that are taken, by kind of worker.
    pub static TEMPORAL_SLOTS_USED: IntGaugeVec = ("temporal_worker_task_slots_used", ["worker_type"]);
    /// Polls for tasks under way, by kind (workflow_task, sticky_workflow_task, activity_task).
    pub static TEMPORAL_POLLERS: IntGaugeVec = ("temporal_num_pollers", ["poller_type"]);
    /// From a workflow task's schedule by the server to its start here.
    pub static TEMPORAL_WORKFLOW_TASK_SCHEDULED: Histogram = ("temporal_workflow_task_schedule_to_start_latency_seconds", [], SECONDS);
    /// A workflow task's work, without replay.
    pub static TEMPORAL_WORKFLOW_TASK_EXECUTION: Histogram = ("temporal_workflow_task_execution_latency_seconds", [], SECONDS);
    /// Catching up on a workflow's history, where it was not in the cache.
    pub static TEMPORAL_WORKFLOW_TASK_REPLAY: Histogram = ("temporal_workflow_task_replay_latency_seconds", [], SECONDS);
    /// From an activity's schedule by the server to its start here.
    pub static TEMPORAL_ACTIVITY_SCHEDULED: Histogram = ("temporal_activity_schedule_to_start_latency_seconds", [], SECONDS);
    /// An activity's work.
    pub static TEMPORAL_ACTIVITY_EXECUTION: Histogram = ("temporal_activity_execution_latency_seconds", [], LONG_SECONDS);
    /// Workflow tasks that failed, by cause (WorkflowError, NonDeterminismError, …).
    pub static TEMPORAL_WORKFLOW_TASK_FAILED: IntCounterVec = ("temporal_workflow_task_execution_failed_total", ["failure_reason"]);
    /// Activities that failed; most of them are tried again.
    pub static TEMPORAL_ACTIVITY_FAILED: IntCounter = ("temporal_activity_execution_failed_total", []);
    /// Workflow tasks whose workflow was in the cache.
    pub static TEMPORAL_STICKY_HIT: IntCounter = ("temporal_sticky_cache_hit_total", []);
    /// Workflow tasks whose workflow should have been in the cache and was not.
    pub static TEMPORAL_STICKY_MISS: IntCounter = ("temporal_sticky_cache_miss_total", []);
    /// Workflows put out of the cache before their end.
    pub static TEMPORAL_STICKY_EVICTED: IntCounter = ("temporal_sticky_cache_total_forced_eviction_total", []);
    /// Workflows in the cache.
    pub static TEMPORAL_STICKY_SIZE: IntGauge = ("temporal_sticky_cache_size", []);

    // --- the process; Prometheus' own `process_*` stand beside these
    /// Threads that run tasks.
    pub static RUNTIME_THREADS: IntGauge = ("reliant_runtime_threads", []);
    /// Tasks that are alive.
    pub static RUNTIME_TASKS: IntGauge = ("reliant_runtime_tasks", []);
    /// Tasks that are ready and wait for a thread, in the queue of all threads.
    pub static RUNTIME_QUEUE: IntGauge = ("reliant_runtime_queued_tasks", []);
    /// Time that threads spent at work, all together; its rate over the threads is how busy the runtime is.
    pub static RUNTIME_BUSY: Counter = ("reliant_runtime_busy_seconds_total", []);
    /// How late a task is taken up whose time has come, measured four times a second.
    pub static RUNTIME_LAG: Histogram = ("reliant_runtime_lag_seconds", [], HOP_SECONDS);
}

/// The registry that `/metrics` shows, with every declared metric in it.
pub fn registry() -> &'static Registry {
    force();
    &REGISTRY
}

/// The text of `/metrics`.
pub fn render() -> String {
    crate::sampled::read();
    let mut text = String::new();
    if let Err(error) = prometheus::TextEncoder::new().encode_utf8(&registry().gather(), &mut text) {
        tracing::warn!(error = %chain(&error), "metrics could not be written out");
    }
    text
}

/// The additive phases of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Accept,
    Held,
    Enqueue,
    Pickup,
    Retry,
    Context,
    ModelFirstToken,
    ModelStream,
    ApprovalWait,
    ToolRoute,
    ToolRun,
    ToolReturn,
    Persist,
    Fanout,
}

impl Phase {
    pub const ALL: &'static [Phase] = &[
        Phase::Accept,
        Phase::Held,
        Phase::Enqueue,
        Phase::Pickup,
        Phase::Retry,
        Phase::Context,
        Phase::ModelFirstToken,
        Phase::ModelStream,
        Phase::ApprovalWait,
        Phase::ToolRoute,
        Phase::ToolRun,
        Phase::ToolReturn,
        Phase::Persist,
        Phase::Fanout,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Phase::Accept => "accept",
            Phase::Held => "held",
            Phase::Enqueue => "enqueue",
            Phase::Pickup => "pickup",
            Phase::Retry => "retry",
            Phase::Context => "context",
            Phase::ModelFirstToken => "model_first_token",
            Phase::ModelStream => "model_stream",
            Phase::ApprovalWait => "approval_wait",
            Phase::ToolRoute => "tool_route",
            Phase::ToolRun => "tool_run",
            Phase::ToolReturn => "tool_return",
            Phase::Persist => "persist",
            Phase::Fanout => "fanout",
        }
    }

    /// Counts the time, and writes it on the span that knows it.
    pub fn observe(self, time: Duration, span: &tracing::Span) {
        TURN_PHASE.with_label_values(&[self.as_str()]).observe(time.as_secs_f64());
        span.set_attribute(crate::names::attr::phase(self), time.as_secs_f64());
    }
}

/// A tool's name as a label: an MCP server may offer 10,000 names, and they all count as one.
pub fn tool_label(tool: &str) -> &'static str {
    match tool {
        "shell" => "shell",
        "read_file" => "read_file",
        "write_file" => "write_file",
        "edit_file" => "edit_file",
        "list_dir" => "list_dir",
        "glob" => "glob",
        "grep" => "grep",
        _ if tool.starts_with("mcp__") => "mcp",
        _ => "other",
    }
}

/// Times something whose last label is its outcome; see [`guard`].
#[must_use = "dropping it at once counts a cancelled call"]
pub struct CallGuard {
    histogram: &'static HistogramVec,
    labels: Vec<&'static str>,
    start: Instant,
    settled: bool,
}

/// Starts timing. The histogram's last label is the outcome; `labels` are those before it. Where the guard is dropped
/// without [`CallGuard::done`], the outcome is "cancelled".
pub fn guard(histogram: &'static HistogramVec, labels: &[&'static str]) -> CallGuard {
    CallGuard { histogram, labels: labels.to_vec(), start: Instant::now(), settled: false }
}

impl CallGuard {
    pub fn done(mut self, outcome: &'static str) {
        self.settle(outcome);
    }

    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    fn settle(&mut self, outcome: &'static str) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        self.labels.push(outcome);
        self.histogram.with_label_values(&self.labels).observe(self.start.elapsed().as_secs_f64());
    }
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        self.settle("cancelled");
    }
}

/// Counts one in a gauge for as long as it lives.
pub struct GaugeGuard(IntGauge);

pub fn in_flight(gauge: &IntGauge) -> GaugeGuard {
    gauge.inc();
    GaugeGuard(gauge.clone())
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_declared_metric_registers_and_is_named_well() {
        registry();
        let mut names: Vec<_> = DECLARED.iter().map(|metric| metric.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DECLARED.len());
        for metric in DECLARED {
            assert_eq!(metric.kind == "counter", metric.name.ends_with("_total"), "{}", metric.name);
            assert!(metric.kind != "histogram" || metric.name.ends_with("_seconds"), "{}", metric.name);
            for label in metric.labels {
                assert!(!label.ends_with("_id") && *label != "user" && *label != "chat", "{}: {label}", metric.name);
            }
        }
    }

    #[test]
    fn a_dropped_guard_counts_cancelled() {
        guard(&TURN_STEP, &["test_step"]).done("ok");
        drop(guard(&TURN_STEP, &["test_step"]));
        let count = |outcome| TURN_STEP.with_label_values(&["test_step", outcome]).get_sample_count();
        assert_eq!((count("ok"), count("cancelled")), (1, 1));
        assert!(render().contains("reliant_turn_step_seconds_count{outcome=\"cancelled\",step=\"test_step\"} 1"));
    }

    #[test]
    fn tool_labels_are_bounded() {
        assert_eq!(tool_label("shell"), "shell");
        for n in 0..1000 {
            assert_eq!(tool_label(&format!("mcp__s__{n}")), "mcp");
            assert_eq!(tool_label(&format!("x{n}")), "other");
        }
    }
}
