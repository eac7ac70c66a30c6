//! What daemons declare, read once for each change of it: one daemon's declarations may be as large as 4 MiB, and each
//! round of each of its chats needs them.

use std::sync::Arc;

use parking_lot::Mutex;
use prost::Message as _;
use reliant_store::{Attempt, Store};
use reliant_types::{DaemonId, pb};

use crate::{engine::EngineError, kept::Kept, tools};

/// Memory of all together, about: what is decoded takes some twice its size. The largest that one daemon may declare fits.
const KEPT_MAX_BYTES: usize = 32 * 1024 * 1024;

/// What the daemon of an attempt's chat offers to it.
#[derive(Debug, Default)]
pub struct Offer {
    declared: Arc<pb::Declarations>,
    root_id: String,
}

impl Offer {
    /// In the order in which a model is told of them.
    pub fn tools(&self, mode: pb::ChatMode) -> Vec<&pb::ToolDeclaration> {
        tools::offered(&self.declared.tools, &self.root_id, mode)
    }

    pub fn root(&self) -> Option<&pb::Root> {
        self.declared.roots.iter().find(|root| root.id == self.root_id)
    }
}

/// With the number of the change that each is of.
pub struct Offers(Mutex<Kept<DaemonId, (i64, Arc<pb::Declarations>)>>);

impl Default for Offers {
    fn default() -> Self {
        Self(Mutex::new(Kept::new(KEPT_MAX_BYTES)))
    }
}

impl Offers {
    pub async fn of(&self, store: &Store, attempt: &Attempt) -> Result<Offer, EngineError> {
        let Some(daemon) = &attempt.daemon else { return Ok(Offer::default()) };
        let declared = match self.kept(daemon.id, daemon.declared) {
            Some(declared) => declared,
            None => {
                let (version, declared) = store.declarations(daemon.id).await?;
                let declared = Arc::new(declared);
                self.keep(daemon.id, version, &declared);
                declared
            }
        };
        let root = Some(attempt.root_id.clone()).filter(|root| !root.is_empty());
        let root_id = root.or_else(|| declared.roots.first().map(|root| root.id.clone())).unwrap_or_default();
        Ok(Offer { declared, root_id })
    }

    fn kept(&self, daemon: DaemonId, version: i64) -> Option<Arc<pb::Declarations>> {
        let mut kept = self.0.lock();
        kept.get(&daemon).filter(|(known, _)| *known >= version).map(|(_, declared)| declared.clone())
    }

    fn keep(&self, daemon: DaemonId, version: i64, declared: &Arc<pb::Declarations>) {
        self.0.lock().put(daemon, (version, declared.clone()), declared.encoded_len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn declared(bytes: usize) -> Arc<pb::Declarations> {
        let tool = pb::ToolDeclaration { description: "x".repeat(bytes), ..Default::default() };
        Arc::new(pb::Declarations { tools: vec![tool], ..Default::default() })
    }

    #[test]
    fn a_change_is_read_and_what_is_kept_is_bounded() {
        let offers = Offers::default();
        let daemon = DaemonId::new();
        offers.keep(daemon, 3, &declared(10));
        assert!(offers.kept(daemon, 3).is_some() && offers.kept(daemon, 4).is_none());
        offers.keep(daemon, 4, &declared(20));
        assert!(offers.kept(daemon, 4).is_some());
        let many: Vec<DaemonId> = (0..20).map(|_| DaemonId::new()).collect();
        for id in &many {
            offers.keep(*id, 1, &declared(KEPT_MAX_BYTES / 10));
        }
        let left = many.iter().filter(|id| offers.kept(**id, 1).is_some()).count();
        assert!(left < 10 && offers.kept(many[19], 1).is_some(), "{left} are left");
        assert!(offers.kept(daemon, 4).is_none());
        assert!(offers.0.lock().bytes <= KEPT_MAX_BYTES);
    }
}
