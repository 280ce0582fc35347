"""The step `sae`: directions from the features of a sparse autoencoder, trained here or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.registry import RunInputs
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions
from obliteratus.distill.autoencoder import SparseAutoencoder, load_autoencoder
from obliteratus.distill.steps import (
    align_signs,
    compute_score,
    extractors,
    mean_difference,
    orthonormalize,
    relative_length,
    require_rows,
)
from obliteratus.distill.train_autoencoder import Training, train_autoencoders

# Streams that "best" trains: one 576-wide stream takes seconds and a 4096-wide one minutes on a CPU, and the mean
# difference already tells which streams are worth it.
BEST_STREAMS = 4
# A held-out fifth of fewer than ten rows is too noisy to decide when to stop.
MIN_PROMPTS = 50
# A feature counts if chance would separate the groups this well, for any of all features, in one run of twenty.
FALSE_POSITIVE_RATE = 0.05
# A feature with more than half of its squared length inside the features chosen before it is a copy of them:
# orthonormalizing would leave nothing but noise of it.
MAX_OVERLAP = 0.5
STEP_NAME = "distill step 'sae'"

Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[tuple[Share, ...], Field(min_length=1)]
Groups = dict[str, Tensor]
"""Rows [streams, prompts, width] by group."""


def _check_inputs(options: Mapping[str, Any], inputs: RunInputs) -> None:
    if options["pretrained"] is None:
        check_enough_prompts(sum(inputs.counts.values()), STEP_NAME)
    else:
        load_autoencoder(options["pretrained"], inputs.width())


@extractors.register("sae", cite="arXiv:2309.08600", needs=("rows",), fits=_check_inputs)
def sae(
    acts: Activations,
    previous: Directions | None,
    *,
    features: Annotated[int, Field(ge=1, le=64)] = 4,
    streams: Literal["best", "all"] | Shares = "best",
    training: Training = Training(),  # noqa: B008 — frozen
    device: Literal["auto", "cpu", "cuda"] = "auto",
    pretrained: str | None = None,
    stream: Annotated[int, Field(ge=0)] | None = None,
) -> Directions:
    """Find the decoder rows of the sparse-autoencoder features that fire more on target than on control prompts.

    It is worth its time if target prompts differ in several separate features, which the much cheaper `svd` mixes, and
    each prompt shows few of them; if each shows a fifth of all, `mean_diff` finds the behavior better. Needs rows, and
    several hundred prompts in all groups together (50 at least). The autoencoder is trained without labels on all
    groups, centered and scaled to root mean square length 1 at each stream. Features are then ranked by Welch's t
    between target and control, and only those that chance does not explain (5 % over all features) give a row, so there
    may be fewer rows than requested. The other rows are zeros, as are the streams that were not trained.

    features: the maximal number of directions at a stream. streams: "best" (the 4 with the largest mean-difference
    score), "all", or indices as shares of L. training: expansion, sparsity, max_epochs, patience, min_gain and seed;
    see `Training`. device: "auto" is the GPU if half of its free memory suffices. pretrained: a SAELens file to use
    instead of training (with its cfg.json, if it has one); stream: the index that it was trained on, block + 1 for
    hook_resid_post. raw: t of the best-separating feature. Put `single` after this step to use the best stream's
    directions at all layers.
    """
    if pretrained is not None:
        indices = [_check_stream(acts, stream)]
        autoencoder, rows = load_autoencoder(pretrained, acts["target"].mean.shape[1]), select_streams(acts, indices)
    else:
        indices = _choose_streams(acts, streams)
        rows = normalize_streams(select_streams(acts, indices))
        if not indices:
            return _make_directions(acts, indices, torch.zeros(0, features, rows["target"].shape[2]), torch.zeros(0))
        autoencoder = train_autoencoders(torch.cat(list(rows.values()), 1), training, device)
    found_rows, t = find_separating_features(autoencoder, rows["target"], rows["control"], features)
    return _make_directions(acts, indices, found_rows, t)


# ------------------------------------------------------------------------------------------------------- input
def _choose_streams(acts: Activations, streams: str | tuple[float, ...]) -> list[int]:
    """Return stream indices in ascending order, leaving out streams without a mean difference."""
    score = relative_length(acts, mean_difference(acts).norm(dim=1))
    last = len(score) - 1
    if isinstance(streams, tuple):
        wanted = {round(depth * last) for depth in streams}
    else:
        wanted = set(score.topk(min(BEST_STREAMS, last + 1)).indices.tolist() if streams == "best" else range(last + 1))
    return sorted(i for i in wanted if score[i] > 0)


def _check_stream(acts: Activations, stream: int | None) -> int:
    last = len(acts["target"].mean) - 1
    if stream is None or stream > last:
        raise UserError(
            f"distill step 'sae': pretrained needs stream, the index it was trained on, 0 to {last}; got {stream}"
        )
    return stream


def select_streams(acts: Activations, indices: list[int]) -> Groups:
    """Return every group's rows at these streams. Raises UserError if PROBE kept no rows."""
    return {group: require_rows(acts, group, "sae")[:, indices].transpose(0, 1) for group in acts.groups}


