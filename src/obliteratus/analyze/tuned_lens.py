"""Tuned lens: what each stream already says of the next token, through an affine map to the last stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.base import GROUPS, AnalysisContext, analyses
from obliteratus.analyze.lens import decode_tokens, find_extreme_tokens
from obliteratus.analyze.readout import compute_logit_effects, compute_next_token_log_probs
from obliteratus.analyze.samples import LEVEL, read_rows
from obliteratus.analyze.significance import ROUNDING, Contrast, contrast_within_pairs
from obliteratus.core.cost import Cost, prompt_count
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.inference.logits import kl_divergence
from obliteratus.report.curves import BLUE, GREEN, GREY, ORANGE, Figure
from obliteratus.verify.intervals import mean_score

# Penalties tried, in units of the mean eigenvalue of the prompts' products: from almost none to nothing left, by √10.
PENALTIES = tuple(10 ** (i / 2) for i in range(-8, 7))
TOKENS = 10  # listed for each stream
NEGLIGIBLE_KL = 1e-5  # nats: a smaller KL is rounding, since fp32 logits carry errors of 1e-6 of their size


@dataclass(frozen=True)
class TunedLens:
    """KL(model ‖ lens) of the next token on held-out prompts, in nats, for streams 0 … L − 1."""

    tuned: tuple[Score, ...]
    """KL through the map fitted at the stream."""
    logit: tuple[Score, ...]
    """KL through no map: the logit lens."""
    constant: Score
    """KL of the mean last stream, whatever the prompt."""
    gain: tuple[Score, ...]
    """constant − tuned, prompt by prompt: above zero where the stream tells something of the prompt's next token. The
    intervals hold for each stream by itself."""
    contrast: Contrast
    """The same gains with a limit for all streams together."""
    identity: tuple[bool, ...]
    """Whether the stream's map starts from the identity rather than from zero; the better predictor (`RidgeMap`)."""
    promoted: tuple[tuple[str, ...], ...]
    """Tokens that the stream's direction promotes after the map; none where it is zero."""
    fitted: int
    """Prompts that the maps were fitted on."""
    position: int
    """The token of each prompt, counted from its end, at which maps are fitted and scored."""

    @property
    def significant(self) -> list[int]:
        """Streams that tell something: the gain is above zero beyond chance over all streams, and beyond rounding."""
        return sorted(i for i in self.contrast.significant if float(self.contrast.value[i]) > NEGLIGIBLE_KL)

    def to_dict(self) -> dict[str, Any]:
        """Return every KL with its interval."""
        parts = (("tuned", self.tuned), ("logit", self.logit), ("gain", self.gain))
        return {
            "position": self.position,
            **{name: [s.model_dump() for s in part] for name, part in parts},
            "constant": self.constant.model_dump(),
            "level": LEVEL,
            "limit": self.contrast.limit,
            "found": self.significant,
            "promoted": [list(tokens) for tokens in self.promoted],
            "fitted": self.fitted,
            "from_identity": list(self.identity),
        }

    def summary(self) -> str:
        """Return from which stream on the next token is known."""
        at = f"at token {self.position} alone (level {LEVEL:g} over all streams)"
        if not self.significant:
            return f"{at}: no stream tells more of what follows than the mean does ({self.constant.value:.3g} nats)"
        first, last = self.significant[0], self.tuned[-1]
        return (
            f"{at}: what follows shows from stream {first} on ({self.tuned[first].value:.3g} nats, the mean alone "
            f"{self.constant.value:.3g}); {last.value:.3g} nats at the last but one"
        )

    def draw(self, figure: Figure) -> None:
        """Draw the KL by stream, with intervals."""
        axes = figure.add_subplot(xlabel="stream", ylabel="KL to the model (nats)", title="what streams know")
        for name, scores, color in (("tuned lens", self.tuned, BLUE), ("logit lens", self.logit, ORANGE)):
            places = range(len(scores))
            axes.plot(places, [s.value for s in scores], "o-", color=color, label=name)
            axes.fill_between(places, [s.low for s in scores], [s.high for s in scores], color=color, alpha=0.2)
        axes.axhline(self.constant.value, color=GREY, linestyle="--", label="mean of all prompts")
        axes.plot(self.significant, [0.0] * len(self.significant), "|", color=GREEN, label="knows more than the mean")
        axes.set_yscale("symlog", linthresh=0.01)  # nats: below, a lens is as good as the model
        axes.legend()


