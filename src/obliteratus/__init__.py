"""Find the directions by which a language model represents a behaviour, edit along them, prove what changed."""

from obliteratus.errors import UserError
from obliteratus.excise.live import applied
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.pipeline import run
from obliteratus.probe import probe
from obliteratus.prompts import load_prompts
from obliteratus.rebirth import save
from obliteratus.recipe import names as methods
from obliteratus.recipe import recipe
from obliteratus.results import Run
from obliteratus.settings import Recipe
from obliteratus.summon.open import open_subject
from obliteratus.types import Plan, Prompt, PromptSet, Subject
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
