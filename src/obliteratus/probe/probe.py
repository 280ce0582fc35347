"""PROBE: prompts to activations, in as few passes as batches allow, in as little memory as is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import Probe
from obliteratus.core.types import Activations, Moments, ProbeRequest, Prompt, PromptSet, Sketch, Subject, digest_of
from obliteratus.inference import routing
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import STREAM_ONLY, BatchStates, read_hidden_states
from obliteratus.inference.routing import RoutingCounts
from obliteratus.probe.frequent_directions import FrequentDirections

ANCHOR_GROUP = "control"
DEFAULT = Probe()  # pydantic gives the fields their defaults


def collect_activations(
    subject: Subject,
    prompts: PromptSet,
    options: Probe = DEFAULT,
    request: ProbeRequest = STREAM_ONLY,
) -> Activations:
    """Read the residual stream at one position of every prompt, and sum it up for each group.

    request: the modules that are read in the same passes.
    Raises UserError if any activation is NaN or Inf.
    """
    asked = [(group, prompt) for group, members in prompts.groups.items() for prompt in members]
    first = {group: next(i for i, (name, _) in enumerate(asked) if name == group) for group in prompts.groups}
    found = {group: _Group(subject, members, options, request) for group, members in prompts.groups.items()}
    counts = {path: RoutingCounts() for path in request.expert_modules}
    ids = render_prompts(subject, [prompt for _, prompt in asked])
    for reading in read_hidden_states(subject, ids, position=options.position, request=request, title="PROBE"):
        for group, places in _by_group(asked, reading.rows).items():
            here = reading.of(places)
            _check_finite(here, group, first[group])
            found[group].add(here, first[group])
            for path, of in counts.items():
                of.add(group, here.routing[path])
    digest = digest_of([prompts.digest, subject.source.digest, options.model_dump(), subject.thinking])
    anchors = found[ANCHOR_GROUP].outputs() if request.output_modules else {}
    inputs = {group: mine.inputs() for group, mine in found.items()}
    routed = {path: of.routed() for path, of in counts.items()}
    moments = {group: mine.moments() for group, mine in found.items()}
    _say_error(moments)
    return Activations(moments, options.position, anchors, inputs, digest, routed)


def _by_group(asked: Sequence[tuple[str, Prompt]], rows: Sequence[int]) -> dict[str, list[int]]:
    """By group, which places of a batch are its prompts'."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(asked[row][0], []).append(place)
    return places


class _Group:
    """Running sums of one group, fp64, and its rows or a sketch of them if that is kept. Its prompts may come in any
    order."""

    def __init__(self, subject: Subject, prompts: Sequence[Prompt], options: Probe, request: ProbeRequest) -> None:
        self.prompts, self.request = prompts, request
        self.total = torch.zeros(subject.n_layers + 1, subject.width, dtype=torch.float64)
        self.tapped = torch.zeros(len(request.output_modules), subject.width, dtype=torch.float64)
        self.fed = {path: torch.zeros(1, dtype=torch.float64) for path in request.input_modules}
        self.rows = torch.empty(len(prompts), *self.total.shape) if options.keep == "rows" else None
        size = options.sketch if options.keep == "sketch" else 0
        self.sketch = FrequentDirections(subject.n_layers + 1, subject.width, size) if size else None

    def add(self, reading: BatchStates, first: int) -> None:
        """first: number of the group's first prompt among all."""
        self.total += reading.stream.double().sum(0)
        self.tapped += reading.outputs.double().sum(0)
        self.fed = {path: total + reading.inputs[path].double().sum(0) for path, total in self.fed.items()}
        if self.rows is not None:
            self.rows[torch.tensor(reading.rows) - first] = reading.stream
        if self.sketch is not None:
            self.sketch.add(reading.stream)

    def outputs(self) -> dict[str, Tensor]:
        """Mean output of each tapped module."""
        return dict(zip(self.request.output_modules, (self.tapped / len(self.prompts)).float(), strict=True))

    def inputs(self) -> dict[str, Tensor]:
        """Mean input of each module that was asked for."""
        return {path: (total / len(self.prompts)).float() for path, total in self.fed.items()}

    def moments(self) -> Moments:
        """Of the stream."""
        n = len(self.prompts)
        sketch = None if self.sketch is None else self.sketch.sketch()
        return Moments(n, (self.total / n).float(), self.rows, tuple(p.category for p in self.prompts), sketch)


def _say_error(moments: Mapping[str, Moments]) -> None:
    """What sketches leave out, at most."""
    short = {group: of.sketch.error.max().item() for group, of in moments.items() if of.sketch is not None}
    if short:
        said = ", ".join(f"{group} {share:.1%}" for group, share in short.items())
        note("PROBE", f"sketched; short of the spread along any direction by at most ({said}) of the largest")


def _check_finite(reading: BatchStates, group: str, first: int) -> None:
    bad = ~torch.isfinite(reading.stream).flatten(2).all(-1)
    if bad.any():
        row, stream = (int(x) for x in bad.nonzero()[0])
        raise UserError(
            f"NaN or Inf in the activations of {group} prompt {reading.rows[row] - first + 1}, stream {stream} (after "
            f"block {stream - 1}); load the model with --dtype float32, or check its weights"
        )


# ------------------------------------------------------------------------------------------ on disk
def save_activations(acts: Activations, folder: Path) -> None:
    """Write activations.safetensors and activations.json into an existing folder."""
    tensors = {f"output/{path}": mean for path, mean in acts.outputs.items()}
    tensors |= {f"input/{g}/{path}": mean for g, means in acts.inputs.items() for path, mean in means.items()}
    tensors |= routing.routing_to_tensors(acts.routed)
    for group, moments in acts.groups.items():
        tensors[f"mean/{group}"] = moments.mean
        if moments.rows is not None:
            tensors[f"rows/{group}"] = moments.rows
        if moments.sketch is not None:
            tensors |= {f"sketch/{group}/{name}": tensor for name, tensor in vars(moments.sketch).items()}
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
        g: Moments(n, tensors[f"mean/{g}"], tensors.get(f"rows/{g}"), tuple(data["categories"][g]), _sketch(tensors, g))
        for g, n in data["counts"].items()
    }
    outputs = {k.removeprefix("output/"): v for k, v in tensors.items() if k.startswith("output/")}
    inputs: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for name in (k for k in tensors if k.startswith("input/")):
        _, group, path = name.split("/")
        inputs[group][path] = tensors[name]
    return Activations(groups, data["position"], outputs, inputs, data["digest"], routing.routing_from_tensors(tensors))


def _sketch(tensors: Mapping[str, Tensor], group: str) -> Sketch | None:
    parts = {name: tensors.get(f"sketch/{group}/{name}") for name in ("rows", "lost", "total")}
    found = {name: part for name, part in parts.items() if part is not None}
    return Sketch(**found) if found else None
