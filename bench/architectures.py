"""docs/architectures.md: what each architecture of the table supports, from the table itself."""

from __future__ import annotations

from itertools import chain

from obliteratus.core.settings import expand_part
from obliteratus.summon.architectures import ARCHITECTURES, UNSUPPORTED, Architecture, Branch, Matrix

TITLE = ["`model_type`", "mixers", "feed-forward", "writers", "behind a norm", "norms", "a bias to bake", "notes"]


def make_architectures_page(made: str) -> str:
    """made: the line that says that the page is made."""
    return f"""{made}
# The architectures

{_table([TITLE, ["---"] * len(TITLE), *([f"`{name}`", *_cells(family)] for name, family in ARCHITECTURES.items())])}

A row is one `config.model_type` and says what `obliteratus/summon/families.py` declares; the self-test tries each claim
on a tiny random model of it (`tests/test_anatomy.py`), and `tests/test_executors.py` that live edits, baked weights and
the saved model, loaded again, agree.

*Writers* are what edits reach, by part: `attn.out` is the mixer's output, whatever the mixer; `mlp.out` in a recipe
takes `expert.out` (routed) and `shared.out` in. A stack holds all experts in one tensor, with its sizes in this order.
*Behind a norm*: parts whose norm's gain is folded into the directions. *A bias to bake*: what anchored edits need for
`--save merged`, beside biases that a model has; elsewhere such plans run live. All embeddings are writers too. Readers
are `attn.in`, `mlp.in` (experts' too), `router` and `unembed`.

*Stacks* are not held by adapters here, nor are the state spaces of `falcon_h1` and `nemotron_h`, which PEFT refuses:
save those merged, or the plan. *Recurrent states*: a shared prefix is not reused, and prompts of equal length are
answered together, as padding would enter the states. *Sees*: the text model inside is edited, and prompts are text.

## Looked at and not supported
{_table([["`model_type`", "why"], ["---", "---"], *([f"`{name}`", why] for name, why in UNSUPPORTED.items())])}

Some configurations of these families are refused as well, with the reason: GPT-2 with cross-attention; OPT with
projections around its blocks, with norms behind them or without a final one; Gemma 4 with `enable_moe_block`.
"""


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(family: Architecture) -> list[str]:
    there: list[Architecture | Branch] = [family, *chain(*family.branches)]
    writers = {part: Matrix(*matrix) for one in there for part, matrix in one.writers.items()}
    half = [part for part in writers if part != "attn.out"]
    return [
        _names(family, "attn.out", "attention"),
        _names(family, expand_part("mlp.out"), "MLP"),
        ", ".join(f"`{part}`{_layout(matrix)}" for part, matrix in writers.items()) if half else "",
        ", ".join(sorted({f"`{part}`" for one in there for part in one.post_norm})) or "–",
        {"rms": "RMS", "rms+1": "RMS, 1 + w", "layer": "LayerNorm"}[family.norm],
        ", ".join(f"{name} (`{key}`)" for name, key in family.bias_switch.items()) or "–",
        _notes(family) or "–",
    ]


def _names(family: Architecture, parts: str | tuple[str, ...], plain: str) -> str:
    """The kinds of modules that write those parts."""
    wanted = {parts} if isinstance(parts, str) else set(parts)
    own = [plain] if wanted & set(family.writers) else []
    branches = [b.name for choice in family.branches for b in choice if wanted & set(b.writers)]
    if "latent attention" in {b.name for b in chain(*family.branches)}:
        own = ["latent attention"] if "attn.out" in wanted else own
    return ", ".join(dict.fromkeys([*own, *branches]))


def _layout(matrix: Matrix) -> str:
    sizes = {"stack": " [experts, out, in]", "stack_t": " [experts, in, out]", "conv1d": " [in, out]"}
    return sizes.get(matrix.layout, "")


def _notes(family: Architecture) -> str:
    said = {
        "recurrent states": family.recurrent,
        "sees": "language_model" in family.layers,
        "reads the bare stream": not family.pre_norm and not any(b.pre_norm for b in chain(*family.branches)),
        "blocks scale the stream": family.scales_stream,
        "biases of experts, whose weights sum to 1": family.routing_sums_to_one,
    }
    return ", ".join(note for note, true in said.items() if true)
