-- For measuring alone; nothing is decided by these.

-- When a worker last looked at the chat because something was wanted: a turn's wait before that is the wake's, after it the
-- worker's.
ALTER TABLE chats ADD COLUMN looked_at timestamptz;

-- Trace context of the newest model attempt, so that the one that takes over can link to it.
ALTER TABLE turns ADD COLUMN attempt_trace text NOT NULL DEFAULT '';
