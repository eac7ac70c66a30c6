//! What a provider may do wrong, on both wire formats: a typed error, bounded memory, and success after it heals.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod common;

use std::time::{Duration, Instant};

use common::{Answer, FORMATS, Sim, read, request};
use futures::StreamExt;
use reliant_models::{ModelError, Models, ModelsConfig};
use reliant_types::Code;

async fn fail(sim: &Sim, format: &str, query: &str) -> ModelError {
    let model = format!("{format}/fault?{query}");
    sim.ask(&model, "x").await.err().unwrap_or_else(|| panic!("{model} did not fail"))
}

#[tokio::test]
async fn each_fault_has_its_error() {
    let sim = Sim::start().await;
    for format in FORMATS {
        assert_eq!(
            fail(&sim, format, "kind=429&retry_after=7").await,
            ModelError::RateLimited { retry_after: Some(Duration::from_secs(7)) }
        );
        assert!(matches!(fail(&sim, format, "kind=500").await, ModelError::Overloaded { status: 500, .. }));
        assert!(matches!(fail(&sim, format, "kind=529").await, ModelError::Overloaded { status: 529, .. }));
        let rejected = fail(&sim, format, "kind=401").await;
        assert!(matches!(rejected, ModelError::Rejected { status: 401, .. }), "{rejected:?}");
        assert_eq!(rejected.failure().code, Code::ProviderRejected);
        assert_eq!(fail(&sim, format, "kind=cut").await, ModelError::CutStream);
        assert_eq!(fail(&sim, format, "kind=empty").await, ModelError::CutStream);
        for kind in ["malformed", "invalid_utf8", "huge_index", "html"] {
            let error = fail(&sim, format, &format!("kind={kind}")).await;
            assert!(matches!(error, ModelError::Garbage { .. }), "{kind}: {error:?}");
            assert_eq!(error.failure().code, Code::ProviderGarbage);
        }
        let error = fail(&sim, format, "kind=error_event").await;
        assert!(matches!(error, ModelError::Overloaded { .. }), "{error:?}");
        let unknown = sim.ask(&format!("{format}/no-such-script"), "x").await.unwrap_err();
        assert!(matches!(unknown, ModelError::Rejected { status: 404, .. }), "{unknown:?}");
    }
    let nobody = sim.ask("nobody/x", "x").await.unwrap_err();
    assert_eq!(nobody.failure().code, Code::ModelUnknown);
}

