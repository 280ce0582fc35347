"""A short hash that tells models apart: it covers the model's sizes and a few values of each writing matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from obliteratus.core.types import Site, digest_of
from obliteratus.summon.sites import stream_width
from obliteratus.weights.checkpoint import open_checkpoint
from obliteratus.weights.matrices import sample_indices, sample_weight
from obliteratus.weights.offload import OffloadedWeights


def compute_digest(model: PreTrainedModel, sites: tuple[Site, ...], sample: Callable[[Site], list[Any]]) -> str:
    """Return the hash of the architecture, its sizes, and a sample of every writer.

    One checkpoint has the same digest in fp32 and bf16, in fp16 too if it is stored in bf16, and when it is quantized
    on loading. A checkpoint that is stored quantized has a digest of its own.
    """
    samples = [sample(site) for site in sites if site.role == "writes"]
    table: Any = model.get_input_embeddings()
    return digest_of([model.config.model_type, stream_width(model), len(sites), table.weight.shape[0], samples])


def make_weight_sampler(
    model: PreTrainedModel, base: str, revision: str, offloaded: OffloadedWeights | None
) -> Callable[[Site], list[Any]]:
    """Return a function that samples a writer's weight: from `offloaded`, else from the checkpoint `base`, else from
    the model itself."""
    checkpoint = open_checkpoint(base, model, revision) if base else None

    def sample(site: Site) -> list[Any]:
        if offloaded is not None:
            indices = sample_indices(offloaded.count(site.parameter))
            return sample_weight(offloaded.read_values(site.parameter, indices))
        name = None if checkpoint is None else checkpoint.stored_name(site.parameter)
        module = model.get_submodule(site.path)
        with align_module_device(module):  # loads a weight that accelerate keeps on disk
            return sample_weight(checkpoint.read(name) if checkpoint and name else module, site.weight)

    return sample
