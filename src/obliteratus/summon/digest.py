"""What tells a model from others: a hash of its sizes and of a few values of each matrix that writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from obliteratus.core.types import Site, digest_of
from obliteratus.summon import sites as anatomy
from obliteratus.weights.checkpoint import open_checkpoint
from obliteratus.weights.matrices import sample_places, sample_weight
from obliteratus.weights.offload import OffloadedWeights


def digest(model: PreTrainedModel, sites: tuple[Site, ...], sample: Callable[[Site], list[Any]]) -> str:
    """Architecture, sizes, and a sample of every writer. The same in fp32 and bf16 for one checkpoint, in fp16 too
    where it is stored in bf16, and quantised on loading; a checkpoint stored in few bits has one of its own."""
    samples = [sample(site) for site in sites if site.role == "writes"]
    table: Any = model.get_input_embeddings()
    return digest_of([model.config.model_type, anatomy.width_of(model), len(sites), table.weight.shape[0], samples])


def weight_sampler(
    model: PreTrainedModel, base: str, revision: str, shelf: OffloadedWeights | None
) -> Callable[[Site], list[Any]]:
    """What takes a sample of a writer: from the files where the numbers are there, else from the model."""
    known = open_checkpoint(base, model, revision) if base else None

    def sample(site: Site) -> list[Any]:
        if shelf is not None:
            return sample_weight(shelf.picked(site.parameter, sample_places(shelf.count(site.parameter))))
        key = None if known is None else known.key(site.parameter)
        module = model.get_submodule(site.path)
        with align_module_device(module):  # brings a weight in that accelerate keeps on disk
            return sample_weight(known.tensor(key) if known and key else module, site.weight)

    return sample
