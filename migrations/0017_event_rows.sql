-- The message or the call whose row holds the rest of the event. Events of before hold all of it themselves.
ALTER TABLE events ADD COLUMN about uuid;
ALTER TABLE user_events ADD COLUMN about uuid;
