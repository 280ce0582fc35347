"""A direction as a sum of features: planted ones alone, nothing in one population, and other references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import mannwhitneyu
from tests.support.contexts import activations_of, check_finding, context_of_activations, one_population
from tests.support.planted import planted, shuffled
from tests.support.sparse_features import WIDTH, acts_of, sparse_rows
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze import AnalysisContext, analyses, analyze
from obliteratus.analyze.sae import (
    NO_ATOM,
    SparseDecomposition,
    compute_mean_differences,
    compute_permuted_aucs,
    fit_coefficients,
    mark_target_rows,
    matching_pursuit,
)
from obliteratus.analyze.samples import draw_permutations, read_sample
from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations, Directions

FEATURES = 160  # of a dictionary made for a width of 64: none of its rows are at right angles


def run(context: AnalysisContext, **options: Any) -> SparseDecomposition:
    found = analyze(context, [Step(use="sae", **({"draws": 99} | options))])["sae"]
    assert isinstance(found, SparseDecomposition)
    return found


def dictionary(n: int, width: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A coder of random unit rows that are read as they are written; twice as long, which must not matter."""
    rows = dictionary(FEATURES, 64)
    parts = {"W_enc": rows.T.contiguous(), "b_enc": torch.zeros(FEATURES), "W_dec": 2 * rows, "b_dec": torch.zeros(64)}
    save_file(parts, tmp_path / "sae.safetensors")
    return str(tmp_path / "sae.safetensors")


def pointing(acts: Activations, direction: Tensor, stream: int = 2) -> AnalysisContext:
    """A context with this direction at one stream, and none elsewhere."""
    basis = torch.zeros(5, 1, 64)
    basis[stream, 0] = direction / direction.norm()
    score = basis.any(2)[:, 0].float()
    return context_of_activations(acts, Directions(basis, score, score, ""))


# ------------------------------------------------------------------------------------------- what is planted
@pytest.mark.parametrize("signs", [{7: 1.0}, {7: 1.0, 31: 1.0}, {7: 0.5, 31: -1.0, 90: 2.0}])
def test_a_sum_of_atoms_is_found_with_exactly_those_atoms(file: str, signs: dict[int, float]) -> None:
    rows = dictionary(FEATURES, 64)
    truth = sum((size * rows[i] for i, size in signs.items()), torch.zeros(64))
    found = run(pointing(one_population(), truth), pretrained=file, stream=2)
    assert {atom.feature for atom in found.atoms} == set(signs)
    for atom in found.atoms:
        assert atom.coefficient == pytest.approx(signs[atom.feature] / float(truth.norm()), abs=1e-5)
    assert found.share[len(signs) - 1 :].tolist() == pytest.approx([1.0] * (11 - len(signs)), abs=1e-9)
    assert len(signs) in found.significant
    assert found.features == FEATURES
    assert check_finding(found)["atoms"]["feature"] == [atom.feature for atom in found.atoms]


def test_a_planted_feature_is_learned_and_tells_the_groups_apart() -> None:
    """Rows of ten sparse features, of which one is the behavior's; the dictionary is trained on them, unlabeled."""
    rows, truth = sparse_rows(400)
    context = context_of_activations(acts_of(rows))
    found = run(context)
    assert found.significant[0] == 1
    first = found.atoms[0]
    assert first.feature in found.discriminating
    assert first.coefficient > 0.9
    assert first.auc.low > 0.85  # it is on in nine of ten target prompts, in no control prompt
    assert first.target.value > 0.8
    assert first.control.value < 0.1
    assert float(context.directions.basis[0, 0] @ truth[0]) > 0.95
    assert "sparser" in found.summary()
    assert "1 explains" in found.summary()
    check_finding(found)


def test_a_direction_of_many_features_is_not_sparse(file: str) -> None:
    """The negative control of the planted ones: a random direction, beside mean differences that are random too."""
    found = [
        run(pointing(one_population(), dictionary(1, 64, seed)[0]), pretrained=file, stream=2).significant
        for seed in range(40, 52)
    ]
    assert sum(bool(f) for f in found) <= 3  # of 12 at level 0.05: the binomial's 99.8 % point


# ---------------------------------------------------------------------------------------------------- chance
def test_one_population_gives_nothing() -> None:
    found = run(context_of_activations(one_population()), draws=199)
    assert found.significant == ()
    assert found.discriminating == ()
    assert "no sparser" in found.summary()
    assert run(context_of_activations(shuffled(planted()[0])), draws=199).significant == ()
    check_finding(found)


@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_false_findings_keep_to_the_level(spread: float) -> None:
    """Round populations and long ones, whose mean differences all lie near one axis, and features of a few prompts."""
    hits = torch.zeros(2)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(80, 1, 24, generator=generator) * torch.logspace(spread, -spread, 24)
        rows += 3 * (torch.rand(80, 1, 24, generator=generator) < 0.05)
        found = run(context_of_activations(activations_of(rows[:40], rows[40:])))
        hits += torch.tensor([bool(found.significant), bool(found.discriminating)])
    assert (hits <= 6).all(), hits  # 2 are the level, and 6 its binomial upper end (99.7 %)


