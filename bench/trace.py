"""What `trace` says of checkpoints whose making is known: its classes, recovered directions and shares explained.

    python -m bench.trace [--role choosing|reported] [--only NAME,NAME] [--smoke] [--json]

Each checkpoint is made from an organism or its base, traced without a word of how it was made, and removed. Edits are
those of our methods, found on few prompts; adapters and fine-tunes are organisms, drawn adapters and a few
steps of Adam; copies are in another dtype or on the grid of a quantized format; the rest is noise, scaling, a random
direction, and exchanged matrices. Thresholds of `audit` were chosen with --role choosing (astronomy). The
table of docs/experiments is with --role reported (insects-matrices, gardening-railways). --smoke takes a tiny model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.common import describe_machine, format_rows, make_parser, say, take_prompts
from obliteratus.audit.refusal import compare_directions, find_mean_differences
from obliteratus.audit.tensor_trace import NOISE, PROJECTION, REQUANTIZATION, ROUNDING, SCALING, UNKNOWN
from obliteratus.audit.trace import TraceReport, trace_models
from obliteratus.audit.verdict import ADAPTER, NOTHING, TRAINING
from obliteratus.core.types import Edit, Plan, PromptSet, Subject
from obliteratus.excise.bake.base_checkpoint import BaseCheckpoint, find_base_checkpoint
from obliteratus.excise.bake.write_checkpoint import bake_into_checkpoint
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.excise.writers import remove_from_writers
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.summon.load import open_subject
from obliteratus.summon.sites import find_tied_ends
from obliteratus.weights.sources import WHOLE, locate

PROMPTS = 24  # of each split and group, to find edits with: what an edit is does not depend on how well it works
METHODS = {
    "choosing": ("basic", "leace", "least_change", "lean", "advanced", "heretic", "two_directions"),
    "reported": ("basic", "leace", "least_change", "lean", "informed", "reflected", "advanced"),
}
ORGANISMS = {"choosing": "astronomy", "reported": "insects-matrices"}
FINE_TUNES = {
    "choosing": {"weather-late": ADAPTER},
    "reported": {"gardening-railways": ADAPTER, "insects-matrices": TRAINING},
}
Weights = dict[str, Tensor]
Change = Callable[[Weights], Weights]


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what `trace` should say of it."""

    name: str
    kind: str
    base: str
    make: Callable[[Path], str]
    """Writes the checkpoint into a folder and returns its source."""
    plan: Plan | None = None
    """The edit that was made, if it was one."""
    method: str = ""


# ------------------------------------------------------------------------------------------- making
def copy_changed(base: str, change: Change, out: Path) -> str:
    """Write a model with changed weights, and links to its other files."""
    folder = Path(locate(base).path)
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out / file.name)
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file({name: tensor.contiguous() for name, tensor in change(weights).items()}, out / WHOLE)
    return str(out)


def bake_plan(subject: Subject, plan: Plan, after: Change | None, out: Path) -> str:
    """Write the model with a plan in its weights, as REBIRTH does, and change the result."""
    files = find_base_checkpoint(subject)
    assert files is not None, "the benchmark's models are folders of plain floats"
    out.mkdir(parents=True)
    for file in files.folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out / file.name)
    bake_into_checkpoint(BaseCheckpoint(subject, files, find_tied_ends(subject)), plan, out)
    if after is None:
        return str(out)
    changed = copy_changed(str(out), after, out.with_name(out.name + "-changed"))
    shutil.rmtree(out)
    return changed


def cast_to(dtype: torch.dtype, weights: Weights) -> Weights:
    """Return all weights in another dtype."""
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def quantize_to(kind: str, weights: Weights) -> Weights:
    """Return the matrices of blocks as a GGML type would store them."""
    own = gguf.GGMLQuantizationType[kind]

    def store(tensor: Tensor) -> Tensor:
        coded = gguf.quants.quantize(tensor.float().numpy(), own)
        numbers: Tensor = torch.from_numpy(gguf.quants.dequantize(coded, own))
        return numbers.to(tensor)

    return {n: store(t) if _is_matrix(n, t) and t.shape[1] % 32 == 0 else t for n, t in weights.items()}


