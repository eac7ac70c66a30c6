-- A burst is one durable activity that does all that can be done for a chat now. While one is open nobody signals the chat's
-- run: the worker that has it is told by a hint, and looks once more before it ends.
ALTER TABLE chats
    -- The worker with an open burst of the chat. It counts while that worker's heartbeat is fresh.
    ADD COLUMN burst_by      uuid,
    -- When the chat was last woken for what is wanted and unseen; `wanted_at` says since when it is.
    ADD COLUMN woken_at      timestamptz NOT NULL DEFAULT now(),
    -- How often the relay has woken it for that; each further time it waits longer.
    ADD COLUMN wake_attempts int NOT NULL DEFAULT 0;
-- Why a turn that is due does not move, as its person is told; empty while it does, or nobody watches.
ALTER TABLE turns ADD COLUMN standing text NOT NULL DEFAULT '';
DROP INDEX chats_unseen;
CREATE INDEX chats_unseen ON chats (woken_at) WHERE wanted > seen AND held_for IS NULL;
