-- The token with which this one was asked for: it is revoked with it, and ends no later.
ALTER TABLE api_tokens ADD COLUMN made_by uuid REFERENCES api_tokens;
CREATE INDEX api_tokens_made_by ON api_tokens (made_by) WHERE made_by IS NOT NULL;
