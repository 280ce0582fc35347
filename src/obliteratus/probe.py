"""PROBE: prompts to activations, in as few passes as batches allow, in as little memory as is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from obliteratus.errors import UserError
from obliteratus.settings import Probe
from obliteratus.summon import routing
from obliteratus.summon.capture import Taps
from obliteratus.summon.forward import Reading, read
from obliteratus.summon.render import render
from obliteratus.summon.routing import Counts
from obliteratus.types import Activations, Moments, Prompt, PromptSet, Subject, digest_of

ANCHOR_GROUP = "control"
DEFAULT = Probe()  # pydantic gives the fields their defaults


def probe(
    subject: Subject,
    prompts: PromptSet,
    options: Probe = DEFAULT,
    taps: Sequence[str] = (),
    feeds: Sequence[str] = (),
    stacks: Sequence[str] = (),
) -> Activations:
    """The residual stream at one position of every prompt, for each group.

    taps: module paths whose mean output over the control group is wanted too (the anchors of anchored edits).
    feeds: module paths whose mean input is wanted too, of every group.
    stacks: paths of stacks of experts of which it is wanted what the prompts were routed to, and what came of it.
    Raises UserError if any activation is NaN or Inf.
    """
    groups: dict[str, Moments] = {}
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, dict[str, Tensor]] = {}
    counts = {path: Counts() for path in stacks}
    for group, members in prompts.groups.items():
        wanted = taps if group == ANCHOR_GROUP else ()
        tapped = Taps(wanted, feeds, stacks)
        groups[group], means, inputs[group] = _group(subject, group, members, options, tapped, counts)
        outputs |= dict(zip(wanted, means, strict=True))
    digest = digest_of([prompts.digest, subject.source.digest, options.model_dump(), subject.thinking])
    routed = {path: found.routed() for path, found in counts.items()}
    return Activations(groups, options.position, outputs, inputs, digest, routed)


def _group(
    subject: Subject,
    group: str,
    prompts: Sequence[Prompt],
    options: Probe,
    taps: Taps,
    counts: Mapping[str, Counts],
) -> tuple[Moments, Tensor, dict[str, Tensor]]:
    streams = subject.n_layers + 1
    total = torch.zeros(streams, subject.width, dtype=torch.float64)
    tapped = torch.zeros(len(taps.outputs), subject.width, dtype=torch.float64)
    fed: dict[str, Tensor] = {path: torch.zeros(1, dtype=torch.float64) for path in taps.inputs}
    rows = torch.empty(len(prompts), streams, subject.width) if options.keep == "rows" else None
    ids = render(subject, prompts)
    for reading in read(subject, ids, position=options.position, taps=taps, title=f"PROBE {group}"):
        _check_finite(reading, group)
        total += reading.stream.double().sum(0)
        tapped += reading.outputs.double().sum(0)
        fed = {path: fed[path] + reading.inputs[path].double().sum(0) for path in taps.inputs}
        for path, found in counts.items():
            found.add(group, reading.routing[path])
        if rows is not None:
            rows[reading.rows] = reading.stream
    n = len(prompts)
    means = {path: (summed / n).float() for path, summed in fed.items()}
    categories = tuple(p.category for p in prompts)
    return Moments(n, (total / n).float(), rows, categories), (tapped / n).float(), means


def _check_finite(reading: Reading, group: str) -> None:
    bad = ~torch.isfinite(reading.stream).flatten(2).all(-1)
    if bad.any():
        row, stream = (int(x) for x in bad.nonzero()[0])
        raise UserError(
            f"NaN or Inf in the activations of {group} prompt {reading.rows[row] + 1}, stream {stream} (after "
            f"block {stream - 1}); load the model with --dtype float32, or check its weights"
        )


# ------------------------------------------------------------------------------------------ on disk
def save_activations(acts: Activations, folder: Path) -> None:
    """Write activations.safetensors and activations.json into an existing folder."""
    tensors = {f"output/{path}": mean for path, mean in acts.outputs.items()}
    tensors |= {f"input/{g}/{path}": mean for g, means in acts.inputs.items() for path, mean in means.items()}
    tensors |= routing.named(acts.routed)
    for group, moments in acts.groups.items():
        tensors[f"mean/{group}"] = moments.mean
        if moments.rows is not None:
            tensors[f"rows/{group}"] = moments.rows
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "activations.safetensors")
    counts = {group: moments.count for group, moments in acts.groups.items()}
    data = {"counts": counts, "position": acts.position, "digest": acts.digest}
    data |= {"categories": {group: moments.categories for group, moments in acts.groups.items()}}
    (folder / "activations.json").write_text(json.dumps(data))


def load_activations(folder: Path) -> Activations:
    """What `save_activations` wrote."""
    data = json.loads((folder / "activations.json").read_text())
    tensors = load_file(folder / "activations.safetensors")
    groups = {
        g: Moments(n, tensors[f"mean/{g}"], tensors.get(f"rows/{g}"), tuple(data["categories"][g]))
        for g, n in data["counts"].items()
    }
    outputs = {k.removeprefix("output/"): v for k, v in tensors.items() if k.startswith("output/")}
    inputs: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for name in (k for k in tensors if k.startswith("input/")):
        _, group, path = name.split("/")
        inputs[group][path] = tensors[name]
    return Activations(groups, data["position"], outputs, inputs, data["digest"], routing.unnamed(tensors))
