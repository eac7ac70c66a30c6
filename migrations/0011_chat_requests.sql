-- What the client called its request for a chat: the same id again is the same chat.
ALTER TABLE chats ADD COLUMN client_request_id text;
CREATE UNIQUE INDEX chats_request ON chats (user_id, client_request_id) WHERE client_request_id IS NOT NULL;
