//! The task of one chat that has viewers here. It subscribes first and reads then, takes hints and pieces as they come,
//! and gives each outcome to all viewers at once. Reads of the log and refills run beside it; it waits for none of them.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use reliant_bus::{Bus, BusError, PrefixSubject, Subscription, UpdateSubject};
use reliant_store::{Store, StoreError};
use reliant_telemetry::{
    chain,
    metrics::{self, Phase},
    sampled,
};
use reliant_types::{
    ChatId, Code, Failure, UserId, limits,
    pb::{self, chat_event::Kind, subscribe_response::Update},
};
use tokio::{sync::mpsc, task::JoinSet, time::sleep_until};

use super::{
    budget::{Budget, Charge},
    live::Hole,
    merge::{Output, Source, turn_ended},
    refill::Refills,
    roster::Roster,
    state::{Admit, ChatState, Older, Unusable},
    table::{Command, LINGER, Station},
    viewer::{Item, Topic},
    wire::encode,
};

/// Events of one read of the log.
const READ_MAX: i64 = 500;
const REFILL_TIMEOUT: Duration = Duration::from_secs(2);
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// Reads that found nothing where hints said that there is something; then the hints are not believed.
const FRUITLESS_MAX: u32 = 5;

/// What a followed chat costs at the least.
const FEED_BYTES: usize = 16 * 1024;
/// What a user waits who follows too much.
const RETRY_FOLLOWING: Duration = Duration::from_secs(5);

/// What the feeds of a replica work with.
pub struct Deps {
    pub store: Store,
    pub bus: Bus,
    /// For live text.
    pub budget: Arc<Budget>,
    /// For events and snapshots that are kept for viewers that join or fall behind.
    pub kept: Arc<Budget>,
}

/// Events, and whether the log has more of them.
type LogRead = (Vec<pb::ChatEvent>, bool);

/// What ran beside the task has ended.
#[expect(clippy::large_enum_variant, reason = "one at a time, moved once")]
enum Done {
    Log { after: i64, read: Result<LogRead, StoreError> },
    Older { after: i64, read: Result<LogRead, StoreError> },
    Snapshot { restart: bool, read: Result<pb::ChatSnapshot, StoreError> },
    Refill { hole: Hole, answer: Result<pb::PrefixReply, BusError> },
}

struct ChatFeed {
    user: UserId,
    chat: ChatId,
    deps: Arc<Deps>,
    state: ChatState,
    /// For what the state keeps.
    kept: Charge,
    roster: Roster,
    refills: Refills,
    jobs: JoinSet<Done>,
    reading_log: bool,
    reading_older: bool,
    reading_snapshot: bool,
    /// The log must be read, though no gap is known.
    want_log: bool,
    /// The log is another one: all starts anew.
    want_restart: bool,
    /// Failed or fruitless reads in a row, and when to read again.
    failures: u32,
    not_before: Instant,
    older: Option<Older>,
    /// When to look again at what could not be done now.
    wake: Option<Instant>,
}

/// Runs until some seconds after the last viewer left.
pub async fn run(station: Station<(UserId, ChatId)>, mut commands: mpsc::Receiver<Command>, deps: Arc<Deps>) {
    let (user, chat) = station.key;
    let Some(kept) = Charge::new(deps.kept.of(user), FEED_BYTES) else {
        sampled::refused("feed_bytes");
        let message = "you follow more chats here than the server has memory for; close some, or try again";
        return station.ready(Err(Failure::new(Code::QueueFull, message).retry_after(RETRY_FOLLOWING)));
    };
    let mut hints = match deps.bus.subscribe(&UpdateSubject { user, chat }).await {
        Ok(hints) => hints,
        Err(error) => return station.ready(Err(error.into())),
    };
    // The server knows of the subscription before Postgres is read: what is committed later is heard.
    deps.bus.flush().await;
    let snapshot = match deps.store.snapshot(user, chat).await {
        Ok(snapshot) => snapshot,
        Err(error) => return station.ready(Err(error.into())),
    };
    let mut feed = ChatFeed {
        user,
        chat,
        state: ChatState::new(chat.to_string(), snapshot, deps.budget.of(user)),
        kept,
        deps,
        roster: Roster::new(Topic::Chat(chat)),
        refills: Refills::default(),
        jobs: JoinSet::new(),
        reading_log: false,
        reading_older: false,
        reading_snapshot: false,
        want_log: false,
        want_restart: false,
        failures: 0,
        not_before: Instant::now(),
        older: None,
        wake: None,
    };
    station.at(feed.state.seq());
    station.ready(Ok(()));
    feed.serve(&station, &mut commands, &mut hints).await;
}

