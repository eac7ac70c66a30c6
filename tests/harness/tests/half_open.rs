//! Connections that take everything and answer nothing, seen from the store.

#![allow(clippy::unwrap_used, reason = "a test may")]

use std::time::Duration;

use anyhow::Result;
use futures::future::join_all;
use reliant_devstack::{Placement, Server, Stack, StackConfig};
use reliant_harness::{Network, Proxy, eventually, within};
use reliant_store::{Store, StoreConfig};
use sqlx::PgPool;

const CONNECTIONS: u32 = 4;

/// Every connection goes silent while it works and while it rests: each piece of work ends, and none of the pool's
/// places is lost with its connection.
#[tokio::test]
async fn a_silent_database_is_given_up_and_found_again() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = StackConfig { nats: Placement::Off, temporal: Placement::Off, ..StackConfig::for_tests(dir.path()) };
    let stack = Stack::start(config).await?;
    let port = stack.port(Server::Postgres).unwrap();
    let proxy = Proxy::start(vec![([127, 0, 0, 1], port).into()]).await?;
    let url = stack.postgres_url.replace(&format!(":{port}"), &format!(":{}", proxy.address().port()));
    let store = Store::connect(&StoreConfig { url, max_connections: CONNECTIONS, ..StoreConfig::default() }).await?;
    store.migrate().await?;
    let direct = PgPool::connect(&stack.postgres_url).await?;
    let all = || join_all((0..CONNECTIONS * 3).map(|_| store.ping()));
    for round in 0..3 {
        assert!(all().await.iter().all(Result::is_ok), "round {round}");
        // Some wait for a lock when the network goes silent, so that it meets them at their work; the rest wait for those.
        let mut lock = direct.begin().await?;
        sqlx::query("LOCK TABLE log_state").execute(&mut *lock).await?;
        let working = join_all((0..CONNECTIONS * 2).map(|_| store.log_epoch()));
        let silence = async {
            eventually("statements that wait", Duration::from_secs(5), || async {
                let waiting: i64 =
                    sqlx::query_scalar("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
                        .fetch_one(&direct)
                        .await?;
                Ok((waiting == i64::from(CONNECTIONS)).then_some(()))
            })
            .await?;
            proxy.set(Network::Silent);
            lock.rollback().await?;
            anyhow::Ok(())
        };
        let both = async { tokio::join!(working, silence) };
        let (outcomes, silenced) = within("an end of what went silent", Duration::from_secs(30), both).await?;
        silenced?;
        assert!(outcomes.iter().all(Result::is_err), "round {round}: {outcomes:?}");
        proxy.set(Network::Forward);
        eventually("the database again", Duration::from_secs(15), || async { Ok(store.ping().await.ok()) }).await?;
        // Not one connection more than before, and not one less to be had.
        let again = within("all places of the pool", Duration::from_secs(15), all()).await?;
        assert!(again.iter().all(Result::is_ok), "round {round}: {again:?}");
    }
    Ok(())
}
