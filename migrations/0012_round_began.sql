-- When the round under way was taken up for the first time: what passed since then until the attempt that succeeds was lost
-- with attempts that failed or died. For measuring alone.
ALTER TABLE turns ADD COLUMN round_began_at timestamptz;
