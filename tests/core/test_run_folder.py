"""A run's folder: finished stages are kept, half-written ones never look finished, and nobody else's is touched."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import Store, check_disk, check_free, publish, workspace, write_atomic

IDENTITY = {"model": "m", "recipe": {"a": 1}}


def save(value: Any, folder: Path) -> None:
    (folder / "value.json").write_text(json.dumps(value))


def load(folder: Path) -> Any:
    return json.loads((folder / "value.json").read_text())


def never() -> Any:
    raise AssertionError("this stage was finished and must not run again")


def fail(*args: Any) -> Any:
    raise KeyboardInterrupt


def stage(folder: Path | None, make: Callable[[], Any], write: Callable[[Any, Path], None] = save) -> Any:
    return Store(folder).stage("PROBE 1", make, write, load)


def test_without_a_folder_it_only_counts_seconds() -> None:
    store = Store()
    assert store.stage("PROBE 1", lambda: 3, never, never) == 3
    assert store.stage("PROBE 1", never, never, never) == 3  # asked again, it is remembered
    assert store.seconds["PROBE 1"] >= 0


def test_a_finished_stage_is_kept(tmp_path: Path) -> None:
    first = Store(tmp_path)
    first.stage("PROBE 1", lambda: [1, 2], save, load)
    second = Store(tmp_path)
    assert second.stage("PROBE 1", never, save, load) == [1, 2]
    assert second.seconds == first.seconds
    assert second.stage("PROBE 1", never, never, never) == [1, 2]


def test_stages_do_not_mix(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.stage("PROBE 1", lambda: 1, save, load)
    store.stage("PROBE 2", lambda: 2, save, load)
    again = Store(tmp_path)
    assert [again.stage(f"PROBE {i}", never, save, load) for i in (1, 2)] == [1, 2]


@pytest.mark.parametrize("where", ["make", "save", "mark"])
def test_a_stage_that_was_killed_is_made_again(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(value: Any, folder: Path) -> None:
        (folder / "value.json").write_text('{"half')
        (folder / "left.bin").write_text("over")
        if where == "save":
            raise KeyboardInterrupt

    if where == "mark":
        monkeypatch.setattr("obliteratus.core.run_folder.write_atomic", fail)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, fail if where == "make" else lambda: 1, half)
    monkeypatch.undo()
    assert stage(tmp_path, lambda: 2) == 2
    assert stage(tmp_path, never) == 2
    assert [p.name for p in (tmp_path / "PROBE-1").iterdir()] == ["value.json"]  # the half-written is gone


def test_killed_for_good_in_the_middle(tmp_path: Path) -> None:
    """Another process, ended by SIGKILL while it writes the second stage."""

    def die(value: Any, folder: Path) -> None:
        save(value, folder)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            dying = Store(tmp_path)
            dying.stage("PROBE 1", lambda: 1, save, load)
            dying.stage("PROBE 2", lambda: 2, die, load)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    store = Store(tmp_path)
    assert store.stage("PROBE 1", never, save, load) == 1
    assert store.stage("PROBE 2", lambda: 22, save, load) == 22
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    begun = [e["stage"] for e in events if e["status"] == "begun"]
    assert begun == ["PROBE 1", "PROBE 2", "PROBE 2"]
    assert [e["stage"] for e in events if e["status"] == "done"] == ["PROBE 1", "PROBE 2"]


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"


# ------------------------------------------------------------------------------------------ the folder
def test_the_workspace_lies_beside_the_output(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with workspace(out, IDENTITY, resume=False) as partial:
        (partial / "output").mkdir()
        (partial / "output" / "a").write_text("a")
        assert not out.exists()
        publish(partial, out)
    assert (out / "a").read_text() == "a"
    assert not partial.exists()


def test_an_empty_output_folder_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with workspace(out, IDENTITY, resume=False) as partial:
        (partial / "output").mkdir()
        publish(partial, out)
    assert out.is_dir()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_in_use_is_refused(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    content = out / "mine" if kind == "folder" else out
    content.write_text("mine")
    with pytest.raises(UserError, match="the output folder is in use; name another"):
        check_free(out)
    with pytest.raises(UserError, match="in use"), workspace(out, IDENTITY, resume=True):
        pass
    assert content.read_text() == "mine"
    assert not out.with_name("out.partial").exists()


def test_an_interrupted_run_needs_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with workspace(out, IDENTITY, resume=False) as partial:
        stage(partial, lambda: 1)
    with pytest.raises(UserError, match="holds an interrupted run; add --resume"):
        workspace(out, IDENTITY, resume=False).__enter__()
    with workspace(out, IDENTITY, resume=True) as partial:
        assert stage(partial, never) == 1


def test_resume_of_nothing_begins(tmp_path: Path) -> None:
    with workspace(tmp_path / "out", IDENTITY, resume=True) as partial:
        assert partial.is_dir()


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    with workspace(tmp_path / "out", IDENTITY, resume=False):
        pass
    other = {"model": "n", "recipe": {"a": 2}}
    with (
        pytest.raises(UserError, match="the interrupted run had another model, recipe; resume with the same"),
        workspace(tmp_path / "out", other, resume=True),
    ):
        pass


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        workspace(tmp_path / "out", IDENTITY, resume=False),
        pytest.raises(UserError, match="another process is working on this run"),
        workspace(tmp_path / "out", IDENTITY, resume=True),
    ):
        pass
    with workspace(tmp_path / "out", IDENTITY, resume=True):  # the lock is gone with its holder
        pass


def test_the_disk_is_looked_at_before(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(UserError, match=r"needs .* GB and only .* GB are free; make room"):
        check_disk(tmp_path / "not" / "there", 10**18)


# ----------------------------------------------------------------------------------------- unusable places
def test_places_where_no_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, problem in (
        (tmp_path / "link", "is a symbolic link"),
        (tmp_path / "file" / "out", "file is a file, so no folder can be made in it"),
        (tmp_path / "file" / "deep" / "out", "file is a file"),
        (tmp_path / ("x" * 250), "the name of the output folder is too long"),
    ):
        with pytest.raises(UserError, match=problem):
            check_free(out)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written to; name another folder with --out"):
        check_free(tmp_path / "out")


@pytest.mark.parametrize("error", [UserError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("done", [False, True])
def test_what_is_kept_is_said(error: BaseException, done: bool, tmp_path: Path) -> None:
    def work() -> None:
        with workspace(tmp_path / "out", IDENTITY, resume=False) as partial:
            if done:
                stage(partial, lambda: 1)
            raise error

    kept = r"finished stages are kept in .*out\.partial, for --resume"
    with pytest.raises(type(error), match=kept if done else "^(no)?$"):
        work()
    assert (tmp_path / "out.partial").exists() == done


def test_a_finished_run_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="the output folder holds a finished run; name another"):
        check_free(tmp_path)
