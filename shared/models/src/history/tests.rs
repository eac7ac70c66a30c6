//! Histories that do not fit, and such that a provider would refuse.

use proptest::prelude::*;

use super::*;

fn call(id: &str) -> Part {
    Part::ToolUse { provider_id: id.into(), name: "shell".into(), input_json: "{}".into() }
}

fn result(id: &str, content: String) -> Part {
    Part::ToolResult { provider_id: id.into(), content, is_error: false }
}

/// Calls and results stand in pairs, side by side.
fn check_pairs(messages: &[ChatMessage]) {
    for (at, message) in messages.iter().enumerate() {
        let asked: Vec<&str> = calls(message).collect();
        let next = messages.get(at + 1).filter(|next| next.role == ChatRole::Tool);
        let given: Vec<&str> = next
            .into_iter()
            .flat_map(|next| &next.parts)
            .map(|part| match part {
                Part::ToolResult { provider_id, .. } => provider_id.as_str(),
                other => panic!("not a result: {other:?}"),
            })
            .collect();
        let sorted = |mut ids: Vec<&str>| {
            ids.sort_unstable();
            ids.join(" ")
        };
        assert_eq!(sorted(asked), sorted(given), "message {at}");
    }
}

#[test]
fn a_cancelled_round_is_mended() {
    let mut messages = vec![
        ChatMessage::tool(vec![result("z", "orphan".into())]),
        ChatMessage::user("go"),
        ChatMessage::assistant(vec![call("a"), call("b")]),
        ChatMessage::tool(vec![result("b", "ok".into()), result("b", "again".into())]),
        ChatMessage::user("next"),
    ];
    assert_eq!(mend_history(&mut messages), 3);
    check_pairs(&messages);
    assert_eq!(mend_history(&mut messages), 0);
}

#[test]
fn results_go_first_then_turns() {
    let turn = |n: usize, bytes: usize| {
        vec![
            ChatMessage::user(format!("question {n}")),
            ChatMessage::assistant(vec![call("a")]),
            ChatMessage::tool(vec![result("a", "x".repeat(bytes))]),
            ChatMessage::assistant(vec![Part::Text("y".repeat(1000))]),
        ]
    };
    let mut messages: Vec<ChatMessage> = (0..4).flat_map(|n| turn(n, 4000)).collect();
    messages.push(ChatMessage::user("latest"));
    let report = fit(&mut messages.clone(), 0, 18_000);
    assert_eq!((report.shortened_results, report.dropped_messages, report.too_large), (2, 0, false));
    let report = fit(&mut messages, 0, 3000);
    assert_eq!(report.shortened_results, 4);
    assert!(report.dropped_messages > 4 && !report.too_large, "{report:?}");
    assert!(matches!(&messages[0].parts[1], Part::Text(text) if text == "question 0"));
    assert_eq!(messages.last(), Some(&ChatMessage::user("latest")));
    check_pairs(&messages);
}

#[test]
fn what_is_cut_stays_the_same_while_the_chat_grows_a_little() {
    let mut messages = vec![ChatMessage::user("go")];
    let mut cuts = Vec::new();
    for round in 0..60 {
        let id = format!("c{round}");
        messages.push(ChatMessage::assistant(vec![call(&id)]));
        messages.push(ChatMessage::tool(vec![result(&id, "x".repeat(1000))]));
        cuts.push(fit(&mut messages.clone(), 0, 20_000).shortened_results);
    }
    let changes = cuts.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(changes <= 10, "{cuts:?}");
}

fn texts() -> impl Strategy<Value = String> {
    (0..3000usize, prop::bool::ANY).prop_map(|(size, wide)| if wide { "ß".repeat(size / 2) } else { "x".repeat(size) })
}