#[tokio::test]
async fn silence_is_noticed_and_an_open_stream_is_let_go() {
    let sim = Sim::with(|config| config.stall = Duration::from_millis(600)).await;
    for format in FORMATS {
        for kind in ["stall", "stall_head"] {
            let begun = Instant::now();
            let error = fail(&sim, format, &format!("kind={kind}")).await;
            assert!(matches!(error, ModelError::Stall { .. }), "{error:?}");
            assert!((600..5000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
        }
        // A slow stream is no stall: each piece comes in time, all of them together do not.
        sim.ask(&format!("{format}/text?tokens=10&rate=10"), "x").await.unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while sim.stats.open_streams() > 0 {
        assert!(Instant::now() < deadline, "the server still writes to {}", sim.stats.open_streams());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn an_endless_line_is_bounded() {
    let sim = Sim::start().await;
    for format in FORMATS {
        let mut stream = sim.models.stream(request(&format!("{format}/fault?kind=endless_line"), "x")).await.unwrap();
        let error = loop {
            match stream.next().await.unwrap() {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(matches!(error, ModelError::Garbage { .. }), "{error:?}");
        assert!(stream.next().await.is_none());
    }
}

#[tokio::test]
async fn answers_beyond_the_limits_are_refused() {
    let sim = Sim::start().await;
    for format in FORMATS {
        for model in ["text?tokens=200&piece_bytes=65536", "parallel?n=129"] {
            let error = sim.ask(&format!("{format}/{model}"), "x").await.unwrap_err();
            let refused = matches!(error, ModelError::TooLarge { .. } | ModelError::Garbage { .. });
            assert!(refused, "{format}/{model}: {error:?}");
        }
        assert_eq!(sim.ask(&format!("{format}/parallel?n=128"), "x").await.unwrap().calls().len(), 128);
        let big = format!("{{\"text\":\"{}\"}}", "y".repeat(1100 * 1024));
        let prompt =
            format!("sim: {}", serde_json::json!({ "rounds": [{ "tools": [{ "name": "t", "raw_args": big }] }] }));
        let error = sim.ask(&format!("{format}/default"), &prompt).await.unwrap_err();
        assert!(matches!(error, ModelError::TooLarge { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn what_heals_is_tried_again() {
    let sim = Sim::start().await;
    for format in FORMATS {
        for kind in ["429&retry_after=0", "500&retry_after=0", "empty", "html", "malformed&after=0", "stall_head"] {
            let times = if kind.starts_with("stall") { 1 } else { 2 };
            let model = format!("{format}/fault?kind={kind}&times={times}");
            let before = sim.stats.requests();
            let answer = sim.ask_patiently(&model, &model).await.unwrap_or_else(|error| panic!("{model}: {error}"));
            assert!(!answer.text().is_empty());
            assert_eq!(sim.stats.requests() - before, times + 1, "{model}");
        }
        // The time that is asked for is waited for.
        let begun = Instant::now();
        sim.ask_patiently(&format!("{format}/fault?kind=429&times=1&retry_after=0.3"), format).await.unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn retries_end() {
    let sim = Sim::start().await;
    let (before, begun) = (sim.stats.requests(), Instant::now());
    let error = sim.ask_for(Duration::from_secs(1), "sim/fault?kind=500&retry_after=0", "x").await.unwrap_err();
    assert!(matches!(error, ModelError::Overloaded { .. }), "{error:?}");
    assert!(begun.elapsed() > Duration::from_millis(800), "the deadline ends them, not a number");
    assert!(sim.stats.requests() - before > 4);
    // What is refused for good is not asked again, nor what would come after the deadline.
    for query in ["kind=400", "kind=429&retry_after=3600"] {
        let (before, begun) = (sim.stats.requests(), Instant::now());
        sim.ask_patiently(&format!("sim/fault?{query}"), "x").await.unwrap_err();
        assert_eq!(sim.stats.requests() - before, 1, "{query}");
        assert!(begun.elapsed() < Duration::from_secs(2));
    }
    // After the first event the error is the caller's.
    let before = sim.stats.requests();
    assert_eq!(sim.ask_patiently("sim/fault?kind=cut", "x").await, Err(ModelError::CutStream));
    assert_eq!(sim.stats.requests() - before, 1);
}

#[tokio::test]
async fn a_plan_may_break_too() {
    let sim = Sim::start().await;
    let prompt = r#"sim: {"rounds":[{"text":"fine now","fault":"429","times":1,"retry_after":0}]}"#;
    for format in FORMATS {
        let prompt = format!("{format}\n{prompt}");
        assert_eq!(sim.ask_patiently(&format!("{format}/default"), &prompt).await.unwrap().text(), "fine now");
    }
}

/// Cut at every byte, a short stream gives an error or the whole answer, and its pieces are never wrong.
#[tokio::test]
async fn a_cut_anywhere_is_an_error_or_no_loss() {
    let sim = Sim::start().await;
    for format in FORMATS {
        let prompt =
            r#"sim: {"rounds":[{"thinking":"ü","text":"🦀","tools":[{"name":"shell","args":{"command":"é"}}]}]}"#;
        let whole = sim.ask(&format!("{format}/default"), prompt).await.unwrap();
        let mut cut = 0;
        let mut complete = 0;
        for at in 0.. {
            match sim.ask(&format!("{format}/fault?kind=cut&at={at}"), prompt).await {
                Ok(answer) => {
                    // The usage may be what was cut off.
                    assert_eq!(Answer { usage: None, ..answer }.parts.len(), whole.parts.len(), "at {at}");
                    complete += 1;
                    // Long past the end of the body nothing is cut.
                    if complete > 350 {
                        break;
                    }
                }
                Err(error) => {
                    // Cut before the first byte, not even the response's head may have left.
                    let no_head = at == 0 && matches!(error, ModelError::Connect { .. });
                    assert!(no_head || error == ModelError::CutStream, "at {at}: {error:?}");
                    assert_eq!(complete, 0, "an error at {at} after a complete answer");
                    cut += 1;
                }
            }
        }
        assert!(cut > 500, "{format}: {cut}");
    }
}

#[tokio::test]
async fn a_server_that_is_away_or_no_model_server() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let mut config = ModelsConfig::default().with_sim(&format!("http://{address}/v1"));
    config.providers[0].api_key = "sk-secret-key-1234".into();
    let models = Models::new(config).unwrap();
    let error = models.stream(request("sim/text", "x")).await.err().unwrap();
    assert!(matches!(error, ModelError::Connect { .. }), "{error:?}");
    let shown = format!("{error} {error:?} {}", error.failure());
    assert!(!shown.contains("sk-secret") && shown.contains("refused"), "{shown}");

    // A path that is not there: the simulator's own 404 has no JSON body.
    let sim = Sim::start().await;
    let wrong = Models::new(ModelsConfig::default().with_sim(&format!("{}/nope", sim.base_url))).unwrap();
    let error = read(match wrong.stream(request("sim/text", "x")).await {
        Ok(stream) => stream,
        Err(error) => return assert!(matches!(error, ModelError::Rejected { status: 404, .. }), "{error:?}"),
    })
    .await;
    panic!("{error:?}");
}
