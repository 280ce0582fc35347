"""Cache of activations on disk, so that a second run on the same model, prompts and options probes nothing.

An entry is the folder ``probes/KEY/`` in the user's cache. It holds what `save_activations` wrote and a checksum. It
holds tokens' activations and the prompts' categories, and no prompt's text. A damaged entry is collected again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from obliteratus.core.errors import UserError
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.progress import note
from obliteratus.core.settings import Probe
from obliteratus.core.types import Activations, PromptSet, Subject, digest_of
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import STREAM_ONLY
from obliteratus.probe.probe import (
    DEFAULT_OPTIONS,
    FILE,
    TENSORS_FILE,
    collect_activations,
    load_activations,
    save_activations,
)
from obliteratus.weights.adapters import find_adapted
from obliteratus.weights.checkpoint import Checkpoint, find_own_checkpoint
from obliteratus.weights.devices import in_process_group
from obliteratus.weights.organism_files import get_cache_folder
from obliteratus.weights.safetensors_io import tensor_bytes

CACHE_VARIABLE = "OBLITERATUS_PROBE_CACHE"
"""Environment variable: ``off`` disables the cache, ``hash`` keys it on a hash of all weights, not on their files."""
FORMAT = 3  # raise it whenever PROBE computes something else, or writes it in another form
# Bytes of all entries together. Rows of 512 prompts take 37 MB on a 135M model and 280 MB on an 8B one, so dozens of
# entries of the largest fit, in less room than such a model's own weights take.
MAX_BYTES = 10 * 10**9
FILES = (FILE, TENSORS_FILE)
CHECKSUM = "sum"
# Entries of a configuration that say where it came from, and not what the model computes.
PROVENANCE = {"_name_or_path", "transformers_version"}
# Values sampled of each weight that is as its file has it. An edit along directions changes nearly all values of a
# matrix, so any sample shows it.
SAMPLE = 4096


def collect_cached_activations(
    subject: Subject, prompts: PromptSet, options: Probe = DEFAULT_OPTIONS, request: ProbeRequest = STREAM_ONLY
) -> Activations:
    """Return what `collect_activations` returns, from disk where an earlier run left it.

    The cache is neither read nor written for a model with hooks (e.g. under a live plan) or adapters, for one whose
    weights are out of reach, and in a group of processes. A cache that cannot be read or written costs time, and raises
    nothing.
    """
    changing = _has_hooks(subject.model) or find_adapted(subject.model)
    weights = "" if os.environ.get(CACHE_VARIABLE) == "off" or changing else weights_key(subject)
    if not weights or in_process_group():
        return collect_activations(subject, prompts, options, request)
    key = digest_of([weights, model_key(subject), request_key(subject, prompts, options, request)])
    entry = get_cache_folder() / "probes" / key
    cached = _read(entry)
    if cached is not None:
        note("PROBE", "read from the cache: an earlier run had the same model, prompts and options")
        return cached
    acts = collect_activations(subject, prompts, options, request)
    try:
        _write(acts, entry)
    except (OSError, SafetensorError) as error:  # no room, no permission, or another process that cleans up
        note("PROBE", f"the activations were not cached for later runs: {error}")
    return acts


def _has_hooks(model: nn.Module) -> bool:
    """Return whether any hook or replaced forward may change what the model computes. Forwards that accelerate
    replaced do not count, since they only move weights."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or ("forward" in vars(m) and "_hf_hook" not in vars(m))
        for m in model.modules()
    )


# -------------------------------------------------------------------------------------------- the key
def request_key(subject: Subject, prompts: PromptSet, options: Probe, request: ProbeRequest) -> list[Any]:
    """Return what was asked: prompts, the tokens that they became (which cover tokenizer and template), options, and
    the modules to read."""
    ids = {group: render_prompts(subject, members) for group, members in prompts.groups.items()}
    wanted = (request.output_modules, request.input_modules, request.expert_modules, request.contrast_modules)
    modules = [[*paths] for paths in wanted]
    return [prompts.digest, ids, options.model_dump(), subject.source.digest, modules]


def model_key(subject: Subject) -> list[str]:
    """Return what else turns weights and tokens into activations: configuration, model class, device, versions."""
    config = {k: v for k, v in subject.model.config.to_dict().items() if k not in PROVENANCE}
    attention = subject.model.config._attn_implementation
    parts = [FORMAT, type(subject.model).__qualname__, attention, subject.device.type, digest_of(_to_plain(config))]
    return [str(part) for part in parts] + [version(name) for name in ("obliteratus", "torch", "transformers")]


