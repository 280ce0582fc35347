"""Two models tensor by tensor: each parameter is read from both sides when its turn comes, and no model is held whole.

Models that are stored quantized are opened one at a time, and their numbers are laid down in a temporary folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, progress
from obliteratus.core.shapes import Float
from obliteratus.core.types import Site, Source, Subject
from obliteratus.summon.digest import compute_digest
from obliteratus.summon.load import open_subject, read_config, resolve_commit
from obliteratus.summon.sites import (
    choose_model_class,
    find_architecture,
    find_sites,
    find_tied_parameters,
    list_blocks,
)
from obliteratus.weights.bitsandbytes import is_packed, unpacked_shape
from obliteratus.weights.checkpoint import Checkpoint, open_origin
from obliteratus.weights.matrices import read_weight, sample_weight
from obliteratus.weights.quantization import choose_storage_format
from obliteratus.weights.safetensors_io import Pieces, write_shard
from obliteratus.weights.sources import WHOLE, ModelOrigin, locate

# Entries that must agree for weights to be comparable.
SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class StoredModel:
    """A model whose parameters are read one at a time."""

    name: str
    model: Any
    """The model on the meta device: its configuration, names and shapes."""
    checkpoint: Checkpoint
    source: Source
    """Without a digest: see `digest_of_model`."""
    digest: str = ""
    """Known digest, of a model that had to be opened."""

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each parameter; tied ones count once."""
        return {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}

    @cached_property
    def tied(self) -> tuple[str, str] | None:
        """Parameter names of embedding and head if they are one."""
        return find_tied_parameters(self.model)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All sites, as `Subject.sites`."""
        return find_sites(self.model, find_architecture(self.model.config))

    @cached_property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(list_blocks(self.model, find_architecture(self.model.config)))

    def holds(self, name: str) -> bool:
        """Return whether the files hold a parameter."""
        return name in self.checkpoint.parameters

    def read(self, name: str) -> Tensor:
        """Return a parameter in its stored dtype. Raises UserError for numbers that are not finite."""
        stored = self.checkpoint.parameters[name]
        read = self.checkpoint.read
        tensor = (
            read(stored.key) if stored.key else torch.stack([torch.cat([*map(read, one)]) for one in stored.experts])
        )
        if not tensor.is_floating_point():
            raise UserError(
                f"{self.name}: {name} is stored as {tensor.dtype}, not as plain numbers; convert it to BF16"
            )
        if not bool(torch.isfinite(tensor.float().sum())):
            raise UserError(f"{self.name}: {name} holds NaN or Inf; download it again, or use another dtype")
        return tensor

    def read_gain(self, site: Site) -> Float[Tensor, " width"] | None:
        """Return γ of the norm between the site and the stream, fp64, or None if there is none."""
        name = f"{site.gain}.weight"
        if site.gain is None or not self.holds(name):
            return None
        gain = self.read(name).double()
        return 1.0 + gain if site.norm == "rms+1" else gain

    def digest_of_model(self) -> str:
        """Return the digest that `open_subject` gives to this model, by which plans are bound to it."""
        return self.digest or compute_digest(
            self.model, self.sites, lambda site: sample_weight(self.read(self._stored(site.parameter)))
        )

    def _stored(self, name: str) -> str:
        return self.tied[0] if self.tied and name == self.tied[1] else name


# ------------------------------------------------------------------------------------------ opening
@contextmanager
def open_pair(
    edited: str | Path, base: str | Path, trust_remote_code: bool = False
) -> Iterator[tuple[StoredModel, StoredModel]]:
    """Yield both models, edited and base. Raises UserError if they cannot be compared."""
    with ExitStack() as stack:
        pair = tuple(_open(source, trust_remote_code, stack) for source in (edited, base))
        check_comparable(*pair)
        yield pair[0], pair[1]


def _open(source: str | Path, trust: bool, stack: ExitStack) -> StoredModel:
    origin = locate(source)
    config = read_config(origin, "", trust)
    find_architecture(config)
    storage = None if origin.gguf else choose_storage_format(origin, config)
    if storage is None or storage.label:
        return _spill(origin, trust, Path(stack.enter_context(TemporaryDirectory(prefix="obliteratus-trace-"))))
    model = _build_empty(config, trust)
    checkpoint = open_origin(origin, model)
    missing = [name for name in dict(model.named_parameters()) if name not in checkpoint.parameters]
    if missing:
        raise UserError(f"{source}: {len(missing)} tensors are missing, e.g. {missing[0]}; download the model again")
    dtype = str(config.dtype).removeprefix("torch.")
    return StoredModel(str(source), model, checkpoint, Source(origin.name, resolve_commit(origin, ""), "", dtype))


def _build_empty(config: Any, trust: bool) -> Any:
    with torch.device("meta"):
        return choose_model_class(config).from_config(config, dtype=torch.float32, trust_remote_code=trust)


def _spill(origin: ModelOrigin, trust: bool, folder: Path) -> StoredModel:
    """Open a model that is stored quantized, write its numbers as plain floats, and let go of it."""
    note("TRACE", f"{origin.name} is stored quantized: its numbers are written to a temporary folder")
    subject = open_subject(origin.name, trust_remote_code=trust)
    config, source = subject.model.config, subject.source
    like, pieces = _list_plain(subject)
    write_shard(folder / WHOLE, like, pieces)
    for key in ("quantization_config",):
        if key in vars(config):
            delattr(config, key)
    config.save_pretrained(folder)
    del subject, pieces
    model = _build_empty(config, trust)
    checkpoint = open_origin(ModelOrigin(origin.name, str(folder)), model)
    return StoredModel(origin.name, model, checkpoint, replace(source, digest=""), source.digest)


def _list_plain(subject: Subject) -> tuple[dict[str, Tensor], dict[str, Pieces]]:
    """Return a tensor like each parameter, and functions that compute those which are packed."""
    by_path = {site.path: site for site in subject.sites}
    like: dict[str, Tensor] = {}
    pieces: dict[str, Pieces] = {}
    for name, parameter in subject.model.named_parameters():
        path = name.rpartition(".")[0]
        module: nn.Module = subject.model.get_submodule(path)
        if is_packed(module) and name.endswith(".weight"):
            site = by_path.get(path) or Site(path, 0, "inner", "reads", "linear")
            shape = unpacked_shape(parameter)
            shape = shape[::-1] if site.layout == "conv1d" else shape
            like[name] = torch.empty(shape, dtype=torch.float32, device="meta")
            pieces[name] = partial(_unpack, module, site)
        else:
            like[name] = parameter.detach()
    return like, pieces


def _unpack(module: nn.Module, site: Site) -> Iterator[Tensor]:
    matrix = read_weight(module, site).float()
    yield (matrix.mT if site.layout == "conv1d" else matrix).contiguous()


def check_comparable(edited: StoredModel, base: StoredModel) -> None:
    """Raise UserError unless both have the same architecture and sizes, and EDITED lacks nothing that BASE has."""
    first, second = (one.model.config.get_text_config() for one in (edited, base))
    for key in SIZES:
        found, wanted = vars(first).get(key, ""), vars(second).get(key, "")
        if key == "model_type":
            found, wanted = first.model_type, second.model_type
        if found != wanted:
            raise UserError(f"{edited.name}: its {key} is {found}, that of {base.name} is {wanted}; give its own base")
    for name, shape in base.shapes.items():
        known = edited.tied[0] if edited.tied and name == edited.tied[1] else name
        if known not in edited.shapes:
            raise UserError(f"{edited.name} lacks {name}, which {base.name} has; give the base that it was made from")
        if edited.shapes[known] != shape:
            sizes = " and ".join("×".join(map(str, one)) for one in (edited.shapes[known], shape))
            raise UserError(f"{edited.name}: {name} differs in shape from that of {base.name} ({sizes})")


# --------------------------------------------------------------------------------------- streaming
@dataclass(frozen=True)
class TensorPair:
    """One matrix or vector of both models, in the base's orientation [out, in]."""

    name: str
    """Parameter name, with the number of the expert in brackets if it is one of a stack."""
    before: Tensor
    """As stored."""
    after: Tensor
    site: Site | None = None
    """The site whose matrix this is; of an expert, with its number."""
    bias_of: Site | None = None
    """The site whose bias this is."""