def quantize_rows(weights: Weights) -> Weights:
    """Return the matrices of blocks in 8 bits with a scale for each row, as bitsandbytes' int8 has them."""

    def store(tensor: Tensor) -> Tensor:
        step = tensor.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        stored: Tensor = (tensor / step).round() * step
        return stored

    return {n: store(t) if _is_matrix(n, t) else t for n, t in weights.items()}


def add_noise(share: float, weights: Weights) -> Weights:
    """Return the matrices of blocks with Gaussian noise of this share of their size."""
    draw = torch.Generator().manual_seed(1)
    return {
        n: t + share * t.float().std() * torch.randn(t.shape, generator=draw) if _is_matrix(n, t) else t
        for n, t in weights.items()
    }


def scale_some(factor: float, weights: Weights) -> Weights:
    """Return every second MLP output matrix times a factor."""
    chosen = sorted(name for name in weights if "down_proj" in name)[::2]
    return {name: tensor * factor if name in chosen else tensor for name, tensor in weights.items()}


def add_adapter(rank: int, parts: Sequence[str], weights: Weights) -> Weights:
    """Return the matrices of these names with random changes of low rank, each of 2 % of the matrix's size."""
    draw = torch.Generator().manual_seed(2)

    def changed(tensor: Tensor) -> Tensor:
        left, right = (torch.randn(n, rank, generator=draw) for n in tensor.shape)
        made = left @ right.T
        moved: Tensor = tensor + 0.02 * tensor.norm() / made.norm() * made
        return moved

    return {n: changed(t) if any(p in n for p in parts) and t.ndim == 2 else t for n, t in weights.items()}


def exchange_blocks(weights: Weights) -> Weights:
    """Return the weights with the MLP output matrices of neighboring blocks exchanged."""
    names = sorted(name for name in weights if "down_proj" in name)
    swapped = dict(zip(names, [n for pair in zip(names[1::2], names[::2], strict=False) for n in pair], strict=False))
    return {name: weights[swapped.get(name, name)].clone() for name in weights}


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and ".layers." in name


def name_organism(name: str, out: Path) -> str:
    """Return the source of an organism, which is there already."""
    return f"organism:{name}"


def train(base: str, steps: int, rate: float, out: Path) -> str:
    """Write the model after a few steps of Adam on all weights, on the organism's control prompts."""
    subject = open_subject(base)
    texts = [prompt.text for prompt in load_prompts("organism:astronomy", "organism:astronomy")["control"]]
    model = subject.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for step in range(steps):
        batch = subject.tokenizer(texts[step], return_tensors="pt").input_ids
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    return str(out)


# -------------------------------------------------------------------------------------------- cases
def find_plan(method: str, subject: Subject, prompts: PromptSet, kept: Path | None) -> Plan:
    """Return the plan of a method, found on few prompts and measured hardly at all; of a search, its starting point.

    kept: folder of plans that were found before, by their methods.
    """
    if kept is not None and (kept / method).is_dir():
        return load_plan(kept / method)
    recipe = load_recipe(method, {"verify": [{"use": "behavior", "tokens": 4}]})
    plan = run(recipe.model_copy(update={"search": None}), subject, prompts, force=True).plan
    if kept is not None:
        save_plan(plan, kept / method)
    return plan


def draw_projection(subject: Subject) -> Plan:
    """Return the plan that removes one random direction from all writers of blocks."""
    row = torch.randn(1, subject.width, generator=torch.Generator().manual_seed(3))
    return remove_from_writers(subject, row / row.norm(), range(subject.n_layers))


