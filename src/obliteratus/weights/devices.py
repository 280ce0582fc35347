"""Places a model on one device, on a map of several, or sharded over several processes.

Under tensor parallelism (``device="tp"``) every process runs the same program in step, and a weight is a DTensor of
which each holds a shard. `gather_tensor` returns the whole tensor, and hooks on a module see its whole input and
output.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from obliteratus.core.choices import check_device
from obliteratus.core.errors import UserError

DeviceMap = Mapping[str, str | int]
"""Module path → torch device, number of a GPU, or ``disk``, as accelerate takes it."""
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets for each process."""
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""Device type → the torch.distributed backend that transformers uses."""


# ------------------------------------------------------------------------------------ placement
def placement_arguments(device: str | DeviceMap) -> dict[str, Any]:
    """Return the arguments of from_pretrained that place the model. Raises UserError for an unavailable device.

    device: ``auto``, a torch device, ``map`` (accelerate spreads the model over devices, CPU and disk), a map of your
    own, or ``tp``, with which transformers shards every matrix over the processes that torchrun started. All of these
    must make the same calls in the same order.
    """
    if torch.cuda.is_available() and "PYTORCH_ALLOC_CONF" not in os.environ:
        # Batches differ in length, so segments of fixed size would fragment. Read at the first allocation.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not isinstance(device, str):
        return {"device_map": dict(device)}
    if device == "map":
        return {"device_map": "auto"}
    if device == "tp":
        return _parallel_arguments()
    device_type = resolve_device_type(device)
    # Given a map, transformers loads straight to the device, with no copy of the model on the CPU.
    return {} if device_type == "cpu" else {"device_map": {"": device_type if device == "auto" else device}}


def resolve_device_type(device: str) -> str:
    """Return cuda, mps or cpu; for ``auto`` the first that is available. Raises UserError for an unavailable one."""
    check_device(device, others=("auto",))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device_type = next(k for k, ok in available.items() if ok) if device == "auto" else device.partition(":")[0]
    if not available[device_type]:
        raise UserError(f"device '{device}' is not available here; use device='auto'")
    return device_type


def _parallel_arguments() -> dict[str, Any]:
    """Return the arguments for tensor parallelism over all processes that torchrun started."""
    if not all(name in os.environ for name in TORCHRUN_VARIABLES):
        raise UserError(
            "device 'tp': this process was not started by torchrun; run torchrun --nproc-per-node N your_program.py"
        )
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if not (torch.distributed.is_available() and torch.distributed.is_backend_available(BACKENDS[device_type])):
        raise UserError(
            f"device 'tp': this build of torch lacks the {BACKENDS[device_type]} backend, which processes on "
            f"{device_type} need; install another build, or use device='map'"
        )
    # Imported here because builds of torch without torch.distributed cannot import it.
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]))}


def check_tensor_parallel(config: PreTrainedConfig, name: str, options: Mapping[str, Any], plain: bool) -> None:
    """Raise UserError if tensor parallelism was asked for and the model does not support it.

    options: the result of `placement_arguments`. plain: whether the weights are stored and loaded as floats.
    """
    if "distributed_config" not in options:
        return
    processes, text = int(options["distributed_config"].tp_size), config.get_text_config()
    if not text.base_model_tp_plan:
        raise UserError(f"{name}: transformers has no tensor-parallel plan for {text.model_type}; use device='map'")
    if not plain:
        raise UserError(f"{name}: device 'tp' needs safetensors of plain floats; use device='map'")
    sizes = text.to_dict()
    for key in ("num_attention_heads", "num_key_value_heads"):
        if (heads := sizes.get(key)) and heads % processes:
            raise UserError(
                f"{name}: {key} is {heads}, not a multiple of {processes} processes; start a number that divides it"
            )


# -------------------------------------------------------------------------------------- sharded weights
def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor, of which other processes hold the rest (or the same, if replicated)."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor on this device. If it is sharded, every process must call this in the same order."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.inference_mode(False), torch.no_grad():  # torch makes no views of parameters as inference tensors
        full: Tensor = sharded.full_tensor()
    return full


def local_shard(tensor: Tensor) -> Tensor:
    """Return a view of what this process holds of the tensor."""
    sharded: Any = tensor
    shard: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return shard


@contextmanager
def gathered_parameters(module: nn.Module) -> Iterator[None]:
    """Replace the module's own sharded parameters by whole ones inside the context, which all processes must enter."""
    sharded = {name: p for name, p in module.named_parameters(recurse=False) if is_sharded(p)}
    whole = {name: nn.Parameter(gather_tensor(p), requires_grad=False) for name, p in sharded.items()}
    module._parameters.update(whole)
    try:
        yield
    finally:
        module._parameters.update(sharded)


def count_processes(model: PreTrainedModel) -> int:
    """Return how many processes run the model together, each with a shard of every matrix; 1 if it is whole here."""
    return int(model.tp_size or 1)


def minimum_over_processes(model: PreTrainedModel, value: float, device: torch.device) -> float:
    """Return the least of the values that the model's processes pass, so that all choose the same batches."""
    if count_processes(model) == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return float(least)


def in_process_group() -> bool:
    """Return whether this process belongs to a group, whose other members would wait for what it does alone."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return initialized and torch.distributed.get_world_size() > 1


# ---------------------------------------------------------------------------------------- whole inputs
def gather_hook_inputs(model: PreTrainedModel) -> None:
    """Make hooks on modules that are sharded by inputs see whole inputs; does nothing to a model that is not sharded.

    Each process passes such a module the part of the input that it has computed. While the module has hooks, the parts
    are joined before the hooks run and split again after them. Outputs are whole before any hook sees them.
    """
    if count_processes(model) > 1:
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and _shard_style(model, path) == "rowwise":
                module.register_forward_pre_hook(_join_inputs)
                vars(module)["forward"] = _split_inputs(module, module.forward)


def _shard_style(model: PreTrainedModel, path: str) -> str:
    """Return how transformers shards the module; its plans have * for the number of a layer or of an expert."""
    generic = ".".join("*" if name.isdigit() else name for name in path.split("."))
    return str((model.tp_plan or {}).get(generic, ""))


def _join_inputs(module: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if len(module._forward_hooks) + len(module._forward_pre_hooks) == 1:  # this hook is the only one
        return None
    from torch.distributed.tensor import DTensor, Shard

    x = args[0]
    if torch.is_grad_enabled() and x.requires_grad:
        raise UserError(
            "device 'tp': gradients do not pass through edits; use a method without gradients, or device='map'"
        )
    shape = (*x.shape[:-1], module.in_features)
    stride = torch.empty(shape, device="meta").stride()
    joined = DTensor.from_local(x, _mesh(module), [Shard(-1)], run_check=False, shape=torch.Size(shape), stride=stride)
    return (joined.full_tensor(), *args[1:])


def _split_inputs(module: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def forward_shard(x: Tensor) -> Tensor:
        if x.shape[-1] != module.in_features:
            return forward(x)
        whole = DTensor.from_local(x, _mesh(module), [Replicate()], run_check=False)
        return forward(whole.redistribute(placements=[Shard(-1)]).to_local())

    return forward_shard


def _mesh(module: nn.Linear) -> Any:
    weight: Any = module.weight
    return weight.device_mesh