# ------------------------------------------------------------------------------------------------------ the map
@dataclass(frozen=True)
class RidgeMap:
    """h ↦ target + p·(h − source) + (h − source)Xᵀα: an affine map from ridge regression, in its dual form.

    p is 1 where the penalty shrinks towards the identity and 0 where it shrinks towards the mean.
    """

    source: Float[Tensor, " width"]
    """Mean of the stream; fp64, like all tensors here."""
    target: Float[Tensor, " width"]
    """Mean of the last stream."""
    rows: Float[Tensor, "n width"]
    """X: the fit prompts' streams, centered."""
    dual: Float[Tensor, "n width"]
    """α."""
    identity: bool
    """Whether p is 1."""
    error: float
    """Estimate of the mean squared error on new prompts, by generalized cross-validation."""

    def __call__(self, streams: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """Return the last streams predicted from these streams; fp32."""
        return (self.target + self.apply_linear(streams.double() - self.source)).float()

    def apply_linear(self, moved: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """Return how the last stream is predicted to move where the stream moves by this much; fp64."""
        return (moved if self.identity else 0) + (moved @ self.rows.T) @ self.dual


def fit_map(source: Float[Tensor, "n width"], target: Float[Tensor, "n width"]) -> RidgeMap:
    """Return the map from source rows to target rows whose penalty and starting point cross-validate best.

    Minimizes ‖Y − XA‖² + λ‖A‖² in closed form, with λ and p chosen by generalized cross-validation (Golub, Heath and
    Wahba 1979).
    """
    x, y = source.double(), target.double()
    centers = x.mean(0), y.mean(0)
    x, y = x - centers[0], y - centers[1]
    values, vectors = torch.linalg.eigh(x @ x.T)
    values = values.clamp(min=0)
    rounding = ROUNDING**2 * source.double().square().sum(1).mean()
    unit = (values.mean() + rounding).clamp(min=torch.finfo(values.dtype).eps)  # a stream may be the same for all
    candidates = [(*_choose_penalty(values, vectors.T @ (y - x if p else y), unit), p) for p in (True, False)]
    error, penalty, identity = min(candidates, key=lambda t: t[0])
    rest = vectors.T @ (y - x if identity else y)
    dual = vectors @ (rest / (values + penalty)[:, None])
    return RidgeMap(*centers, x, dual, identity, error)


def _choose_penalty(values: Tensor, rest: Tensor, unit: Tensor) -> tuple[float, Tensor]:
    """Return the lowest cross-validated error and its penalty. values [n]; rest [n, width] along eigenvectors."""
    n, size = len(values), rest.square().sum(1)
    penalties = unit * torch.tensor(PENALTIES, dtype=values.dtype)
    left = penalties[:, None] / (values + penalties[:, None])
    freedom = (left.sum(1) - 1).clamp(min=1e-9) / n  # the mean takes one as well
    errors = (left.square() @ size) / n / freedom.square()
    return float(errors.min()), penalties[errors.argmin()]


# ------------------------------------------------------------------------------------------------- the analysis
@analyses.register(
    "tuned_lens", cite="arXiv:2303.08112", needs=("rows",), cost=lambda options: Cost(prompt_count("search"))
)
def measure_tuned_lens(context: AnalysisContext) -> TunedLens:
    """Measure how much of the model's next token each stream tells, through an affine map to the last stream.

    The maps are fitted on the fit prompts' rows at their one position, and scored on the search prompts at the same
    position: the KL from the model's own distribution to the lens's, beside the logit lens and the mean last stream.
    The paper fits at every token of a corpus; these maps hold only for the probed token of prompts like these.

    A stream tells something where its gain over the mean exceeds a limit from sign flips of prompts. Where no stream
    tells anything, any is found in at most 5 % of cases.
    """
    fit = torch.cat([read_rows(context.activations, group, "tuned_lens") for group in GROUPS])
    held_out = _read_held_out(context)
    true = compute_next_token_log_probs(context.subject, held_out[:, -1])
    maps = [fit_map(fit[:, stream], fit[:, -1]) for stream in range(fit.shape[1] - 1)]
    return score_lenses(context, maps, held_out, true)


def score_lenses(
    context: AnalysisContext,
    maps: list[RidgeMap],
    held_out: Float[Tensor, "prompts streams width"],
    true: Float[Tensor, "prompts vocabulary"],
) -> TunedLens:
    """Score the maps on held-out prompts, given the model's own log-probabilities."""
    subject = context.subject

    def divergence(streams: Tensor) -> Tensor:
        return kl_divergence(true, compute_next_token_log_probs(subject, streams))

    constant = divergence(maps[0].target.float().expand(len(held_out), -1))
    tuned = [divergence(ridge_map(held_out[:, i])) for i, ridge_map in enumerate(maps)]
    logit = [divergence(held_out[:, i]) for i in range(len(maps))]
    gains = [constant - values for values in tuned]
    return TunedLens(
        tuned=tuple(map(_bootstrap, tuned)),
        logit=tuple(map(_bootstrap, logit)),
        constant=_bootstrap(constant),
        gain=tuple(map(_bootstrap, gains)),
        contrast=contrast_within_pairs(torch.stack(gains, 1)),
        identity=tuple(ridge_map.identity for ridge_map in maps),
        promoted=_list_promoted(context, maps),
        fitted=len(maps[0].rows),
        position=context.activations.position,
    )


def _bootstrap(values: Float[Tensor, " n"]) -> Score:
    return mean_score(values, "nats")


def _read_held_out(context: AnalysisContext) -> Float[Tensor, "prompts streams width"]:
    subject, position = context.subject, context.activations.position
    ids = render_prompts(subject, [prompt for group in GROUPS for prompt in context.held_out[group]])
    rows = torch.empty(len(ids), subject.n_layers + 1, subject.width)
    for batch in read_hidden_states(subject, ids, position=position, title="ANALYZE tuned lens"):
        rows[batch.rows] = batch.stream
    return rows


def _list_promoted(context: AnalysisContext, maps: list[RidgeMap]) -> tuple[tuple[str, ...], ...]:
    """Return the tokens that each stream's direction promotes after the map."""
    rows = context.directions.basis[:-1, 0]
    pairs = zip(maps, rows, strict=True)
    moved = torch.cat([ridge_map.apply_linear(row[None].double()) for ridge_map, row in pairs]).float()
    logits = list(compute_logit_effects(context.subject, normalize(moved, dim=1)))
    return decode_tokens(context.subject, find_extreme_tokens(logits, TOKENS, largest=True)[1], rows.any(1))
