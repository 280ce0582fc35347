"""Bake a plan onto GGUF files, and compare with copying the same files: seconds, and memory in a fresh process.

The files have random weights in the shape of SmolLM2-135M. Both ways of copying reach the disk: the plain one, and one
that also takes the file's SHA-256, as baking does. The plan edits all writers of all layers along one direction. Memory
is what a new process holds at most, beyond what it holds once all is imported.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T

from bench.common import describe_machine, in_fresh_process, parse_options, print_report, run_with_peak, say, time_call
from obliteratus.core.types import Edit, Plan, Site
from obliteratus.excise.bake.gguf import bake_into_gguf
from obliteratus.excise.bake.gguf_names import GgufModel
from obliteratus.weights.gguf_blocks import encode
from obliteratus.weights.gguf_io import GgufFile, GgufTensor, StoredBytes, read_gguf
from obliteratus.weights.rewrite import copy_file
from obliteratus.weights.rewrite_gguf import encode_header, place_tensors


class Shape(NamedTuple):
    """Sizes of a model."""

    layers: int
    width: int
    inner: int
    vocabulary: int


WHOLE, SMOKE = Shape(30, 576, 1536, 49152), Shape(2, 256, 512, 512)
KINDS = (T.F16, T.Q8_0, T.Q4_1, T.Q4_K)
ROWS = 64  # of random numbers, repeated: quantizing all would take longer than the benchmark


def main(argv: Sequence[str] | None = None) -> None:
    """Print seconds, ratios and memory of each type."""
    options = parse_options(__doc__, argv)
    shape = SMOKE if options.smoke else WHOLE
    kinds = KINDS[:2] if options.quick and not options.smoke else KINDS
    with tempfile.TemporaryDirectory(prefix="obliteratus-bench-") as folder:
        found = {kind.name: _measure(Path(folder), kind, shape, options.repeats) for kind in kinds}
    print_report({"machine": describe_machine(), **found}, options.json)


def _measure(folder: Path, kind: T, shape: Shape, repeats: int) -> dict[str, float]:
    kind = T.Q8_0 if kind == T.Q4_K and shape.width % 256 else kind
    say(f"{kind.name} …")
    source = write_model(folder / "model.gguf", kind, shape)
    plan, target = remove_one_direction(shape), folder / "new.gguf"
    runs: dict[str, Callable[[], Any]] = {
        "copy": partial(_copy, source, target),
        "copy with SHA-256": partial(copy_file, source, target),
        "bake": lambda: bake_into_gguf(GgufModel(read_gguf(source)), plan, target),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):  # the first brings the files into the cache
        for name, run in runs.items():
            target.unlink(missing_ok=True)
            seconds[name].append(time_call(run)[0])
    target.unlink(missing_ok=True)
    imported, peak, kept = in_fresh_process(_bake_with_peak, source, shape, target)
    largest = max(t.size for name, t in read_gguf(source).tensors.items() if name.endswith("down.weight"))
    times = {name: median(values[1:]) for name, values in seconds.items()}
    return {
        "megabytes": source.stat().st_size / 1e6,
        **times,
        "bake / copy": times["bake"] / times["copy"],
        "bake / copy with SHA-256": times["bake"] / times["copy with SHA-256"],
        "imported_MB": imported / 1e6,
        "peak_MB": (peak - imported) / 1e6,
        "peak_over_largest_edited_MB": (peak - imported - largest) / 1e6,
        "kept": kept,
    }


def _bake_with_peak(source: Path, shape: Shape, target: Path) -> tuple[int, int, float]:
    """Return the bytes held before and at most while the plan is baked, and what the file holds of the edit."""
    plan = remove_one_direction(shape)
    imported, peak, record = run_with_peak(lambda: bake_into_gguf(GgufModel(read_gguf(source)), plan, target))
    return imported, peak, record["requantized"]["kept"]


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------- a model and a plan
def remove_one_direction(shape: Shape) -> Plan:
    """Return a plan that removes one random direction from all writers of all layers."""
    noise = torch.randn(1, shape.width, generator=torch.Generator().manual_seed(0))
    basis, paths = noise / noise.norm(), {"attn.out": "self_attn.o_proj", "mlp.out": "mlp.down_proj"}
    sites = (
        Site(f"model.layers.{layer}.{path}", layer, part, "writes", "linear")
        for layer in range(shape.layers)
        for part, path in paths.items()
    )
    return Plan(tuple(Edit(site, basis, 1.0) for site in sites))


def write_model(path: Path, kind: T, shape: Shape) -> Path:
    """Write a GGUF file of the llama architecture with random matrices of one type."""
    width, inner = shape.width, shape.inner
    matrices = {"attn_q": (width, width), "attn_k": (width // 3, width), "attn_v": (width // 3, width)}
    matrices |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width)}
    matrices |= {"ffn_down": (width, inner)}
    tensors = [GgufTensor("token_embd.weight", (shape.vocabulary, width), kind)]
    for layer in range(shape.layers):
        tensors += [GgufTensor(f"blk.{layer}.{name}.weight", size, kind) for name, size in matrices.items()]
    head = _write_metadata(path, shape)
    placed = place_tensors(tensors, head.alignment)
    with path.open("wb") as file:
        start = file.write(encode_header(head, placed))
        for tensor in placed:
            file.write(b"\0" * (start + tensor.start - file.tell()))
            for rows in _random_rows(tensor):
                file.write(np.ascontiguousarray(rows).data.cast("B"))
    return path


def _write_metadata(path: Path, shape: Shape) -> GgufFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.layers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return replace(read_gguf(path), tensors={})


def _random_rows(tensor: GgufTensor) -> Iterator[StoredBytes]:
    count, columns = tensor.shape
    values = torch.randn(min(ROWS, count), columns, generator=torch.Generator().manual_seed(columns)) * 0.05
    try:
        rows = encode(values, tensor.type)
    except NotImplementedError:  # a k-quant: random codes, with steps of about the same size
        rows = _random_blocks(tensor, len(values))
    for start in range(0, count, len(rows)):
        yield rows[: count - start]


def _random_blocks(tensor: GgufTensor, count: int) -> StoredBytes:
    rows = np.random.default_rng(0).integers(0, 256, (count, tensor.row_bytes), dtype=np.uint8)
    blocks = rows.reshape(-1, gguf.GGML_QUANT_SIZES[tensor.type][1])
    blocks[:, :4] = np.full((len(blocks), 2), 1e-3, np.float16).view(np.uint8)  # d and dmin of Q4_K
    return rows


if __name__ == "__main__":
    main()
