//! What a daemon declares: its roots and tools. The newest counts; it is written when it differs from what is stored, at a
//! pace that its size sets.

use parking_lot::Mutex;
use prost::Message;
use reliant_runtime::{Backoff, Drain, TaskKind};
use reliant_telemetry::{chain, sampled};
use reliant_types::{limits, pb};
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};
use tokio_util::sync::CancellationToken;

use crate::hub::{Hub, Seat};

const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// A daemon that declares again and again costs a row's write in this time, not one each.
const INTERVAL: Duration = Duration::from_secs(2);
/// A large declaration is paid for by a longer pause after it.
const BYTES_PER_SECOND: usize = 128 * 1024;

/// Tells declarations apart. A daemon that makes two alike deceives only itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fingerprint(u64);

impl Fingerprint {
    pub fn of(roots: &[pb::Root], tools: &[pb::ToolDeclaration]) -> Self {
        let mut hasher = DefaultHasher::new();
        (roots.len(), tools.len()).hash(&mut hasher);
        roots.iter().for_each(|root| root.encode_to_vec().hash(&mut hasher));
        tools.iter().for_each(|tool| tool.encode_to_vec().hash(&mut hasher));
        Self(hasher.finish())
    }
}

/// The pause after a write of so many bytes.
fn pause(bytes: usize) -> Duration {
    INTERVAL + Duration::from_secs_f64(bytes as f64 / BYTES_PER_SECOND as f64)
}

/// Stores declarations, the newest last. One is written at a time; those that come meanwhile replace each other.
pub(crate) struct Declarer {
    hub: Arc<Hub>,
    seat: Arc<Seat>,
    drain: Drain,
    gone: CancellationToken,
    slot: Arc<Mutex<Slot>>,
}

struct Slot {
    next: Option<pb::Declarations>,
    busy: bool,
    stored: Fingerprint,
}

impl Declarer {
    pub fn new(hub: Arc<Hub>, seat: Arc<Seat>, drain: Drain, gone: CancellationToken, stored: Fingerprint) -> Self {
        let slot = Arc::new(Mutex::new(Slot { next: None, busy: false, stored }));
        Self { hub, seat, drain, gone, slot }
    }

    pub fn take(&self, mut declarations: pb::Declarations) {
        if let Err(reason) = bounded(&mut declarations.roots, &mut declarations.tools) {
            tracing::warn!(daemon.id = %self.seat.daemon, reason, "declarations were shortened");
        }
        {
            let mut slot = self.slot.lock();
            if slot.next.replace(declarations).is_some() {
                sampled::refused("tunnel_declarations");
            }
            if std::mem::replace(&mut slot.busy, true) {
                return;
            }
        }
        let (hub, seat, gone, slot) = (self.hub.clone(), self.seat.clone(), self.gone.clone(), self.slot.clone());
        self.drain.spawn(TaskKind::Work("declarations"), async move {
            let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MAX);
            loop {
                let Some((declarations, fingerprint)) = slot.lock().take() else { return };
                match declare(&hub, &seat, &declarations).await {
                    Ok(()) => {
                        backoff.reset();
                        slot.lock().stored = fingerprint;
                        tokio::select! {
                            () = tokio::time::sleep(pause(declarations.encoded_len())) => {}
                            () = gone.cancelled() => return,
                        }
                    }
                    Err(error) => {
                        tracing::warn!(error = %chain(&error), daemon.id = %seat.daemon, "declarations were not stored; tried again");
                        slot.lock().next.get_or_insert(declarations);
                        tokio::select! {
                            () = backoff.wait() => {}
                            // The next stream's hello declares everything anew.
                            () = gone.cancelled() => return,
                        }
                    }
                }
            }
        });
    }
}

impl Slot {
    /// The next declarations to write: those that differ from what is stored. `None`: nobody is at work any more.
    fn take(&mut self) -> Option<(pb::Declarations, Fingerprint)> {
        let next = self.next.take().and_then(|next| {
            let fingerprint = Fingerprint::of(&next.roots, &next.tools);
            (fingerprint != self.stored).then_some((next, fingerprint))
        });
        self.busy = next.is_some();
        next
    }
}

