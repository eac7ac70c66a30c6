//! The web page, embedded into the binary. It is public: it holds no data, and signs in before it shows any.

use std::borrow::Cow;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use rust_embed::RustEmbed;
use tonic::body::Body;

#[derive(RustEmbed)]
#[folder = "../web/dist"]
struct Pages;

/// Nothing from elsewhere, nothing inline; data only from the api that served the page.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
     font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

const HEADERS: &[(&str, &str)] = &[
    ("content-security-policy", CONTENT_SECURITY_POLICY),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("permissions-policy", "camera=(), geolocation=(), microphone=()"),
    // Asked for again each time, and answered with 304 while the binary is the same.
    ("cache-control", "no-cache"),
];

/// Answers anything that is not gRPC.
pub fn serve<B>(request: &Request<B>) -> Response<Body> {
    let head = match *request.method() {
        Method::GET => false,
        Method::HEAD => true,
        _ => {
            return plain(
                StatusCode::METHOD_NOT_ALLOWED,
                "This address takes GET. The api speaks gRPC and gRPC-web.\n",
            );
        }
    };
    let path = match request.uri().path().trim_start_matches('/') {
        "" => "index.html",
        path => path,
    };
    let Some(file) = Pages::get(path) else {
        return plain(
            StatusCode::NOT_FOUND,
            "There is no such page. The api speaks gRPC and gRPC-web; the web page is at /.\n",
        );
    };
    let tag = format!("\"{}\"", hex(&file.metadata.sha256_hash()[..16]));
    let known = request.headers().get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    let mut response =
        if known.is_some_and(|known| known.split(',').any(|known| known.trim().trim_start_matches("W/") == tag)) {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            response
        } else {
            let content = match file.data {
                Cow::Borrowed(bytes) => Bytes::from_static(bytes),
                Cow::Owned(bytes) => Bytes::from(bytes),
            };
            let length = HeaderValue::from(content.len());
            let mut response = Response::new(if head { Body::empty() } else { body(content) });
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type(path)));
            response.headers_mut().insert(header::CONTENT_LENGTH, length);
            response
        };
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    secure(&mut response);
    response
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(body(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    secure(&mut response);
    response
}

fn secure(response: &mut Response<Body>) {
    for (name, value) in HEADERS {
        response.headers_mut().insert(*name, HeaderValue::from_static(value));
    }
}

fn body(content: Bytes) -> Body {
    Body::new(http_body_util::Full::new(content))
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit_once('.').map(|(_, extension)| extension) {
        Some("html") => "text/html; charset=utf-8",
        Some("js" | "mjs") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("json" | "map") => "application/json",
        Some("webmanifest") => "application/manifest+json",
        Some("svg") => "image/svg+xml",
        Some("png") => "image/png",
        Some("ico") => "image/x-icon",
        Some("woff2") => "font/woff2",
        Some("txt") => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(method: &str, path: &str, tag: Option<&HeaderValue>) -> Response<Body> {
        let mut request = Request::builder().method(method).uri(path).body(()).unwrap();
        if let Some(tag) = tag {
            request.headers_mut().insert(header::IF_NONE_MATCH, tag.clone());
        }
        serve(&request)
    }

    #[test]
    fn the_page_is_served_with_its_headers_and_then_known() {
        for path in ["/", "/index.html"] {
            let page = get("GET", path, None);
            assert_eq!(page.status(), StatusCode::OK);
            assert_eq!(page.headers()[header::CONTENT_TYPE], "text/html; charset=utf-8");
            for (name, value) in HEADERS {
                assert_eq!(page.headers()[*name], *value);
            }
            let again = get("GET", path, Some(&page.headers()[header::ETAG]));
            assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
        }
    }

    #[test]
    fn only_embedded_files_are_served() {
        for path in ["/nope", "/../Cargo.toml", "/%2e%2e/Cargo.toml", "//etc/passwd", "/index.html/"] {
            assert_eq!(get("GET", path, None).status(), StatusCode::NOT_FOUND, "{path}");
        }
        assert_eq!(get("POST", "/", None).status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(get("HEAD", "/", None).status(), StatusCode::OK);
    }
}
