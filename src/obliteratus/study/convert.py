"""Converts YAML studies of the earlier program to study files: each key is taken over, named in a note, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.registry import explain_validation_error
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
PARAMETERS = {"embeddings": {"chunk_size": "chunk"}}
LAYERS = ("layers", "layer_indices")  # parameters in its examples that its strategies ignored
PRESETS = {"jailbreak": "refusal", "guardrail": "refusal"}  # all others have the same name here
DEFAULT_LENGTH, DEFAULT_SPLIT = 512, "test"
TEXT_FILES = (".txt", ".jsonl", ".csv", ".parquet")


class _OldModel(FrozenModel):
    model_config = ConfigDict(protected_namespaces=())
    name: str
    task: Literal["causal_lm"] = "causal_lm"  # studies of classifiers have no counterpart and are refused here
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    num_labels: int | None = None


class _OldData(FrozenModel):
    name: str = ""
    split: str = DEFAULT_SPLIT
    subset: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    max_samples: int | None = Field(None, ge=1)


class _OldStrategy(FrozenModel):
    name: str
    params: dict[str, Any] | None = None


class _OldStudy(FrozenModel):
    """The content of a YAML study."""

    model: _OldModel
    dataset: _OldData = _OldData()
    strategies: tuple[_OldStrategy, ...] | None = None
    metrics: tuple[str, ...] | None = None
    batch_size: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=2)
    output_dir: str = ""
    preset: str | None = None
    study_preset: str | None = None
    remote: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_preset(self) -> _OldStudy:
        if self.preset and self.study_preset and self.preset != self.study_preset:
            raise ValueError("preset and study_preset name two studies; leave one out")
        if not self.preset and not self.study_preset and not self.strategies:
            raise ValueError("it names neither strategies nor a preset, so nothing would be knocked out; add one")
        return self


def convert_yaml(source: Path) -> tuple[Study, list[str]]:
    """Return the study of a YAML file, and a note for each setting that is dropped or changed.

    Raises UserError if the file is missing or not YAML, and for keys, strategies and parameters that do not exist.
    """
    try:
        old = _OldStudy(**_load_yaml(source))
    except ValidationError as error:
        raise UserError(f"{source}: {explain_validation_error(error)}") from error
    notes: list[str] = []
    preset = _load_preset(old, notes, source)
    length = old.max_length or (preset.data.length if preset else DEFAULT_LENGTH)
    samples = old.dataset.max_samples or (preset.data.samples if preset else None)
    texts = {"texts": _convert_texts(old.dataset, notes), "length": length}
    values = {
        "name": source.stem,
        "model": old.model.name,
        "dtype": old.model.dtype,
        "output": old.output_dir,
        "data": texts | ({"samples": samples} if samples else {}),
        "strategies": _convert_strategies(old, notes, source) or (preset.strategies if preset else ()),
        "metrics": _convert_metrics(old, notes, source) or (preset.metrics if preset else (Step(use="perplexity"),)),
        "batch": old.batch_size * length if old.batch_size else (preset.batch if preset else 0),
    }
    if samples is None:
        notes.append(f"dataset.max_samples: not given, which meant every text; here at most {Data().samples} are used")
    return parse_study(values, str(source)), notes + _dropped_settings(old)


def to_toml(study: Study, notes: Sequence[str], source: Path) -> str:
    """Return the study file, with its origin and the notes as comments at the top."""
    comments = [f"Made from {source.name} by 'obliteratus study --from-yaml'.", *(f"Differs: {n}" for n in notes)]
    return "\n".join(f"# {' '.join(line.split())}" for line in comments) + "\n" + dump_toml(study)


# --------------------------------------------------------------------------------------------- parts
def _load_preset(old: _OldStudy, notes: list[str], source: Path) -> Study | None:
    """Return the preset that provides all that the file does not set."""
    name = old.preset or old.study_preset
    if not name:
        return None
    known = {n: n for n in list_studies() if n != "refusal"} | PRESETS
    if name not in known:
        raise UserError(f"{source}: {unknown_name('preset', name, known)}")
    notes.append(f"preset '{name}': what the file does not set is taken from this program's study '{known[name]}'")
    if known[name] == "refusal" and old.metrics is None:
        notes.append(f"preset '{name}': it measured perplexity alone; refusal needs --target and --control")
    return load_study(known[name])


def _convert_strategies(old: _OldStudy, notes: list[str], source: Path) -> list[Step]:
    steps = []
    for number, step in enumerate(old.strategies or ()):
        where = f"{source}: strategies.{number}"
        if step.name not in STRATEGIES:
            raise UserError(f"{where}: {unknown_name('strategy', step.name, STRATEGIES)}")
        use = STRATEGIES[step.name]
        steps.append(Step(use=use, **_convert_parameters(use, step.params or {}, where, notes)))
    return steps


def _convert_parameters(use: str, parameters: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    names = PARAMETERS.get(use, dict.fromkeys(LAYERS, "layers"))
    options: dict[str, Any] = {}
    for key, value in parameters.items():
        if key not in names:
            raise UserError(f"{where}.params: {unknown_name('parameter', key, names)}")
        if value is None:  # the same as a missing key
            continue
        if names[key] in options:
            raise UserError(f"{where}.params: '{key}' sets '{names[key]}' a second time; leave one out")
        options[names[key]] = value
        if key in LAYERS:
            notes.append(f"strategies: {use} is restricted to the blocks {value}, which the earlier program ignored")
    return options


def _convert_metrics(old: _OldStudy, notes: list[str], source: Path) -> list[Step]:
    steps = []
    for name in old.metrics or ():
        if name in ("accuracy", "f1", "macro_f1"):
            notes.append(f"metrics: {name} was a classifier's; for multiple choice add data.labeled and accuracy")
        elif name != "perplexity":
            raise UserError(f"{source}: {unknown_name('metric', name, ['perplexity', 'accuracy', 'f1'])}")
        else:
            steps.append(Step(use=name))
    return steps


def _convert_texts(data: _OldData, notes: list[str]) -> str:
    """Return the source of the texts as `Data.texts` names it."""
    if not data.name:
        return ""
    if Path(data.name).suffix in TEXT_FILES:
        notes.extend(f"dataset.{key}: not for a file" for key in ("subset", "text_column") if data.model_dump()[key])
        return data.name
    split = data.split
    if data.subset:
        split = f"{data.subset}/{data.split}"
        notes.append(f"dataset.subset: files of the data set with '{split}' in their path are read; check that any do")
    return f"hub:{data.name}:{split}" + (f":{data.text_column}" if data.text_column else "")


def _dropped_settings(old: _OldStudy) -> list[str]:
    """Return notes on settings that a study file does not have."""
    model, data = old.model, old.dataset
    notes = {
        f"model.device: give --device {model.device} to the command": model.device != "auto",
        "model.trust_remote_code: give --trust-remote-code to the command": model.trust_remote_code,
        "model.num_labels: a classifier's; this is a language model's study": model.num_labels is not None,
        "dataset.label_column: a classifier's; this is a language model's study": data.label_column is not None,
        f"remote: {', '.join(old.remote or {})}: run the command there, or give --ray ADDRESS": bool(old.remote),
    }
    return [note for note, applies in notes.items() if applies]


# ------------------------------------------------------------------------------------------- reading
def _load_yaml(source: Path) -> dict[str, Any]:
    """Return a YAML file's mapping. Raises UserError if it is missing, not YAML, or has a key twice."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise UserError(f"{source}: YAML needs pyyaml; pip install 'obliteratus[yaml]'") from error
    if not source.is_file():
        raise UserError(f"{source}: no such study file; give a YAML file of the earlier program")
    try:
        text = source.read_text("utf-8-sig")
        _check_keys_unique(yaml.compose(text, yaml.SafeLoader), source)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{source}: not a study; it must be a mapping with model and strategies")
    return data


def _check_keys_unique(node: Any, source: Path) -> None:
    """Raise UserError for a repeated key, because YAML silently takes the last one."""
    if node is None or isinstance(node.value, str):
        return
    if node.id == "mapping":
        seen: set[str] = set()
        for key, value in node.value:
            if str(key.value) in seen:
                raise UserError(f"{source}:{key.start_mark.line + 1}: '{key.value}' comes twice; leave one out")
            seen.add(str(key.value))
            _check_keys_unique(value, source)
    else:
        for value in node.value:
            _check_keys_unique(value, source)
