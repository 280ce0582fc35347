"""What other programs read of a saved plan: refusals, and the first tokens' log-probabilities against ours.

Each plan is saved merged and as an adapter, and read by transformers 5 and 4.57 in processes without anything of ours
(`bench.plain_reader`): AutoModelForCausalLM, and PeftModel for adapters. refused: share of the report split's target
prompts whose greedy answer shows refusal by its phrases. difference: the largest absolute difference, in nats, of a
first token's log-probability from ours under the live plan, over target and control prompts and all tokens that either
side gives at least 1e-6; all: over the whole vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.support.tiny import run_of

from bench.chat import make_plan
from bench.common import describe_machine, load_organism, make_parser, print_report, say
from obliteratus.core.types import Plan, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import generate, stop_tokens
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.prompts import split_prompts

OLD = Path(sys.prefix) / "transformers-4.57"
READERS = {"transformers 5": "", "transformers 4.57": str(OLD)}
FORMS = ("merged", "adapter")
PROMPTS, TOKENS, SMOKE_PROMPTS, SMOKE_TOKENS = 48, 16, 2, 4
LIKELY = np.log(1e-6)  # beyond, fp32 keeps logarithms of sums less exactly than any sampler could notice
Answers = dict[str, tuple[np.ndarray, Ids]]
"""By group: log-probabilities of first tokens [rows, vocabulary], and greedy answers."""
Groups = Mapping[str, dict[str, Any]]


def make_groups(subject: Subject, n: int, tokens: int) -> Groups:
    """Return the token ids of n report prompts of each group. Only answers to target prompts are written whole."""
    report = split_prompts(load_organism()[1], 0).report
    lengths = {"target": tokens, "control": 1}
    return {g: {"ids": render_prompts(subject, report[g][:n]), "tokens": lengths[g]} for g in lengths}


def read_ours(subject: Subject, plan: Plan, groups: Groups) -> Answers:
    """Return what we say under the live plan."""
    found: Answers = {}
    with applied(subject, plan):
        for name, group in groups.items():
            first = np.empty((len(group["ids"]), 0), np.float32)

            def keep(rows: list[int], logits: torch.Tensor) -> None:
                nonlocal first
                logp = logits.float().log_softmax(-1).numpy()
                first = np.empty((len(first), logp.shape[1]), np.float32) if not first.size else first
                first[rows] = logp

            answers = generate(subject, group["ids"], group["tokens"], on_first_logits=keep)
            found[name] = first, answers
    return found


def read_theirs(subject: Subject, model: Path, adapter: Path | None, groups: Groups, path: str) -> tuple[str, Answers]:
    """Return the release of transformers and what it says. path: of its folder, '' for the installed one."""
    with tempfile.TemporaryDirectory() as folder:
        spec, out = Path(folder) / "spec.json", Path(folder) / "out.npz"
        asked = {"model": str(model), "adapter": str(adapter or ""), "groups": groups}
        spec.write_text(json.dumps(asked), encoding="utf-8")
        script = Path(__file__).with_name("plain_reader.py")
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, str(script), str(spec), str(out)], env=env, check=True)
        with np.load(out) as found:
            stops = stop_tokens(subject)
            answers = {g: (found[f"{g}.first"], cut(found[f"{g}.answers"].tolist(), stops)) for g in groups}
            return str(found["version"]), answers


def cut(answers: Ids, stops: set[int]) -> Ids:
    """Return each answer up to the first token that ends it."""
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in answers]


def describe(subject: Subject, found: Answers, ours: Answers) -> dict[str, Any]:
    """Return the refusals, the differences, and how many answers are token for token ours."""
    judge, texts = Judge(), AnswerDecoder.create(subject).decode_all(found["target"][1])
    refused = sum(judge.judge_answer(text) in SHOWN for text in texts)
    pairs = [(found[group][0], ours[group][0]) for group in found]
    likely = max(float(np.abs(a - b)[np.maximum(a, b) > LIKELY].max()) for a, b in pairs)
    everywhere = max(float(np.abs(a - b).max()) for a, b in pairs)
    same = sum(a == b for a, b in zip(found["target"][1], ours["target"][1], strict=True))
    return {"refused": refused, "of": len(texts), "difference": likely, "all": everywhere, "same_answers": same}


def save_forms(plan: Path, out: Path) -> dict[str, Path]:
    """Save the plan in each form, as `obliteratus apply` does."""
    for form in FORMS:
        command = ["-m", "obliteratus", "apply", str(plan), "organism:astronomy", "--save", form, "--quiet"]
        run = [sys.executable, *command, "--out", str(out / form)]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    return {form: out / form for form in FORMS}


def measure_plan(subject: Subject, plan: Path, groups: Groups) -> dict[str, Any]:
    """Return what each reader makes of each form of a plan."""
    ours = read_ours(subject, load_plan(plan), groups)
    result: dict[str, Any] = {"ours": describe(subject, ours, ours)}
    with tempfile.TemporaryDirectory() as folder:
        for form, saved in save_forms(plan, Path(folder)).items():
            for reader, path in READERS.items():
                say(f"{plan.name}, {form}, {reader} …")
                model, adapter = (saved, None) if form == "merged" else (find_base(subject), saved)
                _, found = read_theirs(subject, model, adapter, groups, path)
                result[f"{form}, {reader}"] = describe(subject, found, ours)
    return result


def find_base(subject: Subject) -> Path:
    """Return the folder of the organism's weights."""
    from obliteratus.weights.organism import prepare_organism

    return prepare_organism("astronomy")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options."""
    parser = make_parser(__doc__)
    parser.add_argument("--plan", action="append", type=Path, default=[], help="folder of a plan for the organism")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each plan, form and reader."""
    options = parse(argv)
    subject, _ = load_organism()
    groups = make_groups(subject, *((SMOKE_PROMPTS, SMOKE_TOKENS) if options.smoke else (PROMPTS, TOKENS)))
    unedited = read_ours(subject, Plan(), groups)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "unedited": {"ours": describe(subject, unedited, unedited)},
    }
    for reader, path in READERS.items():
        say(f"unedited, {reader} …")
        version, found = read_theirs(subject, find_base(subject), None, groups, path)
        result["unedited"][reader] = {"version": version, **describe(subject, found, unedited)}
    with tempfile.TemporaryDirectory() as folder:
        plans = options.plan
        if not plans:
            save_plan(make_plan(subject, "none"), Path(folder) / "random")
            record = Path(folder) / "random" / "run.json"
            record.write_text(run_of(subject).model_dump_json(), encoding="utf-8")
            plans = [Path(folder) / "random"]
        for plan in plans:
            result[plan.name] = measure_plan(subject, plan, groups)
    print_report(result, options.json)


if __name__ == "__main__":
    main()
