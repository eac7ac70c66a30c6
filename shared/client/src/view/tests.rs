use std::collections::VecDeque;

use proptest::{prelude::*, test_runner::RngSeed};

use super::{
    simulation::{Op, SimChat},
    *,
};

const CASES: u32 = 10_000;

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => Just(Op::Start),
        8 => (any::<u8>(), any::<u8>()).prop_map(|(block, size)| Op::Piece { block, size }),
        2 => Just(Op::Commit),
        2 => Just(Op::ToolStart),
        4 => (any::<bool>(), any::<u8>()).prop_map(|(stderr, size)| Op::ToolOutput { stderr, size }),
        1 => Just(Op::ToolEnd),
        1 => Just(Op::EndTurn),
        1 => Just(Op::Approval),
    ]
}

/// What happens to the viewer between the server's steps.
#[derive(Debug, Clone, Copy)]
enum Step {
    Server {
        chat: bool,
        op: Op,
    },
    /// So many updates of one chat arrive.
    Deliver {
        chat: bool,
        count: u8,
    },
    /// What is on its way is lost, and a new stream is opened.
    Reconnect,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        10 => (any::<bool>(), op()).prop_map(|(chat, op)| Step::Server { chat, op }),
        6 => (any::<bool>(), 0u8..6).prop_map(|(chat, count)| Step::Deliver { chat, count }),
        1 => Just(Step::Reconnect),
    ];
    prop::collection::vec(step, 0..60)
}

struct World {
    servers: [SimChat; 2],
    on_their_way: [VecDeque<pb::SubscribeResponse>; 2],
    view: View,
}

impl World {
    fn new(from: [From; 2]) -> Self {
        let servers = [SimChat::new(), SimChat::new()];
        let mut view = View::new();
        view.follow(servers[0].id, from[0]);
        view.follow(servers[1].id, from[1]);
        let mut world = Self { servers, on_their_way: Default::default(), view };
        world.connect();
        world
    }

    fn connect(&mut self) {
        let request = self.view.begin_stream();
        for (server, queue) in self.servers.iter().zip(&mut self.on_their_way) {
            let id = server.id.to_string();
            let cursor = request.chats.iter().find(|cursor| cursor.chat_id == id).unwrap();
            *queue = server.resume(cursor).into();
        }
    }

    fn deliver(&mut self, chat: usize, count: usize) {
        for _ in 0..count {
            let Some(update) = self.on_their_way[chat].pop_front() else { return };
            let applied = self.view.apply(update);
            assert!(!applied.heal);
        }
    }

    fn run(&mut self, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::Server { chat, op } => {
                    let chat = usize::from(chat);
                    self.on_their_way[chat].extend(self.servers[chat].step(op));
                }
                Step::Deliver { chat, count } => self.deliver(usize::from(chat), usize::from(count)),
                Step::Reconnect => self.connect(),
            }
        }
        self.deliver(0, usize::MAX);
        self.deliver(1, usize::MAX);
    }

    fn check(&self) {
        assert!(self.view.verification().is_clean(), "{:?}", self.view.verification());
        for server in &self.servers {
            let chat = self.view.chat(server.id).unwrap();
            assert_eq!(chat.last_seq, Some(server.last_seq()));
            assert_eq!(chat.messages.values().cloned().collect::<Vec<_>>(), server.messages);
            for (key, epoch, _, bytes) in server.live() {
                let live = &chat.live()[&key];
                assert_eq!((live.epoch, &live.bytes), (epoch, &bytes), "{key:?}");
            }
        }
    }
}

const SEED: u64 = 3;

/// The same cases in every run, unless PROPTEST_RNG_SEED asks for others.
fn seeded(config: ProptestConfig) -> ProptestConfig {
    let rng_seed = match config.rng_seed {
        RngSeed::Random => RngSeed::Fixed(SEED),
        asked => asked,
    };
    ProptestConfig { rng_seed, ..config }
}

