-- Model calls are shared out between users: a round's place is taken before its model is called and given back when its
-- message is committed. What has no place is held, and wakes nobody.
ALTER TABLE turns
    -- The round under way, or due, has a place since then.
    ADD COLUMN placed_at timestamptz,
    -- The round that is due has waited for a place since then.
    ADD COLUMN held_at   timestamptz,
    -- How long the round that is due had waited. For measuring alone.
    ADD COLUMN held_ms   bigint NOT NULL DEFAULT 0;
CREATE INDEX turns_placed ON turns (user_id) WHERE placed_at IS NOT NULL AND ended_at IS NULL;

-- The chat's oldest open turn waits for a place; when that turn was accepted, which is its place in the row.
ALTER TABLE chats ADD COLUMN held_for timestamptz;
CREATE INDEX chats_held ON chats (user_id, held_for, id) WHERE held_for IS NOT NULL;
-- The relay passes over held chats: they are woken when they get their place.
DROP INDEX chats_unseen;
CREATE INDEX chats_unseen ON chats (wanted_at) WHERE wanted > seen AND held_for IS NULL;

-- Whether a user may take a place without standing in line. The first one always: the reserve above `room` is for it.
-- `room`: places of all users, null where it is not known. `share`: of one user while somebody waits. `most`: of one user
-- at any time.
CREATE FUNCTION place_is_free(person uuid, room bigint, share bigint, most bigint) RETURNS boolean
    LANGUAGE plpgsql STABLE AS $$
DECLARE
    mine bigint;
BEGIN
    SELECT count(*) INTO mine FROM (
        SELECT FROM turns t WHERE t.user_id = person AND t.placed_at IS NOT NULL AND t.ended_at IS NULL LIMIT most) q;
    IF mine = 0 THEN
        RETURN true;
    ELSIF mine >= most THEN
        RETURN false;
    ELSIF room IS NULL THEN
        RETURN true;
    ELSIF mine >= share AND EXISTS (SELECT FROM chats c WHERE c.held_for IS NOT NULL) THEN
        RETURN false;
    END IF;
    RETURN room > (SELECT count(*) FROM (
        SELECT FROM turns t WHERE t.placed_at IS NOT NULL AND t.ended_at IS NULL LIMIT room) q);
END
$$;
