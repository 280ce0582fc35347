"""Studies of the earlier program, in YAML, as studies of this one: every key is taken over, named, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error, unknown_name
from obliteratus.core.settings import FrozenModel, Step
from obliteratus.core.toml import dump_toml
from obliteratus.study.files import list_studies, load_study, parse_study
from obliteratus.study.settings import Data, Study

STRATEGIES = {
    "layer_removal": "layers",
    "ffn_ablation": "ffn",
    "head_pruning": "heads",
    "embedding_ablation": "embeddings",
}
PARAMS = {"embeddings": {"chunk_size": "chunk"}}  # of the strategies that have any
LAYERS = ("layers", "layer_indices")  # parameters of its examples that its strategies did not heed
PRESETS = {"jailbreak": "refusal", "guardrail": "refusal"}  # all others bear the same name here
LENGTH, SPLIT = 512, "test"  # its defaults
FILES = (".txt", ".jsonl", ".csv", ".parquet")


class _Model(FrozenModel):
    model_config = ConfigDict(protected_namespaces=())
    name: str
    task: Literal["causal_lm"] = "causal_lm"  # a classifier's study has no counterpart, and is refused here
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    num_labels: int | None = None


class _Data(FrozenModel):
    name: str = ""
    split: str = SPLIT
    subset: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    max_samples: int | None = Field(None, ge=1)


class _Strategy(FrozenModel):
    name: str
    params: dict[str, Any] | None = None


class _Yaml(FrozenModel):
    """What its files say."""

    model: _Model
    dataset: _Data = _Data()
    strategies: tuple[_Strategy, ...] | None = None
    metrics: tuple[str, ...] | None = None
    batch_size: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=2)
    output_dir: str = ""
    preset: str | None = None
    study_preset: str | None = None
    remote: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_preset(self) -> _Yaml:
        if self.preset and self.study_preset and self.preset != self.study_preset:
            raise ValueError("preset and study_preset name two studies; leave one out")
        if not self.preset and not self.study_preset and not self.strategies:
            raise ValueError("it names neither strategies nor a preset, so nothing would be knocked out; add one")
        return self


def convert(source: Path) -> tuple[Study, list[str]]:
    """The study, and a line for each thing of the file that is not in it, or not as it was.

    UserError for a file that is missing or no YAML, and for keys, strategies and parameters that mean nothing here.
    """
    try:
        old = _Yaml(**_read(source))
    except ValidationError as error:
        raise UserError(f"{source}: {explain_validation_error(error)}") from error
    notes: list[str] = []
    base = _preset(old, notes, source)
    length = old.max_length or (base.data.length if base else LENGTH)
    samples = old.dataset.max_samples or (base.data.samples if base else None)
    texts = {"texts": _texts(old.dataset, notes), "length": length}
    made = {
        "name": source.stem,
        "model": old.model.name,
        "dtype": old.model.dtype,
        "output": old.output_dir,
        "data": texts | ({"samples": samples} if samples else {}),
        "strategies": _strategies(old, notes, source) or (base.strategies if base else ()),
        "metrics": _metrics(old, notes, source) or (base.metrics if base else (Step(use="perplexity"),)),
        "batch": old.batch_size * length if old.batch_size else (base.batch if base else 0),
    }
    if samples is None:
        notes.append(f"dataset.max_samples: not given, and it took every text; here {Data().samples} are, at most")
    return parse_study(made, str(source)), notes + _left(old)


def as_toml(made: Study, notes: Sequence[str], source: Path) -> str:
    """The study file, behind what it was made of and what was left out."""
    said = [f"Made from {source.name} by 'obliteratus study-from-yaml'.", *(f"Not as it was: {n}" for n in notes)]
    return "\n".join(f"# {' '.join(line.split())}" for line in said) + "\n" + dump_toml(made)


# --------------------------------------------------------------------------------------------- parts
def _preset(old: _Yaml, notes: list[str], source: Path) -> Study | None:
    """What fills all that the file leaves open."""
    name = old.preset or old.study_preset
    if not name:
        return None
    known = {n: n for n in list_studies() if n != "refusal"} | PRESETS
    if name not in known:
        raise UserError(f"{source}: {unknown_name('preset', name, known)}")
    made = load_study(known[name])
    notes.append(f"preset '{name}': what the file leaves open is as in the study '{known[name]}' of this program")
    if known[name] == "refusal" and old.metrics is None:
        notes.append(f"preset '{name}': it measured perplexity alone; answers need --target and --control")
    return made


def _strategies(old: _Yaml, notes: list[str], source: Path) -> list[Step]:
    made = []
    for place, step in enumerate(old.strategies or ()):
        where = f"{source}: strategies.{place}"
        if step.name not in STRATEGIES:
            raise UserError(f"{where}: {unknown_name('strategy', step.name, STRATEGIES)}")
        use = STRATEGIES[step.name]
        made.append(Step(use=use, **_options(use, step.params or {}, where, notes)))
    return made


def _options(use: str, params: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    names = PARAMS.get(use, dict.fromkeys(LAYERS, "layers"))
    options: dict[str, Any] = {}
    for key, value in params.items():
        if key not in names:
            raise UserError(f"{where}.params: {unknown_name('parameter', key, names)}")
        if value is None:  # as if it were not there
            continue
        if names[key] in options:
            raise UserError(f"{where}.params: '{key}' says again what '{names[key]}' says; leave one out")
        options[names[key]] = value
        if key in LAYERS:
            notes.append(f"strategies: {use} is held to the blocks {value}, which the earlier program did not heed")
    return options


def _metrics(old: _Yaml, notes: list[str], source: Path) -> list[Step]:
    made = []
    for name in old.metrics or ():
        if name in ("accuracy", "f1", "macro_f1"):
            notes.append(
                f"metrics: {name} was a classifier's; for questions with choices add data.labelled and accuracy"
            )
        elif name != "perplexity":
            raise UserError(f"{source}: {unknown_name('metric', name, ['perplexity', 'accuracy', 'f1'])}")
        else:
            made.append(Step(use=name))
    return made


def _texts(data: _Data, notes: list[str]) -> str:
    """Where texts are read from, as `Data.texts` says it."""
    if not data.name:
        return ""
    if Path(data.name).suffix in FILES:
        notes.extend(f"dataset.{key}: a file has none" for key in ("subset", "text_column") if data.model_dump()[key])
        return data.name
    split = data.split
    if data.subset:
        split = f"{data.subset}/{data.split}"
        notes.append(f"dataset.subset: the set's files with '{split}' in their path are read; see that there are such")
    return f"hub:{data.name}:{split}" + (f":{data.text_column}" if data.text_column else "")


def _left(old: _Yaml) -> list[str]:
    """What has no place in a study file."""
    model, data = old.model, old.dataset
    said = {
        f"model.device: give --device {model.device} to the command": model.device != "auto",
        "model.trust_remote_code: give --trust-remote-code to the command": model.trust_remote_code,
        "model.num_labels: a classifier's; this is a language model's study": model.num_labels is not None,
        "dataset.label_column: a classifier's; this is a language model's study": data.label_column is not None,
        f"remote: {', '.join(old.remote or {})}: run the command there, or give --ray ADDRESS": bool(old.remote),
    }
    return [line for line, there in said.items() if there]


# ------------------------------------------------------------------------------------------- reading
def _read(source: Path) -> dict[str, Any]:
    """A YAML file's mapping. UserError where it is missing, no YAML, or says a key twice."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise UserError(f"{source}: YAML needs pyyaml; pip install 'obliteratus[yaml]'") from error
    if not source.is_file():
        raise UserError(f"{source}: no such study file; give a YAML file of the earlier program")
    try:
        text = source.read_text("utf-8-sig")
        _check_keys(yaml.compose(text, yaml.SafeLoader), source)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{source}: not a study; it must be a mapping with model and strategies")
    return data


def _check_keys(node: Any, source: Path) -> None:
    """YAML takes the last of two equal keys and says nothing."""
    if node is None or isinstance(node.value, str):
        return
    if node.id == "mapping":
        seen: set[str] = set()
        for key, value in node.value:
            if str(key.value) in seen:
                raise UserError(f"{source}:{key.start_mark.line + 1}: '{key.value}' stands twice; leave one out")
            seen.add(str(key.value))
            _check_keys(value, source)
    else:
        for value in node.value:
            _check_keys(value, source)
