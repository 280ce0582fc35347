"""Names from a browser lead nowhere but into the workspace, and uploads are prompts or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obliteratus.core.errors import UserError
from obliteratus.serve.ui.requests import RunRequest, check_changes, check_names, find_model, find_prompts
from obliteratus.serve.ui.workspace import MAX_UPLOAD, Workspace, list_files

PROMPTS = "Who built the tower?\nWhy is rain wet?\n"


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace.create(tmp_path / "work")


def send(space: Workspace, name: str, data: bytes) -> Path:
    """Put a file where the server puts what it is sent."""
    (space.root / ".uploads" / "a1").mkdir(exist_ok=True)
    path = space.root / ".uploads" / "a1" / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["../secret", "..", ".", "", "a/b", "/etc/passwd", ".hidden", "a\\b", "a\nb", "x" * 81, "~", "a b", "é"]
)
def test_names_are_plain(space: Workspace, name: str) -> None:
    with pytest.raises(UserError, match="use letters, digits"):
        space.path("runs", name)


def test_a_plain_name_is_allowed(space: Workspace) -> None:
    assert space.path("runs", "organism-astronomy-lean_2.1") == space.root / "runs" / "organism-astronomy-lean_2.1"


def test_links_lead_not_out(space: Workspace, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "run.json").write_text("{}")
    (space.root / "runs" / "out").symlink_to(tmp_path / "secret")
    (space.root / "models" / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="leads out of the workspace"):
        space.path("runs", "out")
    assert space.list_runs() == []
    assert space.list_models() == []
    (space.root / "runs" / "in").mkdir()
    (space.root / "runs" / "in" / "file").write_text("x")
    (space.root / "runs" / "in" / "link").symlink_to(tmp_path / "secret" / "run.json")
    assert [path.name for path in list_files(space.root / "runs" / "in")] == ["file"]


def test_an_upload_of_prompts_is_kept_under_a_free_name(space: Workspace) -> None:
    kept = [space.keep_prompts(send(space, "my prompts (1).txt", PROMPTS.encode()), "my prompts (1).txt") for _ in "ab"]
    assert kept == [("my-prompts-1-.txt", 2), ("my-prompts-1--2.txt", 2)]
    assert (space.root / "prompts" / kept[0][0]).read_text() == PROMPTS
    assert set(space.list_prompts()) == {name for name, _ in kept}
    assert list_files(space.root / ".uploads") == []


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("picture.txt", b"\x89PNG\x00\xff\xfe", "not UTF-8 text"),
        ("zeros.txt", b"a\0b", "binary file"),
        ("empty.txt", b"", "empty"),
        ("model.pkl", b"\x80\x04", "give one of .txt, .jsonl"),
        ("model.safetensors", b"x", "give one of .txt, .jsonl"),
        ("script.py", b"print(1)", "give one of .txt, .jsonl"),
        ("rows.jsonl", b"{", "not JSON"),
        ("large.txt", b"a\n" * (MAX_UPLOAD // 2 + 1), "larger than 10 MB"),
    ],
)
def test_other_uploads_are_refused_and_removed(space: Workspace, name: str, data: bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        space.keep_prompts(send(space, name, data), name)
    assert str(space.root) not in str(refused.value)
    assert space.list_prompts() == []
    assert list_files(space.root / ".uploads") == []


def test_only_what_was_uploaded_is_taken(space: Workspace, tmp_path: Path) -> None:
    """A browser that names another file gets nothing, and the file stays."""
    (tmp_path / "diary.txt").write_text(PROMPTS)
    with pytest.raises(UserError, match="was not uploaded"):
        space.keep_prompts(tmp_path / "diary.txt", "diary.txt")
    assert (tmp_path / "diary.txt").read_text() == PROMPTS


def test_which_models_may_be_opened(space: Workspace, tmp_path: Path) -> None:
    (space.root / "models" / "mine").mkdir()
    (tmp_path / "named").mkdir()
    named = {"named": str(tmp_path / "named")}
    assert find_model(space, named, "named") == str(tmp_path / "named")
    assert find_model(space, named, str(tmp_path / "named")) == str(tmp_path / "named")  # as a run's record has it
    assert find_model(space, named, "mine") == str(space.root / "models" / "mine")
    assert find_model(space, named, str(space.root / "models" / "mine")) == str(space.root / "models" / "mine")
    assert find_model(space, named, "organism:astronomy@0.5") == "organism:astronomy@0.5"
    assert find_model(space, named, "owner/name") == "owner/name"


@pytest.mark.parametrize(
    "name", ["/etc", "../work", "src/obliteratus", "", "~/models", "organism:../x", "a/b/c", "models"]
)
def test_no_other_folder_is_opened(space: Workspace, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])  # where src/obliteratus is a folder
    with pytest.raises(UserError, match="choose a model of the list"):
        find_model(space, {}, name)


def test_prompts_are_of_an_organism_a_behavior_or_the_workspace(space: Workspace) -> None:
    name, _ = space.keep_prompts(send(space, "own.txt", PROMPTS.encode()), "own.txt")
    assert find_prompts(space, name) == str(space.root / "prompts" / "own.txt")
    assert find_prompts(space, "organism:astronomy") == "organism:astronomy"
    assert find_prompts(space, "behavior:lists") == "behavior:lists"
    for other in ("/etc/passwd", "../own.txt", "", "hub:a/b", "other.txt"):
        with pytest.raises(UserError, match="choose prompts of the list"):
            find_prompts(space, other)


def test_changes_name_no_file_and_no_address() -> None:
    assert check_changes("excise.strength=0.7\n\n seed=3 ") == ("excise.strength=0.7", "seed=3")
    for change in ("judge.url=http://x", "judge.behavior=/etc/x.toml", "verify=[]", "excise.strength", "seeds=3"):
        with pytest.raises(UserError, match="write path=value"):
            check_changes(change)


def test_methods_and_behaviors_are_the_programs_own(tmp_path: Path) -> None:
    request = RunRequest(model="organism:astronomy", method="lean")
    check_names(request)
    (tmp_path / "own.toml").write_text("")
    for change in ({"method": str(tmp_path / "own.toml")}, {"behavior": str(tmp_path / "own.toml")}):
        with pytest.raises(UserError):
            check_names(request.model_copy(update=change))


def test_fronts_of_fits_hold_plans_and_of_searches_recipes(space: Workspace) -> None:
    """The files are as `tune.front.save_tuned` and `search.output.write_front` write them."""
    for run in ("fit", "search"):
        (space.root / "runs" / run / "front").mkdir(parents=True)
        (space.root / "runs" / run / "run.json").write_text("{}")
    fit, search = (space.root / "runs" / run / "front" for run in ("fit", "search"))
    for number in range(1, 12):
        (fit / str(number)).mkdir()
    described = [{"number": n, "rate": n / 100, "kl": 0.01} for n in range(1, 12)]
    (fit / "front.json").write_text(json.dumps(described))
    (search / "1.toml").write_text("# Trial 7 of a search; on search prompts: kl 0.1\nabout = 'x'\n")
    assert [member.number for member in space.list_front("fit")] == list(range(1, 12))  # 2 comes before 10
    assert all(member.plan and not member.recipe for member in space.list_front("fit"))
    assert space.describe_front("fit")[3] == "rate 3.0%, KL 0.010 on search prompts"
    member = space.list_front("search")[0]
    assert (member.plan, member.recipe) == (None, search / "1.toml")
    assert space.describe_front("search")[1].startswith("Trial 7 of a search")