impl ChatFeed {
    async fn serve(
        &mut self,
        station: &Station<(UserId, ChatId)>,
        commands: &mut mpsc::Receiver<Command>,
        hints: &mut Subscription<UpdateSubject>,
    ) {
        let mut leave_at: Option<tokio::time::Instant> = None;
        loop {
            let (wake, leave) = (self.wake, leave_at);
            tokio::select! {
                hint = hints.next() => {
                    let Some(hint) = hint else { return };
                    let received = Instant::now();
                    if hint.message.events.is_empty() {
                        self.hint(hint.message, received);
                    } else {
                        hint.span().in_scope(|| {
                            let _fanout = tracing::info_span!("update.fanout", viewers = self.roster.len()).entered();
                            self.hint(hint.message, received);
                        });
                    }
                }
                command = commands.recv() => {
                    let Some(command) = command else { return };
                    self.command(command);
                }
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => match done {
                    Ok(done) => self.done(done),
                    // A job panicked: what it was to bring would be missing for ever. Viewers subscribe anew.
                    Err(error) => {
                        tracing::error!(error = %chain(&error), chat.id = %self.chat, "a read of a chat's feed failed");
                        return;
                    }
                },
                () = sleep_until(wake.unwrap_or_else(Instant::now).into()), if wake.is_some() => self.wake = None,
                () = station.left() => leave_at = Some(tokio::time::Instant::now() + LINGER),
                () = sleep_until(leave.unwrap_or_else(tokio::time::Instant::now)), if leave.is_some() => {
                    leave_at = None;
                    if station.retire() {
                        return;
                    }
                }
            }
            self.settle();
            self.charge();
            station.at(self.state.seq());
        }
    }

