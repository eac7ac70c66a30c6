-- How large a message's content is, so that a page is cut before it is read.
ALTER TABLE messages ADD COLUMN bytes int NOT NULL DEFAULT 0;
UPDATE messages m SET bytes =
    COALESCE((SELECT sum(octet_length(b.data)) FROM content_blocks b WHERE b.message_id = m.id), 0);
