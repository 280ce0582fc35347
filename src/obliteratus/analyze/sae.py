"""Which features of a sparse autoencoder the direction is made of, and whether it takes fewer than chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.auc import delong_auc
from obliteratus.analyze.base import Aim, AnalysisContext, Stream, analyses, choose_direction
from obliteratus.analyze.samples import (
    DRAWS,
    LEVEL,
    Draws,
    Level,
    Sample,
    chance_interval,
    draw_permutations,
    familywise_p_values,
    read_sample,
)
from obliteratus.analyze.significance import ROUNDING
from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.shapes import Bool, Float, Int
from obliteratus.distill.autoencoder import SparseAutoencoder, load_autoencoder
from obliteratus.distill.sae import check_enough_prompts, normalize_streams, select_streams
from obliteratus.distill.train_autoencoder import Training, train_autoencoders
from obliteratus.report.curves import BLUE, GREY, ORANGE, Figure, add_legend
from obliteratus.verify.intervals import wilson_rate

NO_ATOM = -1  # in the place of an atom, where nothing is left to explain
TIE = 1e-6  # relative: of an atom and its opposite, which tie but for fp32 rounding (1e-7), the one along it is taken


@dataclass(frozen=True)
class Pursuit:
    """Of each direction, the atoms in the order they were taken."""

    atoms: Int[Tensor, "draws most"]
    """Rows of the dictionary; `NO_ATOM` from where on nothing is left that an atom explains."""
    share: Float[Tensor, "draws most"]
    """Of the direction's squared length, what the first 1, 2 … atoms span: 0–1, never falling; fp64."""


def matching_pursuit(units: Float[Tensor, "draws width"], dictionary: Float[Tensor, "n width"], most: int) -> Pursuit:
    """Each direction by at most ``most`` atoms: the one most along what is left, then all chosen are fitted anew.

    Pati, Rezaiifar and Krishnaprasad (1993). units: of length 1, fp64; a zero row takes no atom. dictionary: rows of
    length 1, or zero; of both signs, since a direction may be made of what fires less. Every step costs a product of
    draws × width × n in the dictionary's precision.
    """
    rest, places = units.clone(), []
    basis = torch.zeros(len(units), most, units.shape[1], dtype=units.dtype)
    shares = []
    for k in range(most):
        inner = rest.to(dictionary) @ dictionary.T
        atom = (inner.abs() * (1 + TIE * (inner > 0))).argmax(1)
        row = dictionary[atom].to(rest)
        some = (rest * row).sum(1).abs() > ROUNDING
        basis[:, k] = torch.where(some[:, None], _new(row, basis), 0.0)
        rest = rest - (rest * basis[:, k]).sum(1, keepdim=True) * basis[:, k]
        places.append(torch.where(some, atom, NO_ATOM))
        shares.append((units.square().sum(1) - rest.square().sum(1)).clamp(0, 1))
    return Pursuit(torch.stack(places, 1), torch.stack(shares, 1))


def _new(row: Float[Tensor, "draws width"], basis: Float[Tensor, "draws most width"]) -> Float[Tensor, "draws width"]:
    """What the rows have beside the basis, of length 1."""
    for _ in range(2):  # a second time takes out what rounding left of the first
        row = row - torch.einsum("dk,dkw->dw", torch.einsum("dkw,dw->dk", basis, row), basis)
    return normalize(row, dim=1)


def fit_coefficients(unit: Float[Tensor, " width"], atoms: Float[Tensor, "k width"]) -> Float[Tensor, " k"]:
    """By which the atoms sum to the direction as nearly as they can (least squares); fp64."""
    made: Tensor = torch.linalg.lstsq(atoms.double().T, unit.double()[:, None]).solution
    return made[:, 0]


NAMED = 3  # features in the line for people


@dataclass(frozen=True)
class Atom:
    """A feature that the direction is made of."""

    feature: int
    """Row of the dictionary."""
    coefficient: float
    """Of its unit decoder row, where all atoms together are fitted to the unit direction."""
    auc: Score
    """Of how much it fires, target over control, on the prompts that the direction was fitted on."""
    target: Score
    """Share of target prompts that it fires on at all."""
    control: Score
    p: float
    """That the atom in this place of a direction of permuted labels tells *their* groups apart as well."""


