"""Study files: presets by name and TOML files by path, with values replaced by path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error
from obliteratus.pipeline.presets import STUDIES
from obliteratus.pipeline.values import override_values
from obliteratus.study.settings import Study
from obliteratus.verify.ladder import check_judge

PROMPT_METRICS = frozenset({"behavior", "first_token_kl"})
ORGANISM = "organism:"


def list_studies() -> list[str]:
    """Return the names of all shipped studies."""
    return STUDIES.list_names()


def load_study(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Load a shipped study by name, or a TOML file by path, with values replaced by path (``data.samples``).

    Raises UserError for a missing study and for an invalid key or value. `study.data.check_study` checks whether its
    strategies and metrics exist.

    >>> [step.use for step in ob.load_study("attention").strategies]
    ['heads']
    """
    where = str(source)
    if Path(where).suffix in (".yaml", ".yml"):
        raise UserError(
            f"{where}: studies are TOML; convert it: obliteratus study --from-yaml {where} --out study.toml"
        )
    study = parse_study(STUDIES.read(where), where)
    return parse_study(override_values(study, overrides), where) if overrides else study


def parse_study(data: Mapping[str, Any], where: str) -> Study:
    """Validate a study from plain data. Raises UserError in one line: where, what, and the given value."""
    try:
        return Study(**data)
    except ValidationError as error:
        raise UserError(f"study '{where}': {explain_validation_error(error, Study)}") from error


def fill_prompts(study: Study) -> Study:
    """Return the study with prompts, if its metrics need some and it names none: the behavior's, or an organism's."""
    if study.data.target or study.data.control or PROMPT_METRICS.isdisjoint(metric.use for metric in study.metrics):
        return study
    name = study.model.removeprefix(ORGANISM).partition("@")[0]  # astronomy@0.5 is half of astronomy's adapter
    head = check_judge(study.judge).head
    sources = {"target": head.target, "control": head.control}
    if not head.target and study.model.startswith(ORGANISM) and name != "base":
        sources = dict.fromkeys(sources, f"{ORGANISM}{name}")
    return study.model_copy(update={"data": study.data.model_copy(update=sources)})
