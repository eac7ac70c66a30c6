//! Chats that each send the next message when their turn has ended, and what the log of ended turns says of a window of
//! time: the rate, the turns' times, and how long a chat went without a turn.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use reliant_client::ChatSession;
use reliant_load::{Samples, samples::MS};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout_at},
};

/// Of one turn; longer than any part leaves a mesh without CPU, so that a late turn is measured and not given up.
const TURN_PATIENCE: Duration = Duration::from_secs(300);
/// After a turn that failed the chat is opened anew, not more often than this.
const REOPEN_AFTER: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(100);

/// A turn that succeeded.
#[derive(Debug, Clone, Copy)]
pub struct TurnEnd {
    pub chat: usize,
    pub at: Instant,
    pub took: Duration,
}

#[derive(Debug, Clone, Copy)]
pub struct Window {
    pub from: Instant,
    pub to: Instant,
}

impl Window {
    /// The time from now on, once it has passed.
    pub async fn lasting(time: Duration) -> Self {
        let from = Instant::now();
        sleep_until(from + time).await;
        Self { from, to: Instant::now() }
    }

    pub fn holds(&self, at: Instant) -> bool {
        self.from <= at && at < self.to
    }

    pub fn seconds(&self) -> f64 {
        self.to.duration_since(self.from).as_secs_f64()
    }
}

#[derive(Default)]
struct Log {
    ends: Vec<TurnEnd>,
    failures: Vec<String>,
}

