"""A plan compiled into weights: one matrix in memory at a time, computed in fp32, cast once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from obliteratus.errors import UserError
from obliteratus.excise.linear import edit_bias, edit_weight
from obliteratus.excise.plan import check_fits
from obliteratus.summon.codec import read_bias, read_weight, stored
from obliteratus.types import Edit, Plan, Site, Subject

Lazy = Callable[[], Tensor]


def baked(subject: Subject, plan: Plan) -> dict[str, Lazy]:
    """Edited parameters by name, each computed when it is called for, so that none need be held.

    Raises UserError where an anchored edit needs a bias and the module has none.
    """
    check_fits(subject, plan)
    result: dict[str, Lazy] = {}
    for path, edits in plan.by_site().items():
        module = subject.module(path)
        result[f"{path}.weight"] = _weight(module, edits)
        bias = new_bias(module, edits)
        if bias is not None:
            if read_bias(module, edits[0].site) is None:
                raise UserError(no_bias(edits[0].site))
            result[f"{path}.bias"] = _value(bias, module)
    return result


def no_bias(site: Site) -> str:
    """Why an anchored plan cannot be merged, and what can be done."""
    return (
        f"an anchored edit needs a bias and {site.path} has none: the plan can only run live; "
        "save it with --save plan or --save adapter, or set excise.anchored=false"
    )


def _weight(module: nn.Module, edits: Sequence[Edit]) -> Lazy:
    def compute() -> Tensor:
        weight = read_weight(module, edits[0].site)
        for edit in edits:
            basis = edit.basis.to(weight)
            weight = edit_weight(weight, basis, edit.strength, edit.norm)
        return stored(weight, edits[0].site, module.get_parameter("weight"))

    return compute


def new_bias(module: nn.Module, edits: Sequence[Edit]) -> Tensor | None:
    """The bias after all edits, fp32; None where there is none and none is needed."""
    bias = read_bias(module, edits[0].site)
    for edit in edits:
        basis = edit.basis.to(module.get_parameter("weight").device)
        anchor = None if edit.anchor is None else edit.anchor.to(basis)
        bias = edit_bias(bias, basis, edit.strength, anchor)
    return bias


def _value(bias: Tensor, module: nn.Module) -> Lazy:
    return lambda: bias.to(module.get_parameter("weight").dtype)
