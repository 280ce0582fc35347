"""A new extractor as a plug-in: the difference of trimmed means, which a few odd prompts cannot turn.

Any command takes it: ``obliteratus run MODEL --plugin own_extractor.py --method mine.toml …``, where mine.toml says
``use = "trimmed_diff"`` among its distill steps. Run as a script, this file tries it.
"""

from typing import Annotated

import torch
from pydantic import Field

import obliteratus as ob


@ob.extractors.register("trimmed_diff", needs=("rows",))
def trimmed_diff(
    acts: ob.Activations, previous: ob.Directions | None, *, trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
) -> ob.Directions:
    """Find the difference of means without the highest and lowest ``trim`` of prompts in each coordinate."""

    def middle(group: str) -> torch.Tensor:
        rows = acts[group].rows.sort(dim=0).values  # [prompts, streams, width]
        cut = int(trim * len(rows))
        return rows[cut : len(rows) - cut].mean(0)

    return ob.Directions.from_vectors(middle("target") - middle("control"))


if __name__ == "__main__":
    subject = ob.open_subject("organism:astronomy")
    prompts = ob.load_prompts(target="organism:astronomy", control="organism:astronomy")
    steps = [{"use": "trimmed_diff", "trim": 0.2}, {"use": "orthogonal_to_control"}]
    recipe = ob.load_recipe("lean", {"distill": steps, "verify": [{"use": "behavior", "tokens": 16}], "passes": 1})
    result = ob.run(recipe, subject, prompts)
    print(result.run.before["refusal.target"], "→", result.run.after["refusal.target"])
