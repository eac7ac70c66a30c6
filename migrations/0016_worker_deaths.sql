-- Whether the round's attempt is at work on what others wrote, which might end its worker, and how often its worker ended
-- just then. Only an attempt that replaces another one is marked.
ALTER TABLE turns
    ADD COLUMN suspect boolean NOT NULL DEFAULT false,
    ADD COLUMN worker_deaths int NOT NULL DEFAULT 0;
