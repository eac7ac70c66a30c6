-- An outcome that cannot be known says why, from a closed list; no other state has a cause.
UPDATE tool_calls SET unknown_cause = 'process_died' WHERE status = 'outcome_unknown' AND unknown_cause = '';
UPDATE tool_calls SET unknown_cause = '' WHERE status <> 'outcome_unknown' AND unknown_cause <> '';
ALTER TABLE tool_calls
    ADD CONSTRAINT tool_calls_unknown_cause_known
        CHECK (unknown_cause IN ('', 'process_died', 'journal_lost', 'daemon_away')),
    ADD CONSTRAINT tool_calls_unknown_has_cause
        CHECK ((status = 'outcome_unknown') = (unknown_cause <> ''));
