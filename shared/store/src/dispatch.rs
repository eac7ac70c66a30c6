//! Sending calls. A dispatch's generation is durable before it leaves, so that whatever happens next is known for what it
//! is: once any generation was sent, only the daemon's journal says how the call ended.

use std::collections::HashMap;

use reliant_telemetry::TraceContext;
use reliant_types::{
    ChatId, Code, DaemonId, Failure, ToolCallId, TurnId, UserId, boxed,
    pb::{self, chat_event::Kind},
};
use uuid::Uuid;

use crate::{
    Committed, DispatchOrder, Result, Store, StoreError,
    chat_tx::{ChatTx, Key},
    decide::{Settlement, refused_again_after},
    drive::settle_call,
    rows::{CallRow, calls, clean, declarations},
    settle::{self, Ending},
};

/// A daemon's reason, as it is shown.
const WAITING_FOR_MAX_BYTES: usize = 500;

impl Store {
    /// Makes the next dispatch of these calls of one chat durable, all in one transaction: each would else wait for the
    /// chat's row, one behind the other. A call that is not to be sent now (it ended, waits for a person, or its daemon is
    /// away or without room) has no order, and the turn's next step says what is. `traces`: the contexts with which the
    /// calls leave, in the order of `calls`; a later dispatch links to them. A call that stands behind an open one of its
    /// message has no order either: decide.rs says which.
    #[boxed]
    pub async fn prepare_dispatches(
        &self,
        chat: ChatId,
        calls: &[ToolCallId],
        traces: &[TraceContext],
    ) -> Result<Committed<Vec<DispatchOrder>>> {
        self.run("prepare_dispatches", async || {
            let mut tx = ChatTx::open(self, Key::Chat(chat)).await?.ok_or(StoreError::not_found("chat"))?;
            let orders = prepare(&mut tx, calls, traces).await?;
            tx.commit(orders).await
        })
        .await
    }

    /// The daemon answered. STARTED and ATTACHED mark the call as running; TOMBSTONE ends it, and so does REFUSED
    /// unless the daemon has no room, or another journal.
    #[boxed]
    pub async fn dispatch_replied(
        &self,
        call: ToolCallId,
        generation: i64,
        reply: &pb::DispatchReply,
    ) -> Result<Committed<()>> {
        self.run("dispatch_replied", async || {
            let mut tx = ChatTx::open(self, Key::Call(call)).await?.ok_or(StoreError::not_found("tool call"))?;
            match reply.outcome() {
                pb::DispatchOutcome::Started | pb::DispatchOutcome::Attached => {
                    let now = tx.now;
                    let row = calls!(
                        UPDATE "status = 'running', started_at = COALESCE(c.started_at, $3)"
                        WHERE "c.id = $1 AND c.generation = $2 AND c.status = 'dispatched'",
                        call.0,
                        generation,
                        now
                    );
                    if let Some(row) = row.fetch_optional(tx.conn()).await? {
                        tx.event(Kind::ToolCallChanged(row.changed()));
                    }
                }
                pb::DispatchOutcome::Refused => refused(&mut tx, call, generation, reply).await?,
                pb::DispatchOutcome::Tombstone => buried(&mut tx, call, generation).await?,
                // The result is on its way.
                pb::DispatchOutcome::Finished | pb::DispatchOutcome::Unspecified => {}
            }
            tx.commit(()).await
        })
        .await
    }

    /// The daemon answered a cancel. A call that it had never seen has a tombstone there now, and will not run.
    #[boxed]
    pub async fn cancel_replied(
        &self,
        call: ToolCallId,
        generation: i64,
        reply: &pb::CancelReply,
    ) -> Result<Committed<()>> {
        self.run("cancel_replied", async || {
            let mut tx = ChatTx::open(self, Key::Call(call)).await?.ok_or(StoreError::not_found("tool call"))?;
            let row = open_call(&mut tx, call).await?;
            if let Some(row) =
                row.filter(|row| !reply.known && row.cancel_asked_at.is_some() && row.generation == generation)
            {
                // Only the journal that the call was sent to can say so.
                let same = sqlx::query_scalar!(
                    "SELECT id FROM daemons WHERE id = $1 AND incarnation = $2",
                    row.daemon_id,
                    row.incarnation
                )
                .fetch_optional(tx.conn())
                .await?;
                let ending =
                    if same.is_some() { Ending::cancelled() } else { Ending::unknown(pb::UnknownCause::JournalLost) };
                end(&mut tx, call, ending).await?;
            }
            tx.commit(()).await
        })
        .await
    }

