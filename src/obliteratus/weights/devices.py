"""Where a model is: one device, a map of several, or parts of every matrix in several processes.

Under tensor parallelism (``device="tp"``) every process runs the same program in step, and a weight is a DTensor, of
which each holds a part. `gather_tensor` gives all of it; whatever is hooked onto a module sees its whole input and output.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from obliteratus.core.errors import UserError
from obliteratus.core.registry import unknown_name

DeviceMap = Mapping[str, str | int]
"""Module path → torch device, number of a GPU, or ``disk``: as accelerate takes it."""
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process by its environment."""
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""What transformers has processes talk through, by where they compute."""


# ------------------------------------------------------------------------------------ what was asked for
def placement_arguments(device: str | DeviceMap) -> dict[str, Any]:
    """Arguments of from_pretrained that put the model there. UserError for a device that is not here.

    device: ``auto``, a torch device, ``map`` (accelerate spreads the model over devices, CPU and disk; or a map of your
    own), or ``tp``: transformers parts every matrix among the processes that torchrun started, and each of them makes
    the same calls in the same order.
    """
    if torch.cuda.is_available() and "PYTORCH_ALLOC_CONF" not in os.environ:
        # Batches differ in length: fixed segments would fragment. Read at the first allocation.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not isinstance(device, str):
        return {"device_map": dict(device)}
    if device == "map":
        return {"device_map": "auto"}
    if device == "tp":
        return _parallel()
    kind = device_kind(device)
    # Given a map, transformers loads straight to the device, with no copy of the model on the CPU.
    return {} if kind == "cpu" else {"device_map": {"": kind if device == "auto" else device}}


def device_kind(device: str) -> str:
    """cuda, mps or cpu; of ``auto``, the first that is here. UserError for one that is not."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k, ok in there.items() if ok) if device == "auto" else device.partition(":")[0]
    if kind not in there:
        raise UserError(unknown_name("device", device, ["auto", "map", "tp", *there]))
    if not there[kind]:
        raise UserError(f"device '{device}' is not available here; use device='auto'")
    return kind


def _parallel() -> dict[str, Any]:
    """Tensor parallelism over all processes that torchrun started."""
    if not all(name in os.environ for name in LAUNCHED):
        raise UserError(
            "device 'tp': this process was not started by torchrun; run torchrun --nproc-per-node N your_program.py"
        )
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if not (torch.distributed.is_available() and torch.distributed.is_backend_available(BACKENDS[kind])):
        raise UserError(
            f"device 'tp': this torch has no {BACKENDS[kind]}, through which processes on {kind} talk; install another"
            " build of torch, or use device='map'"
        )
    from transformers.distributed.configuration_utils import (
        DistributedConfig,  # not in builds of torch without processes
    )

    return {"distributed_config": DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))}


def check_parts(config: PreTrainedConfig, name: str, options: Mapping[str, Any], plain: bool) -> None:
    """UserError where the model cannot be parted as `placement_arguments` was asked to.

    options: what `placement_arguments` gave. plain: whether its weights are stored and loaded as floats.
    """
    if "distributed_config" not in options:
        return
    parts, text = int(options["distributed_config"].tp_size), config.get_text_config()
    if not text.base_model_tp_plan:
        raise UserError(f"{name}: transformers has no tensor-parallel plan for {text.model_type}; use device='map'")
    if not plain:
        raise UserError(f"{name}: device 'tp' takes safetensors of plain floats alone; use device='map'")
    sizes = text.to_dict()
    for key in ("num_attention_heads", "num_key_value_heads"):
        if (heads := sizes.get(key)) and heads % parts:
            raise UserError(
                f"{name}: {key} is {heads}, not a multiple of {parts} processes; start as many as divide it"
            )


# -------------------------------------------------------------------------------------- parted weights
def is_parted(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of it (or, of a replicated one, the same)."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gather_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, on this device; itself where it is not parted. Every process must ask in the same order."""
    if not is_parted(tensor):
        return tensor
    parted: Any = tensor
    with torch.inference_mode(False), torch.no_grad():  # torch makes no views of parameters as inference tensors
        full: Tensor = parted.full_tensor()
    return full


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of it: a view."""
    parted: Any = tensor
    part: Tensor = parted.to_local() if is_parted(tensor) else tensor
    return part


@contextmanager
def gathered_parameters(module: nn.Module) -> Iterator[None]:
    """Inside, all of the module's own parameters are here, brought from all processes: they must all enter."""
    parted = {name: p for name, p in module.named_parameters(recurse=False) if is_parted(p)}
    module._parameters.update({name: nn.Parameter(gather_tensor(p), requires_grad=False) for name, p in parted.items()})
    try:
        yield
    finally:
        module._parameters.update(parted)


def count_processes(model: PreTrainedModel) -> int:
    """How many processes run the model together, each with a part of every matrix; 1 where it is whole here."""
    return int(model.tp_size or 1)


def agree_on_least(model: PreTrainedModel, value: float, device: torch.device) -> float:
    """The least of what the processes that share the model say: batches must be the same in all of them."""
    if count_processes(model) == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return float(least)


def in_process_group() -> bool:
    """Whether this process takes part in a group: what it does alone, the others would wait for."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


# ---------------------------------------------------------------------------------------- whole inputs
def gather_hook_inputs(model: PreTrainedModel) -> None:
    """Make hooks on modules that are parted by inputs see whole inputs, as hooks on others do; no-op on a whole model.

    Their outputs are summed over the processes before any hook sees them. Each process gives such a module the part of
    the input that it has computed; while anything is hooked onto the module, the parts are brought together before the
    hooks run and taken apart behind them.
    """
    if count_processes(model) > 1:
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and _style(model, path) == "rowwise":
                module.register_forward_pre_hook(_join)
                vars(module)["forward"] = _apart(module, module.forward)


def _style(model: PreTrainedModel, path: str) -> str:
    """How transformers parts the module; its plans have * for the number of a layer or of an expert."""
    generic = ".".join("*" if name.isdigit() else name for name in path.split("."))
    return str((model.tp_plan or {}).get(generic, ""))


def _join(module: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if len(module._forward_hooks) + len(module._forward_pre_hooks) == 1:  # none but this
        return None
    from torch.distributed.tensor import DTensor, Shard

    x = args[0]
    if torch.is_grad_enabled() and x.requires_grad:
        raise UserError("device 'tp': gradients do not pass edits there; use a method without them, or device='map'")
    shape = (*x.shape[:-1], module.in_features)
    stride = torch.empty(shape, device="meta").stride()
    parted = DTensor.from_local(x, _mesh(module), [Shard(-1)], run_check=False, shape=torch.Size(shape), stride=stride)
    return (parted.full_tensor(), *args[1:])


def _apart(module: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def parting(x: Tensor) -> Tensor:
        if x.shape[-1] != module.in_features:
            return forward(x)
        everything = DTensor.from_local(x, _mesh(module), [Replicate()], run_check=False)
        return forward(everything.redistribute(placements=[Shard(-1)]).to_local())

    return parting


def _mesh(module: nn.Linear) -> Any:
    weight: Any = module.weight
    return weight.device_mesh
