-- A daemon that has no room refuses a call, which is then sent again, later each time.
ALTER TABLE tool_calls
    ADD COLUMN refusals    int NOT NULL DEFAULT 0,
    -- Not to be sent before then.
    ADD COLUMN not_before  timestamptz,
    -- Why it is not sent yet, for people.
    ADD COLUMN waiting_for text NOT NULL DEFAULT '';
