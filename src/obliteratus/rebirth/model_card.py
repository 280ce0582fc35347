"""The model card, and the table rows that it shares with the terminal. Everything is read from the run record."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from obliteratus.core.results import Run, Score
from obliteratus.core.toml import dump_toml, format_toml
from obliteratus.rebirth.headline import describe_headline
from obliteratus.rebirth.llama_cpp import render_commands
from obliteratus.rebirth.outcome import describe_outcome
from obliteratus.rebirth.own_plan import is_own_plan
from obliteratus.verify.score_names import REFUSAL, describe_score, group_shown

LOADING = {
    "merged": ('from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("{here}")'),
    "adapter": (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n"
        'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "{here}")'
    ),
    "plan": (
        'import obliteratus as ob\nsubject = ob.open_subject("{base}")\n'
        'with ob.applied(subject, ob.load_plan("THIS_FOLDER")):\n    ...'
    ),
}
DOWNLOAD = "hf download {here} --local-dir THIS_FOLDER"
KINDS = {
    "merged": "whole model with the edit in its weights",
    "adapter": "LoRA adapter that makes the edit on top of the base model",
    "plan": "plan of the edit, which OBLITERATUS applies to the base model",
    "gguf": "GGUF file with the edit in its weights",
    "lora-gguf": "LoRA adapter in GGUF, which makes the edit on top of the base model",
    "control-vector": "control vector in GGUF, which makes the edit on top of the base model",
}


def render_model_card(run: Run, repo: str = "", reproducible: bool = False) -> str:
    """Return the card as Markdown with the YAML header that model hubs read.

    repo: ``owner/name`` where the card will stand, or '' for one in a folder. reproducible: whether reproduce.json lies
    beside it.
    """
    known = run.saved.get("base_model", {})
    header = ModelCardData(**known, tags=["obliteratus", "abliteration", run.recipe.name or "custom"])
    return f"""---
{header.to_yaml()}
---
# {_base_name(run)}, edited with `{run.recipe.name or "a custom recipe"}`

**This model was edited on purpose so that it behaves differently from its base.** {describe_headline(run)}

## What was changed
{_describe_edit(run)} This is a
{KINDS.get(run.saved["form"], run.saved["form"])}. Edited matrices: {format_coverage(run)}
{_describe_added(run)}{_describe_quantization(run)}{_reason_table(run)}{_pass_table(run)}
## How it was measured
{_describe_measuring(run)}
{_score_section(run)}{_outcome(run)}
## License
{_describe_license(run)}

## Where it comes from
{_markdown_table(["", ""], _origin_rows(run))}

## Use
{_describe_use(run, repo)}
{_describe_repeating(repo) if reproducible else ""}{_recipe_section(run)}
`run.json` has everything else.
"""


def _describe_edit(run: Run) -> str:
    """Return what the edit is."""
    if is_own_plan(run):
        return f"{run.recipe.about}."
    return (
        f"{run.recipe.about}. The edit is along directions in the residual stream that tell two groups of prompts "
        f"apart; its\nstrength is {run.recipe.excise.strength:g} (1 removes, 2 reflects, below 0 amplifies)."
    )


def _score_section(run: Run) -> str:
    return f"\n{format_score_table(run)}\n" if run.before or run.after else ""


def _recipe_section(run: Run) -> str:
    """Return the recipe; nothing for a plan that no recipe has made."""
    return "" if is_own_plan(run) else f"\n## Recipe\n\n```toml\n{dump_toml(run.recipe)}```\n"


def _base_name(run: Run) -> str:
    return run.source["id"].rstrip("/").rpartition("/")[2]


def _describe_measuring(run: Run) -> str:
    """Return what the figures rest on."""
    if is_own_plan(run):
        return "Nothing was measured when it was saved."
    report = run.prompts["counts"].get("report", {})
    counts = ", ".join(f"{n} {group}" for group, n in report.items())
    behavior, judge = run.judge.get("behavior", REFUSAL), run.judge.get("decides", "phrases")
    forced = (
        " The model did not show the behavior clearly before the edit, which was forced." if _was_forced(run) else ""
    )
    return (
        f"On {counts} prompts that were held out: nothing was fitted or chosen on them. Answers are greedy; {judge} "
        f"decided whether one shows {behavior}. Intervals are 95 % intervals, where the sample allows any; KL is in "
        f"nats.{forced} A rate on these prompts says little about prompts of another kind."
    )


def _was_forced(run: Run) -> bool:
    return bool(run.presence.get("against"))


def _describe_license(run: Run) -> str:
    """Return that the base model's license applies, and which it is."""
    known = run.saved.get("base_model", {})
    name = known.get("license_name") or known.get("license")
    if not name:
        return (
            "The base model's license still applies. Its files do not say which it is: look it up before you use or "
            "share this."
        )
    link = f", {known['license_link']}" if known.get("license_link") else ""
    return f"The base model's license, {name}{link}, still applies: to this model and to whatever is made of it."


def _origin_rows(run: Run) -> list[list[str]]:
    """Return what the result was made from and by what, as rows of a table."""
    known, source = run.saved.get("base_model", {}), run.source
    revision = f", revision `{source['revision']}`" if source.get("revision") else ""
    began, own = run.prompts.get("chat", {}).get("now", ""), is_own_plan(run)
    rows = [
        ["base model", f"{known.get('base_model') or _base_name(run)}{revision}"],
        ["precision", " ".join(filter(None, (source.get("dtype"), source.get("quantization"))))],
        ["digest of its weights", f"`{source['digest']}`" if source.get("digest") else ""],
        ["prompts", "" if own else f"digest `{run.prompts['digest']}`, counts {run.prompts['counts']}"],
        ["seed", "" if own else str(run.recipe.seed)],
        ["made", f"{began[:10]} by OBLITERATUS {run.versions['obliteratus']}".lstrip()],
        ["with", ", ".join(f"{name} {version}" for name, version in run.versions.items() if name != "obliteratus")],
        ["citations", ", ".join(run.recipe.cite)],
    ]
    return [row for row in rows if row[1]]


def _describe_use(run: Run, repo: str) -> str:
    form, known = run.saved["form"], run.saved.get("base_model", {})
    organism = run.source["id"] if run.source["id"].startswith("organism:") else ""
    base = known.get("base_model") or organism or "THE_BASE_MODEL"
    if form not in LOADING:
        ollama = "" if form == "control-vector" else "\nIn Ollama: `ollama create NAME -f Modelfile`.\n"
        return f"```sh\n{render_commands(form, run.saved['file'], run.source['id'])}```\n{ollama}"
    code = LOADING[form].replace("{base}", base).replace("{here}", repo or "THIS_FOLDER")
    fetch = f"```sh\n{DOWNLOAD.replace('{here}', repo)}\n```\n\n" if repo and form == "plan" else ""
    return f"{fetch}```python\n{code}\n```"


def _describe_repeating(repo: str) -> str:
    what = f"hub:{repo}" if repo else "THIS_FOLDER"
    return (
        "\n## Do it again\n`reproduce.json` holds the sums of all files of the base model, digests of the prompts, the "
        f"recipe, the releases and the seed. `obliteratus reproduce {what}` checks what is there, runs, and compares "
        "plan and scores with those here.\n"
    )


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
