#!/usr/bin/env python3
"""`make up` and `make demo` as on a machine that has Rust, Python and Node and nothing else.

A clone, an empty home and an empty tool cache; the machine's Postgres is hidden, and what pip installed before is not on
PATH. Cargo's download cache is kept: what it holds is not ours to test. Ends by itself; needs the network.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 45 * 60
HIDDEN = ("postgres", "initdb", "psql", "nats-server", "temporal", "buf")


def main():
    base = Path(tempfile.mkdtemp(prefix="reliant-fresh-"))
    try:
        run(base)
    finally:
        Up.end_all()
        shutil.rmtree(base, ignore_errors=True)


def run(base):
    clone, home = base / "reliant", base / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    env = environment(home)
    for name in HIDDEN:
        found = shutil.which(name, path=env["PATH"])
        assert found is None, f"{name} is still found: {found}"

    begun = time.monotonic()
    demo = subprocess.run(["make", "demo"], cwd=clone, env=env, timeout=PATIENCE_S, stdin=subprocess.DEVNULL)
    assert demo.returncode == 0, f"make demo ended with {demo.returncode}"
    say(f"make demo from nothing: {time.monotonic() - begun:.0f} s")

    first = Up(clone, env)
    api = first.wait_for(r"^\s+api\s+(http://\S+)", "its address")
    page = urllib.request.urlopen(api, timeout=10).read().decode()
    assert "<title>" in page, "the api serves no page"
    again = subprocess.run(["make", "up"], cwd=clone, env=env, timeout=300, capture_output=True, text=True)
    assert again.returncode == 0 and f"already running at {api}" in again.stdout, again.stdout + again.stderr
    chat = subprocess.run(
        [home / ".cache/reliant/target/debug/reliant", "chat", "hello"],
        cwd=clone, env=env, timeout=60, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )
    assert chat.returncode == 0 and "simulator" in chat.stdout, chat.stdout + chat.stderr
    first.stop()

    second = Up(clone, env)
    ready = second.wait_for(r"ready in ([0-9.]+) s", "that it is ready")
    second.stop()
    say(f"make up, built and with data: ready in {ready} s")
    left = subprocess.run(["pgrep", "-f", str(base)], capture_output=True, text=True).stdout.split()
    assert not left, f"processes were left behind: {left}"
    say("fresh machine: make demo, make up twice, page, chat, Ctrl-C: as they should be")


def environment(home):
    """This machine without what it happens to have."""
    shadow = home / "bin"
    shadow.mkdir()
    kept = []
    for directory in os.environ["PATH"].split(os.pathsep):
        if not any((Path(directory) / name).exists() for name in HIDDEN):
            kept.append(directory)
            continue
        # The directory has something to hide: link the rest of it.
        mirror = shadow / re.sub(r"\W", "_", directory)
        mirror.mkdir(exist_ok=True)
        for program in Path(directory).iterdir():
            link = mirror / program.name
            if program.name not in HIDDEN and not link.exists():
                link.symlink_to(program)
        kept.append(str(mirror))
    keep = ("LANG", "TERM", "USER", "PIP_INDEX_URL", "NPM_CONFIG_REGISTRY", "http_proxy", "https_proxy", "no_proxy")
    prefixes = ("PIP_", "npm_config_", "CARGO_", "RUSTUP_", "PYENV_")
    env = {name: value for name, value in os.environ.items() if name in keep or name.startswith(prefixes)}
    env.pop("CARGO_TARGET_DIR", None)
    old_home = Path(os.environ["HOME"])
    env.update(
        HOME=str(home),
        PATH=os.pathsep.join(kept),
        CARGO_HOME=os.environ.get("CARGO_HOME", str(old_home / ".cargo")),
        RUSTUP_HOME=os.environ.get("RUSTUP_HOME", str(old_home / ".rustup")),
        RELIANT_NO_SYSTEM_POSTGRES="1",
    )
    for name in (".npmrc", ".config/pip", ".pip", ".gitconfig"):
        if (old_home / name).exists():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).symlink_to(old_home / name)
    return env


class Up:
    """`make up`, running; cut off when it takes too long, and never left behind."""

    started = []

    @classmethod
    def end_all(cls):
        for up in cls.started:
            up.watchdog.cancel()
            if up.process.poll() is None:
                os.killpg(up.process.pid, signal.SIGKILL)

    def __init__(self, clone, env):
        self.process = subprocess.Popen(
            ["make", "up"], cwd=clone, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        self.watchdog = threading.Timer(PATIENCE_S, os.killpg, (self.process.pid, signal.SIGKILL))
        self.watchdog.start()
        Up.started.append(self)

    def wait_for(self, pattern, what):
        for line in self.process.stdout:
            print("  |", line, end="")
            if found := re.search(pattern, line):
                return found.group(1)
        raise AssertionError(f"make up ended before it said {what}")

    def stop(self):
        """As Ctrl-C does: to make and what it started."""
        os.killpg(self.process.pid, signal.SIGINT)
        rest = self.process.communicate(timeout=120)[0]
        assert "stopped" in rest, rest


def say(line):
    print(f"fresh: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