    /// The dispatch of this generation reached nobody, for sure. A call that was never sent before waits for its daemon;
    /// the lease that promised the daemon is not believed until it is renewed.
    #[boxed]
    pub async fn daemon_away(&self, call: ToolCallId, generation: i64) -> Result<Committed<()>> {
        self.run("daemon_away", async || {
            // By itself: who connects a daemon locks its lease ahead of its chats, and this would do it the other way round.
            sqlx::query!(
                "UPDATE daemon_leases l SET expires_at = LEAST(l.expires_at, clock_timestamp()) FROM tool_calls c
                 WHERE c.id = $1 AND c.generation = $2 AND c.sent > 0 AND c.ended_at IS NULL
                   AND l.daemon_id = c.daemon_id AND l.granted_at < c.dispatched_at",
                call.0,
                generation,
            )
            .execute(&self.pool)
            .await?;
            let mut tx = ChatTx::open(self, Key::Call(call)).await?.ok_or(StoreError::not_found("tool call"))?;
            let before = open_call(&mut tx, call).await?;
            if !before.is_some_and(|row| row.generation == generation && row.sent > 0) {
                return tx.nothing(()).await;
            }
            let row = calls!(
                UPDATE "sent = sent - 1, status = CASE WHEN sent = 1 THEN 'waiting_daemon' ELSE c.status END,
                        incarnation = CASE WHEN sent = 1 THEN NULL ELSE incarnation END,
                        dispatched_at = CASE WHEN sent = 1 THEN NULL ELSE dispatched_at END"
                WHERE "c.id = $1",
                call.0
            )
            .fetch_one(tx.conn())
            .await?;
            tx.event(Kind::ToolCallChanged(row.changed()));
            tx.commit(()).await
        })
        .await
    }
}

async fn open_call(tx: &mut ChatTx, call: ToolCallId) -> Result<Option<CallRow>> {
    Ok(calls!(SELECT "WHERE c.id = $1 AND c.ended_at IS NULL", call.0).fetch_optional(tx.conn()).await?)
}

/// Ends the call, and wakes its chat.
async fn end(tx: &mut ChatTx, call: ToolCallId, ending: Ending) -> Result<()> {
    if let Some(row) = settle::end_call(tx, call, ending).await? {
        settle::close_round_of(tx, &row).await?;
        tx.want(&row.traceparent);
    }
    Ok(())
}

/// To whom calls go: the daemon, its journal, and the root.
type Target = (Uuid, Uuid, String);

