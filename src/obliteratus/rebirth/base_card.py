"""What the card of a base model says that stays true of an edited one: its license, its languages and its hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

from obliteratus.core.errors import UserError
from obliteratus.weights.organism import find_license
from obliteratus.weights.sources import locate

ORGANISM = "organism:"
KEPT = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")


def read_base_card(source: str, folder: Path | None) -> dict[str, Any]:
    """Return entries of the base's card, and ``base_model`` if the model was loaded by its hub id.

    folder: with the base's README.md, if there is one. A card that cannot be read says nothing.
    """
    if source.startswith(ORGANISM):
        return {"license": find_license(source.removeprefix(ORGANISM))}
    card = None if folder is None else folder / "README.md"
    kept: dict[str, Any] = {}
    if card is not None and card.is_file():
        try:
            found = vars(ModelCard.load(card, ignore_metadata_errors=True).data)
        except (YAMLError, ValueError, UnicodeDecodeError):
            found = {}
        kept = {key: found[key] for key in KEPT if found.get(key)}
    return kept | ({"base_model": source} if is_hub_id(source) else {})


def is_hub_id(source: str) -> bool:
    """Return whether a source names a model on the hub, and not a place on this machine."""
    try:
        return not locate(source).local
    except UserError:
        return False
