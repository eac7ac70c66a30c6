//! Bringing a chat to a step, and saying from rows, markers and the viewer whether it is there.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use reliant_harness::{Arena, Hold, Host, Layer, Network, Node, Peer, Supervised, TurnLook, Visitor};
use reliant_types::pb;
use serde_json::Value;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::{
    chance::Chance,
    conditions::{Conditions, Patience},
    matrix::{Process, Step},
    scripts::{Marks, call, key_of, last, message, round},
    seat::{Accepted, Ledger, Seat},
};

/// Nothing but our own faults delays a step; past this the cell is given up and tried again.
const STEP_PATIENCE: Duration = Duration::from_secs(45);
const LOOK_EVERY: Duration = Duration::from_millis(8);
/// A daemon this far away lets one see what is under way to it and from it.
const FAR: Duration = Duration::from_millis(350);

/// Somebody with a daemon and a chat of each kind, for one fault at a time.
pub struct Stage {
    pub arena: Arc<Arena>,
    pub name: String,
    pub visitor: Visitor,
    pub host: Host,
    pub auto: Seat,
    pub ask: Seat,
    pub ledger: Arc<Ledger>,
    pub conditions: Arc<Conditions>,
}

/// A chat at its step.
pub struct Scene<'a> {
    pub stage: &'a Stage,
    pub seat: &'a Seat,
    pub step: Step,
    /// The turn that is at the step.
    pub turn: Accepted,
    /// All turns that this scene began.
    pub turns: Vec<Accepted>,
    pub look: TurnLook,
    /// Kept while the step is to last.
    hold: Option<Hold>,
    _far: Vec<Layer>,
    /// An api whose transaction waits; the message is not accepted yet.
    sending: Option<tokio::task::JoinHandle<Result<Accepted>>>,
    waiting: Option<Arc<Supervised>>,
}

impl Stage {
    pub async fn new(
        arena: &Arc<Arena>,
        name: &str,
        ledger: &Arc<Ledger>,
        conditions: &Arc<Conditions>,
    ) -> Result<Self> {
        let visitor = arena.visitor(name).await?;
        let host = arena.host(&visitor, name).await?;
        let auto = Seat::take(&visitor.client, pb::ChatMode::Auto, ledger).await?;
        let ask = Seat::take(&visitor.client, pb::ChatMode::Ask, ledger).await?;
        let (arena, ledger, conditions) = (arena.clone(), ledger.clone(), conditions.clone());
        Ok(Self { arena, name: name.to_owned(), visitor, host, auto, ask, ledger, conditions })
    }

    fn far(&self) -> Vec<Layer> {
        let links = self.arena.links_of(&Peer::Role(self.host.role.name.clone()));
        links.iter().map(|link| link.lay(Network::Slow(FAR))).collect()
    }

    async fn send(&self, seat: &Seat, rounds: impl FnOnce(&str) -> Vec<Value>) -> Result<Accepted> {
        let key = self.ledger.key(&self.name);
        let text = message(&key, rounds(&key));
        seat.send(&key, &text).await
    }