fn locked(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The chats at work. Dropped, they are left where they are.
pub struct ClosedLoop {
    log: Arc<Mutex<Log>>,
    stopping: Arc<AtomicBool>,
    chats: JoinSet<()>,
    count: usize,
    began: Instant,
}

/// What is known once all chats have stopped.
pub struct Finished {
    pub turns: Turns,
    /// Why turns failed, one sentence each.
    pub failures: Vec<String>,
    /// Chats whose last turn had not ended in time.
    pub unended: usize,
}

impl ClosedLoop {
    pub fn start(sessions: Vec<ChatSession>) -> Self {
        let (log, stopping) = (Arc::new(Mutex::new(Log::default())), Arc::new(AtomicBool::new(false)));
        let count = sessions.len();
        let mut chats = JoinSet::new();
        for (chat, session) in sessions.into_iter().enumerate() {
            chats.spawn(Box::pin(send_turns(chat, session, log.clone(), stopping.clone())));
        }
        Self { log, stopping, chats, count, began: Instant::now() }
    }

    /// Waits until each chat has had so many turns, at most until the deadline.
    pub async fn until_each_had(&self, turns: usize, deadline: Instant) {
        while Instant::now() < deadline {
            let mut had = vec![0; self.count];
            locked(&self.log).ends.iter().for_each(|end| had[end.chat] += 1);
            if had.iter().all(|count| *count >= turns) {
                return;
            }
            sleep(POLL).await;
        }
    }

    /// Lets each chat end its turn.
    pub async fn stop(mut self, patience: Duration) -> Finished {
        self.stopping.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + patience;
        while let Ok(Some(_)) = timeout_at(deadline, self.chats.join_next()).await {}
        let unended = self.chats.len();
        self.chats.shutdown().await;
        let log = std::mem::take(&mut *locked(&self.log));
        let turns = Turns { ends: log.ends, chats: self.count, began: self.began };
        Finished { turns, failures: log.failures, unended }
    }
}

async fn send_turns(chat: usize, mut session: ChatSession, log: Arc<Mutex<Log>>, stopping: Arc<AtomicBool>) {
    while !stopping.load(Ordering::Relaxed) {
        let failure = match session.send_and_wait("go", TURN_PATIENCE).await {
            Ok(report) if !report.succeeded() => format!("{:?}: {}", report.turn.status(), report.turn.error_message),
            Ok(report) if !report.verification.is_clean() => {
                format!("the stream broke its promise: {:?}", report.verification)
            }
            Ok(report) => {
                locked(&log).ends.push(TurnEnd { chat, at: report.ended_at, took: report.total() });
                continue;
            }
            Err(failure) => failure.to_string(),
        };
        locked(&log).failures.push(failure);
        sleep(REOPEN_AFTER).await;
        if let Ok(reopened) = session.client().open(session.chat()).await {
            session = reopened;
        }
    }
}

/// The turns of a closed loop, to be read by windows.
pub struct Turns {
    ends: Vec<TurnEnd>,
    chats: usize,
    began: Instant,
}

impl Turns {
    fn within(&self, window: Window) -> impl Iterator<Item = &TurnEnd> {
        self.ends.iter().filter(move |end| window.holds(end.at))
    }

    /// Turns per second that ended in the window.
    pub fn rate(&self, window: Window) -> f64 {
        self.within(window).count() as f64 / window.seconds()
    }

    /// The 95th percentile of the milliseconds of the turns that ended in the window; where none ended, of the time for
    /// which the chats have been waiting for theirs.
    pub fn p95_ms(&self, window: Window) -> f64 {
        let times = Samples::of(self.within(window).map(|end| end.took), MS);
        if times.is_empty() { Samples::of(self.gaps(window).open, MS).at(0.95) } else { times.at(0.95) }
    }

    /// The longest time that a chat went without a turn's end, over the median of such times. A chat that stands still
    /// while the others go on makes it large; where all are equally slow it is small.
    pub fn worst_gap_over_median(&self, window: Window) -> f64 {
        let Gaps { ended, open } = self.gaps(window);
        let worst = ended.iter().chain(&open).max().copied().unwrap_or_default();
        let median = Samples::of(if ended.is_empty() { open } else { ended }, MS).at(0.5);
        worst.as_secs_f64() * MS / median
    }

    /// A gap lasts from the end of a chat's turn, or from the chat's beginning, to the end of its next turn. It counts in
    /// its full length where it ends, or is still open at the window's end.
    fn gaps(&self, window: Window) -> Gaps {
        let mut last = vec![self.began; self.chats];
        let mut gaps = Gaps::default();
        let mut ends: Vec<&TurnEnd> = self.ends.iter().filter(|end| end.at < window.to).collect();
        ends.sort_by_key(|end| end.at);
        for end in ends {
            let before = std::mem::replace(&mut last[end.chat], end.at);
            if end.at >= window.from {
                gaps.ended.push(end.at.duration_since(before));
            }
        }
        gaps.open = last.into_iter().map(|last| window.to.duration_since(last)).collect();
        gaps
    }
}

#[derive(Debug, Default, PartialEq)]
struct Gaps {
    ended: Vec<Duration>,
    open: Vec<Duration>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Each chat's turns end at these seconds; a turn takes as long as its chat's gap.
    fn turns(ends: &[&[u32]]) -> (Turns, impl Fn(u32, u32) -> Window + use<>) {
        let began = Instant::now();
        let mut all = Vec::new();
        for (chat, seconds) in ends.iter().enumerate() {
            let mut last = 0;
            for second in *seconds {
                all.push(TurnEnd { chat, at: began + SECOND * *second, took: SECOND * (second - last) });
                last = *second;
            }
        }
        let window = move |from, to| Window { from: began + SECOND * from, to: began + SECOND * to };
        (Turns { ends: all, chats: ends.len(), began }, window)
    }

    #[test]
    fn a_rate_counts_what_ended_in_the_window() {
        let (turns, window) = turns(&[&[1, 2, 3, 10], &[4]]);
        assert_eq!(turns.rate(window(2, 6)), 0.75);
        assert_eq!(turns.rate(window(11, 20)), 0.0);
        assert_eq!(turns.p95_ms(window(0, 5)), 4000.0);
        // Nothing ended: the chats have waited for 10 and for 16 seconds.
        assert_eq!(turns.p95_ms(window(11, 20)), 16_000.0);
    }

    #[test]
    fn a_gap_counts_where_it_ends_in_its_full_length() {
        let (turns, window) = turns(&[&[1, 2, 9], &[3, 6]]);
        let gaps = turns.gaps(window(5, 10));
        assert_eq!(gaps, Gaps { ended: vec![SECOND * 3, SECOND * 7], open: vec![SECOND, SECOND * 4] });
    }

    #[test]
    fn one_chat_that_stands_still_is_seen_and_equal_slowness_is_not() {
        let steady: Vec<u32> = (1..60).collect();
        let (one_stands, window) = turns(&[&steady, &steady, &steady, &[5]]);
        assert_eq!(one_stands.worst_gap_over_median(window(20, 60)), 55.0);
        let (all_slow, window) = turns(&[&[20, 40], &[21, 41], &[22, 42]]);
        assert!(all_slow.worst_gap_over_median(window(10, 60)) <= 1.1);
        // Where no turn ends at all, all stand still alike.
        assert_eq!(all_slow.worst_gap_over_median(window(43, 50)).round(), 1.0);
    }
}
