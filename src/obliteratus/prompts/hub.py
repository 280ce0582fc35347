"""Find the files of a public data set on the hub: its configurations, their splits, and the revision."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from obliteratus.core.choices import PROMPT_SUFFIXES
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note

CONVERTED = "refs/convert/parquet"  # the hub's own conversion, CONFIGURATION/SPLIT/0000.parquet
SHARD = re.compile(r"[-_.]?\d{4,}(-of-\d+)?$")
USUAL_SPLITS = ("train", "test", "validation", "valid", "val", "dev")

Layout = Mapping[str, Mapping[str, Sequence[str]]]
"""Configuration → split → files."""


@dataclass(frozen=True)
class HubFiles:
    """What a source such as ``hub:owner/name:config:split`` stands for."""

    source: str
    """The source with the commit, configuration and split that were taken."""
    paths: Sequence[Path]
    column: str


def fetch_hub_files(source: str) -> HubFiles:
    """Download the files of ``hub:owner/name[@revision][:configuration][:split][:column]``.

    A configuration may be left out if there is one only, a split if there is one only or ``train``. Raises UserError
    with the configurations and splits that there are.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    name, *parts = source.removeprefix("hub:").split(":")
    name, _, revision = name.partition("@")
    try:
        commit, layout = _look_up(name, revision)
        configuration, split, column = choose_files(source, layout, parts)
        paths = [
            Path(hf_hub_download(name, file, repo_type="dataset", revision=commit))
            for file in layout[configuration][split]
        ]
    except (HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, OSError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{source}: the hub cannot be reached ({cause[:160]}); give a local file") from error
    return HubFiles(f"hub:{name}@{commit}:{configuration}:{split}", paths, column)


def _look_up(name: str, revision: str) -> tuple[str, Layout]:
    """Return the commit and the layout: of the hub's conversion, which names configurations and splits alike for all
    data sets, or of the owner's files where there is none or another revision is asked for."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    if not revision:
        with suppress(RevisionNotFoundError):
            info = HfApi().dataset_info(name, revision=CONVERTED)
            if layout := lay_out_converted([file.rfilename for file in info.siblings or []]):
                return str(info.sha), layout
    info = HfApi().dataset_info(name, revision=revision or None)
    card = vars(info.card_data) if info.card_data else {}
    return str(info.sha), lay_out_files([file.rfilename for file in info.siblings or []], card)


def lay_out_converted(files: Sequence[str]) -> Layout:
    """Return configurations and splits of the hub's conversion. A split that it cut short is called partial-…"""
    layout: dict[str, dict[str, list[str]]] = {}
    for file in sorted(f for f in files if f.endswith(".parquet") and f.count("/") == 2):
        configuration, split, _ = file.split("/")
        layout.setdefault(configuration, {}).setdefault(split, []).append(file)
    return layout


def lay_out_files(files: Sequence[str], card: Mapping[str, Any]) -> Layout:
    """Return configurations and splits as the data set's card lists them, or else by folders and file names."""
    data = sorted(f for f in files if f.lower().endswith(PROMPT_SUFFIXES[1:]) and not f.startswith("."))
    layout: dict[str, dict[str, list[str]]] = {}
    for entry in card.get("configs") or []:
        listed = entry.get("data_files") or []
        listed = [{"split": "train", "path": listed}] if isinstance(listed, str) else listed
        for item in listed:
            item = {"split": "train", "path": item} if isinstance(item, str) else item
            patterns = [item["path"]] if isinstance(item["path"], str) else item["path"]
            found = [f for f in data if any(fnmatch(f, pattern.removeprefix("./")) for pattern in patterns)]
            layout.setdefault(str(entry.get("config_name", "default")), {}).setdefault(item["split"], []).extend(found)
    return layout or _lay_out_by_name(data)


def _lay_out_by_name(files: Sequence[str]) -> Layout:
    layout: dict[str, dict[str, list[str]]] = {}
    for file in files:
        path = PurePosixPath(file)
        stem = SHARD.sub("", path.stem) or path.stem
        folders = [part for part in path.parent.parts if part not in ("data", *USUAL_SPLITS)]
        usual = [part for part in (*path.parent.parts, *re.split(r"[-_.]", stem)) if part in USUAL_SPLITS]
        layout.setdefault("/".join(folders) or "default", {}).setdefault(usual[-1] if usual else stem, []).append(file)
    return layout


def choose_files(source: str, layout: Layout, parts: Sequence[str]) -> tuple[str, str, str]:
    """Return configuration, split and column that the parts behind the name stand for, each of which may be left out.

    Raises UserError, with what there is, if it is not clear which files are meant.
    """
    if not layout:
        raise UserError(f"{source}: the data set has no {', '.join(PROMPT_SUFFIXES[1:])} file; give another")
    rest = list(parts)
    if rest and rest[0] in layout:
        configuration = rest.pop(0)
    elif len(layout) == 1:
        (configuration,) = layout
    else:
        raise UserError(f"{source}: name one of its configurations, {_list(layout)}, as hub:owner/name:CONFIGURATION")
    splits = layout[configuration]
    if rest and rest[0] in splits:
        split = rest.pop(0)
    elif len(splits) == 1 or "train" in splits:
        split = "train" if "train" in splits else next(iter(splits))
        if len(splits) > 1:
            note("prompts", f"{source}: the split train is taken, of {_list(splits)}")
    else:
        raise UserError(f"{source}: name one of its splits, {_list(splits)}, as hub:owner/name:{configuration}:SPLIT")
    if len(rest) > 1:
        raise UserError(
            f"{source}: there is no '{rest[0]}'; configurations: {_list(layout)}; splits of {configuration}: "
            f"{_list(splits)}"
        )
    return configuration, split, rest[0] if rest else ""


def _list(names: Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