proptest! {
    #![proptest_config(seeded(ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() }))]

    #[test]
    fn a_server_that_keeps_its_promise_is_believed(steps in steps()) {
        let mut world = World::new([From::Start, From::Snapshot]);
        world.run(steps);
        world.check();
    }

    #[test]
    fn each_breach_is_seen(ops in prop::collection::vec(op(), 5..60), kind in 0u8..3, pick in any::<prop::sample::Index>()) {
        let (chat, stream) = whole_stream(ops);
        let breaches = breaches(&stream, kind);
        prop_assume!(!breaches.is_empty());
        let broken = breaches[pick.index(breaches.len())].apply(&stream);
        let seen = watch(chat, &broken);
        prop_assert!(seen.violations() + seen.short_texts > 0, "{seen:?}");
        // The same stream unbroken is clean, so it is the breach that was seen.
        let whole = watch(chat, &stream);
        prop_assert!(whole.is_clean() && whole.short_texts == 0, "{whole:?}");
    }

    #[test]
    fn after_a_breach_a_new_stream_heals(steps in steps(), lost in any::<prop::sample::Index>()) {
        let mut world = World::new([From::Start, From::Start]);
        world.run(steps.iter().copied().filter(|step| !matches!(step, Step::Deliver { .. })).collect());
        let chat = &mut world.servers[0];
        let mut updates: Vec<_> = [Op::Start, Op::Piece { block: 1, size: 3 }, Op::Piece { block: 1, size: 2 }, Op::Commit, Op::Approval]
            .into_iter()
            .flat_map(|op| chat.step(op))
            .collect();
        updates.remove(lost.index(updates.len() - 1));
        let healing = updates.into_iter().any(|update| world.view.apply(update).heal);
        let seen = world.view.verification();
        prop_assert!(healing || seen.short_texts > 0, "{seen:?}");
        world.connect();
        world.run(Vec::new());
        let known = world.view.chat(world.servers[0].id).unwrap();
        prop_assert_eq!(known.last_seq, Some(world.servers[0].last_seq()));
        prop_assert_eq!(known.messages.len(), world.servers[0].messages.len());
    }
}

/// One stream from the first event to a quiet end.
fn whole_stream(ops: Vec<Op>) -> (ChatId, Vec<pb::SubscribeResponse>) {
    let mut server = SimChat::new();
    let ops = ops.into_iter().chain([Op::Commit, Op::ToolEnd, Op::EndTurn, Op::Approval]);
    let stream = ops.flat_map(|op| server.step(op)).collect();
    (server.id, stream)
}

fn watch(chat: ChatId, stream: &[pb::SubscribeResponse]) -> Verification {
    let mut view = View::new();
    view.follow(chat, From::Start);
    view.begin_stream();
    for update in stream {
        view.apply(update.clone());
    }
    view.verification()
}

#[derive(Debug)]
enum Breach {
    Drop(usize),
    Duplicate(usize),
    Swap(usize, usize),
}

impl Breach {
    fn apply(&self, stream: &[pb::SubscribeResponse]) -> Vec<pb::SubscribeResponse> {
        let mut stream = stream.to_vec();
        match *self {
            Breach::Drop(at) => drop(stream.remove(at)),
            Breach::Duplicate(at) => stream.insert(at + 1, stream[at].clone()),
            Breach::Swap(a, b) => stream.swap(a, b),
        }
        stream
    }
}

/// What can be done to a stream that takes something from its viewer. A piece whose attempt was given up later counts
/// only if another piece follows it: the last one is void either way.
fn breaches(stream: &[pb::SubscribeResponse], kind: u8) -> Vec<Breach> {
    use pb::subscribe_response::Update;
    let text = |at: usize| match &stream[at].update {
        Some(Update::Delta(delta)) => {
            delta.block.as_ref().map(|block| (block.target_id.clone(), block.block, delta.epoch))
        }
        _ => None,
    };
    let is_event = |at: usize| matches!(stream[at].update, Some(Update::Event(_)));
    let void = void_attempts(stream);
    let mut breaches = Vec::new();
    for at in 0..stream.len() {
        let next = (at + 1..stream.len()).find(|next| match text(at) {
            Some(_) => text(*next) == text(at) && !is_late(stream, *next),
            None => is_event(*next),
        });
        let counts = match text(at) {
            _ if is_late(stream, at) => false,
            Some((target, _, epoch)) => next.is_some() || !void.contains(&(target, epoch)),
            // The last event's loss shows with the next one.
            None => next.is_some(),
        };
        if !counts {
            continue;
        }
        breaches.extend(match kind {
            0 => Some(Breach::Drop(at)),
            1 => Some(Breach::Duplicate(at)),
            _ => next.map(|next| Breach::Swap(at, next)),
        });
    }
    breaches
}

