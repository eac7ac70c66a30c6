//! What providers and servers that imitate them really send, and what is sent to them.

use proptest::prelude::*;
use reliant_types::pb;
use serde_json::{Value, json};

use super::*;
use crate::{BlockKind, ChatMessage, ModelRequest, Part, ToolSpec};

fn decode(kind: ProviderKind, events: &[Value]) -> Result<Vec<ModelEvent>, ModelError> {
    let mut decoder = Decoder::new(kind, "KEY");
    let mut out = Events::new();
    for event in events {
        let text = event.as_str().map_or_else(|| event.to_string(), str::to_owned);
        decoder.event(&text, &mut out)?;
    }
    decoder.end(&mut out)?;
    Ok(out.into())
}

/// The answer in short: `text:…`, `think:…`, `tool(id,name):input`, and the stop reason.
fn short(events: &[ModelEvent]) -> Vec<String> {
    let mut blocks: Vec<String> = Vec::new();
    let mut open = std::collections::BTreeSet::new();
    let mut stop = None;
    for event in events {
        assert!(stop.is_none(), "something after Stop");
        match event {
            ModelEvent::BlockStart { index, kind } => {
                assert_eq!(*index as usize, blocks.len());
                assert!(open.insert(*index));
                blocks.push(match kind {
                    BlockKind::Text => "text:".into(),
                    BlockKind::Thinking => "think:".into(),
                    BlockKind::ToolUse { provider_id, name } => format!("tool({provider_id},{name}):"),
                });
            }
            ModelEvent::Text { index, piece }
            | ModelEvent::Thinking { index, piece }
            | ModelEvent::ToolInput { index, piece } => {
                assert!(open.contains(index) && !piece.is_empty());
                blocks[*index as usize].push_str(piece);
            }
            ModelEvent::Signature { index, piece } => blocks[*index as usize].push_str(&format!("[{piece}]")),
            ModelEvent::BlockEnd { index } => assert!(open.remove(index)),
            ModelEvent::Usage(_) => {}
            ModelEvent::Stop(reason) => stop = Some(*reason),
        }
    }
    assert!(open.is_empty());
    blocks.push(format!("{:?}", stop.expect("a stop reason")));
    blocks
}

fn usage(events: &[ModelEvent]) -> pb::Usage {
    let found = events.iter().find_map(|event| match event {
        ModelEvent::Usage(usage) => Some(*usage),
        _ => None,
    });
    found.expect("usage")
}

fn openai(deltas: &[Value], finish: &str) -> Vec<String> {
    let mut events: Vec<Value> = deltas.iter().map(|delta| json!({ "choices": [{ "delta": delta }] })).collect();
    events.push(json!({ "choices": [{ "index": 0, "delta": {}, "finish_reason": finish }] }));
    events.push(json!("[DONE]"));
    short(&decode(ProviderKind::OpenAi, &events).unwrap())
}

fn call(index: Value, id: Value, name: Value, arguments: Value) -> Value {
    json!({ "tool_calls": [{ "index": index, "id": id, "function": { "name": name, "arguments": arguments } }] })
}

#[test]
fn openai_itself() {
    let events = [
        json!({ "id": "c", "choices": [{ "index": 0, "delta": { "role": "assistant", "content": "", "refusal": null }, "finish_reason": null }], "usage": null }),
        json!({ "choices": [{ "index": 0, "delta": { "content": "Hel" }, "logprobs": null }] }),
        json!({ "choices": [{ "index": 0, "delta": { "content": "lo" } }] }),
        json!({ "choices": [{ "index": 0, "delta": call(json!(0), json!("a"), json!("f"), json!("")) }] }),
        json!({ "choices": [{ "index": 0, "delta": call(json!(0), json!(null), json!(null), json!("{\"x\":")) }] }),
        json!({ "choices": [{ "index": 0, "delta": call(json!(1), json!("b"), json!("g"), json!("")) }] }),
        json!({ "choices": [{ "index": 0, "delta": call(json!(0), json!(null), json!(null), json!("1}")) }] }),
        json!({ "choices": [{ "index": 0, "delta": {}, "finish_reason": "tool_calls" }] }),
        json!({ "choices": [], "usage": {
            "prompt_tokens": 100, "completion_tokens": 20, "prompt_tokens_details": { "cached_tokens": 64 },
            "completion_tokens_details": { "reasoning_tokens": 8 } } }),
        json!("[DONE]"),
    ];
    let events = decode(ProviderKind::OpenAi, &events).unwrap();
    assert_eq!(short(&events), ["text:Hello", "tool(a,f):{\"x\":1}", "tool(b,g):{}", "ToolUse"]);
    let expected = pb::Usage {
        input_tokens: 100,
        output_tokens: 20,
        cache_read_tokens: 64,
        reasoning_tokens: 8,
        ..Default::default()
    };
    assert_eq!(usage(&events), expected);
}

