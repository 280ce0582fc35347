"""Compare the weights that Heretic 1.4 exports with those of the method `heretic` at the same parameters.

    python -m bench.heretic_weights [--trials 10] [--prompts 24] [--tokens 12] [--seed 0] [--smoke] [--json]

Heretic runs a study with its defaults on the organism, and exports the trial of its front with the fewest refusals.
Its parameters come from the journal. Printed is ‖ours − theirs‖ / ‖theirs − unedited‖ by norm rule, over all edited
matrices and over those of the last layer: Heretic takes the last layer's direction behind the final norm, as
transformers gives the last hidden state, and ours is taken before it. --smoke compares nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from bench.common import make_parser, say
from bench.heretic import export_trial, first_prompts, run_heretic
from bench.heretic_setup import CHECKPOINTS, StudySettings, is_installed
from obliteratus.core.norms import NormRule
from obliteratus.core.settings import Excise, Step
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.excise.change import edit_module_weight
from obliteratus.excise.plan import plan_edits
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.summon.load import open_subject
from obliteratus.weigh import weigh_sites
from obliteratus.weights.matrices import read_weight
from obliteratus.weights.organism import prepare_organism

PARTS = {"attn.o_proj": "attn.out", "mlp.down_proj": "mlp.out"}  # Heretic's components and our parts


def read_parameters(work: Path, number: int) -> dict[str, Any]:
    """Return the direction index (None: each layer its own) and the kernels of a trial, counted from 1."""
    storage = JournalStorage(JournalFileBackend(str(next((work / CHECKPOINTS).glob("*.jsonl")))))
    trial = optuna.load_study(study_name=optuna.get_all_study_names(storage)[0], storage=storage).trials[number - 1]
    return {name: trial.user_attrs[name] for name in ("direction_index", "parameters")}


def make_plans(subject: Subject, fit: PromptSet, parameters: Mapping[str, Any]) -> dict[str, Plan]:
    """Return our plan at Heretic's parameters under each norm rule."""
    acts, last = collect_activations(subject, fit), subject.n_layers - 1
    steps = [Step(use="mean_diff"), Step(use="orthogonal_to_control")]
    if parameters["direction_index"] is not None:
        steps.append(Step(use="interpolate", at=parameters["direction_index"] / last))
    weigh = [make_tent(part, parameters["parameters"][name], last) for name, part in PARTS.items()]
    found = find_directions(acts, steps)
    weights = weigh_sites(found, subject.sites, acts, weigh)
    return {rule: plan_edits(subject, found, weights, acts, Excise(norm=rule)) for rule in get_args(NormRule)}


def make_tent(part: str, kernel: Mapping[str, float], last: int) -> Step:
    """Return the step for one of Heretic's kernels, whose positions are layers and whose weights are absolute."""
    peak, reach = (kernel[name] / last for name in ("max_weight_position", "min_weight_distance"))
    least = kernel["min_weight"] / kernel["max_weight"]
    return Step(use="tent", part=part, max_weight=kernel["max_weight"], peak=peak, min_weight=least, reach=reach)


def compare_weights(subject: Subject, theirs: Subject, plan: Plan) -> dict[str, float]:
    """Return ‖ours − theirs‖ / ‖theirs − unedited‖ over all edited matrices, those below the last layer, and those of
    the last."""
    squares = {"all": [0.0, 0.0], "below the last layer": [0.0, 0.0], "last layer": [0.0, 0.0]}
    for changes in plan.by_site().values():
        site = changes[0].site
        before, after = (read_weight(s.module(site.path), site) for s in (subject, theirs))
        error = float((edit_module_weight(subject.module(site.path), changes) - after).norm()) ** 2
        size = float((after - before).norm()) ** 2
        place = "last layer" if site.layer == subject.n_layers - 1 else "below the last layer"
        for name in ("all", place):
            squares[name] = [squares[name][0] + error, squares[name][1] + size]
    return {name: (error / size) ** 0.5 for name, (error, size) in squares.items() if size}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study, export a trial and compare its weights."""
    parser = make_parser(__doc__)
    parser.add_argument("--trials", type=int, default=10, help="trials of the study")
    parser.add_argument("--prompts", type=int, default=24, help="prompts of each group, to fit on and to judge on")
    parser.add_argument("--tokens", type=int, default=12, help="tokens of each answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the study")
    options = parser.parse_args(argv)
    if options.smoke:
        say(f"Heretic is {'' if is_installed() else 'not '}installed; a smoke run compares nothing")
        return
    splits = split_prompts(load_prompts("organism:astronomy", "organism:astronomy"), 0)
    fit, search, _ = (first_prompts(part, options.prompts) for part in splits)
    model, settings = prepare_organism("astronomy"), StudySettings(options.tokens, options.trials, options.seed)
    with tempfile.TemporaryDirectory(prefix="heretic-") as folder:
        work, edited = Path(folder) / "study", Path(folder) / "edited"
        study = run_heretic(model, fit, search, settings, work)
        best = min(study.front, key=lambda t: (t.refusals, t.kl))
        export_trial(study, best.number, edited)
        parameters = read_parameters(work, best.number)
        subject, theirs = open_subject(str(model)), open_subject(str(edited))
        plans = make_plans(subject, fit, parameters)
        result = {rule: compare_weights(subject, theirs, plan) for rule, plan in plans.items()}
    print(json.dumps(result, indent=1) if options.json else format_result(parameters, result))


def format_result(parameters: Mapping[str, Any], result: Mapping[str, Mapping[str, float]]) -> str:
    """Return the comparison as text."""
    index = parameters["direction_index"]
    lines = [f"direction index {'per layer' if index is None else f'{index:.2f}'}"]
    for rule, shares in result.items():
        lines.append(f"{rule}: " + ", ".join(f"{name} {share:.2e}" for name, share in shares.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
