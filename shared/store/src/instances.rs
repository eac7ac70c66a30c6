//! Running processes, as they say of themselves.

use crate::{Heartbeat, Result, Store};
use reliant_types::boxed;

impl Store {
    #[boxed]
    pub async fn heartbeat_instance(&self, beat: &Heartbeat) -> Result<()> {
        self.run("heartbeat_instance", async || {
            sqlx::query!(
                "INSERT INTO instances (id, role, version, address, load, drain_state) VALUES ($1, $2, $3, $4, $5, $6)
                 ON CONFLICT (id) DO UPDATE SET address = EXCLUDED.address, load = EXCLUDED.load,
                     drain_state = EXCLUDED.drain_state, seen_at = now()",
                beat.id.0,
                beat.role,
                beat.version,
                beat.address,
                beat.load,
                if beat.draining { "draining" } else { "serving" },
            )
            .execute(&self.pool)
            .await?;
            Ok(())
        })
        .await
    }
}