async fn prepare(tx: &mut ChatTx, calls: &[ToolCallId], traces: &[TraceContext]) -> Result<Vec<DispatchOrder>> {
    let ids: Vec<Uuid> = calls.iter().map(|call| call.0).collect();
    let rows = calls!(
        SELECT "WHERE c.id = ANY($1) AND c.chat_id = $2 AND c.ended_at IS NULL
                  AND (c.sent > 0 OR NOT EXISTS (
                      SELECT FROM tool_calls b WHERE b.turn_id = c.turn_id AND b.iteration = c.iteration AND b.index < c.index
                        AND b.ended_at IS NULL AND NOT (b.read_only AND c.read_only)))
                ORDER BY t.ordinal, c.iteration, c.index",
        &ids,
        tx.chat.id
    )
    .fetch_all(tx.conn())
    .await?;
    let now = tx.now;
    let due = |row: &CallRow| {
        let waits = matches!(row.status.as_str(), "pending" | "waiting_daemon" | "dispatched" | "running");
        waits && !row.turn_ended && row.cancel_asked_at.is_none() && row.not_before.is_none_or(|at| at <= now)
    };
    let rows: Vec<CallRow> = rows.into_iter().filter(due).collect();
    let of_chat = tx.chat.daemon_id;
    let chosen = |row: &CallRow| if row.sent > 0 { row.daemon_id } else { of_chat };
    let wanted: Vec<Uuid> = rows.iter().filter_map(chosen).collect();
    let daemons = sqlx::query!(
        r#"SELECT d.id, d.incarnation, CASE WHEN $2 THEN d.declarations END AS declarations, COALESCE(l.expires_at > clock_timestamp(), false) AS "here!"
           FROM daemons d LEFT JOIN daemon_leases l ON l.daemon_id = d.id WHERE d.id = ANY($1) AND d.revoked_at IS NULL"#,
        &wanted,
        tx.chat.root_id.is_empty(),
    )
    .fetch_all(&mut *tx.conn())
    .await?;
    let (mut waiting, mut settled) = (Vec::new(), Vec::new());
    // Nearly always one target; the calls of a chat that changed its daemon may have two.
    let mut sending: Vec<(Target, Vec<Uuid>, Vec<String>)> = Vec::new();
    for row in &rows {
        let sent = row.sent > 0;
        let Some(daemon) = daemons.iter().find(|daemon| Some(daemon.id) == chosen(row)) else {
            settled.push((row.id, if sent { Settlement::DaemonAway } else { Settlement::NoDaemon }));
            continue;
        };
        let Some(journal) = daemon.incarnation.filter(|_| daemon.here) else {
            let told = row.status == "waiting_daemon" && row.daemon_id == Some(daemon.id);
            if !sent && !told {
                waiting.push(row.id);
            }
            continue;
        };
        if sent && row.incarnation != Some(journal) {
            settled.push((row.id, if row.repeatable { Settlement::Again } else { Settlement::JournalLost }));
            continue;
        }
        let root = match (sent, tx.chat.root_id.is_empty()) {
            (true, _) => row.root_id.clone(),
            (false, false) => tx.chat.root_id.clone(),
            (false, true) => {
                let declared = declarations(daemon.declarations.as_deref().unwrap_or_default());
                declared.roots.into_iter().next().map(|root| root.id).unwrap_or_default()
            }
        };
        let target = (daemon.id, journal, clean(&root));
        let place = calls.iter().position(|call| call.0 == row.id);
        let trace =
            place.and_then(|place| traces.get(place)).map(|trace| trace.traceparent.clone()).unwrap_or_default();
        match sending.iter_mut().find(|(known, ..)| *known == target) {
            Some((_, ids, traces)) => {
                ids.push(row.id);
                traces.push(trace);
            }
            None => sending.push((target, vec![row.id], vec![trace])),
        }
    }
    for (call, settlement) in settled {
        settle_call(tx, ToolCallId(call), settlement).await?;
    }
    if !waiting.is_empty() {
        let rows = calls!(
            UPDATE "status = 'waiting_daemon', daemon_id = $2" WHERE "c.id = ANY($1)",
            &waiting,
            of_chat
        )
        .fetch_all(tx.conn())
        .await?;
        log(tx, rows);
    }
    let mut replaced = sent_before(tx, &rows).await?;
    let mut orders = Vec::new();
    for (target, ids, traces) in sending {
        orders.extend(send(tx, target, &ids, &traces).await?);
    }
    for order in &mut orders {
        order.replaces = replaced.remove(&order.call.call_id).unwrap_or_default();
    }
    Ok(orders)
}

/// Logs changed calls in the order in which the model made them.
fn log(tx: &mut ChatTx, mut rows: Vec<CallRow>) -> Vec<CallRow> {
    rows.sort_by_key(|row| (row.turn_ordinal, row.iteration, row.index));
    for row in &rows {
        tx.event(Kind::ToolCallChanged(row.changed()));
    }
    rows
}

/// The spans with which calls left before; hardly ever there are any.
async fn sent_before(tx: &mut ChatTx, rows: &[CallRow]) -> Result<HashMap<String, TraceContext>> {
    let again: Vec<Uuid> = rows.iter().filter(|row| row.generation > 0).map(|row| row.id).collect();
    if again.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = sqlx::query!("SELECT id, dispatch_trace FROM tool_calls WHERE id = ANY($1)", &again)
        .fetch_all(tx.conn())
        .await?;
    let trace = |text: &str| TraceContext::from_traceparent(text);
    Ok(rows.iter().map(|row| (row.id.to_string(), trace(&row.dispatch_trace))).collect())
}

