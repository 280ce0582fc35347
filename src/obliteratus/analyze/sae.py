"""Which features of a sparse autoencoder the direction is made of, and whether it takes fewer of them than chance."""

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

ATOMS = 10  # a direction that takes more is not made of a few features
CALLER = "analysis 'sae'"
NO_ATOM = -1
TIE = 1e-6  # relative: an atom and its opposite tie but for fp32 rounding (1e-7); the one along the direction is taken
LISTED = 3  # features named in the summary


# ------------------------------------------------------------------------------------------------- the result
@dataclass(frozen=True)
class Atom:
    """A feature that the direction is made of."""

    feature: int
    """Row of the dictionary."""
    coefficient: float
    """Coefficient of its unit decoder row in the least-squares fit of all atoms to the unit direction."""
    auc: Score
    """AUC of its activation, target over control, on the prompts that the direction was fitted on."""
    target: Score
    """Share of target prompts on which it is active at all."""
    control: Score
    """Share of control prompts on which it is active at all."""
    p: float
    """The probability that the atom in this place of a direction of permuted labels separates *their* groups as
    well."""


@dataclass(frozen=True)
class SparseDecomposition:
    """A direction as a sum of a dictionary's features."""

    stream: int
    source: str
    """Where the dictionary comes from."""
    features: int
    """Features in the dictionary; of one trained here, those active on any of its prompts."""
    rows_explained: float
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖² of the prompts' rows: how well the dictionary reconstructs this stream; may be
    below 0."""
    atoms: tuple[Atom, ...]
    """In the order in which they were taken."""
    share: Float[Tensor, " most"]
    """Share of the direction's squared length that the first 1, 2 … atoms explain."""
    by_chance: Float[Tensor, "ends most"]
    """2.5 % and 97.5 % quantiles of the same for mean differences of permuted labels."""
    p: Float[Tensor, " most"]
    """The probability that these explain as much, corrected for all numbers of atoms and the atoms' own p."""
    level: float
    draws: int
    prompts: tuple[int, int]
    """Target and control prompts."""

    @property
    def significant(self) -> tuple[int, ...]:
        """Numbers of atoms that explain more of the direction than chance; none where it is not sparse."""
        return tuple(((self.p <= self.level).nonzero().flatten() + 1).tolist())

    @property
    def discriminating(self) -> tuple[int, ...]:
        """Features among the atoms that separate the groups beyond what their selection explains."""
        return tuple(atom.feature for atom in self.atoms if atom.p <= self.level)

    def to_dict(self) -> dict[str, Any]:
        """Return the shares by number of atoms, and the atoms with intervals."""
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
            "telling": list(self.discriminating),
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
        """Return how few features explain how much of the direction, beside chance."""
        n, where = sum(self.prompts), f"the direction at stream {self.stream}"
        if not self.significant:
            return f"{where} is no sparser in {self.features} features than chance ({n} prompts, level {self.level:g})"
        k = self.significant[0]
        listed = ", ".join(f"{a.feature} ({a.coefficient:+.2f}, AUC {a.auc.value:.2f})" for a in self.atoms[:LISTED])
        return (
            f"{where} is sparser in {self.features} features than chance: {k} {'explains' if k == 1 else 'explain'} "
            f"{float(self.share[k - 1]):.0%} (by chance at most {float(self.by_chance[1, k - 1]):.0%}, {n} prompts, "
            f"level {self.level:g}); first features {listed}"
        )

    def draw(self, figure: Figure) -> None:
        """Draw the share explained beside chance, and how often each atom is active."""
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
        right.set(xlabel="feature, in the order taken", ylabel="share of prompts it is active on", ylim=(-0.03, 1.03))
        add_legend(left)
        add_legend(right)


# ----------------------------------------------------------------------------------------------- the analysis
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
    """Decompose the direction into features of a sparse autoencoder, and test whether it takes fewer than chance.

    `matching_pursuit` decomposes the unit direction over the features' unit decoder rows, into at most ``atoms`` of
    them. Features of a dictionary trained here that are never active are left out, since they learned nothing. For
    chance, ``draws`` mean differences under permuted labels are decomposed the same way. The dictionary never sees the
    labels, so p is exact for a mean difference; for any other direction it is only a comparison. The largest excess
    over all numbers of atoms and all atoms' AUC counts (`familywise_p_values`): where labels mean nothing, anything is
    found in at most a share ``level`` of cases.

    Each feature's AUC and rates are measured on the fit prompts, on which it was selected, so they and their intervals
    are optimistic. Its p is not: it compares with the features that permuted labels select, on those labels. A feature
    is a row of one dictionary; training with another seed gives others.

    stream: None for the stream with the highest score. training: as in the distill step ``sae``, on the rows of all
    groups. pretrained: a SAELens file to use instead of training; ``stream`` must then be the stream it was trained on
    (block + 1 for hook_resid_post). Needs rows. Raises UserError for fewer than 50 prompts without ``pretrained``, for
    fewer than 2 prompts in a group, and for a file that does not fit the model.
    """
    aim = choose_direction(context, stream, "sae")
    if pretrained is not None and stream is None:
        raise UserError(f"{CALLER}: pretrained is given without stream; give the stream index that it was trained on")
    sample = read_sample(context.activations, "sae")
    dictionary = _load_or_train(context, aim.stream, training, pretrained)
    return _decompose(sample, aim, dictionary, atoms, draw_permutations(len(sample), draws, seed), level)


