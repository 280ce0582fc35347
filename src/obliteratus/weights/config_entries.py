"""Entries of configurations, so that transformers 4 reads them as transformers 5 does.

Release 5 renamed and nested entries, and reads the older names too; release 4, and converters and servers built on it,
read only the older ones, and take a default of their own where these are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

Config = dict[str, Any]


def find_text_key(config: Any) -> str:
    """Return the name under which a configuration nests the language model's; '' if it is the language model's."""
    text = config.get_text_config()
    names = (name for name, value in vars(config).items() if value is text)
    return "" if text is config else next(names, "")


def change_config(data: Mapping[str, Any], text: str, changes: Mapping[str, Any]) -> Config:
    """Return a configuration with changed entries, in the language model's own part too if it is nested.

    text: name of the nested part, or '' if the whole is the language model. Both copies of an entry are written, since
    releases differ in which one they read.
    """
    changed = {**data, **changes}
    if text in data:
        changed[text] = {**data[text], **changes}
    return changed


def add_older_names(made: Mapping[str, Any], config: Any) -> Config:
    """Return what `save_pretrained` wrote of a configuration, with the names that release 4 reads beside it."""
    aliases = {old: made[new] for old, new in config.attribute_map.items() if new in made and old not in made}
    nested = {
        key: add_older_names(value, vars(config)[key])
        for key, value in made.items()
        if isinstance(value, dict) and isinstance(vars(config).get(key), PreTrainedConfig)
    }
    return _add_older_rope({**made, **nested}) | aliases


def complete_config(config: Mapping[str, Any]) -> Config:
    """Return a configuration file's entries with those of rotary embeddings that release 4 reads, at every level.

    Release 5 writes files without them when it saves a model. Entries that the file has stay as they are.
    """
    nested = {key: complete_config(value) for key, value in config.items() if isinstance(value, dict)}
    return {**_add_older_rope(config), **config, **nested}


def _add_older_rope(config: Mapping[str, Any]) -> Config:
    """Return a configuration with ``rope_theta``, ``rope_scaling`` and their like beside ``rope_parameters``."""
    rope = config.get("rope_parameters")
    older = dict(config)
    if not isinstance(rope, dict):
        return older
    if not all(isinstance(value, dict) for value in rope.values()):
        return older | _older_rope(rope)
    kinds = {kind: _older_rope(value) for kind, value in rope.items()}
    older |= kinds.get("full_attention", {})  # Gemma 3 and 3n: two kinds of layers
    local = kinds.get("sliding_attention", {}).get("rope_theta")
    return older | ({"rope_local_base_freq": local} if local is not None else {})


# Entries of a rotary embedding that transformers 4 has at the top and not in rope_scaling.
TOP = ("rope_theta", "partial_rotary_factor")
SCALED = ("linear", "dynamic", "yarn", "longrope", "llama3")
"""What ``rope_type`` may be in release 4; without one it is ``default``, which has no scaling."""


def _older_rope(rope: Mapping[str, Any]) -> Config:
    top = {key: rope[key] for key in TOP if rope.get(key) is not None}
    rest = {key: value for key, value in rope.items() if key not in TOP}
    return top | ({"rope_scaling": rest} if rest.get("rope_type") in SCALED else {})