def list_edits(
    role: str, subject: Subject, prompts: PromptSet, wanted: Sequence[str], kept: Path | None
) -> Iterator[Case]:
    """Yield checkpoints that plans make, some of them stored in another form afterwards."""
    base = subject.source.id
    for method in METHODS[role]:
        names: dict[str, Change | None] = {method: None}
        if method in ("basic", "lean"):
            names |= {
                f"{method}, bf16": partial(cast_to, torch.bfloat16),
                f"{method}, Q8_0": partial(quantize_to, "Q8_0"),
            }
        if wanted and not set(names) & set(wanted):
            continue
        plan = find_plan(method, subject, prompts, kept)
        for name, after in names.items():
            yield Case(name, PROJECTION, base, partial(bake_plan, subject, plan, after), plan, method)
    drawn = draw_projection(subject)
    yield Case("random direction", PROJECTION, base, partial(bake_plan, subject, drawn, None), drawn)


def list_others(role: str, base: str) -> Iterator[Case]:
    """Yield checkpoints that no plan makes."""
    changes: dict[str, tuple[str, Change]] = {
        "bf16": (ROUNDING, partial(cast_to, torch.bfloat16)),
        "fp16": (ROUNDING, partial(cast_to, torch.float16)),
        "Q8_0": (REQUANTIZATION, partial(quantize_to, "Q8_0")),
        "Q4_0": (REQUANTIZATION, partial(quantize_to, "Q4_0")),
        "int8 in rows": (REQUANTIZATION, quantize_rows),
        "noise 1 %": (NOISE, partial(add_noise, 0.01)),
        "scaled by 1.1": (SCALING, partial(scale_some, 1.1)),
        "adapter of rank 1 on writers": (ADAPTER, partial(add_adapter, 1, ("o_proj", "down_proj"))),
        "adapter of rank 16, bf16": (
            ADAPTER,
            lambda w: cast_to(torch.bfloat16, add_adapter(16, ("q_proj", "v_proj"), w)),
        ),
        "blocks exchanged": (UNKNOWN, exchange_blocks),
    }
    for name, (kind, change) in changes.items():
        yield Case(name, kind, base, partial(copy_changed, base, change))
    for name, kind in FINE_TUNES[role].items():
        yield Case(f"organism {name}", kind, "organism:base", partial(name_organism, name))
    yield Case("six steps of Adam", TRAINING, base, partial(train, base, 6, 2e-5))
    yield Case("itself", NOTHING, base, lambda out: base)


# ---------------------------------------------------------------------------------------- measuring
def measure_case(case: Case, means: Tensor | None, folder: Path) -> dict[str, Any]:
    """Return the row of a checkpoint, which is made, traced and removed."""
    place = folder / "checkpoint"
    source = case.make(place)
    start = time.perf_counter()
    found = trace_models(source, case.base)
    seconds = time.perf_counter() - start
    for made in (place, place.with_name(place.name + "-changed")):
        with suppress(FileNotFoundError):
            shutil.rmtree(made)
    row = {"name": case.name, "is": case.kind, "said": found.verdict.kind, "oblique": found.verdict.oblique}
    row |= {"beside": found.verdict.beside, "changed": len(found.tensors), "explained": found.explained}
    row |= {"noise": found.noise, "seconds": seconds, "nearest": found.nearest.name if found.nearest else ""}
    if case.plan is not None:
        row["recovered"] = compare_with_plan(found, case.plan)
    if means is not None and found.shared is not None:
        cosines = compare_directions(found.tensors, found.shared, means)
        row |= {"shared": found.shared.share, "refusal": cosines.own, "best": cosines.best, "chance": cosines.chance}
    return row