@dataclass(frozen=True)
class FeatureStatistics:
    """A dictionary, and its activations on the prompts."""

    source: str
    units: Float[Tensor, "features width"]
    """Unit decoder rows; zero for features that learned nothing."""
    active: Float[Tensor, "rows features"]
    """Each feature's activation on target prompts, then on control prompts."""
    explained: float
    """Share of these rows' variance that the dictionary explains."""


def _load_or_train(
    context: AnalysisContext, stream: int, training: Training, pretrained: str | None
) -> FeatureStatistics:
    """Return the dictionary from its file, or one trained on all groups' rows."""
    groups = select_streams(context.activations, [stream])
    if pretrained is not None:
        source, autoencoder = pretrained, load_autoencoder(pretrained, context.activations["target"].mean.shape[1])
    else:
        n = sum(x.shape[1] for x in groups.values())
        check_enough_prompts(n, CALLER, "a pretrained dictionary")
        groups = normalize_streams(groups)
        source = f"trained on the {n} prompts"
        autoencoder = train_autoencoders(torch.cat(list(groups.values()), 1), training, "auto")
    rows = torch.cat([groups["target"], groups["control"]], 1)
    active, units = autoencoder.encode(rows)[0], normalize(autoencoder.decoder[0], dim=1)
    if pretrained is None:  # a feature that was never active still has its initial weights
        units = units * active.any(0)[:, None]
    return FeatureStatistics(source, units, active, _compute_explained(autoencoder, rows))


def _compute_explained(autoencoder: SparseAutoencoder, rows: Float[Tensor, "1 rows width"]) -> float:
    error = (autoencoder.decode(autoencoder.encode(rows)) - rows).double().square().sum()
    spread = (rows - rows.mean(1, keepdim=True)).double().square().sum()
    return float(1 - error / spread.clamp(min=torch.finfo(spread.dtype).tiny))


def _decompose(
    sample: Sample, aim: Aim, dictionary: FeatureStatistics, most: int, order: Int[Tensor, "draws rows"], level: float
) -> SparseDecomposition:
    """Decompose the direction, and the mean differences of every order but the first, which is the identity."""
    units = torch.cat([aim.vector.double()[None], compute_mean_differences(sample, aim.stream, order[1:])])
    pursuit = matching_pursuit(normalize(units, dim=1), dictionary.units, most)
    aucs = compute_permuted_aucs(dictionary.active, pursuit.atoms, mark_target_rows(order, sample.n))
    p, atom_p = familywise_p_values(torch.cat([pursuit.share, (aucs - 0.5).abs()], 1)).split(most)
    return SparseDecomposition(
        stream=aim.stream,
        source=dictionary.source,
        features=int(dictionary.units.any(1).sum()),
        rows_explained=dictionary.explained,
        atoms=_describe_atoms(aim, dictionary, pursuit.atoms[0], sample.n, atom_p),
        share=pursuit.share[0],
        by_chance=chance_interval(pursuit.share),
        p=p,
        level=level,
        draws=len(order) - 1,
        prompts=(sample.n, len(sample) - sample.n),
    )


def _describe_atoms(
    aim: Aim, dictionary: FeatureStatistics, chosen: Int[Tensor, " k"], n: int, p: Float[Tensor, " k"]
) -> tuple[Atom, ...]:
    """Return the direction's own atoms, with what the prompts say of each."""
    chosen = chosen[chosen != NO_ATOM]
    coefficients, atoms = fit_coefficients(aim.vector, dictionary.units[chosen]), []
    for feature, coefficient, p_value in zip(chosen.tolist(), coefficients.tolist(), p.tolist(), strict=False):
        one, two = dictionary.active[:n, feature], dictionary.active[n:, feature]
        target, control = (wilson_rate(int((x > 0).sum()), len(x)) for x in (one, two))
        atoms.append(Atom(feature, coefficient, delong_auc(one, two), target, control, p_value))
    return tuple(atoms)


