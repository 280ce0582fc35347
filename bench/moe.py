"""Edits of a mixture of experts compared: attention alone, all experts alike, each by itself.

    python -m bench.moe [--quick | --smoke] [--json] [--method NAME] [--model organism:astronomy-moe]

All rows use the organism's held-out prompts and share one baseline. They differ in what of the model is edited and in
how experts are told apart; directions, layers and strength are the method's.
--quick uses every second report prompt and answers of 24 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from bench.common import make_parser, say
from bench.methods import format_table, measure_method, shorten_steps
from bench.organisms import shorten
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.prompts import load_prompts
from obliteratus.summon.load import open_subject

CASES: dict[str, dict[str, Any]] = {
    "attention only": {"excise.parts": ["attn.out"]},
    "experts only, alike": {"excise.parts": ["mlp.out"]},
    "attention and experts, alike": {},
    "each expert its own direction": {"excise.experts": {"own": True}},
    "half of the experts": {"excise.experts": {"share": 0.5}},
    "half, each its own": {"excise.experts": {"share": 0.5, "own": True}},
    "half, the others at half strength": {"excise.experts": {"share": 0.5, "rest": 0.5}},
    "half, blended by 0.3": {"excise.experts": {"share": 0.5, "rest": 1.0, "blend": 0.3}},
    "and routers": {"excise.parts": ["attn.out", "mlp.out", "router"]},
}
SMOKE_CASES = ("each expert its own direction", "half, blended by 0.3", "and routers")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table or the document."""
    parser = make_parser(__doc__, "use fewer and shorter answers")
    parser.add_argument("--method", default="two_directions", help="the method whose edits are compared")
    parser.add_argument("--model", default="organism:astronomy-moe", help="a mixture of experts")
    options = parser.parse_args(argv)
    subject = open_subject(options.model)
    prompts = load_prompts("organism:astronomy", "organism:astronomy")
    prompts, steps = shorten(prompts, options.quick, options.smoke), shorten_steps(options.quick, options.smoke)
    known: dict[str, Any] = {}
    rows = {}
    for name in SMOKE_CASES if options.smoke else CASES:
        say(f"{name} …")
        rows[name] = measure_method(load_recipe(options.method, steps | CASES[name]), subject, prompts, known)
    print(json.dumps(rows, indent=1) if options.json else format_table(rows))


if __name__ == "__main__":
    main()
