"""Broken inputs of every kind: each must give a clear line or a right result, never a traceback.

    python -m bench.fuzz [--cases 10000] [--kind NAME] [--seed 0] [--smoke]

A case is a valid input with a few seeded mutations. Every exception but a UserError of one line is a finding; the input
that caused it is written to the folder that is printed. Exits with 1 if there are findings.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import format_rows, make_parser, say
from bench.mutations import VALUES, Mutate, mutate_bytes, mutate_json, mutate_toml
from obliteratus.core.errors import UserError
from obliteratus.core.noise import hush_libraries
from obliteratus.core.toml import parse_overrides
from obliteratus.judge.behavior import load_behavior
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.presets import list_methods
from obliteratus.pipeline.recipe import check_runs, load_recipe
from obliteratus.prompts.sources import read_source

SMOKE_CASES = 40
GROUPS = ("target", "control")


@dataclass(frozen=True)
class Kind:
    """A kind of input."""

    seeds: Mapping[str, bytes]
    """Valid inputs by file name."""
    mutate: Callable[[str], Mutate]
    """Returns how a file of that name is changed."""
    use: Callable[[Path], object]
    """Does with a file what the program does."""


@dataclass
class Outcome:
    """What became of the cases of one kind."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    """Place of the exception → cases."""
    seconds: float = 0.0


# ------------------------------------------------------------------------------------------------- kinds
def prompt_files() -> Kind:
    """Return text, JSON, CSV and TSV files."""
    rows = [{"prompt": "How deep is the sea?", "category": "x", "split": "fit"}, {"prompt": "b", "system": "s"}]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    alpaca = [{"instruction": "Translate.", "input": "Hallo", "output": "x"}, {"instruction": "Count.", "input": ""}]
    seeds = {
        "a.txt": b"How deep is the sea?\nWhat is ice?\n\nWho sings?\n",
        "a.json": json.dumps(rows).encode(),
        "alpaca.json": json.dumps(alpaca).encode(),
        "turns.json": json.dumps([{"messages": turns}, {"messages": turns[2:]}]).encode(),
        "a.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "a.csv": b'prompt,category\n"How deep, how wide?",x\nb,y\n',
        "semicolon.csv": b"id;Goal\n1;a\n2;b\n",
        "a.tsv": b"prompt\tsplit\na\tfit\nb\treport\n",
    }
    return Kind(
        seeds,
        lambda name: mutate_json if name.endswith(".json") else mutate_bytes,
        lambda path: read_source(str(path), "target"),
    )


def recipes() -> Kind:
    """Return the recipes of all methods."""
    folder = Path(sys.modules["obliteratus"].__path__[0]) / "recipes"
    seeds = {f"{name}.toml": (folder / f"{name}.toml").read_bytes() for name in list_methods()}
    return Kind(seeds, lambda name: mutate_toml, _use_recipe)


def _use_recipe(path: Path) -> object:
    recipe = load_recipe(path)
    check_runs(recipe, GROUPS)
    return recipe


def behaviors() -> Kind:
    """Return behavior files of a user, as small as they usually are."""
    own = b"""about = "Says that it cannot act."
