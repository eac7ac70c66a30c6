-- The state of reliant. Postgres is right about what was accepted and committed.
-- Every entity change writes its event row in the same transaction; the counter on the chat's (or user's) row is taken
-- last, so that the log is contiguous.

CREATE TABLE log_state (
    only_row  boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    -- Bumped when a standby is promoted; a cursor of another epoch is answered by a snapshot.
    log_epoch bigint NOT NULL DEFAULT 1
);
INSERT INTO log_state DEFAULT VALUES;

CREATE TABLE users (
    id         uuid PRIMARY KEY,
    -- The JWT's subject.
    subject    text NOT NULL UNIQUE,
    name       text NOT NULL,
    role       text NOT NULL DEFAULT 'member' CHECK (role IN ('member', 'admin')),
    feed_seq   bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE daemons (
    id           uuid PRIMARY KEY,
    user_id      uuid NOT NULL REFERENCES users,
    name         text NOT NULL,
    -- The journal's random id, as last said by the daemon.
    incarnation  uuid,
    -- Counts processes; a lease orders by it.
    instance     bigint NOT NULL DEFAULT 0,
    hostname     text NOT NULL DEFAULT '',
    os           text NOT NULL DEFAULT '',
    version      text NOT NULL DEFAULT '',
    -- The protobuf Declarations: roots and tools, as last said by the daemon.
    declarations bytea NOT NULL DEFAULT '',
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz,
    revoked_at   timestamptz
);
CREATE UNIQUE INDEX daemons_name ON daemons (user_id, name) WHERE revoked_at IS NULL;

CREATE TABLE daemon_leases (
    daemon_id  uuid PRIMARY KEY REFERENCES daemons,
    instance   bigint NOT NULL,
    -- The nil UUID once the lease was given back.
    gateway_id uuid NOT NULL,
    -- Counts the daemon's leases.
    epoch      bigint NOT NULL,
    -- Both by this database's clock.
    granted_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    -- The user's feed was told that the daemon is away.
    said_away  boolean NOT NULL DEFAULT false
);
CREATE INDEX daemon_leases_unsaid ON daemon_leases (expires_at) WHERE NOT said_away;
CREATE INDEX daemon_leases_gateway ON daemon_leases (gateway_id);

CREATE TABLE api_tokens (
    id           uuid PRIMARY KEY,
    user_id      uuid NOT NULL REFERENCES users,
    -- Set for a daemon's token.
    daemon_id    uuid REFERENCES daemons,
    name         text NOT NULL,
    -- SHA-256 of the secret, which has 256 bits of entropy.
    hash         bytea NOT NULL UNIQUE,
    prefix       text NOT NULL,
    scopes       text[] NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    last_used_at timestamptz,
    revoked_at   timestamptz
);
CREATE INDEX api_tokens_user ON api_tokens (user_id);
CREATE INDEX api_tokens_revoked ON api_tokens (revoked_at) WHERE revoked_at IS NOT NULL;

CREATE TABLE login_codes (
    hash       bytea PRIMARY KEY,
    user_id    uuid NOT NULL REFERENCES users,
    expires_at timestamptz NOT NULL,
    used_at    timestamptz
);

CREATE TABLE projects (
    id          uuid PRIMARY KEY,
    user_id     uuid NOT NULL REFERENCES users,
    name        text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    archived_at timestamptz
);
CREATE UNIQUE INDEX projects_name ON projects (user_id, name) WHERE archived_at IS NULL;

CREATE TABLE worktrees (
    id         uuid PRIMARY KEY,
    project_id uuid NOT NULL REFERENCES projects,
    daemon_id  uuid NOT NULL REFERENCES daemons,
    root_id    text NOT NULL,
    path       text NOT NULL,
    branch     text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    removed_at timestamptz
);

CREATE TABLE chats (
    id           uuid PRIMARY KEY,
    user_id      uuid NOT NULL REFERENCES users,
    project_id   uuid REFERENCES projects,
    worktree_id  uuid REFERENCES worktrees,
    daemon_id    uuid REFERENCES daemons,
    root_id      text NOT NULL DEFAULT '',
    title        text NOT NULL,
    model        text NOT NULL,
    mode         text NOT NULL CHECK (mode IN ('ask', 'auto', 'plan')),
    last_seq     bigint NOT NULL DEFAULT 0,
    last_ordinal int NOT NULL DEFAULT 0,
    -- Wake counters: something to do was recorded (wanted), a worker has looked since (seen).
    wanted       bigint NOT NULL DEFAULT 0,
    seen         bigint NOT NULL DEFAULT 0,
    wanted_at    timestamptz NOT NULL DEFAULT now(),
    -- When the relay last woke the chat because something in it is open.
    relayed_at   timestamptz NOT NULL DEFAULT now(),
    forked_from  uuid REFERENCES chats,
    forked_at    int,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    archived_at  timestamptz
) WITH (fillfactor = 80);
CREATE INDEX chats_user ON chats (user_id, updated_at DESC, id);
CREATE INDEX chats_unseen ON chats (wanted_at) WHERE wanted > seen;

CREATE TABLE turns (
    id               uuid PRIMARY KEY,
    chat_id          uuid NOT NULL REFERENCES chats,
    user_id          uuid NOT NULL REFERENCES users,
    message_id       uuid NOT NULL,
    -- Place among the chat's turns, from 1.
    ordinal          int NOT NULL,
    status           text NOT NULL CHECK (status IN ('queued', 'running', 'waiting_approval', 'waiting_daemon',
                                                     'succeeded', 'failed', 'cancelled')),
    -- Model rounds that are stored; the next one, which may be under way, has this number.
    iteration        int NOT NULL DEFAULT 0,
    -- Epoch of the newest model attempt. Every write of an attempt requires it.
    fence            bigint NOT NULL DEFAULT 0,
    -- The message of the round under way, the same for all its attempts, and who writes it; null between rounds.
    live_message_id  uuid,
    producer         uuid,
    -- Stored before anything is woken: a relay continues the same trace.
    traceparent      text NOT NULL DEFAULT '',
    model            text NOT NULL,
    mode             text NOT NULL,
    -- Set while the clock runs; while a person or a daemon is awaited the rest is in deadline_left_ms.
    deadline_at      timestamptz,
    deadline_left_ms bigint NOT NULL,
    cancel_requested boolean NOT NULL DEFAULT false,
    error_code       text NOT NULL DEFAULT '',
    error_message    text NOT NULL DEFAULT '',
    usage            jsonb NOT NULL DEFAULT '{}',
    created_at       timestamptz NOT NULL DEFAULT now(),
    started_at       timestamptz,
    ended_at         timestamptz,
    UNIQUE (chat_id, ordinal)
) WITH (fillfactor = 80);
CREATE INDEX turns_open ON turns (chat_id, ordinal) WHERE ended_at IS NULL;
CREATE INDEX turns_user_open ON turns (user_id) WHERE ended_at IS NULL;

CREATE TABLE messages (
    id                uuid PRIMARY KEY,
    chat_id           uuid NOT NULL REFERENCES chats,
    turn_id           uuid REFERENCES turns,
    ordinal           int NOT NULL,
    -- The turn's ordinal. A message sent while a turn runs is younger in the chat's order, but comes after that turn
    -- in the history that a model reads.
    turn_ordinal      int NOT NULL,
    role              text NOT NULL CHECK (role IN ('user', 'assistant', 'tool', 'notice')),
    iteration         int,
    model             text NOT NULL DEFAULT '',
    usage             jsonb,
    stop_reason       text NOT NULL DEFAULT '',
    client_message_id text,
    -- Plain text of the message, for search.
    body              text NOT NULL DEFAULT '',
    search            tsvector GENERATED ALWAYS AS (to_tsvector('simple', left(body, 100000))) STORED,
    created_at        timestamptz NOT NULL DEFAULT now(),
    UNIQUE (chat_id, ordinal),
    UNIQUE (chat_id, client_message_id)
);
CREATE INDEX messages_history ON messages (chat_id, turn_ordinal, ordinal);
CREATE UNIQUE INDEX messages_round ON messages (turn_id, iteration, role) WHERE role IN ('assistant', 'tool');
CREATE INDEX messages_search ON messages USING gin (search);

CREATE TABLE content_blocks (
    message_id uuid NOT NULL REFERENCES messages,
    position   int NOT NULL,
    kind       text NOT NULL CHECK (kind IN ('text', 'thinking', 'tool_use', 'tool_result', 'image')),
    -- The protobuf ContentBlock.
    data       bytea NOT NULL,
    PRIMARY KEY (message_id, position)
);

CREATE TABLE attachments (
    id         uuid PRIMARY KEY,
    user_id    uuid NOT NULL REFERENCES users,
    chat_id    uuid NOT NULL REFERENCES chats,
    media_type text NOT NULL,
    data       bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tool_calls (
    id              uuid PRIMARY KEY,
    chat_id         uuid NOT NULL REFERENCES chats,
    turn_id         uuid NOT NULL REFERENCES turns,
    user_id         uuid NOT NULL REFERENCES users,
    message_id      uuid NOT NULL REFERENCES messages DEFERRABLE INITIALLY DEFERRED,
    iteration       int NOT NULL,
    index           int NOT NULL,
    -- The id the provider gave the call, sent back with its result.
    provider_id     text NOT NULL DEFAULT '',
    tool            text NOT NULL,
    input           text NOT NULL,
    read_only       boolean NOT NULL,
    -- One of reliant's own read-only tools: may run again by itself.
    repeatable      boolean NOT NULL DEFAULT false,
    status          text NOT NULL CHECK (status IN ('pending', 'waiting_approval', 'waiting_daemon', 'dispatched',
                                                    'running', 'succeeded', 'failed', 'cancelled', 'timed_out',
                                                    'outcome_unknown')),
    -- Counts dispatches; durable before each.
    generation      bigint NOT NULL DEFAULT 0,
    -- Generations that may have reached the daemon. Above 0 only its journal knows what ran.
    sent            bigint NOT NULL DEFAULT 0,
    -- The daemon it was sent to, or that it waits for, and that one's journal.
    daemon_id       uuid REFERENCES daemons,
    incarnation     uuid,
    root_id         text NOT NULL DEFAULT '',
    timeout_ms      bigint NOT NULL,
    dispatched_at   timestamptz,
    -- A cancel was asked; the call settles behind its turn.
    cancel_asked_at timestamptz,
    cancel_sent_at  timestamptz,
    unknown_cause   text NOT NULL DEFAULT '',
    result          text NOT NULL DEFAULT '',
    is_error        boolean NOT NULL DEFAULT false,
    error_code      text NOT NULL DEFAULT '',
    exit_code       int,
    output_bytes    bigint NOT NULL DEFAULT 0,
    -- A result that arrived after the call had ended: recorded, never applied.
    late_result     text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    started_at      timestamptz,
    ended_at        timestamptz,
    UNIQUE (turn_id, iteration, index)
) WITH (fillfactor = 80);
CREATE INDEX tool_calls_daemon_open ON tool_calls (daemon_id) WHERE ended_at IS NULL;
CREATE INDEX tool_calls_cancel_open ON tool_calls (cancel_asked_at) WHERE ended_at IS NULL AND cancel_asked_at IS NOT NULL;
CREATE INDEX tool_calls_chat_open ON tool_calls (chat_id) WHERE ended_at IS NULL;

CREATE TABLE approvals (
    id           uuid PRIMARY KEY,
    chat_id      uuid NOT NULL REFERENCES chats,
    turn_id      uuid NOT NULL REFERENCES turns,
    user_id      uuid NOT NULL REFERENCES users,
    tool_call_id uuid NOT NULL UNIQUE REFERENCES tool_calls,
    tool         text NOT NULL,
    status       text NOT NULL CHECK (status IN ('pending', 'approved', 'denied', 'cancelled')),
    scope        text NOT NULL DEFAULT 'once' CHECK (scope IN ('once', 'session')),
    decided_by   uuid REFERENCES users,
    created_at   timestamptz NOT NULL DEFAULT now(),
    decided_at   timestamptz
);
CREATE INDEX approvals_user ON approvals (user_id, created_at DESC);
CREATE INDEX approvals_session ON approvals (chat_id, tool) WHERE status = 'approved' AND scope = 'session';

CREATE TABLE workflows (
    id         uuid PRIMARY KEY,
    user_id    uuid NOT NULL REFERENCES users,
    chat_id    uuid REFERENCES chats,
    definition jsonb NOT NULL,
    execution  jsonb NOT NULL DEFAULT '{}',
    status     text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- The outbox of a chat: the protobuf ChatEvent, written with the change it tells of.
CREATE TABLE events (
    chat_id    uuid NOT NULL REFERENCES chats,
    seq        bigint NOT NULL,
    kind       text NOT NULL,
    payload    bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (chat_id, seq)
);

CREATE TABLE user_events (
    user_id    uuid NOT NULL REFERENCES users,
    seq        bigint NOT NULL,
    kind       text NOT NULL,
    payload    bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, seq)
);

CREATE TABLE instances (
    id          uuid PRIMARY KEY,
    role        text NOT NULL,
    version     text NOT NULL,
    address     text NOT NULL DEFAULT '',
    load        jsonb NOT NULL DEFAULT '{}',
    drain_state text NOT NULL DEFAULT 'serving',
    started_at  timestamptz NOT NULL DEFAULT now(),
    seen_at     timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE audit_log (
    id         uuid PRIMARY KEY,
    user_id    uuid,
    action     text NOT NULL,
    subject    text NOT NULL,
    detail     jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now()
);
