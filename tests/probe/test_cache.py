"""A second run on the same model and prompts probes nothing; whatever could change the result is probed anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.activations import assert_same
from tests.support.checkpoints import shards, stored
from tests.support.notes import Notes
from tests.support.plans import PlanMaker
from tests.support.tiny import tiny_subject
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from obliteratus.core.probing import ProbeRequest
from obliteratus.core.progress import report_to
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Probe
from obliteratus.core.types import Activations, Prompt, PromptSet, Splits, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.pipeline.stages import Stages
from obliteratus.probe import cache as probe_cache
from obliteratus.probe.cache import CHECKSUM, collect_cached_activations, remove_oldest
from obliteratus.probe.probe import collect_activations
from obliteratus.summon.load import open_subject

WRITER = "model.layers.1.mlp.down_proj"
Change = Callable[[Subject], object]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache is on, in a folder of the test's own: where its entries are."""
    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path))
    monkeypatch.delenv(probe_cache.CACHE_VARIABLE)
    return tmp_path / "probes"


@contextmanager
def passes(subject: Subject) -> Iterator[list[int]]:
    """Prompts of each pass through block 0: by a hook on all modules, since one on the model keeps it off the disk."""
    block, seen = subject.module(f"{subject.layers}.0"), []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if module is block:
            seen.append(len(args[0]))

    handle = register_module_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def collect(subject: Subject, prompts: PromptSet, **options: Any) -> tuple[Activations, list[int]]:
    """Return what a run would use, and the passes that were made for it."""
    with passes(subject) as seen:
        return collect_cached_activations(subject, prompts, Probe(**options)), seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("keep", ["rows", "moments"])
def test_a_second_probe_runs_nothing_and_is_equal_bit_for_bit(name: str, keep: Any, prompts: PromptSet) -> None:
    subject = tiny_subject(name)
    writers = [s.path for s in subject.sites if s.role == "writes" and s.layout in ("linear", "conv1d")]
    stacks = [s.path for s in subject.sites if s.role == "writes" and s.stacked]
    request = ProbeRequest(writers, writers[-1:], stacks)
    found = []
    for model in (subject, tiny_subject(name)):
        with passes(model) as seen:
            found.append(collect_cached_activations(model, prompts, Probe(keep=keep), request))
        assert bool(seen) == (len(found) == 1)
    first, again = found
    assert_same(again, first)
    assert_same(first, collect_activations(subject, prompts, Probe(keep=keep), request))
    assert again.inputs.keys() == first.inputs.keys()
    for group, means in first.inputs.items():
        assert all(torch.equal(again.inputs[group][path], mean) for path, mean in means.items())
        assert again[group].categories == first[group].categories
    for path, groups in first.routed.items():
        assert all(torch.equal(again.routed[path][g].mean, routed.mean) for g, routed in groups.items())
    assert set(first.routed) == set(again.routed) == set(stacks)


def test_the_second_run_probes_nothing_and_says_so(tmp_path: Path) -> None:
    """Through the pipeline: same plan, bit for bit; a later pass, under the first one's plan, is always probed."""
    verify = [{"use": "behavior", "tokens": 4}]
    recipe = load_recipe("lean", {"passes": 2, "verify": verify, "excise.strength": 0.3})
    splits = ["fit"] * 8 + ["report"] * 4
    texts = {"target": "Tell me of boat {}.", "control": "What is {} plus one?"}
    prompts = PromptSet(
        {g: tuple(Prompt(text.format(i), split=s) for i, s in enumerate(splits)) for g, text in texts.items()}
    )
    told, plans = [], []
    for _ in range(2):
        notes = Notes()
        with report_to(notes):
            plans.append(run(recipe, tiny_subject("llama"), prompts, force=True).plan)
        told.append([text for text in notes.texts if "from the cache" in text])
    assert told == [[], ["PROBE: read from the cache: an earlier run had the same model, prompts and options"]]
    assert all(torch.equal(a.basis, b.basis) for a, b in zip(plans[0].edits, plans[1].edits, strict=True))
    assert len(list((tmp_path / "probes").iterdir())) == 1


