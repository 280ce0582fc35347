"""SUMMON: loads a model and its tokenizer from a source, and finds what can be edited, as a `Subject`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from obliteratus.core.chat import DEFAULT_CHAT, ChatFormat
from obliteratus.core.choices import DTYPES, check_dtype
from obliteratus.core.errors import UserError
from obliteratus.core.noise import hushed_stderr
from obliteratus.core.progress import note
from obliteratus.core.types import Source, Subject
from obliteratus.summon.chat_format import SIDE_FILE, add_side_template, check_format
from obliteratus.summon.coverage import count_coverage
from obliteratus.summon.digest import compute_digest, make_weight_sampler
from obliteratus.summon.loading_progress import weights_progress
from obliteratus.summon.selftest import self_test as run_self_test
from obliteratus.summon.sites import choose_model_class, find_architecture, find_sites, list_blocks, stream_width
from obliteratus.weights.bitsandbytes import keep_portable_layout
from obliteratus.weights.devices import DeviceMap, check_tensor_parallel, gather_hook_inputs, placement_arguments
from obliteratus.weights.finite import check_finite
from obliteratus.weights.gguf_header import parse_header_once
from obliteratus.weights.gguf_io import read_gguf
from obliteratus.weights.matrices import drop_quantization_config
from obliteratus.weights.offload import OffloadedWeights
from obliteratus.weights.quantization import StorageFormat, choose_storage_format
from obliteratus.weights.sources import ModelOrigin, check_weights, locate

log = logging.getLogger(__name__)

_LOAD_ERRORS = (
    OSError,
    HfHubHTTPError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
# What parsing a configuration or a tokenizer raises besides, if an entry is of another type than expected.
FILE_ERRORS = (*_LOAD_ERRORS, AttributeError, TypeError, LookupError, ArithmeticError, RecursionError)


@parse_header_once()
def open_subject(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str | DeviceMap = "auto",
    revision: str = "",
    trust_remote_code: bool = False,
    chat: ChatFormat = DEFAULT_CHAT,
    self_test: bool = False,
    quantize: str | Mapping[str, Any] = "",
) -> Subject:
    """Load a model and its tokenizer, and find what can be edited in it.

    source: a folder with safetensors, a GGUF file, ``organism:NAME`` (``organism:base``), or a hub id.
    dtype: ``auto`` (as stored) or a name in `DTYPES`. device: see `placement_arguments`. chat: how prompts are
    rendered. self_test: check the
    architecture table on the loaded model. quantize: pack linear layers on loading, as ``4bit`` (nf4), ``fp4`` or
    ``8bit``, or with options of BitsAndBytesConfig.

    Raises UserError for whatever the user can correct, with one line that says what, where and what to do.

    >>> ob.open_subject("model", dtype="float32")
    <Subject: model, 8 blocks of width 32 in float32, 58 sites>
    """
    if not isinstance(source, str | Path):
        raise UserError(
            f"open_subject opens a folder, a file or a hub id, not a {type(source).__name__}; for a model in memory "
            "use obliteratus.wrap(model, tokenizer)"
        )
    placement, torch_dtype = placement_arguments(device), parse_dtype(dtype)
    origin = locate(source)
    gguf = check_weights(origin)
    config = read_config(origin, revision, trust_remote_code)
    storage = choose_storage_format(origin, config, quantize, torch_dtype)
    find_architecture(config)
    added = switch_on_biases(origin, config) if gguf else ()
    check_tensor_parallel(config, origin.name, placement, plain=not (gguf or storage.label))
    options = _loading_options(origin, revision, trust_remote_code)
    tokenizer = _load_tokenizer(origin, options, chat)
    model = _load_model(origin, config, storage, {**options, "dtype": torch_dtype, **placement}, added)
    subject = assemble_subject(
        model,
        tokenizer,
        id=origin.name,
        revision=resolve_commit(origin, revision),
        quantization=gguf or storage.label,
        chat=chat,
        base=origin.name if storage.quantized_on_loading else "",
    )
    if self_test:
        run_self_test(model)
    return subject


def assemble_subject(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    id: str,
    revision: str = "",
    quantization: str = "",
    chat: ChatFormat = DEFAULT_CHAT,
    base: str = "",
    offloaded: OffloadedWeights | None = None,
) -> Subject:
    """Return the subject of a loaded model. Raises UnsupportedModelError if the architecture table does not cover it.

    base: the full-precision checkpoint that was quantized on loading, whose digest the subject gets.
    offloaded: the weights, if they stay on disk.
    """
    architecture = find_architecture(model.config)
    sites = find_sites(model, architecture)
    coverage = count_coverage(model, sites, architecture)
    if coverage.paths:
        log.warning(
            "the architecture table does not know %d matrices, which are never edited: %s",
            len(coverage.paths),
            ", ".join(coverage.paths),
        )
    dtype = str(model.dtype).removeprefix("torch.")
    digest = compute_digest(model, sites, make_weight_sampler(model, base, revision, offloaded))
    return Subject(
        model=model,
        tokenizer=tokenizer,
        sites=sites,
        n_layers=len(list_blocks(model, architecture)),
        width=stream_width(model),
        layers=architecture.layers,
        source=Source(id, revision, quantization, dtype, digest, base),
        coverage=coverage,
        chat=chat,
        offloaded=offloaded,
    )


# ---------------------------------------------------------------------------------- dtypes and configurations
def parse_dtype(name: str) -> torch.dtype | str:
    """Return the torch dtype of that name, or ``auto``. Raises UserError for an unknown name."""
    check_dtype(name)
    if name == "auto":
        return name
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def resolve_loading_dtype(config: PreTrainedConfig, name: str) -> torch.dtype:
    """Return the dtype that a model of that configuration is loaded in; ``auto`` is the stored one."""
    stored = torch.float32 if config.dtype is None else config.dtype  # GGUF files, for one, name no dtype
    dtype = stored if name == "auto" else parse_dtype(name)
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, DTYPES[dtype])


def read_config(origin: ModelOrigin, revision: str = "", trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration alone. Raises UserError if there is none, or none that transformers knows."""
    with _explain_load_errors(origin, "its configuration cannot be read", FILE_ERRORS):
        options = _loading_options(origin, revision, trust_remote_code)
        config: PreTrainedConfig = AutoConfig.from_pretrained(origin.path, **options)
    return config