/// A piece of an attempt whose turn had ended.
fn is_late(stream: &[pb::SubscribeResponse], at: usize) -> bool {
    matches!(&stream[at].update, Some(pb::subscribe_response::Update::Delta(delta)) if delta.piece == "late".as_bytes())
}

/// Attempts that were taken over or whose turn ended without them.
fn void_attempts(stream: &[pb::SubscribeResponse]) -> Vec<(String, i64)> {
    use pb::{chat_event::Kind, subscribe_response::Update};
    let kinds = stream.iter().filter_map(|response| match &response.update {
        Some(Update::Event(event)) => event.kind.as_ref(),
        _ => None,
    });
    let (mut open, mut void) = (None::<(String, i64)>, Vec::new());
    for kind in kinds {
        match kind {
            Kind::MessageStarted(started) => void.extend(open.replace((started.message_id.clone(), started.epoch))),
            Kind::MessageCommitted(_) => open = None,
            Kind::TurnChanged(turn) if chat::is_ended(turn.status()) => void.extend(open.take()),
            _ => {}
        }
    }
    void
}

fn delta(chat: ChatId, epoch: i64, offset: i64, piece: &'static str) -> pb::SubscribeResponse {
    let block = pb::BlockRef { target_id: "m".to_owned(), block: 0, kind: pb::StreamKind::Text.into() };
    let delta = pb::Delta {
        chat_id: chat.to_string(),
        block: Some(block),
        epoch,
        offset,
        piece: piece.into(),
        ..Default::default()
    };
    pb::SubscribeResponse { update: Some(pb::subscribe_response::Update::Delta(delta)) }
}

fn started(chat: ChatId, seq: i64, epoch: i64) -> pb::SubscribeResponse {
    let started = pb::MessageStarted { message_id: "m".to_owned(), epoch, restarted: epoch > 1, ..Default::default() };
    let kind = Some(pb::chat_event::Kind::MessageStarted(started));
    let event = pb::ChatEvent { chat_id: chat.to_string(), seq, kind, time: None };
    pb::SubscribeResponse { update: Some(pb::subscribe_response::Update::Event(event)) }
}

fn counts(updates: impl FnOnce(ChatId) -> Vec<pb::SubscribeResponse>) -> Verification {
    let chat = ChatId::new();
    watch(chat, &updates(chat))
}

#[test]
fn pieces_are_judged_by_epoch_and_offset() {
    let seen = counts(|c| {
        vec![started(c, 1, 1), delta(c, 1, 0, "ab"), started(c, 2, 2), delta(c, 1, 2, "x"), delta(c, 2, 0, "c")]
    });
    assert_eq!((seen.stale, seen.epoch_changes, seen.bytes, seen.violations()), (1, 1, 3, 0));
    let seen = counts(|c| vec![delta(c, 1, 0, "ab"), started(c, 1, 1)]);
    assert_eq!(seen.reorderings, 1, "before its opening event");
    let seen = counts(|c| vec![started(c, 1, 1), delta(c, 1, 1, "b")]);
    assert_eq!(seen.holes, 1);
    let seen = counts(|c| vec![started(c, 1, 1), delta(c, 1, 0, "ab"), delta(c, 1, 1, "bc")]);
    assert_eq!((seen.duplicates, seen.bytes, seen.text_mismatches), (1, 3, 0));
    let seen = counts(|c| vec![started(c, 1, 1), delta(c, 1, 0, "ab"), delta(c, 1, 1, "xc")]);
    assert_eq!((seen.duplicates, seen.text_mismatches), (1, 1));
}

#[test]
fn events_are_judged_by_their_number() {
    let seen = counts(|c| vec![started(c, 1, 1), started(c, 3, 2), started(c, 2, 2), started(c, 4, 3)]);
    assert_eq!((seen.holes, seen.reorderings), (1, 1));
    let seen = counts(|c| vec![started(c, 1, 1), started(c, 1, 1)]);
    assert_eq!(seen.duplicates, 1);
}