def nudged(path: str) -> Change:
    """One value of one weight moved by a part in a thousand: `Source.digest` sees none of these."""

    def change(subject: Subject) -> None:
        weight = subject.module(path).weight
        weight.data.view(-1)[7] *= 1.001

    return change


CHANGES: dict[str, Change] = {
    "a writer": nudged(WRITER),
    "a reader": nudged("model.layers.1.self_attn.q_proj"),
    "a norm": nudged("model.layers.0.input_layernorm"),
    "a buffer": lambda s: s.model.model.rotary_emb.inv_freq.mul_(1.001),
    "dtype": lambda s: s.model.to(torch.bfloat16),
    "configuration": lambda s: setattr(s.model.config, "rms_norm_eps", 1e-3),
    "template": lambda s: setattr(s.tokenizer, "chat_template", s.tokenizer.chat_template.replace("ant:", "ant>")),
}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_another_model_is_probed_again(what: str, on_disk: bool, prompts: PromptSet, tmp_path: Path) -> None:
    """A model that was changed in memory, whether or not it was loaded from files that know nothing of that."""
    load = partial(open_subject, stored(tmp_path / "model", "llama")) if on_disk else partial(tiny_subject, "llama")
    collect(load(), prompts)
    other = load()
    CHANGES[what](other)
    found, seen = collect(other, prompts)
    assert seen
    assert_same(found, collect_activations(other, prompts))
    assert not collect(other, prompts)[1]  # it has an entry of its own
    assert not collect(load(), prompts)[1]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Few values of each weight are sampled. Gives the number of values in everything that is hashed."""
    counts: list[int] = []
    sha256 = probe_cache._sha256
    monkeypatch.setattr(probe_cache, "SAMPLE", 16)
    monkeypatch.setattr(probe_cache, "_sha256", lambda tensor: [counts.append(tensor.numel()), sha256(tensor)][1])
    return counts


def test_weights_on_disk_are_told_by_their_files(prompts: PromptSet, tmp_path: Path, hashed: list[int]) -> None:
    """The same files hit and only samples are hashed; changed bytes with another time miss."""
    folder = stored(tmp_path / "model", "llama")
    first, _ = collect(open_subject(folder), prompts)
    assert max(hashed) <= 32
    again, seen = collect(open_subject(folder), prompts)
    assert not seen
    assert_same(again, first)
    file = next(f for f in shards(folder) if WRITER + ".weight" in load_file(f))
    tensors = load_file(file)
    tensors[WRITER + ".weight"].view(-1)[7] *= 2  # this value is in no sample
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    changed, seen = collect(open_subject(folder), prompts)
    assert seen
    assert not torch.equal(changed["target"].mean, first["target"].mean)


def test_weights_changed_in_memory_are_hashed_completely(prompts: PromptSet, tmp_path: Path, hashed: list[int]) -> None:
    """Two models with different changes in place share no entry, even if no sample shows the changes."""
    folder = stored(tmp_path / "model", "llama")
    collect(open_subject(folder), prompts)
    for index in (7, 9):
        subject = open_subject(folder)
        weight = subject.module(WRITER).weight
        with torch.no_grad():
            weight.view(-1)[index] *= 2
        hashed.clear()
        assert collect(subject, prompts)[1]
        assert sorted(hashed)[-2:] == [max(n for n in hashed if n <= 32), weight.numel()]
    dense = open_subject(folder)
    dense.module(WRITER).weight.data.mul_(1.01)  # PyTorch does not count it, but the sample shows it
    assert collect(dense, prompts)[1]
    assert not collect(open_subject(folder), prompts)[1]


def test_a_full_hash_finds_the_same_weights_elsewhere(
    prompts: PromptSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[int]
) -> None:
    folder = stored(tmp_path / "model", "llama")
    copied = shutil.copytree(folder, tmp_path / "copied")
    collect(open_subject(folder), prompts)
    assert collect(open_subject(copied), prompts)[1]  # other files
    monkeypatch.setenv(probe_cache.CACHE_VARIABLE, "hash")
    assert collect(open_subject(folder), prompts)[1]
    assert max(hashed) > 32
    assert not collect(open_subject(copied), prompts)[1]


@pytest.mark.parametrize("options", [{"position": -2}, {"keep": "moments"}])
def test_another_question_is_probed_again(options: dict[str, Any], prompts: PromptSet) -> None:
    subject = tiny_subject("llama")
    collect(subject, prompts)
    more = PromptSet({**prompts.groups, "target": (*prompts["target"][:-1], Prompt("Another."))})
    marked = PromptSet({**prompts.groups, "target": tuple(replace(p, category="x") for p in prompts["target"])})
    for found, seen in (collect(subject, prompts, **options), collect(subject, more), collect(subject, marked)):
        assert seen
        assert found.groups.keys() == prompts.groups.keys()
    with passes(subject) as seen:
        assert set(collect_cached_activations(subject, prompts, Probe(), ProbeRequest([WRITER])).outputs) == {WRITER}
    assert seen


@pytest.mark.parametrize(("name", "parts"), [("llama", ["mlp.out"]), ("mixtral", ["expert.out"])])
def test_a_model_under_a_plan_is_probed_and_not_kept(
    name: str, parts: list[str], prompts: PromptSet, make_plan: PlanMaker, cache: Path
) -> None:
    subject = tiny_subject(name)
    plan = make_plan(subject, parts, norm="columns")  # which stacks of experts need a forward of their own for
    plain, _ = collect(subject, prompts)
    with applied(subject, plan):
        edited, seen = collect(subject, prompts)
    assert seen
    assert not torch.allclose(edited["target"].mean, plain["target"].mean, atol=1e-3)
    assert len(list(cache.iterdir())) == 1
    with passes(subject) as seen:
        Stages(subject, Splits(prompts, prompts, prompts, ""), Store()).probe(2, load_recipe("basic"), edited=True)
    assert seen
    assert not collect(subject, prompts)[1]


@pytest.mark.parametrize("file", ["activations.safetensors", "activations.json", CHECKSUM])
@pytest.mark.parametrize("how", ["torn", "flipped", "gone"])
def test_a_damaged_entry_is_probed_anew_and_mended(file: str, how: str, prompts: PromptSet, cache: Path) -> None:
    subject = tiny_subject("llama")
    first, _ = collect(subject, prompts)
    (entry,) = cache.iterdir()
    raw = (entry / file).read_bytes()
    middle = len(raw) // 2
    flipped = raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :]
    (entry / file).unlink() if how == "gone" else (entry / file).write_bytes(raw[:middle] if how == "torn" else flipped)
    again, seen = collect(subject, prompts)
    assert seen
    assert_same(again, first)
    assert not collect(subject, prompts)[1]


def test_the_bound_holds_and_what_was_used_last_stays(
    prompts: PromptSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = tiny_subject("llama")
    entries = []
    for second, position in enumerate((-1, -2, -3)):
        collect(subject, prompts, position=position)
        entries += [p for p in cache.iterdir() if p not in entries]
        os.utime(entries[-1], (second, second))  # long ago, one after the other
    size = sum(file.stat().st_size for file in entries[0].iterdir())
    monkeypatch.setattr(probe_cache, "MAX_BYTES", 3 * size + 64)
    assert not collect(subject, prompts, position=-1)[1]  # the oldest is used now
    collect(subject, prompts, position=-4)
    left = set(cache.iterdir())
    assert len(left) == 3
    assert entries[0] in left
    assert entries[1] not in left
    assert sum(f.stat().st_size for p in left for f in p.iterdir()) <= 3 * size + 64
    remove_oldest(cache, 0)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_no_error(prompts: PromptSet, tmp_path: Path) -> None:
    (tmp_path / "probes").write_text("a file where a folder should be")
    notes = Notes()
    with report_to(notes):
        found, seen = collect(tiny_subject("llama"), prompts)
    assert seen
    assert_same(found, collect_activations(tiny_subject("llama"), prompts))
    assert any("not cached for later runs" in text for text in notes.texts)


def test_it_can_be_switched_off(prompts: PromptSet, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(probe_cache.CACHE_VARIABLE, "off")
    subject = tiny_subject("llama")
    assert collect(subject, prompts)[1]
    assert collect(subject, prompts)[1]
    assert not cache.exists()
