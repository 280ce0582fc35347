"""A model under a live plan, as Inspect asks it: ``inspect eval task.py --model obliteratus/organism -M plan=PLAN``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import anyio.to_thread
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatMessage,
    Content,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from obliteratus.core.chat import ChatFormat, Turn
from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.types import Plan, Subject
from obliteratus.inference.chat_template import context_length, tokenize_prompts
from obliteratus.inference.stream import AnswerLimits
from obliteratus.judge.reasoning import cut_reasoning
from obliteratus.serve.answer_batches import AnswerBatches, Written
from obliteratus.serve.dial import Dial, check_strength, to_prompt
from obliteratus.serve.open import open_for_chat

OPENING = ("dtype", "device", "quantize", "trust_remote_code")
"""Arguments (``-M NAME=VALUE``) that mean what the command line's options of these names mean."""
ARGUMENTS = (*OPENING, "thinking", "template", "plan", "strength")
ANSWER = 512  # tokens of an answer for which the task states no number
# What a request may set that answers here do not follow.
UNSUPPORTED = ("top_k", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "response_schema")


class ObliteratusModel(ModelAPI):
    """A model of ours for Inspect. Answers are greedy and batched, or drawn one by one if a temperature is set.

    plan: folder of a plan. strength: of the plan, −1 to 2; 0 is the unedited model. Raises Inspect's PrerequisiteError
    for arguments that there are not, and for a plan that does not fit.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  # Inspect's own default
        **arguments: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        try:
            subject, plan = open_with_plan(model_name, arguments)
        except UserError as error:
            raise PrerequisiteError(str(error)) from error  # Inspect shows it in one line
        self.batches, self.dial = AnswerBatches(subject, plan), Dial(subject, plan)

    def close(self) -> None:
        self.batches.close()

    def max_connections(self) -> int:
        """Samples that are asked at once, and so are answered in one batch."""
        return 32

    def max_tokens(self) -> int:
        return ANSWER

    def collapse_user_messages(self) -> bool:
        return True

    def collapse_assistant_messages(self) -> bool:
        return True

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Return the answer to the last turn. Raises UserError for what is asked and not supported."""
        check_request(tools, config)
        turns, start = to_turns(input), time.monotonic()
        ids = tokenize_prompts(self.dial.subject, [to_prompt(turns)])[0]
        tokens = min(config.max_tokens or ANSWER, context_length(self.dial.subject) - len(ids))
        if tokens < 1:
            return ModelOutput.from_content(self.model_name, "", "model_length")
        if config.temperature:
            written = await anyio.to_thread.run_sync(self._draw, turns, tokens, config)
        else:
            answer = self.batches.ask(ids, tokens, config.stop_seqs or ())
            written = await anyio.to_thread.run_sync(answer.result)
        return self._to_output(written, len(ids), time.monotonic() - start)

    def _draw(self, turns: Sequence[Turn], tokens: int, config: GenerateConfig) -> Written:
        """Return an answer that is drawn at random, for which no other is waited for."""
        limits = AnswerLimits(
            tokens, config.temperature or 0.0, 1.0 if config.top_p is None else config.top_p, config.seed or 0
        )
        stops = [stop for stop in config.stop_seqs or () if stop]
        with self.batches.lock:
            answer = self.dial.stream(turns, 1.0, limits)
            for _ in answer:
                if any(stop in answer.text for stop in stops):
                    answer.close()
        places = [answer.text.index(stop) for stop in stops if stop in answer.text]
        text = answer.text[: min(places)] if places else answer.text
        written = len(self.dial.subject.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
        return Written(text, written, answer.ended in ("", "end"))

    def _to_output(self, written: Written, asked: int, seconds: float) -> ModelOutput:
        reason: StopReason = "stop" if written.ended else "max_tokens"
        output = ModelOutput.from_content(self.model_name, split_reasoning(written.text), reason)
        usage = ModelUsage(input_tokens=asked, output_tokens=written.tokens, total_tokens=asked + written.tokens)
        return output.model_copy(update={"usage": usage, "time": seconds})


def open_with_plan(name: str, arguments: Mapping[str, Any]) -> tuple[Subject, Plan]:
    """Return the model, and the plan at its strength. name: ``organism`` stands for ``organism:astronomy``."""
    for argument in arguments:
        if argument not in ARGUMENTS:
            raise UserError(unknown_name("-M argument", argument, ARGUMENTS))
    opening = {key: arguments[key] for key in OPENING if key in arguments}
    opening["chat"] = ChatFormat(bool(arguments.get("thinking", False)), str(arguments.get("template", "")))
    folders = [str(arguments["plan"])] if arguments.get("plan") else []
    strength = check_strength(float(arguments.get("strength", 1.0)))
    subject, plans = open_for_chat("organism:astronomy" if name == "organism" else name, folders, opening)
    if strength != 1 and not plans:
        raise UserError(f"-M strength={strength:g}: there is no plan whose strength could be set; give -M plan=FOLDER")
    plan = next(iter(plans.values()), Plan())
    return subject, plan.scaled(strength) if strength else Plan()


def check_request(tools: Sequence[ToolInfo], config: GenerateConfig) -> None:
    """Raise UserError for what a task asks and answers here do not follow."""
    if tools:
        raise UserError(
            f"the task offers tools ({tools[0].name}), which obliteratus/ models do not call; run it without"
        )
    values = config.model_dump(exclude_none=True)
    if asked := [name for name in UNSUPPORTED if values.get(name)]:
        raise UserError(f"{asked[0]}: obliteratus/ models do not follow it; leave it out")
    if values.get("num_choices", 1) != 1:
        raise UserError("num_choices: obliteratus/ models give one answer; leave it out, or use epochs")


def to_turns(messages: Sequence[ChatMessage]) -> list[Turn]:
    """Return the messages as turns, system messages joined at the beginning. Raises UserError for what is no text."""
    for message in messages:
        if message.role not in ("system", "user", "assistant"):
            raise UserError(f"a message of the role {message.role}: obliteratus/ models take text turns alone")
        if not isinstance(message.content, str) and any(
            part.type not in ("text", "reasoning") for part in message.content
        ):
            raise UserError(
                "a message has images or files, and obliteratus/ models read text alone; leave the task out"
            )
    system = "\n\n".join(message.text for message in messages if message.role == "system")
    said = [Turn("user" if m.role == "user" else "assistant", m.text) for m in messages if m.role != "system"]
    if not said or said[-1].role != "user":
        raise UserError("the last message is not the user's; obliteratus/ models answer questions")
    return [*([Turn("system", system)] if system else []), *said]


def split_reasoning(text: str) -> str | list[Content]:
    """Return an answer as Inspect keeps it: text alone, or reasoning and the text that follows it."""
    answer = cut_reasoning(text)
    if answer == text.strip():
        return text
    reasoning = text.removesuffix(answer) if answer else text
    return [ContentReasoning(reasoning=reasoning), ContentText(text=answer)]
