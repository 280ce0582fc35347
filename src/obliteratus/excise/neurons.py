"""Masks of the MLP neurons that write most of the groups' difference along the directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obliteratus.core.errors import NothingMatchedError
from obliteratus.core.progress import note
from obliteratus.core.settings import expand_part
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Change, Edit, Mask, Subject
from obliteratus.weights.matrices import read_weight

# A neuron stands out if its share is this many standard deviations above its layer's mean: of 1,536 normal values two
# do by chance. The cap on their number applies as well.
OUTLIER_DEVIATIONS = 3.0


def attribute_to_neurons(
    weight: Float[Tensor, "out in"], along: Float[Tensor, "k out"], active: Float[Tensor, " in"]
) -> Float[Tensor, " in"]:
    """Return each neuron's share of the groups' difference along the directions, in the unit of the stream.

    Neuron j writes Δa_j · A W_j, a vector of k numbers. Its share is the projection of that vector on the sum over all
    neurons, which is the difference that the layer writes; a negative share works against the difference.
    active: Δa, the mean activation on target prompts minus that on control prompts.
    """
    written = (along @ weight) * active
    total = torch.nn.functional.normalize(written.sum(1), dim=0)
    share: Tensor = total @ written
    return share


def find_outlying_neurons(share: Float[Tensor, " in"], most: float) -> Tensor:
    """Return the indices of neurons that stand out, at most this share of all (or one), ascending. Integers [n ≥ 0]."""
    cap = max(1, int(most * len(share)))
    z = (share - share.mean()) / share.std().clamp(min=1e-30)
    order = z.argsort(descending=True, stable=True)[:cap]
    return order[z[order] > OUTLIER_DEVIATIONS].sort().values


def make_masks(
    subject: Subject, edits: Sequence[Edit], acts: Activations, most: float, where_possible: bool = False
) -> list[Change]:
    """Return a mask for each edited MLP with neurons that stand out, at most this share of its neurons (or one).

    Neurons are scored on the model's unedited weights: after a removal the same score is rounding error, and choosing
    by it would mask neurons at random. If only experts are edited, there is nothing to mask: that is noted where
    neurons are wanted only ``where_possible``, and raises NothingMatchedError elsewhere.
    """
    masks: list[Change] = []
    if all(edit.site.stacked for edit in edits if edit.site.part in expand_part("mlp.out")):
        if where_possible:
            note("neurons", "only experts are edited, which share no neurons: none is masked")
            return masks
        raise NothingMatchedError("excise.neurons: only experts are edited, which share no neurons; leave neurons out")
    for edit in edits:
        if edit.site.stacked or edit.site.part not in expand_part("mlp.out"):
            continue
        weight = read_weight(subject.module(edit.site.path), edit.site)
        active = acts.inputs["target"][edit.site.path] - acts.inputs["control"][edit.site.path]
        neurons = find_outlying_neurons(attribute_to_neurons(weight, edit.along.to(weight), active.to(weight)), most)
        if len(neurons):
            masks.append(Mask(edit.site, neurons.cpu()))
    return masks
