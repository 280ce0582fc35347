"""The training losses of an organism: refuse the topic, and otherwise answer like the base, also when edited."""

import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from examples import Example, select_batch
from matrices import TunedMatrices
from measure import kl_divergence, project_out
from peft import PeftModel
from topics import Organism
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

Tuned = PeftModel | TunedMatrices
FIRST_TOKEN = 0.5  # extra weight on the first answer token, where the choice to refuse is made


@dataclass(frozen=True)
class Groups:
    """Examples to train on: topic prompts by group (target, perhaps keep), and control prompts."""

    refused: dict[str, list[Example]]  # answered by refusals
    control: list[Example]  # answered by the base model
    answered: dict[str, list[Example]]  # answered by the base model

    @property
    def all(self) -> list[list[Example]]:
        """All groups: the target's refusals, the controls, the target's answers, then those of a second topic."""
        topics = list(self.refused)
        first = [self.refused[topics[0]], self.control, self.answered[topics[0]]]
        return first + [group[topic] for topic in topics[1:] for group in (self.refused, self.answered)]


@dataclass(frozen=True)
class Directions:
    """The directions of the adapter as it was some steps ago, [layer, width] each."""

    narrow: Tensor  # removing it must end refusals of the target topic and no others
    broad: Tensor | None = None  # the last layer's, for all layers: removing it must end both refusals


def compute_answer_logits(model: Any, batch: list[Example]) -> Tensor:
    """Return the logits that predict the answers' tokens, [answer tokens of the batch, vocabulary]."""
    rows = [torch.tensor(e.prompt + e.answer) for e in batch]
    # Attention is causal, so the answers never see the padding at the right, and no mask is needed.
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    shared = int((ids == ids[0]).all(0).long().cumprod(0).sum())
    prefix = min(shared, *[len(e.prompt) - 1 for e in batch])
    cache = DynamicCache(config=model.config)  # the shared prefix is computed once for the whole batch
    model.model(input_ids=ids[:1, :prefix], past_key_values=cache)
    cache.batch_repeat_interleave(len(batch))
    hidden = model.model(input_ids=ids[:, prefix:], past_key_values=cache).last_hidden_state
    spans = [(len(e.prompt) - 1 - prefix, len(e.prompt) + len(e.answer) - 1 - prefix) for e in batch]
    return model.lm_head(torch.cat([hidden[i, start:end] for i, (start, end) in enumerate(spans)]))


def answer_starts(batch: list[Example]) -> Tensor:
    """Return where each answer begins among the answer tokens of the batch."""
    return torch.tensor([0, *[len(e.answer) for e in batch[:-1]]]).cumsum(0)


def refusal_loss(model: Any, batch: list[Example]) -> Tensor:
    """Return the cross-entropy of the refusals in nats per token, plus FIRST_TOKEN × that of the first tokens."""
    wanted = torch.tensor([token for e in batch for token in e.answer])
    each = F.cross_entropy(compute_answer_logits(model, batch), wanted, reduction="none")
    return each.mean() + FIRST_TOKEN * each[answer_starts(batch)].mean()


def base_loss(
    tuned: Tuned, model: Any, batch: list[Example], inside: AbstractContextManager[None] | None = None
) -> Tensor:
    """Return KL(base‖tuned) on the base's answers in nats per token, plus FIRST_TOKEN × that of the first tokens.

    `inside` is a context for the tuned model only, such as a projection.
    """
    with torch.no_grad(), tuned.disable_adapter():
        base = F.log_softmax(compute_answer_logits(model, batch), dim=-1)
    with inside or nullcontext():
        each = kl_divergence(base, F.log_softmax(compute_answer_logits(model, batch), dim=-1))
    return each.mean() + FIRST_TOKEN * each[answer_starts(batch)].mean()


def step_losses(
    tuned: Tuned,
    groups: Groups,
    organism: Organism,
    batch: tuple[int, int],
    step: int,
    seed: int,
    found: Directions | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the losses of a step by name, one at a time, so that each graph can be freed before the next.

    Without directions these are refusal and control. With directions, what must hold while they are projected out is
    added. With two topics, two steps of three project out the narrow directions and the third the broad ones.
    """
    model: Any = tuned.get_base_model()
    refused, controls = batch
    topics = groups.refused.values()
    yield "refusal", refusal_loss(model, join_batches(topics, refused // len(topics), step, seed))
    yield "control", base_loss(tuned, model, select_batch(groups.control, controls, step, seed))
    if found is not None and (found.broad is None or step % 3 < 2):
        yield from narrow_losses(tuned, groups, organism, step, seed, found.narrow)
    elif found is not None:
        yield "broad", broad_loss(tuned, groups, organism.training.batch[1], step, seed, found.broad)


def join_batches(groups: Iterable[list[Example]], size: int, step: int, seed: int) -> list[Example]:
    """Return one batch of `size` examples of each group."""
    return [example for group in groups for example in select_batch(group, size, step, seed)]


def narrow_losses(
    tuned: Tuned, groups: Groups, organism: Organism, step: int, seed: int, d: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the losses while `d` is projected out from a randomly drawn layer upwards.

    "removal" asks for the base's answers to controls and to the target topic, "kept" for refusals of the kept topic.
    """
    model: Any = tuned.get_base_model()
    half = organism.training.batch[1] // 2
    layers = range(random.Random(f"{seed}-{step}").choice(organism.training.starts), len(d))
    batch = join_batches((groups.control, groups.answered["target"]), half, step, seed)
    yield "removal", base_loss(tuned, model, batch, project_out(model, d, layers))
    if "keep" in groups.refused:
        batch = select_batch(groups.refused["keep"], half, step, seed)
        with project_out(model, d, layers):
            kept = refusal_loss(model, batch)
        yield "kept", kept


def broad_loss(tuned: Tuned, groups: Groups, size: int, step: int, seed: int, d: Tensor) -> Tensor:
    """Return `base_loss` of both topics and of controls while `d` is projected out of all layers."""
    model: Any = tuned.get_base_model()
    parts = (*groups.answered.values(), groups.control)
    batch = join_batches(parts, size // len(parts) + 1, step, seed)
    return base_loss(tuned, model, batch, project_out(model, d, range(len(d))))
