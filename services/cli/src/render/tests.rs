use super::*;

fn delta(offset: i64, epoch: i64, piece: &str) -> ClientUpdate {
    let block = pb::BlockRef { target_id: "m".into(), block: 0, kind: pb::StreamKind::Text as i32 };
    let delta =
        pb::Delta { block: Some(block), epoch, offset, piece: piece.as_bytes().to_vec().into(), ..Default::default() };
    ClientUpdate::Delta(delta)
}

fn committed(text: &str) -> ClientUpdate {
    let block = pb::content_block::Block::Text(pb::TextBlock { text: text.into() });
    let message = pb::Message {
        id: "m".into(),
        role: pb::Role::Assistant as i32,
        blocks: vec![pb::ContentBlock { position: 0, block: Some(block) }],
        ..Default::default()
    };
    let kind = pb::chat_event::Kind::MessageCommitted(message);
    ClientUpdate::Event(pb::ChatEvent { kind: Some(kind), ..Default::default() })
}

fn shown(updates: &[ClientUpdate]) -> String {
    let mut out = Vec::new();
    let mut renderer = Renderer::new(&mut out, false);
    for update in updates {
        renderer.update(update).expect("a vector takes all");
    }
    String::from_utf8(out).expect("text")
}

#[test]
fn live_text_and_its_commit_show_the_text_once() {
    assert_eq!(shown(&[delta(0, 1, "Hel"), delta(3, 1, "lo"), committed("Hello, you")]), "Hello, you\n");
    assert_eq!(shown(&[committed("Hello")]), "Hello\n");
}

#[test]
fn a_model_that_is_asked_again_is_told_once() {
    let stamp = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    let event = |kind| ClientUpdate::Event(pb::ChatEvent { kind: Some(kind), time: stamp(100), ..Default::default() });
    let turn = pb::Turn {
        status: pb::TurnStatus::Running as i32,
        waiting_for: "the model provider is overloaded or failing (status 529)".into(),
        retry_at: stamp(112),
        ..Default::default()
    };
    let waits = event(pb::chat_event::Kind::TurnChanged(turn));
    let again = pb::MessageStarted { message_id: "m".into(), restarted: true, ..Default::default() };
    let again = event(pb::chat_event::Kind::MessageStarted(again));
    let text = "… the model provider is overloaded or failing (status 529); trying again in 12 s\n";
    assert_eq!(shown(&[waits, again.clone()]), text);
    assert!(shown(&[again]).contains("the attempt was lost"));
}

/// What is shown of a call that printed `output` and whose outcome then could not be known.
fn unknown_after(output: &str, cause: pb::UnknownCause) -> String {
    let call = pb::ToolCall {
        id: "m".into(),
        tool: "shell".into(),
        status: pb::ToolCallStatus::OutcomeUnknown as i32,
        unknown_cause: cause as i32,
        ..Default::default()
    };
    let block = pb::BlockRef { target_id: "m".into(), block: 0, kind: pb::StreamKind::Stdout as i32 };
    let piece = output.as_bytes().to_vec().into();
    let output = ClientUpdate::Delta(pb::Delta { block: Some(block), piece, ..Default::default() });
    let changed = pb::ToolCallChanged { tool_call: Some(call), ..Default::default() };
    let kind = Some(pb::chat_event::Kind::ToolCallChanged(changed));
    shown(&[output, ClientUpdate::Event(pb::ChatEvent { kind, ..Default::default() })])
}

fn check_unknown(cause: pb::UnknownCause, words: &str) {
    let advice = "look at its effects before you run it again.\n";
    for output in ["", "half of it\n"] {
        let shown = unknown_after(output, cause);
        assert!(shown.contains(&format!("? shell outcome unknown: {words}\n")), "{cause:?}: {shown}");
        assert!(shown.ends_with(advice) && shown.contains(output.trim()), "{cause:?}: {shown}");
    }
}

#[test]
fn a_process_that_died_is_told_as_the_cause() {
    check_unknown(pb::UnknownCause::ProcessDied, "the daemon or the tool's server died while it ran");
}

#[test]
fn a_lost_journal_is_told_as_the_cause() {
    check_unknown(pb::UnknownCause::JournalLost, "it was sent, and the daemon's journal was lost afterwards");
}

#[test]
fn a_daemon_that_stayed_away_is_told_as_the_cause() {
    check_unknown(pb::UnknownCause::DaemonAway, "it was sent, and the daemon stayed away past the deadline");
}

#[test]
fn a_cause_that_is_not_known_here_is_not_guessed() {
    check_unknown(pb::UnknownCause::Unspecified, "it cannot be known whether it ran to its end");
}

#[test]
fn repeated_and_outdated_pieces_are_left_out() {
    assert_eq!(shown(&[delta(0, 2, "a"), delta(0, 2, "a"), delta(1, 1, "old"), delta(1, 2, "b")]), "ab");
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    assert!(!shown(&[delta(0, 1, "\x1b[2J")]).contains('\x1b'));
}

fn of_call(kind: pb::chat_event::Kind) -> ClientUpdate {
    ClientUpdate::Event(pb::ChatEvent { kind: Some(kind), ..Default::default() })
}

