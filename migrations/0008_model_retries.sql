-- A model that cannot answer now is asked again until the turn's deadline, later each time; the wait is a row and not a
-- process that waits.
ALTER TABLE turns
    -- Failures of the round under way that were waited for.
    ADD COLUMN retries       int NOT NULL DEFAULT 0,
    -- The model is not asked before then; null while it is asked, and where nothing is awaited.
    ADD COLUMN retry_at      timestamptz,
    -- What it said last, as a code and a sentence: for people, and for the turn's end at its deadline.
    ADD COLUMN retry_code    text NOT NULL DEFAULT '',
    ADD COLUMN retry_message text NOT NULL DEFAULT '';

CREATE INDEX turns_retry ON turns (retry_at) WHERE retry_at IS NOT NULL AND ended_at IS NULL;