@dataclass(frozen=True)
class SparseDecomposition:
    """A direction as a sum of features."""

    stream: int
    source: str
    """Where the dictionary is from."""
    features: int
    """In it; of one trained here, those that fire on any of its prompts."""
    rows_explained: float
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖² of the prompts' rows: what the dictionary knows of this stream; may be below 0."""
    atoms: tuple[Atom, ...]
    """In the order they were taken."""
    share: Float[Tensor, " most"]
    """Of the direction's squared length, by the first 1, 2 … atoms."""
    by_chance: Float[Tensor, "ends most"]
    """2.5 % and 97.5 % quantiles of the same for mean differences of permuted labels."""
    p: Float[Tensor, " most"]
    """That these are as sparse, corrected for all numbers of atoms."""
    level: float
    draws: int
    prompts: tuple[int, int]
    """Target and control."""

    @property
    def significant(self) -> tuple[int, ...]:
        """Numbers of atoms that explain more of the direction than chance allows: none where it is not sparse."""
        return tuple(((self.p <= self.level).nonzero().flatten() + 1).tolist())

    @property
    def telling(self) -> tuple[int, ...]:
        """Features among the atoms that tell the groups apart beyond what choosing them explains."""
        return tuple(atom.feature for atom in self.atoms if atom.p <= self.level)

    def to_dict(self) -> dict[str, Any]:
        """Shares by number of atoms; the atoms, with intervals."""
        scores = {name: [vars(a)[name].model_dump() for a in self.atoms] for name in ("auc", "target", "control")}
        return {
            "stream": self.stream,
            "dictionary": self.source,
            "features": self.features,
            "rows_explained": self.rows_explained,
            "prompts": list(self.prompts),
            "level": self.level,
            "permutations": self.draws,
            "found": list(self.significant),
            "telling": list(self.telling),
            "explained": self.share.tolist(),
            "explained_by_chance_low": self.by_chance[0].tolist(),
            "explained_by_chance_high": self.by_chance[1].tolist(),
            "p": self.p.tolist(),
            "atoms": {
                "feature": [a.feature for a in self.atoms],
                "coefficient": [a.coefficient for a in self.atoms],
                "auc": scores["auc"],
                "fires_on_target": scores["target"],
                "fires_on_control": scores["control"],
                "p": [a.p for a in self.atoms],
            },
        }

    def summary(self) -> str:
        """Of how few features, beside chance."""
        n, where = sum(self.prompts), f"the direction at stream {self.stream}"
        if not self.significant:
            return f"{where} is no sparser in {self.features} features than chance would have it ({n} prompts)"
        k = self.significant[0]
        named = ", ".join(f"{a.feature} ({a.coefficient:+.2f}, AUC {a.auc.value:.2f})" for a in self.atoms[:NAMED])
        return (
            f"{where} is sparser in {self.features} features than chance: {k} {'explains' if k == 1 else 'explain'} "
            f"{float(self.share[k - 1]):.0%} (chance {float(self.by_chance[1, k - 1]):.0%} at most, {n} prompts); "
            f"first features {named}"
        )

    def draw(self, figure: Figure) -> None:
        """The share explained beside chance's, and how often each atom fires."""
        left, right = figure.subplots(1, 2)
        counts = range(1, len(self.share) + 1)
        left.plot(counts, self.share.tolist(), ".-", color=BLUE, label="the direction")
        low, high = self.by_chance.tolist()
        left.fill_between(counts, low, high, color=GREY, alpha=0.4, lw=0, label="permuted labels, 95 %")
        left.set(xlabel="features", ylabel="share of the direction explained", ylim=(0, 1.03))
        for name, color, shift in (("target", ORANGE, -0.1), ("control", BLUE, 0.1)):
            scores = [vars(a)[name] for a in self.atoms]
            values, places = [s.value for s in scores], [i + shift for i in range(len(scores))]
            ends = [[s.value - s.low for s in scores], [s.high - s.value for s in scores]]
            right.errorbar(places, values, yerr=ends, fmt="o", color=color, label=name)
        right.set_xticks(range(len(self.atoms)), [str(a.feature) for a in self.atoms], rotation=90)
        right.set(xlabel="feature, in the order taken", ylabel="share of prompts that it fires on", ylim=(-0.03, 1.03))
        add_legend(left)
        add_legend(right)


ATOMS = 10  # a direction that takes more is not made of a few features
WHO = "analysis 'sae'"


@analyses.register("sae", cite="arXiv:2309.08600, doi:10.1109/ACSSC.1993.342465", needs=("rows",))
def decompose_into_features(
    context: AnalysisContext,
    *,
    stream: Stream = None,
    atoms: Annotated[int, Field(ge=1, le=64)] = ATOMS,
    training: Training = Training(),  # noqa: B008 — frozen
    pretrained: str | None = None,
    draws: Draws = DRAWS,
    level: Level = LEVEL,
    seed: int = 0,
) -> SparseDecomposition:
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
    aim = choose_direction(context, stream, "sae")
    if pretrained is not None and stream is None:
        raise UserError(f"{WHO}: pretrained needs stream, the index it was trained on; got none")
    sample = read_sample(context.activations, "sae")
    book = _dictionary(context, aim.stream, training, pretrained)
    return _decomposed(sample, aim, book, atoms, draw_permutations(len(sample), draws, seed), level)


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


