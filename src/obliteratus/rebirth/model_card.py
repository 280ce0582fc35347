"""The model card, and the table rows that it shares with the terminal. Everything is read from the run record."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from obliteratus.core.results import Run, Score
from obliteratus.core.toml import dump_toml, format_toml
from obliteratus.rebirth.llama_cpp import render_commands
from obliteratus.rebirth.outcome import describe_outcome
from obliteratus.verify.score_names import describe_score, group_shown

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


def render_model_card(run: Run) -> str:
    """Return the card as Markdown with the YAML header that model hubs read."""
    base = run.source["id"]
    known = run.saved.get("base_model", {})
    header = ModelCardData(**known, tags=["obliteratus", "abliteration", run.recipe.name or "custom"])
    return f"""---
{header.to_yaml()}
---
# {base.rstrip("/").rpartition("/")[2]}, edited with `{run.recipe.name or "a custom recipe"}`

{run.recipe.about}. Made by OBLITERATUS {run.versions["obliteratus"]}; the base model's license still applies.

**This model was edited on purpose so that it behaves differently from its base.** The table shows what changed on
held-out prompts that were not used for the edit, with 95 % intervals where the sample allows any:

{format_score_table(run)}
{_outcome(run)}
Coverage: {format_coverage(run)}
{_describe_added(run)}{_describe_quantization(run)}{_reason_table(run)}{_pass_table(run)}
{_describe_loading(run, known.get("base_model", "THE_BASE_MODEL"))}

## Recipe

```toml
{dump_toml(run.recipe)}```

Prompts: digest `{run.prompts["digest"]}`, counts {run.prompts["counts"]}. `run.json` has everything else.
"""


def _describe_loading(run: Run, base: str) -> str:
    """Return how the saved form is loaded: in Python, or in llama.cpp and Ollama."""
    form = run.saved["form"]
    if form in LOADING:
        return f"```python\n{LOADING[form].replace('{base}', base)}\n```"
    source = run.source["id"]
    commands = render_commands(form, run.saved["file"], source)
    ollama = "" if form == "control-vector" else "\nIn Ollama: `ollama create NAME -f Modelfile`.\n"
    return f"```sh\n{commands}```\n{ollama}"


def _outcome(run: Run) -> str:
    return "".join(f"\n{sentence}\n" for sentence in describe_outcome(run))


def format_coverage(run: Run) -> str:
    """Return one line that says how many of the writing matrices were edited."""
    parts = [f"{name} {c['edited']}/{c['found']}" for name, c in run.coverage["parts"].items()]
    unclaimed = f"; **unclaimed matrices: {len(run.coverage['unclaimed'])}**" if run.coverage["unclaimed"] else ""
    warning = f" **Warning: {run.coverage['warning']}.**" if run.coverage.get("warning") else ""
    return f"{', '.join(parts)}; {run.coverage['edited_share']:.1%} of the writing parameters{unclaimed}.{warning}"


def _describe_added(run: Run) -> str:
    """Return that the saved model has tensors which its base has not, or '' if there are none."""
    added = run.saved.get("onto", {}).get("tensors", {}).get("added", 0)
    return (
        f"\nThe edit adds {added} tensors that the base has not: biases of output matrices, or a head apart from the "
        "embedding. A program that leaves them out does not run this model.\n"
        if added
        else ""
    )


def _describe_quantization(run: Run) -> str:
    """Return how the weights of a quantized model were saved, or '' for any other model."""
    if "base" in run.saved:
        kind = run.source["quantization"]
        return f"\nThe edit was found and measured on the model as {kind}, and baked into the full-precision weights.\n"
    if "requantized" not in run.saved:
        return ""
    losses = run.saved["requantized"]
    kinds = ", ".join(run.saved.get("onto", {}).get("types", {})) or run.source["quantization"]
    return (
        f"\nThe {losses['matrices']:.0f} edited matrices were dequantized, edited and quantized again as "
        f"{kinds}. Their relative error is {losses['error']:.2%} ({losses['worst']:.2%} in the "
        f"worst matrix), and they keep {losses['kept']:.1%} of the edit. All other matrices are unchanged, byte for "
        f"byte.\n"
    )


PASS_COLUMNS = ["pass", "strongest at", "edited", "remaining", "seconds"]


def make_pass_rows(run: Run) -> list[list[str]]:
    """Return a row for each pass: the strongest layer, the share edited, the rate left on search prompts, seconds."""
    rows = []
    for number, entry in enumerate(run.passes, 1):
        remaining = format_score(Score(**entry["remaining"])) if entry["remaining"] else "–"
        if "ended" in entry:
            remaining += f": {entry['ended']}"
        strongest = f"layer {entry['best_layer']}, score {entry['score']:.2f}"
        edited = f"{len(entry['layers'])} layers, {entry['edited_share']:.1%}"
        rows.append([str(number), strongest, edited, remaining, f"{sum(entry['seconds'].values()):.1f}"])
    return rows


REASON_COLUMNS = ["decision", "measured", "value", "threshold", "set"]


def make_reason_rows(run: Run) -> list[list[str]]:
    """Return a row for each decision: what was measured, its value and threshold, and the options that it set or ''."""
    rows = []
    for reason in run.advice.get("reasons", []):
        value = "not measured" if reason["value"] is None else f"{reason['value']:.3g}"
        limit = f"{'≤' if reason['at_most'] else '≥'} {reason['threshold']:g}"
        changes = "; ".join(f"{path} = {format_toml(value)}" for path, value in reason["changes"].items())
        rows.append([reason["decides"], reason["measures"], value, limit, changes])
    return rows


def _reason_table(run: Run) -> str:
    rows = [[*row[:-1], row[-1] or "unchanged"] for row in make_reason_rows(run)]
    return f"\n{_markdown_table(REASON_COLUMNS, rows)}\n" if run.advice else ""


def _pass_table(run: Run) -> str:
    return f"\n{_markdown_table(PASS_COLUMNS, make_pass_rows(run))}\n" if len(run.passes) > 1 else ""


def format_score_table(run: Run) -> str:
    """Return the scores before and after as a Markdown table."""
    names = [name for group in group_shown([run.before, run.after], brief=False) for name in group]
    return _markdown_table(["score", "before", "after", "n"], [_score_row(run, name) for name in names])


def _score_row(run: Run, name: str) -> list[str]:
    before, after = run.before.get(name), run.after.get(name)
    n = next(score.n for score in (after, before) if score)
    words = describe_score(name, str(run.judge.get("behavior", "refusal")))
    return [words, format_score(before), format_score(after), str(n)]


def _markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_score(score: Score | None) -> str:
    """Return a value with its interval if it has one, such as ``96.9% (89.3–99.1%)``; "–" for None."""
    value, interval = split_score(score)
    return f"{value} {interval}" if interval else value


NO_DECIMALS = 1000  # from here on, decimals of a perplexity or a ratio say nothing


def split_score(score: Score | None) -> tuple[str, str]:
    """Return a value, with as many digits as its unit needs, and its interval or ''; "–" for None."""
    if score is None:
        return "–", ""
    digits = 1 if score.unit in ("share", "perplexity", "tokens") else 3
    digits = 0 if abs(score.value) >= NO_DECIMALS else digits
    factor, unit = (100, "%") if score.unit == "share" else (1, "")
    value, low, high = (f"{factor * x:.{digits}f}" for x in (score.value, score.low, score.high))
    return value + unit, f"({low}–{high}{unit})" if score.has_interval else ""
