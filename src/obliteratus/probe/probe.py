"""PROBE: prompts to activations, in as few passes as batches allow, and their form on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.probing import ProbeRequest, WriterContrast
from obliteratus.core.progress import note, shows_progress
from obliteratus.core.settings import Probe
from obliteratus.core.shapes import Float
from obliteratus.core.types import (
    Activations,
    Moments,
    Prompt,
    PromptSet,
    RoutingStatistics,
    Sketch,
    Subject,
    digest_of,
)
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import STREAM_ONLY, BatchStates, read_hidden_states
from obliteratus.inference.hooks import ExpertRouting
from obliteratus.probe.contrasts import MOST_LAST, contrast_outputs
from obliteratus.probe.frequent_directions import FrequentDirections

CONTROL = "control"  # the group whose mean outputs are kept as anchors
SPARED = (CONTROL, "keep")  # groups whose own outputs the covectors of contrasts read least
DEFAULT_OPTIONS = Probe()  # pydantic gives the fields their defaults
FILE, TENSORS_FILE = "activations.json", "activations.safetensors"


@shows_progress
def collect_activations(
    subject: Subject, prompts: PromptSet, options: Probe = DEFAULT_OPTIONS, request: ProbeRequest = STREAM_ONLY
) -> Activations:
    """Read the residual stream at one position of every prompt, and return its statistics for each group.

    request: modules that are read in the same passes; see `wanted_by`. Raises UserError if any activation is NaN or
    Inf.

    >>> acts = ob.collect_activations(subject, ob.split_prompts(prompts).fit)
    >>> acts["target"].mean.shape
    torch.Size([9, 32])
    """
    anchored, contrasted = request.output_modules, request.contrast_modules
    request = replace(request, output_modules=list(dict.fromkeys((*anchored, *contrasted))))
    group_of_row = [group for group, members in prompts.groups.items() for _ in members]
    first_row = {group: group_of_row.index(group) for group in prompts.groups}
    others = replace(request, contrast_modules=())  # only the outputs of prompts to be spared are kept
    requests = {group: request if group in SPARED else others for group in prompts.groups}
    sums = {g: _GroupSums(subject, members, options, requests[g]) for g, members in prompts.groups.items()}
    ids = render_prompts(subject, [prompt for members in prompts.groups.values() for prompt in members])
    for batch in read_hidden_states(subject, ids, position=options.position, request=request, title="PROBE"):
        for group, places in _places_by_group(batch.rows, group_of_row).items():
            states = batch.select(places)
            _check_finite(states, group, first_row[group])
            sums[group].add(states, first_row[group])
    moments = {group: of_group.moments() for group, of_group in sums.items()}
    _report_sketch_error(moments)
    means = sums[CONTROL].mean_outputs()
    return Activations(
        moments,
        options.position,
        outputs={path: means[path] for path in anchored},
        inputs={group: of_group.mean_inputs() for group, of_group in sums.items()},
        digest=digest_of([prompts.digest, subject.source.digest, options.model_dump(), ids]),
        routed={
            path: {group: of_group.routing[path].statistics() for group, of_group in sums.items()}
            for path in request.expert_modules
        },
        contrasts=_contrast(subject, prompts, sums, contrasted, options.position) if contrasted else {},
    )


def _contrast(
    subject: Subject, prompts: PromptSet, sums: Mapping[str, _GroupSums], paths: Sequence[str], position: int
) -> dict[str, WriterContrast]:
    """Return the contrasts of writers from the groups' mean outputs, those of target prompts by category."""
    target, control = sums["target"], sums[CONTROL].mean_outputs()
    means = target.mean_outputs_by_category()
    differences = {path: torch.stack([mean[path] for mean in means]) - control[path] for path in paths}
    share = torch.tensor([*target.counts.values()], dtype=torch.float32) / len(target.prompts)
    spared = [sums[group].first_outputs() for group in SPARED if group in sums]
    last = {path: torch.cat([outputs[path] for outputs in spared]) for path in paths}
    return contrast_outputs(subject, prompts, last, differences, share, position)


