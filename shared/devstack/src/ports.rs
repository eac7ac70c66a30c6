//! Free ports on 127.0.0.1.

use std::{fs, net::TcpListener};

use rand::RngExt;

use crate::StackError;

/// Below it live the ports that other programs are known by.
const LOWEST: u16 = 15_000;
/// Linux gives outgoing connections ports from here on, unless told otherwise.
const EPHEMERAL_DEFAULT: u16 = 32_768;
const ATTEMPTS: usize = 200;

/// The wished port if it is free, else any free one (wish 0: any).
///
/// Never one of the range for outgoing connections: a client that redials a dead server on such a port can end up
/// connected to itself, and then the server cannot come back.
pub fn free_port(wish: u16) -> Result<u16, StackError> {
    if wish != 0 && is_free(wish) {
        return Ok(wish);
    }
    let end = ephemeral_start().max(LOWEST + 1000);
    let mut rng = rand::rng();
    for _ in 0..ATTEMPTS {
        let port = rng.random_range(LOWEST..end);
        if is_free(port) {
            return Ok(port);
        }
    }
    Err(StackError::NoPort)
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

fn ephemeral_start() -> u16 {
    fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse().ok())
        .unwrap_or(EPHEMERAL_DEFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_falls_back() {
        let taken = TcpListener::bind(("127.0.0.1", 0)).expect("bind");
        let port = taken.local_addr().expect("address").port();
        let other = free_port(port).expect("a free port");
        assert_ne!(other, port);
        assert!(other < ephemeral_start());
        drop(taken);
        assert_eq!(free_port(other).expect("a free port"), other);
    }
}
