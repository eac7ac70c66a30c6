//! A TCP proxy that can be told to misbehave: the network between two processes, as a test wants it.
//!
//! A connection that lived through [`Network::Silent`] stays silent for ever, as one whose place in a router's table was
//! lost: bytes were swallowed, so it could never be right again. Both its ends must find that out by themselves.

use reliant_types::boxed;
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

/// What the network does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    Forward,
    /// Connections are torn down, new ones are closed at once.
    Cut,
    /// Half-open: both ends may send, nothing arrives, nothing is closed.
    Silent,
    /// What is sent arrives this much later.
    Slow(Duration),
}

/// Bytes read at one time, and one chunk of a delayed stream.
const CHUNK_BYTES: usize = 16 * 1024;
/// Chunks under way in a slow direction; past that the sender feels it.
const UNDER_WAY_MAX: usize = 1024;
const CONNECT_PATIENCE: Duration = Duration::from_secs(3);

/// Listens on 127.0.0.1 and forwards to one of its targets: the next one that takes the connection.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    targets: Mutex<Vec<SocketAddr>>,
    turn: AtomicUsize,
    network: watch::Sender<Network>,
    /// Counts [`Network::Silent`] phases: a connection older than one is silent for good.
    silences: AtomicU64,
    /// Local ports of connections to targets, and which target.
    ports: Mutex<HashMap<u16, usize>>,
    last: AtomicUsize,
}

impl Proxy {
    /// The targets may be set later; until then connections are closed.
    #[boxed]
    pub async fn start(targets: Vec<SocketAddr>) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            targets: Mutex::new(targets),
            turn: AtomicUsize::new(0),
            network: watch::Sender::new(Network::Forward),
            silences: AtomicU64::new(0),
            ports: Mutex::default(),
            last: AtomicUsize::new(0),
        });
        let accepting = shared.clone();
        let listening = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((client, _)) => drop(tokio::spawn(serve(client, accepting.clone()))),
                    // Out of descriptors, for example: the next one may fit again.
                    Err(_) => sleep(Duration::from_millis(10)).await,
                }
            }
        });
        Ok(Self { address, shared, listening })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn target(&self, targets: Vec<SocketAddr>) {
        *self.shared.targets.lock() = targets;
    }

    pub fn set(&self, network: Network) {
        if network == Network::Silent {
            self.shared.silences.fetch_add(1, Ordering::SeqCst);
        }
        self.shared.network.send_replace(network);
    }

    pub fn network(&self) -> Network {
        *self.shared.network.borrow()
    }

    /// Whether a connection to a target has this local port: who a server's peer is.
    pub fn owns_port(&self, port: u16) -> bool {
        self.shared.ports.lock().contains_key(&port)
    }

    /// The place of the target that the newest connection went to.
    pub fn last_target(&self) -> usize {
        self.shared.last.load(Ordering::Relaxed)
    }

    /// Connections under way.
    pub fn connections(&self) -> usize {
        self.shared.ports.lock().len()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listening.abort();
        self.shared.network.send_replace(Network::Cut);
    }
}

async fn serve(client: TcpStream, shared: Arc<Shared>) {
    let mut network = shared.network.subscribe();
    let silences = shared.silences.load(Ordering::SeqCst);
    let born = *network.borrow_and_update();
    match born {
        Network::Cut => return,
        // The handshake itself is lost: for the caller that is a connection that says nothing.
        Network::Silent => return swallow(client, network).await,
        Network::Forward | Network::Slow(_) => {}
    }
    let Some((server, target)) = connect(&shared).await else { return };
    let Ok(port) = server.local_addr().map(|address| address.port()) else { return };
    shared.ports.lock().insert(port, target);
    shared.last.store(target, Ordering::Relaxed);
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let link = |from, to| pump(from, to, shared.clone(), silences);
    let both = async { tokio::join!(link(from_client, to_server), link(from_server, to_client)) };
    tokio::select! {
        _ = both => {}
        // Dropping both sockets ends the connection for both.
        _ = network.wait_for(|now| *now == Network::Cut) => {}
    }
    shared.ports.lock().remove(&port);
}

