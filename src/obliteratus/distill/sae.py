"""Directions from the features of a sparse autoencoder, trained here or elsewhere."""

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
from obliteratus.distill.coder import Coder
from obliteratus.distill.pretrained import load_coder
from obliteratus.distill.sparse import Training, train_coders
from obliteratus.distill.steps import (
    align_signs,
    extractors,
    kept_rows,
    mean_difference,
    orthonormalize,
    relative_length,
    with_common_score,
)

# Streams that "best" trains: a coder of one 576-wide stream takes seconds, of a 4096-wide one minutes on a CPU, and
# the mean difference already tells which streams are worth it.
BEST = 4
# A held-out fifth of fewer rows than ten says nothing about when to stop.
LEAST = 50
# A feature counts if chance would bring one so far apart, among all features, in one run of twenty.
CHANCE = 0.05
# A feature with more than half of its squared length in those chosen before is one of them again: a narrow copy, of
# which nothing but noise would be left after orthonormalising.
COPY = 0.5
WHO = "distill step 'sae'"

Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[tuple[Share, ...], Field(min_length=1)]
Groups = dict[str, Tensor]
"""[streams, prompts, width] by group."""


def _fits(options: Mapping[str, Any], given: RunInputs) -> None:
    """A given coder is as wide as the stream; to train one takes prompts enough."""
    if options["pretrained"] is None:
        check_enough_prompts(sum(given.counts.values()), WHO)
    else:
        load_coder(options["pretrained"], given.width())


@extractors.register("sae", cite="arXiv:2309.08600", needs=("rows",), fits=_fits)
def sae(
    acts: Activations,
    so_far: Directions | None,
    *,
    features: Annotated[int, Field(ge=1, le=64)] = 4,
    streams: Literal["best", "all"] | Shares = "best",
    training: Training = Training(),  # noqa: B008 — frozen
    device: Literal["auto", "cpu", "cuda"] = "auto",
    pretrained: str | None = None,
    stream: Annotated[int, Field(ge=0)] | None = None,
) -> Directions:
    """Decoder rows of the sparse-autoencoder features that fire more on target prompts than on control prompts.

    Worth its time when target prompts differ in several separate things that `svd`, which is far cheaper, mixes, and
    each prompt shows few of them: where it shows a fifth of all, `mean_diff` finds the behaviour better. Needs rows,
    and several hundred prompts in all groups together (50 are the least). It is trained without the
    labels on all groups, centred and scaled to root mean square length 1 at each stream; then features are ranked by
    Welch's t between target and control. Only those that chance does not explain (5 % over all features) give a
    row: there may be fewer than asked for. Other rows are zeros, as are the streams that were not trained.

    features: most directions at a stream. streams: "best" (the 4 with the largest mean-difference score), "all", or
    indices as shares of L. training: expansion, sparsity, max_epochs, patience, min_gain, seed; see `Training`.
    device: "auto" is the GPU where half of its free memory suffices. pretrained: a SAELens file to use in place of
    training (cfg.json beside it is read); stream: the index it was trained on, block + 1 for hook_resid_post.
    raw: t of the clearest feature. Put `single` after it to use the best stream's directions at all layers.
    """
    if pretrained is not None:
        at = [_given(acts, stream)]
        coder, rows = load_coder(pretrained, acts["target"].mean.shape[1]), rows_at(acts, at)
    else:
        at = _chosen(acts, streams)
        rows = scale_streams(rows_at(acts, at))
        if not at:
            return _directions(acts, at, torch.zeros(0, features, rows["target"].shape[2]), torch.zeros(0))
        coder = train_coders(torch.cat(list(rows.values()), 1), training, device)
    return _directions(acts, at, *separating_features(coder, rows["target"], rows["control"], features))


# ------------------------------------------------------------------------------------------------------- input
def _chosen(acts: Activations, streams: str | tuple[float, ...]) -> list[int]:
    """Stream indices, ascending; never one whose mean difference is nothing."""
    score = relative_length(acts, mean_difference(acts).norm(dim=1))
    last = len(score) - 1
    if isinstance(streams, tuple):
        wanted = {round(depth * last) for depth in streams}
    else:
        wanted = set(score.topk(min(BEST, last + 1)).indices.tolist() if streams == "best" else range(last + 1))
    return sorted(i for i in wanted if score[i] > 0)


