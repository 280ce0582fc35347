"""The model card: what was edited, with the measured before and after. Reads the run and nothing else."""

from __future__ import annotations

from obliteratus.core.results import Run, Score
from obliteratus.pipeline.recipe import dump_toml, toml

LOADING = {
    "merged": (
        'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")'
    ),
    "adapter": (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "THIS_FOLDER")'
    ),
    "plan": (
        'import obliteratus as ob\nsubject = ob.open_subject("{base}")\n'
        'with ob.applied(subject, ob.load_plan("THIS_FOLDER")):\n    ...'
    ),
}


def model_card(run: Run) -> str:
    """Markdown with the YAML head that model hubs read."""
    base, form = run.source["id"], run.saved["form"]
    return f"""---
base_model: {base}
tags: [obliteratus, abliteration, {run.recipe.name or "custom"}]
---
# {base.rstrip("/").rpartition("/")[2]}, edited with `{run.recipe.name or "a recipe of its own"}`

{run.recipe.about}. Made by OBLITERATUS {run.versions["obliteratus"]}; the base model's licence goes on applying.

**This model was edited on purpose so that it behaves differently from its base.** What changed, on held-out
prompts that the edit never saw (95 % intervals):

{score_table(run)}

Coverage: {coverage_line(run)}
{_stored(run)}{_reasons(run)}{_passes(run)}
```python
{LOADING[form].replace("{base}", base)}
```

## Recipe

```toml
{dump_toml(run.recipe)}```

Prompts: digest `{run.prompts["digest"]}`, numbers {run.prompts["counts"]}. All else is in `run.json`.
"""


def coverage_line(run: Run) -> str:
    """Writers edited, in one line."""
    parts = [f"{name} {c['edited']}/{c['found']}" for name, c in run.coverage["parts"].items()]
    missed = f"; **unclaimed matrices: {len(run.coverage['unclaimed'])}**" if run.coverage["unclaimed"] else ""
    warned = f" **Warning: {run.coverage['warning']}.**" if run.coverage.get("warning") else ""
    return f"{', '.join(parts)}; {run.coverage['edited_share']:.1%} of the writing parameters{missed}.{warned}"


def _stored(run: Run) -> str:
    """What became of a quantised model's weights."""
    if "base" in run.saved:
        kind = run.source["quantisation"]
        return f"\nFound and measured on the model as {kind}; the edit is baked into the full-precision weights.\n"
    if "requantised" not in run.saved:
        return ""
    lost = run.saved["requantised"]
    return (
        f"\nThe {lost['matrices']:.0f} edited matrices were unpacked, edited and packed again as "
        f"{run.source['quantisation']}: they differ from the exact edit by {lost['error']:.2%} of their length (the "
        f"worst by {lost['worst']:.2%}), and hold {lost['kept']:.1%} of it. All others are as they were, byte for "
        f"byte.\n"
    )


PASS_COLUMNS = ["pass", "found most at", "edited", "still refused", "seconds"]


def pass_rows(run: Run) -> list[list[str]]:
    """What each pass found, changed, left (refusals of search prompts) and cost."""
    rows = []
    for number, found in enumerate(run.passes, 1):
        left = format_score(Score(**found["refused"])) if found["refused"] else "–"
        why = f"{left}: {found['ended']}" if "ended" in found else left
        strongest = f"layer {found['best_layer']}, score {found['score']:.2f}"
        reached = f"{len(found['layers'])} layers, {found['edited_share']:.1%}"
        rows.append([str(number), strongest, reached, why, f"{sum(found['seconds'].values()):.1f}"])
    return rows


REASON_COLUMNS = ["decision", "measured", "value", "decides at", "set"]


def reason_rows(run: Run) -> list[list[str]]:
    """What was measured before the recipe was settled, and what it set."""
    rows = []
    for reason in run.advice.get("reasons", []):
        value = "not measured" if reason["value"] is None else f"{reason['value']:.3g}"
        limit = f"{'≤' if reason['at_most'] else '≥'} {reason['threshold']:g}"
        changes = "; ".join(f"{path} = {toml(value)}" for path, value in reason["changes"].items())
        rows.append([reason["decides"], reason["measures"], value, limit, changes or "as it was"])
    return rows


def _reasons(run: Run) -> str:
    return f"\n{_markdown(REASON_COLUMNS, reason_rows(run))}\n" if run.advice else ""


def _passes(run: Run) -> str:
    return f"\n{_markdown(PASS_COLUMNS, pass_rows(run))}\n" if len(run.passes) > 1 else ""


def score_rows(run: Run) -> list[list[str]]:
    """Name, before, after and n of every score, rates by category left out."""
    rows = []
    for name in dict.fromkeys([*run.before, *run.after]):
        if "/" not in name:
            found = [scores[name] for scores in (run.after, run.before) if name in scores]
            rows.append([name, format_score(run.before.get(name)), format_score(run.after.get(name)), str(found[0].n)])
    return rows


def score_table(run: Run) -> str:
    """Before and after as a Markdown table."""
    return _markdown(["score", "before", "after", "n"], score_rows(run))


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_score(score: Score | None) -> str:
    """A value with its interval, in the precision that its unit bears."""
    if score is None:
        return "–"
    if score.unit == "share":
        return f"{score.value:.1%} ({score.low:.1%}–{score.high:.1%})"
    digits = 1 if score.unit == "perplexity" else 3
    return f"{score.value:.{digits}f} ({score.low:.{digits}f}–{score.high:.{digits}f})"