def _dictionary(context: AnalysisContext, stream: int, training: Training, pretrained: str | None) -> FeatureStatistics:
    """Read from its file, or trained on all groups' rows."""
    groups = select_streams(context.activations, [stream])
    if pretrained is not None:
        source, coder = pretrained, load_autoencoder(pretrained, context.activations["target"].mean.shape[1])
    else:
        n = sum(x.shape[1] for x in groups.values())
        check_enough_prompts(n, WHO, "a pretrained dictionary")
        groups = normalize_streams(groups)
        source, coder = (
            f"trained on the {n} prompts",
            train_autoencoders(torch.cat(list(groups.values()), 1), training, "auto"),
        )
    rows = torch.cat([groups["target"], groups["control"]], 1)
    fired, units = coder.encode(rows)[0], normalize(coder.decoder[0], dim=1)
    if pretrained is None:  # what never fires on what it was trained on is as it began
        units = units * fired.any(0)[:, None]
    return FeatureStatistics(source, units, fired, _explained(coder, rows))


def _explained(coder: SparseAutoencoder, rows: Float[Tensor, "1 rows width"]) -> float:
    error = (coder.decode(coder.encode(rows)) - rows).double().square().sum()
    spread = (rows - rows.mean(1, keepdim=True)).double().square().sum()
    return float(1 - error / spread.clamp(min=torch.finfo(spread.dtype).tiny))


def _decomposed(
    sample: Sample, aim: Aim, book: FeatureStatistics, most: int, order: Int[Tensor, "draws rows"], level: float
) -> SparseDecomposition:
    """The direction, and the mean differences of every order but the first, which is the true one."""
    units = torch.cat([aim.vector.double()[None], compute_mean_differences(sample, aim.stream, order[1:])])
    found = matching_pursuit(normalize(units, dim=1), book.units, most)
    chances = familywise_p_values(
        (compute_permuted_aucs(book.fired, found.atoms, mark_target_rows(order, sample.n)) - 0.5).abs()
    )
    return SparseDecomposition(
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
    chosen = chosen[chosen != NO_ATOM]
    size, made = fit_coefficients(aim.vector, book.units[chosen]), []
    for feature, coefficient, chance in zip(chosen.tolist(), size.tolist(), p.tolist(), strict=False):
        one, two = book.fired[:n, feature], book.fired[n:, feature]
        target, control = (wilson_rate(int((x > 0).sum()), len(x)) for x in (one, two))
        made.append(Atom(feature, coefficient, delong_auc(one, two), target, control, chance))
    return tuple(made)


# ---------------------------------------------------------------------------------------------------- chance
def mark_target_rows(order: Int[Tensor, "draws rows"], n: int) -> Bool[Tensor, "draws rows"]:
    """Which rows stand at the target's places."""
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :n], True)


def compute_mean_differences(
    sample: Sample, stream: int, order: Int[Tensor, "draws rows"]
) -> Float[Tensor, "draws width"]:
    """Mean of the rows at the target's places less that of the others; fp64."""
    inside, n = mark_target_rows(order, sample.n), sample.n
    weights = torch.where(inside, 1 / n, -1 / (len(sample) - n)).double()
    return weights @ sample.at(stream)


def compute_permuted_aucs(
    fired: Float[Tensor, "rows features"], chosen: Int[Tensor, "draws k"], target: Bool[Tensor, "draws rows"]
) -> Float[Tensor, "draws k"]:
    """AUC of each draw's features, on that draw's labels: Mann and Whitney's, by ranks, ties counted half; fp64.

    0.5 where a place holds no feature (`NO_ATOM`).
    """
    used, place = chosen.clamp(min=0).unique(return_inverse=True)
    values = fired[:, used].T.contiguous()
    ordered = values.sort(1).values
    below, upto = (torch.searchsorted(ordered, values, right=side).double() for side in (False, True))
    ranks = (below + upto + 1) / 2
    n = target.sum(1)
    sums = torch.stack([(ranks[place[:, k]] * target).sum(1) for k in range(chosen.shape[1])], 1)
    area = (sums - (n * (n + 1) / 2)[:, None]) / (n * (target.shape[1] - n))[:, None]
    return torch.where(chosen == NO_ATOM, 0.5, area)
