"""SEARCH: try many values of a recipe as live plans, and keep those that refuse least at the least damage.

Trials live in an Optuna study that several processes may share.
It may import the stages, judge and pipeline, and is run by cli.
"""

from obliteratus.search.run import FrontMember, SearchResult, StudyLocation, check_pick, search, set_trial_count
from obliteratus.search.space import add_default_search

__all__ = [
    "FrontMember",
    "SearchResult",
    "StudyLocation",
    "add_default_search",
    "check_pick",
    "search",
    "set_trial_count",
]
