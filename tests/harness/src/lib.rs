//! Real servers and real role processes for tests: private Postgres, NATS and Temporal, the `reliant` binary, port 0,
//! and a database of its own for each mesh. Nothing here is a stand-in but the model provider (`reliant model-sim`).

mod arena;
mod fault;
mod link;
mod observer;
mod proxy;
mod rig;
mod sink;
mod swarm;
mod wait;

pub use arena::{Arena, ArenaOptions, Claim, Collapse, Host, Node, Supervised, Visitor};
pub use fault::{Fault, Strike};
pub use link::{Layer, Link, Peer};
pub use observer::{CallLook, Hold, LeaseLook, LogLook, Observer, StoredMessage, TurnLook, UnseenChat};
pub use proxy::{Network, Proxy};
pub use rig::{DaemonOptions, Person, Rig, RigOptions, TestDaemon, binary as reliant_binary, init, tools_dir};
pub use sink::{Sink, sink};
pub use swarm::{Light, Refusals, Swarm};
pub use wait::{eventually, within};