#[test]
fn servers_that_imitate_openai() {
    // Ollama: each call whole, all with index 0.
    let calls = [
        call(json!(0), json!("a"), json!("f"), json!("{\"x\":1}")),
        call(json!(0), json!("b"), json!("g"), json!("{\"y\":2}")),
    ];
    assert_eq!(openai(&calls, "stop"), ["tool(a,f):{\"x\":1}", "tool(b,g):{\"y\":2}", "ToolUse"]);
    // No index, the arguments an object.
    let calls = [
        call(json!(null), json!("a"), json!("f"), json!({ "x": 1 })),
        call(json!(null), json!("b"), json!("g"), json!({})),
    ];
    assert_eq!(openai(&calls, "tool_calls"), ["tool(a,f):{\"x\":1}", "tool(b,g):{}", "ToolUse"]);
    // The id repeated with every piece; the name after the first piece of the arguments.
    let calls = [
        call(json!(0), json!("a"), json!(null), json!("{")),
        call(json!(0), json!("a"), json!("f"), json!("\"x\"")),
        call(json!(0), json!("a"), json!(null), json!(":1}")),
    ];
    assert_eq!(openai(&calls, "tool_calls"), ["tool(a,f):{\"x\":1}", "ToolUse"]);
    // No id at all: one is made.
    let answer = openai(&[call(json!(0), json!(null), json!("f"), json!("{}"))], "tool_calls");
    assert!(answer[0].starts_with("tool(call_") && answer[0].ends_with(",f):{}"), "{answer:?}");
    // Both names of reasoning.
    let deltas =
        [json!({ "reasoning_content": "a" }), json!({ "reasoning": "b", "content": null }), json!({ "content": "c" })];
    assert_eq!(openai(&deltas, "length"), ["think:ab", "text:c", "MaxTokens"]);
    // Types nobody expects are nothing.
    let odd = json!({ "content": 7, "reasoning": { "text": "x" }, "tool_calls": null });
    assert_eq!(openai(&[odd, json!({ "content": "c" })], "content_filter"), ["text:c", "ContentFilter"]);
    // No finish reason; usage as Groq puts it, or with every chunk.
    let events = [
        json!({ "choices": [{ "delta": { "content": "x" } }], "usage": { "prompt_tokens": 1, "completion_tokens": 1 } }),
        json!({ "choices": [], "x_groq": { "usage": { "prompt_tokens": 5, "completion_tokens": 2 } } }),
        json!("[DONE]"),
    ];
    let events = decode(ProviderKind::OpenAi, &events).unwrap();
    assert_eq!((short(&events).len(), usage(&events).input_tokens), (2, 5));
    // No [DONE] behind the finish reason.
    let done = [json!({ "choices": [{ "delta": { "content": "x" }, "finish_reason": "stop" }] })];
    assert_eq!(short(&decode(ProviderKind::OpenAi, &done).unwrap()), ["text:x", "EndTurn"]);
}

#[test]
fn openai_errors() {
    let error = |events: &[Value]| decode(ProviderKind::OpenAi, events).unwrap_err();
    let piece = json!({ "choices": [{ "delta": { "content": "x" } }] });
    assert_eq!(error(std::slice::from_ref(&piece)), ModelError::CutStream);
    assert!(matches!(error(&[json!("[DONE]")]), ModelError::Garbage { .. }));
    assert!(matches!(error(&[json!("{\"choices\":")]), ModelError::Garbage { .. }));
    for index in [json!(128), json!(4_294_967_295_u64), json!(u64::MAX), json!(-1), json!(0.5), json!("0")] {
        let event = json!({ "choices": [{ "delta": call(index, json!("a"), json!("f"), json!("")) }] });
        assert!(matches!(error(&[event]), ModelError::Garbage { .. }));
    }
    let rejected =
        error(&[piece.clone(), json!({ "error": { "message": "no KEY for you", "type": "invalid_request_error" } })]);
    assert_eq!(rejected, ModelError::Rejected { status: 400, message: "no *** for you".into() });
    let overloaded = error(&[piece.clone(), json!({ "error": { "message": "busy", "code": 502 } })]);
    assert_eq!(overloaded, ModelError::Overloaded { status: 502, retry_after: None });
    assert!(matches!(error(&[json!({ "error": { "code": 429 } })]), ModelError::RateLimited { .. }));
    assert!(matches!(error(&[json!({ "error": "boom" })]), ModelError::Garbage { .. }));
    let endless: Vec<Value> = (0..129)
        .map(|n| json!({ "choices": [{ "delta": call(json!(null), json!(n.to_string()), json!("f"), json!("{}")) }] }))
        .collect();
    assert!(matches!(error(&endless), ModelError::TooLarge { .. }));
}

