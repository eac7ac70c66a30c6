//! The span and the metrics of one model call. They settle when the stream is dropped, so that a call that nobody
//! finished is counted as cancelled.

use std::time::Instant;

use reliant_telemetry::{
    metrics::{MODEL_COST, MODEL_DURATION, MODEL_FIRST_TOKEN, MODEL_STOPS, MODEL_TOKENS},
    names::attr,
    trace::record_list,
};
use reliant_types::pb;
use tracing::{Span, field::Empty};

use crate::{ModelError, ModelEvent, ResolvedModel};

pub struct Call {
    pub span: Span,
    provider: String,
    model: String,
    start: Instant,
    first: bool,
    outcome: &'static str,
}

impl Call {
    pub fn start(model: &ResolvedModel, address: &str) -> Self {
        let span = tracing::info_span!(
            "chat",
            otel.name = format!("chat {}", model.label()),
            otel.kind = "client",
            otel.status_code = Empty,
            { attr::GEN_AI_OPERATION } = "chat",
            { attr::GEN_AI_PROVIDER } = model.provider,
            { attr::GEN_AI_MODEL } = model.name,
            { attr::SERVER_ADDRESS } = address,
            { attr::GEN_AI_INPUT_TOKENS } = Empty,
            { attr::GEN_AI_OUTPUT_TOKENS } = Empty,
            { attr::GEN_AI_CACHE_READ_TOKENS } = Empty,
            { attr::GEN_AI_FIRST_CHUNK } = Empty,
            { attr::ERROR_TYPE } = Empty,
        );
        Self {
            span,
            provider: model.provider.clone(),
            model: model.label().to_owned(),
            start: Instant::now(),
            first: true,
            outcome: "cancelled",
        }
    }

    pub fn event(&mut self, event: &ModelEvent) {
        let labels = [self.provider.as_str(), self.model.as_str()];
        match event {
            ModelEvent::Usage(usage) => {
                self.span.record(attr::GEN_AI_INPUT_TOKENS, usage.input_tokens);
                self.span.record(attr::GEN_AI_OUTPUT_TOKENS, usage.output_tokens);
                self.span.record(attr::GEN_AI_CACHE_READ_TOKENS, usage.cache_read_tokens);
                let kinds = [
                    ("input", usage.input_tokens),
                    ("output", usage.output_tokens),
                    ("cache_read", usage.cache_read_tokens),
                    ("cache_write", usage.cache_write_tokens),
                    ("reasoning", usage.reasoning_tokens),
                ];
                for (kind, tokens) in kinds {
                    if tokens > 0 {
                        MODEL_TOKENS.with_label_values(&[labels[0], labels[1], kind]).inc_by(tokens as u64);
                    }
                }
                if usage.cost_microusd > 0 {
                    MODEL_COST.with_label_values(&labels).inc_by(usage.cost_microusd as u64);
                }
            }
            ModelEvent::Stop(reason) => {
                self.outcome = "ok";
                let reason = match reason {
                    pb::StopReason::Unspecified => "unspecified",
                    pb::StopReason::EndTurn => "end_turn",
                    pb::StopReason::ToolUse => "tool_use",
                    pb::StopReason::MaxTokens => "max_tokens",
                    pb::StopReason::ContentFilter => "content_filter",
                };
                record_list(&self.span, attr::GEN_AI_FINISH_REASONS, &[reason]);
                MODEL_STOPS.with_label_values(&[labels[0], labels[1], reason]).inc();
            }
            _ if std::mem::take(&mut self.first) => {
                let seconds = self.start.elapsed().as_secs_f64();
                self.span.record(attr::GEN_AI_FIRST_CHUNK, seconds);
                MODEL_FIRST_TOKEN.with_label_values(&labels).observe(seconds);
            }
            _ => {}
        }
    }

    pub fn error(&mut self, error: &ModelError) {
        self.outcome = "failed";
        self.span.record(attr::ERROR_TYPE, error.reason());
        self.span.record("otel.status_code", "ERROR");
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        MODEL_DURATION
            .with_label_values(&[&self.provider, &self.model, self.outcome])
            .observe(self.start.elapsed().as_secs_f64());
    }
}
