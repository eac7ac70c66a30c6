//! Accepts connections within bounds: so many in all and of one address, and none that stays silent. Where the process has no
//! file descriptor left it waits instead of spinning, and says so once.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::Stream;
use parking_lot::Mutex;
use reliant_telemetry::{chain, sampled};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{Sleep, sleep},
};
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::open_files;

/// The first bytes of an HTTP/2 connection; an HTTP/1 request is no shorter. After them the HTTP layer has timers of its own.
const OPENING_BYTES: usize = 24;
const WAIT_MIN: Duration = Duration::from_millis(10);
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Connections of one listener. One more is closed as soon as it is accepted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConnectionLimits {
    /// Open at one time.
    pub total: usize,
    /// Open at one time from one address. A reverse proxy is one address.
    pub per_address: usize,
    /// Open at one time from this machine.
    pub per_loopback: usize,
    /// A connection that has not begun to speak HTTP after this is closed.
    #[serde(with = "humantime_serde")]
    pub opening: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self { total: 25_000, per_address: 5_000, per_loopback: 25_000, opening: Duration::from_secs(10) }
    }
}

impl ConnectionLimits {
    fn of(&self, address: IpAddr) -> usize {
        if address.to_canonical().is_loopback() { self.per_loopback } else { self.per_address }
    }
}

type Counts = Arc<Mutex<HashMap<IpAddr, usize>>>;

/// A listener's accepted connections, for `serve_with_incoming`.
pub struct Connections {
    listener: TcpListener,
    limits: ConnectionLimits,
    places: Arc<Semaphore>,
    counts: Counts,
    /// The listener is left alone until then: the process or the machine has no file descriptor left.
    pause: Option<(Pin<Box<Sleep>>, Duration)>,
    /// Of the current pause or row of pauses.
    warned: bool,
}

impl Connections {
    /// Raises the process's limit of open files and warns where it is below what `limits` allow.
    pub fn new(listener: TcpListener, limits: &ConnectionLimits) -> Self {
        open_files::raise(limits.total);
        let counts = Counts::default();
        let weak = Arc::downgrade(&counts);
        sampled::watch("address_connections", limits.per_address, move || {
            weak.upgrade().map(|counts| counts.lock().values().copied().max().unwrap_or_default())
        });
        let places = sampled::places("connections", limits.total);
        Self { listener, limits: limits.clone(), places, counts, pause: None, warned: false }
    }

    /// The connection with its place, or nothing where there is none.
    fn admit(&self, stream: TcpStream, peer: SocketAddr) -> Option<Connection> {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            sampled::refused("connections");
            return None;
        };
        let address = peer.ip().to_canonical();
        {
            let mut counts = self.counts.lock();
            let count = counts.entry(address).or_default();
            if *count >= self.limits.of(address) {
                sampled::refused("address_connections");
                return None;
            }
            *count += 1;
        }
        let held = Held { address, counts: self.counts.clone(), _place: place };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(error = %chain(&error), "a connection keeps Nagle's delay");
        }
        Some(Connection { stream, opening: Some((Box::pin(sleep(self.limits.opening)), 0)), _held: held })
    }

    /// Waits a while longer each time.
    fn pause(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(
                error = %chain(error),
                "no further connection can be accepted for now; raise the limit of open files ('ulimit -n', LimitNOFILE)"
            );
        }
        sampled::refused("connections");
        let wait = self.pause.as_ref().map_or(WAIT_MIN, |(_, last)| (*last * 2).min(WAIT_MAX));
        self.pause = Some((Box::pin(sleep(wait)), wait));
    }
}

/// Whether it is the process or the machine that has no room, and not the connection that failed.
fn is_exhaustion(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    error.raw_os_error().is_some_and(|code| exhausted.iter().any(|errno| errno.raw_os_error() == code))
}