#[test]
fn anthropic_itself() {
    let events = [
        json!({ "type": "message_start", "message": { "id": "m", "usage": {
            "input_tokens": 10, "cache_read_input_tokens": 100, "cache_creation_input_tokens": 5, "output_tokens": 1 } } }),
        json!({ "type": "ping" }),
        json!({ "type": "content_block_start", "index": 0, "content_block": { "type": "thinking", "thinking": "", "signature": "" } }),
        json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "thinking_delta", "thinking": "hm" } }),
        json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "signature_delta", "signature": "sig" } }),
        json!({ "type": "content_block_stop", "index": 0 }),
        json!({ "type": "content_block_start", "index": 1, "content_block": { "type": "redacted_thinking", "data": "xx" } }),
        json!({ "type": "content_block_stop", "index": 1 }),
        json!({ "type": "content_block_start", "index": 2, "content_block": { "type": "text", "text": "" } }),
        json!({ "type": "content_block_delta", "index": 2, "delta": { "type": "text_delta", "text": "hi" } }),
        json!({ "type": "content_block_delta", "index": 2, "delta": { "type": "citations_delta", "citation": {} } }),
        json!({ "type": "content_block_stop", "index": 2 }),
        json!({ "type": "content_block_start", "index": 3, "content_block": { "type": "tool_use", "id": "a", "name": "f", "input": {} } }),
        json!({ "type": "content_block_delta", "index": 3, "delta": { "type": "input_json_delta", "partial_json": "" } }),
        json!({ "type": "content_block_delta", "index": 3, "delta": { "type": "input_json_delta", "partial_json": "{\"x\":1}" } }),
        json!({ "type": "content_block_stop", "index": 3 }),
        json!({ "type": "content_block_start", "index": 4, "content_block": { "type": "tool_use", "id": "b", "name": "g", "input": { "y": 2 } } }),
        json!({ "type": "content_block_stop", "index": 4 }),
        json!({ "type": "something_new", "x": 1 }),
        json!({ "type": "message_delta", "delta": { "stop_reason": "tool_use", "stop_sequence": null }, "usage": { "output_tokens": 42 } }),
        json!({ "type": "message_stop" }),
    ];
    let events = decode(ProviderKind::Anthropic, &events).unwrap();
    assert_eq!(short(&events), ["think:hm[sig]", "text:hi", "tool(a,f):{\"x\":1}", "tool(b,g):{\"y\":2}", "ToolUse"]);
    let expected = pb::Usage {
        input_tokens: 115,
        output_tokens: 42,
        cache_read_tokens: 100,
        cache_write_tokens: 5,
        ..Default::default()
    };
    assert_eq!(usage(&events), expected);
}

#[test]
fn anthropic_errors() {
    let error = |events: &[Value]| decode(ProviderKind::Anthropic, events).unwrap_err();
    let start =
        |index: u64| json!({ "type": "content_block_start", "index": index, "content_block": { "type": "text" } });
    let piece = |index: u64| json!({ "type": "content_block_delta", "index": index, "delta": { "type": "text_delta", "text": "x" } });
    assert_eq!(error(&[start(0), piece(0)]), ModelError::CutStream);
    assert!(matches!(error(&[piece(0)]), ModelError::Garbage { .. }));
    assert!(matches!(error(&[start(0), piece(1)]), ModelError::Garbage { .. }));
    assert!(matches!(error(&[start(4_294_967_295)]), ModelError::Garbage { .. }));
    assert!(matches!(error(&[json!({ "type": "message_stop" })]), ModelError::Garbage { .. }));
    assert!(matches!(error(&[json!({ "x": 1 })]), ModelError::Garbage { .. }));
    let failed = |kind: &str| error(&[json!({ "type": "error", "error": { "type": kind, "message": "m" } })]);
    assert_eq!(failed("overloaded_error"), ModelError::Overloaded { status: 529, retry_after: None });
    assert!(matches!(failed("rate_limit_error"), ModelError::RateLimited { .. }));
    assert!(matches!(failed("invalid_request_error"), ModelError::Rejected { status: 400, .. }));
}

