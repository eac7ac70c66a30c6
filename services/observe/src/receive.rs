//! OTLP over gRPC: traces and logs. What cannot be kept is counted and answered as taken: a sender must not repeat it.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::{
            ExportLogsServiceRequest, ExportLogsServiceResponse,
            logs_service_server::{LogsService, LogsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    resource::v1::Resource,
};
use reliant_types::limits;
use serde_json::Value;
use tonic::{Request, Response, Status, service::Routes};

use crate::{model, store::Store};

struct Receiver(Store);

pub(crate) fn routes(store: Store) -> Routes {
    Routes::new(
        TraceServiceServer::new(Receiver(store.clone())).max_decoding_message_size(limits::GRPC_MESSAGE_MAX_BYTES),
    )
    .add_service(LogsServiceServer::new(Receiver(store)).max_decoding_message_size(limits::GRPC_MESSAGE_MAX_BYTES))
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let (service, instance) = who(resource.resource);
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            self.0.add_spans(spans.map(|span| model::span(span, &service, &instance)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Receiver {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        for resource in request.into_inner().resource_logs {
            let (service, _) = who(resource.resource);
            let logs = resource.scope_logs.into_iter().flat_map(|scope| scope.log_records);
            self.0.add_logs(logs.filter_map(|log| model::log(log, &service)));
        }
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}

/// `service.name` and `service.instance.id`.
fn who(resource: Option<Resource>) -> (String, String) {
    let mut attributes: BTreeMap<String, Value> = model::attributes(resource.unwrap_or_default().attributes);
    let mut take = |key| match attributes.remove(key) {
        Some(Value::String(text)) => text,
        _ => String::new(),
    };
    (take("service.name"), take("service.instance.id"))
}
