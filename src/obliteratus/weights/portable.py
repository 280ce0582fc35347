"""Write files of model folders so that transformers 4 reads them as transformers 5 does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obliteratus.weights.config_entries import Config
from obliteratus.weights.rewrite import write_atomically


def make_tokenizer_portable(folder: Path) -> None:
    """Rewrite what `save_pretrained` of release 5 wrote: a class and a list that release 4 does not know."""
    path = folder / "tokenizer_config.json"
    config: Config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.pop("is_local", None)
    write_json(path, config)


def read_json(path: Path) -> Config:
    """Return the object in a JSON file."""
    data: Config = json.loads(path.read_text(encoding="utf-8"))
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file as model folders have them."""
    with write_atomically(path) as out:
        out.write(f"{json.dumps(data, indent=2, ensure_ascii=False)}\n".encode())