def check_enough_prompts(prompts: int, who: str, instead: str = "use svd") -> None:
    """Raise UserError, naming ``who`` and what to do ``instead``, for fewer prompts than training needs (50)."""
    if prompts < MIN_PROMPTS:
        raise UserError(
            f"{who}: {prompts} prompts are too few to train on; give {MIN_PROMPTS} or more (several hundred are "
            f"better), or {instead}"
        )


def normalize_streams(rows: Groups) -> Groups:
    """Center and scale each stream over all groups to root mean square length 1.

    Raises UserError for fewer than 50 prompts in all groups together.
    """
    joined = torch.cat(list(rows.values()), 1)
    check_enough_prompts(joined.shape[1], STEP_NAME)
    center = joined.mean(1, keepdim=True)
    size = (joined - center).square().sum(2).mean(1).sqrt().clamp(min=torch.finfo(center.dtype).tiny)
    return {group: (x - center) / size[:, None, None] for group, x in rows.items()}


# ------------------------------------------------------------------------------------------------------ output
def find_separating_features(
    autoencoder: SparseAutoencoder,
    target: Float[Tensor, "streams n width"],
    control: Float[Tensor, "streams m width"],
    k: int,
) -> tuple[Float[Tensor, "streams k width"], Float[Tensor, " streams"]]:
    """Return the unit decoder rows of the k features that fire most clearly more on target, and the largest t."""
    on_target, on_control = autoencoder.encode(target), autoencoder.encode(control)
    variance = on_target.var(1) / on_target.shape[1] + on_control.var(1) / on_control.shape[1]
    t = (on_target.mean(1) - on_control.mean(1)) / variance.sqrt().clamp(min=torch.finfo(variance.dtype).tiny)
    decoder = torch.nn.functional.normalize(autoencoder.decoder, dim=2)
    rows = torch.stack([_pick_rows(d, s, k) for d, s in zip(decoder, t, strict=True)])
    return rows, t.max(1).values.clamp(min=0)


def _pick_rows(decoder: Float[Tensor, "features width"], t: Float[Tensor, " features"], k: int) -> Tensor:
    """Return rows [k, width] by descending t without copies; zeros once no further feature stands out from chance."""
    threshold = torch.special.ndtri(torch.tensor(1 - FALSE_POSITIVE_RATE / len(t), dtype=torch.float64)).to(t)
    rows, basis = (torch.zeros(k, decoder.shape[1]) for _ in range(2))
    overlap = torch.zeros(len(t))  # share of each feature's squared length inside the chosen ones
    for i in range(k):
        remaining = t.masked_fill(overlap > MAX_OVERLAP, 0)
        if remaining.max() <= threshold:
            break
        rows[i] = decoder[remaining.argmax()]
        rest = rows[i] - basis.T @ (basis @ rows[i])
        basis[i] = rest / rest.norm()
        overlap += (decoder @ basis[i]).square()
    return rows


def _make_directions(acts: Activations, indices: list[int], rows: Tensor, t: Tensor) -> Directions:
    """Return the rows at their streams, orthonormal and pointing to the target; zeros at all other streams."""
    mean = acts["target"].mean
    basis, raw = torch.zeros(len(mean), rows.shape[1], mean.shape[1]), torch.zeros(len(mean))
    basis[indices], raw[indices] = align_signs(orthonormalize(rows), mean_difference(acts)[indices]), t
    return Directions(basis, compute_score(acts, basis), raw, "t of the clearest feature")
