#!/usr/bin/env python3
"""Our spans in a trace store that is not ours: `arize-phoenix`, run here with a data directory of its own.

Usage: phoenix.py RELIANT_BINARY   (run with the Python that has arize-phoenix; `make test-phoenix` does)

Runs `reliant demo` with its spans going to a receiver in this process, which writes down what it got and passes the same
bytes on. Then asks Phoenix's REST API for the trace: the same spans, with the same parents.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from pathlib import Path

import grpc
import httpx
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as wire

START_S = 180
DEMO_S = 300
FOUND_S = 60
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


def fail(sentence):
    sys.exit(f"phoenix: {sentence}")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Tee(grpc.GenericRpcHandler):
    """Keeps (trace, span) -> (parent, name, service) of all that it passes on."""

    def __init__(self, onward):
        self.export = grpc.insecure_channel(onward).unary_unary(EXPORT)
        self.spans = {}
        self.refused = []

    def service(self, details):
        if details.method != EXPORT:
            return None  # Logs: Phoenix keeps traces alone.
        return grpc.unary_unary_rpc_method_handler(self.take)

    def take(self, request, _context):
        batch = wire.ExportTraceServiceRequest.FromString(request)
        for resource in batch.resource_spans:
            named = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                key = (span.trace_id.hex(), span.span_id.hex())
                self.spans[key] = (span.parent_span_id.hex(), span.name, named.get("service.name"))
        try:
            answer = self.export(request, timeout=30)
            partly = wire.ExportTraceServiceResponse.FromString(answer).partial_success
            if partly.rejected_spans:
                self.refused.append(f"{partly.rejected_spans} spans: {partly.error_message}")
            return answer
        except grpc.RpcError as error:
            self.refused.append(f"{error.code().name}: {error.details()}")
            return wire.ExportTraceServiceResponse().SerializeToString()


def end(process):
    """The process and what it started, by its own group."""
    for sign, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            pass


def until(what, seconds, look):
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found is not None:
            return found
        if time.monotonic() > deadline:
            fail(f"waited {seconds} s for {what}")
        time.sleep(0.5)


def stored(client, trace):
    """All spans of the trace that Phoenix has: (span, parent, name), from every page of its list."""
    found, cursor = [], None
    while True:
        query = {"limit": 1000, "trace_id": trace} | ({"cursor": cursor} if cursor else {})
        page = client.get("/v1/projects/default/spans", params=query)
        if page.status_code == 404:
            return found  # The project is made by the first span.
        page.raise_for_status()
        body = page.json()
        for span in body["data"]:
            if span["context"]["trace_id"] == trace:
                found.append((span["context"]["span_id"], span.get("parent_id") or "", span["name"]))
        cursor = body.get("next_cursor")
        if not cursor:
            return found


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    http_port, grpc_port = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="reliant-phoenix-") as scratch:
        log = Path(scratch, "phoenix.log")
        environment = dict(
            os.environ,
            PHOENIX_HOST="127.0.0.1",
            PHOENIX_PORT=str(http_port),
            PHOENIX_GRPC_PORT=str(grpc_port),
            PHOENIX_WORKING_DIR=str(Path(scratch, "data")),
            PHOENIX_TELEMETRY_ENABLED="false",
            PHOENIX_ALLOW_EXTERNAL_RESOURCES="false",
        )
        Path(scratch, "data").mkdir()
        program = Path(sys.executable).parent / "phoenix"
        with open(log, "wb") as output:
            phoenix = subprocess.Popen([program, "serve"], env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            client = httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=30, trust_env=False)

            def ready():
                if phoenix.poll() is not None:
                    fail(f"it ended at once:\n{log.read_text(errors='replace')[-3000:]}")
                try:
                    return client.get("/healthz").is_success or None
                except httpx.TransportError:
                    return None

            begun = time.monotonic()
            until("Phoenix to answer", START_S, ready)
            print(f"Phoenix answers after {time.monotonic() - begun:.1f} s", flush=True)
            check(client, f"127.0.0.1:{grpc_port}")
        finally:
            end(phoenix)


def check(client, onward):
    tee = Tee(onward)
    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[tee])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    environment = dict(
        os.environ,
        RELIANT_TELEMETRY__OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
        RELIANT_TELEMETRY__SAMPLE_RATIO="1.0",
    )
    demo = subprocess.Popen([sys.argv[1], "demo"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)
    try:
        said, _ = demo.communicate(timeout=DEMO_S)
    except subprocess.TimeoutExpired:
        fail(f"`reliant demo` took longer than {DEMO_S} s")
    finally:
        end(demo)
    trace = re.search(r"^trace id\s+([0-9a-f]{32})$", said, re.MULTILINE)
    if demo.returncode != 0 or not trace:
        fail(f"`reliant demo` did not work:\n{said}")
    trace = trace.group(1)
    # All roles have ended, and what they sent was passed on before it was answered.
    server.stop(10).wait()
    if tee.refused:
        fail(f"it refused: {tee.refused}")
    sent = {(span, parent, name) for (of, span), (parent, name, _) in tee.spans.items() if of == trace}
    if not any(name.startswith("execute_tool") for _, _, name in sent):
        fail(f"the turn's trace has no tool call: {sorted(name for _, _, name in sent)}")

    def whole():
        found = stored(client, trace)
        return found if len(found) >= len(sent) else None

    found = until(f"{len(sent)} spans of trace {trace}", FOUND_S, whole)
    if len(found) != len(sent) or set(found) != sent:
        fail(f"sent and not found: {sent - set(found)}; found and not sent: {set(found) - sent}; {len(found)} for {len(sent)}")
    services = sorted({service for (of, _), (_, _, service) in tee.spans.items() if of == trace})
    print(f"trace {trace}: {len(found)} spans of {', '.join(services)}, the same as were sent, with the same parents")


if __name__ == "__main__":
    main()