impl Stream for Connections {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Connection>>> {
        let this = self.get_mut();
        loop {
            if let Some((pause, _)) = &mut this.pause
                && !pause.is_elapsed()
            {
                ready!(pause.as_mut().poll(cx));
            }
            match ready!(this.listener.poll_accept(cx)) {
                Ok((stream, peer)) => {
                    (this.pause, this.warned) = (None, false);
                    if let Some(connection) = this.admit(stream, peer) {
                        return Poll::Ready(Some(Ok(connection)));
                    }
                }
                Err(error) if is_exhaustion(&error) => this.pause(&error),
                // The peer was gone before it was accepted; tonic accepts the next.
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }
}

/// The counts of one connection, given back when it is dropped.
struct Held {
    address: IpAddr,
    counts: Counts,
    _place: tokio::sync::OwnedSemaphorePermit,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

/// An accepted connection. Reading fails once it was silent for too long at its beginning.
pub struct Connection {
    stream: TcpStream,
    /// The timer and how much came; `None` once it has begun to speak.
    opening: Option<(Pin<Box<Sleep>>, usize)>,
    _held: Held,
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        if let Some((timer, came)) = &mut this.opening {
            *came += buf.filled().len() - before;
            if *came >= OPENING_BYTES {
                this.opening = None;
            } else if polled.is_pending() && timer.as_mut().poll(cx).is_ready() {
                sampled::refused("silent_connections");
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the connection stayed silent")));
            }
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    async fn listen(limits: ConnectionLimits) -> (Connections, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        (Connections::new(listener, &limits), addr)
    }

    #[tokio::test]
    async fn connections_beyond_a_limit_are_closed_and_a_place_comes_back() {
        for limits in [
            ConnectionLimits { total: 3, ..ConnectionLimits::default() },
            ConnectionLimits { per_loopback: 3, ..ConnectionLimits::default() },
        ] {
            let (mut connections, addr) = listen(limits).await;
            let held = Arc::<Mutex<Vec<Connection>>>::default();
            let accepted = held.clone();
            let accepting = tokio::spawn(async move {
                while let Some(Ok(connection)) = connections.next().await {
                    accepted.lock().push(connection);
                }
            });
            let mut clients = Vec::new();
            for _ in 0..5 {
                clients.push(TcpStream::connect(addr).await.unwrap());
            }
            for refused in &mut clients[3..] {
                let read = tokio::time::timeout(LONG, refused.read_u8()).await.expect("it is closed");
                assert!(read.is_err());
            }
            assert_eq!(held.lock().len(), 3);
            held.lock().pop();
            let _next = TcpStream::connect(addr).await.unwrap();
            tokio::time::timeout(LONG, async {
                while held.lock().len() < 3 {
                    tokio::task::yield_now().await;
                }
            })
            .await
            .expect("the place is free again");
            accepting.abort();
        }
    }

    #[test]
    fn this_machine_has_a_limit_of_its_own() {
        let limits = ConnectionLimits { per_address: 1, per_loopback: 2, ..ConnectionLimits::default() };
        let of = |address: &str| limits.of(address.parse().unwrap());
        assert_eq!([of("127.0.0.1"), of("::1"), of("::ffff:127.0.0.1"), of("192.0.2.1")], [2, 2, 2, 1]);
    }

    #[tokio::test]
    async fn a_connection_that_stays_silent_is_closed_and_one_that_speaks_is_not() {
        let limits = ConnectionLimits { opening: Duration::from_millis(50), ..ConnectionLimits::default() };
        for (sent, silent) in [(&b""[..], true), (b"PRI * HTTP/2", true), (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", false)]
        {
            let (mut connections, addr) = listen(limits.clone()).await;
            let mut client = TcpStream::connect(addr).await.unwrap();
            client.write_all(sent).await.unwrap();
            let mut connection = connections.next().await.unwrap().unwrap();
            let mut read = Vec::new();
            let wait = if silent { LONG } else { Duration::from_millis(500) };
            let ended = tokio::time::timeout(wait, connection.read_to_end(&mut read)).await;
            assert_eq!(read, sent);
            match ended {
                Ok(Err(error)) => assert!(silent && error.kind() == io::ErrorKind::TimedOut),
                Ok(Ok(_)) => panic!("the client did not close it"),
                Err(_) => assert!(!silent, "it is still held"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_file_descriptors_the_listener_waits_longer_each_time() {
        let (mut connections, addr) = listen(ConnectionLimits::default()).await;
        let exhausted = io::Error::from_raw_os_error(rustix::io::Errno::MFILE.raw_os_error());
        assert!(is_exhaustion(&exhausted) && !is_exhaustion(&io::ErrorKind::ConnectionReset.into()));
        let mut waits = Vec::new();
        for _ in 0..10 {
            connections.pause(&exhausted);
            waits.push(connections.pause.as_ref().unwrap().1);
        }
        assert_eq!(waits[..3], [WAIT_MIN, WAIT_MIN * 2, WAIT_MIN * 4]);
        assert_eq!(waits[9], WAIT_MAX);
        let _client = TcpStream::connect(addr).await.unwrap();
        let begun = tokio::time::Instant::now();
        connections.next().await.unwrap().unwrap();
        assert!(begun.elapsed() >= WAIT_MAX, "it was left alone meanwhile");
        assert!(connections.pause.is_none() && !connections.warned);
    }
}
