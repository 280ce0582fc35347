"""A contract for every registered extractor: what was planted is found, what was not is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.planted import LOOSE, PROMPTS, SHIFT, STREAMS, cosine, group, planted, shuffled

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions
from obliteratus.distill import extractors, find_directions, load_directions, save_directions

# Extractor → the steps that show it. A new extractor needs no entry unless it needs options or a step before it.
MEAN = {"use": "mean_diff"}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "single": [MEAN, {"use": "single"}],
    "orthogonal_to_control": [MEAN, {"use": "orthogonal_to_control"}],
    "winsorise": [{"use": "winsorise"}, MEAN],
    "union": [MEAN, {"use": "union"}],
    "blend": [MEAN, {"use": "blend"}],
    "interpolate": [MEAN, {"use": "interpolate", "at": 0.75}],
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


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_a_planted_direction_is_found(self, name: str) -> None:
        acts, truth = planted()
        found = find_directions(acts, steps(name))
        if name in ONE_AT_ALL:
            at = ONE_AT_ALL[name]
            truth = truth[int(found.score.argmax()) if at is None else at].expand_as(truth)
        assert (cosine(found, truth) > BOUND.get(name, 0.95)).all()  # sign included

    def test_shuffled_labels_find_nothing(self, name: str) -> None:
        acts, truth = planted()
        found = find_directions(shuffled(acts), steps(name))
        real = find_directions(acts, steps(name))
        delta = shuffled(acts)["target"].mean - shuffled(acts)["control"].mean
        assert (found.score[1:] < 0.25 * real.score[1:]).all()
        assert (delta[1:] * truth[1:]).sum(1).abs().max() < 0.25 * SHIFT

    def test_rows_are_orthonormal_and_turned_to_the_target(self, name: str) -> None:
        acts, _ = planted()
        found = find_directions(acts, steps(name))
        gram = found.basis @ found.basis.mT
        torch.testing.assert_close(gram[1:], torch.eye(gram.shape[1]).expand_as(gram[1:]), rtol=0, atol=1e-5)
        if name not in ONE_AT_ALL:
            delta = acts["target"].mean - acts["control"].mean
            assert (torch.einsum("lkw,lw->lk", found.basis, delta)[1:] >= 0).all()

    def test_scores_are_shares(self, name: str) -> None:
        found = find_directions(planted()[0], steps(name))
        assert ((found.score >= 0) & (found.score <= 1)).all()
        assert (found.score[1:] > 0).all()
        assert found.unit

    def test_scores_grow_with_the_difference(self, name: str) -> None:
        weak, strong = (find_directions(planted(shift=x)[0], steps(name)).score[1:] for x in (2.0, 8.0))
        assert (strong > 2 * weak).all()

    def test_the_trace_names_all_steps(self, name: str) -> None:
        assert find_directions(planted()[0], steps(name)).trace == tuple(s.use for s in steps(name))

    def test_inputs_stay_as_they_are(self, name: str) -> None:
        acts, _ = planted()
        before = acts["target"].rows.clone(), acts["control"].mean.clone()
        find_directions(acts, steps(name))
        assert torch.equal(acts["target"].rows, before[0])
        assert torch.equal(acts["control"].mean, before[1])

    def test_the_same_twice(self, name: str) -> None:
        one, two = (find_directions(planted()[0], steps(name)) for _ in range(2))
        assert torch.equal(one.basis, two.basis)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ONE_AT_ALL])
def test_where_the_groups_agree_nothing_is_found(name: str) -> None:
    found = find_directions(planted()[0], steps(name))
    assert (found.basis[0] == 0).all()
    assert found.score[0] == 0


# ------------------------------------------------------------------------------------------ golden values
def test_mean_diff_is_the_unit_difference() -> None:
    acts, _ = planted()
    found = find_directions(acts, steps("mean_diff"))
    target, control = (acts[g].rows.double().mean(0) for g in ("target", "control"))
    delta = target - control
    torch.testing.assert_close(found.basis[1:, 0].double(), (delta / delta.norm(dim=1)[:, None])[1:], **LOOSE)
    torch.testing.assert_close(found.raw[1:].double(), delta.norm(dim=1)[1:], **LOOSE)
    share = delta.norm(dim=1) / (target.norm(dim=1) + control.norm(dim=1))
    torch.testing.assert_close(found.score[1:].double(), share[1:], **LOOSE)


@pytest.mark.parametrize("paired", [False, True])
def test_svd_is_the_top_of_the_second_moment(paired: bool) -> None:
    acts, _ = planted()
    found = find_directions(acts, steps("svd", k=3, paired=paired))
    target, control = (acts[g].rows.double() for g in ("target", "control"))
    rows = target - (control if paired else control.mean(0))
    for stream in range(1, STREAMS):
        values, vectors = torch.linalg.eigh(rows[:, stream].T @ rows[:, stream])
        top = vectors[:, -3:]
        basis = found.basis[stream].double()
        torch.testing.assert_close(basis.T @ basis, top @ top.T, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.raw[stream].double(), values[-3:].sum() / PROMPTS, **LOOSE)


def test_svd_scores_no_less_than_with_fewer_directions() -> None:
    acts, _ = planted()
    few, many, mean = (
        find_directions(acts, s).score for s in (steps("svd", k=1), steps("svd", k=6), steps("mean_diff"))
    )
    assert (few <= many + 1e-6).all()
    assert (many <= mean + 1e-6).all()


@pytest.mark.parametrize(("depth", "at"), [(0.25, 1), (1.0, 4), (0.6, 2)])
def test_single_takes_the_named_layer(depth: float, at: int) -> None:
    acts, truth = planted()
    found = find_directions(acts, steps("single", depth=depth))
    assert (cosine(found, truth[at].expand_as(truth)) > 0.95).all()


@pytest.mark.parametrize(("depth", "at"), [(0.0, 1), (0.5, 3), (0.74, 3), (0.75, 4), (1.0, 4)])
def test_single_takes_the_stream_that_leaves_the_named_block(depth: float, at: int) -> None:
    """Four blocks: ⌊4 · depth⌋ and one more."""
    found, every = (
        find_directions(planted()[0], s) for s in (steps("single", depth=depth, leaving=True), steps("mean_diff"))
    )
    assert torch.equal(found.basis, every.basis[at].expand_as(every.basis))


def test_pairs_cuts_the_larger_group() -> None:
    """Both ways round; what is left is the first rows and their mean, and paired svd then runs."""
    acts, _ = planted()
    for name in ("target", "control"):
        fewer = replace(acts, groups={**acts.groups, name: group(acts[name].rows[:150])})
        with pytest.raises(UserError, match="150"):
            find_directions(fewer, [Step(use="svd", k=2, paired=True)])
        cut = replace(acts, groups={**acts.groups, **{g: group(acts[g].rows[:150]) for g in ("target", "control")}})
        found, wanted = (
            find_directions(a, s) for a, s in ((fewer, steps("pairs")), (cut, steps("svd", k=2, paired=True)))
        )
        torch.testing.assert_close(found.basis, wanted.basis)
        torch.testing.assert_close(found.score, wanted.score)


def test_single_takes_the_best_layer() -> None:
    acts, _ = planted()
    acts["target"].mean[3] += acts["target"].mean[3] - acts["control"].mean[3]
    assert int(find_directions(acts, steps("mean_diff")).score.argmax()) == 3
    found = find_directions(acts, steps("single"))
    torch.testing.assert_close(found.basis, found.basis[3].expand_as(found.basis))


def test_orthogonal_to_control_leaves_the_control_mean_alone() -> None:
    acts, _ = planted()
    acts["target"].mean[:, 0] += 30.0  # chance leans on a massive dimension
    mean = torch.nn.functional.normalize(acts["control"].mean, dim=1)
    for first in ({"use": "mean_diff"}, {"use": "svd", "k": 3}):
        before, after = (
            find_directions(acts, [Step(**first), *more]) for more in ([], [Step(use="orthogonal_to_control")])
        )
        along = [torch.einsum("lkw,lw->lk", d.basis, mean)[1:].abs().max() for d in (before, after)]
        assert along[0] > 0.05
        assert along[1] < 1e-4


# ---------------------------------------------------------------------------------------------- bad input
def test_moments_are_enough_for_means_and_not_for_svd() -> None:
    acts, truth = planted(keep=False)
    assert (cosine(find_directions(acts, steps("mean_diff")), truth) > 0.95).all()
    with pytest.raises(UserError, match=r"'svd' needs every prompt.* set probe.keep"):
        find_directions(acts, steps("svd"))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], "has no step that finds directions"),
        ([Step(use="single")], "put e.g. mean_diff first"),
        ([Step(use="svd", k=30)], "k=30 directions need at least 30 target prompts; got 20"),
        ([Step(use="svd", k=65)], "k: input should be less than or equal to 64"),
        ([Step(use="svd", K=3)], "'svd': K"),
        ([Step(use="mean_dif")], "did you mean 'mean_diff'"),
    ],
)
def test_what_cannot_run_says_why(recipe: list[Step], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_directions(planted(n=20)[0], recipe)


def test_paired_groups_of_unequal_length_are_refused() -> None:
    acts, _ = planted()
    short = replace(acts, groups={**acts.groups, "control": group(acts["control"].rows[:150])})
    assert find_directions(short, steps("svd")).score[1:].min() > 0
    with pytest.raises(UserError, match="paired=true needs groups of one length, got 200 target and 150"):
        find_directions(short, steps("svd", paired=True))


def test_directions_must_be_orthonormal() -> None:
    one = torch.ones(1)
    Directions(torch.eye(3)[None, :2], one, one, "")
    for wrong in (torch.ones(1, 2, 3), 2 * torch.eye(3)[None], torch.eye(3)[None, [0, 0]]):
        with pytest.raises(ValueError, match="orthonormal"):
            Directions(wrong, one, one, "")


def test_saved_directions_are_the_same(tmp_path: Path) -> None:
    found = find_directions(planted()[0], steps("svd", k=3))
    save_directions(found, tmp_path)
    again = load_directions(tmp_path)
    assert all(torch.equal(getattr(found, name), getattr(again, name)) for name in ("basis", "score", "raw"))
    assert (again.unit, again.trace) == (found.unit, found.trace)
