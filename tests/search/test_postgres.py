"""A study in PostgreSQL, for real: a server of the test's own, two workers, and a server that goes away for a while."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import optuna
import pytest
from optuna.storages import BaseStorage
from tests.support.searches import start_workers

from obliteratus.search.storage import open_storage

FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("pg_ctl") or "/nowhere/pg_ctl").parent]
BIN = FOUND[-1]
pytestmark = pytest.mark.skipif(not (BIN / "initdb").exists(), reason="PostgreSQL's server is not installed here")


class Server:
    """A server on a socket in a folder of its own; it refuses root, so root becomes its user first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"postgresql+psycopg://tester@/postgres?host={folder}"

    def run(self, command: str, *arguments: str) -> None:
        as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        # DEVNULL: the server inherits the pipes of whoever starts it, and they would never close.
        subprocess.run([*as_user, str(BIN / command), *arguments], check=True, cwd="/", stdout=subprocess.DEVNULL)

    def start(self) -> None:
        options = f"-k {self.folder} -c listen_addresses=''"
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-o", options, "-l", f"{self.folder}/log", "-w", "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-m", "immediate", "stop")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    folder = Path(mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path has at most 107 characters: pytest's are longer
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
    made = Server(folder)
    made.run("initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "tester")
    made.start()
    yield made
    made.stop()
    shutil.rmtree(folder)


def count_finished(studies: BaseStorage) -> int:
    if not any(s.study_name == "study" for s in studies.get_all_studies()):
        return 0
    trials = optuna.load_study(study_name="study", storage=studies).get_trials()
    return sum(t.state == optuna.trial.TrialState.COMPLETE for t in trials)


def test_two_workers_and_a_server_that_restarts(server: Server) -> None:
    """Both make trials of one study; while the server is away they wait, and nothing finished is lost."""
    studies = open_storage(server.url)  # creates the tables, so that two workers do not race to do so
    both = start_workers(2, 16, server.url)
    for _ in range(900):
        if count_finished(studies) >= 4:
            break
        time.sleep(0.1)
    server.stop()
    time.sleep(1)
    server.start()
    assert [worker.wait(200) for worker in both] == [0, 0]
    trials = optuna.load_study(study_name="study", storage=studies).get_trials()
    complete = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) >= 16
    assert len(trials) - len(complete) <= 2  # what a worker asked for as the server went
    assert len({t.user_attrs["worker"] for t in complete}) == 2