fn histories() -> impl Strategy<Value = Vec<ChatMessage>> {
    let assistant =
        (prop::option::of(texts()), prop::option::of(texts()), prop::collection::vec((0..4u8, texts()), 0..3));
    let message = prop_oneof![
        texts().prop_map(ChatMessage::user),
        assistant.prop_map(|(thinking, text, calls)| {
            let thinking = thinking.map(|text| Part::Thinking { text, signature: "s".into() });
            let calls = calls.into_iter().enumerate().map(|(n, (_, text))| Part::ToolUse {
                provider_id: n.to_string(),
                name: "t".into(),
                input_json: text,
            });
            ChatMessage::assistant(thinking.into_iter().chain(text.map(Part::Text)).chain(calls).collect())
        }),
        prop::collection::vec((0..4u8, texts()), 0..4).prop_map(|parts| ChatMessage::tool(
            parts.into_iter().map(|(id, text)| result(&id.to_string(), text)).collect()
        )),
    ];
    (texts(), prop::collection::vec(message, 0..24)).prop_map(|(first, mut rest)| {
        rest.insert(0, ChatMessage::user(first));
        rest
    })
}

proptest! {
    #[test]
    fn the_result_fits_or_is_minimal(history in histories(), budget in 500..60_000usize) {
        let mut messages = history.clone();
        mend_history(&mut messages);
        check_pairs(&messages);
        let mended = messages.clone();
        let report = fit(&mut messages, 0, budget);
        check_pairs(&messages);
        let text = |message: &ChatMessage| message.parts.last().cloned();
        let user = |messages: &[ChatMessage], last: bool| {
            let mut users = messages.iter().filter(|message| message.role == ChatRole::User);
            if last { users.next_back().cloned() } else { users.next().cloned() }
        };
        prop_assert_eq!(user(&messages, true).as_ref().and_then(text), user(&mended, true).as_ref().and_then(text));
        prop_assert!(user(&messages, false).is_some());
        if mended.iter().map(message_bytes).sum::<usize>() <= budget {
            prop_assert_eq!(&messages, &mended);
            prop_assert!(!report.shortened());
        }
        if report.too_large {
            // First and latest message of the person and one round.
            prop_assert!(messages.len() <= 4, "{:?}", messages);
            let latest = messages.iter().rposition(|message| message.role == ChatRole::User);
            for (at, message) in messages.iter().enumerate() {
                for part in &message.parts {
                    let small = match part {
                        Part::Text(text) => Some(at) == latest || text.len() <= FIRST_MESSAGE_MIN_BYTES,
                        Part::ToolResult { content, .. } => content.len() <= 640,
                        Part::ToolUse { input_json, .. } => input_json.len() <= INPUT_MIN_BYTES,
                        _ => false,
                    };
                    prop_assert!(small, "{:?}", part);
                }
            }
        } else {
            prop_assert!(messages.iter().map(message_bytes).sum::<usize>() <= budget);
        }
    }
}

/// Older turns, then one that grows round by round; each prompt as the model would read it.
fn grown(
    older: &[(usize, usize)],
    rounds: &[usize],
    budget: usize,
) -> Vec<(Vec<ChatMessage>, FitReport, Vec<ChatMessage>)> {
    let round = |id: String, bytes: usize| {
        [ChatMessage::assistant(vec![call(&id)]), ChatMessage::tool(vec![result(&id, "x".repeat(bytes))])]
    };
    let mut messages = Vec::new();
    for (turn, (question, answer)) in older.iter().enumerate() {
        messages.push(ChatMessage::user(format!("{turn} {}", "q".repeat(*question))));
        messages.extend(round(format!("o{turn}"), *answer));
        messages.push(ChatMessage::assistant(vec![Part::Text("y".repeat(*answer / 2))]));
    }
    messages.push(ChatMessage::user("the current question"));
    let mut prompts = Vec::new();
    for (number, bytes) in rounds.iter().enumerate() {
        messages.extend(round(format!("c{number}"), *bytes));
        let mut fitted = messages.clone();
        let report = fit(&mut fitted, 0, budget);
        prompts.push((messages.clone(), report, fitted));
    }
    prompts
}

