"""SEARCH: try many values of a recipe as live plans, and keep those that refuse least at the least damage.

Trials live in an Optuna study that several processes may share.
It may import the stages, judge and pipeline, and is run by cli.
"""

from obliteratus.core.errors import UserError
from obliteratus.core.views import register_view_modules

try:
    import optuna  # noqa: F401  # every module of this package is built on it
except ModuleNotFoundError as error:
    raise UserError("a search needs Optuna; pip install 'obliteratus[search]'") from error

from obliteratus.search.run import FrontMember, SearchResult, StudyLocation, check_pick, search, set_trial_count
from obliteratus.search.space import add_default_search

register_view_modules("obliteratus.search.search_view")  # here, since it needs what the extra brings

__all__ = [
    "FrontMember",
    "SearchResult",
    "StudyLocation",
    "add_default_search",
    "check_pick",
    "search",
    "set_trial_count",
]
