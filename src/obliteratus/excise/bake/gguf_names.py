"""Where a GGUF file keeps a site's matrix and bias, and which tensors llama.cpp's graph of its architecture allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf

from obliteratus.core.errors import UnsupportedModelError, UserError
from obliteratus.core.types import Site
from obliteratus.weights.gguf_blocks import can_read
from obliteratus.weights.gguf_io import GgufFile, GgufTensor

# Halves of a block whose output matrix may have a bias that the model was converted without, by llama.cpp 0.5.0
# (src/models/*.cpp: a tensor that is not required, and that the graph adds). Any other graph refuses a file with one.
OPTIONAL_BIASES: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("llama", "mistral3", "granite"), frozenset({"attn", "mlp"})),
    "apertus": frozenset({"attn"}),
}
# Graphs that read the head from the embedding whatever the file holds.
ALWAYS_TIED = ("gemma", "gemma2", "command-r", "cohere2")
TABLE, HEAD = "token_embd.weight", "output.weight"
FUSED = ("gate_up_proj", ("gate_proj", "up_proj"))
"""Readers of experts that transformers holds as one matrix, and GGUF as two."""


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file of a model, and the names of its tensors."""

    file: GgufFile

    @cached_property
    def _names(self) -> Any:
        return make_name_map(self.file.architecture, self.n_layers)

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.file.value(f"{self.file.architecture}.block_count", 0))

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one tensor."""
        return HEAD not in self.file.tensors

    def check_kind(self) -> None:
        """Raise UserError unless the file is a whole language model of an architecture that gguf knows."""
        file, kind = self.file, self.file.value("general.type", "model")
        if kind != "model":
            raise UserError(f"{file.path} holds no model but a {kind} (general.type); give the model's GGUF file")
        if (parts := int(file.value("split.count", 1))) > 1:
            raise UserError(f"{file.path} is one of {parts} parts; join them with llama-gguf-split --merge first")
        if file.architecture not in gguf.MODEL_ARCH_NAMES.values():
            raise UnsupportedModelError(
                f"{file.path}: the gguf package does not know '{file.architecture}' models; install a newer one"
            )

    def find_tensors(self, site: Site) -> Sequence[GgufTensor]:
        """Return the tensors that hold the site's matrix: two for readers of experts that transformers joins.

        Raises UserError if there are none.
        """
        path, (fused, parts) = _path_of(site), FUSED
        names = [look_up(self._names, path)]
        if names == [None] and path.endswith(fused):
            names = [look_up(self._names, path.removesuffix(fused) + part) for part in parts]
        if None in names:
            raise UnsupportedModelError(
                f"{self.file.path}: '{self.file.architecture}' files have no tensor for {site.parameter}; leave "
                "its part out of the plan (--set excise.parts=…)"
            )
        keys = [f"{name}.weight" for name in names]
        keys = [TABLE if key == HEAD and self.tied else key for key in keys]
        if missing := [key for key in keys if key not in self.file.tensors]:
            raise UserError(
                f"{self.file.path} has no {missing[0]}, which the plan edits: it is another model; give the GGUF file "
                "of the model that the plan was made for"
            )
        return [self.file.tensors[key] for key in keys]

    def find_tensor(self, site: Site) -> GgufTensor | None:
        """Return the one tensor that holds a writer's matrix, or None if the file has none that can be read."""
        name = look_up(self._names, _path_of(site))
        tensor = self.file.tensors.get(f"{name}.weight")
        return tensor if tensor is not None and can_read(tensor.type) else None

    def find_bias(self, site: Site) -> str:
        """Return the name that the site's bias has or would have."""
        return f"{self.find_tensors(site)[0].name.removesuffix('.weight')}.bias"

    def may_have_bias(self, site: Site) -> bool:
        """Return whether the file has a bias at this site, or llama.cpp's graph has a place for one."""
        half, _, kind = site.part.partition(".")
        optional = kind == "out" and half in OPTIONAL_BIASES.get(self.file.architecture, ())
        return self.find_bias(site) in self.file.tensors or optional

    def may_untie(self) -> bool:
        """Return whether llama.cpp's graph reads a head of its own if the file has one."""
        return self.file.architecture not in ALWAYS_TIED


def find_name(architecture: str, n_layers: int, site: Site) -> str:
    """Return the name of the tensor that holds a site in files of an architecture. Raises UnsupportedModelError."""
    name = look_up(make_name_map(architecture, n_layers), _path_of(site))
    if name is None:
        raise UnsupportedModelError(
            f"'{architecture}' GGUF files have no tensor for {site.parameter}; take its part out of excise.parts"
        )
    return name


def make_name_map(architecture: str, n_layers: int) -> Any:
    """Return the gguf package's map from transformers' names to those of an architecture's files."""
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[architecture], n_layers)


def look_up(names: Any, path: str) -> str | None:
    """Return the tensor's name for a module path, which inside an image-text model is longer; None if there is none."""
    plain = path.replace("model.language_model.", "model.")
    found: str | None = names.get_name(path) or names.get_name(plain)
    return found


def _path_of(site: Site) -> str:
    return site.path if site.weight == "weight" else site.parameter
