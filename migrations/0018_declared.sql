-- Grows with each change of what the daemon declares, so that a worker reads it once.
ALTER TABLE daemons ADD COLUMN declared bigint NOT NULL DEFAULT 0;
