//! Four times what can be served arrives for a while, from users who ask for different amounts: how much is served
//! meanwhile, whether all users are served alike, and whether everything that was accepted ends.
//!
//! A user's arrivals are independent of what is served (an open loop). The queue is bounded by the time for which they
//! last, and by the server's own limit of queued turns, past which it refuses.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Result, ensure};
use reliant_client::{Client, ClientConfig, ClientUpdate, Subscription};
use reliant_harness::{DaemonOptions, TestDaemon};
use reliant_load::{Arrivals, Outcome, Samples, open_loop, samples::MS};
use reliant_types::{ChatId, pb};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    Bench,
    closed_loop::{ClosedLoop, Finished, Window},
    progress::Progress,
    report::Report,
    turns::{CHATS, SHELL},
};

const USERS: usize = 8;
const CHATS_PER_USER: usize = 8;
/// Of the arrivals, user n has n + 2 shares. With eight users even the least of them asks for more than an eighth of what
/// can be served.
const SHARES: [usize; USERS] = [2, 3, 4, 5, 6, 7, 8, 9];
const OVERLOAD: f64 = 4.0;
const SEED: u64 = 20_261_129;
const WARM_UP: Duration = Duration::from_secs(5);
const SUSTAINED: Duration = Duration::from_secs(15);
/// Until the queues of all users are long.
const RAMP: Duration = Duration::from_secs(5);
const ARRIVALS: Duration = Duration::from_secs(30);
/// Messages on their way to the server; more arrivals at one time are not sent, and counted.
const SENDING_MAX: usize = 512;
/// A message that the server refuses is sent again until then.
const SEND_DEADLINE: Duration = Duration::from_secs(5);
/// For what was accepted to end: twice what it takes at the sustainable rate.
const DRAIN_MAX: Duration = Duration::from_secs(180);
const STOP_PATIENCE: Duration = Duration::from_secs(60);
const CAUGHT_UP_PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(250);

struct User {
    client: Client,
    chats: Vec<ChatId>,
    _daemon: TestDaemon,
}

/// Turns by id: who sent it, and when it ended, whether well or not.
#[derive(Default)]
struct Seen {
    accepted: HashMap<String, usize>,
    ended: HashMap<String, (Instant, bool)>,
}

type Shared = Arc<Mutex<Seen>>;

fn locked(seen: &Shared) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

pub async fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let progress = Progress::start("arrivals: users and their daemons come");
    let mut users = Vec::with_capacity(USERS);
    for number in 0..USERS {
        users.push(Box::pin(user(bench, number)).await?);
    }

    progress.set("arrivals: what can be served is measured");
    let sustainable = sustainable(&users).await?;
    report.set("arrivals_sustainable_turns_per_s", sustainable);
    ensure!(sustainable > 0.0, "no turn came to its end");

    let seen = Shared::default();
    let mut viewers = JoinSet::new();
    for user in &users {
        let mut subscription = user.client.subscribe(&user.chats, false);
        subscription.caught_up(Instant::now() + CAUGHT_UP_PATIENCE).await?;
        viewers.spawn(Box::pin(watch(subscription, seen.clone())));
    }

    progress.set("arrivals: four times as many turns arrive");
    let began = Instant::now();
    let outcome = arrive(&users, OVERLOAD * sustainable, &seen).await;
    let window = Window { from: began + RAMP, to: began + ARRIVALS };

    progress.set("arrivals: what was accepted comes to its end");
    let stopped = Instant::now();
    while stopped.elapsed() < DRAIN_MAX && unended(&seen) > 0 {
        sleep(POLL).await;
    }
    report.set("arrivals_4x_drain_s", stopped.elapsed().as_secs_f64());
    viewers.shutdown().await;

    let by_user = ended_by_user(&locked(&seen), window);
    report.set("arrivals_4x_throughput", by_user.iter().sum::<usize>() as f64 / window.seconds() / sustainable);
    report.set("arrivals_4x_fairness", fairness(&by_user));
    report.say(&format!("arrivals: turns served by user, who asked in shares of {SHARES:?}: {by_user:?}"));
    report.set("arrivals_4x_accepted", outcome.latencies.len() as f64);
    report.set("arrivals_4x_accept_ms_p95", Samples::of(outcome.latencies, MS).at(0.95));
    report.set("arrivals_4x_refused", outcome.errors.len() as f64);
    report.set("arrivals_4x_unsent", outcome.shed as f64);
    report.set("arrivals_4x_unended", unended(&seen) as f64);
    let failed = locked(&seen).ended.values().filter(|(_, succeeded)| !succeeded).count();
    report.set("arrivals_4x_failed", failed as f64);
    if let Some(why) = outcome.errors.first() {
        report.say(&format!("arrivals: a message was refused: {why}"));
    }
    Ok(())
}

async fn user(bench: &Bench, number: usize) -> Result<User> {
    let name = format!("arrivals-{number}");
    let person = bench.rig.person(&name).await?;
    let daemon = bench.rig.daemon(&person, &name, DaemonOptions::default()).await?;
    let mut chats = Vec::with_capacity(CHATS_PER_USER);
    for _ in 0..CHATS_PER_USER {
        chats.push(person.chat(SHELL, pb::ChatMode::Auto).await?.id.parse()?);
    }
    let api = bench.rig.mesh.api_url(number % bench.rig.mesh.apis.len());
    let client = Client::connect(ClientConfig::new(api, person.token).call_deadline(SEND_DEADLINE)).await?;
    Ok(User { client, chats, _daemon: daemon })
}