# -------------------------------------------------------------------------------- orthogonal matching pursuit
@dataclass(frozen=True)
class Pursuit:
    """The atoms of each direction, in the order in which they were taken."""

    atoms: Int[Tensor, "draws most"]
    """Rows of the dictionary; `NO_ATOM` from where on no atom explains any of the rest."""
    share: Float[Tensor, "draws most"]
    """Share of the direction's squared length in the span of the first 1, 2 … atoms: 0–1, never falling; fp64."""


def matching_pursuit(units: Float[Tensor, "draws width"], dictionary: Float[Tensor, "n width"], most: int) -> Pursuit:
    """Decompose each direction into at most ``most`` atoms by orthogonal matching pursuit.

    Each step takes the atom that is most along the residual and refits all chosen atoms (Pati, Rezaiifar and
    Krishnaprasad 1993). Atoms may enter with a negative sign, since a direction may consist of what is less active.

    units: unit vectors in fp64; a zero row takes no atom. dictionary: rows of length 1, or zero. Every step costs a
    product of draws × width × n in the dictionary's precision.
    """
    rest, places = units.clone(), []
    basis = torch.zeros(len(units), most, units.shape[1], dtype=units.dtype)
    shares = []
    for k in range(most):
        inner = rest.to(dictionary) @ dictionary.T
        atom = (inner.abs() * (1 + TIE * (inner > 0))).argmax(1)
        row = dictionary[atom].to(rest)
        explains = (rest * row).sum(1).abs() > ROUNDING
        basis[:, k] = torch.where(explains[:, None], _orthogonalize(row, basis), 0.0)
        rest = rest - (rest * basis[:, k]).sum(1, keepdim=True) * basis[:, k]
        places.append(torch.where(explains, atom, NO_ATOM))
        shares.append((units.square().sum(1) - rest.square().sum(1)).clamp(0, 1))
    return Pursuit(torch.stack(places, 1), torch.stack(shares, 1))


def _orthogonalize(
    row: Float[Tensor, "draws width"], basis: Float[Tensor, "draws most width"]
) -> Float[Tensor, "draws width"]:
    """Return the unit vectors of the rows' parts that are orthogonal to the basis."""
    for _ in range(2):  # the second time removes what rounding left the first time
        row = row - torch.einsum("dk,dkw->dw", torch.einsum("dkw,dw->dk", basis, row), basis)
    return normalize(row, dim=1)


def fit_coefficients(unit: Float[Tensor, " width"], atoms: Float[Tensor, "k width"]) -> Float[Tensor, " k"]:
    """Return the least-squares coefficients of the atoms for the direction; fp64."""
    solution: Tensor = torch.linalg.lstsq(atoms.double().T, unit.double()[:, None]).solution
    return solution[:, 0]


# ---------------------------------------------------------------------------------------------------- chance
def mark_target_rows(order: Int[Tensor, "draws rows"], n: int) -> Bool[Tensor, "draws rows"]:
    """Return which rows stand at the target's places, the first n of each order."""
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :n], True)


def compute_mean_differences(
    sample: Sample, stream: int, order: Int[Tensor, "draws rows"]
) -> Float[Tensor, "draws width"]:
    """Return the mean of the rows at the target's places minus that of the others; fp64."""
    inside, n = mark_target_rows(order, sample.n), sample.n
    weights = torch.where(inside, 1 / n, -1 / (len(sample) - n)).double()
    return weights @ sample.at(stream)


def compute_permuted_aucs(
    active: Float[Tensor, "rows features"], chosen: Int[Tensor, "draws k"], target: Bool[Tensor, "draws rows"]
) -> Float[Tensor, "draws k"]:
    """Return the AUC of each draw's features on that draw's labels, by ranks with ties counted half; fp64.

    0.5 where a place has no feature (`NO_ATOM`).
    """
    used, place = chosen.clamp(min=0).unique(return_inverse=True)
    values = active[:, used].T.contiguous()
    ordered = values.sort(1).values
    below, upto = (torch.searchsorted(ordered, values, right=side).double() for side in (False, True))
    ranks = (below + upto + 1) / 2
    n = target.sum(1)
    sums = torch.stack([(ranks[place[:, k]] * target).sum(1) for k in range(chosen.shape[1])], 1)
    area = (sums - (n * (n + 1) / 2)[:, None]) / (n * (target.shape[1] - n))[:, None]
    return torch.where(chosen == NO_ATOM, 0.5, area)
