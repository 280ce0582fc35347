"""SUMMON: a source becomes a `Subject`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from obliteratus.core.errors import UserError
from obliteratus.core.registry import unknown_name
from obliteratus.core.types import Source, Subject
from obliteratus.summon import selftest
from obliteratus.summon import sites as anatomy
from obliteratus.summon.coverage import table_coverage
from obliteratus.summon.digest import digest, weight_sampler
from obliteratus.summon.sites import architecture_of, find_sites, n_layers_of
from obliteratus.weights.bitsandbytes import keep_portable
from obliteratus.weights.devices import DeviceMap, check_parts, gather_hook_inputs, gather_tensor, placement_arguments
from obliteratus.weights.finite import is_finite
from obliteratus.weights.matrices import drop_quantization_mark, stored_floats
from obliteratus.weights.offload import OffloadedWeights
from obliteratus.weights.quantization import Storage, choose_storage
from obliteratus.weights.sources import ModelOrigin, check_weights, locate

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def open_subject(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str | DeviceMap = "auto",
    revision: str = "",
    trust_remote_code: bool = False,
    thinking: bool = False,
    self_test: bool = False,
    quantise: str | Mapping[str, Any] = "",
) -> Subject:
    """Load a model and its tokenizer, and find what can be edited in it.

    `source` is a folder with safetensors, a GGUF file, ``organism:NAME`` (``organism:base``), or a hub id.
    `dtype`: ``auto`` (as stored) or a name in `DTYPES`. `device`: see `placement_arguments`. `self_test` tries the table's claims.
    `quantise` packs linear layers on loading: ``4bit`` (nf4), ``fp4``, ``8bit``, or options of BitsAndBytesConfig.
    UserError for whatever the user can mend: each says what, where and what to do.
    """
    where, kind = placement_arguments(device), dtype_of(dtype)
    origin = locate(source)
    gguf = check_weights(origin)
    config = read_config(origin, revision, trust_remote_code)
    storage = choose_storage(origin, config, quantise, kind)
    architecture_of(config)
    check_parts(config, origin.name, where, plain=not (gguf or storage.label))
    options = _options(origin, revision, trust_remote_code)
    tokenizer = _tokenizer(origin, options)
    model = _stored(origin, config, storage, {**options, "dtype": kind, **where})
    subject = assemble_subject(
        model,
        tokenizer,
        id=origin.name,
        revision=commit_of(origin, revision),
        quantisation=gguf or storage.label,
        thinking=thinking,
        base=origin.name if storage.here else "",
    )
    if self_test:
        selftest.self_test(model)
    return subject


def assemble_subject(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    id: str,
    revision: str = "",
    quantisation: str = "",
    thinking: bool = False,
    base: str = "",
    shelf: OffloadedWeights | None = None,
) -> Subject:
    """The subject of a model in memory; UnsupportedModelError where the table does not cover it.

    base: the full-precision checkpoint that the model was quantised from on loading: the digest is that one's.
    shelf: where the weights are, if they stay on disk.
    """
    family = architecture_of(model.config)
    sites = find_sites(model, family)
    if missed := table_coverage(model, sites, family).paths:
        log.warning("%d matrices are in no table and are never edited: %s", len(missed), ", ".join(missed))
    dtype = str(model.dtype).removeprefix("torch.")
    sample = weight_sampler(model, base, revision, shelf)
    return Subject(
        model=model,
        tokenizer=tokenizer,
        sites=sites,
        n_layers=n_layers_of(model, family),
        width=anatomy.width_of(model),
        layers=family.layers,
        source=Source(id, revision, quantisation, dtype, digest(model, sites, sample), base),
        thinking=thinking,
        offloaded=shelf,
    )


# ---------------------------------------------------------------------------------- what was asked for
def dtype_of(name: str) -> torch.dtype | str:
    """The torch dtype of that name, or ``auto``."""
    if name == "auto":
        return name
    if name not in DTYPES:
        raise UserError(unknown_name("dtype", name, ["auto", *DTYPES]))
    return DTYPES[name]


def _options(origin: ModelOrigin, revision: str, trust_remote_code: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": origin.local}
    if origin.gguf:
        options["gguf_file"] = origin.gguf
    if revision:
        options["revision"] = revision
    return options


# ----------------------------------------------------------------------------------------- loading
def read_config(origin: ModelOrigin, revision: str = "", trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration alone; UserError where there is none, or none that transformers knows."""
    with _explained(origin, "its configuration cannot be read"):
        options = _options(origin, revision, trust_remote_code)
        config: PreTrainedConfig = AutoConfig.from_pretrained(origin.path, **options)
    return config


