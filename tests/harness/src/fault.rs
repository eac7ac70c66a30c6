//! Faults: done to a process at once, and undone later.

use reliant_types::boxed;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use reliant_daemon::journal::JOURNAL_FILE;
use reliant_devstack::Server;
use tokio::{task::JoinHandle, time::Instant};

use crate::{
    Arena, Claim, Network, Node, Supervised, eventually,
    link::{Layer, Link, Peer},
};

/// Longer than any role may drain by its own limits; the longest is a worker's, of 77 seconds.
const DRAIN_PATIENCE: Duration = Duration::from_secs(90);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// kill -9; started again after this long.
    Kill { back_after: Duration },
    /// SIGTERM, as an orchestrator would; started again once it has ended.
    Terminate { back_after: Duration },
    /// SIGSTOP.
    Pause(Duration),
    /// kill -9 of a daemon, whose journal is gone when it is started again.
    LoseJournal { back_after: Duration },
    /// No file takes a write of this process any more: RLIMIT_FSIZE, which the kernel enforces without a full disk.
    FullDisk(Duration),
    /// The ways to `only` that process, or all of its ways.
    Network { network: Network, lasting: Duration, only: Option<Peer> },
}

/// A fault that is under way.
pub struct Strike {
    pub at: Instant,
    arena: Arc<Arena>,
    node: Node,
    fault: Fault,
    layers: Vec<Layer>,
    /// The asked-for end of a server.
    ending: Option<JoinHandle<()>>,
    _claim: Claim,
}

impl Arena {
    /// Does it now. The process must be claimed; the claim ends when all is well again.
    pub async fn strike(self: &Arc<Self>, claim: Claim, node: &Node, fault: &Fault) -> Result<Strike> {
        if matches!(node, Node::Server(_)) {
            self.server_faults.fetch_add(1, Ordering::Relaxed);
        }
        let mut layers = Vec::new();
        let mut ending = None;
        match (fault, node) {
            (Fault::Kill { .. }, Node::Role(role)) => role.process.lock().await.kill(),
            (Fault::Kill { .. }, Node::Server(server)) => self.stack.kill(*server)?,
            (Fault::Terminate { .. }, Node::Role(role)) => role.process.lock().await.terminate(),
            (Fault::Terminate { .. }, Node::Server(server)) => {
                let (arena, server) = (self.clone(), *server);
                ending = Some(tokio::spawn(async move { drop(arena.stack.stop_one(server).await) }));
            }
            (Fault::Pause(_), Node::Role(role)) => role.process.lock().await.pause(),
            (Fault::Pause(_), Node::Server(server)) => self.stack.pause(*server)?,
            (Fault::LoseJournal { .. }, Node::Role(role)) => {
                let dir = role.state_dir.as_deref().context("only a daemon has a journal")?;
                role.process.lock().await.kill();
                std::fs::remove_file(dir.join(JOURNAL_FILE))?;
            }
            (Fault::FullDisk(_), Node::Role(role)) => role.process.lock().await.refuse_writes(true)?,
            (Fault::Network { network, only, .. }, node) => {
                let links: Vec<Arc<Link>> = self
                    .links_of(&node.peer())
                    .into_iter()
                    .filter(|link| only.as_ref().is_none_or(|peer| link.touches(peer)))
                    .collect();
                layers = links.iter().map(|link| link.lay(*network)).collect();
            }
            (fault, node) => bail!("{fault:?} cannot be done to {}", node.peer()),
        }
        Ok(Strike {
            at: Instant::now(),
            arena: self.clone(),
            node: node.clone(),
            fault: fault.clone(),
            layers,
            ending,
            _claim: claim,
        })
    }
}

impl Strike {
    /// Waits as long as the fault lasts and undoes it. A role that was asked to end and did not, or ended with an error,
    /// is an error.
    #[boxed]
    pub async fn heal(mut self) -> Result<()> {
        match (&self.fault, &self.node) {
            (Fault::Kill { back_after } | Fault::LoseJournal { back_after }, Node::Role(role)) => {
                tokio::time::sleep(*back_after).await;
                self.arena.restart(role).await?;
            }
            (Fault::Kill { back_after }, Node::Server(server)) => {
                tokio::time::sleep(*back_after).await;
                restart_server(&self.arena, *server).await?;
            }
            (Fault::Terminate { back_after }, Node::Role(role)) => {
                let drained = drained(role).await;
                tokio::time::sleep(*back_after).await;
                // Others need it, however it ended.
                self.arena.restart(role).await?;
                drained?;
            }
            (Fault::Terminate { back_after }, Node::Server(server)) => {
                if let Some(ending) = self.ending.take() {
                    let _ = ending.await;
                }
                tokio::time::sleep(*back_after).await;
                restart_server(&self.arena, *server).await?;
            }
            (Fault::Pause(lasting), Node::Role(role)) => {
                tokio::time::sleep(*lasting).await;
                role.process.lock().await.resume();
            }
            (Fault::Pause(lasting), Node::Server(server)) => {
                tokio::time::sleep(*lasting).await;
                self.arena.stack.resume(*server)?;
            }
            (Fault::FullDisk(lasting), Node::Role(role)) => {
                tokio::time::sleep(*lasting).await;
                role.process.lock().await.refuse_writes(false)?;
            }
            (Fault::Network { lasting, .. }, _) => {
                tokio::time::sleep(*lasting).await;
                self.layers.clear();
            }
            // It was never begun.
            _ => {}
        }
        Ok(())
    }
}

/// The end of a role that was asked for it; it is the restart that kills one which stays.
async fn drained(role: &Supervised) -> Result<()> {
    let what = format!("the end of {}", role.name);
    let end = eventually(&what, DRAIN_PATIENCE, || async { Ok(role.process.lock().await.end()) });
    end.await?.with_context(|| format!("{} was asked to end", role.name))
}

async fn restart_server(arena: &Arena, server: Server) -> Result<()> {
    arena.stack.restart(server).await?;
    Ok(())
}
