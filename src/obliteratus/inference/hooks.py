"""Hooks that read one position, or a few, of each row as it passes; nothing else of a pass is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obliteratus.core.probing import ProbeRequest
from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Subject


class DoneError(Exception):
    """Raised by a hook that has read all that is wanted, so that the layers above do not run."""


def decoder_blocks(subject: Subject) -> list[nn.Module]:
    """Return the decoder blocks, in order."""
    return list(subject.module(subject.layers).children())


def add_to_output(output: Any, vector: Tensor) -> Any:
    """Return a block's output, a tensor or a tuple that begins with one, with the vector added at every token."""
    if isinstance(output, tuple):
        return (add_to_output(output[0], vector), *output[1:])
    return output + vector.to(output.device, output.dtype)


@dataclass(frozen=True)
class ExpertRouting:
    """What a stack of experts did with each row: with all its tokens, and with the one at the wanted position."""

    shares: Float[Tensor, "rows experts"]
    """Share of the tokens up to the wanted position that are routed to the expert."""
    chosen: Int[Tensor, "rows k"]
    outputs: Float[Tensor, "rows k width"]
    """Output of each chosen expert, fp32, before the routing weight."""

    def select(self, rows: Int[Tensor, " n"]) -> ExpertRouting:
        """Return the routing of some of the rows."""
        return ExpertRouting(self.shares[rows], self.chosen[rows], self.outputs[rows])


class StreamCapture:
    """Reads the stream at the block boundaries from stream index ``first`` to ``last``, and the requested modules.

    at: position of each row, [rows], or several positions, [rows, positions]. Experts take only one.
    """

    def __init__(self, subject: Subject, at: Tensor, request: ProbeRequest, last: int, first: int = 0) -> None:
        self.subject, self.at, self.request, self.last, self.first = subject, at, request, last, first
        self.stream: list[Tensor] = []
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.routing: dict[str, ExpertRouting] = {}

    @contextmanager
    def attach(self) -> Iterator[None]:
        """Attach the hooks inside the context. The pass ends early once all that is wanted was read."""
        module, request, blocks = self.subject.module, self.request, decoder_blocks(self.subject)
        handles = [
            block.register_forward_hook(self._on_block_output) for block in blocks[max(self.first - 1, 0) : self.last]
        ]
        if not self.first:
            handles.append(blocks[0].register_forward_pre_hook(self._on_first_input, with_kwargs=True))
        handles += [module(path).register_forward_hook(self._read_output(path)) for path in request.output_modules]
        handles += [module(path).register_forward_pre_hook(self._read_input(path)) for path in request.input_modules]
        handles += [module(path).register_forward_pre_hook(self._read_routing(path)) for path in request.expert_modules]
        try:
            yield
        except DoneError:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def stack(self) -> tuple[Tensor, Tensor]:
        """Return the stream [rows, streams, width] and the modules' outputs [rows, modules, width], fp32 on the CPU.
        With several positions both are [rows, …, positions, width]."""
        none = torch.empty(len(self.at), 0, *self.at.shape[1:], self.subject.width)
        outputs = [self.outputs[path] for path in self.request.output_modules]
        return torch.stack(self.stream, 1), torch.stack(outputs, 1) if outputs else none

    def _pick(self, states: Any) -> Tensor:
        h: Tensor = states[0] if isinstance(states, tuple) else states
        if h.ndim > 2 and len(h) == 1:
            h = h.expand(len(self.at), *h.shape[1:])  # a table of positions, looked up once for all rows
        h = h.reshape(len(self.at), -1, h.shape[-1])  # experts work on [rows × tokens, width]
        rows = torch.arange(len(self.at), device=h.device).view(-1, *[1] * (self.at.ndim - 1))
        return h[rows, self.at.to(h.device)].float().cpu()

    def _add_stream(self, states: Any) -> None:
        self.stream.append(self._pick(states))
        if len(self.stream) == self.last - self.first + 1:
            raise DoneError

    def _on_first_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._add_stream(args[0] if args else kwargs["hidden_states"])

    def _on_block_output(self, module: nn.Module, args: tuple[Any, ...], states: Any) -> None:
        self._add_stream(states)

    def _read_output(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], states: Any) -> None:
            self.outputs[path] = self._pick(states)

        return hook

    def _read_input(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs[path] = self._pick(args)

        return hook

    def _read_routing(self, path: str) -> Callable[..., None]:
        """Return a hook that runs each chosen expert once more, alone and unweighted, on the wanted tokens. It runs the
        module itself, so that live edits count. One token of every prompt costs little beside the pass."""
        running = False

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal running
            if running:  # the hook's own call of the module
                return
            running = True
            chosen, outputs = _run_chosen_alone(module, *(self._wanted_tokens(x) for x in args[:2]))
            shares = self._expert_shares(args[1], len(next(module.parameters())))
            self.routing[path] = ExpertRouting(shares, chosen, outputs)
            running = False

        return hook

    def _wanted_tokens(self, states: Tensor) -> Tensor:
        flat = states.reshape(len(self.at), -1, states.shape[-1])
        return flat[torch.arange(len(self.at), device=flat.device), self.at.to(flat.device)]

    def _expert_shares(self, chosen: Tensor, experts: int) -> Tensor:
        by_row = chosen.reshape(len(self.at), -1, chosen.shape[-1])
        counted = torch.arange(by_row.shape[1], device=by_row.device) <= self.at.to(by_row.device)[:, None]
        routed = torch.nn.functional.one_hot(by_row, experts).sum(2) * counted[..., None]
        return (routed.sum(1) / counted.sum(1, keepdim=True)).float().cpu()


def _run_chosen_alone(experts: nn.Module, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chosen experts and the output of each."""
    one = torch.ones_like(x[:, :1])
    outputs = [experts(x, chosen[:, slot : slot + 1], one) for slot in range(chosen.shape[1])]
    return chosen.cpu(), torch.stack(outputs, 1).float().cpu()