def _places_by_group(rows: Sequence[int], group_of_row: Sequence[str]) -> dict[str, list[int]]:
    """Return, by group, the places in a batch that its prompts have."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(group_of_row[row], []).append(place)
    return places


class _GroupSums:
    """Running sums of one group in fp64, and its rows or a sketch of them if the options keep either. The prompts may
    come in any order."""

    def __init__(self, subject: Subject, prompts: Sequence[Prompt], options: Probe, request: ProbeRequest) -> None:
        self.prompts, self.request = prompts, request
        self.stream = torch.zeros(subject.n_layers + 1, subject.width, dtype=torch.float64)
        self.counts = Counter(p.category for p in prompts)
        self.category_of = [[*self.counts].index(p.category) for p in prompts]
        shape = len(self.counts), len(request.output_modules), subject.width
        self.outputs = torch.zeros(shape, dtype=torch.float64)
        self.first = list[Tensor]()  # outputs of the first prompts, for contrasts
        self.inputs = {path: torch.zeros(1, dtype=torch.float64) for path in request.input_modules}
        self.routing = {path: RoutingSums() for path in request.expert_modules}
        self.rows = torch.empty(len(prompts), *self.stream.shape) if options.keep == "rows" else None
        size = options.sketch if options.keep == "sketch" else 0
        self.sketch = FrequentDirections(subject.n_layers + 1, subject.width, size) if size else None

    def add(self, states: BatchStates, first_row: int) -> None:
        """Add the states of some of the group's prompts. first_row: the row of the group's first prompt."""
        self.stream += states.stream.double().sum(0)
        categories = torch.tensor([self.category_of[row - first_row] for row in states.rows])
        self.outputs.index_add_(0, categories, states.outputs.double())
        if self.request.contrast_modules and len(self.first) < MOST_LAST:
            self.first += list(states.outputs)
        self.inputs = {path: total + states.inputs[path].double().sum(0) for path, total in self.inputs.items()}
        for path, routing in self.routing.items():
            routing.add(states.routing[path])
        if self.rows is not None:
            self.rows[torch.tensor(states.rows) - first_row] = states.stream
        if self.sketch is not None:
            self.sketch.add(states.stream)

    def mean_outputs(self) -> dict[str, Tensor]:
        """Return the mean output of each requested module."""
        return self._name_outputs(self.outputs.sum(0) / len(self.prompts))

    def mean_outputs_by_category(self) -> list[dict[str, Tensor]]:
        """Return the mean output of each requested module, for each category of prompts."""
        return [self._name_outputs(x / n) for x, n in zip(self.outputs, self.counts.values(), strict=True)]

    def first_outputs(self) -> dict[str, Float[Tensor, "prompts width"]]:
        """Return the outputs of each requested module on the prompts that came first, if contrasts are wanted."""
        return dict(zip(self.request.output_modules, torch.stack(self.first, 1), strict=True))

    def _name_outputs(self, outputs: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.request.output_modules, outputs.float(), strict=True))

    def mean_inputs(self) -> dict[str, Tensor]:
        """Return the mean input of each requested module."""
        return {path: (total / len(self.prompts)).float() for path, total in self.inputs.items()}

    def moments(self) -> Moments:
        """Return the statistics of the residual stream."""
        n = len(self.prompts)
        sketch = None if self.sketch is None else self.sketch.sketch()
        return Moments(n, (self.stream / n).float(), self.rows, tuple(p.category for p in self.prompts), sketch)


class RoutingSums:
    """Running sums of what one group's prompts did in one stack of experts. Only experts that were chosen have any."""

    def __init__(self) -> None:
        self.experts: dict[int, Tensor] = {}
        """Expert → [sum of its outputs …, sum of their squared lengths, their number]. They are fp64, so that rounding
        does not grow with the number of prompts."""
        self.shares: list[Tensor] = []

    def add(self, batch: ExpertRouting) -> None:
        """Add the rows of a batch."""
        self.shares.append(batch.shares.double())
        for expert in batch.chosen.unique().tolist():
            outputs = batch.outputs[batch.chosen == expert].double()
            sums = torch.cat([outputs.sum(0), outputs.square().sum()[None], torch.tensor([len(outputs)])])
            self.experts[expert] = self.experts[expert] + sums if expert in self.experts else sums

    def statistics(self) -> RoutingStatistics:
        """Return the statistics of all experts of the stack."""
        shares = torch.cat(self.shares)
        zeros = torch.zeros_like(next(iter(self.experts.values())))
        sums = torch.stack([self.experts.get(expert, zeros) for expert in range(shares.shape[1])])
        means = sums[:, :-1] / sums[:, -1].clamp(min=1)[:, None]
        return RoutingStatistics(
            share=shares.mean(0).float(),
            variance=(shares.var(0, correction=0) * len(shares) / max(len(shares) - 1, 1)).float(),
            prompts=len(shares),
            count=sums[:, -1].long(),
            mean=means[:, :-1].float(),
            square=means[:, -1].float(),
        )


