"""Activations kept on disk by all that they depend on: a second run on the same model and prompts probes nothing.

``probes/KEY/`` in the user's cache holds what `save_activations` wrote and the sum of its files. No prompt's text is
in it, only tokens' activations and the prompts' categories. An entry that is torn or altered is probed anew.
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

from obliteratus.core.progress import note
from obliteratus.core.settings import Probe
from obliteratus.core.types import Activations, ProbeRequest, PromptSet, Subject, digest_of
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import STREAM_ONLY
from obliteratus.probe.probe import collect_activations, load_activations, save_activations
from obliteratus.weights.organism import get_cache_folder
from obliteratus.weights.rewrite import hash_file
from obliteratus.weights.safetensors_io import tensor_bytes

SWITCH = "OBLITERATUS_PROBE_CACHE"
"""Environment variable: ``off`` neither reads nor keeps anything."""
FORMAT = 1  # one more whenever PROBE computes something else, or writes it in another form
# Bytes of all entries: rows of 512 prompts are 37 MB on a 135M model and 280 MB on an 8B one, so dozens of probes of
# the largest stay, in less room than such a model's own weights take.
LIMIT = 10 * 10**9
FILES = ("activations.json", "activations.safetensors")
SUM = "sum"
# Of a configuration, what says where it came from and not what it computes.
ORIGIN = {"_name_or_path", "transformers_version"}


def kept(
    stage: str,
    subject: Subject,
    prompts: PromptSet,
    options: Probe,
    request: ProbeRequest = STREAM_ONLY,
) -> Activations:
    """What `collect_activations` gives, from disk where an earlier run left it; the rest of the arguments are `collect_activations`'s.

    A model with any hook on it, such as a live plan's, is always probed, and nothing of it is kept; so is one whose
    weights are out of reach. A cache that cannot be read or written costs time, never an error. stage: who notes it.
    """
    weights = "" if os.environ.get(SWITCH) == "off" or _hooked(subject.model) else weights_of(subject)
    if not weights:
        return collect_activations(subject, prompts, options, request)
    modules = [[*paths] for paths in (request.output_modules, request.input_modules, request.expert_modules)]
    key = digest_of([weights, made_by(subject), asked_of(subject, prompts, options), modules])
    place = get_cache_folder() / "probes" / key
    found = _read(place)
    if found is not None:
        note(stage, "kept from an earlier run on the same model and prompts")
        return found
    acts = collect_activations(subject, prompts, options, request)
    try:
        _write(acts, place)
    except (OSError, SafetensorError) as error:  # no room, no permission, or another process cleaning up
        note(stage, f"not kept for later runs: {error}")
    return acts


def _hooked(model: nn.Module) -> bool:
    """Whether something on it may change what it computes. accelerate, which moves weights, replaces forwards too."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or ("forward" in vars(m) and "_hf_hook" not in vars(m))
        for m in model.modules()
    )


# -------------------------------------------------------------------------------------------- the key
def asked_of(subject: Subject, prompts: PromptSet, options: Probe) -> list[Any]:
    """The question: prompts, the tokens that they became (which cover tokenizer and template), and the options."""
    ids = {group: render_prompts(subject, members) for group, members in prompts.groups.items()}
    return [prompts.digest, ids, options.model_dump(), subject.thinking, subject.source.digest]


def made_by(subject: Subject) -> list[str]:
    """What turns weights and tokens into activations: configuration, model class, device, versions."""
    config = {k: v for k, v in subject.model.config.to_dict().items() if k not in ORIGIN}
    attention = subject.model.config._attn_implementation
    parts = [FORMAT, type(subject.model).__qualname__, attention, subject.device.type, digest_of(_plain(config))]
    return [str(part) for part in parts] + [version(name) for name in ("obliteratus", "torch", "transformers")]


def _plain(value: Any) -> Any:
    """As JSON can hold it: some configurations have dtypes in them, or numbers as keys."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else str(value)


def weights_of(subject: Subject) -> str:
    """Hash of every weight and buffer in its dtype, one pass over memory (1.7 GB/s a thread); empty where one cannot
    be seen. `Source.digest` takes samples of what writes, so it is blind to most edits.

    Weights that stay on disk are told by their files' names, sizes and times: reading them costs what probing does.
    """
    tensors = {**dict(subject.model.named_buffers()), **subject.model.state_dict(keep_vars=False)}
    heads = [[name, str(t.dtype), [*t.shape]] for name, t in tensors.items() if isinstance(t, Tensor)]
    if subject.offloaded is not None:
        files = [(file, file.stat()) for file in subject.offloaded.checkpoint.shards]
        return digest_of([heads, [[str(file.resolve()), at.st_size, at.st_mtime_ns] for file, at in files]])
    values = [t for t in tensors.values() if isinstance(t, Tensor)]
    if any(t.is_meta for t in values):
        return ""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return digest_of([heads, list(threads.map(_sha256, values))])


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


# -------------------------------------------------------------------------------------------- on disk
def _read(place: Path) -> Activations | None:
    """An entry, marked as used just now; None where there is none that is whole."""
    try:
        if (place / SUM).read_text() == _sum(place):
            acts = load_activations(place)
            with suppress(OSError):  # a cache that others may only read is as good
                os.utime(place)
            return acts
    except (OSError, ValueError, SafetensorError):
        pass  # none there, torn, or removed by another process meanwhile
    shutil.rmtree(place, ignore_errors=True)
    return None


def _write(acts: Activations, place: Path) -> None:
    """Written aside and renamed, then the oldest go. OSError or SafetensorError where that fails."""
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        save_activations(acts, work)
        (work / SUM).write_text(_sum(work))
        if not place.is_dir():  # else another process was faster
            work.rename(place)
        trim(place.parent, LIMIT)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sum(folder: Path) -> str:
    """Of an entry's files, one SHA-256 each."""
    return " ".join(hash_file(folder / name) for name in FILES)


def trim(folder: Path, limit: int) -> None:
    """Remove entries, those that were used longest ago first, until the rest takes at most ``limit`` bytes.

    What a killed process left half-written goes by the same rule.
    """
    entries = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    for entry in entries:
        limit -= sum(file.stat().st_size for file in entry.iterdir())
        if limit < 0:
            shutil.rmtree(entry, ignore_errors=True)
