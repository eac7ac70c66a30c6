"""An MCP server over streamable HTTP for tests. Its port is told in a file; `die` ends it in the middle of a call."""
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b""):
        self.send_response(status)
        if body:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(405)

    def do_POST(self):
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        method, params = message.get("method"), message.get("params") or {}
        if self.headers.get("x-key") != "key":
            return self.reply(401)
        if "id" not in message:
            return self.reply(202)
        result = {}
        if method == "initialize":
            result = {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
                      "serverInfo": {"name": "scripted", "version": "1"}}
        elif method == "tools/list":
            result = {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in ("echo", "die")]}
        elif method == "tools/call" and params["name"] == "die":
            os._exit(1)
        elif method == "tools/call":
            result = {"content": [{"type": "text", "text": str(params["arguments"].get("text"))}]}
        body = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        self.reply(200, json.dumps(body).encode())


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open("port.new", "w") as port:
    port.write(str(server.server_port))
os.rename("port.new", "port")
server.serve_forever()
