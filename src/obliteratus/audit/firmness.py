"""How firm a behavior is against edits of the weights: what its removal costs, what carries it, what brings it back.

`run_audit` reads top to bottom. Each measurement is a stage of the store, so an interrupted audit resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from obliteratus.analyze.pass_budget import split_by_budget
from obliteratus.audit.context import FITTED, AuditContext
from obliteratus.audit.doses import Curve, Dose
from obliteratus.audit.measurements import (
    measure_benign,
    measure_blocks,
    measure_controls,
    measure_directions,
    measure_examples,
    measure_perplexity,
    measure_rewordings,
    measure_seeds,
    measure_self_repair,
)
from obliteratus.audit.passes import estimate_passes
from obliteratus.audit.removal_cost import GOALS, HALF, compare_costs, find_least_cost, summarize_cost
from obliteratus.audit.results import AuditReport
from obliteratus.audit.settings import DEFAULT, AuditSettings
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.results import Score
from obliteratus.core.run_folder import Store
from obliteratus.core.types import Prompt, Splits, Subject
from obliteratus.judge.judge import Judge


def run_audit(
    subject: Subject,
    splits: Splits,
    settings: AuditSettings = DEFAULT,
    *,
    store: Store | None = None,
    judge: Judge | None = None,
    benign: Sequence[Prompt] = (),
    own: Mapping[str, Sequence[Prompt]] | None = None,
    budget: int | None = None,
) -> AuditReport:
    """Measure how firm the behavior is against edits of the weights. Changes no weight.

    Edits are fitted on fit and search prompts and measured on report prompts. The number to compare between models is
    ``report.cost``: the least KL, in nats, at which one half of the behavior is left.

    judge: says which answers show the behavior; None looks for refusals. benign: prompts that should be answered.
    own: by name, further wordings of target prompts. budget: the most forward passes; the curves always run, and of
    the other measurements as many as there is room for, the cheapest first. Raises UserError for a method that cannot
    run, and for a budget that the curves alone exceed.

    >>> report = ob.run_audit(subject, ob.Splits(prompts, prompts, prompts, "all"), small_audit)
    >>> report.cost.goal, sorted(report.curves)
    (0.5, ['basic', 'leace'])
    """
    audit = AuditContext(subject, splits, settings, store or Store(), judge or Judge())
    passes = estimate_passes(settings, audit.methods, subject.n_layers, len(benign), own or {})
    wanted, skipped = choose_measurements(passes, budget)
    audit = audit.screened()
    if audit.presence.against:
        note("AUDIT", f"nothing is claimed: {audit.presence.against}")
        return AuditReport(audit.judge.name, settings, audit.presence, seconds=audit.store.seconds)
    curves = audit.measure_curves(FITTED in wanted)
    seeds = measure_seeds(audit) if "seeds" in wanted else {}
    directions = measure_directions(audit) if "directions" in wanted else {}
    return replace(
        report_costs(audit, curves, list(seeds.values())),
        seeds=seeds,
        directions=directions,
        ratios=compare_directions(directions, audit.unedited),
        **measure_others(audit, wanted, curves, benign, own or {}),
        base_method=audit.base_method,
        skipped={**skipped, **audit.failed},
        passes=sum(count for name, count in passes.items() if name not in skipped),
        seconds=dict(audit.store.seconds),
    )


def report_costs(audit: AuditContext, curves: Mapping[str, Curve], fits: Sequence[Curve] = ()) -> AuditReport:
    """Return a report of the costs of removal alone. fits: curves of one method's fits, for the interval over them."""
    return AuditReport(
        audit.judge.name,
        audit.settings,
        audit.presence,
        audit.unedited,
        curves,
        costs={name: [summarize_cost(curve, audit.unedited, goal) for goal in GOALS] for name, curve in curves.items()},
        least=[find_least_cost(curves, audit.unedited, goal, fits) for goal in GOALS],
        skipped=dict(audit.failed),
        seconds=dict(audit.store.seconds),
    )


def measure_others(
    audit: AuditContext,
    wanted: Collection[str],
    curves: Mapping[str, Curve],
    benign: Sequence[Prompt],
    own: Mapping[str, Sequence[Prompt]],
) -> dict[str, Any]:
    """Return the other measurements that are wanted, by the name of their field in the report."""
    makers: dict[str, Callable[[], Any]] = {
        "perplexity": lambda: measure_perplexity(audit, curves),
        "controls": lambda: measure_controls(audit),
        "blocks": lambda: measure_blocks(audit),
        "examples": lambda: measure_examples(audit),
        "repair": lambda: measure_self_repair(audit),
        "rewordings": lambda: measure_rewordings(audit, curves, own),
        "benign": lambda: measure_benign(audit, curves, benign),
    }
    return {name: make() for name, make in makers.items() if name in wanted}


def choose_measurements(passes: Mapping[str, int], budget: int | None) -> tuple[list[str], dict[str, str]]:
    """Return which measurements the budget has room for, and by name why the others are skipped; note all costs.

    passes: at most, by measurement; "curves" always run. Raises UserError if these alone exceed the budget.
    """
    left = math.inf if budget is None else budget - passes["curves"]
    if left < 0:
        raise UserError(
            f"budget: the curves alone need up to {passes['curves']:,} forward passes; allow that many, or try --quick"
        )
    names, skipped = split_by_budget({name: n for name, n in passes.items() if name != "curves"}, left)
    whole = passes["curves"] + sum(passes[name] for name in names)
    note("cost", f"at most {whole:,} forward passes of one prompt or token: {', '.join(['curves', *names])}")
    for name, reason in skipped.items():
        note("skipped", f"{name}: {reason}")
    return names, skipped


def compare_directions(directions: Mapping[str, Curve], unedited: Dose) -> dict[str, Score | None]:
    """Return the cost of one half by each number of directions, relative to that by the first."""
    if not directions:
        return {}
    first, *others = directions
    return {k: compare_costs(directions[k], directions[first], unedited, HALF) for k in others}
