"""An MCP server for tests: answers well, hangs, dies, lies, as it is asked."""
import json
import os
import sys
import time

TOOLS = [
    {"name": "echo", "description": "Says it back.", "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}},
     "annotations": {"readOnlyHint": True}},
    {"name": "hang", "inputSchema": {"type": "object"}},
    {"name": "die", "inputSchema": {"type": "object"}},
    {"name": "big", "inputSchema": {"type": "object"}},
    {"name": "huge", "inputSchema": {"type": "object"}},
    {"name": "fail", "inputSchema": {"type": "object"}},
    {"name": "refuse", "inputSchema": {"type": "object"}},
    {"name": "garbage", "inputSchema": {"type": "object"}},
    {"name": "grow", "inputSchema": {"type": "object"}},
    {"name": "rude \x1b[31mname\n", "description": "bad\x1b[0m\x00 text", "inputSchema": {"type": "objekt", "properties": 7}},
    {"name": "echo", "description": "a second one", "inputSchema": {"type": "object"}},
]


def send(message):
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def text(content, error=False):
    return {"content": [{"type": "text", "text": content}], "isError": error}


with open("starts", "a") as starts:
    starts.write(f"{os.getpid()}\n")
sys.stderr.write("hello from stderr\n" + "x" * 100000 + "\n")
sys.stderr.flush()
if "--silent" in sys.argv:
    time.sleep(600)
for line in sys.stdin:
    message = json.loads(line)
    method, params = message.get("method"), message.get("params") or {}
    with open("heard", "a") as heard:
        heard.write(f"{method}\n")
    if "id" not in message:
        continue

    def answer(result, message=message):
        send({"id": message["id"], "result": result})

    if method == "initialize":
        answer({"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {"listChanged": True}},
                "serverInfo": {"name": "scripted", "version": "1"}})
    elif method == "tools/list":
        answer({"tools": TOOLS})
    elif method == "tools/call":
        name = params["name"]
        if name == "echo":
            meta = params.get("_meta") or {}
            secret = [k for k in os.environ if k.startswith("RELIANT_") and k != "RELIANT_MCP_STATE"]
            answer(text(f"{params['arguments'].get('text')} {meta.get('traceparent')} {os.environ.get('GIVEN')} {secret}"))
        elif name == "die":
            os._exit(1)
        elif name == "big":
            answer(text("z" * 3_000_000))
        elif name == "huge":
            answer(text("z" * 20_000_000))
        elif name == "fail":
            answer(text("it did not work", True))
        elif name == "refuse":
            send({"id": message["id"], "error": {"code": -32602, "message": "not\x07 so"}})
        elif name == "garbage":
            sys.stdout.write("this is no JSON\n")
            answer({"tools": "no"})
        elif name == "grow":
            TOOLS.append({"name": "grown", "inputSchema": {"type": "object"}})
            send({"method": "notifications/tools/list_changed"})
            answer(text("grew"))
        # hang: no answer at all
    else:
        send({"id": message["id"], "error": {"code": -32601, "message": "no"}})