def _given(acts: Activations, stream: int | None) -> int:
    last = len(acts["target"].mean) - 1
    if stream is None or stream > last:
        raise UserError(
            f"distill step 'sae': pretrained needs stream, the index it was trained on, 0 to {last}; got {stream}"
        )
    return stream


def rows_at(acts: Activations, at: list[int]) -> Groups:
    """Every group's rows at these streams. UserError where rows were not kept."""
    return {group: kept_rows(acts, group, "sae")[:, at].transpose(0, 1) for group in acts.groups}


def check_enough_prompts(prompts: int, who: str, instead: str = "use svd") -> None:
    """UserError, naming ``who`` and what to do ``instead``, for fewer prompts than 50, to train on."""
    if prompts < LEAST:
        raise UserError(
            f"{who}: {prompts} prompts are too few to train on; give {LEAST} or more (several hundred are better), "
            f"or {instead}"
        )


def scale_streams(rows: Groups) -> Groups:
    """Centred and divided, at each stream, by one number over all groups: root mean square length 1.

    UserError for fewer than 50 prompts in all groups together.
    """
    everything = torch.cat(list(rows.values()), 1)
    check_enough_prompts(everything.shape[1], WHO)
    centre = everything.mean(1, keepdim=True)
    size = (everything - centre).square().sum(2).mean(1).sqrt().clamp(min=torch.finfo(centre.dtype).tiny)
    return {group: (x - centre) / size[:, None, None] for group, x in rows.items()}


# ------------------------------------------------------------------------------------------------------ output
def separating_features(
    coder: Coder, target: Float[Tensor, "streams n width"], control: Float[Tensor, "streams m width"], k: int
) -> tuple[Float[Tensor, "streams k width"], Float[Tensor, " streams"]]:
    """Decoder rows of the k features that fire most clearly more on target, of length 1, and the largest t."""
    one, two = coder.encode(target), coder.encode(control)
    noise = one.var(1) / one.shape[1] + two.var(1) / two.shape[1]
    t = (one.mean(1) - two.mean(1)) / noise.sqrt().clamp(min=torch.finfo(noise.dtype).tiny)
    decoder = torch.nn.functional.normalize(coder.decoder, dim=2)
    rows = torch.stack([_clearest(d, s, k) for d, s in zip(decoder, t, strict=True)])
    return rows, t.max(1).values.clamp(min=0)


def _clearest(decoder: Float[Tensor, "features width"], t: Float[Tensor, " features"], k: int) -> Tensor:
    """Rows [k, width] by falling t, copies left out; zeros where no more features stand out from chance."""
    floor = torch.special.ndtri(torch.tensor(1 - CHANCE / len(t), dtype=torch.float64)).to(t)
    rows, basis = (torch.zeros(k, decoder.shape[1]) for _ in range(2))
    inside = torch.zeros(len(t))  # the share of each feature's squared length in those chosen
    for place in range(k):
        left = t.masked_fill(inside > COPY, 0)
        if left.max() <= floor:
            break
        rows[place] = decoder[left.argmax()]
        rest = rows[place] - basis.T @ (basis @ rows[place])
        basis[place] = rest / rest.norm()
        inside += (decoder @ basis[place]).square()
    return rows


def _directions(acts: Activations, at: list[int], rows: Tensor, clearest: Tensor) -> Directions:
    """The rows at their streams, orthonormal and turned to the target; zeros at all others."""
    mean = acts["target"].mean
    basis, raw = torch.zeros(len(mean), rows.shape[1], mean.shape[1]), torch.zeros(len(mean))
    basis[at], raw[at] = align_signs(orthonormalize(rows), mean_difference(acts)[at]), clearest
    return Directions(basis, with_common_score(acts, basis), raw, "t of the clearest feature")
