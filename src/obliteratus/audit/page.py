"""What a trace found, in sentences, tables, one HTML page and one JSON document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from obliteratus.audit.nearest import ONE_DIRECTION
from obliteratus.audit.tensor_trace import PROJECTION, ROUNDING, SCALING, UNKNOWN, TensorTrace
from obliteratus.audit.trace import TraceReport
from obliteratus.audit.verdict import ADAPTER, NAMES, NOTHING
from obliteratus.core.results import Run
from obliteratus.core.run_folder import write_atomic
from obliteratus.core.settings import Excise, Recipe, Step
from obliteratus.core.types import Plan
from obliteratus.excise.plan import save_plan
from obliteratus.report.hide import hide_private
from obliteratus.report.html import render_page

PAGE, DOCUMENT, PLAN = "index.html", "trace.json", "plan"
ENOUGH = 0.9  # share explained below which the rest is called unknown
COLUMNS = ["part", "blocks", "changed", "what", "rank", "strength", "explained"]


# ----------------------------------------------------------------------------------------- sentences
def describe_verdict(report: TraceReport) -> str:
    """Return what was done, in a sentence."""
    if report.verdict.kind == NOTHING:
        return f"Nothing changed: all {report.compared} tensors are equal."
    beside = [NAMES[kind] for kind in report.verdict.beside]
    what = ("an oblique projection" if report.verdict.oblique else NAMES[report.verdict.kind]).capitalize()
    also = f", beside it {' and '.join(beside)}" if beside else ""
    return f"{what}{also}: {len(report.tensors)} of {report.compared} tensors differ."


def describe_explained(report: TraceReport) -> str:
    """Return how much of the difference the plan explains, and that the rest is unknown if much is left."""
    if not report.plan.edits:
        if not report.tensors:
            return ""
        noise = f"{format_share(report.noise)} of the difference is like noise" if report.noise > 0.01 else ""
        return f"None{': ' if noise else ''}{noise}{', and ' if noise else ': '}no change of a plan explains any."
    said = f"The plan of {len(report.plan.edits)} changes explains {format_share(report.explained)} of the difference"
    noise = f"; {format_share(report.noise)} of it is like noise" if report.noise > 0.01 else ""
    if report.explained >= ENOUGH:
        return f"{said}{noise}."
    return f"{said}{noise}; {format_share(1 - report.explained)} is unknown to it."


def describe_direction(report: TraceReport) -> str:
    """Return whether the projections share a direction, and how near it is to the base's own; '' without any."""
    shared, cosines = report.shared, report.cosines
    if shared is None:
        return ""
    if shared.share >= ONE_DIRECTION:
        said = f"All {shared.tensors} projections remove one direction"
    else:
        said = f"{shared.tensors} projections, whose best common direction holds {format_share(shared.share)} of each"
    if cosines is None:
        return f"{said}. Give --target and --control for its cosine with the base's own."
    return (
        f"{said}. Cosine with the difference of means of the same stream: {cosines.own:.2f} (median), at best "
        f"{cosines.best:.2f} (stream {cosines.stream}); a random direction stays below {cosines.chance:.2f}."
    )


def describe_nearest(report: TraceReport) -> str:
    """Return the nearest recipe with what differs; '' without a projection."""
    if report.nearest is None:
        return ""
    differs = f"; differs in {'; '.join(report.nearest.differs)}" if report.nearest.differs else ""
    return f"{report.nearest.name} ({format_share(report.nearest.share)} of the traits agree{differs})."


def format_share(share: float) -> str:
    """Return a share in percent: whole only if it is, with a digit more near 100 %."""
    if share >= 0.99995:
        return "100 %"
    return f"{100 * share:.2f} %" if share >= 0.9995 else f"{100 * share:.1f} %"


# -------------------------------------------------------------------------------------------- tables
def make_part_rows(report: TraceReport) -> list[list[str]]:
    """Return a row for each part and class, the largest part of the difference first."""
    groups: dict[tuple[str, str], list[TensorTrace]] = {}
    for trace in report.tensors:
        groups.setdefault((trace.part, trace.kind), []).append(trace)
    ordered = sorted(groups.items(), key=lambda item: -sum(t.energy for t in item[1]))
    return [_make_row(part, kind, own) for (part, kind), own in ordered]


def _make_row(part: str, kind: str, own: Sequence[TensorTrace]) -> list[str]:
    layers = sorted({trace.layer for trace in own if trace.layer >= 0})
    blocks = "–" if not layers else f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0])
    structured = kind in (PROJECTION, ADAPTER)
    strengths = sorted(trace.strength for trace in own)
    if kind == SCALING:
        strengths = sorted(trace.factor for trace in own)
    strength = f"{strengths[len(strengths) // 2]:.2f}" if kind in (PROJECTION, SCALING) else "–"
    ranks = sorted(trace.rank for trace in own)
    rank = "–" if not structured else str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}–{ranks[-1]}"
    whole = sum(max(t.energy - t.rounding, 0.0) for t in own)
    explained = sum(t.explained * max(t.energy - t.rounding, 0.0) for t in own) / whole if whole else 0.0
    return [
        part,
        blocks,
        str(len(own)),
        _name_kind(own),
        rank,
        strength,
        format_share(explained) if structured or explained else "–",
    ]


