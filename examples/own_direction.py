"""Ablate a direction of your own, and add it. Any vector of the residual stream will do."""

import torch

import obliteratus as ob

subject = ob.open_subject("organism:astronomy")
splits = ob.split_prompts(ob.load_prompts(target="organism:astronomy", control="organism:astronomy"))

# The vector may come from a probe, an SAE or a file. Here it is a difference of means, at four fifths of the depth.
acts = ob.collect_activations(subject, splits.fit)
stream = 4 * subject.n_layers // 5
vector = acts["target"].mean[stream] - acts["control"].mean[stream]


def plan_removal(of: torch.Tensor) -> ob.Plan:
    """Return the plan under which no matrix of the upper third writes along the vector."""
    upper = range(2 * subject.n_layers // 3, subject.n_layers)
    return ob.plan_edits(subject, ob.Directions.from_vectors(of, subject)).only(layers=upper)


def ask() -> ob.Measurement:
    """Return how often report prompts are refused by the model as it is at that moment."""
    return ob.measure(subject, splits.report, [ob.Step(use="behavior", tokens=16)])


before = ask()
with ob.applied(subject, plan_removal(vector)):
    ablated = ask()
with ob.applied(subject, plan_removal(torch.randn(subject.width, generator=torch.Generator().manual_seed(0)))):
    by_chance = ask()  # a random direction is the control of this experiment
with ob.steer(subject, vector, strength=1.0, layers=stream - 1):
    added = ask()
print("target: before", before["refusal.target"], "| ablated", ablated["refusal.target"])
print("target: random direction ablated", by_chance["refusal.target"])
print("control: before", before["refusal.control"], "| added", added["refusal.control"])
ob.save(subject, plan_removal(vector).scaled(0.9), out="own-direction", form="plan")
