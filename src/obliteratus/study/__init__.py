"""Ablation studies: knock out a part of a model by a live edit, measure the damage, and undo the edit.

Importing this package registers the strategies, which list the parts. May import everything but cli and the other
users of the stages (search, rebirth, forecast).
"""

from obliteratus.study import controls, strategies
from obliteratus.study.base import Knockout, KnockoutResult, StudyContext
from obliteratus.study.settings import Data, Study

__all__ = ["Data", "Knockout", "KnockoutResult", "Study", "StudyContext", "controls", "strategies"]
