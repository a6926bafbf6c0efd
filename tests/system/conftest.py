"""Both databases: a SQLite file, and a PostgreSQL server that lives as long as the tests; and pictures of the page."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

PROGRAMS = ("initdb", "pg_ctl")
# Debian's packages keep them out of the way of its own commands.
PATH = os.pathsep.join([os.environ.get("PATH", ""), *sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True)])
WAIT = ("--wait", "--timeout", "300")
"""A server that crashed goes through all of its files first, which a slow disk makes long."""
DURABLE = "-c fsync=on -c listen_addresses='' -c max_connections=60"


APART = {"test_cluster.py": "ray", "test_corpus.py": "ray", "test_docs.py": "ray", "test_replicas.py": "ray"}
"""Files that start Ray: one after the other, as two clusters are more than two cores hold."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process: they share servers and browsers, which take long to start."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(APART.get(item.path.name, item.path.name)))


def account() -> dict[str, Any]:
    """Whom to run PostgreSQL as, which refuses to be root."""
    if os.geteuid() != 0:
        return {}
    users = {one.pw_name: one for one in pwd.getpwall()}
    user = users.get("postgres") or users["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def run(*command: str) -> None:
    """Run a program of PostgreSQL."""
    program = shutil.which(command[0], path=PATH) or command[0]
    with tempfile.TemporaryFile("w+") as said:  # no pipe: the server would hold it open
        done = subprocess.run([program, *command[1:]], cwd="/", stdout=said, stderr=subprocess.STDOUT, **account())
        said.seek(0)
        assert done.returncode == 0, said.read()


def start(folder: Path) -> None:
    """Start the server in a folder, once the last process of one that was killed there has ended."""
    options = f"{DURABLE} -k {folder}"
    command = ("pg_ctl", "start", *WAIT, "--pgdata", f"{folder}/data", "--log", f"{folder}/log", "--options", options)
    for _ in range(30):
        with suppress(AssertionError):
            run(*command)
            return
        time.sleep(1)
    run(*command)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where pictures of the page are kept."""
    parser.addoption("--screenshots", type=Path, help="directory for pictures of the page, as docs/howto")


@pytest.fixture
def screenshots(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The directory for pictures, by default one that is thrown away."""
    return Path(request.config.getoption("--screenshots") or tmp_path)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Path]:
    """Folder of a new PostgreSQL server: its socket, and `data`."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        pytest.skip(f"no PostgreSQL here ({', '.join(absent)} not found): install the package `postgresql`")
    pytest.importorskip("psycopg")
    # The path of a socket is short, and those of pytest are not.
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        if who := account():
            os.chown(folder, who["user"], who["group"])
        data = f"{folder}/data"
        run("initdb", "--pgdata", data, "--auth", "trust", "--username", "gradmem", "--encoding", "UTF8", "--no-locale")
        start(Path(folder))
        try:
            yield Path(folder)
        finally:
            run("pg_ctl", "stop", "--pgdata", data, "--mode", "immediate")


@pytest.fixture
def crash(postgres_server: Path) -> Callable[[], None]:
    """Stop the server as a crash would, and start it again."""
    return partial(
        run,
        "pg_ctl",
        "restart",
        "--wait",
        "--timeout",
        "300",
        "--pgdata",
        f"{postgres_server}/data",
        "--mode",
        "immediate",
    )


@pytest.fixture
def kill(postgres_server: Path) -> Iterator[Callable[[], None]]:
    """Kill the server. It is started again at the end of the test at the latest."""
    pid = Path(postgres_server, "data", "postmaster.pid")
    dead: list[int] = []

    def killed() -> None:
        dead.append(int(pid.read_text().split()[0]))
        os.kill(dead[-1], signal.SIGKILL)

    yield killed
    if dead and int(pid.read_text().split()[0]) in dead:
        start(postgres_server)


@pytest.fixture
def start_again(postgres_server: Path) -> Callable[[], None]:
    """Start the server after it was killed."""
    return partial(start, postgres_server)


@pytest.fixture
def postgres(postgres_server: Path) -> str:
    """URL of an empty PostgreSQL database."""
    name = f"store_{uuid.uuid4().hex}"
    where = f"gradmem@/{{}}?host={postgres_server}"
    engine = create_engine("postgresql+psycopg://" + where.format("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return "postgresql://" + where.format(name)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each database in turn, without a store."""
    return str(request.getfixturevalue("postgres")) if request.param == "postgres" else str(tmp_path / "store.db")
