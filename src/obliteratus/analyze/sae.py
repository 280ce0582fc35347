"""Which features of a sparse autoencoder the direction is made of, and whether it takes fewer than chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.along import Aim, Stream, choose_direction
from obliteratus.analyze.auc import delong_auc
from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.pursuit import NONE, coefficients, matching_pursuit
from obliteratus.analyze.samples import (
    DRAWS,
    LEVEL,
    Draws,
    Level,
    Sample,
    chance_interval,
    familywise_p_values,
    permuted_orders,
    sample_of,
)
from obliteratus.analyze.sparse_parts import Atom, SparseParts
from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Bool, Float, Int
from obliteratus.distill.coder import Coder
from obliteratus.distill.pretrained import load_coder
from obliteratus.distill.sae import check_enough_prompts, rows_at, scale_streams
from obliteratus.distill.sparse import Training, train_coders
from obliteratus.verify.intervals import wilson_rate

ATOMS = 10  # a direction that takes more is not made of a few features
WHO = "analysis 'sae'"


@analyses.register("sae", cite="arXiv:2309.08600, doi:10.1109/ACSSC.1993.342465", needs=("rows",))
def sae(
    ground: AnalysisContext,
    *,
    stream: Stream = None,
    atoms: Annotated[int, Field(ge=1, le=64)] = ATOMS,
    training: Training = Training(),  # noqa: B008 — frozen
    pretrained: str | None = None,
    draws: Draws = DRAWS,
    level: Level = LEVEL,
    seed: int = 0,
) -> SparseParts:
    """Which features of a sparse autoencoder sum to the direction, and whether it takes fewer of them than chance.

    The unit direction is decomposed over the features' unit decoder rows by orthogonal matching pursuit (`matching_pursuit`), up
    to ``atoms`` of them; of a dictionary trained here, those that never fire are left out: nothing was learnt in them.
    Chance: ``draws`` mean differences under permuted labels, decomposed in the same way; the dictionary never sees the
    labels, so that for a mean difference p is exact, and for any other direction no more than a comparison. The largest
    excess over all numbers of atoms counts (`familywise_p_values`).

    Each feature's AUC and rates are of the fit prompts, on which it was chosen: they flatter it, and their intervals do
    not know. p does: it compares with the features that permuted labels choose, on those labels. A feature is a row of
    one dictionary; training with another seed gives others.

    stream: None is the best-scored. training: as in the distill step ``sae``, on the rows of all groups. pretrained: a
    SAELens file in place of training; give the stream it was trained on, block + 1 for hook_resid_post. Needs rows;
    UserError for fewer than 50 prompts without ``pretrained``, 2 of each group, and a file that does not fit the model.
    """
    aim = choose_direction(ground, stream, "sae")
    if pretrained is not None and stream is None:
        raise UserError(f"{WHO}: pretrained needs stream, the index it was trained on; got none")
    sample = sample_of(ground.acts, "sae")
    book = _dictionary(ground, aim.stream, training, pretrained)
    return _decomposed(sample, aim, book, atoms, permuted_orders(len(sample), draws, seed), level)


@dataclass(frozen=True)
class FeatureStatistics:
    """A dictionary, and what it says of the prompts."""

    source: str
    units: Float[Tensor, "features width"]
    """Decoder rows, of length 1; zeros for features that learnt nothing."""
    fired: Float[Tensor, "rows features"]
    """How much each fires on target prompts, then on control prompts."""
    explained: float
    """Of these rows' variance."""


def _dictionary(ground: AnalysisContext, stream: int, training: Training, pretrained: str | None) -> FeatureStatistics:
    """Read from its file, or trained on all groups' rows."""
    groups = rows_at(ground.acts, [stream])
    if pretrained is not None:
        source, coder = pretrained, load_coder(pretrained, ground.acts["target"].mean.shape[1])
    else:
        n = sum(x.shape[1] for x in groups.values())
        check_enough_prompts(n, WHO, "a pretrained dictionary")
        groups = scale_streams(groups)
        source, coder = (
            f"trained on the {n} prompts",
            train_coders(torch.cat(list(groups.values()), 1), training, "auto"),
        )
    rows = torch.cat([groups["target"], groups["control"]], 1)
    fired, units = coder.encode(rows)[0], normalize(coder.decoder[0], dim=1)
    if pretrained is None:  # what never fires on what it was trained on is as it began
        units = units * fired.any(0)[:, None]
    return FeatureStatistics(source, units, fired, _explained(coder, rows))


