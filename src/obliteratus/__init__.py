"""Find the directions by which a language model represents a behaviour, edit along them, prove what changed."""

from obliteratus.core.errors import UserError
from obliteratus.core.results import Run
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan, Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.pipeline.recipe import names as methods
from obliteratus.pipeline.recipe import recipe
from obliteratus.pipeline.run import run
from obliteratus.probe.probe import probe
from obliteratus.prompts import load_prompts
from obliteratus.rebirth.save import save
from obliteratus.summon.load import open_subject
from obliteratus.verify import verify

__all__ = [
    "Plan",
    "Prompt",
    "PromptSet",
    "Recipe",
    "Run",
    "Subject",
    "UserError",
    "applied",
    "load_plan",
    "load_prompts",
    "methods",
    "open_subject",
    "probe",
    "recipe",
    "run",
    "save",
    "save_plan",
    "verify",
]
