"""Tuned lens: what each stream already knows of the next token, by an affine map to the last stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.base import GROUPS, AnalysisContext, analyses
from obliteratus.analyze.lens import decode_tokens, find_extreme_tokens
from obliteratus.analyze.readout import compute_logit_effects, compute_next_token_log_probs
from obliteratus.analyze.significance import ROUNDING
from obliteratus.core.cost import Cost, prompt_count
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.distill.steps import require_rows
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.inference.logits import kl_divergence
from obliteratus.report.curves import BLUE, GREEN, GREY, ORANGE
from obliteratus.verify.intervals import bootstrap, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Penalties tried, in units of the mean eigenvalue of the prompts' products: from hardly any to nothing left, by √10.
PENALTIES = tuple(10 ** (i / 2) for i in range(-8, 7))
TOKENS = 10  # listed for each stream
# A KL of this many nats is rounding: logits of fp32 carry some 1e-6 of their own size.
NOTHING = 1e-5


@dataclass(frozen=True)
class TunedLens:
    """KL(model ‖ lens) of the next token on held-out prompts, in nats, for streams 0 … L − 1."""

    tuned: tuple[Score, ...]
    """Through the map that was fitted at the stream."""
    logit: tuple[Score, ...]
    """Through no map: the logit lens."""
    constant: Score
    """Of the mean last stream, whatever the prompt."""
    gain: tuple[Score, ...]
    """constant − tuned, prompt by prompt: above zero where the stream tells something of the prompt's next token."""
    kept: tuple[bool, ...]
    """Whether the stream's map begins at the identity, or at nothing: what predicts better (`RidgeMap`)."""
    promoted: tuple[tuple[str, ...], ...]
    """Tokens that the stream's direction promotes once it is taken through the map; none where it is zero."""
    fitted: int
    """Prompts that the maps were fitted on."""
    position: int
    """The one token of each prompt, counted from its end, that they were fitted on and are judged at."""

    @property
    def significant(self) -> list[int]:
        """Streams that tell something: the gain's interval lies above zero (rounding)."""
        return [i for i, score in enumerate(self.gain) if score.low > NOTHING]

    def to_dict(self) -> dict[str, Any]:
        """Every KL with its interval."""
        scores = {name: [s.model_dump() for s in part] for name, part in self._parts()}
        constant, promoted = self.constant.model_dump(), [list(tokens) for tokens in self.promoted]
        found = {
            "found": self.significant,
            "promoted": promoted,
            "fitted": self.fitted,
            "from_identity": list(self.kept),
        }
        return {"position": self.position, **scores, "constant": constant, **found}

    def _parts(self) -> tuple[tuple[str, tuple[Score, ...]], ...]:
        return ("tuned", self.tuned), ("logit", self.logit), ("gain", self.gain)

    def summary(self) -> str:
        """From where on the next token is known."""
        at = f"at token {self.position} alone"
        if not self.significant:
            return f"{at}: no stream tells more of what follows than the mean does ({self.constant.value:.3g} nats)"
        first, last = self.significant[0], self.tuned[-1]
        return (
            f"{at}: what follows shows from stream {first} on ({self.tuned[first].value:.3g} nats, the mean alone "
            f"{self.constant.value:.3g}); {last.value:.3g} nats at the last but one"
        )

    def draw(self, figure: Figure) -> None:
        """KL by stream, with intervals."""
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
    """h ↦ target + p·(h − source) + (h − source)Xᵀα: an affine map fitted by ridge regression, kept in its dual form.

    p is 1 where the penalty draws towards the identity, 0 where it draws towards the mean.
    """

    source: Float[Tensor, " width"]
    """Mean of the stream; fp64, as all of this."""
    target: Float[Tensor, " width"]
    """Mean of the last stream."""
    rows: Float[Tensor, "n width"]
    """X: the fit prompts' streams, centered."""
    dual: Float[Tensor, "n width"]
    """α."""
    identity: bool
    error: float
    """Generalized cross-validation: its estimate of the mean squared error on new prompts."""

    def __call__(self, streams: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """The last stream that is expected of these streams; fp32."""
        return (self.target + self.linear(streams.double() - self.source)).float()

    def linear(self, moved: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """How the last stream is expected to move where the stream moves so; fp64."""
        return (moved if self.identity else 0) + (moved @ self.rows.T) @ self.dual


def fit_map(source: Float[Tensor, "n width"], target: Float[Tensor, "n width"]) -> RidgeMap:
    """The map from source rows to target rows whose penalty and starting point cross-validate best.

    min ‖Y − XA‖² + λ‖A‖² in closed form, λ and p by generalized cross-validation (Golub, Heath and Wahba 1979).
    """
    x, y = source.double(), target.double()
    centres = x.mean(0), y.mean(0)
    x, y = x - centres[0], y - centres[1]
    values, vectors = torch.linalg.eigh(x @ x.T)
    values = values.clamp(min=0)
    rounding = ROUNDING**2 * source.double().square().sum(1).mean()
    unit = (values.mean() + rounding).clamp(min=torch.finfo(values.dtype).eps)  # a stream may be the same for all
    tried = [(*_best(values, vectors.T @ (y - x if p else y), unit), p) for p in (True, False)]
    error, penalty, identity = min(tried, key=lambda t: t[0])
    rest = vectors.T @ (y - x if identity else y)
    dual = vectors @ (rest / (values + penalty)[:, None])
    return RidgeMap(*centres, x, dual, identity, error)


def _best(values: Tensor, rest: Tensor, unit: Tensor) -> tuple[float, Tensor]:
    """The lowest cross-validated error, and its penalty. values [n]; rest [n, width], in the eigenvectors' frame."""
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
    """How much of the model's next token each stream tells, through an affine map to the last stream.

    Fitted on the fit prompts' rows, at their one position, and scored on the search prompts at the same: KL of the
    model's own distribution to the one that the lens reads, beside the logit lens and the mean last stream. The paper
    fits at every token of a corpus: these maps hold for the probed token of prompts like these, and nothing is said of
    other positions or texts.
    """
    acts = context.activations
    fit = torch.cat([require_rows(acts, group, "tuned_lens") for group in GROUPS])
    held = _held(context)
    true = compute_next_token_log_probs(context.subject, held[:, -1])
    maps = [fit_map(fit[:, stream], fit[:, -1]) for stream in range(fit.shape[1] - 1)]
    return score_lenses(context, maps, held, true)


def score_lenses(
    context: AnalysisContext,
    maps: list[RidgeMap],
    held: Float[Tensor, "prompts streams width"],
    true: Float[Tensor, "prompts vocabulary"],
) -> TunedLens:
    """Maps judged on these prompts."""
    subject = context.subject

    def off(streams: Tensor) -> Tensor:
        return kl_divergence(true, compute_next_token_log_probs(subject, streams))

    constant = off(maps[0].target.float().expand(len(held), -1))
    tuned = [off(one(held[:, i])) for i, one in enumerate(maps)]
    logit = [off(held[:, i]) for i in range(len(maps))]
    return TunedLens(
        tuned=tuple(map(_score, tuned)),
        logit=tuple(map(_score, logit)),
        constant=_score(constant),
        gain=tuple(_score(constant - divergence) for divergence in tuned),
        kept=tuple(one.identity for one in maps),
        promoted=_promoted(context, maps),
        fitted=len(maps[0].rows),
        position=context.activations.position,
    )


def _score(values: Float[Tensor, " n"]) -> Score:
    return bootstrap(values, mean, "nats")


def _held(context: AnalysisContext) -> Float[Tensor, "prompts streams width"]:
    subject = context.subject
    ids = render_prompts(subject, [prompt for group in GROUPS for prompt in context.held_out[group]])
    rows = torch.empty(len(ids), subject.n_layers + 1, subject.width)
    for got in read_hidden_states(subject, ids, position=context.activations.position, title="ANALYZE tuned lens"):
        rows[got.rows] = got.stream
    return rows


def _promoted(context: AnalysisContext, maps: list[RidgeMap]) -> tuple[tuple[str, ...], ...]:
    rows = context.directions.basis[:-1, 0]
    moved = torch.cat([one.linear(row[None].double()) for one, row in zip(maps, rows, strict=True)]).float()
    logits = list(compute_logit_effects(context.subject, normalize(moved, dim=1)))
    return decode_tokens(context.subject, find_extreme_tokens(logits, TOKENS, largest=True)[1], rows.any(1))
