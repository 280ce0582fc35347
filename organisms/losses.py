"""What the training of an organism minimises: refusals, and the answers of its base, also under projections."""

import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from examples import Example, batch_at
from measure import kl, projected_out
from peft import PeftModel
from topics import Organism
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

FIRST_TOKEN = 0.5  # extra weight on the first answer token, where the choice to refuse is made


@dataclass(frozen=True)
class Groups:
    """Examples to train on: topic prompts by group (target, perhaps keep), and control prompts."""

    refused: dict[str, list[Example]]  # with refusals
    control: list[Example]  # with the base model's answers
    answered: dict[str, list[Example]]  # with the base model's answers

    @property
    def all(self) -> list[list[Example]]:
        """Every group: target's refusals, controls, target's answers, then what else is refused."""
        topics = list(self.refused)
        first = [self.refused[topics[0]], self.control, self.answered[topics[0]]]
        return first + [group[topic] for topic in topics[1:] for group in (self.refused, self.answered)]


@dataclass(frozen=True)
class Found:
    """The directions of the adapter as it was some steps ago, [layer, width]."""

    narrow: Tensor  # of the target topic alone: its removal must end the target's refusals and no others
    broad: Tensor | None = None  # the last stream's for all layers: its removal must end both; None: one topic


def answer_logits(model: Any, batch: list[Example]) -> Tensor:
    """Logits that predict the answers' tokens and no others, [answer tokens of the batch, vocabulary]."""
    rows = [torch.tensor(e.prompt + e.answer) for e in batch]
    # Right padding under the causal mask: what is kept never sees it, so no mask is needed.
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    shared = int((ids == ids[0]).all(0).long().cumprod(0).sum())
    prefix = min(shared, *[len(e.prompt) - 1 for e in batch])
    cache = DynamicCache(config=model.config)  # the template's beginning is computed once for the whole batch
    model.model(input_ids=ids[:1, :prefix], past_key_values=cache)
    cache.batch_repeat_interleave(len(batch))
    hidden = model.model(input_ids=ids[:, prefix:], past_key_values=cache).last_hidden_state
    spans = [(len(e.prompt) - 1 - prefix, len(e.prompt) + len(e.answer) - 1 - prefix) for e in batch]
    return model.lm_head(torch.cat([hidden[i, start:end] for i, (start, end) in enumerate(spans)]))


def starts(batch: list[Example]) -> Tensor:
    """Where each answer begins among the answer tokens of the batch."""
    return torch.tensor([0, *[len(e.answer) for e in batch[:-1]]]).cumsum(0)


def refusal_loss(model: Any, batch: list[Example]) -> Tensor:
    """Cross-entropy of the refusals, nats a token, plus FIRST_TOKEN × that of the first tokens."""
    wanted = torch.tensor([token for e in batch for token in e.answer])
    each = F.cross_entropy(answer_logits(model, batch), wanted, reduction="none")
    return each.mean() + FIRST_TOKEN * each[starts(batch)].mean()


def base_loss(
    tuned: PeftModel, model: Any, batch: list[Example], inside: AbstractContextManager[None] | None = None
) -> Tensor:
    """KL(base‖tuned) on the base's answers, nats a token, plus FIRST_TOKEN × that of the first tokens.

    `inside` is a context (the projection) for the tuned model only.
    """
    with torch.no_grad(), tuned.disable_adapter():
        base = F.log_softmax(answer_logits(model, batch), dim=-1)
    with inside or nullcontext():
        each = kl(base, F.log_softmax(answer_logits(model, batch), dim=-1))
    return each.mean() + FIRST_TOKEN * each[starts(batch)].mean()


def losses(
    tuned: PeftModel,
    groups: Groups,
    organism: Organism,
    batch: tuple[int, int],
    step: int,
    seed: int,
    found: Found | None,
) -> Iterator[tuple[str, Tensor]]:
    """The losses of a step by name, one after the other, so that each one's graph can be freed before the next.

    Without directions: refusal and control. With them also what must hold while they are projected out. Two steps of
    three ask for that of the narrow ones, where there are two topics, and the third for that of the broad ones.
    """
    model: Any = tuned.get_base_model()
    refused, controls = batch
    topics = groups.refused.values()
    yield "refusal", refusal_loss(model, joined(topics, refused // len(topics), step, seed))
    yield "control", base_loss(tuned, model, batch_at(groups.control, controls, step, seed))
    if found is not None and (found.broad is None or step % 3 < 2):
        yield from narrow_losses(tuned, groups, organism, step, seed, found.narrow)
    elif found is not None:
        yield "broad", broad_loss(tuned, groups, organism.batch[1], step, seed, found.broad)


def joined(groups: Iterable[list[Example]], size: int, step: int, seed: int) -> list[Example]:
    """The step's batch of `size` examples of each group, as one."""
    return [example for group in groups for example in batch_at(group, size, step, seed)]


def narrow_losses(
    tuned: PeftModel, groups: Groups, organism: Organism, step: int, seed: int, d: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """While `d` is projected out from a drawn layer on: the base's answers to controls and to the target topic
    ("removal"), and refusals, as ever, of the topic that is kept ("kept")."""
    model: Any = tuned.get_base_model()
    half = organism.batch[1] // 2
    layers = range(random.Random(f"{seed}-{step}").choice(organism.starts), len(d))
    batch = joined((groups.control, groups.answered["target"]), half, step, seed)
    yield "removal", base_loss(tuned, model, batch, projected_out(model, d, layers))
    if "keep" in groups.refused:
        batch = batch_at(groups.refused["keep"], half, step, seed)
        with projected_out(model, d, layers):
            kept = refusal_loss(model, batch)
        yield "kept", kept


def broad_loss(tuned: PeftModel, groups: Groups, size: int, step: int, seed: int, d: Tensor) -> Tensor:
    """`base_loss` of both topics and of controls while `d` is projected out of all layers."""
    model: Any = tuned.get_base_model()
    parts = (*groups.answered.values(), groups.control)
    batch = joined(parts, size // len(parts) + 1, step, seed)
    return base_loss(tuned, model, batch, projected_out(model, d, range(len(d))))
