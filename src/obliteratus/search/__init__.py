"""Search: the values of a recipe that refuse least at least damage, tried on live plans."""

from obliteratus.search.run import Member, SearchResult, StudyLocation, check_pick, search, with_trials
from obliteratus.search.space import searchable

__all__ = ["Member", "SearchResult", "StudyLocation", "check_pick", "search", "searchable", "with_trials"]
