"""What a plan needs before it is made: modules that PROBE reads, and directions and weights that fit the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.settings import Excise, expand_part
from obliteratus.core.types import Activations, Directions, Site, Subject


def wanted_by(options: Excise, sites: Sequence[Site]) -> ProbeRequest:
    """Return which modules PROBE has to read, besides the residual stream, for edits with these options.

    Anchored edits need the mean outputs of the edited writers, those of least change their contrasts, masks of neurons
    the mean inputs of the MLP outputs, and edits of single experts the routing in every stack.

    >>> options = ob.Excise(least_change=True)
    >>> acts = ob.collect_activations(subject, prompts, request=ob.wanted_by(options, subject.sites))
    >>> ob.plan_edits(subject, directions, acts=acts, options=options)
    <Plan: 2 changes in blocks 2 to 3 (attn.out, mlp.out), strength 1>
    """
    parts = {p for part in options.parts for p in expand_part(part)}
    writers = [s.path for s in sites if s.role == "writes" and s.part in parts]
    masked = set(expand_part("mlp.out")) if options.neurons else set()
    return ProbeRequest(
        output_modules=writers if options.anchored else [],
        input_modules=[s.path for s in sites if s.part in masked and not s.stacked],
        expert_modules=[s.path for s in sites if s.role == "writes" and s.stacked and options.experts is not None],
        contrast_modules=writers if options.least_change else [],
    )


def check_shapes(subject: Subject, directions: Directions, weights: Tensor | None) -> None:
    """Raise UserError for directions of a model of another size, and for another number of weights."""
    streams, _, width = directions.basis.shape
    if (streams, width) != (subject.n_layers + 1, subject.width):
        raise UserError(
            f"plan_edits: the directions are of {streams} streams of width {width}, and {subject.source.id} has "
            f"{subject.n_layers + 1} of width {subject.width}"
        )
    if weights is not None and weights.shape != (len(subject.sites),):
        raise UserError(
            f"plan_edits: there are {len(weights)} weights; give one for each of {len(subject.sites)} sites"
        )


def check_activations(subject: Subject, acts: Activations | None, options: Excise) -> Activations:
    """Return the activations. Raises UserError if they lack what the options need."""
    acts = Activations({}, -1) if acts is None else acts
    wanted = wanted_by(options, subject.sites)
    held: dict[str, tuple[Sequence[str], Collection[str]]] = {
        "anchored": (wanted.output_modules, acts.outputs),
        "neurons": (wanted.input_modules, acts.inputs.get("target", ())),
        "experts": (wanted.expert_modules, acts.routed),
        "least_change": (wanted.contrast_modules, acts.contrasts),
    }
    missing = [name for name, (paths, known) in held.items() if not set(paths) <= set(known)]
    missing += ["steer"] if options.steer and not acts.groups else []
    if missing:
        raise UserError(
            f"plan_edits: {missing[0]} needs activations of modules; collect them with collect_activations(subject, "
            "prompts, request=ob.wanted_by(options, subject.sites))"
        )
    return acts
