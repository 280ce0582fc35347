"""A contract for every registered step: what was planted is found, what was not is not; and what all steps share."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.plans import random_basis
from tests.support.planted import SHIFT, cosine, planted, projector, shuffled, with_sketches
from torch.nn.functional import normalize

from obliteratus.core.errors import UserError
from obliteratus.core.registry import Registry
from obliteratus.core.settings import Step
from obliteratus.core.toml import dump_toml
from obliteratus.core.types import Directions
from obliteratus.distill import check_needs, extractors, find_directions, load_directions, save_directions
from obliteratus.distill.steps import orthonormalize
from obliteratus.pipeline.recipe import load_recipe, parse_recipe

# Extractor → the steps that show it. A new extractor needs no entry unless it needs options or a step before it.
MEAN = {"use": "mean_diff"}

RECIPES: dict[str, list[dict[str, Any]]] = {
    "single": [MEAN, {"use": "single"}],
    "orthogonal_to_control": [MEAN, {"use": "orthogonal_to_control"}],
    "winsorize": [{"use": "winsorize"}, MEAN],
    "union": [MEAN, {"use": "union"}],
    "blend": [MEAN, {"use": "blend"}],
    "interpolate": [MEAN, {"use": "interpolate", "at": 2 / 3}],
    "pairs": [{"use": "pairs"}, {"use": "svd", "k": 2, "paired": True}],
    "keep_out": [MEAN, {"use": "keep_out", "k": 2}],
    "sae": [{"use": "sae", "features": 1, "streams": "all"}],  # one was planted: a second would be a row of zeros
}
# Those that give every stream the same directions → the stream that they come from; None is the best one.
ONE_AT_ALL = {"single": None, "interpolate": 3}
BOUND = {"sae": 0.8}  # its features also serve the bypass and keep groups; on two groups alone it reaches 0.96
NAMES = [name for name in extractors if "model" not in extractors[name].needs]  # those have tests of their own


def steps(name: str, **options: Any) -> list[Step]:
    given = RECIPES.get(name, [{"use": name}])
    return [*(Step(**s) for s in given[:-1]), Step(**given[-1], **options)]


@cache
def found(name: str) -> Directions:
    """The step's directions in `planted`'s activations. No test changes them."""
    return find_directions(planted()[0], steps(name))


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_a_planted_direction_is_found(self, name: str) -> None:
        _, truth = planted()
        directions = found(name)
        if name in ONE_AT_ALL:
            at = ONE_AT_ALL[name]
            truth = truth[int(directions.score.argmax()) if at is None else at].expand_as(truth)
        assert (cosine(directions, truth) > BOUND.get(name, 0.95)).all()  # sign included

    def test_shuffled_labels_find_nothing(self, name: str) -> None:
        acts, truth = planted()
        mixed = find_directions(shuffled(acts), steps(name))
        real = found(name)
        delta = shuffled(acts)["target"].mean - shuffled(acts)["control"].mean
        assert (mixed.score[1:] < 0.25 * real.score[1:]).all()
        assert (delta[1:] * truth[1:]).sum(1).abs().max() < 0.25 * SHIFT

    def test_rows_are_orthonormal_and_turned_to_the_target(self, name: str) -> None:
        acts, _ = planted()
        directions = found(name)
        gram = directions.basis @ directions.basis.mT
        torch.testing.assert_close(gram[1:], torch.eye(gram.shape[1]).expand_as(gram[1:]), rtol=0, atol=1e-5)
        if name not in ONE_AT_ALL:
            delta = acts["target"].mean - acts["control"].mean
            assert (torch.einsum("lkw,lw->lk", directions.basis, delta)[1:] >= 0).all()

    def test_scores_are_shares(self, name: str) -> None:
        directions = found(name)
        assert ((directions.score >= 0) & (directions.score <= 1)).all()
        assert (directions.score[1:] > 0).all()
        assert directions.unit

    def test_scores_grow_with_the_difference(self, name: str) -> None:
        weak, strong = (find_directions(planted(shift=x)[0], steps(name)).score[1:] for x in (2.0, 8.0))
        assert (strong > 2 * weak).all()

    def test_the_trace_names_all_steps(self, name: str) -> None:
        nested = {"union": "union svd", "blend": "blend bypass_contrast"}
        assert found(name).trace == tuple(nested.get(s.use, s.use) for s in steps(name))

    def test_a_second_run_gives_the_same_and_changes_no_input(self, name: str) -> None:
        acts, _ = planted()
        before = acts["target"].rows.clone(), acts["control"].mean.clone()
        assert torch.equal(find_directions(acts, steps(name)).basis, found(name).basis)
        assert torch.equal(acts["target"].rows, before[0])
        assert torch.equal(acts["control"].mean, before[1])


def test_a_step_that_is_left_out_does_nothing() -> None:
    acts, _ = planted()
    left_out = find_directions(acts, [Step(**MEAN), Step(use="union", when="never")])
    assert torch.equal(left_out.basis, found("mean_diff").basis)
    assert left_out.trace == ("mean_diff",)
    check_needs([Step(use="blend", when="never")], ["target", "control"], keep="moments")
    with pytest.raises(UserError, match="bypass"):  # negative control
        check_needs([Step(use="blend")], ["target", "control"], keep="moments")


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ONE_AT_ALL])
def test_where_the_groups_agree_nothing_is_found(name: str) -> None:
    directions = found(name)
    assert (directions.basis[0] == 0).all()
    assert directions.score[0] == 0


def test_a_dependent_row_takes_nothing_from_the_rows_after_it() -> None:
    one, two = random_basis(6, 2, 0)
    rows = torch.stack([one, torch.zeros(6), one, two, 0.6 * one + 0.8 * two])[None]
    made = orthonormalize(rows)[0]
    torch.testing.assert_close(made[[0, 3]], torch.stack([one, two]), rtol=0, atol=1e-6)
    assert (made[[1, 2, 4]] == 0).all()
    by_qr = torch.linalg.qr(rows[0].T)[0].T  # the negative control: QR gives the row after the zeros another place
    assert abs(by_qr[3] @ two) < 0.9


def test_orthonormal_keeps_order_and_signs() -> None:
    rows = normalize(torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0)), dim=2)
    made = orthonormalize(rows)
    torch.testing.assert_close(made @ made.mT, torch.eye(5).expand(3, 5, 5), rtol=0, atol=1e-6)
    assert ((made * rows).sum(2) > 0).all()
    for stream in range(3):
        for k in range(1, 6):
            wanted = projector(rows[stream, :k])
            torch.testing.assert_close(projector(made[stream, :k]), wanted, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- names and needs
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(use="winsorise"), "distill step 'winsorise' is now called 'winsorize'"),
        (Step(use="svd", centred=True), "distill step 'svd': option 'centred' is now called 'centered'"),
        (Step(use="mean_dif"), "did you mean 'mean_diff'"),
        (Step(use="svd", K=3), "'svd': key 'K'"),
    ],
)
def test_names_that_do_not_exist_or_have_changed(step: Step, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_directions(planted(n=20)[0], [step])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [Step(use="bypass_contrast")],
            "'bypass_contrast' needs the group 'bypass', which has no prompts; .* --bypass",
        ),
        ([Step(**MEAN), Step(use="blend")], "'bypass_contrast' needs the group 'bypass'.* --bypass"),
        ([Step(**MEAN), Step(use="keep_out")], "'keep_out' needs the group 'keep'.* --keep"),
    ],
)
def test_a_missing_group_is_named_before_and_while_running(steps: list[Step], message: str) -> None:
    acts, _ = planted()
    few = replace(acts, groups={g: acts[g] for g in ("target", "control")})
    with pytest.raises(UserError, match=message):
        find_directions(few, steps)
    with pytest.raises(UserError, match=message):
        check_needs(steps, ["target", "control"], keep="rows")
    check_needs(steps, acts.groups, keep="moments")  # moments are enough for all three
    assert find_directions(planted(keep=False)[0], steps).score[1:].min() > 0


@pytest.mark.parametrize("use", ["svd", "whitened_svd", "discriminant", "winsorize"])
def test_missing_rows_are_reported_before_and_while_running(use: str) -> None:
    for steps in ([Step(use=use), Step(**MEAN)], [Step(**MEAN), Step(use="union", other={"use": use})]):
        message = f"distill step '{use}' needs every prompt's activations.*; set probe.keep"
        with pytest.raises(UserError, match=message):
            check_needs(steps, ["target", "control"], keep="moments")
        with pytest.raises(UserError, match=message):
            find_directions(planted(keep=False)[0], steps)
        check_needs(steps, ["target", "control"], keep="rows")


@pytest.mark.parametrize("name", [n for n in extractors if "model" not in extractors[n].needs])
def test_what_a_step_declares_is_what_it_needs(name: str) -> None:
    """With rows and groups taken away that it does not declare, a step still runs."""
    needs = extractors[name].needs
    acts, _ = planted(keep="rows" in needs)
    acts = with_sketches(planted()[0]) if "spread" in needs else acts
    groups = {g: m for g, m in acts.groups.items() if g in ("target", "control", *needs)}
    options = {"other": Step(**MEAN)} if name in ("union", "blend") else {}
    find_directions(replace(acts, groups=groups), [Step(**MEAN), Step(use=name, **options)])


def test_a_registry_keeps_needs() -> None:
    registry: Registry[Any] = Registry("kind")
    registry.register("plain")(lambda: None)
    registry.register("needy", needs=("rows", "keep"))(lambda: None)
    assert (registry["plain"].needs, registry["needy"].needs) == ((), ("rows", "keep"))


def test_a_step_within_a_step_survives_a_recipe_file(tmp_path: Path) -> None:
    data = {"about": "a", "distill": [{"use": "mean_diff"}, {"use": "union", "other": {"use": "svd", "k": 3}}]}
    made = parse_recipe(data, "here")
    (tmp_path / "copy.toml").write_text(dump_toml(made))
    assert load_recipe(tmp_path / "copy.toml").distill == made.distill
    assert 'other = { use = "svd", k = 3 }' in dump_toml(made)
    with pytest.raises(UserError, match="'svd': k"):
        load_recipe(tmp_path / "copy.toml", {"distill.1.other.k": 99})


# ----------------------------------------------------------------------------------------------- directions
def test_directions_must_be_orthonormal() -> None:
    one = torch.ones(1)
    Directions(torch.eye(3)[None, :2], one, one, "")
    for wrong in (torch.ones(1, 2, 3), 2 * torch.eye(3)[None], torch.eye(3)[None, [0, 0]]):
        with pytest.raises(ValueError, match="orthonormal"):
            Directions(wrong, one, one, "")


def test_saved_directions_are_the_same(tmp_path: Path) -> None:
    found = find_directions(planted()[0], [Step(use="svd", k=3)])
    save_directions(found, tmp_path)
    again = load_directions(tmp_path)
    assert all(torch.equal(getattr(found, name), getattr(again, name)) for name in ("basis", "score", "raw"))
    assert (again.unit, again.trace) == (found.unit, found.trace)
