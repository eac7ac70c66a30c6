//! The task of one user's feed that somebody here follows. As a chat's, with events alone.
//!
//! There are no snapshots of a feed. Whoever resumes gets every event since, in portions; who begins, or counts in another
//! log, is told by `CaughtUp` where the feed is, and reads the lists.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use reliant_bus::{FeedSubject, Subscription};
use reliant_store::StoreError;
use reliant_telemetry::chain;
use reliant_types::{
    UserId, limits,
    pb::{self, subscribe_response::Update},
};
use tokio::{sync::mpsc, task::JoinSet, time::sleep_until};

use super::{
    chat_feed::{Deps, count},
    roster::Roster,
    sequence::{Sequencer, Window},
    state::{Cursor, Unusable},
    table::{Command, LINGER, Station},
    viewer::{Item, Topic},
    wire::encode,
};

const WINDOW_MAX_BYTES: usize = 512 * 1024;
const READ_MAX: i64 = 500;
const RETRY: Duration = Duration::from_millis(500);
const FRUITLESS_MAX: u32 = 5;

/// Events, and whether the feed has more of them.
type LogRead = (Vec<pb::FeedEvent>, bool);

enum Done {
    Log { after: i64, read: Result<LogRead, StoreError> },
    Older { after: i64, read: Result<LogRead, StoreError> },
    Epoch(Result<i64, StoreError>),
}

struct UserFeed {
    user: UserId,
    deps: Arc<Deps>,
    line: Sequencer<pb::FeedEvent>,
    window: Window<Bytes>,
    log_epoch: i64,
    roster: Roster,
    jobs: JoinSet<Done>,
    reading_log: bool,
    reading_older: bool,
    want_log: bool,
    failures: u32,
    not_before: Option<Instant>,
}

/// Runs until some seconds after the last viewer left.
pub async fn run(station: Station<UserId>, mut commands: mpsc::Receiver<Command>, deps: Arc<Deps>) {
    let user = station.key;
    let mut hints = match deps.bus.subscribe(&FeedSubject { user }).await {
        Ok(hints) => hints,
        Err(error) => return station.ready(Err(error.into())),
    };
    deps.bus.flush().await;
    let users = [user];
    let (seqs, log_epoch) = match tokio::try_join!(deps.store.feed_seqs(&users), deps.store.log_epoch()) {
        Ok(read) => read,
        Err(error) => return station.ready(Err(error.into())),
    };
    let seq = seqs.first().map_or(0, |(_, seq)| *seq);
    let mut feed = UserFeed {
        user,
        deps,
        line: Sequencer::new(seq),
        window: Window::new(seq, limits::RESUME_EVENTS_MAX as usize, WINDOW_MAX_BYTES),
        log_epoch,
        roster: Roster::new(Topic::User),
        jobs: JoinSet::new(),
        reading_log: false,
        reading_older: false,
        want_log: false,
        failures: 0,
        not_before: None,
    };
    station.at(seq);
    station.ready(Ok(()));
    feed.serve(&station, &mut commands, &mut hints).await;
}

impl UserFeed {
    async fn serve(
        &mut self,
        station: &Station<UserId>,
        commands: &mut mpsc::Receiver<Command>,
        hints: &mut Subscription<FeedSubject>,
    ) {
        let mut leave_at: Option<Instant> = None;
        loop {
            let (wake, leave) = (self.not_before, leave_at);
            tokio::select! {
                hint = hints.next() => match hint {
                    Some(hint) => hint.span().in_scope(|| self.events(hint.message.events)),
                    None => return,
                },
                command = commands.recv() => match command {
                    Some(Command::Join { viewer, cursor }) => self.roster.join(viewer, cursor),
                    Some(Command::Resume { viewer }) => { self.roster.resume(viewer); }
                    Some(Command::Reaches { seq }) => self.line.reaches(seq),
                    Some(Command::Reset) => {
                        let deps = self.deps.clone();
                        self.jobs.spawn(async move { Done::Epoch(deps.store.log_epoch().await) });
                    }
                    None => return,
                },
                Some(done) = self.jobs.join_next(), if !self.jobs.is_empty() => match done {
                    Ok(Done::Epoch(Ok(epoch))) if epoch != self.log_epoch => return,
                    Ok(done) => self.done(done),
                    Err(error) => {
                        tracing::error!(error = %chain(&error), user.id = %self.user, "a read of a user's feed failed");
                        return;
                    }
                },
                () = sleep_until(wake.unwrap_or_else(Instant::now).into()), if wake.is_some() => self.not_before = None,
                () = station.left() => leave_at = Some(Instant::now() + LINGER),
                () = sleep_until(leave.unwrap_or_else(Instant::now).into()), if leave.is_some() => {
                    leave_at = None;
                    if station.retire() {
                        return;
                    }
                }
            }
            self.settle();
            station.at(self.line.last());
        }
    }

