"""Ablation studies: knock a part out by a live edit, see what breaks, put it back. Importing registers strategies."""

from obliteratus.study import controls, neurons, strategies
from obliteratus.study.base import Knockout, KnockoutResult, StudyContext
from obliteratus.study.settings import Data, Study

__all__ = ["Data", "Knockout", "KnockoutResult", "Study", "StudyContext", "controls", "neurons", "strategies"]
