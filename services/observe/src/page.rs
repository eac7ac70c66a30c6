//! The page and what it asks for. Everything comes from this process; nothing is loaded from elsewhere.

use axum::{
    Json, Router,
    extract::{Path, Query, Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::{Deserialize, Serialize};

use crate::{
    model::Log,
    store::{Store, Summary},
    tree::{self, Node},
};

const LIST_MAX: usize = 200;
const HEADERS: &[(HeaderName, &str)] = &[
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-store"),
];

pub(crate) fn router(store: Store) -> Router {
    let file =
        |kind: &'static str, text: &'static str| get(move || async move { ([(header::CONTENT_TYPE, kind)], text) });
    Router::new()
        .route("/", file("text/html; charset=utf-8", include_str!("../page/index.html")))
        .route("/page.js", file("text/javascript; charset=utf-8", include_str!("../page/page.js")))
        .route("/page.css", file("text/css; charset=utf-8", include_str!("../page/page.css")))
        .route("/api/status", get(|State(store): State<Store>| async move { Json(store.status()) }))
        .route("/api/traces", get(list))
        .route("/api/traces/{id}", get(one))
        .route("/api/traces/{id}/text", get(text))
        .layer(middleware::from_fn(guarded))
        .with_state(store)
}

/// Another site's page in this person's browser must not read traces by a name that it points at this machine.
async fn guarded(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let host = host.or_else(|| request.uri().authority().map(|authority| authority.as_str())).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let mut response = if matches!(name, "127.0.0.1" | "localhost" | "[::1]") {
        next.run(request).await
    } else {
        (StatusCode::FORBIDDEN, "open this page by 127.0.0.1 or localhost").into_response()
    };
    for (name, value) in HEADERS {
        response.headers_mut().insert(name.clone(), HeaderValue::from_static(value));
    }
    response
}

#[derive(Deserialize)]
struct Asked {
    /// The beginning of a trace id or of a chat id.
    #[serde(default)]
    search: String,
    /// Traces without a turn, too.
    #[serde(default)]
    all: bool,
}

async fn list(State(store): State<Store>, Query(asked): Query<Asked>) -> Json<Vec<Summary>> {
    Json(store.list(&asked.search.trim().to_ascii_lowercase(), !asked.all, LIST_MAX))
}

#[derive(Serialize)]
struct Trace {
    trace_id: String,
    spans: Vec<Node>,
    logs: Vec<Log>,
    /// Seconds.
    phases: Vec<(&'static str, f64)>,
}

async fn one(State(store): State<Store>, Path(id): Path<String>) -> Response {
    let Some(trace_id) = store.find(&id.to_ascii_lowercase()) else { return not_here() };
    let spans = store.spans(&trace_id);
    let (nodes, phases) = (tree::nodes(&spans), tree::phases(&spans));
    Json(Trace { spans: nodes, logs: store.logs(&trace_id), phases, trace_id }).into_response()
}

/// For a terminal: a long trace whole, at a tenth of its bytes.
#[derive(Serialize)]
struct Text {
    trace_id: String,
    text: String,
}

async fn text(State(store): State<Store>, Path(id): Path<String>) -> Response {
    let Some(trace_id) = store.find(&id.to_ascii_lowercase()) else { return not_here() };
    Json(Text { text: tree::text(&store.spans(&trace_id)), trace_id }).into_response()
}

fn not_here() -> Response {
    (StatusCode::NOT_FOUND, "this trace is not here, or its beginning fits several").into_response()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use reliant_telemetry::metrics::Phase;

    /// The entries of a constant of the page: names, and colours.
    fn colours(constant: &str) -> Vec<(&'static str, &'static str)> {
        let script = include_str!("../page/page.js");
        let begin = format!("const {constant} = {{");
        let rest = script.split_once(&begin).expect("the page has this constant").1;
        let entries = rest.split_once('}').expect("it ends").0.split(',').filter_map(|entry| entry.split_once(':'));
        entries.map(|(name, colour)| (name.trim().trim_matches('"'), colour.trim().trim_matches('"'))).collect()
    }

    #[track_caller]
    fn is_told_apart(constant: &str, name: &str) {
        let all = colours(constant);
        let own = all.iter().find(|(of, _)| *of == name);
        let (_, own) = own.unwrap_or_else(|| panic!("'{name}' is not in {constant} of page.js"));
        let alike: Vec<_> = all.iter().filter(|(_, colour)| colour == own).collect();
        assert_eq!(alike.len(), 1, "one colour for {alike:?}");
    }

    #[test]
    fn every_phase_has_a_colour_of_its_own() {
        for phase in Phase::ALL {
            is_told_apart("PHASES", phase.as_str());
        }
    }

    #[test]
    fn every_role_has_a_colour_of_its_own() {
        let services = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("services");
        let roles = std::fs::read_dir(services)
            .expect("services can be read")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"));
        // The command line is a client to a trace, and this receiver sends no span of its own.
        let roles = roles.filter(|role| role != "cli" && role != "observe");
        for role in roles.chain(["client".to_owned()]) {
            is_told_apart("ROLES", &role);
        }
    }
}
