//! One way between two processes, and the faults that lie on it. Faults of both ends may lie on it at once; the worst
//! counts.

use reliant_types::boxed;
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use parking_lot::Mutex;
use reliant_devstack::Server;

use crate::{Network, Proxy};

/// An end of a way.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Peer {
    Role(String),
    Server(Server),
    /// Who answers model calls; not ours.
    Provider,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Role(name) => f.write_str(name),
            Peer::Server(server) => server.fmt(f),
            Peer::Provider => f.write_str("provider"),
        }
    }
}

#[derive(Debug)]
pub struct Link {
    pub from: Peer,
    pub to: Peer,
    pub proxy: Proxy,
    layers: Mutex<HashMap<u64, Network>>,
}

/// A fault on a way; gone with this value.
#[derive(Debug)]
pub struct Layer {
    link: std::sync::Arc<Link>,
    id: u64,
}

static LAYERS: AtomicU64 = AtomicU64::new(0);

impl Link {
    #[boxed]
    pub async fn start(from: Peer, to: Peer, target: SocketAddr) -> std::io::Result<Self> {
        Ok(Self { from, to, proxy: Proxy::start(vec![target]).await?, layers: Mutex::default() })
    }

    /// A way whose end is told later, by its proxy.
    #[boxed]
    pub async fn to_nobody(from: Peer, to: Peer) -> std::io::Result<Self> {
        Ok(Self { from, to, proxy: Proxy::start(Vec::new()).await?, layers: Mutex::default() })
    }

    pub fn touches(&self, peer: &Peer) -> bool {
        self.from == *peer || self.to == *peer
    }

    /// Lays a fault on the way.
    pub fn lay(self: &std::sync::Arc<Self>, network: Network) -> Layer {
        let id = LAYERS.fetch_add(1, Ordering::Relaxed);
        let mut layers = self.layers.lock();
        layers.insert(id, network);
        self.apply(&layers);
        Layer { link: self.clone(), id }
    }

    fn apply(&self, layers: &HashMap<u64, Network>) {
        let worst = layers.values().copied().max_by_key(severity).unwrap_or(Network::Forward);
        if worst != self.proxy.network() {
            self.proxy.set(worst);
        }
    }
}

fn severity(network: &Network) -> u128 {
    match network {
        Network::Forward => 0,
        Network::Slow(delay) => 1 + delay.as_micros(),
        Network::Silent => u128::MAX - 1,
        Network::Cut => u128::MAX,
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        let mut layers = self.link.layers.lock();
        layers.remove(&self.id);
        self.link.apply(&layers);
    }
}