/// Turns per second of a closed loop, with as many chats at work as in the other parts.
async fn sustainable(users: &[User]) -> Result<f64> {
    let mut sessions = Vec::with_capacity(CHATS);
    for user in users {
        for chat in user.chats.iter().take(CHATS / USERS) {
            sessions.push(user.client.open(*chat).await?);
        }
    }
    let chats = ClosedLoop::start(sessions);
    sleep(WARM_UP).await;
    let window = Window::lasting(SUSTAINED).await;
    let Finished { turns, failures, unended } = chats.stop(STOP_PATIENCE).await;
    ensure!(failures.is_empty() && unended == 0, "{unended} turns did not end; {}", failures.join("; "));
    Ok(turns.rate(window))
}

async fn arrive(users: &[User], per_second: f64, seen: &Shared) -> Outcome<String> {
    let order = interleaved(&SHARES);
    let mut sent = [0; USERS];
    open_loop(Arrivals::poisson(per_second, ARRIVALS, SEED), SENDING_MAX, |number| {
        let of = order[number % order.len()];
        let user = &users[of];
        let chat_id = user.chats[sent[of] % CHATS_PER_USER].to_string();
        sent[of] += 1;
        let client_message_id = format!("arrival-{number}");
        async move {
            let request = pb::SendMessageRequest { chat_id, client_message_id, text: "go".into() };
            let answer = user.client.send_message(request).await.map_err(|failure| failure.to_string())?;
            locked(seen).accepted.insert(answer.turn.unwrap_or_default().id, of);
            Ok(())
        }
    })
    .await
}

/// Notes each turn that ends, until the task is aborted or the stream is refused.
async fn watch(mut subscription: Subscription, seen: Shared) {
    while let Ok(update) = subscription.next().await {
        let turns = match update {
            ClientUpdate::Event(pb::ChatEvent { kind: Some(pb::chat_event::Kind::TurnChanged(turn)), .. }) => {
                vec![turn]
            }
            // In place of events that were too many to be sent one by one.
            ClientUpdate::Snapshot(snapshot) => snapshot.turns,
            _ => continue,
        };
        let now = Instant::now();
        for turn in turns.into_iter().filter(|turn| turn.ended_at.is_some()) {
            let succeeded = turn.status() == pb::TurnStatus::Succeeded;
            locked(&seen).ended.entry(turn.id).or_insert((now, succeeded));
        }
    }
}

fn unended(seen: &Shared) -> usize {
    let seen = locked(seen);
    seen.accepted.keys().filter(|turn| !seen.ended.contains_key(*turn)).count()
}

fn ended_by_user(seen: &Seen, window: Window) -> [usize; USERS] {
    let mut counts = [0; USERS];
    for (turn, user) in &seen.accepted {
        if seen.ended.get(turn).is_some_and(|(at, _)| window.holds(*at)) {
            counts[*user] += 1;
        }
    }
    counts
}

/// The least served user's turns over the median user's. Since each user asks for more than an equal share of what can be
/// served, sharing by users gives 1; serving in the order of arrival gives the least user's shares over the median's, 1/3.
fn fairness(by_user: &[usize]) -> f64 {
    let samples = Samples::plain(by_user.iter().map(|count| *count as f64));
    samples.at(0.0) / samples.at(0.5)
}

/// Each user as often as it has shares, evenly spread.
fn interleaved(shares: &[usize]) -> Vec<usize> {
    let mut places: Vec<(f64, usize)> = Vec::new();
    for (user, count) in shares.iter().enumerate() {
        places.extend((0..*count).map(|nth| ((nth as f64 + 0.5) / *count as f64, user)));
    }
    places.sort_by(|a, b| a.0.total_cmp(&b.0));
    places.into_iter().map(|(_, user)| user).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fairness_is_one_where_all_are_served_alike() {
        assert_eq!(fairness(&[50; USERS]), 1.0);
        assert!((fairness(&SHARES) - 1.0 / 3.0).abs() < 0.01);
        assert_eq!(fairness(&[0, 40, 40, 40]), 0.0);
        // A user who is served more than the others is not what this figure is about.
        assert_eq!(fairness(&[40, 40, 40, 400]), 1.0);
    }

    #[test]
    fn arrivals_are_spread_by_shares() {
        let order = interleaved(&[1, 2, 4]);
        assert_eq!((0..3).map(|user| order.iter().filter(|of| **of == user).count()).collect::<Vec<_>>(), [1, 2, 4]);
        assert!(order.windows(3).all(|three| three.contains(&2)), "{order:?}");
        // Even the least asks for more than an equal share.
        let least = SHARES[0] as f64 / SHARES.iter().sum::<usize>() as f64;
        assert!(OVERLOAD * least > 1.0 / USERS as f64);
    }

    #[test]
    fn a_turn_counts_for_who_sent_it_where_it_ended_in_the_window() {
        let from = Instant::now();
        let window = Window { from, to: from + Duration::from_secs(10) };
        let mut seen = Seen::default();
        for (turn, user, at) in [("a", 0, 1), ("b", 0, 11), ("c", 7, 9)] {
            seen.accepted.insert(turn.into(), user);
            seen.ended.insert(turn.into(), (from + Duration::from_secs(at), true));
        }
        seen.accepted.insert("d".into(), 3);
        assert_eq!(ended_by_user(&seen, window), [1, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(unended(&Arc::new(Mutex::new(seen))), 1);
    }
}