def _name_kind(own: Sequence[TensorTrace]) -> str:
    first = own[0]
    if first.kind != PROJECTION:
        return f"{first.kind} ({first.grid})" if first.grid else first.kind
    side = "left" if first.side == "left" else "right"
    rules = sorted({trace.rule for trace in own} - {"none"})
    kept = f", {', '.join(rules)} kept" if rules else ""
    return f"{'oblique ' if any(t.oblique for t in own) else ''}{side} projection{kept}"


def make_tensor_rows(report: TraceReport) -> list[list[str]]:
    """Return a row for each tensor that differs, in the order of the model."""
    rows = []
    for t in report.tensors:
        cosine = report.cosines.by_tensor.get(t.name) if report.cosines else None
        spectrum = " ".join(f"{value:.3f}" for value in t.spectrum[:4])
        rows.append(
            [
                *(t.name, t.kind, f"{t.size:.2e}", str(t.rank), spectrum, f"{t.stable_rank:.1f}"),
                *("exact" if t.exact else "randomized", f"{t.noise:.1e}", " ".join(t.kept) or "–"),
                *(f"{t.strength:.3f}", format_share(t.explained), "–" if cosine is None else f"{cosine:.2f}"),
            ]
        )
    return rows


TENSOR_COLUMNS = [
    *("tensor", "class", "‖D‖ ÷ ‖W‖", "rank", "largest σ ÷ ‖D‖", "stable rank", "spectrum", "noise", "lengths kept"),
    *("strength", "explained", "cosine"),
]


# ------------------------------------------------------------------------------------------- writing
def render_trace(report: TraceReport) -> str:
    """Return the page. It shows no absolute path."""
    return render_page(
        "trace",
        title=hide_private(f"What was done to {report.edited}"),
        meta=[hide_private(f"base: {report.base}"), f"OBLITERATUS {version('obliteratus')}"],
        headline=describe_verdict(report),
        sentences=[s for s in (describe_explained(report), describe_direction(report)) if s],
        nearest=report.nearest,
        columns=COLUMNS,
        rows=make_part_rows(report),
        tensor_columns=TENSOR_COLUMNS,
        tensors=make_tensor_rows(report),
        shares=[[NAMES.get(k, k), v, format_share(v)] for k, v in (report.verdict.shares or {}).items()],
        parts=_draw_blocks(report),
        numbers=list(range(report.n_layers)),
        rounding=sum(t.kind == ROUNDING for t in report.tensors),
        unknown=[t.name for t in report.tensors if t.kind == UNKNOWN],
    )


def _draw_blocks(report: TraceReport) -> dict[str, dict[int, dict[str, Any]]]:
    """Return, by part and block, the size of the difference relative to the largest."""
    parts: dict[str, dict[int, dict[str, Any]]] = {}
    largest = max((t.size for t in report.tensors if t.kind != ROUNDING), default=1.0)
    for t in report.tensors:
        if t.layer >= 0 and t.kind != ROUNDING:
            cell = parts.setdefault(t.part, {}).setdefault(t.layer, {"strength": 0.0, "text": ""})
            cell["strength"] = max(cell["strength"], t.size / max(largest, 1e-30))
            cell["text"] = f"{t.kind}, ‖D‖ ÷ ‖W‖ = {t.size:.2e}"
    return parts


def write_trace(report: TraceReport, folder: Path) -> None:
    """Write the page, the numbers, and the plan with a record that `apply`, `chat` and `serve` read."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / DOCUMENT, json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    if report.plan.edits:
        save_plan(report.plan, folder / PLAN)
        write_atomic(folder / PLAN / "run.json", make_record(report).model_dump_json(indent=1))
    write_atomic(folder / PAGE, render_trace(report))


def make_record(report: TraceReport) -> Run:
    """Return the record of the plan: which model it is for, and that it was traced and not measured."""
    about = (
        f"Recovered by `trace` from {report.edited}: {format_share(report.explained)} of its difference from the base"
    )
    strengths = sorted(t.strength for t in report.tensors if t.kind == PROJECTION) or [1.0]
    recipe = Recipe(
        name="traced",
        about=about,
        distill=(Step(use="mean_diff"),),
        excise=Excise(strength=max(-10.0, min(strengths[len(strengths) // 2], 10.0))),
    )
    source = {key: str(value) for key, value in vars(report.source).items()}
    return Run(
        status="done",
        recipe=recipe,
        source=source,
        prompts={"digest": "", "counts": {}},
        coverage=_cover(report, report.plan),
        saved={"form": "plan", "files": {}},
        versions={name: version(name) for name in ("obliteratus", "torch", "transformers")},
    )


def _cover(report: TraceReport, plan: Plan) -> dict[str, Any]:
    """Return how many sites of each part the plan edits, in the form of `summarize_plan_coverage`."""
    edited = {change.site.parameter: change.site.part for change in plan.edits}
    parts = {
        part: {"found": found, "edited": list(edited.values()).count(part), "skipped_layers": []}
        for part, found in (report.parts or {}).items()
    }
    share = len(edited) / max(sum((report.parts or {}).values()), 1)
    return {"parts": parts, "unclaimed": [], "edited_share": share, "found_share": 1.0, "warning": ""}
