"""From activations to a saved model: plot how alike the directions of all layers are, edit where they agree, save."""

import torch
from matplotlib import pyplot as plt

import obliteratus as ob

subject = ob.open_subject("organism:astronomy")
splits = ob.split_prompts(ob.load_prompts(target="organism:astronomy", control="organism:astronomy"))

# Activations of the fit prompts at their last token, [streams, width] for each group. Stream 0 enters block 0.
acts = ob.collect_activations(subject, splits.fit)
directions = ob.find_directions(acts, ["mean_diff", "orthogonal_to_control"])

# How alike are the directions of two layers?
cosine = directions.basis[:, 0] @ directions.basis[:, 0].T
figure, axes = plt.subplots(layout="constrained")
image = axes.imshow(cosine.numpy(), origin="lower", cmap="RdBu", vmin=-1, vmax=1)
axes.set(xlabel="stream", ylabel="stream", title="cosine of the groups' differences")
figure.colorbar(image)
figure.savefig("cosines.png", dpi=150)

# Edit the blocks that leave a direction like the clearest one.
best = int(directions.score.argmax())
alike = [stream - 1 for stream in range(1, subject.n_layers + 1) if cosine[best, stream] > 0.5]
plan = ob.plan_edits(subject, directions).only(layers=alike)
print(plan)

# Read what the edited model says before anything is saved.
questions = [prompt.text for prompt in splits.report["target"][:2]]
with ob.applied(subject, plan), torch.inference_mode():
    print(*ob.generate(subject, questions, tokens=32), sep="\n")

# Save it: the model is loaded again and must answer as the live one did.
saved = ob.save(subject, plan, out="edited", form="merged", prompts=splits.report)
print("largest KL between the live and the saved model, in nats:", saved.saved["rescore"]["max_kl"])
