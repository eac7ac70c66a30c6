//! Tower layers that every gRPC front of reliant stands behind, and who its caller is.
//!
//! From the outside in: trace context, metrics, access log, catch panic, load shed, timeout (unary only), the
//! deadline of a stream's request, auth, rate limit, handler ([`stack`]). A layer that refuses a call answers with a gRPC status in a trailers-only response, with
//! details, and never with an error of the transport: clients and browsers read the reason. A stream is measured and
//! counted until its body ends or is dropped, not until its headers are out.

pub mod access_log;
mod attempts;
pub mod auth;
pub mod body_deadline;
pub mod catch_panic;
mod ed25519;
pub mod identity;
pub mod jwt;
pub mod load_shed;
pub mod methods;
pub mod metrics;
mod observe;
pub mod principal;
pub mod rate_limit;
pub mod reply;
pub mod stack;
pub mod timeout;
mod token_source;
pub mod trace;

pub use attempts::AttemptLimits;
pub use auth::{AuthLayer, Authenticator, PublicMethods};
pub use identity::{AuthConfig, StoreAuthenticator};
pub use jwt::{Claims, Jwt, JwtError};
pub use methods::Methods;
pub use principal::{Principal, PrincipalKind, person, principal, require_daemon, require_person};
pub use rate_limit::RateLimitConfig;
pub use stack::{PUBLIC_STREAMS_MAX, StackConfig, StackLayer, stack};
