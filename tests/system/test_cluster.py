"""A cluster of Ray that others have started: `gradmem write-corpus --address`, and `serve run` with the application."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest
from ports import free_port

from gradmem.store import Store

pytest.importorskip("ray")

PATIENCE = 600.0
"""Seconds for each step on a busy machine; on one that does nothing else each takes a few."""
PROGRAMS = Path(sys.executable).parent
PAIRS = {"one": "a7:Qz\nk2:9f", "two": "b1:c2"}


@dataclass
class Cluster:
    """Where a cluster is, and the log of what runs on it."""

    address: str
    log: Path
    environment: dict[str, str]

    def start(self, *words: str | Path, folder: Path) -> subprocess.Popen[bytes]:
        """Start a program that knows the token; its directory and its environment are not those of the cluster."""
        with open(self.log, "ab") as log:
            return subprocess.Popen(words, env=self.environment, cwd=folder, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of one machine that asks for a token."""
    own = {
        "RAY_AUTH_TOKEN": "gradmem" * 8,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",  # a busy machine starts a process slowly
    }
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # paths of sockets are short
        port, log = free_port(), Path(folder, "log")
        here = Cluster(f"127.0.0.1:{port}", log, os.environ | own)
        ports = ("--port", str(port), "--ray-client-server-port", str(free_port()), "--node-ip-address", "127.0.0.1")
        sizes = ("--num-cpus", "2", "--object-store-memory", "100000000", "--include-dashboard", "false")
        words = (PROGRAMS / "ray", "start", "--head", "--block", *ports, *sizes, "--temp-dir", folder)
        environment = here.environment | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        with open(log, "ab") as file:
            head = subprocess.Popen(words, env=environment, cwd=folder, stdout=file, stderr=file)
        try:
            wait_for(lambda: "runtime started" in log.read_text(), head, log)
            yield here
        finally:
            inside = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            with suppress(subprocess.TimeoutExpired):
                head.wait(60)
            head.kill()
            for one in psutil.wait_procs(inside, 10)[1]:
                one.kill()


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until something is so; a process must not end before."""
    patience = time.monotonic() + PATIENCE
    while not reached():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < patience, log.read_text()
        time.sleep(0.2)


def test_a_corpus_is_written(cluster: Cluster, tmp_path: Path) -> None:
    """Its places are relative to the directory of the command, and a store is that of its environment."""
    lines = (json.dumps({"id": name, "text": text}) for name, text in PAIRS.items())
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    cluster.environment["GRADMEM_STORE"] = "mine"
    words = ("write-corpus", "docs.jsonl", "--checkpoint", "kv-16", "--json", "report.json", "--workers", "1")
    run = cluster.start(sys.executable, "-m", "gradmem", *words, "--address", cluster.address, folder=tmp_path)
    assert run.wait(PATIENCE) == 0, cluster.log.read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["documents"], report["written"], report["failed"]) == (2, 2, 0)
    with Store(tmp_path / "mine") as store:
        assert {entry.name for entry in store.list()} == set(PAIRS)
        assert store.open("one").ask("k2") == "9f"


def test_the_application_is_served(cluster: Cluster, tmp_path: Path) -> None:
    """Options are words, and the front and a replica answer behind the proxy of Ray Serve."""
    cluster.environment |= {"GRADMEM_STORE": str(tmp_path / "store.db"), "RAY_AUTH_MODE": "token"}
    port = str(free_port())
    serve, to = PROGRAMS / "serve", ("--address", cluster.address)
    proxy = cluster.start(serve, "start", *to, "--http-host", "127.0.0.1", "--http-port", port, folder=tmp_path)
    proxy.wait(PATIENCE)  # it gives up after a minute, and the proxy starts nonetheless
    options = ("checkpoints=kv-16", "max_replicas=1")
    run = cluster.start(serve, "run", "gradmem.serving.replicas:app", *options, *to, folder=tmp_path)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:

            def ready() -> bool:
                with suppress(httpx2.TransportError):
                    return client.get("/readyz").is_success
                return False

            wait_for(ready, run, cluster.log)
            made = client.post("/v1/memories", json={"text": PAIRS["one"], "checkpoint": "kv-16", "name": "one"})
            assert made.status_code == 201, made.text
            asked = client.post("/v1/memories/one/ask", json={"queries": ["k2"]})
            assert asked.json()["answers"][0]["text"] == "9f"
            missing = client.get("/v1/memories/none")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    finally:
        run.kill()
        run.wait()