fn current(messages: &[ChatMessage]) -> &[ChatMessage] {
    &messages[messages.iter().rposition(|message| message.role == ChatRole::User).unwrap()..]
}

proptest! {
    #[test]
    fn while_an_older_turn_is_left_the_current_one_is_complete(
        older in prop::collection::vec((0..600usize, 0..2500usize), 0..60),
        rounds in prop::collection::vec(0..1500usize, 1..30),
        budget in 4000..80_000usize,
    ) {
        let quantum = budget / 4;
        let mut steps = 0;
        let prompts = grown(&older, &rounds, budget);
        for (at, (whole, report, fitted)) in prompts.iter().enumerate() {
            check_pairs(fitted);
            prop_assert!(report.too_large || report.tokens_after as usize <= budget);
            // Beside the current turn only the first message is left, or the current turn is as it was.
            if current(fitted) != current(whole) {
                prop_assert!(fitted.len() - current(fitted).len() <= 1, "{report:?}");
            }
            // As much is kept as fits within the step: one turn or result more would not.
            let before = report.tokens_before as usize;
            if before > budget {
                let step = (before - budget).div_ceil(quantum) * quantum;
                let largest = 2500 + 1250 + 600 + 1500 + 8 * (MESSAGE_BYTES + PART_BYTES);
                prop_assert!(before - report.tokens_after as usize <= step + largest + 2 * NOTE_MAX_BYTES, "{report:?}");
            }
            let Some((_, last, prompt)) = at.checked_sub(1).map(|before| &prompts[before]) else { continue };
            let cut = |report: &FitReport| (report.shortened_results, report.dropped_messages, report.shortened_others);
            if cut(last) == cut(report) {
                prop_assert_eq!(&fitted[..prompt.len()], &prompt[..], "it goes on where the last one ended");
            } else {
                steps += 1;
            }
        }
        // Cut again only where a whole step has come: the newest results alone may need it more often.
        let grown: usize = rounds.iter().map(|bytes| bytes + 2 * (MESSAGE_BYTES + PART_BYTES) + 8).sum();
        if quantum > 4 * 1700 {
            prop_assert!(steps <= grown / quantum + 2, "{steps} cuts in {grown} bytes with steps of {quantum}");
        }
    }

    #[test]
    fn a_rate_once_cut_only_grows(tokens in prop::collection::vec(1..40_000i64, 1..40), bytes in 100..4000usize) {
        let messages: Vec<ChatMessage> = (0..40).map(|_| ChatMessage::user("x".repeat(bytes))).collect();
        let counted: Vec<CountedPrompt> =
            tokens.iter().enumerate().map(|(at, tokens)| CountedPrompt { messages: at + 1, tokens: *tokens }).collect();
        let room = 20_000.0;
        let rates: Vec<f64> = (0..=counted.len()).map(|count| rate(&messages, 0, room, &counted[..count])).collect();
        let whole = |count: usize| count as f64 * (bytes + MESSAGE_BYTES + PART_BYTES) as f64 * TOKENS_PER_BYTE_MAX <= room;
        for count in 1..rates.len() {
            prop_assert!((TOKENS_PER_BYTE_MIN..=TOKENS_PER_BYTE_MAX).contains(&rates[count]));
            prop_assert!(whole(count) || rates[count] >= rates[count - 1], "{rates:?}");
        }
    }
}

/// Sixty old turns of 1.2 kB and three rounds in the current one, over budgets: the note of what was left out once made
/// the current turn lose a round, and the model made its call again.
#[test]
fn the_note_of_a_cut_costs_no_round() {
    for budget in (8_000..70_000).step_by(113) {
        let prompts = grown(&[(100, 700); 60], &[122; 3], budget);
        let (whole, _, fitted) = prompts.last().unwrap();
        assert_eq!(current(fitted), current(whole), "budget {budget}");
    }
}
