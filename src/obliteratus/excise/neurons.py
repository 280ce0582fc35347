"""Neuron surgery: MLP neurons that write most of the groups' difference along the directions, silenced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obliteratus.core.errors import NothingMatchedError
from obliteratus.core.settings import expand_part
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Change, Edit, Mask, Subject
from obliteratus.weights.matrices import read_weight

# A neuron stands out where its share is this many standard deviations above its layer's mean: of 1 536 normal values
# two do by chance. The cap on their number comes on top.
OUTLIER_DEVIATIONS = 3.0


def attribute_to_neurons(
    weight: Float[Tensor, "out in"], along: Float[Tensor, "k out"], active: Float[Tensor, " in"]
) -> Float[Tensor, " in"]:
    """What each neuron adds to the groups' difference along the directions, in the stream's own unit.

    Neuron j writes Δa_j · A W_j, a vector of k numbers; its share is that vector's part along the sum over all
    neurons, which is the difference that the layer writes. Positive shares make the difference, negative ones
    work against it. active: Δa, the mean activation on target prompts less that on control prompts.
    """
    written = (along @ weight) * active
    whole = torch.nn.functional.normalize(written.sum(1), dim=0)
    share: Tensor = whole @ written
    return share


def find_outlying_neurons(share: Float[Tensor, " in"], most: float) -> Tensor:
    """Neurons that stand out, at most this share of all, in order. Integers [n], n may be 0."""
    cap = int(most * len(share))
    z = (share - share.mean()) / share.std().clamp(min=1e-30)
    order = z.argsort(descending=True, stable=True)[:cap]
    return order[z[order] > OUTLIER_DEVIATIONS].sort().values


def make_masks(subject: Subject, edits: Sequence[Edit], acts: Activations, most: float) -> list[Change]:
    """A mask for each edited MLP that has neurons which stand out. Scored on the model's own weights and activations.

    After a removal the same score is rounding, and choosing by it deletes neurons by chance: hence before it, once.
    """
    found: list[Change] = []
    if all(edit.site.stacked for edit in edits if edit.site.part in expand_part("mlp.out")):
        raise NothingMatchedError("excise.neurons: only experts are edited, and these have no neurons in common")
    for edit in edits:
        if edit.site.stacked or edit.site.part not in expand_part("mlp.out"):
            continue
        weight = read_weight(subject.module(edit.site.path), edit.site)
        active = acts.inputs["target"][edit.site.path] - acts.inputs["control"][edit.site.path]
        neurons = find_outlying_neurons(attribute_to_neurons(weight, edit.along.to(weight), active.to(weight)), most)
        if len(neurons):
            found.append(Mask(edit.site, neurons.cpu()))
    return found
