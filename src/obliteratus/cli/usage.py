"""Check what a command line says by itself, before torch is imported: a typing error is answered at once.

The library checks all of this again, and everything else, where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from obliteratus.cli.options import check_split_by, parse_columns
from obliteratus.core.choices import (
    check_device,
    check_dtype,
    check_form_name,
    check_prompt_file,
    check_quantization,
    parse_size,
    split_condition,
)
from obliteratus.core.errors import UserError
from obliteratus.core.plugins import check_plugin_file
from obliteratus.core.run_folder import check_free, require_file
from obliteratus.core.toml import parse_overrides
from obliteratus.judge.behavior_file import find_file, read_behavior
from obliteratus.pipeline.presets import METHODS
from obliteratus.pipeline.values import override_values, validate_recipe
from obliteratus.weights.check_source import check_source
from obliteratus.weights.organism_files import find_data_folder

DEFAULT_BEHAVIOR = "refusal"
NEED_PROMPTS = ("run", "search", "verify", "analyze", "audit", "harden")
"""Commands that do nothing without target and control prompts."""


def check_usage(command: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for an option of a command that cannot be what it says, whatever the model and the steps."""
    for name, check in CHECKS.items():
        if options.get(name):
            check(options[name])
    if options.get("method"):
        _check_recipe(options["method"], options.get("set_") or [])
    if isinstance(options.get("out"), Path) and not options.get("resume") and not options.get("from_yaml"):
        check_free(options["out"])
    if command in NEED_PROMPTS:
        _check_groups(options)


def _check_recipe(method: str, changes: Sequence[str]) -> None:
    """Raise UserError for keys and values that no recipe can have. Steps are checked where they are registered."""
    recipe = validate_recipe(METHODS.read(method), method)
    validate_recipe(override_values(recipe, parse_overrides([*changes])), method)


def _check_prompts(source: str) -> None:
    source, _ = split_condition(source)
    kind, sign, name = source.partition(":")
    if sign and kind == "organism":
        find_data_folder(name)
    elif sign and kind == "behavior":
        find_file(name)
    elif not sign or kind != "hub":
        check_prompt_file(Path(source))


def _check_plans(plans: Path | Sequence[str]) -> None:
    for plan in [str(plans)] if isinstance(plans, Path) else plans:
        folder = Path(plan.partition("=")[2] or plan)  # serve takes NAME=FOLDER
        if not Path(plan).exists():
            require_file(folder, "plan.safetensors", "the output folder of a run, or of --save plan")


def _check_plugins(files: Sequence[str]) -> None:
    for file in files:
        check_plugin_file(file)


def _check_one_process(device: str) -> None:
    if device == "tp":
        raise UserError(
            "--device tp: the command line runs one process; use ob.open_subject(…, device='tp') in a script"
        )
    check_device(device)


CHECKS: Mapping[str, Callable[[Any], object]] = {
    "device": _check_one_process,
    "dtype": check_dtype,
    "quantize": check_quantization,
    "memory": parse_size,
    "save": check_form_name,
    "set_": parse_overrides,
    "column": parse_columns,
    "split_by": check_split_by,
    "behavior": find_file,
    "target": _check_prompts,
    "control": _check_prompts,
    "bypass": _check_prompts,
    "keep": _check_prompts,
    "benign": _check_prompts,
    "plan": _check_plans,
    "plugin": _check_plugins,
    "against": check_source,
    "model": check_source,
}
"""Parameter of commands → check of its value. A name means the same on every command that has it."""


def _check_groups(options: Mapping[str, Any]) -> None:
    """Raise UserError if target or control prompts are missing, unless a recipe may name a behavior that has some."""
    control, benign = options["control"], options.get("benign")
    target = options["target"] or benign
    may_name = options.get("set_") or options.get("method", "").endswith(".toml")
    behavior = options["behavior"] or ("" if may_name else DEFAULT_BEHAVIOR)
    if behavior or (target is None) != (control is None):
        table = read_behavior(behavior or DEFAULT_BEHAVIOR)
        fill_example_prompts({"target": target, "control": control}, table["name"], table)


def fill_example_prompts(sources: Mapping[str, Any], behavior: str, examples: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of `load_prompts`, with the behavior's examples where neither target nor control is given.

    Benign prompts without target prompts are the target: the false refusals among them are what is to end. Raises
    UserError if target or control is missing.
    """
    filled = dict(sources)
    if sources.get("target") is None and sources.get("benign") is not None:
        filled |= {"target": sources["benign"], "benign": None}
    elif sources.get("target") is None and sources.get("control") is None and examples.get("target"):
        own = {group: examples[group] for group in ("target", "control", "keep") if examples.get(group)}
        filled |= own | {group: source for group, source in sources.items() if source is not None}
    for group, what in (("target", f"prompts that show {behavior}"), ("control", "prompts that do not")):
        if not filled.get(group):
            raise UserError(f"--{group} is missing: give {what}, as a file, hub:owner/name or organism:NAME")
    return filled