    fn hint(&mut self, update: pb::ChatUpdate, received: Instant) {
        let mut out = Vec::new();
        let merge = self.state.merge();
        for event in update.events {
            merge.event(event, Source::Hint, &mut out);
        }
        for delta in update.deltas {
            merge.delta(delta, &mut out);
        }
        for length in &update.lengths {
            merge.length(length);
        }
        self.spread(&out);
        fanned_out(&out, received);
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Join { viewer, cursor } => self.roster.join(viewer, cursor),
            Command::Resume { viewer } => {
                if self.roster.resume(viewer) {
                    metrics::VIEWER_RESYNCS.with_label_values(&["lagged"]).inc();
                }
            }
            Command::Reaches { seq } => {
                if seq > self.state.seq() {
                    metrics::VIEWER_RESYNCS.with_label_values(&["poll"]).inc();
                    self.state.merge().reaches(seq);
                }
            }
            Command::Reset => self.want_restart = true,
        }
    }

    /// Gives what the merge put out to all viewers.
    fn spread(&mut self, out: &[Output]) {
        if out.is_empty() {
            return;
        }
        let now_us = reliant_types::unix_us();
        let viewers = self.roster.len() as u64;
        let (mut events, mut deltas) = (0, 0);
        for output in out {
            match output {
                Output::Event(_) => events += 1,
                Output::Delta(delta) => {
                    deltas += 1;
                    if delta.produced_unix_us > 0 && delta.produced_unix_us <= now_us {
                        metrics::VIEWER_LAG.observe((now_us - delta.produced_unix_us) as f64 / 1e6);
                    }
                }
            }
        }
        let item = Item::from(self.state.record(out));
        let state = &self.state;
        self.roster.send(&item, deltas, || state.cursor_before(out));
        count("event", events * viewers);
        count("delta", deltas.unsigned_abs() * viewers);
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Log { after, read } => {
                self.reading_log = false;
                match read {
                    Ok((events, more)) => self.log_read(after, events, more),
                    Err(error) => self.read_failed(&error),
                }
            }
            Done::Older { after, read } => {
                self.reading_older = false;
                match read {
                    Ok((events, _)) => self.older_read(after, events),
                    Err(error) => self.read_failed(&error),
                }
            }
            Done::Snapshot { restart, read } => {
                self.reading_snapshot = false;
                match read {
                    Ok(snapshot) if restart => self.restart(snapshot),
                    Ok(snapshot) => {
                        self.failures = 0;
                        self.state.set_snapshot(snapshot);
                    }
                    Err(error) => self.read_failed(&error),
                }
            }
            Done::Refill { hole, answer } => self.refilled(hole, answer),
        }
    }

    fn restart(&mut self, snapshot: pb::ChatSnapshot) {
        // What is under way is of the other log.
        self.jobs = JoinSet::new();
        (self.reading_log, self.reading_older, self.want_log, self.want_restart) = (false, false, false, false);
        self.failures = 0;
        self.state = ChatState::new(self.chat.to_string(), snapshot, self.deps.budget.of(self.user));
        self.refills = Refills::default();
        self.roster.restart();
    }

    fn log_read(&mut self, after: i64, events: Vec<pb::ChatEvent>, more: bool) {
        let received = Instant::now();
        let mut out = Vec::new();
        for event in events {
            self.state.merge().event(event, Source::Log, &mut out);
        }
        self.spread(&out);
        fanned_out(&out, received);
        let progress = self.state.seq() > after;
        if more && progress {
            self.want_log = true;
            return;
        }
        let merge = self.state.merge();
        merge.read_to_end();
        self.failures = if progress || !merge.has_gap() { 0 } else { self.failures + 1 };
        if self.failures > FRUITLESS_MAX {
            tracing::warn!(chat.id = %self.chat, "hints told of events that the log does not have; they are dropped");
            merge.drop_pending();
            self.failures = 0;
        }
        self.hold_off();
        self.roster.waiting_mut().for_each(|cursor| cursor.checked = true);
    }

    fn older_read(&mut self, after: i64, events: Vec<pb::ChatEvent>) {
        self.failures = 0;
        let mut last = after;
        let contiguous = events.into_iter().take_while(|event| {
            last += 1;
            event.seq == last
        });
        let older = Older { after, events: contiguous.map(|event| encode(Update::Event(event))).collect() };
        self.state.keep_older(&older);
        let reaches = after + older.events.len() as i64;
        // The log does not go back so far any more, or the window has moved on: a snapshot serves them.
        for cursor in self.roster.waiting_mut().filter(|cursor| cursor.after >= after) {
            if self.state.window_base() > reaches.max(cursor.after) {
                Unusable::TooOld.count();
                cursor.after = -1;
            }
        }
        self.older = Some(older);
    }

    fn refilled(&mut self, hole: Hole, answer: Result<pb::PrefixReply, BusError>) {
        let (outcome, deltas) = match answer {
            Ok(reply) if reply.found => ("filled", Some(reply.deltas)),
            Ok(_) => ("gone", None),
            Err(_) => ("away", None),
        };
        metrics::VIEWER_REFILLS.with_label_values(&[outcome]).inc();
        let mut out = Vec::new();
        let progress = match deltas {
            Some(deltas) => {
                self.state.merge().refill(hole, deltas, &mut out);
                hole.block < 0 || !out.is_empty()
            }
            None => {
                // The producer let go of it: it may be committed. If not, the next epoch brings it anew.
                self.want_log = true;
                false
            }
        };
        self.refills.settled(&hole, progress, Instant::now());
        self.spread(&out);
    }

    fn read_failed(&mut self, error: &StoreError) {
        tracing::warn!(error = %chain(error), chat.id = %self.chat, "the log could not be read; viewers wait");
        self.failures += 1;
        self.want_log = true;
        self.hold_off();
    }

    fn hold_off(&mut self) {
        let wait = match self.failures {
            0 => Duration::ZERO,
            failures => (RETRY_MIN * 2u32.pow(failures.min(10) - 1)).min(RETRY_MAX),
        };
        self.not_before = Instant::now() + wait;
    }

    /// Starts what is missing, and admits whom it can.
    fn settle(&mut self) {
        let now = Instant::now();
        let holes = self.state.merge().holes();
        if !holes.is_empty() {
            let (due, next) = self.refills.due(&holes, now);
            due.into_iter().for_each(|hole| self.refill(hole));
            self.wake_at(next);
        }
        if self.older.is_some() || self.roster.waiting_mut().next().is_some() {
            self.admit();
        }
        if self.want_restart {
            self.read_snapshot(true);
        }
        let gap = self.state.merge().has_gap();
        if (gap || self.want_log) && !self.reading_log {
            if self.not_before > now {
                self.wake_at(Some(self.not_before));
            } else {
                if gap && !self.want_log {
                    metrics::VIEWER_RESYNCS.with_label_values(&["gap"]).inc();
                }
                self.read_log();
            }
        }
    }

    /// Charges what is kept. Over the budget nothing is, once everybody has what it waits for.
    fn charge(&mut self) {
        if !self.kept.set(FEED_BYTES + self.state.kept_bytes()) && self.roster.waiting_mut().next().is_none() {
            sampled::refused("feed_bytes");
            self.state.forget_kept();
            self.kept.set(FEED_BYTES);
        }
    }

    fn admit(&mut self) {
        let mut older_from: Option<i64> = None;
        for (id, cursor) in self.roster.waiting() {
            match self.state.admit(&cursor, self.older.as_ref()) {
                Admit::Ready(updates) => {
                    count("replayed", updates.len() as u64);
                    self.state.unusable(&cursor).into_iter().for_each(Unusable::count);
                    self.roster.admit(id, Item::from(updates));
                }
                Admit::Behind => self.want_log = true,
                Admit::NeedOlder { after } => older_from = Some(older_from.map_or(after, |from| from.min(after))),
                Admit::NeedSnapshot => self.read_snapshot(false),
            }
        }
        self.older = None;
        if let Some(after) = older_from {
            self.read_older(after);
        }
    }

    fn read_log(&mut self) {
        self.want_log = false;
        self.reading_log = true;
        let (deps, chat, after) = (self.deps.clone(), self.chat, self.state.seq());
        self.jobs.spawn(async move { Done::Log { after, read: deps.store.events_after(chat, after, READ_MAX).await } });
    }

    fn read_older(&mut self, after: i64) {
        if self.reading_older || self.held_off() {
            return;
        }
        metrics::VIEWER_RESYNCS.with_label_values(&["resume"]).inc();
        self.reading_older = true;
        let limit = (self.state.window_base() - after).clamp(1, limits::RESUME_EVENTS_MAX);
        let (deps, chat) = (self.deps.clone(), self.chat);
        self.jobs.spawn(async move { Done::Older { after, read: deps.store.events_after(chat, after, limit).await } });
    }

    fn read_snapshot(&mut self, restart: bool) {
        if self.reading_snapshot || self.held_off() {
            return;
        }
        self.reading_snapshot = true;
        let (deps, user, chat) = (self.deps.clone(), self.user, self.chat);
        self.jobs.spawn(async move { Done::Snapshot { restart, read: deps.store.snapshot(user, chat).await } });
    }

    /// After a failure everybody waits a little; true: not now.
    fn held_off(&mut self) -> bool {
        let held = self.not_before > Instant::now();
        if held {
            self.wake_at(Some(self.not_before));
        }
        held
    }

    fn refill(&mut self, hole: Hole) {
        let request = pb::PrefixRequest {
            target_id: hole.target.to_string(),
            block: hole.block,
            from_offset: hole.from,
            user_id: self.user.to_string(),
        };
        let deps = self.deps.clone();
        self.jobs.spawn(async move {
            let subject = PrefixSubject { producer: hole.producer };
            Done::Refill { hole, answer: deps.bus.request(&subject, &request, REFILL_TIMEOUT).await }
        });
    }

    fn wake_at(&mut self, at: Option<Instant>) {
        if let Some(at) = at {
            self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
        }
    }
}

/// The last phase of a turn whose end has been given to the viewers.
fn fanned_out(out: &[Output], received: Instant) {
    let ended = |output: &Output| match output {
        Output::Event(event) => matches!(&event.kind, Some(Kind::TurnChanged(turn)) if turn_ended(turn)),
        Output::Delta(_) => false,
    };
    if out.iter().any(ended) {
        Phase::Fanout.observe(received.elapsed(), &tracing::Span::current());
    }
}

pub fn count(kind: &str, updates: u64) {
    if updates > 0 {
        metrics::VIEWER_UPDATES.with_label_values(&[kind]).inc_by(updates);
    }
}
