//! Every script on both wire formats, read by Reliant's own client.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::time::{Duration, Instant};

use common::{Answer, FORMATS, Sim, go_on, read, request};
use futures::StreamExt;
use reliant_models::{ChatMessage, CountedPrompt, ModelEvent, ModelRequest, Part, fit_history, mend_history};
use reliant_types::{pb::StopReason, unix_us};

/// Plays a conversation to its last answer; all answers.
async fn play(sim: &Sim, request: &mut ModelRequest) -> Vec<Answer> {
    let mut answers = Vec::new();
    loop {
        let answer = read(sim.models.stream(request.clone()).await.unwrap()).await.unwrap();
        answers.push(answer.clone());
        if answer.stop != Some(StopReason::ToolUse) {
            return answers;
        }
        go_on(request, &answer);
    }
}

#[tokio::test]
async fn texts_come_whole_with_usage() {
    let sim = Sim::start().await;
    for format in FORMATS {
        let answer = sim.ask(&format!("{format}/text?tokens=50"), "hi").await.unwrap();
        assert_eq!(answer.text().split_whitespace().count(), 50, "{format}");
        assert_eq!(answer.stop, Some(StopReason::EndTurn));
        let usage = answer.usage.unwrap();
        assert_eq!(usage.output_tokens, 50);
        assert!(usage.input_tokens > 20, "{usage:?}");
        let stopped = sim.ask(&format!("{format}/text?stop=max_tokens"), "hi").await.unwrap();
        assert_eq!(stopped.stop, Some(StopReason::MaxTokens));
        let refused = sim.ask(&format!("{format}/text?stop=refusal"), "hi").await.unwrap();
        assert_eq!(refused.stop, Some(StopReason::ContentFilter));
        let echo = sim.ask(&format!("{format}/echo"), "äöü 🦀\n\"quoted\" \u{1}").await.unwrap();
        assert_eq!(echo.text(), "äöü 🦀\n\"quoted\" \u{1}");
    }
    assert_eq!(sim.stats.refused(), 0);
}

#[tokio::test]
async fn thinking_goes_back_with_its_signature() {
    let sim = Sim::start().await;
    for format in FORMATS {
        let prompt =
            r#"sim: {"rounds":[{"thinking":"let me see","tools":[{"name":"shell","args":{}}]},{"text":"seen"}]}"#;
        let mut request = request(&format!("{format}/default"), prompt);
        let answers = play(&sim, &mut request).await;
        let Part::Thinking { text, signature } = &answers[0].parts[0] else { panic!("{answers:?}") };
        assert_eq!(text, "let me see");
        assert_eq!(signature.is_empty(), format == "sim");
        assert_eq!(answers[1].text(), "seen");
        let thought = sim.ask(&format!("{format}/think"), "hi").await.unwrap();
        assert_eq!(thought.parts.len(), 2, "{format}");
    }
}