def switch_on_biases(origin: ModelOrigin, config: PreTrainedConfig) -> tuple[str, ...]:
    """Set the entries that a GGUF file's biases of output matrices need in the configuration, and return their names.

    GGUF files have no such entries: llama.cpp takes what tensors there are, and transformers would leave them out.
    """
    names = read_gguf(Path(origin.path) / origin.gguf).tensors
    switches = find_architecture(config).bias_switch
    halves = [
        half for half, tensor in OUTPUT_TENSORS.items() if any(name.endswith(f".{tensor}.bias") for name in names)
    ]
    added = tuple(switches[half] for half in halves if half in switches)
    for key in added:
        setattr(config, key, True)
    return added


# GGUF's names of the matrices whose biases are switched on for half a block.
OUTPUT_TENSORS = {"attn": "attn_output", "mlp": "ffn_down"}


def read_width(source: str | Path) -> int:
    """Return the width of the residual stream from the configuration alone. Raises UserError as `open_subject`."""
    return int(read_config(locate(source)).get_text_config().hidden_size)


@parse_header_once()
def load_config_and_tokenizer(
    origin: ModelOrigin, options: Mapping[str, Any], chat: ChatFormat = DEFAULT_CHAT
) -> tuple[PreTrainedConfig, Any]:
    """Return configuration and tokenizer, without the weights. options: arguments of `open_subject`.

    Raises UserError if either cannot be loaded, or the architecture is not supported.
    """
    revision, trust = options.get("revision", ""), bool(options.get("trust_remote_code"))
    config = read_config(origin, revision, trust)
    find_architecture(config)
    return config, _load_tokenizer(origin, _loading_options(origin, revision, trust), chat)


def resolve_commit(origin: ModelOrigin, revision: str) -> str:
    """Return the commit that a hub id stands for, or `revision` if that is not known; '' for local files."""
    if origin.local:
        return ""
    file = try_to_load_from_cache(origin.path, "config.json", revision=revision or None)
    return Path(file).parent.name if isinstance(file, str) else revision


