"""Prompts: read from files, checked, and split into parts that share nothing.

May import core, report, weights, judge, summon and inference.
"""

from obliteratus.prompts.checks import check_enough, check_prompts, check_splits
from obliteratus.prompts.files import split_lines
from obliteratus.prompts.load import load_prompts, read_prompts
from obliteratus.prompts.spacing import evenly_spaced, pick_evenly
from obliteratus.prompts.split import split_prompts

__all__ = [
    "check_enough",
    "check_prompts",
    "check_splits",
    "evenly_spaced",
    "load_prompts",
    "pick_evenly",
    "read_prompts",
    "split_lines",
    "split_prompts",
]
