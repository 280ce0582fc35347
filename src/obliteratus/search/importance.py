"""How much each value of a search matters for each objective, by PED-ANOVA over the finished trials."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial

# Below this PED-ANOVA's densities of good trials, which are a tenth of all, rest on a single one.
MIN_TRIALS = 20


def compute_importances(study: optuna.Study, minimize: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return, for each objective, the share (0–1, together 1) of each drawn value in what makes trials good.

    Source: arXiv:2304.10255. Empty with fewer than 20 finished trials, or where all trials are equally good.
    """
    if len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))) < MIN_TRIALS:
        return {}
    return {name: found for i, name in enumerate(minimize) if (found := _compute_for(study, i))}


def _compute_for(study: optuna.Study, index: int) -> dict[str, float]:
    # imported here because they bring scikit-learn, which takes a second to load
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    def target(trial: FrozenTrial) -> float:
        return float(trial.user_attrs["objectives"][index])  # not what the sampler was told, if there is a kl_target

    values = {target(trial) for trial in study.get_trials(deepcopy=False) if "objectives" in trial.user_attrs}
    if len(values) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)  # that low values are good, which they are
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target=target)
    return {name: float(share) for name, share in found.items()}