# ----------------------------------------------------------------------------------------- loading
def _loading_options(origin: ModelOrigin, revision: str, trust_remote_code: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": origin.local}
    if origin.gguf:
        options["gguf_file"] = origin.gguf
    if revision:
        options["revision"] = revision
    return options


def _load_tokenizer(origin: ModelOrigin, options: dict[str, Any], chat: ChatFormat) -> Any:
    """Return the tokenizer, and say if it has no chat template. Raises UserError if prompts cannot be rendered."""
    with _explain_load_errors(origin, "it has no usable tokenizer", FILE_ERRORS):
        tokenizer = AutoTokenizer.from_pretrained(origin.path, **options)
        tokenizer("a")  # some entries are of use only now
    add_side_template(tokenizer, _find_side_folder(origin, options.get("revision")))
    check_format(tokenizer, chat, origin.name)
    if not tokenizer.chat_template:
        note("SUMMON", f"{origin.name} has no chat template: prompts are given as raw text")
    return tokenizer


def _find_side_folder(origin: ModelOrigin, revision: str | None) -> Path:
    """Return the folder in which the files lie that are no part of a tokenizer. On the hub they are fetched."""
    if origin.local:
        return Path(origin.path)
    try:
        return Path(hf_hub_download(origin.path, SIDE_FILE, revision=revision)).parent
    except (HfHubHTTPError, OSError):  # the model has none, or there is no network to ask
        return Path(origin.path)


def _load_model(
    origin: ModelOrigin,
    config: PreTrainedConfig,
    storage: StorageFormat,
    options: dict[str, Any],
    added: Sequence[str] = (),
) -> PreTrainedModel:
    if storage.packed:  # without a map bitsandbytes would choose a GPU if there is one
        options = {"device_map": {"": "cpu"}, **options}
    options |= {"config": config} if added else {}
    model = _load_pretrained(origin, choose_model_class(config), {**options, **storage.options}, bool(added))
    if storage.packed:
        keep_portable_layout(model)
    elif origin.gguf or storage.label:
        drop_quantization_config(model)
    check_finite(model, origin.name)
    return model


def _load_pretrained(
    origin: ModelOrigin, model_class: Any, options: dict[str, Any], fill_biases: bool = False
) -> PreTrainedModel:
    """Return the loaded model. fill_biases: whether biases that the file does not have are zeros."""
    quiet = hushed_stderr() if origin.local else nullcontext()  # a download's bar is worth seeing
    unreadable = "its weights cannot be loaded (only safetensors and GGUF are read)"
    with quiet, _explain_load_errors(origin, unreadable), weights_progress("SUMMON weights"):
        loaded: Any = model_class.from_pretrained(
            origin.path, use_safetensors=True, output_loading_info=True, **options
        )
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    for name in [name for name in missing if fill_biases and name.endswith(".bias")]:
        model.get_parameter(name).data.zero_()
        missing.remove(name)
    if missing:  # transformers would fill them with random values
        raise UserError(
            f"{origin.name}: {len(missing)} weights are missing, e.g. {missing[0]}; download the model again"
        )
    model.eval().requires_grad_(False)
    gather_hook_inputs(model)
    return model


@contextmanager
def _explain_load_errors(
    origin: ModelOrigin, problem: str, expected: tuple[type[Exception], ...] = _LOAD_ERRORS
) -> Iterator[None]:
    """Turn what the libraries raise for bad files, names and networks into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # tokenizers raises Exception itself for a file that it cannot parse
        if not isinstance(error, expected) and type(error) is not Exception:
            raise
        cause = " ".join(str(error).split())[:300]  # long enough for any cause; some list every file of a repository
        if "couldn't connect to" in cause or isinstance(error, OfflineModeIsEnabled):
            cause = "the hub cannot be reached, and the model is not in the cache"
        remedy = "check the folder's files" if origin.local else "check the name, the revision and the network"
        raise UserError(f"{origin.name}: {problem}: {cause.rstrip('.')}; {remedy}") from error
