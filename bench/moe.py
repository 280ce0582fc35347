"""Edits of a mixture of experts, compared: attention alone, all experts alike, each by itself. One run, one baseline.

    python -m bench.moe [--quick] [--json] [--method NAME] [--model organism:astronomy-moe]

Held-out prompts of the organism. Rows differ in what of the model is edited and how experts are told apart; the
directions, layers and strength are the method's. --quick: every second report prompt, answers of 24 tokens.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from bench.common import say
from bench.methods import SHORT, halved, one, table
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.prompts import load_prompts
from obliteratus.summon.load import open_subject

ATTENTION, EXPERTS = {"excise.parts": ["attn.out"]}, {"excise.parts": ["mlp.out"]}
ROUTERS = {"excise.parts": ["attn.out", "mlp.out", "router"]}
CASES: dict[str, dict[str, Any]] = {
    "attention only": ATTENTION,
    "experts only, alike": EXPERTS,
    "attention and experts, alike": {},
    "each expert its own direction": {"excise.experts": {"own": True}},
    "half of the experts": {"excise.experts": {"share": 0.5}},
    "half, each its own": {"excise.experts": {"share": 0.5, "own": True}},
    "half, the others at half strength": {"excise.experts": {"share": 0.5, "rest": 0.5}},
    "half, blended by 0.3": {"excise.experts": {"share": 0.5, "rest": 1.0, "blend": 0.3}},
    "and routers": ROUTERS,
}


def main() -> None:
    """Print the table, or the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--method", default="advanced")
    parser.add_argument("--model", default="organism:astronomy-moe")
    options = parser.parse_args()
    subject, every = open_subject(options.model), load_prompts("organism:astronomy", "organism:astronomy")
    prompts, shorter = (halved(every), {"verify": SHORT}) if options.quick else (every, {})
    known: dict[str, Any] = {}
    rows = {}
    for name, changes in CASES.items():
        say(f"{name} …")
        rows[name] = one(load_recipe(options.method, shorter | changes), subject, prompts, known)
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