def compare_with_plan(found: TraceReport, plan: Plan) -> float:
    """Return the mean over edited matrices of the share (0–1) of the edit's directions that the recovered ones hold."""
    by_name: dict[str, list[Tensor]] = {}
    for trace in found.tensors:
        for change in trace.changes:
            if isinstance(change, Edit):
                by_name.setdefault(change.site.parameter, []).append(change.basis)
    overlaps = []
    for name, changes in plan.by_site().items():
        wanted = [change.basis for change in changes if isinstance(change, Edit)]
        if not wanted:
            continue
        own = torch.linalg.qr(wanted[0].double().mT)[0].mT
        span = torch.linalg.qr(torch.cat(by_name[name]).double().mT)[0].mT if name in by_name else own[:0]
        overlaps.append(float((own @ span.mT).square().sum() / len(own)) if len(span) else 0.0)
    return sum(overlaps) / max(len(overlaps), 1)


def confuse(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return how many checkpoints of each kind were called what."""
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        said = table.setdefault(row["is"], {})
        said[row["said"]] = said.get(row["said"], 0) + 1
    return table


def make_tiny(folder: Path) -> tuple[Subject, str]:
    """Return a tiny model, saved."""
    from tests.support.checkpoints import stored

    path = stored(folder / "tiny", "llama", hidden_size=64, intermediate_size=128)
    return open_subject(path), str(path)


def run_smoke(folder: Path) -> list[dict[str, Any]]:
    """Return rows of a tiny model."""
    subject, base = make_tiny(folder)
    drawn = draw_projection(subject)
    cases = [Case("random direction", PROJECTION, base, partial(bake_plan, subject, drawn, None), drawn)]
    cases += [c for c in list_others("choosing", base) if c.name in ("bf16", "Q8_0", "noise 1 %", "itself")]
    return [measure_case(case, None, folder) for case in cases]


def run_role(
    role: str, only: Sequence[str], folder: Path, kept: Path | None, organism: str = ""
) -> list[dict[str, Any]]:
    """Return the rows of a role."""
    base = f"organism:{organism or ORGANISMS[role]}"
    subject, prompts = open_subject(base), take_prompts(load_prompts(base, base), PROMPTS)
    means = find_mean_differences(subject, split_prompts(prompts, 0, force=True).fit)
    rows = []
    for cases in (list_others(role, base), list_edits(role, subject, prompts, only, kept)):
        for case in cases:
            if only and case.name not in only:
                continue
            rows.append(measure_case(case, means, folder))
            say(json.dumps(rows[-1]))
    return rows


def format_report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows and the confusion table as Markdown."""
    columns = ["checkpoint", "is", "said", "beside", "explained", "recovered", "cosine", "nearest", "s"]
    lines = [
        [
            str(row["name"]),
            str(row["is"]),
            ("oblique " if row["oblique"] else "") + str(row["said"]),
            ", ".join(row["beside"]),
            f"{row['explained']:.1%}",
            f"{row['recovered']:.4f}" if "recovered" in row else "",
            f"{row['refusal']:.2f} ({row['chance']:.2f})" if "refusal" in row else "",
            str(row["nearest"]),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    table = confuse(rows)
    said = sorted({name for counts in table.values() for name in counts})
    counts = [[kind, *(str(table[kind].get(name, "")) for name in said)] for kind in table]
    return format_rows(columns, lines) + "\n\n" + format_rows(["is \\ said", *said], counts)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables or the document."""
    parser = make_parser(__doc__)
    parser.add_argument("--role", choices=("choosing", "reported"), default="reported")
    parser.add_argument("--organism", default="", help="another organism than the role's")
    parser.add_argument("--plans", type=Path, help="folder in which the plans that are found are kept for later runs")
    parser.add_argument("--only", default="", help="names of checkpoints, separated by semicolons")
    options = parser.parse_args(argv)
    only = [name for name in options.only.split(";") if name]
    with tempfile.TemporaryDirectory(prefix="trace-") as place:
        rows = (
            run_smoke(Path(place))
            if options.smoke
            else run_role(options.role, only, Path(place), options.plans, options.organism)
        )
    document = {"role": options.role, "rows": rows, "confusion": confuse(rows), "machine": describe_machine()}
    print(json.dumps(document, indent=1) if options.json else format_report(rows))


if __name__ == "__main__":
    main()