def stream_pairs(edited: StoredModel, base: StoredModel) -> Iterator[TensorPair]:
    """Yield all parameters of both models that are not equal bit by bit and dtype by dtype, one at a time.

    Parameters that only EDITED has are compared with what BASE has in their stead: zeros for a bias, and the embedding
    for a head that was tied to it.
    """
    matrices = {site.parameter: site for site in base.sites}
    biases = {f"{site.path}.{site.bias}": site for site in base.sites}
    with progress("TRACE tensors", len(edited.shapes)) as advance:
        for name in edited.shapes:
            after = edited.read(name)
            before = _read_counterpart(base, name, after)
            if before.dtype != after.dtype or not torch.equal(before, after):
                yield from _split(name, before, after, matrices.get(name), biases.get(name))
            advance(1)


def _read_counterpart(base: StoredModel, name: str, after: Tensor) -> Tensor:
    if base.holds(name) and name in base.shapes:
        return base.read(name)
    if base.tied and name == base.tied[1]:
        return base.read(base.tied[0])
    if name.endswith("bias"):
        return torch.zeros_like(after)
    raise UserError(f"{base.name} lacks {name}, which the edited model has; give the base that it was made from")


def _split(name: str, before: Tensor, after: Tensor, site: Site | None, bias_of: Site | None) -> Iterator[TensorPair]:
    if site is not None and site.stacked:
        for expert, (one, other) in enumerate(zip(before, after, strict=True)):
            own = replace(site, expert=expert)
            if not torch.equal(one, other.to(one.dtype)):
                yield TensorPair(f"{name}[{expert}]", _orient(one, own), _orient(other, own), own)
        return
    if site is not None:
        yield TensorPair(name, _orient(before, site), _orient(after, site), site)
        return
    flat = before.ndim > 2
    yield TensorPair(name, before.flatten(1) if flat else before, after.flatten(1) if flat else after, None, bias_of)


def _orient(matrix: Tensor, site: Site) -> Tensor:
    return matrix if site.layout in ("linear", "stack") else matrix.mT
