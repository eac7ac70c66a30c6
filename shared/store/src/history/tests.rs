//! Histories of chats that are longer than what is read.

use proptest::prelude::*;

use super::*;

/// A chat as it is stored, and what a worker keeps of it.
#[derive(Default)]
struct Chat {
    /// In the order of arrival.
    stored: Vec<Kept>,
    kept: Option<Transcript>,
}

impl Chat {
    fn store(&mut self, turn: i32, role: pb::Role, iteration: i32, bytes: usize) {
        let ordinal = self.stored.len() as i32 + 1;
        let message = pb::Message { ordinal, role: role as i32, iteration, ..Default::default() };
        self.stored.push(Kept { turn, bytes, message: Arc::new(message) });
    }

    fn last(&self) -> i32 {
        self.stored.len() as i32
    }

    /// What a query brings: the newest up to `turn` that are within the limits, and the opening of the first one's turn.
    fn read(&self, turn: i32) -> Transcript {
        let mut messages: Vec<_> = self.stored.iter().filter(|kept| kept.turn <= turn).cloned().collect();
        messages.sort_by_key(Kept::position);
        let mut bytes = 0;
        let newest = messages.iter().rev().take(READ_MAX as usize).enumerate();
        let count = newest
            .take_while(|(at, kept)| {
                bytes += kept.bytes;
                *at == 0 || bytes <= READ_MAX_BYTES
            })
            .count();
        let messages = messages.split_off(messages.len() - count);
        let opening = messages
            .first()
            .filter(|first| !first.begins_turn())
            .and_then(|first| self.stored.iter().find(|kept| kept.turn == first.turn && kept.begins_turn()).cloned());
        let whole = messages.first().is_none_or(|first| first.message.ordinal == 1);
        Transcript { messages, opening, whole, upto: self.last() }
    }

    /// As [`Store::history`] goes about it.
    fn history(&mut self, turn: i32, known: bool) -> History {
        let kept = self.kept.take().filter(|_| known).map(|mut kept| {
            kept.messages.extend(self.stored[kept.upto as usize..].iter().cloned());
            kept.messages.sort_by_key(Kept::position);
            Transcript { upto: self.last(), ..kept }
        });
        if let Some(kept) = kept.filter(|kept| kept.messages.len() < KEEP_MAX)
            && let Some(history) = kept.of_turn(turn)
        {
            self.kept = Some(kept);
            return history;
        }
        let (history, kept) = self.anew(turn);
        self.kept = kept;
        history
    }

    fn anew(&self, turn: i32) -> (History, Option<Transcript>) {
        let read = self.read(i32::MAX);
        if let Some(history) = read.of_turn(turn) {
            return (history, Some(read));
        }
        let read = self.read(turn);
        (read.newest(&read.messages), None)
    }

    /// What the turn may read, in the order of turns.
    fn of_turn(&self, turn: i32) -> Vec<&Kept> {
        let mut all: Vec<_> = self.stored.iter().filter(|kept| kept.turn <= turn).collect();
        all.sort_by_key(|kept| kept.position());
        all
    }

    /// Checks what every history promises; says where it begins behind a message that was put in front.
    fn check(&self, turn: i32, history: &History) -> i32 {
        let all = self.of_turn(turn);
        // The bytes from each place on.
        let mut from_here = vec![0; all.len() + 1];
        for at in (0..all.len()).rev() {
            from_here[at] = from_here[at + 1] + all[at].bytes;
        }
        let fits = |count: usize, bytes: usize| count <= MESSAGES_MAX && bytes <= limits::HISTORY_MAX_BYTES;
        let noted = |message: &pb::Message| !message.blocks.is_empty();
        let in_front = noted(&history.messages[0]);
        let from = &history.messages[usize::from(in_front)..];
        let begin = all.iter().position(|kept| kept.message.ordinal == from[0].ordinal).expect("it is stored");
        // All behind the beginning, in their order; the newest message with them.
        let ordinals = |kept: &[&Kept]| kept.iter().map(|kept| kept.message.ordinal).collect::<Vec<_>>();
        assert_eq!(from.iter().map(|message| message.ordinal).collect::<Vec<_>>(), ordinals(&all[begin..]));
        assert!(!from.iter().any(|message| noted(message)), "only the first one has a note");
        assert_eq!(history.cut, from.len() < all.len());
        // It begins with a person's message; behind one that was put in front, with a round of the same turn.
        let opening = |at: usize| all[all.partition_point(|kept| kept.turn < all[at].turn)];
        assert_eq!(history.messages[0].role(), pb::Role::User);
        if in_front {
            assert_eq!(from[0].role(), pb::Role::Assistant);
            assert_eq!(history.messages[0].ordinal, opening(begin).message.ordinal);
        }
        // The present: its message always, and all of it where that fits.
        let present = all.partition_point(|kept| kept.turn < turn);
        assert!(history.messages.iter().any(|message| message.ordinal == all[present].message.ordinal));
        if fits(all.len() - present, from_here[present]) {
            assert!(begin <= present, "{} messages of the turn are missing", begin - present);
        }
        // Limits: only the shortest history there is may be beyond them.
        let size = |begin: usize| {
            let more = usize::from(!all[begin].begins_turn());
            (all.len() - begin + more, from_here[begin] + more * opening(begin).bytes)
        };
        let (count, bytes) = size(begin);
        assert_eq!(count, history.messages.len());
        let places = || (0..all.len()).filter(|at| all[*at].begins_turn() || all[*at].begins_round());
        let longest = places().find(|at| {
            let (count, bytes) = size(*at);
            fits(count, bytes)
        });
        match longest {
            None => assert_eq!(Some(begin), places().next_back()),
            // As much as fits, less a quarter in which the beginning may stay where it is.
            Some(longest) => {
                assert!(fits(count, bytes), "{count} messages, {bytes} bytes");
                assert!(longest <= begin && 4 * from.len() >= 3 * (all.len() - longest));
                assert!(4 * from_here[begin] >= 3 * from_here[longest]);
            }
        }
        from[0].ordinal
    }
}

