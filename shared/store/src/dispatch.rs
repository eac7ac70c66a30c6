//! Sending calls. A dispatch's generation is durable before it leaves, so that whatever happens next is known for what it
//! is: once any generation was sent, only the daemon's journal says how the call ended.

use reliant_types::{
    Code, DaemonId, Failure, ToolCallId, TurnId, UserId,
    pb::{self, chat_event::Kind},
};

use crate::{
    Committed, DispatchOrder, Result, Store, StoreError,
    chat_tx::{ChatTx, Key},
    decide::Settlement,
    drive::settle_call,
    rows::{CallRow, calls, clean, declarations},
    settle::{self, Ending},
};

impl Store {
    /// Makes the next dispatch of the call durable. None: it is not to be sent now (it ended, waits for a person, or its
    /// daemon is away), and the turn's next step says what is.
    pub async fn prepare_dispatch(&self, call: ToolCallId) -> Result<Committed<Option<DispatchOrder>>> {
        self.run("prepare_dispatch", async || {
            let mut tx = ChatTx::open(self, Key::Call(call)).await?.ok_or(StoreError::not_found("tool call"))?;
            let order = prepare(&mut tx, call).await?;
            tx.commit(order).await
        })
        .await
    }

    /// The daemon answered. STARTED and ATTACHED mark the call as running; REFUSED and TOMBSTONE end it.
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
    pub async fn daemon_away(&self, call: ToolCallId, generation: i64) -> Result<Committed<()>> {
        self.run("daemon_away", async || {
            let mut tx = ChatTx::open(self, Key::Call(call)).await?.ok_or(StoreError::not_found("tool call"))?;
            let before = open_call(&mut tx, call).await?;
            let Some(before) = before.filter(|row| row.generation == generation && row.sent > 0) else {
                return tx.nothing(()).await;
            };
            sqlx::query!(
                "UPDATE daemon_leases SET expires_at = LEAST(expires_at, clock_timestamp())
                 WHERE daemon_id = $1 AND granted_at < $2",
                before.daemon_id,
                before.dispatched_at,
            )
            .execute(tx.conn())
            .await?;
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

async fn prepare(tx: &mut ChatTx, call: ToolCallId) -> Result<Option<DispatchOrder>> {
    let Some(row) = open_call(tx, call).await? else { return Ok(None) };
    let waits = matches!(row.status.as_str(), "pending" | "waiting_daemon" | "dispatched" | "running");
    if row.turn_ended || row.cancel_asked_at.is_some() || !waits {
        return Ok(None);
    }
    let sent = row.sent > 0;
    let chosen = if sent { row.daemon_id } else { tx.chat.daemon_id };
    let daemon = sqlx::query!(
        r#"SELECT d.id, d.incarnation, d.declarations, COALESCE(l.expires_at > clock_timestamp(), false) AS "here!"
           FROM daemons d LEFT JOIN daemon_leases l ON l.daemon_id = d.id WHERE d.id = $1 AND d.revoked_at IS NULL"#,
        chosen,
    )
    .fetch_optional(tx.conn())
    .await?;
    let Some(daemon) = daemon else {
        let settlement = if sent { Settlement::DaemonAway } else { Settlement::NoDaemon };
        settle_call(tx, call, settlement).await?;
        return Ok(None);
    };
    let Some(journal) = daemon.incarnation.filter(|_| daemon.here) else {
        if !sent {
            wait_for(tx, &row, daemon.id).await?;
        }
        return Ok(None);
    };
    if sent && row.incarnation != Some(journal) {
        let settlement = if row.repeatable { Settlement::Again } else { Settlement::JournalLost };
        settle_call(tx, call, settlement).await?;
        return Ok(None);
    }
    let root = match (sent, tx.chat.root_id.is_empty()) {
        (true, _) => row.root_id.clone(),
        (false, false) => tx.chat.root_id.clone(),
        (false, true) => {
            declarations(&daemon.declarations).roots.into_iter().next().map(|root| root.id).unwrap_or_default()
        }
    };
    let now = tx.now;
    let row = calls!(
        UPDATE "generation = generation + 1, sent = sent + 1, daemon_id = $2, incarnation = $3, root_id = $4, dispatched_at = $5,
                status = CASE WHEN c.status = 'running' THEN c.status ELSE 'dispatched' END"
        WHERE "c.id = $1",
        call.0,
        daemon.id,
        journal,
        clean(&root),
        now,
    )
    .fetch_one(tx.conn())
    .await?;
    tx.event(Kind::ToolCallChanged(row.changed()));
    let dispatch = pb::Dispatch {
        call_id: row.id.to_string(),
        generation: row.generation,
        chat_id: row.chat_id.to_string(),
        user_id: tx.chat.user_id.to_string(),
        incarnation: journal.to_string(),
        root_id: row.root_id.clone(),
        tool: row.tool.clone(),
        input_json: row.input.clone(),
        timeout_ms: row.timeout_ms,
        turn_id: row.turn_id.to_string(),
        iteration: row.iteration,
        index: row.index,
    };
    Ok(Some(DispatchOrder {
        call: dispatch,
        daemon: DaemonId(daemon.id),
        chat: tx.chat.chat(),
        user: UserId(tx.chat.user_id),
        turn: TurnId(row.turn_id),
        traceparent: row.traceparent,
    }))
}

async fn wait_for(tx: &mut ChatTx, call: &CallRow, daemon: uuid::Uuid) -> Result<()> {
    if call.status == "waiting_daemon" && call.daemon_id == Some(daemon) {
        return Ok(());
    }
    let row = calls!(
        UPDATE "status = 'waiting_daemon', daemon_id = $2" WHERE "c.id = $1",
        call.id,
        daemon
    )
    .fetch_one(tx.conn())
    .await?;
    tx.event(Kind::ToolCallChanged(row.changed()));
    Ok(())
}

/// The journal started nothing, and has nothing of this call.
async fn refused(tx: &mut ChatTx, call: ToolCallId, generation: i64, reply: &pb::DispatchReply) -> Result<()> {
    let Some(row) = open_call(tx, call).await?.filter(|row| row.generation == generation && row.sent > 0) else {
        return Ok(());
    };
    let other =
        !reply.incarnation.is_empty() && row.incarnation.is_some_and(|own| own.to_string() != reply.incarnation);
    if !other {
        let code = Code::parse(&reply.error_code);
        let text = if reply.message.is_empty() { "The daemon refused the call." } else { reply.message.as_str() };
        return end(tx, call, Ending::failed(&Failure::new(code, clean(text)))).await;
    }
    if row.sent > 1 && !row.repeatable {
        return end(tx, call, Ending::unknown(pb::UnknownCause::JournalLost)).await;
    }
    // The journal it was meant for never got it: it may go to this one.
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

/// The journal has buried this generation: it was cancelled, or trimmed long ago.
async fn buried(tx: &mut ChatTx, call: ToolCallId, generation: i64) -> Result<()> {
    let Some(row) = open_call(tx, call).await?.filter(|row| row.generation == generation) else { return Ok(()) };
    let ending = match row.cancel_asked_at {
        Some(_) => Ending::cancelled(),
        None => Ending::unknown(pb::UnknownCause::JournalLost),
    };
    end(tx, call, ending).await
}
