//! Turns: looked at, and cancelled. A cancel goes two ways at once: through Postgres and a wake, which is certain, and
//! straight to the producer and the daemons, which is fast.

use std::{sync::Arc, time::Duration};

use futures::StreamExt as _;
use reliant_bus::{Bus, ToolSubject};
use reliant_middleware::Principal;
use reliant_rpc::turn_service_server::TurnService;
use reliant_store::{CancelCall, CancelOutcome};
use reliant_telemetry::{TraceContext, chain, hop_span};
use reliant_types::{Failure, TurnId, pb};

use crate::app::{self, App, refused, service};

/// A daemon that does not answer hears it again from a worker.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(3);
const CANCELS_AT_ONCE: usize = 16;
const PAGE_SIZE_MAX: i32 = 500;

pub struct Turns(pub Arc<App>);

service!(TurnService for Turns {
    get_turn(GetTurnRequest) -> GetTurnResponse = get;
    cancel_turn(CancelTurnRequest) -> CancelTurnResponse = cancel;
});

impl Turns {
    async fn get(&self, caller: Principal, request: pb::GetTurnRequest) -> Result<pb::GetTurnResponse, Failure> {
        let turn = app::id::<TurnId>("turn_id", &request.turn_id)?;
        let size = app::page_size(request.page_size, PAGE_SIZE_MAX)?;
        let page = self.0.deps.store.get_turn_page(caller.user, turn, size, &request.page_token).await;
        let (turn, tool_calls, next_page_token) = page.map_err(refused)?;
        Ok(pb::GetTurnResponse { turn: Some(turn), tool_calls, next_page_token })
    }

    async fn cancel(
        &self,
        caller: Principal,
        request: pb::CancelTurnRequest,
    ) -> Result<pb::CancelTurnResponse, Failure> {
        let turn = app::id::<TurnId>("turn_id", &request.turn_id)?;
        let committed = self.0.deps.store.request_cancel(caller.user, turn).await.map_err(refused)?;
        let CancelOutcome { turn, producer, calls } = self.0.effects.after(committed);
        if producer.is_some() || !calls.is_empty() {
            let trace = hop_span(tracing::info_span!("turn.cancel", turn.id = %turn.id));
            let (app, turn_id, chat_id) = (self.0.clone(), turn.id.clone(), turn.chat_id.clone());
            self.0.effects.spawn("cancel", async move {
                if let Some(producer) = producer {
                    let hint = pb::BurstHint { chat_id, cancelled_turn_id: turn_id };
                    if let Err(error) = app.effects.bus().hint_burst(producer, &hint, &trace).await {
                        tracing::debug!(error = %chain(&error), "a producer was not told of a cancel; its next write will tell it");
                    }
                }
                let cancels = calls.into_iter().map(|call| cancel_call(&app, &trace, call));
                futures::stream::iter(cancels).buffer_unordered(CANCELS_AT_ONCE).collect::<()>().await;
            });
        }
        Ok(pb::CancelTurnResponse { turn: Some(turn) })
    }
}

async fn cancel_call(app: &App, trace: &TraceContext, call: CancelCall) {
    let cancel = pb::CancelCall { call_id: call.call.to_string(), generation: call.generation };
    let request = pb::ToolRequest { request: Some(pb::tool_request::Request::Cancel(cancel)) };
    let subject = ToolSubject { daemon: call.daemon };
    let trace = Bus::context_of_request::<ToolSubject>(trace, &TraceContext::default());
    let reply = match app.effects.bus().request_with(&trace, &subject, &request, CANCEL_TIMEOUT).await {
        Ok(pb::ToolReply { reply: Some(pb::tool_reply::Reply::Cancel(reply)) }) => reply,
        Ok(_) => return,
        Err(error) => {
            tracing::debug!(error = %chain(&error), tool.call_id = %call.call, "a daemon was not told of a cancel; a worker tells it again");
            return;
        }
    };
    match app.deps.store.cancel_replied(call.call, call.generation, &reply).await {
        Ok(committed) => app.effects.after(committed),
        Err(error) => drop(refused(error)),
    }
}