fn request() -> ModelRequest {
    let call =
        |id: &str, input: &str| Part::ToolUse { provider_id: id.into(), name: "f".into(), input_json: input.into() };
    let result = |id: &str, is_error| Part::ToolResult { provider_id: id.into(), content: "out".into(), is_error };
    ModelRequest {
        model: "p/m".into(),
        system: "sys".into(),
        messages: vec![
            ChatMessage {
                role: crate::ChatRole::User,
                parts: vec![
                    Part::Text("hi".into()),
                    Part::Image { media_type: "image/png".into(), data: vec![1, 2, 3] },
                ],
            },
            ChatMessage::assistant(vec![
                Part::Thinking { text: "t".into(), signature: "s".into() },
                Part::Text(String::new()),
                call("a", "{\"x\": 1}"),
                call("b", "oops"),
            ]),
            ChatMessage::tool(vec![result("a", false), result("b", true)]),
            ChatMessage::user("next"),
        ],
        tools: vec![ToolSpec { name: "f".into(), description: "d".into(), input_schema: json!({ "type": "object" }) }],
        max_output_tokens: 0,
    }
}

#[test]
fn what_openai_gets() {
    let body: Value = serde_json::from_slice(&super::openai::body(&request(), "m", 99, false)).unwrap();
    let function = |arguments: &str| json!({ "name": "f", "arguments": arguments });
    let expected = json!({
        "model": "m",
        "messages": [
            { "role": "system", "content": "sys" },
            { "role": "user", "content": [
                { "type": "text", "text": "hi" },
                { "type": "image_url", "image_url": { "url": "data:image/png;base64,AQID" } },
            ] },
            { "role": "assistant", "content": null, "tool_calls": [
                { "id": "a", "type": "function", "function": function("{\"x\": 1}") },
                { "id": "b", "type": "function", "function": function("{\"invalid_json\":\"oops\"}") },
            ] },
            { "role": "tool", "tool_call_id": "a", "content": "out" },
            { "role": "tool", "tool_call_id": "b", "content": "[tool error] out" },
            { "role": "user", "content": "next" },
        ],
        "tools": [{ "type": "function", "function": { "name": "f", "description": "d", "parameters": { "type": "object" } } }],
        "stream": true, "stream_options": { "include_usage": true }, "max_tokens": 99,
    });
    assert_eq!(body, expected);
    let own: Value = serde_json::from_slice(&super::openai::body(&request(), "m", 99, true)).unwrap();
    assert_eq!((&own["max_tokens"], &own["max_completion_tokens"]), (&Value::Null, &json!(99)));
}

#[test]
fn what_anthropic_gets() {
    let body: Value = serde_json::from_slice(&super::anthropic::body(&request(), "m", 0, 0, true)).unwrap();
    let mark = json!({ "type": "ephemeral" });
    let expected = json!({
        "model": "m", "max_tokens": 8192, "stream": true,
        "system": [{ "type": "text", "text": "sys", "cache_control": mark }],
        "messages": [
            { "role": "user", "content": [
                { "type": "text", "text": "hi" },
                { "type": "image", "source": { "type": "base64", "media_type": "image/png", "data": "AQID" } },
            ] },
            { "role": "assistant", "content": [
                { "type": "thinking", "thinking": "t", "signature": "s" },
                { "type": "tool_use", "id": "a", "name": "f", "input": { "x": 1 } },
                { "type": "tool_use", "id": "b", "name": "f", "input": { "invalid_json": "oops" } },
            ] },
            { "role": "user", "content": [
                { "type": "tool_result", "tool_use_id": "a", "content": "out" },
                { "type": "tool_result", "tool_use_id": "b", "content": "out", "is_error": true },
                { "type": "text", "text": "next", "cache_control": mark },
            ] },
        ],
        "tools": [{ "name": "f", "description": "d", "input_schema": { "type": "object" }, "cache_control": mark }],
    });
    assert_eq!(body, expected);
    let thinking: Value = serde_json::from_slice(&super::anthropic::body(&request(), "m", 9000, 4000, false)).unwrap();
    assert_eq!(thinking["thinking"], json!({ "type": "enabled", "budget_tokens": 4000 }));
    assert!(!thinking.to_string().contains("cache_control"));
    // Within a tool round that began without thinking it must stay off.
    let mut round = request();
    round.messages.truncate(3);
    round.messages[1].parts.remove(0);
    let off: Value = serde_json::from_slice(&super::anthropic::body(&round, "m", 9000, 4000, false)).unwrap();
    assert_eq!(off["thinking"], Value::Null);
}