def _to_plain(value: Any) -> Any:
    """Convert a value to what JSON can hold: some configurations hold dtypes, or numbers as keys."""
    if isinstance(value, dict):
        return {str(k): _to_plain(v) for k, v in value.items()}
    return [_to_plain(v) for v in value] if isinstance(value, list | tuple) else str(value)


def weights_key(subject: Subject) -> str:
    """Return a digest of the model's weights and buffers, or '' if some are out of reach.

    Weights that were loaded from safetensors files and not changed in memory since are told by those files (path, size,
    modification time and header) and by a sample of their values. All others are hashed completely (1.7 GB/s a thread),
    as are all weights if OBLITERATUS_PROBE_CACHE is ``hash``. PyTorch counts changes in place, except those made
    through ``tensor.data``: of these only the sample tells, which misses a change of a few values.
    """
    state = {**dict(subject.model.named_buffers()), **subject.model.state_dict(keep_vars=True)}
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    layout = [[name, str(t.dtype), [*t.shape]] for name, t in tensors.items()]
    if subject.offloaded is not None:  # reading all of them would cost what probing costs
        return digest_of([layout, _describe_files(subject.offloaded.checkpoint)])
    if any(t.is_meta for t in tensors.values()):
        return ""
    checkpoint = None if os.environ.get(CACHE_VARIABLE) == "hash" else _find_checkpoint(subject)
    names = () if checkpoint is None else checkpoint.parameters
    stored = {id(tensors[name]) for name in names if name in tensors}  # by identity: a tied weight has two names
    samples = [_sample(t) if id(t) in stored and _is_unchanged(t) else t for t in tensors.values()]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        hashes = list(threads.map(_sha256, samples))
    return digest_of([layout, [] if checkpoint is None else _describe_files(checkpoint), hashes])


def _find_checkpoint(subject: Subject) -> Checkpoint | None:
    try:
        return find_own_checkpoint(subject)
    except UserError:  # its files were damaged or removed after it was loaded
        return None


def _describe_files(checkpoint: Checkpoint) -> list[list[Any]]:
    """Path, size, modification time and header of each file with weights."""
    files = [(file, file.stat(), header) for file, header in checkpoint.shards.items()]
    return [
        [str(file.resolve()), stat.st_size, stat.st_mtime_ns, hashlib.sha256(header.raw).hexdigest()]
        for file, stat, header in files
    ]


def _is_unchanged(tensor: Tensor) -> bool:
    """Return whether a loaded weight was never changed in place; loading leaves PyTorch's version counter at 0."""
    return not tensor.is_inference() and tensor._version == 0


def _sample(tensor: Tensor) -> Tensor:
    """Return up to 2 × SAMPLE values at even distances; all of a small tensor."""
    flat = tensor.detach().flatten()
    return flat[:: max(flat.numel() // SAMPLE, 1)]


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


# -------------------------------------------------------------------------------------------- on disk
def _read(entry: Path) -> Activations | None:
    """Load an entry and mark it as just used. Return None if there is none, or if it is damaged; then remove it."""
    try:
        if (entry / CHECKSUM).read_text(encoding="utf-8") == _checksum(entry):
            acts = load_activations(entry)
            with suppress(OSError):  # a cache that may only be read serves as well
                os.utime(entry)
            return acts
    except (OSError, ValueError, SafetensorError):
        pass  # there is none, it is damaged, or another process removed it meanwhile
    shutil.rmtree(entry, ignore_errors=True)
    return None


def _write(acts: Activations, entry: Path) -> None:
    """Write an entry under another name and rename it, then remove the oldest. Raises OSError or SafetensorError."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        save_activations(acts, temporary)
        (temporary / CHECKSUM).write_text(_checksum(temporary), encoding="utf-8")
        if not entry.is_dir():  # else another process was faster
            temporary.rename(entry)
        remove_oldest(entry.parent, MAX_BYTES)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checksum(folder: Path) -> str:
    """Return the SHA-256 of each of an entry's files."""
    return " ".join(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES)


def remove_oldest(folder: Path, limit: int) -> None:
    """Remove the entries that were used longest ago until the rest takes at most ``limit`` bytes. What a killed process
    left half-written counts as an entry."""
    entries = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    for entry in entries:
        limit -= sum(file.stat().st_size for file in entry.iterdir())
        if limit < 0:
            shutil.rmtree(entry, ignore_errors=True)