# --------------------------------------------------------------------------------------- it is its definition
def by_hand(unit: numpy.ndarray, atoms: numpy.ndarray, most: int) -> tuple[list[int], list[float]]:
    """One direction, one step at a time, all chosen atoms fitted anew by the normal equations."""
    chosen: list[int] = []
    shares, rest = [], unit
    for _ in range(most):
        chosen.append(int(numpy.argmax(numpy.abs(atoms @ rest))))
        part = atoms[chosen].T
        rest = unit - part @ numpy.linalg.inv(part.T @ part) @ part.T @ unit
        shares.append(float(1 - rest @ rest))
    return chosen, shares


def test_pursuit_by_hand() -> None:
    atoms, units = (normalize(dictionary(n, 40, n).double(), dim=1) for n in (70, 6))
    found = matching_pursuit(units, atoms, 12)
    for i, unit in enumerate(units.numpy()):
        chosen, shares = by_hand(unit, atoms.numpy(), 12)
        assert found.atoms[i].tolist() == chosen
        assert found.share[i].tolist() == pytest.approx(shares, abs=1e-10)
    in_fp32 = matching_pursuit(units, atoms.float(), 12)  # as coders are stored
    torch.testing.assert_close(in_fp32.share, found.share, rtol=0, atol=1e-5)
    assert (found.share.diff(dim=1) >= 0).all()
    expected = numpy.linalg.lstsq(atoms[:5].T.numpy(), units[0].numpy(), rcond=None)[0]
    assert fit_coefficients(units[0], atoms[:5]).tolist() == pytest.approx(expected.tolist())


def test_pursuit_ends_where_nothing_is_left() -> None:
    atoms = torch.eye(4)[[0, 1, 1, 3]] * torch.tensor([1.0, 1.0, -1.0, 0.0])[:, None]
    units = normalize(
        torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0], [1.0, 2.0, 2.0, 0.0], [0.0] * 4]), dim=1
    )
    found = matching_pursuit(units.double(), atoms, 3)
    assert found.atoms.tolist() == [
        [1, NO_ATOM, NO_ATOM],
        [2, NO_ATOM, NO_ATOM],
        [1, 0, NO_ATOM],
        [NO_ATOM] * 3,
    ]  # of opposites, its own
    assert found.share[2].tolist() == pytest.approx([4 / 9, 5 / 9, 5 / 9])
    assert found.share[3].tolist() == [0, 0, 0]


def test_areas_are_mann_and_whitneys() -> None:
    generator = torch.Generator().manual_seed(3)
    fired = torch.randn(30, 6, generator=generator).clamp(min=0).round(decimals=1)  # with many ties
    order = draw_permutations(30, 4, seed=1)
    chosen, target = torch.randint(6, (5, 3), generator=generator), mark_target_rows(order, 12)
    chosen[2, 2] = NO_ATOM
    found = compute_permuted_aucs(fired, chosen, target)
    for draw in range(5):
        for k in range(3):
            if chosen[draw, k] == NO_ATOM:
                assert found[draw, k] == 0.5
                continue
            values = fired[:, chosen[draw, k]].double()
            one, two = values[target[draw]].numpy(), values[~target[draw]].numpy()
            assert float(found[draw, k]) == pytest.approx(mannwhitneyu(one, two).statistic / 12 / 18)


def test_permuted_labels_make_mean_differences() -> None:
    acts, _ = planted(n=20)
    sample, order = read_sample(acts, "sae"), draw_permutations(40, 3)
    made = compute_mean_differences(sample, 1, order)
    torch.testing.assert_close(made[0], (acts["target"].mean - acts["control"].mean)[1].double(), rtol=0, atol=1e-4)
    rows = torch.cat([acts["target"].rows, acts["control"].rows])[:, 1].double()
    torch.testing.assert_close(made[2], rows[order[2, :20]].mean(0) - rows[order[2, 20:]].mean(0))


# ------------------------------------------------------------------------------------------------- the edges
def test_what_it_cannot_work_with_is_refused(file: str) -> None:
    few = context_of_activations(planted(n=12)[0])  # in each of four groups
    with pytest.raises(UserError, match="48 prompts are too few to train on; give 50 or more"):
        run(few)
    assert run(few, pretrained=file, stream=2).prompts == (12, 12)  # nothing is trained, so these are enough
    with pytest.raises(UserError, match="pretrained is given without stream"):
        run(few, pretrained=file)
    with pytest.raises(UserError, match=r"stream 0 of 0 to \d has no direction"):
        run(few, pretrained=file, stream=0)
    with pytest.raises(UserError, match="64 wide and this model's stream is 48"):
        run(context_of_activations(acts_of(sparse_rows(60)[0])), pretrained=file, stream=0)
    assert WIDTH == 48
    with pytest.raises(UserError, match=r'set probe\.keep = "rows"'):
        run(context_of_activations(planted(keep=False)[0]))


def test_features_that_learned_nothing_are_left_out() -> None:
    """A dictionary trained here keeps features as they began; one from elsewhere learned them on other prompts."""
    found = run(context_of_activations(acts_of(sparse_rows(60)[0])), atoms=30, training={"sparsity": 1.0})
    assert found.features < 2 * WIDTH
    assert all(atom.target.value + atom.control.value > 0 for atom in found.atoms)


def test_it_asks_nothing_of_the_model_and_comes_out_the_same() -> None:
    assert not analyses["sae"].cost(analyses.check("sae", {}))
    context = context_of_activations(planted()[0])
    one, two = run(context), run(context)
    assert [atom.feature for atom in one.atoms] == [atom.feature for atom in two.atoms]
    torch.testing.assert_close(one.share, two.share)
    assert one.p.tolist() == two.p.tolist()