    fn events(&mut self, events: Vec<pb::FeedEvent>) {
        let mut out = Vec::new();
        for event in events {
            self.line.push(event.seq, event, |event| {
                let bytes = encode(Update::FeedEvent(event));
                self.window.push(bytes.clone(), bytes.len());
                out.push(bytes);
            });
        }
        if out.is_empty() {
            return;
        }
        count("feed", (out.len() * self.roster.len()) as u64);
        let before = self.line.last() - out.len() as i64;
        let log_epoch = self.log_epoch;
        self.roster.send(&Item::from(out), 0, || Cursor { after: before, log_epoch, ..Cursor::default() });
    }

    fn done(&mut self, done: Done) {
        let failed = match done {
            Done::Log { after, read } => {
                self.reading_log = false;
                read.map(|(events, more)| self.log_read(after, events, more)).err()
            }
            Done::Older { after, read } => {
                self.reading_older = false;
                read.map(|(events, _)| self.older_read(after, events)).err()
            }
            Done::Epoch(read) => read.err(),
        };
        if let Some(error) = failed {
            tracing::warn!(error = %chain(&error), user.id = %self.user, "a user's feed could not be read; viewers wait");
            self.want_log = true;
            self.not_before = Some(Instant::now() + RETRY);
        }
    }

    fn log_read(&mut self, after: i64, events: Vec<pb::FeedEvent>, more: bool) {
        self.events(events);
        let progress = self.line.last() > after;
        if more && progress {
            self.want_log = true;
            return;
        }
        self.line.read_to_end();
        self.failures = if progress || !self.line.has_gap() { 0 } else { self.failures + 1 };
        if self.failures > FRUITLESS_MAX {
            self.line.drop_pending();
            self.failures = 0;
        } else if self.failures > 0 {
            self.not_before = Some(Instant::now() + RETRY);
        }
        self.roster.waiting_mut().for_each(|cursor| cursor.checked = true);
    }

    fn older_read(&mut self, after: i64, events: Vec<pb::FeedEvent>) {
        let base = self.window.base();
        let older: Vec<_> = events
            .into_iter()
            .zip(after + 1..=base)
            .take_while(|(event, seq)| event.seq == *seq)
            .map(|(event, _)| encode(Update::FeedEvent(event)))
            .collect();
        let end = after + older.len() as i64;
        for (id, cursor) in self.roster.waiting() {
            if cursor.after < after || cursor.after >= base {
                continue;
            }
            if older.is_empty() {
                // The log does not go back so far any more.
                Unusable::TooOld.count();
                self.roster.advance(id, Item::from(Vec::new()), Cursor { after: -1, ..cursor });
            } else if cursor.after < end {
                let missed = older[(cursor.after - after) as usize..].to_vec();
                count("feed", missed.len() as u64);
                self.roster.advance(id, Item::from(missed), Cursor { after: end, ..cursor });
            }
        }
    }

    fn settle(&mut self) {
        let mut older_from: Option<i64> = None;
        for (id, cursor) in self.roster.waiting() {
            let last = self.line.last();
            let unusable = cursor.outside(last, self.log_epoch);
            if unusable == Some(Unusable::Future) && !cursor.checked {
                self.want_log = true;
                continue;
            }
            let jump = unusable.is_some() || cursor.after < 0;
            let mut updates: Vec<Bytes> = match self.window.after(cursor.after) {
                _ if jump => Vec::new(),
                Some(events) => events.cloned().collect(),
                None => {
                    older_from = Some(older_from.map_or(cursor.after, |from| from.min(cursor.after)));
                    continue;
                }
            };
            // A lagged viewer that jumps must hear of it too.
            if cursor.greet || jump {
                let log_epoch = self.log_epoch;
                updates.push(encode(Update::CaughtUp(pb::CaughtUp { chat_id: String::new(), seq: last, log_epoch })));
            }
            unusable.into_iter().for_each(Unusable::count);
            self.roster.admit(id, Item::from(updates));
        }
        if self.not_before.is_some() {
            return;
        }
        let (deps, user) = (self.deps.clone(), self.user);
        if let Some(after) = older_from
            && !self.reading_older
        {
            self.reading_older = true;
            let deps = deps.clone();
            let limit = (self.window.base() - after).clamp(1, limits::RESUME_EVENTS_MAX);
            self.jobs
                .spawn(async move { Done::Older { after, read: deps.store.feed_after(user, after, limit).await } });
        }
        if (self.line.has_gap() || self.want_log) && !self.reading_log {
            (self.want_log, self.reading_log) = (false, true);
            let after = self.line.last();
            self.jobs
                .spawn(async move { Done::Log { after, read: deps.store.feed_after(user, after, READ_MAX).await } });
        }
    }
}
