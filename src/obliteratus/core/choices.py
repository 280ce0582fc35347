"""What users may ask for by name or as a number with a unit, and the errors for anything else. Nothing needs torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

from obliteratus.core.errors import UserError, unknown_name

DTYPES: Mapping[str, str] = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
"""Name of a dtype → what torch calls it."""
QUANTIZATIONS = ("4bit", "fp4", "8bit")
DEVICES = ("cuda", "mps", "cpu")
"""Kinds of devices, the one that ``auto`` prefers first."""
Form = Literal["merged", "adapter", "plan", "gguf", "lora-gguf", "control-vector"]
GGUF_FORMS = ("gguf", "lora-gguf", "control-vector")
FORMS = ("merged", "adapter", "plan", *GGUF_FORMS)
"""Forms in which an edited model is saved."""
PROMPT_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def check_dtype(name: str) -> None:
    """Raise UserError for what is neither ``auto`` nor a name in `DTYPES`."""
    if name != "auto" and name not in DTYPES:
        raise UserError(unknown_name("dtype", name, ["auto", *DTYPES]))


def check_quantization(name: str) -> None:
    """Raise UserError for a name that is not in `QUANTIZATIONS`."""
    if name not in QUANTIZATIONS:
        raise UserError(unknown_name("--quantize", name, QUANTIZATIONS))


def check_device(name: str, others: Collection[str] = ("auto", "map", "tp")) -> None:
    """Raise UserError for what names no device. others: further words, of which some place a model on several."""
    if name not in others and name.partition(":")[0] not in DEVICES:
        raise UserError(f"device '{name}' does not exist; known: auto, map, tp, {', '.join(DEVICES)}")


def check_form_name(name: str) -> None:
    """Raise UserError for a name that is not in `FORMS`."""
    if name not in FORMS:
        raise UserError(unknown_name("--save form", name, FORMS))


def split_condition(source: str) -> tuple[str, str]:
    """Return a source of prompts and the condition behind it, such as ``label=safe`` in ``xstest.csv?label=safe``.

    A file whose own name holds the sign is taken whole, without a condition.
    """
    plain, _, condition = source.partition("?")
    return (source, "") if Path(source).exists() else (plain, condition)


def check_prompt_file(path: Path) -> None:
    """Raise UserError for a file of prompts that is not there."""
    if not path.exists() or path.is_dir():
        raise UserError(
            f"{path}: this prompt file does not exist; give a {', '.join(PROMPT_SUFFIXES)} file, "
            "hub:owner/name or organism:NAME"
        )


def parse_size(text: str) -> float:
    """Return the bytes of a size such as ``6GB`` or ``1.5GiB``. Raises UserError for anything else."""
    try:
        return float(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise UserError(f"--memory {text}: give a size such as 6GB or 900MB") from error
