//! One cell after another: bring a chat to the step, do it, see that it hit, and that all comes right.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    chance::Chance,
    conditions::Conditions,
    matrix::{self, Cell, Kind, Process, Step},
    step::{Scene, Stage},
    tally::{Hit, Tally},
};

/// What a fault may delay a turn by; the slowest legal way is the relay's slow look.
const END_PATIENCE: Duration = Duration::from_secs(150);
/// Tries of one cell before another one is taken.
const TRIES: usize = 4;

/// Cells that are still to be done, shared by the lanes.
pub struct Work {
    cells: Mutex<Vec<(u64, Cell)>>,
    deadline: Instant,
}

impl Work {
    pub fn new(cells: Vec<Cell>, deadline: Instant) -> Self {
        let mut cells: Vec<_> = (0..).zip(cells).collect();
        cells.reverse();
        Self { cells: Mutex::new(cells), deadline }
    }

    /// The next cell, if there is one. While servers are spared, one that strikes none of them is taken first.
    fn next(&self, servers_spared: bool) -> Option<(u64, Cell)> {
        if self.is_over() {
            return None;
        }
        let mut cells = self.cells.lock();
        let spares = |(_, cell): &(u64, Cell)| cell.process.server().is_none();
        match cells.iter().rposition(spares).filter(|_| servers_spared) {
            Some(at) => Some(cells.remove(at)),
            None => cells.pop(),
        }
    }

    /// No fault may begin any more.
    fn is_over(&self) -> bool {
        Instant::now() >= self.deadline
    }

    pub fn left(&self) -> usize {
        self.cells.lock().len()
    }
}

pub async fn run(stage: &Stage, work: &Work, conditions: &Conditions, seed: u64, tally: &Arc<Tally>) {
    while let Some((number, cell)) = work.next(conditions.is_calm()) {
        let mut chance = Chance::new(seed, 1000 + number);
        let mut last_word = String::new();
        let mut done = false;
        for _ in 0..TRIES {
            if cell.process.server().is_some() {
                conditions.until_not_calm().await;
            }
            if work.is_over() {
                "time was over".clone_into(&mut last_word);
                break;
            }
            match play(stage, cell, &mut chance, tally).await {
                Ok(Played::Hit) => {
                    done = true;
                    break;
                }
                Ok(Played::Missed(why)) => last_word = why,
                Err(error) => {
                    last_word = format!("{error:#}");
                    // Another lane's fault stands in the way; let it pass.
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        }
        if !done {
            tally.missed(cell, last_word);
        }
    }
}

enum Played {
    Hit,
    Missed(String),
}

async fn play(stage: &Stage, cell: Cell, chance: &mut Chance, tally: &Arc<Tally>) -> anyhow::Result<Played> {
    let missed = |why: &str| Ok(Played::Missed(why.to_owned()));
    let Some(mut scene) = stage.bring(cell.step, cell.process, chance).await? else {
        return missed("the step passed too quickly");
    };
    let played = hit(stage, cell, &mut scene, chance, tally).await;
    scene.let_go().await;
    let missing = scene.finish(&stage.conditions.patience(END_PATIENCE)).await?;
    // The fault may last longer than the turn that it hit.
    let ended = Instant::now();
    let (strike_at, healing) = match played {
        Ok(Some(struck)) => struck,
        Ok(None) => return missed("the step had passed, or its process was busy with another fault"),
        Err(error) => return Err(error),
    };
    if let Some(healing) = healing {
        match healing.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tally.problem(format!("{cell}: healing failed: {error:#}")),
            Err(error) => tally.problem(format!("{cell}: healing failed: {error}")),
        }
    }
    for missing in &missing {
        tally.problem(format!("{cell}: {missing}"));
    }
    tally.settled(cell, ended.saturating_duration_since(strike_at));
    Ok(Played::Hit)
}

/// What a call that runs now must end as unknown by.
fn unknown_by(cell: &Cell) -> Option<&'static str> {
    match (cell.process, cell.kind, cell.step) {
        (Process::Daemon, Kind::Kill, Step::Running) => Some("process_died"),
        (Process::Daemon, Kind::LostJournal, Step::Running) => Some("journal_lost"),
        _ => None,
    }
}

type Struck = (Instant, Option<tokio::task::JoinHandle<anyhow::Result<()>>>);

/// Strikes; None where the step was not there any more, and the fault (if it was done) does not count.
async fn hit(
    stage: &Stage,
    cell: Cell,
    scene: &mut Scene<'_>,
    chance: &mut Chance,
    tally: &Arc<Tally>,
) -> anyhow::Result<Option<Struck>> {
    let node = scene.victim(cell.process, chance).await?;
    // It may have become calm since the lane began with this cell.
    if cell.process.server().is_some() && stage.conditions.is_calm() {
        return Ok(None);
    }
    let Some(claim) = stage.arena.claim(&node) else { return Ok(None) };
    if !scene.check().await? {
        return Ok(None);
    }
    let fault = matrix::fault(&cell, chance);
    let since = tally.wall_ms();
    let strike = stage.arena.strike(claim, &node, &fault).await?;
    let at = strike.at;
    let still = match cell.process {
        // Postgres cannot be asked while it is the one that is away, and rows may tell of a provider's end at once; the look
        // right before must do.
        Process::Postgres | Process::Provider => Ok(true),
        _ => scene.check().await,
    };
    let healing = tokio::spawn(strike.heal());
    let counts = matches!(still, Ok(true));
    if counts && let Some(cause) = unknown_by(&cell) {
        scene.surely_cut_off().for_each(|call| tally.expect_unknown(call, cause));
    }
    let hit = Hit { cell, node: node.peer().to_string(), counts, since_ms: since, fault };
    tally.hit(hit);
    if !counts {
        // Done, but it hit another step: it is healed, remembered for the checker, and not counted.
        let _ = healing.await;
        return Ok(None);
    }
    if matches!(cell.kind, Kind::Kill) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(Some((at, Some(healing))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn while_servers_are_spared_other_cells_come_first() {
        let cell = |process| Cell { process, kind: Kind::Kill, step: Step::Running };
        let cells = vec![cell(Process::Nats), cell(Process::Postgres), cell(Process::Api), cell(Process::Worker)];
        let work = Work::new(cells, Instant::now() + Duration::from_secs(60));
        let next = |spared| work.next(spared).map(|(number, cell)| (number, cell.process));
        assert_eq!(next(true), Some((2, Process::Api)));
        assert_eq!(next(false), Some((0, Process::Nats)));
        assert_eq!(next(true), Some((3, Process::Worker)));
        assert_eq!(next(true), Some((1, Process::Postgres)));
        assert_eq!(next(false), None);
        let late = Work::new(vec![cell(Process::Api)], Instant::now());
        assert_eq!(late.next(false), None);
    }
}
