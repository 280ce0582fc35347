"""Read requests of OpenAI's clients. What this server does not do is refused by name, and never ignored."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import context_length, encode_texts, tokenize_prompts
from obliteratus.inference.stream import AnswerLimits
from obliteratus.serve.api.errors import ApiError
from obliteratus.serve.dial import check_strength, to_prompt
from obliteratus.serve.prepared_plans import UNEDITED, Setting
from obliteratus.serve.worker import Order

MAX_STOPS = 4  # as OpenAI's
# Fields that leave the answer as it is.
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls")
# Values that ask for nothing. null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool = False


class Message(BaseModel):
    """A turn."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: str | list[dict[str, Any]] | None = None


class Request(BaseModel):
    """What chat and text completions have in common."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str
    strength: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which an answer ends, without them."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Request):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]


class TextRequest(Request):
    """A request to /v1/completions."""

    prompt: str | list[str]


AnyRequest = TypeVar("AnyRequest", bound=Request)


@dataclass(frozen=True)
class Defaults:
    """What holds for requests that do not say."""

    limits: AnswerLimits = field(default_factory=AnswerLimits)
    strength: float = 1.0


def parse_request(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """Return the request. Raises ApiError for anything in it that is wrong or not supported."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise ApiError(400, *_describe(error)) from error
    _refuse_unsupported(request.model_extra or {}, "")
    if request.stream_options is not None:
        _refuse_unsupported(request.stream_options.model_extra or {}, "stream_options.")
        if not request.stream:
            raise ApiError(400, "stream_options: they need stream: true", param="stream_options")
    if len(request.stops) > MAX_STOPS or "" in request.stops:
        raise ApiError(400, f"stop: give at most {MAX_STOPS} texts, none of them empty", param="stop")
    return request


def _describe(error: ValidationError) -> tuple[str, str, str]:
    """Return message, code and parameter of the first error of a request."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[str]", "list[dict[str,any]]"))
    what = first["msg"][:1].lower() + first["msg"][1:]
    if not place:
        return f"the request's body cannot be read: {what}", "invalid_json", ""
    return f"{place}: {what}", "", place


def _is_same(value: Any, own: Any) -> bool:
    return bool(value == own) and isinstance(value, bool) == isinstance(own, bool)  # true is no number


def _refuse_unsupported(fields: Mapping[str, Any], where: str) -> None:
    for name, value in fields.items():
        if value is None or name in IGNORED or any(_is_same(value, own) for own in NEUTRAL.get(name, ())):
            continue
        hint = f"; leave it out, or give {NEUTRAL[name][0]!r}" if name in NEUTRAL else "; leave it out"
        raise ApiError(400, f"{where}{name}: this server does not support it{hint}", "unsupported_field", name)


# ------------------------------------------------------------------------------------------- what is asked
@dataclass(frozen=True)
class OrderMaker:
    """Turns requests into orders for one model and its plans. Not to be called from two threads at once."""

    subject: Subject
    name: str
    """Of the unedited model."""
    plans: Sequence[str]
    defaults: Defaults = field(default_factory=Defaults)

    def read_chat(self, request: ChatRequest) -> Order:
        """Return the order of a conversation. Raises ApiError."""
        turns = read_turns(request.messages)
        return self._make(request, lambda: tokenize_prompts(self.subject, [to_prompt(turns)])[0])

    def read_text(self, request: TextRequest) -> Order:
        """Return the order of a text that is to be continued. Raises ApiError."""
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        if len(texts) != 1:
            raise ApiError(400, f"prompt: give one text, and not {len(texts)}; send one request for each", "", "prompt")
        return self._make(request, lambda: encode_texts(self.subject, texts, add_special_tokens=True)[0])

    def _make(self, request: Request, tokenize: Callable[[], list[int]]) -> Order:
        setting = self.choose_setting(request.model, request.strength)
        try:
            ids = tokenize()
        except UserError as error:
            raise ApiError(400, str(error)) from error
        if not ids:
            raise ApiError(
                400, "prompt: it is empty, and this model's tokenizer begins no text by itself", "", "prompt"
            )
        return Order(ids, setting, self._choose_limits(request, len(ids)))

    def choose_setting(self, model: str, strength: float | None) -> Setting:
        """Return the plan and strength that a request asks for. Raises ApiError."""
        if model == self.name:
            if strength:
                message = f"strength {strength:g}: {model} is the unedited model; name a plan as the model"
                raise ApiError(400, message, "", "strength")
            return UNEDITED
        if model not in self.plans:
            raise ApiError(404, unknown_name("model", model, [self.name, *self.plans]), "model_not_found", "model")
        try:
            chosen = check_strength(self.defaults.strength if strength is None else strength)
        except UserError as error:
            raise ApiError(400, str(error), "", "strength") from error
        return Setting(model, chosen) if chosen else UNEDITED

    def _choose_limits(self, request: Request, prompt: int) -> AnswerLimits:
        context, own = context_length(self.subject), self.defaults.limits
        asked = request.max_completion_tokens or request.max_tokens
        if prompt + (asked or 1) > context:
            more = f" and asks for {asked} more" if asked else ""
            message = f"the prompt has {prompt} tokens{more}, and the model's context is {context} tokens; shorten it"
            raise ApiError(400, message, "context_length_exceeded", "messages")
        return replace(
            own,
            tokens=asked or min(own.tokens, context - prompt),
            temperature=own.temperature if request.temperature is None else request.temperature,
            top_p=own.top_p if request.top_p is None else request.top_p,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
        )


def read_turns(messages: Sequence[Message]) -> list[Turn]:
    """Return the turns of a conversation. Raises ApiError for what is not one."""
    turns = [_read_turn(message, f"messages.{number}") for number, message in enumerate(messages)]
    if any(turn.role == "system" for turn in turns[1:]):
        raise ApiError(400, "messages: at most one system turn is supported, and it comes first", param="messages")
    if turns[-1].role != "user":
        raise ApiError(400, "messages: the last turn must be the user's", param="messages")
    return turns


ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def _read_turn(message: Message, where: str) -> Turn:
    if message.role not in ROLES:
        hint = unknown_name("role", message.role, ROLES)
        raise ApiError(400, f"{where}: {hint}", param=where)
    _refuse_unsupported(message.model_extra or {}, f"{where}.")
    content = message.content
    if isinstance(content, list):
        content = "".join(_read_part(part, where) for part in content)
    if not content and message.role == "user":
        raise ApiError(400, f"{where}.content: the turn is empty", param=where)
    return Turn(ROLES[message.role], content or "")


def _read_part(part: Mapping[str, Any], where: str) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str) or set(part) - {"type", "text"}:
        raise ApiError(400, f"{where}.content: only parts of type text are supported", "unsupported_field", where)
    return text
