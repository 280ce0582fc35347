"""Find the directions by which a language model represents a behaviour, edit along them, prove what changed."""

from obliteratus.core.errors import UserError
from obliteratus.core.results import Run
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan, Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.pipeline.recipe import list_methods as methods
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import load_prompts
from obliteratus.rebirth.save import save
from obliteratus.summon.load import open_subject
from obliteratus.verify import measure

__all__ = [
    "Plan",
    "Prompt",
    "PromptSet",
    "Recipe",
    "Run",
    "Subject",
    "UserError",
    "applied",
    "collect_activations",
    "load_plan",
    "load_prompts",
    "load_recipe",
    "measure",
    "methods",
    "open_subject",
    "run",
    "save",
    "save_plan",
]
