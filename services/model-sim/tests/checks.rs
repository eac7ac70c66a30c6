//! Requests that the real providers refuse are refused, in the provider's own form of an error.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use common::Sim;
use serde_json::{Value, json};

async fn post(sim: &Sim, path: &str, body: &Value) -> (u16, Value) {
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let request = client.post(format!("{}{path}", sim.base_url)).header("anthropic-version", "2023-06-01");
    let response = request.body(body.to_string()).send().await.unwrap();
    let status = response.status().as_u16();
    (status, serde_json::from_slice(&response.bytes().await.unwrap()).unwrap())
}

fn call(id: &str) -> Value {
    json!({ "id": id, "type": "function", "function": { "name": "shell", "arguments": "{}" } })
}

fn tool_use(id: &str) -> Value {
    json!({ "type": "tool_use", "id": id, "name": "shell", "input": {} })
}

#[tokio::test]
async fn openai_refuses() {
    let sim = Sim::start().await;
    let user = json!({ "role": "user", "content": "x" });
    let asks = |calls: Value| json!({ "role": "assistant", "content": null, "tool_calls": calls });
    let result = |id: &str| json!({ "role": "tool", "tool_call_id": id, "content": "ok" });
    let bad: [(&str, Value); 12] = [
        ("no messages", json!([])),
        ("a call without result", json!([user, asks(json!([call("a")]))])),
        ("one of two results", json!([user, asks(json!([call("a"), call("b")])), result("a"), user])),
        ("a result without call", json!([user, result("a")])),
        ("a result twice", json!([user, asks(json!([call("a")])), result("a"), result("a")])),
        ("a result too late", json!([user, asks(json!([call("a")])), user, result("a")])),
        ("two calls with one id", json!([user, asks(json!([call("a"), call("a")])), result("a"), result("a")])),
        ("no calls in the list", json!([user, asks(json!([]))])),
        ("an empty assistant message", json!([user, { "role": "assistant", "content": null }])),
        ("an unknown role", json!([{ "role": "narrator", "content": "x" }])),
        ("no content", json!([{ "role": "user" }])),
        (
            "arguments that are no object",
            json!([
                user,
                asks(json!([{ "id": "a", "type": "function", "function": { "name": "s", "arguments": "{" } }])),
                result("a")
            ]),
        ),
    ];
    for (name, messages) in bad {
        let (status, body) = post(&sim, "/chat/completions", &json!({ "model": "echo", "messages": messages })).await;
        assert_eq!(status, 400, "{name}: {body}");
        assert_eq!(body["error"]["type"], "invalid_request_error", "{name}");
        assert!(body["error"]["message"].as_str().is_some_and(|text| !text.is_empty()), "{name}");
    }
    let tool =
        |name: &str| json!([{ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } }]);
    for tools in [json!([]), tool("has space"), tool(&"x".repeat(65)), json!([tool("a")[0], tool("a")[0]])] {
        let body = json!({ "model": "echo", "messages": [user], "tools": tools });
        assert_eq!(post(&sim, "/chat/completions", &body).await.0, 400, "{tools}");
    }
    let good = json!([user, asks(json!([call("a"), call("b")])), result("b"), result("a"), user]);
    let body = json!({ "model": "echo", "messages": good, "tools": tool("mcp__a__b-c") });
    assert_eq!(post(&sim, "/chat/completions", &body).await.0, 200);
}

#[tokio::test]
async fn anthropic_refuses() {
    let sim = Sim::start().await;
    let user = json!({ "role": "user", "content": "x" });
    let asks = |blocks: Value| json!({ "role": "assistant", "content": blocks });
    let result = |id: &str| json!({ "type": "tool_result", "tool_use_id": id, "content": "ok" });
    let results = |blocks: Value| json!({ "role": "user", "content": blocks });
    let text = json!({ "type": "text", "text": "x" });
    let bad: [(&str, Value); 10] = [
        ("no messages", json!([])),
        ("begins with the assistant", json!([asks(json!([text]))])),
        ("a call without result", json!([user, asks(json!([tool_use("a")]))])),
        (
            "one of two results",
            json!([user, asks(json!([tool_use("a"), tool_use("b")])), results(json!([result("a")]))]),
        ),
        ("a result without call", json!([results(json!([result("a")]))])),
        ("a text before the result", json!([user, asks(json!([tool_use("a")])), results(json!([text, result("a")]))])),
        ("an empty text", json!([{ "role": "user", "content": "" }])),
        (
            "two calls with one id",
            json!([user, asks(json!([tool_use("a"), tool_use("a")])), results(json!([result("a")]))]),
        ),
        (
            "a foreign signature",
            json!([user, asks(json!([{ "type": "thinking", "thinking": "x", "signature": "y" }, text])), user]),
        ),
        (
            "an input that is no object",
            json!([
                user,
                asks(json!([{ "type": "tool_use", "id": "a", "name": "s", "input": "{}" }])),
                results(json!([result("a")]))
            ]),
        ),
    ];
    for (name, messages) in bad {
        let body = json!({ "model": "echo", "max_tokens": 10, "messages": messages });
        let (status, body) = post(&sim, "/messages", &body).await;
        assert_eq!(status, 400, "{name}: {body}");
        assert_eq!(
            (&body["type"], &body["error"]["type"]),
            (&json!("error"), &json!("invalid_request_error")),
            "{name}"
        );
    }
    assert_eq!(post(&sim, "/messages", &json!({ "model": "echo", "messages": [user] })).await.0, 400, "no max_tokens");
    let mark = json!({ "type": "text", "text": "x", "cache_control": { "type": "ephemeral" } });
    let marked =
        json!({ "model": "echo", "max_tokens": 1, "messages": [results(json!([mark, mark, mark, mark, mark]))] });
    assert_eq!(post(&sim, "/messages", &marked).await.0, 400, "five cache marks");
    let good = json!([user, asks(json!([text, tool_use("a")])), results(json!([result("a"), text]))]);
    let body = json!({ "model": "echo", "max_tokens": 10, "messages": good });
    assert_eq!(post(&sim, "/messages", &body).await.0, 200);
}

#[tokio::test]
async fn nonsense_is_refused_and_plans_are_checked() {
    let sim = Sim::start().await;
    for path in ["/chat/completions", "/messages"] {
        for body in [json!(null), json!([]), json!({}), json!({ "model": 7 }), json!("x")] {
            assert_eq!(post(&sim, path, &body).await.0, 400, "{path} {body}");
        }
        let bad = json!({ "model": "default", "max_tokens": 1, "messages": [{ "role": "user", "content": "sim: {\"round\":1}" }] });
        let (status, body) = post(&sim, path, &bad).await;
        assert!(status == 400 && body["error"]["message"].as_str().unwrap().contains("no plan"), "{body}");
    }
}