/// A turn: its message's size, and those of each round's two messages. What is queued behind it meanwhile.
#[derive(Debug, Clone)]
struct Turn {
    message: usize,
    rounds: Vec<(usize, usize)>,
    queued: Vec<usize>,
}

/// Sizes of a few bytes and of the largest there are, in one chat.
fn sizes(max: usize) -> impl Strategy<Value = usize> {
    prop_oneof![4 => 1..2000_usize, 2 => 1..200_000_usize, 1 => 1..=max]
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let round = || (sizes(limits::MODEL_TEXT_MAX_BYTES), sizes(limits::ROUND_RESULTS_MAX_BYTES));
    let rounds = prop_oneof![
        3 => prop::collection::vec(round(), 0..12),
        1 => prop::collection::vec(round(), 0..120),
        1 => prop::collection::vec((1..2000_usize, 1..2000_usize), 300..700),
    ];
    let queued = prop_oneof![3 => Just(0..1_usize), 1 => Just(0..40_usize)]
        .prop_flat_map(|count| prop::collection::vec(sizes(limits::MESSAGE_TEXT_MAX_BYTES), count));
    let turn = (sizes(limits::MESSAGE_TEXT_MAX_BYTES), rounds, queued).prop_map(|(message, rounds, queued)| Turn {
        message,
        rounds,
        queued,
    });
    prop::collection::vec(turn, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_history_keeps_the_present_and_begins_at_a_boundary(turns in turns(), seed in any::<u64>()) {
        let mut chat = Chat::default();
        let (mut next, mut begun, mut chance) = (0, (0, 0), seed);
        let mut waiting = std::collections::VecDeque::new();
        for turn in turns {
            if waiting.is_empty() {
                next += 1;
                chat.store(next, pb::Role::User, 0, turn.message);
                waiting.push_back(next);
            }
            let number = waiting.pop_front().expect("one waits");
            for message in turn.queued {
                next += 1;
                chat.store(next, pb::Role::User, 0, message);
                waiting.push_back(next);
            }
            let many = turn.rounds.len() > 150;
            for (iteration, (answer, results)) in turn.rounds.into_iter().chain([(10, 0)]).enumerate() {
                // Now and then another worker has the round, and this one hears of it when it reads on.
                chance = chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                if chance >> 60 < if many { 1 } else { 12 } {
                    let history = chat.history(number, true);
                    let begin = chat.check(number, &history);
                    let position = chat.stored[begin as usize - 1].position();
                    prop_assert!(position >= begun, "it never goes back");
                    begun = position;
                    prop_assert!(chat.anew(number).0 == history, "what was known makes no difference");
                }
                chat.store(number, pb::Role::Assistant, iteration as i32, answer);
                if results > 0 {
                    chat.store(number, pb::Role::Tool, iteration as i32, results);
                }
            }
        }
    }
}

/// `turns` turns of a question and an answer, all of `bytes`.
fn transcript(turns: i32, bytes: usize) -> Transcript {
    let mut chat = Chat::default();
    for turn in 1..=turns {
        chat.store(turn, pb::Role::User, 0, bytes);
        chat.store(turn, pb::Role::Assistant, 0, bytes);
    }
    Transcript { upto: chat.last(), messages: chat.stored, opening: None, whole: true }
}

fn first(history: &History) -> i32 {
    history.messages[0].ordinal
}

#[test]
fn a_short_chat_is_read_whole() {
    let history = transcript(10, 10).of_turn(7).unwrap();
    assert_eq!((history.messages.len(), history.cut), (14, false));
    assert_eq!(transcript(0, 0).of_turn(1), Some(History::default()));
}

#[test]
fn the_beginning_of_a_long_chat_stays_for_many_turns() {
    for bytes in [10, limits::HISTORY_MAX_BYTES / 200] {
        let (mut before, mut moves, mut least) = (1, 0, usize::MAX);
        let all = transcript(3000, bytes);
        for turn in 1..=3000 {
            let history = all.of_turn(turn).unwrap();
            let total: usize = history.messages.len() * bytes;
            assert!(history.messages.len() <= MESSAGES_MAX && total <= limits::HISTORY_MAX_BYTES);
            assert_eq!(history.messages[0].role(), pb::Role::User);
            if history.cut {
                least = least.min(history.messages.len());
            }
            assert!(first(&history) >= before, "it never goes back");
            moves += i32::from(first(&history) != before);
            before = first(&history);
        }
        let window = MESSAGES_MAX.min(200);
        assert!(least >= window * 3 / 4 - 1, "{least}");
        // A message or two a turn pushed out one by one would be some 2,900 moves.
        assert!(moves < 3000 / (window as i32 / 16), "{moves} moves of {bytes} bytes each");
    }
}

#[test]
fn the_beginning_of_a_long_turn_stays_for_many_rounds() {
    for bytes in [10, limits::HISTORY_MAX_BYTES / 200] {
        let mut chat = Chat::default();
        chat.store(1, pb::Role::User, 0, 100);
        let (mut before, mut moves) = (1, 0);
        for iteration in 0..1500 {
            let history = chat.history(1, iteration % 7 != 0);
            let begin = chat.check(1, &history);
            assert!(begin >= before, "it never goes back");
            moves += i32::from(begin != before);
            before = begin;
            chat.store(1, pb::Role::Assistant, iteration, bytes);
            chat.store(1, pb::Role::Tool, iteration, bytes);
        }
        assert!(before > 1 && moves < 1500 / 10, "{moves} moves of {bytes} bytes each");
    }
}

#[test]
fn a_giant_is_read_with_its_turns_message() {
    let mut chat = Chat::default();
    chat.store(1, pb::Role::User, 0, 10);
    chat.store(1, pb::Role::Assistant, 0, 10);
    chat.store(2, pb::Role::User, 0, 10);
    chat.store(2, pb::Role::Assistant, 0, 10);
    // No round is so large by what may be written; one that is larger than all that is read would come without its call.
    chat.store(2, pb::Role::Tool, 0, limits::HISTORY_MAX_BYTES + 1000);
    let history = chat.history(2, false);
    chat.check(2, &history);
    let ordinals: Vec<_> = history.messages.iter().map(|message| message.ordinal).collect();
    assert_eq!((ordinals, history.cut), (vec![3, 4, 5], true));
    // One that a person sent is read alone.
    chat.store(3, pb::Role::User, 0, 2 * limits::HISTORY_MAX_BYTES);
    let history = chat.history(3, false);
    chat.check(3, &history);
    assert_eq!((first(&history), history.messages.len()), (6, 1));
}

#[test]
fn a_long_turn_says_to_the_model_that_it_is_cut() {
    let mut chat = Chat::default();
    chat.store(1, pb::Role::User, 0, 10);
    for iteration in 0..700 {
        chat.store(1, pb::Role::Assistant, iteration, 10);
        chat.store(1, pb::Role::Tool, iteration, 10);
    }
    let text = |history: &History| match &history.messages[0].blocks[0].block {
        Some(pb::content_block::Block::Text(text)) => text.text.clone(),
        other => panic!("not a text: {other:?}"),
    };
    let history = chat.history(1, false);
    assert!(history.messages.len() > 750 && text(&history).contains("left out"), "{}", history.messages.len());
    // The same words behind more rounds: no number in them moves.
    let before = text(&history);
    for iteration in 700..900 {
        chat.store(1, pb::Role::Assistant, iteration, 10);
        chat.store(1, pb::Role::Tool, iteration, 10);
    }
    assert_eq!(text(&chat.history(1, true)), before);
}

#[test]
fn what_is_not_known_is_asked_for() {
    let mut part = transcript(100, 10);
    part.whole = false;
    assert_eq!(part.of_turn(100), None);
    let mut enough = transcript(600, 10);
    enough.whole = false;
    assert!(enough.of_turn(600).is_some());
    assert_eq!(enough.of_turn(400), None, "too little is left before that turn");
}
