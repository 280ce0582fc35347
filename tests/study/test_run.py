"""A study from beginning to end: kept as it goes, resumed after a kill, the same whoever measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.study import KnockoutResult, Study
from obliteratus.study.engine import Engine
from obliteratus.study.output import load_results
from obliteratus.study.run import RESULTS, measure_study

OPENING = {"device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Three blocks, their halves and heads, on a saved tiny model and six texts."""
    folder = tmp_path_factory.mktemp("model")
    subject = tiny_subject("llama")
    subject.model.save_pretrained(folder)
    subject.tokenizer.save_pretrained(folder)
    texts = folder / "texts.txt"
    texts.write_text("\n\n".join(f"This is text number {i}, about {i * i} things." for i in range(6)))
    return Study(
        name="small",
        model=str(folder),
        data={"texts": str(texts), "samples": 6, "length": 24},
        strategies=tuple(Step(use=use) for use in ("layers", "ffn", "heads")),
    )


@pytest.fixture(scope="module")
def whole(made: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[KnockoutResult, ...]:
    return measure_study(made, OPENING, tmp_path_factory.mktemp("whole"))


def values(results: Sequence[KnockoutResult]) -> dict[str, float]:
    return {r.component: r.scores["perplexity"].value for r in results}


def same(found: Sequence[KnockoutResult], whole: Sequence[KnockoutResult]) -> None:
    assert values(found) == pytest.approx(values(whole), rel=1e-6)
    assert len(found) == len(whole) == 1 + 3 + 3 + 12


def test_results_are_kept_baseline_first(made: Study, whole: tuple[KnockoutResult, ...], tmp_path: Path) -> None:
    found = measure_study(made, OPENING, tmp_path / "out")
    same(found, whole)
    kept = load_results(tmp_path / "out")
    assert values(kept) == values(found)
    assert kept[0].strategy == ""
    assert (tmp_path / "out" / "study.toml").is_file()


@pytest.mark.parametrize("torn", ["", '{"strategy": "heads", "compo'])
def test_killed_at_half_and_resumed_the_table_is_the_same(
    made: Study, whole: tuple[KnockoutResult, ...], tmp_path: Path, torn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed inside a part, with a line half written."""
    measure = Engine.measure

    def dying(self: Engine, specs: Sequence[object]) -> list[KnockoutResult]:
        if any(spec.layer == 2 for spec in specs):  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return measure(self, specs)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "measure", dying)
    with pytest.raises(KeyboardInterrupt):
        measure_study(made, OPENING, tmp_path)
    path = tmp_path / RESULTS
    before = path.read_text()
    assert 1 < len(before.splitlines()) < len(whole)
    path.write_text(before + torn)
    measured: list[str] = []

    def counting(self: Engine, specs: Sequence[object]) -> list[KnockoutResult]:
        measured.extend(spec.component for spec in specs)  # type: ignore[attr-defined]
        return measure(self, specs)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "measure", counting)
    same(measure_study(made, OPENING, tmp_path, resume=True), whole)
    same(load_results(tmp_path), whole)
    assert path.read_text().startswith(before)
    assert len(measured) == len(whole) - len(before.splitlines())


def test_a_finished_study_resumed_measures_nothing(
    made: Study, whole: tuple[KnockoutResult, ...], tmp_path: Path
) -> None:
    measure_study(made, OPENING, tmp_path)
    text = (tmp_path / RESULTS).read_text()
    same(measure_study(made, OPENING, tmp_path, resume=True), whole)
    assert (tmp_path / RESULTS).read_text() == text


def test_another_study_does_not_go_on_here(made: Study, tmp_path: Path) -> None:
    measure_study(made, OPENING, tmp_path)
    with pytest.raises(UserError, match="--resume"):
        measure_study(made, OPENING, tmp_path)
    with pytest.raises(UserError, match="another seed"):
        measure_study(made.model_copy(update={"seed": 1}), OPENING, tmp_path, resume=True)
    path = tmp_path / RESULTS
    path.write_text(path.read_text().replace('"strategy"', '"strategies"', 2))
    with pytest.raises(UserError, match=f"{RESULTS}:1"):
        measure_study(made, OPENING, tmp_path, resume=True)


def test_two_processes_measure_the_same(made: Study, whole: tuple[KnockoutResult, ...], tmp_path: Path) -> None:
    same(measure_study(made, OPENING, tmp_path, workers=2), whole)


def test_a_local_ray_cluster_measures_the_same(made: Study, whole: tuple[KnockoutResult, ...], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    same(measure_study(made, OPENING, tmp_path, workers=2, ray="local"), whole)


def test_lines_are_strict_json(made: Study, whole: tuple[KnockoutResult, ...], tmp_path: Path) -> None:
    measure_study(made, OPENING, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (tmp_path / RESULTS).read_text().splitlines():
        json.loads(line, parse_constant=refuse)