async fn connect(shared: &Shared) -> Option<(TcpStream, usize)> {
    let targets = shared.targets.lock().clone();
    let first = shared.turn.fetch_add(1, Ordering::Relaxed);
    for place in 0..targets.len() {
        let target = (first + place) % targets.len();
        let connected = tokio::time::timeout(CONNECT_PATIENCE, TcpStream::connect(targets[target])).await;
        if let Ok(Ok(stream)) = connected {
            return Some((stream, target));
        }
    }
    None
}

/// Takes what comes, for ever; the other side hears nothing.
async fn swallow(client: TcpStream, mut network: watch::Receiver<Network>) {
    let (mut from, _to) = client.into_split();
    let mut waste = vec![0; CHUNK_BYTES];
    let reading = async { while from.read(&mut waste).await.is_ok_and(|bytes| bytes > 0) {} };
    tokio::select! {
        () = reading => {}
        _ = network.wait_for(|now| *now == Network::Cut) => {}
    }
}

/// One direction. It reads as fast as it can and writes each chunk when it is due.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: Arc<Shared>, silences: u64) {
    let (sender, mut chunks) = tokio::sync::mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY_MAX);
    let is_silent = || shared.silences.load(Ordering::SeqCst) != silences;
    let writing = async {
        while let Some((due, chunk)) = chunks.recv().await {
            sleep_until(due).await;
            if is_silent() {
                continue;
            }
            if to.write_all(&chunk).await.is_err() {
                break;
            }
        }
        if !is_silent() {
            let _ = to.shutdown().await;
        } else {
            // The end of a connection is not heard either.
            std::future::pending::<()>().await;
        }
    };
    let network = shared.network.subscribe();
    let reading = async move {
        let mut buffer = vec![0; CHUNK_BYTES];
        while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
            let delay = match *network.borrow() {
                Network::Slow(delay) => delay,
                _ => Duration::ZERO,
            };
            if sender.send((Instant::now() + delay, buffer[..bytes].to_vec())).await.is_err() {
                break;
            }
        }
    };
    tokio::join!(writing, reading);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::within;

    const PATIENCE: Duration = Duration::from_secs(5);

    /// Sends back what it gets.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        address
    }

    async fn say(stream: &mut TcpStream, word: &[u8]) -> std::io::Result<Vec<u8>> {
        stream.write_all(word).await?;
        let mut heard = vec![0; word.len()];
        stream.read_exact(&mut heard).await?;
        Ok(heard)
    }

    #[tokio::test]
    async fn forwards_cuts_and_comes_back() {
        let proxy = Proxy::start(vec![echo().await]).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(say(&mut stream, b"one").await.unwrap(), b"one");
        assert_eq!(proxy.connections(), 1);
        proxy.set(Network::Cut);
        assert!(within("the cut", PATIENCE, say(&mut stream, b"two")).await.unwrap().is_err());
        let mut refused = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(within("the refusal", PATIENCE, say(&mut refused, b"three")).await.unwrap().is_err());
        proxy.set(Network::Forward);
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(say(&mut stream, b"four").await.unwrap(), b"four");
    }

    #[tokio::test]
    async fn a_silenced_connection_stays_silent_and_a_new_one_does_not() {
        let proxy = Proxy::start(vec![echo().await]).await.unwrap();
        let mut old = TcpStream::connect(proxy.address()).await.unwrap();
        say(&mut old, b"one").await.unwrap();
        proxy.set(Network::Silent);
        proxy.set(Network::Forward);
        let mut new = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(say(&mut new, b"two").await.unwrap(), b"two");
        let silence = tokio::time::timeout(Duration::from_millis(200), say(&mut old, b"three")).await;
        assert!(silence.is_err(), "{silence:?}");
    }

    #[tokio::test]
    async fn slow_delays_and_keeps_the_order() {
        let proxy = Proxy::start(vec![echo().await]).await.unwrap();
        proxy.set(Network::Slow(Duration::from_millis(100)));
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        let begun = Instant::now();
        assert_eq!(say(&mut stream, b"one").await.unwrap(), b"one");
        assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_target_that_is_away_is_passed_over() {
        let dead = {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
            listener.local_addr().unwrap()
        };
        let proxy = Proxy::start(vec![dead, echo().await]).await.unwrap();
        for _ in 0..3 {
            let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
            assert_eq!(say(&mut stream, b"x").await.unwrap(), b"x");
            assert_eq!(proxy.last_target(), 1);
        }
    }
}