#[test]
fn inputs_become_objects() {
    assert_eq!(object(" {\"a\": 1}").get(), "{\"a\": 1}");
    assert_eq!(object("").get(), "{}");
    assert_eq!(object("{\"a\": ").get(), r#"{"invalid_json":"{\"a\":"}"#);
    assert_eq!(object("[1]").get(), r#"{"invalid_json":"[1]"}"#);
}

fn openai_delta() -> impl Strategy<Value = Value> {
    let index = prop_oneof![Just(json!(null)), (0..3u8).prop_map(|n| json!(n))];
    let id = prop_oneof![Just(json!(null)), Just(json!("")), "[ab]".prop_map(|id| json!(id))];
    let name = prop_oneof![Just(json!(null)), Just(json!("f"))];
    prop_oneof![
        "[a-c]{0,2}".prop_map(|text| json!({ "content": text })),
        "[a-c]{0,2}".prop_map(|text| json!({ "reasoning": text })),
        (index, id, name, "[{}]{0,2}").prop_map(|(index, id, name, args)| call(index, id, name, json!(args))),
    ]
}

fn anthropic_event() -> impl Strategy<Value = Value> {
    let block = prop_oneof![
        Just(json!({ "type": "text", "text": "" })),
        Just(json!({ "type": "thinking", "thinking": "" })),
        Just(json!({ "type": "redacted_thinking" })),
        Just(json!({ "type": "tool_use", "id": "a", "name": "f", "input": {} })),
    ];
    let delta = prop_oneof![
        "[a-c]{0,2}".prop_map(|text| json!({ "type": "text_delta", "text": text })),
        "[a-c]{0,2}".prop_map(|text| json!({ "type": "thinking_delta", "thinking": text })),
        "[a-c]{0,2}".prop_map(|text| json!({ "type": "input_json_delta", "partial_json": text })),
        Just(json!({ "type": "signature_delta", "signature": "s" })),
    ];
    prop_oneof![
        (0..2u8, block).prop_map(
            |(index, block)| json!({ "type": "content_block_start", "index": index, "content_block": block })
        ),
        (0..2u8, delta)
            .prop_map(|(index, delta)| json!({ "type": "content_block_delta", "index": index, "delta": delta })),
        (0..2u8).prop_map(|index| json!({ "type": "content_block_stop", "index": index })),
        Just(json!({ "type": "message_delta", "delta": { "stop_reason": "end_turn" } })),
    ]
}

proptest! {
    #[test]
    fn openai_in_any_order_keeps_the_promises(deltas in prop::collection::vec(openai_delta(), 0..20)) {
        let mut events: Vec<Value> = deltas.iter().map(|delta| json!({ "choices": [{ "delta": delta }] })).collect();
        events.push(json!({ "choices": [{ "finish_reason": "stop" }] }));
        match decode(ProviderKind::OpenAi, &events) {
            Ok(events) => drop(short(&events)),
            Err(error) => prop_assert!(matches!(error, ModelError::Garbage { .. }), "{:?}", error),
        }
    }

    #[test]
    fn anthropic_in_any_order_keeps_the_promises(mut events in prop::collection::vec(anthropic_event(), 0..20)) {
        events.push(json!({ "type": "message_delta", "delta": { "stop_reason": "end_turn" } }));
        events.push(json!({ "type": "message_stop" }));
        match decode(ProviderKind::Anthropic, &events) {
            Ok(events) => drop(short(&events)),
            Err(error) => prop_assert!(matches!(error, ModelError::Garbage { .. }), "{:?}", error),
        }
    }

    #[test]
    fn any_text_is_survived(texts in prop::collection::vec(".{0,60}", 0..8)) {
        for kind in [ProviderKind::OpenAi, ProviderKind::Anthropic] {
            let texts: Vec<Value> = texts.iter().map(|text| json!(text)).collect();
            let _ = decode(kind, &texts);
        }
    }
}
