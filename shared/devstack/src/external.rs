//! Servers that somebody else runs: whether anything listens there, asked before the roles wait for it.

use reliant_types::boxed;
use std::time::Duration;

use tokio::net::TcpStream;

use crate::{Server, StackError};

const PATIENCE: Duration = Duration::from_secs(5);

/// Connects once to each host that the URL names; one that answers is enough.
#[boxed]
pub async fn reachable(server: Server, url: &str) -> Result<(), StackError> {
    let mut refused = None;
    for address in addresses(server, url) {
        let reason = match tokio::time::timeout(PATIENCE, TcpStream::connect(&address)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", PATIENCE.as_secs()),
        };
        refused.get_or_insert(StackError::External { server, address, reason });
    }
    refused.map_or(Ok(()), Err)
}

/// host:port of each host, without user and password. None for a Postgres on a Unix socket.
fn addresses(server: Server, url: &str) -> Vec<String> {
    let hosts = url.split(',').map(|part| {
        let rest = part.split_once("://").map_or(part, |(_, rest)| rest);
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        authority.rsplit('@').next().unwrap_or_default()
    });
    let port = server.usual_port();
    hosts
        .filter(|host| !host.is_empty())
        .map(|host| match host.rsplit_once(':') {
            Some((_, digits)) if digits.parse::<u16>().is_ok() => host.to_owned(),
            _ => format!("{host}:{port}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_in_urls_and_secrets_are_not() {
        let check = |server, url: &str, wanted: &[&str]| assert_eq!(addresses(server, url), wanted, "{url}");
        check(Server::Postgres, "postgres://me:pass@db.example/x?sslmode=require", &["db.example:5432"]);
        check(Server::Postgres, "postgres://me:p@ss@[::1]:6000/x", &["[::1]:6000"]);
        check(Server::Postgres, "postgres:///x?host=/run/postgresql", &[]);
        check(Server::Nats, "nats://u:p@a:4222,nats://b", &["a:4222", "b:4222"]);
        check(Server::Temporal, "temporal.example", &["temporal.example:7233"]);
        check(Server::Temporal, "http://127.0.0.1:1", &["127.0.0.1:1"]);
    }

    #[tokio::test]
    async fn what_is_away_is_named_with_the_way_out() {
        let error = reachable(Server::Postgres, "postgres://me:hunter2@127.0.0.1:1/x").await.unwrap_err().to_string();
        assert!(error.contains("Postgres at 127.0.0.1:1"), "{error}");
        assert!(error.contains("DATABASE_URL") && !error.contains("hunter2"), "{error}");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        reachable(Server::Nats, &format!("nats://{}", listener.local_addr().unwrap())).await.unwrap();
    }
}