async fn send(tx: &mut ChatTx, target: Target, ids: &[Uuid], traces: &[String]) -> Result<Vec<DispatchOrder>> {
    let (now, (daemon, journal, root)) = (tx.now, target);
    let rows = calls!(
        UPDATE "generation = generation + 1, sent = sent + 1, daemon_id = $2, incarnation = $3, root_id = $4, dispatched_at = $5,
                not_before = NULL, waiting_for = '', dispatch_trace = COALESCE(($6::text[])[array_position($1, c.id)], ''),
                status = CASE WHEN c.status = 'running' THEN c.status ELSE 'dispatched' END"
        WHERE "c.id = ANY($1)",
        ids,
        daemon,
        journal,
        root,
        now,
        traces,
    )
    .fetch_all(tx.conn())
    .await?;
    let rows = log(tx, rows);
    let order = |row: CallRow| DispatchOrder {
        call: pb::Dispatch {
            call_id: row.id.to_string(),
            generation: row.generation,
            chat_id: row.chat_id.to_string(),
            user_id: tx.chat.user_id.to_string(),
            incarnation: journal.to_string(),
            root_id: row.root_id,
            tool: row.tool,
            input_json: row.input,
            timeout_ms: row.timeout_ms,
            turn_id: row.turn_id.to_string(),
            iteration: row.iteration,
            index: row.index,
            dispatched_at_ms: now.timestamp_millis(),
        },
        daemon: DaemonId(daemon),
        chat: tx.chat.chat(),
        user: UserId(tx.chat.user_id),
        turn: TurnId(row.turn_id),
        traceparent: row.traceparent,
        replaces: TraceContext::default(),
    };
    Ok(rows.into_iter().map(order).collect())
}

/// The journal started nothing, and has nothing of this call.
async fn refused(tx: &mut ChatTx, call: ToolCallId, generation: i64, reply: &pb::DispatchReply) -> Result<()> {
    let Some(row) = open_call(tx, call).await?.filter(|row| row.generation == generation && row.sent > 0) else {
        return Ok(());
    };
    let other =
        !reply.incarnation.is_empty() && row.incarnation.is_some_and(|own| own.to_string() != reply.incarnation);
    let code = Code::parse(&reply.error_code);
    if !other && matches!(code, Code::QueueFull | Code::JournalFull) {
        return no_room(tx, &row, reply).await;
    }
    if !other {
        let text = if reply.message.is_empty() { "The daemon refused the call." } else { reply.message.as_str() };
        return end(tx, call, Ending::failed(&Failure::new(code, clean(text)))).await;
    }
    // Two streams of one daemon may overlap: that another journal refused it does not say that its own never got it.
    if !row.repeatable {
        return end(tx, call, Ending::unknown(pb::UnknownCause::JournalLost)).await;
    }
    let row = calls!(
        UPDATE "status = 'pending', sent = 0, incarnation = NULL, dispatched_at = NULL" WHERE "c.id = $1",
        call.0
    )
    .fetch_one(tx.conn())
    .await?;
    tx.event(Kind::ToolCallChanged(row.changed()));
    tx.want(&row.traceparent);
    Ok(())
}

/// The daemon has no room now, and did nothing with this generation. The call is sent again, later each time, for as long
/// as its turn may take; whoever asked for the dispatch looks at the chat next, and a relay does if that one dies.
async fn no_room(tx: &mut ChatTx, row: &CallRow, reply: &pb::DispatchReply) -> Result<()> {
    let salt = row.id.as_u128() ^ row.generation.unsigned_abs() as u128;
    let again = tx.now + refused_again_after(row.refusals, salt);
    let reason = if reply.message.is_empty() { "the daemon has no room for the call" } else { reply.message.as_str() };
    let row = calls!(
        UPDATE "refusals = refusals + 1, not_before = $2, waiting_for = $3, sent = sent - 1,
                status = CASE WHEN sent = 1 THEN 'pending' ELSE c.status END,
                incarnation = CASE WHEN sent = 1 THEN NULL ELSE incarnation END,
                dispatched_at = CASE WHEN sent = 1 THEN NULL ELSE dispatched_at END"
        WHERE "c.id = $1",
        row.id,
        again,
        clean(&reason[..reason.floor_char_boundary(WAITING_FOR_MAX_BYTES)]),
    )
    .fetch_one(tx.conn())
    .await?;
    tx.event(Kind::ToolCallChanged(row.changed()));
    Ok(())
}

/// The journal has buried this generation: it was cancelled, or trimmed long ago.
async fn buried(tx: &mut ChatTx, call: ToolCallId, generation: i64) -> Result<()> {
    let Some(row) = open_call(tx, call).await?.filter(|row| row.generation == generation) else { return Ok(()) };
    let ending = match row.cancel_asked_at {
        Some(_) => Ending::cancelled(),
        None => Ending::unknown(pb::UnknownCause::JournalLost),
    };
    end(tx, call, ending).await
}
