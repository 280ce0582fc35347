"""docs/architectures.md: what each architecture in the table supports."""

from __future__ import annotations

from itertools import chain

from bench.common import format_rows
from obliteratus.core.settings import expand_part
from obliteratus.summon.architectures import ARCHITECTURES, UNSUPPORTED, Architecture, Branch, Matrix

COLUMNS = ["`model_type`", "mixers", "feed-forward", "writers", "behind a norm", "norms", "bias switch", "notes"]


def make_architectures_page(note: str) -> str:
    """Return the page. note: the line that says how the page is generated."""
    return f"""{note}
# The architectures

{format_rows(COLUMNS, [[f"`{name}`", *_cells(family)] for name, family in ARCHITECTURES.items()])}

Each row is one `config.model_type`, as `obliteratus/summon/architectures.py` declares it. The self-test checks each
claim on a tiny random model (`tests/summon/`), and `tests/excise/test_executors.py` checks that live edits, baked
weights and the saved and reloaded model agree.

*Writers* are the matrices that edits reach, by part. `attn.out` is the output of any mixer; `mlp.out` in a recipe
includes `expert.out` (routed experts) and `shared.out`. A stack holds all experts in one tensor, with its sizes in
this order. *Behind a norm* lists parts whose norm's gain is folded into the directions. *Bias switch* is the
configuration key that lets `--save merged` store the bias of an anchored edit where the model has none; without it,
such plans can only run live. All embeddings are writers too. Readers are `attn.in`, `mlp.in` (of experts too),
`router` and `unembed`.

*Stacks* cannot be saved as adapters, nor can the state spaces of `falcon_h1` and `nemotron_h`, which PEFT refuses;
save these merged or as a plan. *Recurrent states*: a shared prefix is not reused, and only prompts of equal length
are answered together, since padding would enter the states. *Has vision*: the text model inside is edited, and
prompts are text.

## Examined and not supported
{format_rows(["`model_type`", "reason"], [[f"`{name}`", reason] for name, reason in UNSUPPORTED.items()])}

Some configurations of supported architectures are refused as well, with the reason: GPT-2 with cross-attention; OPT
with projections around its blocks, with norms after them or without a final norm; Gemma 4 with `enable_moe_block`.
"""


def _cells(family: Architecture) -> list[str]:
    sources: list[Architecture | Branch] = [family, *chain(*family.branches)]
    writers = {part: Matrix(*matrix) for source in sources for part, matrix in source.writers.items()}
    return [
        _names(family, "attn.out", "attention"),
        _names(family, expand_part("mlp.out"), "MLP"),
        ", ".join(f"`{part}`{_layout(matrix)}" for part, matrix in writers.items()),
        ", ".join(sorted({f"`{part}`" for source in sources for part in source.post_norm})) or "–",
        {"rms": "RMS", "rms+1": "RMS, 1 + w", "layer": "LayerNorm"}[family.norm],
        ", ".join(f"{name} (`{key}`)" for name, key in family.bias_switch.items()) or "–",
        _notes(family) or "–",
    ]


def _names(family: Architecture, parts: str | tuple[str, ...], plain: str) -> str:
    """Return the kinds of modules that write these parts."""
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
    notes = {
        "recurrent states": family.recurrent,
        "has vision": "language_model" in family.layers,
        "reads the stream without a norm": not family.pre_norm and not any(b.pre_norm for b in chain(*family.branches)),
        "blocks scale the stream": family.scales_stream,
        "biases of experts, whose weights sum to 1": family.routing_sums_to_one,
    }
    return ", ".join(note for note, applies in notes.items() if applies)