def width_of(source: str | Path) -> int:
    """Width of the residual stream, from the configuration alone. UserError as `open_subject`."""
    return int(read_config(locate(source)).get_text_config().hidden_size)


def config_and_tokenizer(origin: ModelOrigin, asked: Mapping[str, Any]) -> tuple[PreTrainedConfig, Any]:
    """All that is read of a model beside its weights. asked: as of `open_subject`."""
    revision, trust = asked.get("revision", ""), bool(asked.get("trust_remote_code"))
    config = read_config(origin, revision, trust)
    architecture_of(config)
    return config, _tokenizer(origin, _options(origin, revision, trust))


def _tokenizer(origin: ModelOrigin, options: dict[str, Any]) -> Any:
    with _explained(origin, "it has no usable tokenizer"):
        return AutoTokenizer.from_pretrained(origin.path, **options)


def _stored(
    origin: ModelOrigin, config: PreTrainedConfig, storage: Storage, options: dict[str, Any]
) -> PreTrainedModel:
    """The model, its numbers in the form that `storage` says."""
    if storage.packed:  # without a map bitsandbytes chooses: a GPU, if there is one
        options = {"device_map": {"": "cpu"}, **options}
    model = _model(origin, anatomy.model_class_of(config), {**options, **storage.options})
    if storage.packed:
        keep_portable(model)
    elif origin.gguf or storage.label:
        drop_quantization_mark(model)
    check_finite(model, origin.name)
    return model


def _model(origin: ModelOrigin, loader: Any, options: dict[str, Any]) -> PreTrainedModel:
    with _explained(origin, "its weights cannot be loaded (only safetensors and GGUF are read)"):
        loaded: Any = loader.from_pretrained(origin.path, use_safetensors=True, output_loading_info=True, **options)
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers would go on with random ones
        raise UserError(
            f"{origin.name}: {len(missing)} weights are missing, e.g. {missing[0]}; download the model again"
        )
    model.eval().requires_grad_(False)
    gather_hook_inputs(model)
    return model


_LOAD_ERRORS = (OSError, HfHubHTTPError, ValueError, KeyError, ImportError, RuntimeError)


@contextmanager
def _explained(origin: ModelOrigin, what: str) -> Iterator[None]:
    """Turn what the libraries raise on bad files, names and networks into one line."""
    try:
        yield
    except (*_LOAD_ERRORS, SafetensorError, StrictDataclassError) as error:
        cause = " ".join(str(error).split())[:300]  # enough for any cause; some list every file of a repository
        remedy = "check the folder's files" if origin.local else "check the name, the revision and the network"
        raise UserError(f"{origin.name}: {what}: {cause.rstrip('.')}; {remedy}") from error


def commit_of(origin: ModelOrigin, revision: str) -> str:
    """The commit that a hub id stood for; what was asked for, where that is not known."""
    if origin.local:
        return ""
    file = try_to_load_from_cache(origin.path, "config.json", revision=revision or None)
    return Path(file).parent.name if isinstance(file, str) else revision


def check_finite(model: PreTrainedModel, name: str) -> None:
    """UserError naming the first tensor with a NaN or Inf. One tensor at a time, no copies."""
    for path, module in model.named_modules():
        with align_module_device(module):
            for key, tensor in stored_floats(module).items():
                if not is_finite(gather_tensor(tensor)):
                    raise UserError(f"{name}: {path}.{key} holds NaN or Inf; download it again, or use another dtype")