def _explained(coder: Coder, rows: Float[Tensor, "1 rows width"]) -> float:
    error = (coder.decode(coder.encode(rows)) - rows).double().square().sum()
    spread = (rows - rows.mean(1, keepdim=True)).double().square().sum()
    return float(1 - error / spread.clamp(min=torch.finfo(spread.dtype).tiny))


def _decomposed(
    sample: Sample, aim: Aim, book: FeatureStatistics, most: int, order: Int[Tensor, "draws rows"], level: float
) -> SparseParts:
    """The direction, and the mean differences of every order but the first, which is the true one."""
    units = torch.cat([aim.vector.double()[None], mean_differences(sample, aim.stream, order[1:])])
    found = matching_pursuit(normalize(units, dim=1), book.units, most)
    chances = familywise_p_values(
        (resampled_aucs(book.fired, found.atoms, target_members(order, sample.n)) - 0.5).abs()
    )
    return SparseParts(
        stream=aim.stream,
        source=book.source,
        features=int(book.units.any(1).sum()),
        rows_explained=book.explained,
        atoms=_atoms(aim, book, found.atoms[0], sample.n, chances),
        share=found.share[0],
        by_chance=chance_interval(found.share),
        p=familywise_p_values(found.share),
        level=level,
        draws=len(order) - 1,
        prompts=(sample.n, len(sample) - sample.n),
    )


def _atoms(
    aim: Aim, book: FeatureStatistics, chosen: Int[Tensor, " k"], n: int, p: Float[Tensor, " k"]
) -> tuple[Atom, ...]:
    """The direction's own, with what the prompts say of each."""
    chosen = chosen[chosen != NONE]
    size, made = coefficients(aim.vector, book.units[chosen]), []
    for feature, coefficient, chance in zip(chosen.tolist(), size.tolist(), p.tolist(), strict=False):
        one, two = book.fired[:n, feature], book.fired[n:, feature]
        target, control = (wilson_rate(int((x > 0).sum()), len(x)) for x in (one, two))
        made.append(Atom(feature, coefficient, delong_auc(one, two), target, control, chance))
    return tuple(made)


# ---------------------------------------------------------------------------------------------------- chance
def target_members(order: Int[Tensor, "draws rows"], n: int) -> Bool[Tensor, "draws rows"]:
    """Which rows stand at the target's places."""
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :n], True)


def mean_differences(sample: Sample, stream: int, order: Int[Tensor, "draws rows"]) -> Float[Tensor, "draws width"]:
    """Mean of the rows at the target's places less that of the others; fp64."""
    inside, n = target_members(order, sample.n), sample.n
    weights = torch.where(inside, 1 / n, -1 / (len(sample) - n)).double()
    return weights @ sample.at(stream)


def resampled_aucs(
    fired: Float[Tensor, "rows features"], chosen: Int[Tensor, "draws k"], target: Bool[Tensor, "draws rows"]
) -> Float[Tensor, "draws k"]:
    """AUC of each draw's features, on that draw's labels: Mann and Whitney's, by ranks, ties counted half; fp64.

    0.5 where a place holds no feature (`NONE`).
    """
    used, place = chosen.clamp(min=0).unique(return_inverse=True)
    values = fired[:, used].T.contiguous()
    ordered = values.sort(1).values
    below, upto = (torch.searchsorted(ordered, values, right=side).double() for side in (False, True))
    ranks = (below + upto + 1) / 2
    n = target.sum(1)
    sums = torch.stack([(ranks[place[:, k]] * target).sum(1) for k in range(chosen.shape[1])], 1)
    area = (sums - (n * (n + 1) / 2)[:, None]) / (n * (target.shape[1] - n))[:, None]
    return torch.where(chosen == NONE, 0.5, area)