#[tokio::test]
async fn tools_run_in_rounds_and_in_parallel() {
    let sim = Sim::start().await;
    for format in FORMATS {
        let name = format!("{format}/tool?tool=glob&args=%7B%22pattern%22%3A%22*%22%7D");
        let answers = play(&sim, &mut request(&name, "go")).await;
        assert_eq!(answers[0].calls(), [("glob", r#"{"pattern":"*"}"#)]);
        assert!(answers[1].text().contains("glob says ok"), "{answers:?}");

        let answers = play(&sim, &mut request(&format!("{format}/parallel?n=20"), "go")).await;
        assert_eq!(answers[0].calls().len(), 20);
        assert_eq!(answers[0].calls()[7].1, r#"{"command":"echo call 7 of round 0"}"#);

        let mut rounds = request(&format!("{format}/rounds?n=5"), "go");
        assert_eq!(play(&sim, &mut rounds).await.len(), 6);
        let mut ids: Vec<String> = rounds.messages.iter().flat_map(|message| &message.parts).filter_map(id).collect();
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!((ids.len(), count), (5, 5), "ids are unique in a conversation");
        // The next message of the person begins anew.
        rounds.messages.push(ChatMessage::user("again"));
        assert_eq!(play(&sim, &mut rounds).await.len(), 6);
    }
    assert_eq!(sim.stats.refused(), 0);
}

fn id(part: &Part) -> Option<String> {
    match part {
        Part::ToolUse { provider_id, .. } => Some(provider_id.clone()),
        _ => None,
    }
}

#[tokio::test]
async fn the_default_script_explains_itself_and_the_demo_runs() {
    let sim = Sim::start().await;
    for format in FORMATS {
        let model = format!("{format}/default");
        let text = sim.ask(&model, "who are you?").await.unwrap().text();
        assert!(text.contains("simulator") && text.contains("ANTHROPIC_API_KEY"), "{text}");
        for (prompt, tool) in [("Run a shell command.", "shell"), ("ask an MCP server", "mcp__time__get_current_time")]
        {
            let answers = play(&sim, &mut request(&model, prompt)).await;
            assert_eq!(answers[0].calls()[0].0, tool);
            assert!(answers[1].text().contains(&format!("{tool} says ok")));
        }
        let answers = play(&sim, &mut request(&model, "demo")).await;
        assert!(answers.len() >= 3, "{answers:?}");
    }
}

#[tokio::test]
async fn broken_arguments_are_handed_on_and_can_be_sent_back() {
    let sim = Sim::start().await;
    let prompt =
        r#"sim: {"rounds":[{"tools":[{"name":"shell","raw_args":"{\"command\": "},{"name":"shell"}]},{"text":"ok"}]}"#;
    for format in FORMATS {
        let answers = play(&sim, &mut request(&format!("{format}/default"), prompt)).await;
        assert_eq!(answers[0].calls(), [("shell", "{\"command\": "), ("shell", "{}")]);
        assert_eq!(answers[1].text(), "ok");
    }
    assert_eq!(sim.stats.refused(), 0);
}

#[tokio::test]
async fn a_cut_conversation_is_refused_until_it_is_mended() {
    let sim = Sim::start().await;
    for format in FORMATS {
        let mut request = request(&format!("{format}/parallel?n=3"), "go");
        let answer = read(sim.models.stream(request.clone()).await.unwrap()).await.unwrap();
        request.messages.push(ChatMessage::assistant(answer.parts));
        request.messages.push(ChatMessage::user("never mind"));
        assert!(!sim.models.stream(request.clone()).await.err().unwrap().retryable());
        assert_eq!(mend_history(&mut request.messages), 3);
        read(sim.models.stream(request).await.unwrap()).await.unwrap();
    }
}

#[tokio::test]
async fn a_long_conversation_is_made_to_fit() {
    let sim = Sim::with(|config| {
        for model in &mut config.models {
            model.context_window = 8000;
            model.max_output_tokens = 1000;
        }
    })
    .await;
    for format in FORMATS {
        let model = sim.models.resolve(&format!("{format}/default")).unwrap();
        let mut request = request(&model.id, "first");
        let call =
            |n: usize| Part::ToolUse { provider_id: format!("c{n}"), name: "shell".into(), input_json: "{}".into() };
        for n in 0..40 {
            request.messages.push(ChatMessage::assistant(vec![call(n)]));
            let content = "lorem ".repeat(300);
            let result = Part::ToolResult { provider_id: format!("c{n}"), content, is_error: false };
            request.messages.push(ChatMessage::tool(vec![result]));
            request.messages.push(ChatMessage::user(format!("sim: {{\"rounds\":[{{\"text\":\"answer {n}\"}}]}}")));
            let counted: Vec<_> = (n > 5).then_some(CountedPrompt { messages: 3, tokens: 600 }).into_iter().collect();
            let mut fitted = request.clone();
            let report = fit_history(&mut fitted, &model, &counted);
            assert_eq!(report.shortened(), report.notice().is_some());
            // The simulator counts four bytes a token, and refuses what is longer than the window.
            fitted.model = format!("{format}/default?window=8000");
            let answer = read(sim.models.stream(fitted).await.unwrap()).await.unwrap();
            assert_eq!(answer.text(), format!("answer {n}"));
        }
    }
}

#[tokio::test]
async fn pieces_come_at_their_pace_and_soon() {
    let sim = Sim::start().await;
    for format in FORMATS {
        let begun = Instant::now();
        let mut stream = sim
            .models
            .stream(request(&format!("{format}/text?tokens=40&rate=200&stamp=1&ttft_ms=50"), "x"))
            .await
            .unwrap();
        let mut lags = Vec::new();
        while let Some(event) = stream.next().await {
            if let ModelEvent::Text { piece, .. } = event.unwrap() {
                let stamp: i64 = piece.split(';').next().unwrap().parse().unwrap();
                lags.push(unix_us() - stamp);
            }
        }
        assert_eq!(lags.len(), 40);
        lags.sort_unstable();
        // Generous, for a busy machine; it is some 100 µs on an idle one.
        assert!(lags[20] < 20_000, "{format}: median {} µs", lags[20]);
        assert!(begun.elapsed() >= Duration::from_millis(50 + 39 * 5), "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn a_connection_is_used_again() {
    let sim = Sim::start().await;
    // The kernel gives a listener's address to each connection; the server counts none, so the client's ports tell.
    for _ in 0..20 {
        sim.ask("sim/text?tokens=3", "x").await.unwrap();
        // The last bytes of a body are read behind the answer.
        tokio::task::yield_now().await;
    }
    let port: u16 = sim.base_url.trim_end_matches("/v1").rsplit(':').next().unwrap().parse().unwrap();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let to_server = format!("0100007F:{port:04X}");
    let opened = table.lines().filter(|line| line.split_whitespace().nth(2) == Some(&to_server)).count();
    assert!(opened <= 3, "{opened} connections for 20 calls");
}

#[tokio::test]
async fn whole_answers_and_the_list_of_models() {
    let sim = Sim::start().await;
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let post = async |path: &str, body: serde_json::Value| -> serde_json::Value {
        let text = body.to_string();
        let request =
            client.post(format!("{}{path}", sim.base_url)).header("anthropic-version", "2023-06-01").body(text);
        serde_json::from_slice(&request.send().await.unwrap().bytes().await.unwrap()).unwrap()
    };
    let message = serde_json::json!([{ "role": "user", "content": "hello you" }]);
    let answer = post("/chat/completions", serde_json::json!({ "model": "sim/echo", "messages": message })).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "hello you");
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    let body = serde_json::json!({ "model": "tool", "messages": message, "max_tokens": 9 });
    let answer = post("/messages", body).await;
    assert_eq!((&answer["stop_reason"], &answer["content"][0]["name"]), (&"tool_use".into(), &"shell".into()));
    let models = client.get(format!("{}/models", sim.base_url)).send().await.unwrap().bytes().await.unwrap();
    assert!(String::from_utf8_lossy(&models).contains("\"default\""));
}

#[tokio::test]
async fn the_server_stops_while_a_stream_is_open() {
    let mut sim = Sim::start().await;
    let mut stream = sim.models.stream(request("sim/text?tokens=1000&rate=5", "x")).await.unwrap();
    stream.next().await.unwrap().unwrap();
    sim.stop.take().unwrap().send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(5), sim.task).await.unwrap().unwrap();
}
