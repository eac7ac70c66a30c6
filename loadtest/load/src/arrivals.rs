//! Open arrivals: work begins when it is due, whether what came before has ended or not, and its time counts from when it
//! was due. A closed loop waits with the system under test and so hides how long others would have waited.

use std::{future::Future, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::time::{Instant, sleep_until};

/// When work is due, as offsets from the start: a Poisson process.
#[derive(Debug)]
pub struct Arrivals {
    rng: StdRng,
    per_second: f64,
    at: f64,
    end: f64,
}

impl Arrivals {
    /// The same seed gives the same arrivals.
    pub fn poisson(per_second: f64, lasting: Duration, seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), per_second, at: 0.0, end: lasting.as_secs_f64() }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        // A rate of nothing never arrives.
        let gap = -(1.0 - self.rng.random::<f64>()).ln() / self.per_second;
        self.at += gap;
        (self.at < self.end).then(|| Duration::from_secs_f64(self.at))
    }
}

/// What became of a run's arrivals; the three add up to what was due.
#[derive(Debug)]
pub struct Outcome<E> {
    /// From when each was due to its end, of those that succeeded.
    pub latencies: Vec<Duration>,
    pub errors: Vec<E>,
    /// Not begun: as many as may run were running. A run that has any says nothing of the rate it was to have.
    pub shed: usize,
}

/// Begins `work` for each arrival, at most `running_max` at once, and returns when all have ended.
pub async fn open_loop<W, F, E>(arrivals: impl Iterator<Item = Duration>, running_max: usize, mut work: W) -> Outcome<E>
where
    W: FnMut(usize) -> F,
    F: Future<Output = Result<(), E>>,
{
    let begun = Instant::now();
    let mut outcome = Outcome { latencies: Vec::new(), errors: Vec::new(), shed: 0 };
    let mut running = FuturesUnordered::new();
    let settle = |(due, ended): (Instant, Result<(), E>), outcome: &mut Outcome<E>| match ended {
        Ok(()) => outcome.latencies.push(due.elapsed()),
        Err(error) => outcome.errors.push(error),
    };
    for (number, offset) in arrivals.enumerate() {
        let due = begun + offset;
        let wait = sleep_until(due);
        tokio::pin!(wait);
        loop {
            tokio::select! {
                () = &mut wait => break,
                Some(ended) = running.next() => settle(ended, &mut outcome),
            }
        }
        if running.len() >= running_max {
            outcome.shed += 1;
            continue;
        }
        let work = work(number);
        running.push(async move { (due, work.await) });
    }
    while let Some(ended) = running.next().await {
        settle(ended, &mut outcome);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_their_rate_and_are_the_same_for_a_seed() {
        let arrivals = || Arrivals::poisson(50.0, Duration::from_secs(100), 7).collect::<Vec<_>>();
        let (first, second) = (arrivals(), arrivals());
        assert_eq!(first, second);
        assert!((4700..5300).contains(&first.len()), "{} of some 5,000", first.len());
        assert!(first.is_sorted());
        // Exponential gaps: their deviation is their mean, where a steady beat would have none.
        let gaps: Vec<f64> = first.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((0.9..1.1).contains(&(deviation / mean)), "{}", deviation / mean);
        assert_eq!(Arrivals::poisson(0.0, Duration::from_secs(5), 1).count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_counts_from_when_the_work_was_due() {
        // One after another at the worker, each taking a second, due at once.
        let lock = tokio::sync::Mutex::new(());
        let due = [0, 0, 0].map(Duration::from_secs);
        let outcome = open_loop(due.into_iter(), 10, |_| async {
            let _held = lock.lock().await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok::<_, ()>(())
        })
        .await;
        assert_eq!(outcome.latencies, [1, 2, 3].map(Duration::from_secs));
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_begin_is_counted_and_errors_are_kept() {
        let due = (0..10).map(|_| Duration::from_secs(1));
        let outcome = open_loop(due, 4, |number| async move {
            tokio::time::sleep(Duration::from_secs(5)).await;
            if number == 0 { Err("broke") } else { Ok(()) }
        })
        .await;
        assert_eq!((outcome.latencies.len(), outcome.errors, outcome.shed), (3, vec!["broke"], 6));
    }
}
