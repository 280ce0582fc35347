"""Study files: presets by name and TOML files by path, with values replaced by path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error
from obliteratus.pipeline.recipe import PresetFolder, override_values
from obliteratus.study.settings import Study

PRESETS = PresetFolder("studies", "study", "preset", "obliteratus study --help")
PROMPTED = frozenset({"refusal", "first_token_kl"})  # metrics that answer prompts
ORGANISM = "organism:"


def list_studies() -> list[str]:
    """All shipped studies."""
    return PRESETS.list_names()


def load_study(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """A shipped study by name, or a TOML file by path, with values replaced by path (``data.samples``).

    Raises UserError for a study, key or value that cannot be; whether its strategies and metrics exist is told by
    ``study.run.check_study``.
    """
    where = str(source)
    if Path(where).suffix in (".yaml", ".yml"):
        raise UserError(f"{where}: studies are TOML; obliteratus study-from-yaml {where} --out study.toml makes it one")
    made = parse_study(PRESETS.read(where), where)
    return parse_study(override_values(made, overrides), where) if overrides else made


def parse_study(data: Mapping[str, Any], where: str) -> Study:
    """A validated study from plain data. UserError in one line: where, what, what was given."""
    try:
        return Study(**data)
    except ValidationError as error:
        raise UserError(f"study '{where}': {explain_validation_error(error)}") from error


def with_own_prompts(made: Study) -> Study:
    """The same study; of an organism with its own prompts where metrics need some and the study names none."""
    name = made.model.removeprefix(ORGANISM).partition("@")[0]  # astronomy@0.5 is half of astronomy's adapter
    named = made.data.target or made.data.control
    if not made.model.startswith(ORGANISM) or name == "base" or named or not PROMPTED & {m.use for m in made.metrics}:
        return made
    own = made.data.model_copy(update={"target": f"{ORGANISM}{name}", "control": f"{ORGANISM}{name}"})
    return made.model_copy(update={"data": own})