first_words = ["I"]
[en]
modal = "(?:can|could)"
opening = ["I {modal} not", "sorry"]
anywhere = ["as an AI"]
"""
    length = b'about = "Says too much."\nlonger_than = 80\n'
    return Kind(
        {"own.toml": own, "length.toml": length},
        lambda name: mutate_toml,
        lambda path: Judge(load_behavior(str(path))).judge_answer("I can not do that, as an AI."),
    )


def changes() -> Kind:
    """Return values of --set, each on a line."""
    paths = [f"{path}={value}" for path in _paths() for value in ("0.5", '"x"', "[1]", "{use='svd'}", "-1")]
    return Kind({"set.txt": "\n".join(paths).encode()}, lambda name: _draw_line, _use_changes)


def _paths() -> list[str]:
    names = ("excise.strength", "excise.parts", "excise.layers", "weigh.0.floor", "verify.0.tokens", "distill.0.use")
    return [*names, "probe.position", "passes", "seed", "judge.behavior", "search.trials", "verify", "distill.9.k", ""]


def _draw_line(data: bytes, draw: random.Random) -> bytes:
    line = draw.choice(data.split(b"\n"))
    if draw.random() < 0.4:
        return f"{line.decode().partition('=')[0]}={draw.choice(VALUES)!r}".encode("utf-8", "replace")
    return mutate_bytes(line, draw)


def _use_changes(path: Path) -> object:
    pair = path.read_bytes().decode("utf-8", "replace")
    recipe = load_recipe("advanced", parse_overrides([pair]))
    check_runs(recipe, GROUPS)
    return recipe


def plans() -> Kind:
    """Return a plan for a tiny model; both of its files are changed in turn."""
    from tests.support.plans import random_plan
    from tests.support.tiny import tiny_subject

    from obliteratus.excise.live.hooks import applied
    from obliteratus.excise.plan import FILES, check_fits, load_plan, save_plan
    from obliteratus.inference.logits import first_token_log_probs

    subject = tiny_subject("llama")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-plan-"))
    save_plan(random_plan(subject, anchored=True), folder)

    def use(path: Path) -> object:
        for name in FILES:
            shutil.copy(path if path.name == name else folder / name, path.parent / "plan" / name)
        plan = load_plan(path.parent / "plan")
        check_fits(subject, plan)
        with applied(subject, plan):
            return first_token_log_probs(subject, [[1, 2, 3]])

    seeds = {name: (folder / name).read_bytes() for name in FILES}
    return Kind(seeds, lambda name: mutate_json if name.endswith(".json") else mutate_header, use)


def tokenizers() -> Kind:
    """Return the files of a tiny tokenizer with its template; each is changed in turn."""
    from tests.support.tiny import tiny, tiny_tokenizer

    from obliteratus.core.chat import DEFAULT_CHAT
    from obliteratus.summon.chat_format import find_template, read_traits
    from obliteratus.summon.load import load_config_and_tokenizer
    from obliteratus.weights.sources import locate

    folder = Path(tempfile.mkdtemp(prefix="fuzz-tokenizer-"))
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

    def use(path: Path) -> object:
        work = path.parent / "tokenizer"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work, ignore=shutil.ignore_patterns("*.safetensors"))
        shutil.copy(path, work / path.name)
        _, tokenizer = load_config_and_tokenizer(locate(work), {})
        template = find_template(tokenizer, DEFAULT_CHAT)
        return read_traits(tokenizer, template) if template else tokenizer

    names = ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "config.json", "generation_config.json")
    seeds = {name: (folder / name).read_bytes() for name in names}
    return Kind(seeds, lambda name: mutate_json if name.endswith(".json") else mutate_bytes, use)


def safetensors_headers() -> Kind:
    """Return the weights of a tiny model, with changes of the header mostly."""
    from tests.support.tiny import tiny

    from obliteratus.weights.checkpoint import open_checkpoint

    model = tiny("llama")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-weights-"))
    model.save_pretrained(folder)

    def use(path: Path) -> object:
        work = path.parent / "weights"
        work.mkdir(exist_ok=True)
        shutil.copy(folder / "config.json", work / "config.json")
        shutil.copy(path, work / "model.safetensors")
        found = open_checkpoint(str(work), model)
        return [found.read(key) for file in found.shards.values() for key in file.entries]

    return Kind({"model.safetensors": (folder / "model.safetensors").read_bytes()}, lambda name: mutate_header, use)


def gguf_headers() -> Kind:
    """Return a tiny GGUF file, with changes of the header mostly."""
    from tests.support.gguf_files import write_gguf

    from obliteratus.weights.sources import check_gguf

    file = write_gguf(Path(tempfile.mkdtemp(prefix="fuzz-gguf-")) / "tiny.gguf")
    return Kind({"tiny.gguf": file.read_bytes()}, lambda name: _mutate_start, check_gguf)


def mutate_header(data: bytes, draw: random.Random) -> bytes:
    """Change a safetensors file: mostly the values in its header, with its length put right, else any bytes."""
    if draw.random() < 0.3:
        return _mutate_start(data, draw)
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _mutate_start(data: bytes, draw: random.Random) -> bytes:
    """Change bytes of the first 4 kB, or cut the file short."""
    if draw.random() < 0.1:
        return data[: draw.randrange(len(data))]
    return mutate_bytes(data[:4096], draw) + data[4096:]


KINDS: dict[str, Callable[[], Kind]] = {
    "prompt files": prompt_files,
    "recipes": recipes,
    "behaviors": behaviors,
    "--set": changes,
    "plans": plans,
    "tokenizers": tokenizers,
    "safetensors": safetensors_headers,
    "gguf": gguf_headers,
}


# ------------------------------------------------------------------------------------------------- running
def fuzz(kind: Kind, cases: int, seed: int, folder: Path) -> Outcome:
    """Try so many cases, and keep the first input of each finding in the folder."""
    outcome, start, names = Outcome(), time.perf_counter(), sorted(kind.seeds)
    (folder / "plan").mkdir(parents=True, exist_ok=True)
    for number in range(cases):
        draw = random.Random(f"{seed} {number}")
        name = names[number % len(names)]
        path = folder / name
        path.write_bytes(kind.mutate(name)(kind.seeds[name], draw))
        outcome.cases += 1
        try:
            kind.use(path)
            outcome.read += 1
        except UserError as error:
            outcome.refused += 1
            if "\n" in str(error):
                _keep(outcome, f"a message of several lines: {str(error)[:60]!r}", path, number)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is a finding
            place = traceback.extract_tb(error.__traceback__)[-1]
            _keep(outcome, f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}", path, number)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _keep(outcome: Outcome, what: str, path: Path, number: int) -> None:
    outcome.findings[what] += 1
    if outcome.findings[what] == 1:
        shutil.copy(path, path.with_name(f"finding-{number}-{path.name}"))
        (path.parent / f"finding-{number}.txt").write_text(f"{what}\n{traceback.format_exc()}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row for each kind, and exit with 1 if anything was found."""
    parser = make_parser(__doc__, "try fewer cases")
    parser.add_argument("--cases", type=int, default=10_000, help="cases of each kind")
    parser.add_argument("--kind", default="", help="one kind, or all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    hush_libraries()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    cases = SMOKE_CASES if options.smoke else options.cases
    outcomes = {}
    for name in [options.kind] if options.kind else KINDS:
        say(f"{name} …")
        outcomes[name] = fuzz(KINDS[name](), cases, options.seed, folder / name.strip("-").replace(" ", "-"))
        for what, count in outcomes[name].findings.most_common():
            say(f"  {count} × {what}")
    rows = [
        [name, str(o.cases), str(o.read), str(o.refused), str(sum(o.findings.values())), f"{o.seconds:.0f}"]
        for name, o in outcomes.items()
    ]
    print(format_rows(["kind", "cases", "read", "refused in one line", "tracebacks", "seconds"], rows))
    if any(o.findings for o in outcomes.values()):
        raise SystemExit(f"findings are in {folder}")


if __name__ == "__main__":
    main()
