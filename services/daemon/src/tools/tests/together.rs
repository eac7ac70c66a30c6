//! Several calls, chats and people on the same files.

use std::{os::unix::fs::symlink, sync::Arc};

use reliant_types::{Code, pb};
use serde_json::json;

use super::Fixture;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn edits_of_one_file_at_one_time_are_all_in_it() {
    const CHATS: usize = 8;
    const LINES: usize = 12;
    let fixture = Arc::new(Fixture::new());
    let name = |chat: usize, line: usize| format!("<{chat}.{line}>\n");
    let lines = |mark: &str| -> String {
        let all = (0..CHATS).flat_map(|chat| (0..LINES).map(move |line| (chat, line)));
        all.map(|(chat, line)| format!("{mark}{}", name(chat, line))).collect()
    };
    std::fs::write(fixture.path("shared"), lines("old ")).unwrap();
    symlink("shared", fixture.path("same")).unwrap();
    let mut edits = tokio::task::JoinSet::new();
    for (chat, line) in (0..CHATS).flat_map(|chat| (0..LINES).map(move |line| (chat, line))) {
        let fixture = fixture.clone();
        let (old, new) = (format!("old {}", name(chat, line)), format!("new {}", name(chat, line)));
        let path = if line % 2 == 0 { "shared" } else { "src/../same" };
        edits.spawn(async move {
            let input = json!({"path": path, "old_string": old, "new_string": new});
            fixture.run_in(&format!("chat {chat}"), "edit_file", input).await
        });
    }
    for outcome in edits.join_all().await {
        assert_eq!(outcome.status, pb::ToolCallStatus::Succeeded, "{outcome:?}");
    }
    assert_eq!(std::fs::read_to_string(fixture.path("shared")).unwrap(), lines("new "));
    assert!(fixture.path("same").is_symlink());
}

/// Writes in a chat; true when it was refused because the file had changed.
async fn refused(fixture: &Fixture, chat: &str, path: &str, content: &str) -> bool {
    let outcome = fixture.run_in(chat, "write_file", json!({"path": path, "content": content})).await;
    let text = String::from_utf8(outcome.content).unwrap();
    let refused = text.contains("changed since this chat last read or wrote it") && text.contains("write again");
    assert_eq!(refused, outcome.code == Some(Code::ToolFailed), "{text}");
    let on_disk = std::fs::read_to_string(fixture.path(path)).unwrap();
    assert_eq!(on_disk == content, !refused, "{on_disk}");
    refused
}

#[tokio::test]
async fn a_file_that_changed_since_it_was_read_is_overwritten_at_the_second_word_only() {
    let fixture = Fixture::new();
    let read = async |chat: &str| fixture.run_in(chat, "read_file", json!({"path": "w"})).await;
    let change = |content: &str| std::fs::write(fixture.path("w"), content).unwrap();
    change("one");
    assert!(!refused(&fixture, "never read", "w", "1").await);
    read("a").await;
    assert!(!refused(&fixture, "a", "w", "two").await, "nothing changed");
    assert!(!refused(&fixture, "a", "w", "three").await, "its own write is no change");
    change("a person's line");
    assert!(refused(&fixture, "a", "w", "four").await);
    change("another of that person's lines");
    assert!(refused(&fixture, "a", "w", "four").await, "it changed again");
    assert!(!refused(&fixture, "a", "w", "four").await);
    change("a person's third line");
    read("a").await;
    assert!(!refused(&fixture, "a", "w", "five").await, "it was read again");

    // Another chat's write, and a command's of the same chat, are changes too.
    read("b").await;
    assert!(!refused(&fixture, "a", "w", "sixth").await);
    assert!(refused(&fixture, "b", "w", "seventh").await);
    fixture.run_in("b", "shell", json!({"command": "echo more >> w"})).await;
    assert!(refused(&fixture, "b", "w", "eighth").await);
    // Permissions are not content, and a file that is gone is made anew.
    fixture.run_in("b", "shell", json!({"command": "chmod 755 w"})).await;
    assert!(!refused(&fixture, "b", "w", "ninth").await);
    std::fs::remove_file(fixture.path("w")).unwrap();
    assert!(!refused(&fixture, "b", "w", "tenth").await);
}

#[tokio::test]
async fn an_edit_keeps_what_changed_and_does_not_hide_it() {
    let fixture = Fixture::new();
    let edit = async |old: &str, new: &str| {
        let input = json!({"path": "w", "old_string": old, "new_string": new});
        assert!(!fixture.run_in("a", "edit_file", input).await.is_error);
    };
    std::fs::write(fixture.path("w"), "mine\n").unwrap();
    fixture.run_in("a", "read_file", json!({"path": "w"})).await;
    edit("mine", "my own").await;
    assert!(!refused(&fixture, "a", "w", "mine, rewritten\n").await, "its own edit is no change");
    std::fs::write(fixture.path("w"), "mine, rewritten\nof a person\n").unwrap();
    edit("mine", "my own").await;
    assert_eq!(std::fs::read_to_string(fixture.path("w")).unwrap(), "my own, rewritten\nof a person\n");
    assert!(refused(&fixture, "a", "w", "mine alone\n").await, "the chat never saw the person's line");
    assert!(
        fixture
            .run_in("a", "edit_file", json!({"path": "no/file", "old_string": "a", "new_string": "b"}))
            .await
            .is_error
    );
    assert!(!fixture.path("no").exists());
}