#[test]
fn the_feed_is_checked_too() {
    let (event, caught_up) = (feed_event, |seq| caught_up(None, seq, 1));
    let mut view = View::new();
    view.follow_feed(None);
    assert_eq!(view.begin_stream().feed.unwrap().after_seq, -1);
    for update in [caught_up(41), event(42), event(43)] {
        assert!(view.apply(update).update.is_some());
    }
    assert!(view.is_caught_up());
    assert!(view.apply(event(45)).heal);
    assert_eq!(view.begin_stream().feed.unwrap().after_seq, 43);
    for update in [event(44), event(45), caught_up(45)] {
        assert!(view.apply(update).update.is_some());
    }
    assert_eq!((view.verification().holes, view.verification().violations()), (1, 1));
}

fn snapshot(chat: ChatId, seq: i64, log_epoch: i64) -> pb::SubscribeResponse {
    let chat = Some(pb::Chat { id: chat.to_string(), ..Default::default() });
    let snapshot = pb::ChatSnapshot { chat, seq, log_epoch, ..Default::default() };
    pb::SubscribeResponse { update: Some(pb::subscribe_response::Update::Snapshot(snapshot)) }
}

fn caught_up(chat: Option<ChatId>, seq: i64, log_epoch: i64) -> pb::SubscribeResponse {
    let chat_id = chat.map(|chat| chat.to_string()).unwrap_or_default();
    let caught_up = pb::CaughtUp { chat_id, seq, log_epoch };
    pb::SubscribeResponse { update: Some(pb::subscribe_response::Update::CaughtUp(caught_up)) }
}

fn feed_event(seq: i64) -> pb::SubscribeResponse {
    let event = pb::FeedEvent { seq, ..Default::default() };
    pb::SubscribeResponse { update: Some(pb::subscribe_response::Update::FeedEvent(event)) }
}

#[test]
fn the_first_snapshot_of_a_stream_is_believed() {
    let chat = ChatId::new();
    let mut view = View::new();
    view.follow(chat, From::After { seq: 105, log_epoch: 1 });
    view.begin_stream();
    for update in [snapshot(chat, 5, 1), caught_up(Some(chat), 5, 1), started(chat, 6, 1)] {
        assert!(view.apply(update).update.is_some());
    }
    // The caller's cursor was wrong, and nothing that was sent is gone.
    assert_eq!((view.verification().resets, view.verification().violations()), (1, 0));
    // One that comes later on the stream is late.
    assert_eq!(view.apply(snapshot(chat, 5, 1)), Applied::NOTHING);
    assert_eq!(view.verification().reorderings, 1);
    view.begin_stream();
    for update in [snapshot(chat, 4, 1), caught_up(Some(chat), 4, 1), started(chat, 5, 2)] {
        assert!(view.apply(update).update.is_some());
    }
    // Events 5 and 6 had been sent.
    assert_eq!((view.verification().rollbacks, view.verification().violations()), (1, 2));
    assert_eq!(view.chat(chat).unwrap().last_seq, Some(5));
    view.begin_stream();
    assert!(view.apply(snapshot(chat, 2, 2)).update.is_some());
    assert_eq!((view.verification().resets, view.verification().violations()), (2, 2), "another log");
}

#[test]
fn a_feed_that_begins_elsewhere_is_believed() {
    let mut view = View::new();
    view.follow_feed(Some((105, 1)));
    view.begin_stream();
    for update in [caught_up(None, 5, 1), feed_event(6)] {
        assert!(view.apply(update).update.is_some());
    }
    assert_eq!((view.verification().resets, view.verification().violations()), (1, 0));
    view.begin_stream();
    for update in [caught_up(None, 4, 1), feed_event(5)] {
        assert!(view.apply(update).update.is_some());
    }
    assert_eq!((view.verification().rollbacks, view.verification().violations()), (1, 1));
    // In the middle of a stream only another log may begin elsewhere.
    for update in [caught_up(None, 2, 2), feed_event(3)] {
        assert!(view.apply(update).update.is_some());
    }
    assert_eq!((view.verification().resets, view.feed().unwrap().last_seq), (2, Some(3)));
    assert!(view.apply(caught_up(None, 1, 2)).update.is_some());
    assert_eq!((view.verification().reorderings, view.feed().unwrap().last_seq), (1, Some(3)));
}

#[test]
fn what_is_not_followed_is_passed_over() {
    let mut view = View::new();
    let applied = view.apply(started(ChatId::new(), 5, 1));
    assert_eq!(applied, Applied::NOTHING);
    assert!(view.verification().is_clean());
}