fn output_of(call: &str, output: &str) -> ClientUpdate {
    let block = pb::BlockRef { target_id: call.into(), block: 0, kind: pb::StreamKind::Stdout as i32 };
    let piece = output.as_bytes().to_vec().into();
    ClientUpdate::Delta(pb::Delta { block: Some(block), piece, ..Default::default() })
}

fn ended(call: &str) -> ClientUpdate {
    let call = pb::ToolCall {
        id: call.into(),
        tool: "shell".into(),
        status: pb::ToolCallStatus::Succeeded as i32,
        ..Default::default()
    };
    of_call(pb::chat_event::Kind::ToolCallChanged(pb::ToolCallChanged { tool_call: Some(call), ..Default::default() }))
}

#[test]
fn the_end_of_a_long_output_is_shown_and_what_is_left_out_is_counted() {
    for count in [1, FIRST_LINES_MAX, FIRST_LINES_MAX + LAST_LINES_MAX, FIRST_LINES_MAX + LAST_LINES_MAX + 1, 500] {
        let text: String = (1..=count).map(|n| format!("line {n}\n")).collect();
        // It comes in pieces that are no lines.
        let (head, tail) = text.split_at(text.len() / 3);
        let shown = shown(&[output_of("c", head), output_of("c", tail), ended("c")]);
        assert!(shown.contains(&format!("│ line {count}\n")), "{count}: the newest line: {shown}");
        let lines = shown.lines().filter(|line| line.contains("│ line ")).count();
        let left_out = shown.contains(&format!("{} line", count - lines)) && shown.contains("--full");
        assert_eq!(left_out, lines < count, "{count}: {shown}");
        assert_eq!(lines, count.min(FIRST_LINES_MAX + LAST_LINES_MAX));
    }
}

#[test]
fn a_long_line_tells_how_much_of_it_is_left_out() {
    for (bytes, more) in [(SHOWN_CHARS_MAX, 0), (SHOWN_CHARS_MAX + 7, 7), (100_000, 100_000 - SHOWN_CHARS_MAX)] {
        let text = "x".repeat(bytes);
        let (head, tail) = text.split_at(bytes / 2);
        let shown = shown(&[output_of("c", head), output_of("c", tail), output_of("c", "\nnext\n"), ended("c")]);
        assert_eq!(shown.contains(&format!("({more} more bytes)\n")), more > 0, "{bytes}: {shown}");
        assert!(shown.contains("│ next\n"), "{bytes}");
    }
}

#[test]
fn nothing_is_left_out_where_all_is_asked_for() {
    let text: String = (1..=500).map(|n| format!("{} line {n}\n", "x".repeat(1000))).collect();
    let mut out = Vec::new();
    let mut renderer = Renderer::new(&mut out, false).full(true);
    for update in [output_of("c", &text), ended("c")] {
        renderer.update(&update).expect("a vector takes all");
    }
    let shown = String::from_utf8(out).expect("text");
    assert_eq!(shown.lines().count(), 501);
    assert!(!shown.contains('…'));
}

fn message(ordinal: i32, role: pb::Role, text: &str) -> pb::Message {
    let block = pb::content_block::Block::Text(pb::TextBlock { text: text.into() });
    pb::Message {
        id: format!("m{ordinal}"),
        ordinal,
        role: role as i32,
        blocks: vec![pb::ContentBlock { position: 0, block: Some(block) }],
        ..Default::default()
    }
}

#[test]
fn a_snapshot_shows_what_is_new_and_tells_what_is_missing() {
    let commit = |message| of_call(pb::chat_event::Kind::MessageCommitted(message));
    let snapshot = |ordinals: std::ops::RangeInclusive<i32>| {
        let chat = Some(pb::Chat { id: "c1".into(), ..Default::default() });
        let messages = ordinals.map(|n| message(n, pb::Role::Assistant, &format!("answer {n}"))).collect();
        ClientUpdate::Snapshot(pb::ChatSnapshot { chat, messages, ..Default::default() })
    };
    let first = commit(message(1, pb::Role::User, "question"));
    let text = shown(&[first.clone(), commit(message(2, pb::Role::Assistant, "answer 2")), snapshot(1..=3)]);
    assert_eq!(text, "> question\nanswer 2\nanswer 3\n");
    let text = shown(&[first, snapshot(5..=6)]);
    assert!(text.contains("3 messages came meanwhile") && text.contains("--chat c1 --all"), "{text}");
    assert!(text.ends_with("answer 5\nanswer 6\n"));
}

#[test]
fn results_are_shown_where_the_end_of_their_call_was_not_seen() {
    let result = |id: &str| {
        let block = pb::ToolResultBlock { tool_call_id: id.into(), content: "said".into(), is_error: false };
        pb::ContentBlock { position: 0, block: Some(pb::content_block::Block::ToolResult(block)) }
    };
    let message = pb::Message {
        ordinal: 2,
        role: pb::Role::Tool as i32,
        blocks: vec![result("seen"), result("unseen")],
        ..Default::default()
    };
    let commit = of_call(pb::chat_event::Kind::MessageCommitted(message));
    let text = shown(&[output_of("seen", "out\n"), ended("seen"), commit]);
    assert_eq!(text, "  │ out\n✓ shell done\n  │ said\n✓ the call\n");
}
