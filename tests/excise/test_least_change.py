"""Covectors of least change: they read as much of the groups' difference, and of everything else the least."""

from __future__ import annotations

import pytest
import torch
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.probing import WriterContrast
from obliteratus.core.settings import Excise, Probe
from obliteratus.core.types import Edit, PromptSet
from obliteratus.distill.means import mean_diff
from obliteratus.excise.least_change import choose_covectors, remove_difference
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.needs import wanted_by
from obliteratus.excise.plan import plan_edits
from obliteratus.inference.chat_template import render_prompts
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.probe.probe import collect_activations

WIDTH = 24


def draw(k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(k, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def moment() -> torch.Tensor:
    """A second moment with variances from 0.01 to 9."""
    rows = draw(200) * torch.linspace(0.1, 3, WIDTH, dtype=torch.float64)
    return rows.T @ rows / 200


def contrast(difference: torch.Tensor, moment: torch.Tensor) -> WriterContrast:
    share = torch.full((len(difference),), 1 / len(difference))
    whitened = torch.linalg.solve(moment, difference.T).T
    return WriterContrast(difference.float(), whitened.float(), share)


@pytest.mark.parametrize("k", [1, 3])
def test_they_solve_the_constrained_problem(moment: torch.Tensor, k: int) -> None:
    """Golden: each covector with the multipliers of its constraints, as one linear system in float64 (KKT)."""
    basis = torch.linalg.qr(draw(k, 1).T)[0].T.contiguous()
    difference = draw(k, 2)
    found = choose_covectors(basis.float(), None, contrast(difference, moment)).double()
    system = torch.cat([torch.cat([moment, difference.T], 1), torch.cat([difference, torch.zeros(k, k)], 1)])
    right = torch.cat([torch.zeros(WIDTH, k, dtype=torch.float64), difference @ basis.T])
    expected = torch.linalg.solve(system, right)[:WIDTH].T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_others_that_read_the_difference_read_more_of_the_rest(moment: torch.Tensor) -> None:
    basis, difference = torch.linalg.qr(draw(1, 1).T)[0].T.contiguous(), draw(1, 2)
    found = choose_covectors(basis.float(), None, contrast(difference, moment)).double()

    def rest(along: torch.Tensor) -> float:
        return float((along @ moment @ along.T).trace())

    assert rest(found) < rest(basis) / 2
    for seed in range(3, 9):
        other = found + 0.1 * draw(1, seed)
        other = other - (other - found) @ difference.T / (difference @ difference.T) @ difference
        torch.testing.assert_close(other @ difference.T, basis @ difference.T, rtol=1e-5, atol=1e-5)
        assert rest(other) > rest(found)


def test_covectors_say_how_much_is_removed(moment: torch.Tensor) -> None:
    basis, difference = torch.linalg.qr(draw(1, 1).T)[0].T.contiguous(), draw(1, 2)
    start = 2 * basis + 0.1 * draw(1, 3)
    found = choose_covectors(basis.float(), start.float(), contrast(difference, moment)).double()
    torch.testing.assert_close(found @ difference.T, start @ difference.T, rtol=1e-4, atol=1e-4)


def test_one_direction_is_chosen_by_the_mean_of_the_categories(moment: torch.Tensor) -> None:
    basis, difference = torch.linalg.qr(draw(1, 1).T)[0].T.contiguous(), draw(4, 2)
    whole = contrast(difference.mean(0, keepdim=True), moment)
    found = choose_covectors(basis.float(), None, contrast(difference, moment))
    torch.testing.assert_close(found, choose_covectors(basis.float(), None, whole), rtol=1e-4, atol=1e-5)


def test_categories_that_say_the_same_change_nothing(moment: torch.Tensor) -> None:
    """Two of three differences are equal: their matrix has no inverse."""
    basis, difference = torch.linalg.qr(draw(2, 1).T)[0].T.contiguous(), draw(2, 2)
    twice = torch.cat([difference, difference[:1]])
    found = choose_covectors(basis.float(), None, contrast(twice, moment))
    expected = choose_covectors(basis.float(), None, contrast(difference, moment))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------- a writer's own difference
@pytest.mark.parametrize("k", [1, 2])
def test_the_own_difference_is_removed_by_the_smallest_projection(moment: torch.Tensor, k: int) -> None:
    """Golden: A with the multipliers of A Bᵀ = I, as one linear system in float64 (KKT)."""
    difference = draw(3, 2)
    basis, found = (x.double() for x in remove_difference(contrast(difference, moment), k))
    system = torch.cat([torch.cat([moment, basis.T], 1), torch.cat([basis, torch.zeros(k, k)], 1)])
    right = torch.cat([torch.zeros(WIDTH, k, dtype=torch.float64), torch.eye(k, dtype=torch.float64)])
    torch.testing.assert_close(found, torch.linalg.solve(system, right)[:WIDTH].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(basis @ basis.T, torch.eye(k, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    if k == 1:
        mean = difference.mean(0)
        torch.testing.assert_close(mean - (found @ mean) @ basis, torch.zeros_like(mean), rtol=0, atol=1e-4)


def test_more_directions_than_the_categories_differ_in(moment: torch.Tensor) -> None:
    """Three categories that lie on one line differ in one way, and no groups that are alike in none."""
    same = draw(1, 2).repeat(3, 1)
    assert len(remove_difference(contrast(same, moment), 3)[0]) == 1
    for k in (1, 3):
        assert len(remove_difference(contrast(torch.zeros(3, WIDTH, dtype=torch.float64), moment), k)[0]) == 0


def test_a_second_edit_for_each_writer(prompts: PromptSet) -> None:
    subject = tiny_subject("llama")
    options = Excise(least_change=True, own_difference=True)
    acts = collect_activations(subject, prompts, Probe(keep="moments"), wanted_by(options, subject.sites))
    weights = torch.ones(len(subject.sites))
    both = plan_edits(subject, mean_diff(acts, None), weights, acts, options)
    one = plan_edits(
        subject, mean_diff(acts, None), weights, acts, options.model_copy(update={"own_difference": False})
    )
    assert len(both.edits) == 2 * len(one.edits)
    assert {e.site for e in both.edits} == {e.site for e in one.edits}


# ------------------------------------------------------------------------------------------ on a model
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_control_texts_change_less_and_the_difference_as_much(name: str, prompts: PromptSet) -> None:
    """At the only edited writer, whose inputs are the unedited model's."""
    subject = tiny_subject(name)
    options = Excise(parts=("mlp.out",), least_change=True)
    acts = collect_activations(subject, prompts, Probe(keep="moments"), wanted_by(options, subject.sites))
    directions = mean_diff(acts, None)
    weights = torch.tensor(
        [float(s.layer == subject.n_layers - 1 and s.part in ("mlp.out", "expert.out")) for s in subject.sites]
    )
    plans = {
        least: plan_edits(subject, directions, weights, acts, options.model_copy(update={"least_change": least}))
        for least in (True, False)
    }
    changed, removed = {}, {}
    for least, plan in plans.items():
        site = plan.edits[0].site
        edit = plan.edits[0]
        assert isinstance(edit, Edit)
        whole: list[torch.Tensor] = []
        for text in prompts["control"]:
            row = torch.tensor(render_prompts(subject, [text]))
            outputs = []
            for applied_plan in (None, plan):
                seen: list[torch.Tensor] = []
                with applied(subject, applied_plan) if applied_plan else torch.no_grad():
                    handle = subject.module(site.path).register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
                    with torch.no_grad():
                        subject.model(row)
                    handle.remove()
                outputs.append(seen[0].detach().view(-1, subject.width))
            whole.append(outputs[1][1:] - outputs[0][1:])
        changed[least] = float(torch.cat(whole).square().sum())
        found = acts.contrasts[site.path]
        removed[least] = edit.along.double() @ (found.share @ found.difference).double()
    assert changed[True] < 0.9 * changed[False]
    torch.testing.assert_close(removed[True], removed[False], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("other", [{"anchored": True}, {"heads": 0.5}])
def test_what_it_excludes(other: dict[str, object]) -> None:
    with pytest.raises(UserError, match="least_change exclude each other"):
        load_recipe("basic", {"excise.least_change": True, **{f"excise.{k}": v for k, v in other.items()}})


def test_the_own_difference_needs_least_change() -> None:
    with pytest.raises(UserError, match="set least_change too"):
        load_recipe("basic", {"excise.own_difference": True})
