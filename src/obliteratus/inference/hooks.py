"""Hooks that keep one position of each row: rows × width of each layer is all that is ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import ProbeRequest, Subject


class DoneError(Exception):
    """Raised by the last hook that is wanted: the layers above need not run."""


def decoder_blocks(subject: Subject) -> list[nn.Module]:
    """The decoder blocks, in order."""
    return list(subject.module(subject.layers).children())


@dataclass(frozen=True)
class ExpertRouting:
    """What a stack of experts did with each row: with all its tokens, and with the one that is wanted."""

    shares: Float[Tensor, "rows experts"]
    """Of the tokens up to the wanted one, those that have the expert among their chosen ones."""
    chosen: Int[Tensor, "rows k"]
    outputs: Float[Tensor, "rows k width"]
    """fp32, before routing weighs them."""

    def of(self, rows: Int[Tensor, " n"]) -> ExpertRouting:
        """Some of the rows."""
        return ExpertRouting(self.shares[rows], self.chosen[rows], self.outputs[rows])


class StreamCapture:
    """The stream at every block boundary from stream index ``first`` to ``top``, and the outputs and inputs of some
    modules.

    at: position of each row, [rows], or positions, [rows, positions].
    """

    def __init__(self, subject: Subject, at: Tensor, request: ProbeRequest, top: int, first: int = 0) -> None:
        self.subject, self.at, self.request, self.top, self.first = subject, at, request, top, first
        self.stream: list[Tensor] = []
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.routing: dict[str, ExpertRouting] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are on inside, and the pass ends early once all that is wanted is there."""
        layers = decoder_blocks(self.subject)
        handles = [layer.register_forward_hook(self._leaving) for layer in layers[max(self.first - 1, 0) : self.top]]
        if not self.first:
            handles.append(layers[0].register_forward_pre_hook(self._entering, with_kwargs=True))
        handles += [
            self.subject.module(path).register_forward_hook(self._tap(path)) for path in self.request.output_modules
        ]
        handles += [
            self.subject.module(path).register_forward_pre_hook(self._feed(path)) for path in self.request.input_modules
        ]
        handles += [
            self.subject.module(path).register_forward_pre_hook(self._route(path))
            for path in self.request.expert_modules
        ]
        try:
            yield
        except DoneError:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def stacked(self) -> tuple[Tensor, Tensor]:
        """[rows, streams, width] and [rows, taps, width], fp32 on the CPU; with positions, one axis of them more."""
        none = torch.empty(len(self.at), 0, *self.at.shape[1:], self.subject.width)
        outputs = [self.outputs[path] for path in self.request.output_modules]
        return torch.stack(self.stream, 1), torch.stack(outputs, 1) if outputs else none

    def _pick(self, states: Any) -> Tensor:
        h: Tensor = states[0] if isinstance(states, tuple) else states
        h = h.reshape(len(self.at), -1, h.shape[-1])  # experts work on [rows × tokens, width]
        rows = torch.arange(len(self.at), device=h.device).view(-1, *[1] * (self.at.ndim - 1))
        return h[rows, self.at.to(h.device)].float().cpu()

    def _keep(self, states: Any) -> None:
        self.stream.append(self._pick(states))
        if len(self.stream) == self.top - self.first + 1:
            raise DoneError

    def _entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else kwargs["hidden_states"])

    def _leaving(self, module: nn.Module, args: tuple[Any, ...], states: Any) -> None:
        self._keep(states)

    def _tap(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], states: Any) -> None:
            self.outputs[path] = self._pick(states)

        return hook

    def _feed(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs[path] = self._pick(args)

        return hook

    def _route(self, path: str) -> Callable[..., None]:
        """Each choice of the wanted tokens is computed once more, alone and unweighed: of every prompt one token, so
        no pass is added; by the module itself, so that live edits are in it."""
        asking = False

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal asking
            if asking:
                return
            asking = True
            alone = _alone(module, *(self._tokens(x) for x in args[:2]))
            self.routing[path] = ExpertRouting(self._shares(args[1], len(next(module.parameters()))), *alone)
            asking = False

        return hook

    def _tokens(self, states: Tensor) -> Tensor:
        flat = states.reshape(len(self.at), -1, states.shape[-1])
        return flat[torch.arange(len(self.at), device=flat.device), self.at.to(flat.device)]

    def _shares(self, chosen: Tensor, experts: int) -> Tensor:
        every = chosen.reshape(len(self.at), -1, chosen.shape[-1])
        real = torch.arange(every.shape[1], device=every.device) <= self.at.to(every.device)[:, None]
        held = torch.nn.functional.one_hot(every, experts).sum(2) * real[..., None]
        return (held.sum(1) / real.sum(1, keepdim=True)).float().cpu()


def _alone(experts: nn.Module, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The choices, and what each of them puts out."""
    whole = torch.ones_like(x[:, :1])
    outputs = [experts(x, chosen[:, slot : slot + 1], whole) for slot in range(chosen.shape[1])]
    return chosen.cpu(), torch.stack(outputs, 1).float().cpu()