    /// Begins what leads to `step` and waits until it is there. None: it passed too quickly; try again.
    pub async fn bring(&self, step: Step, process: Process, chance: &mut Chance) -> Result<Option<Scene<'_>>> {
        let seat = if step == Step::Approval { &self.ask } else { &self.auto };
        let mut scene = Scene {
            stage: self,
            seat,
            step,
            turn: Accepted {
                chat: seat.chat,
                turn: reliant_types::TurnId::new(),
                client_message_id: String::new(),
                key: String::new(),
                at: Instant::now(),
            },
            turns: Vec::new(),
            look: TurnLook::default(),
            hold: None,
            _far: Vec::new(),
            sending: None,
            waiting: None,
        };
        match self.lead(&mut scene, process, chance).await {
            Ok(true) => Ok(Some(scene)),
            Ok(false) => Ok(scene.give_up().await),
            // What was begun must end all the same: the next scene is in the same chat.
            Err(error) => {
                scene.give_up().await;
                Err(error)
            }
        }
    }

    async fn lead(&self, scene: &mut Scene<'_>, process: Process, chance: &mut Chance) -> Result<bool> {
        let deadline = Instant::now() + STEP_PATIENCE;
        let (seat, step) = (scene.seat, scene.step);
        let plain = |key: &str| vec![round(12, 60.0, vec![call(key, 0.05)]), last(key)];
        match step {
            Step::Accepted => {
                scene.began(self.send(seat, plain).await?);
                scene.hold = Some(self.arena.observer.hold_chat(seat.chat).await?);
            }
            Step::Queued => {
                let first = self.send(seat, |key| vec![round(50, 25.0, vec![call(key, 0.05)]), last(key)]).await?;
                scene.began(first);
                scene.began(self.send(seat, plain).await?);
            }
            Step::Streaming => {
                let calls = |key: &str| vec![call(key, 0.05), call(key, 0.1)];
                scene.began(self.send(seat, |key| vec![round(70, 25.0, calls(key)), last(key)]).await?);
            }
            Step::Dispatched => {
                scene._far = self.far();
                scene.began(self.send(seat, |key| vec![round(3, 0.0, vec![call(key, 0.3)]), last(key)]).await?);
            }
            Step::Running => {
                let calls = |key: &str| vec![call(key, 2.5), call(key, 0.05)];
                scene.began(self.send(seat, |key| vec![round(3, 0.0, calls(key)), last(key)]).await?);
            }
            Step::Result => {
                scene._far = self.far();
                scene.began(self.send(seat, |key| vec![round(3, 0.0, vec![call(key, 0.2)]), last(key)]).await?);
            }
            Step::Approval => scene.began(self.send(seat, plain).await?),
            Step::Persisting if process == Process::Api => {
                scene.hold = Some(self.arena.observer.hold_chat(seat.chat).await?);
                let key = self.ledger.key(&self.name);
                let text = message(&key, plain(&key));
                scene.turn.key = key.clone();
                let (chat, client, ledger) = (seat.chat, seat.client.clone(), self.ledger.clone());
                scene.sending =
                    Some(tokio::spawn(async move { crate::seat::send(&client, chat, &ledger, &key, &text).await }));
            }
            Step::Persisting => {
                // The end of a stream, or the result of a call, whichever the chance says.
                let by_result = chance.below(2) == 0;
                let began = match by_result {
                    true => self.send(seat, |key| vec![round(3, 0.0, vec![call(key, 0.8)]), last(key)]).await?,
                    false => self.send(seat, |key| vec![round(25, 25.0, vec![call(key, 0.05)]), last(key)]).await?,
                };
                scene.began(began);
                let at = if by_result { Step::Running } else { Step::Streaming };
                loop {
                    scene.look = self.arena.observer.turn(scene.turn.turn).await?;
                    if scene.is_at(at, &scene.look) {
                        break;
                    }
                    if scene.look.ended || Instant::now() > deadline {
                        return Ok(false);
                    }
                    sleep(LOOK_EVERY).await;
                }
                scene.hold = Some(self.arena.observer.hold_chat(seat.chat).await?);
            }
        }
        loop {
            if scene.check().await? {
                return Ok(true);
            }
            if scene.look.ended || Instant::now() > deadline {
                return Ok(false);
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

impl Scene<'_> {
    fn began(&mut self, turn: Accepted) {
        self.turn = turn.clone();
        self.turns.push(turn);
    }

    /// Looks anew; true: the step is there.
    pub async fn check(&mut self) -> Result<bool> {
        if let (Step::Persisting, Some(hold)) = (self.step, &self.hold) {
            let ports = self.stage.arena.observer.waiting_for(hold).await?;
            self.waiting = ports.iter().find_map(|port| self.stage.arena.role_by_port(*port));
            return Ok(!ports.is_empty());
        }
        self.look = self.stage.arena.observer.turn(self.turn.turn).await?;
        Ok(self.is_at(self.step, &self.look))
    }

    fn is_at(&self, step: Step, look: &TurnLook) -> bool {
        let any = |statuses: &[&str]| look.calls.iter().any(|call| statuses.contains(&call.status.as_str()));
        let marks = || Marks::read(&self.stage.host.root);
        !look.ended
            && match step {
                Step::Accepted => look.status == "queued" && look.fence == 0 && look.unseen && !look.older_open,
                Step::Queued => look.status == "queued" && look.older_open,
                Step::Streaming => look.live && self.seat.pieces(look.fence, self.turn.at).is_some(),
                Step::Dispatched => any(&["dispatched"]),
                Step::Running => any(&["running"]) && marks().has_begun(&self.turn.key),
                Step::Result => any(&["dispatched", "running"]) && marks().has_ended(&self.turn.key),
                Step::Approval => look.status == "waiting_approval" && !look.approvals_pending.is_empty(),
                Step::Persisting => false,
            }
    }

    /// The process of this kind that the step is in the hands of; any, where it is in nobody's.
    pub async fn victim(&self, process: Process, chance: &mut Chance) -> Result<Node> {
        let arena = &self.stage.arena;
        if let Some(server) = process.server() {
            return Ok(Node::Server(server));
        }
        if process == Process::Provider {
            return Ok(Node::Provider);
        }
        let waiting = self.waiting.clone().filter(|role| role.kind == process.name());
        let role = match process {
            Process::Daemon => Some(self.stage.host.role.clone()),
            _ if waiting.is_some() => waiting,
            Process::Api => arena.api_of(&self.stage.visitor),
            Process::Gateway => {
                let address = arena.observer.gateway_of(&self.stage.host.id).await?;
                address.and_then(|address| arena.role_at(&address))
            }
            Process::Worker => self.look.producer.as_deref().and_then(|address| arena.role_at(address)),
            Process::Nats | Process::Postgres | Process::Temporal | Process::Provider => None,
        };
        let any = arena.roles_of(process.name());
        Ok(Node::Role(role.unwrap_or_else(|| chance.pick(&any).clone())))
    }

    /// Calls that have begun and, asked after their daemon was killed, have not ended: it cannot know how they did.
    pub fn surely_cut_off(&self) -> impl Iterator<Item = Uuid> {
        let marks = Marks::read(&self.stage.host.root);
        let running = self.look.calls.iter().filter(|call| call.status == "running").cloned();
        running.filter_map(move |call| {
            let key = key_of(&call.input)?;
            (marks.begun.contains_key(&key) && !marks.ended.contains_key(&key)).then_some(call.id)
        })
    }

    /// Ends what made the step last.
    pub async fn let_go(&mut self) {
        self._far.clear();
        if let Some(hold) = self.hold.take() {
            hold.release().await;
        }
    }

    async fn give_up(mut self) -> Option<Self> {
        self.let_go().await;
        let patience = self.stage.conditions.patience(STEP_PATIENCE * 4);
        let _ = self.finish(&patience).await;
        None
    }

    /// Waits until all turns have ended, deciding what asks for it. Says what is missing.
    pub async fn finish(&mut self, patience: &Patience) -> Result<Vec<String>> {
        if let Some(sending) = self.sending.take() {
            let accepted = sending.await??;
            self.began(accepted);
        }
        let mut missing = Vec::new();
        for turn in &self.turns {
            loop {
                let soon = Instant::now() + Duration::from_millis(400);
                if let Some(status) = self.seat.ended(turn.turn, soon).await {
                    if status != pb::TurnStatus::Succeeded {
                        missing.push(format!("{}: the turn ended as {status:?}", turn.key));
                    }
                    break;
                }
                if self.step == Step::Approval
                    && let Ok(look) = self.stage.arena.observer.turn(turn.turn).await
                {
                    for approval in &look.approvals_pending {
                        // Asked for again at the next look.
                        let _ = self.seat.approve(&approval.to_string()).await;
                    }
                }
                if patience.is_over() {
                    let look = self.stage.arena.observer.turn(turn.turn).await;
                    let rows = look.map_or_else(|error| error.to_string(), |look| describe(&look));
                    missing.push(format!("{}: the viewer saw no end of turn {}; rows: {rows}", turn.key, turn.turn));
                    break;
                }
            }
        }
        Ok(missing)
    }
}

/// A turn in a line.
pub fn describe(look: &TurnLook) -> String {
    let calls: Vec<_> =
        look.calls.iter().map(|call| format!("{}.{}={}", call.iteration, call.index, call.status)).collect();
    format!(
        "{} iteration {} fence {} live {} unseen {} older {} calls [{}]",
        look.status,
        look.iteration,
        look.fence,
        look.live,
        look.unseen,
        look.older_open,
        calls.join(" ")
    )
}