def _report_sketch_error(moments: Mapping[str, Moments]) -> None:
    errors = {group: of_group.sketch.error.max() for group, of_group in moments.items() if of_group.sketch is not None}
    if errors:
        bounds = ", ".join(f"{group} {float(error):.1%}" for group, error in errors.items())
        note("PROBE", f"the sketch misses at most this share of the largest spread along any direction: {bounds}")


def _check_finite(states: BatchStates, group: str, first_row: int) -> None:
    bad = ~torch.isfinite(states.stream).flatten(2).all(-1)
    if bad.any():
        row, stream = (int(x) for x in bad.nonzero()[0])
        raise UserError(
            f"NaN or Inf in the activations of {group} prompt {states.rows[row] - first_row + 1}, stream {stream} "
            f"(after block {stream - 1}); load the model with --dtype float32, or check its weights"
        )


# ------------------------------------------------------------------------------------------ on disk
def save_activations(acts: Activations, folder: Path) -> None:
    """Write activations.safetensors and activations.json into an existing folder."""
    tensors = {f"output/{path}": mean for path, mean in acts.outputs.items()}
    tensors |= {f"input/{g}/{path}": mean for g, means in acts.inputs.items() for path, mean in means.items()}
    for path, contrast in acts.contrasts.items():
        tensors |= {f"contrast/{path}/{name}": tensor.clone() for name, tensor in vars(contrast).items()}
    for path, groups in acts.routed.items():
        for group, statistics in groups.items():
            fields = vars(statistics).items()
            tensors |= {f"routed/{path}/{group}/{name}": torch.as_tensor(value) for name, value in fields}
    for group, moments in acts.groups.items():
        tensors[f"mean/{group}"] = moments.mean
        if moments.rows is not None:
            tensors[f"rows/{group}"] = moments.rows
        if moments.sketch is not None:
            tensors |= {f"sketch/{group}/{name}": tensor for name, tensor in vars(moments.sketch).items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSORS_FILE)
    counts = {group: moments.count for group, moments in acts.groups.items()}
    data = {"counts": counts, "position": acts.position, "digest": acts.digest}
    data |= {"categories": {group: moments.categories for group, moments in acts.groups.items()}}
    (folder / FILE).write_text(json.dumps(data), encoding="utf-8")


def load_activations(folder: Path) -> Activations:
    """Load what `save_activations` wrote."""
    data = json.loads((folder / FILE).read_text(encoding="utf-8"))
    tensors = load_file(folder / TENSORS_FILE)
    groups = {
        g: Moments(
            n, tensors[f"mean/{g}"], tensors.get(f"rows/{g}"), tuple(data["categories"][g]), _load_sketch(tensors, g)
        )
        for g, n in data["counts"].items()
    }
    outputs = {k.removeprefix("output/"): v for k, v in tensors.items() if k.startswith("output/")}
    inputs: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
    for name in (k for k in tensors if k.startswith("input/")):
        _, group, path = name.split("/")
        inputs[group][path] = tensors[name]
    return Activations(
        groups, data["position"], outputs, inputs, data["digest"], _load_routing(tensors), _load_contrasts(tensors)
    )


def _load_contrasts(tensors: Mapping[str, Tensor]) -> dict[str, WriterContrast]:
    fields: dict[str, dict[str, Tensor]] = {}
    for key in (key for key in tensors if key.startswith("contrast/")):
        _, path, name = key.split("/")
        fields.setdefault(path, {})[name] = tensors[key]
    return {path: WriterContrast(**found) for path, found in fields.items()}


def _load_sketch(tensors: Mapping[str, Tensor], group: str) -> Sketch | None:
    if f"sketch/{group}/rows" not in tensors:
        return None
    return Sketch(*(tensors[f"sketch/{group}/{name}"] for name in ("rows", "lost", "total")))


def _load_routing(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, RoutingStatistics]]:
    fields: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key in (key for key in tensors if key.startswith("routed/")):
        _, path, group, name = key.split("/")
        fields.setdefault(path, {}).setdefault(group, {})[name] = tensors[key]
    return {
        path: {g: RoutingStatistics(**{**own, "prompts": int(own["prompts"])}) for g, own in groups.items()}  # type: ignore[arg-type]
        for path, groups in fields.items()
    }