async fn declare(hub: &Hub, seat: &Seat, declarations: &pb::Declarations) -> Result<(), reliant_store::StoreError> {
    let committed = hub
        .store
        .update_declarations(seat.daemon, seat.instance, declarations.roots.clone(), declarations.tools.clone())
        .await?;
    hub.publish_feed(seat.user, committed.feed).await;
    Ok(())
}

/// Roots one daemon offers.
const ROOTS_MAX: usize = 64;
const AGENTS_MD_MAX_BYTES: usize = 32 * 1024;
const TEXT_MAX_BYTES: usize = 4096;
const SCHEMA_MAX_BYTES: usize = 64 * 1024;

/// Shortens what a daemon declares to its limits, and says whether it had to.
pub(crate) fn bounded(roots: &mut Vec<pb::Root>, tools: &mut Vec<pb::ToolDeclaration>) -> Result<(), &'static str> {
    let before = (roots.len(), tools.len());
    roots.truncate(ROOTS_MAX);
    for root in roots.iter_mut() {
        for (text, max) in [
            (&mut root.id, 128),
            (&mut root.name, 256),
            (&mut root.path, TEXT_MAX_BYTES),
            (&mut root.agents_md, AGENTS_MD_MAX_BYTES),
        ] {
            text.truncate(text.floor_char_boundary(max));
        }
    }
    // A tool with half a schema is worse than none.
    tools.retain(|tool| {
        !tool.name.is_empty() && tool.name.len() <= 128 && tool.input_schema_json.len() <= SCHEMA_MAX_BYTES
    });
    tools.truncate(limits::DAEMON_TOOLS_MAX);
    for tool in tools.iter_mut() {
        tool.description.truncate(tool.description.floor_char_boundary(TEXT_MAX_BYTES));
    }
    if (roots.len(), tools.len()) == before { Ok(()) } else { Err("too many roots or tools, or a tool too large") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn declarations(tool: &str) -> pb::Declarations {
        let tools = vec![pb::ToolDeclaration { name: tool.into(), ..pb::ToolDeclaration::default() }];
        pb::Declarations { roots: vec![pb::Root::default()], tools }
    }

    #[test]
    fn what_is_stored_already_is_not_written_again() {
        let fingerprint = |declared: &pb::Declarations| Fingerprint::of(&declared.roots, &declared.tools);
        let (one, other) = (declarations("one"), declarations("other"));
        let mut slot = Slot { next: Some(one.clone()), busy: true, stored: fingerprint(&one) };
        assert!(slot.take().is_none() && !slot.busy);
        slot.next = Some(other.clone());
        let (taken, taken_fingerprint) = slot.take().expect("it differs");
        assert_eq!((taken, taken_fingerprint), (other.clone(), fingerprint(&other)));
        slot.stored = taken_fingerprint;
        // Back to what was there before: that is a change too.
        slot.next = Some(one);
        assert!(slot.take().is_some() && slot.busy);
    }

    #[test]
    fn a_large_declaration_is_followed_by_a_long_pause() {
        assert_eq!(pause(0), INTERVAL);
        assert!(pause(limits::GRPC_MESSAGE_MAX_BYTES) > Duration::from_secs(30));
    }

    #[test]
    fn declarations_are_shortened_to_their_limits() {
        let tool = |name: &str| pb::ToolDeclaration {
            name: name.into(),
            description: "d".repeat(10_000),
            ..Default::default()
        };
        let mut roots = vec![pb::Root { agents_md: "\u{20ac}".repeat(20_000), ..Default::default() }];
        let mut tools = vec![tool("shell")];
        assert!(bounded(&mut roots, &mut tools).is_ok());
        assert!(roots[0].agents_md.len() <= AGENTS_MD_MAX_BYTES);
        assert_eq!(tools[0].description.len(), TEXT_MAX_BYTES);
        let mut many: Vec<_> = (0..5000).map(|n| tool(&format!("mcp__s__{n}"))).collect();
        assert!(bounded(&mut roots, &mut many).is_err());
        assert_eq!(many.len(), limits::DAEMON_TOOLS_MAX);
    }
}
