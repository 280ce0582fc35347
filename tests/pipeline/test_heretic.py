"""`heretic` against the formula of Heretic 1.4, whose exported weights `python -m bench.heretic_weights` compares."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.support.tiny import tiny_subject
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.core.types import PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.excise.change import edit_module_weight
from obliteratus.excise.plan import plan_edits
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.probe.probe import collect_activations
from obliteratus.search.space import apply_values
from obliteratus.weigh import weigh_sites
from obliteratus.weights.matrices import read_weight

PER_LAYER, GLOBAL = 0, 1  # places among the choices of the space
KERNELS = {"attn.out": (1.2, 0.7, 0.4, 0.45), "mlp.out": (0.9, 0.9, 0.2, 0.3)}
AT = 0.55


def kernel(layer: int, last: int, values: tuple[float, float, float, float]) -> float:
    """Weights fall linearly from the peak to the smallest one at the distance, and are 0 beyond."""
    top, peak, least, reach = values
    distance = abs(layer - peak * last)
    if distance > reach * last:
        return 0.0
    return top + (least * top - top) * distance / (reach * last)


def directions(target: Tensor, control: Tensor) -> Tensor:
    """Of each layer's output: the normalized difference less its component along the control mean, in float64."""
    rows = normalize(target - control, dim=1)
    along = normalize(control, dim=1)
    return normalize(rows - (rows * along).sum(1, keepdim=True) * along, dim=1)


def formula(weight: Tensor, direction: Tensor, strength: float) -> Tensor:
    """Project the row-normalized matrix, give its rows their lengths back, and keep rank 3 of the change."""
    unit = normalize(weight, dim=1)
    edited = weight.norm(dim=1, keepdim=True) * normalize(
        unit - strength * torch.outer(direction, direction) @ unit, dim=1
    )
    u, sizes, v = torch.linalg.svd(edited - weight, full_matrices=False)
    return weight + u[:, :3] * sizes[:3] @ v[:3]


def wanted(subject: Subject, target: Tensor, control: Tensor, scope: int) -> dict[tuple[int, str], Tensor]:
    """Each edited matrix by layer and part. The means are those of streams, of which the first enters layer 0."""
    rows, last = directions(target[1:], control[1:]), subject.n_layers - 1
    index = AT * last
    low = math.floor(index)
    one = normalize(torch.lerp(rows[low], rows[low + 1], index - low), dim=0)
    result = {}
    for site in subject.sites:
        strength = kernel(site.layer, last, KERNELS[site.part]) if site.part in KERNELS else 0.0
        if strength:
            weight = read_weight(subject.module(site.path), site).double()
            direction = one if scope == GLOBAL else rows[site.layer]
            result[site.layer, site.part] = formula(weight, direction, strength)
    return result


@pytest.mark.parametrize("scope", [PER_LAYER, GLOBAL])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_recipe_computes_heretics_formula(name: str, scope: int, prompts: PromptSet) -> None:
    subject, recipe = tiny_subject(name), load_recipe("heretic")
    assert recipe.search is not None
    values = {"distill": recipe.search.space["distill"].choices[scope]}
    values |= {"distill.2.at": AT} if scope == GLOBAL else {}
    for i, kernel_values in enumerate(KERNELS.values()):
        names = ("max_weight", "peak", "min_weight", "reach")
        values |= {f"weigh.{i}.{name}": value for name, value in zip(names, kernel_values, strict=True)}
    made = apply_values(recipe, values)
    acts = collect_activations(subject, prompts, made.probe)
    found = find_directions(acts, made.distill)
    plan = plan_edits(subject, found, weigh_sites(found, subject.sites, acts, made.weigh), acts, made.excise)
    expected = wanted(subject, acts["target"].mean.double(), acts["control"].mean.double(), scope)
    assert {(e.site.layer, e.site.part) for e in plan.edits} == set(expected)
    for edit in plan.edits:
        before = read_weight(subject.module(edit.site.path), edit.site)
        after = edit_module_weight(subject.module(edit.site.path), [edit])
        change = expected[edit.site.layer, edit.site.part] - before
        error = (after.double() - before - change).norm() / change.norm()
        assert error < 1e-3
        rows = edit_module_weight(subject.module(edit.site.path), [replace(edit, norm="rows")]) - before
        assert (rows - change).norm() > 0.02 * change.norm()  # negative control: another norm rule
