-- The span with which a call left last: a dispatch that comes again stands beside it, linked to it.
ALTER TABLE tool_calls ADD COLUMN dispatch_trace text NOT NULL DEFAULT '';
