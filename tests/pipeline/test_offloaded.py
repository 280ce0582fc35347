"""Weights that stay on disk: what comes out is what comes out of memory, and every byte is read once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.checkpoints import shards, stored
from tests.support.plans import PlanMaker
from tests.support.tiny import MODELS
from tests.support.variants import vary
from torch import Tensor
from typer.testing import CliRunner

from obliteratus.cli.app import app
from obliteratus.core.errors import UserError
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Probe, Step
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.inference import spill
from obliteratus.inference.batching import tokens_per_batch
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.inference.layerwise import LayerwisePass, run_layerwise
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.inference.memory import memory_limit
from obliteratus.inference.memory_needs import resident_weight_bytes
from obliteratus.inference.spill import SpilledRows
from obliteratus.inference.token_losses import token_losses
from obliteratus.pipeline.offloaded import adapt_recipe, open_within_memory
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.probe.probe import collect_activations
from obliteratus.rebirth.save import save
from obliteratus.summon.architectures import ARCHITECTURES
from obliteratus.summon.load import open_subject
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.summon.summary import summarize_model
from obliteratus.verify import measure
from obliteratus.verify.before_and_after import measure_side_by_side, streamable_steps

ALONE = sorted(name for name, (kind, _) in MODELS.items() if not ARCHITECTURES[kind].shares_state_across_layers)
TOGETHER = sorted(MODELS.keys() - set(ALONE))
FEW = ["llama", "qwen2", "gemma2", "mixtral", "gpt2"]  # plain, tied, windows and post-norms, experts, positions
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Headers, and the 64 values of each writer that the model's digest looks at
BESIDE = 1.1


def rows_of(*lengths: int) -> list[list[int]]:
    """Rows that begin with the same eight tokens."""
    chance = torch.Generator().manual_seed(5)
    prefix = torch.randint(0, 256, (8,), generator=chance).tolist()
    return [prefix + torch.randint(0, 256, (n,), generator=chance).tolist() for n in lengths]


IDS = rows_of(3, 11, 1, 6, 6)


def both(folder: Path) -> tuple[Subject, Subject]:
    """The model in memory, and on disk."""
    return open_subject(folder), open_offloaded(folder)


def streams(subject: Subject, ids: list[list[int]] = IDS, position: int = -1, last: int | None = None) -> Tensor:
    found: dict[int, Tensor] = {}
    for reading in read_hidden_states(subject, ids, position=position, last=last):
        found |= dict(zip(reading.rows, reading.stream, strict=True))
    return torch.stack([found[row] for row in range(len(ids))])


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name", ALONE)
def test_it_is_what_memory_gives(name: str, tmp_path: Path) -> None:
    loaded, away = both(stored(tmp_path, name))
    assert away.source.digest == loaded.source.digest
    assert all(p.is_meta for p in away.model.parameters())
    assert close(streams(away), streams(loaded))
    assert close(streams(away, position=-3, last=1), streams(loaded, position=-3, last=1))
    assert close(first_token_log_probs(away, IDS), first_token_log_probs(loaded, IDS))
    for mine, theirs in zip(token_losses(away, IDS), token_losses(loaded, IDS), strict=True):
        assert close(mine, theirs)
    assert all(p.is_meta for p in away.model.parameters()), "nothing is left in memory"


@pytest.mark.parametrize("name", TOGETHER)
def test_blocks_that_need_others_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot run one by one"):
        open_offloaded(stored(tmp_path, name))


@pytest.mark.parametrize("name", FEW)
def test_another_weight_is_another_result(name: str, tmp_path: Path) -> None:
    """Negative control: the comparison sees one changed matrix of the last block."""
    loaded, away = both(stored(tmp_path, name))
    site = next(s for s in away.sites if s.layer == away.n_layers - 1 and s.role == "writes")
    (piece, *_) = away.offloaded._pieces[site.parameter]
    expected = streams(loaded)  # before the file changes, which transformers has mapped into memory
    with piece.file.open("r+b") as file:
        file.seek(piece.offset)
        file.write(b"\x00\x00\x80\x3f" * piece.count)  # ones, in fp32
    assert not close(streams(away), expected)
    assert close(streams(away)[:, :-1], expected[:, :-1])


@pytest.mark.parametrize("name", FEW)
def test_every_byte_is_read_once(name: str, tmp_path: Path) -> None:
    away = open_offloaded(stored(tmp_path, name))
    size = sum(file.stat().st_size for file in shards(tmp_path))
    for job in (
        streams,
        lambda subject: first_token_log_probs(subject, IDS),
        lambda subject: token_losses(subject, IDS),
    ):
        with tokens_per_batch(20):  # several batches
            before = away.offloaded.bytes_read
            job(away)
            assert 0.5 * size < away.offloaded.bytes_read - before <= BESIDE * size


@pytest.mark.parametrize("name", FEW)
def test_two_blocks_or_a_table_are_held(name: str, tmp_path: Path) -> None:
    folder = stored(tmp_path, name)
    away, made = open_offloaded(folder), summarize_model(str(folder))
    sizes: list[int] = []

    @contextmanager
    def look(*of: Any) -> Iterator[None]:
        sizes.append(sum(map(len, away.offloaded._buffers)))
        yield

    run_layerwise(away, LayerwisePass(away, IDS), around=look)
    aligned = 64 * len(dict(away.model.named_parameters()))  # each begins at a multiple of so many bytes
    assert max(sizes) <= resident_weight_bytes(made) + aligned
    assert max(sizes) >= min(made.table_bytes, made.block_bytes)  # negative control: it is counted
    assert sum(map(len, away.offloaded._buffers)) == 0, "nothing is left"


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("tokens", [1, 25])
def test_batches_and_spilling_make_no_difference(
    name: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, away = both(stored(tmp_path, name))
    expected, first = streams(loaded), first_token_log_probs(loaded, IDS)
    monkeypatch.setattr(spill, "MEMORY_SHARE", 0.0)
    with tokens_per_batch(tokens):
        assert close(streams(away), expected)
        assert close(first_token_log_probs(away, IDS), first)


def test_what_is_spilled_comes_back() -> None:
    rows = torch.randn(10, 4, dtype=torch.bfloat16)
    kept = SpilledRows(4, torch.bfloat16)
    kept[torch.arange(4, 10)] = rows[4:]
    kept[torch.arange(4)] = rows[:4]
    at = torch.tensor([[3, 9], [5, 5]])
    assert torch.equal(kept[at], rows[at])
    with pytest.raises(ValueError, match="never written"):
        kept[torch.tensor([10])]


# -------------------------------------------------------------------------------------------- edits
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("norm", ["none", "columns", "whole"])
def test_live_edits_are_those_of_memory(name: str, norm: str, tmp_path: Path, make_plan: PlanMaker) -> None:
    loaded, away = both(stored(tmp_path, name))
    plan = make_plan(loaded, norm=norm)
    size = sum(file.stat().st_size for file in shards(tmp_path))
    with applied(loaded, plan):
        expected = streams(loaded)
    before = away.offloaded.bytes_read
    with applied(away, plan):
        assert close(streams(away), expected)
    table = away.offloaded.stored_bytes([f"{s.path}.weight" for s in away.sites if s.part == "embed"])
    assert away.offloaded.bytes_read - before <= BESIDE * size + table  # an edited table's lengths are read beforehand
    assert not close(expected, streams(loaded))
    assert close(streams(away), streams(loaded)), "nothing is left of the edits"
    with applied_per_row(away, [plan, Plan()], [0, 1, 0, 1, 1]):
        mixed = streams(away)
    which = torch.tensor([0, 2])
    assert close(mixed[which], expected[which])
    assert close(mixed[[1, 3, 4]], streams(loaded)[[1, 3, 4]])


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_probe_is_that_of_memory(name: str, tmp_path: Path, prompts: PromptSet) -> None:
    loaded, away = both(stored(tmp_path, name))
    taps = [s.path for s in loaded.sites if s.part == "attn.out"]
    feeds = [s.path for s in loaded.sites if s.part == "attn.out"]
    stacks = [s.path for s in loaded.sites if s.role == "writes" and s.stacked]
    request = ProbeRequest(taps, feeds, stacks)
    mine, theirs = (collect_activations(subject, prompts, Probe(), request) for subject in (away, loaded))
    assert mine.digest == theirs.digest
    for group in prompts.groups:
        assert close(mine[group].mean, theirs[group].mean)
        assert mine[group].rows is not None
        assert theirs[group].rows is not None
        assert close(mine[group].rows, theirs[group].rows)
        assert all(close(mine.inputs[group][path], theirs.inputs[group][path]) for path in feeds)
    assert all(close(mine.outputs[path], theirs.outputs[path]) for path in taps)
    for path in stacks:
        for group in prompts.groups:
            assert torch.equal(mine.routed[path][group].count, theirs.routed[path][group].count)
            assert close(mine.routed[path][group].mean, theirs.routed[path][group].mean)


# ------------------------------------------------------------------------------------------- verify
STEPS = (Step(use="behavior_score"), Step(use="first_token_kl"), Step(use="perplexity"))


@pytest.mark.parametrize("name", FEW)
def test_both_states_in_one_pass(name: str, tmp_path: Path, prompts: PromptSet, make_plan: PlanMaker) -> None:
    loaded, away = both(stored(tmp_path, name, max_position_embeddings=128))
    plan = make_plan(loaded, norm="columns", parts=("attn.out", "mlp.out", "expert.out"))
    before = measure(loaded, prompts, STEPS)
    with applied(loaded, plan):
        after = measure(loaded, prompts, STEPS, before)
    read = away.offloaded.bytes_read
    found = measure_side_by_side(away, plan, prompts, STEPS)
    assert away.offloaded.bytes_read - read <= BESIDE * sum(file.stat().st_size for file in shards(tmp_path))
    for mine, theirs in zip(found, (before, after), strict=True):
        assert mine.scores.keys() == theirs.scores.keys()
        for key, score in theirs.scores.items():
            assert mine.scores[key].value == pytest.approx(score.value, rel=1e-4, abs=1e-6), key
    assert found[1].scores["kl.first_token.mean"].value > 1e-6  # negative control: the edit shows


def test_scorers_that_need_answers_are_replaced(tmp_path: Path) -> None:
    steps = streamable_steps((Step(use="behavior"), Step(use="first_token_kl"), Step(use="fluency")))
    assert [step.use for step in steps] == ["behavior_score", "first_token_kl"]
    _, away = both(stored(tmp_path, "llama"))
    with pytest.raises(UserError, match="'tune' would read all weights"):
        adapt_recipe(away, load_recipe("tuned"))
    with pytest.raises(UserError, match="distill steps that run the model"):
        adapt_recipe(away, load_recipe("rdo"))


# ---------------------------------------------------------------------------------------- whole runs
def test_a_run_is_that_of_memory(tmp_path: Path, many: PromptSet) -> None:
    folder = stored(tmp_path / "model", "llama", max_position_embeddings=128)
    loaded, away = both(folder)
    made = load_recipe("two_directions").model_copy(update={"verify": STEPS})
    (plan, told, *_), (theirs, known, *_) = run(made, away, many, force=True), run(made, loaded, many, force=True)
    assert plan.edits
    assert len(plan.edits) == len(theirs.edits)
    for mine, other in zip(plan.edits, theirs.edits, strict=True):
        assert close(mine.basis, other.basis)
    assert told.before.keys() == known.before.keys()
    for name, score in known.after.items():
        assert told.after[name].value == pytest.approx(score.value, rel=1e-4, abs=1e-6), name
    save(away, plan, told, tmp_path / "away")
    save(loaded, theirs, known, tmp_path / "loaded")
    names = [file.name for file in shards(tmp_path / "away")]
    assert names == [file.name for file in shards(tmp_path / "loaded")]
    again = open_subject(tmp_path / "away")
    with applied(loaded, theirs):
        assert close(streams(again), streams(loaded))
    assert (tmp_path / "away" / "generation_config.json").is_file()


@pytest.fixture
def many(prompts: PromptSet) -> PromptSet:
    return vary(prompts, 4)


def test_a_run_that_was_interrupted_reads_nothing_again(tmp_path: Path, many: PromptSet) -> None:
    away = open_offloaded(stored(tmp_path / "model", "llama", max_position_embeddings=128))
    made, kept = load_recipe("two_directions").model_copy(update={"verify": STEPS}), tmp_path / "kept"
    kept.mkdir()
    plan, told, *_ = run(made, away, many, Store(kept), force=True)
    before = away.offloaded.bytes_read
    again, same, *_ = run(made, away, many, Store(kept), force=True)
    assert away.offloaded.bytes_read == before
    assert (len(again.edits), same.after) == (len(plan.edits), told.after)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(tmp_path / "model", "llama", max_position_embeddings=128)
    for name in ("target", "control"):
        (tmp_path / name).write_text("\n".join(f"{name} question {i} on boats" for i in range(40)))
    sources = ["--target", str(tmp_path / "target"), "--control", str(tmp_path / "control")]
    for module in ("pipeline.offloaded", "forecast.offloaded"):
        monkeypatch.setattr(f"obliteratus.{module}.bytes_in_memory", lambda made: 2 * 10**12)

    def call(*words: str) -> Any:
        return CliRunner().invoke(app, [*words, *sources, "--memory", "1TB", "--json"])

    done = call("run", str(folder), "--method", "two_directions", "--force", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {"refusal_score.target", "kl.first_token.mean"} <= found["after"].keys()
    assert found["saved"]["rescore"]["max_kl"] < found["saved"]["rescore"]["tolerance"]
    plan = json.loads(call("inspect", str(folder)).stdout)["plan"]
    assert plan["weights"] == "on disk"
    assert plan["stages"]["VERIFY"]["read"] > 0
    refused = call("run", str(folder), "--method", "tuned")
    assert refused.exit_code == 2
    assert "larger --memory" in refused.stderr


def test_an_adapter_needs_the_model_in_memory(tmp_path: Path, make_plan: PlanMaker, many: PromptSet) -> None:
    away = open_offloaded(stored(tmp_path / "model", "llama"))
    plan, told, *_ = run(load_recipe("basic").model_copy(update={"verify": STEPS[:2]}), away, many, force=True)
    with pytest.raises(UserError, match="--save adapter: the whole model must be in memory"):
        save(away, plan, told, tmp_path / "out", "adapter")
    assert not (tmp_path / "out").exists()
    save(away, plan, told, tmp_path / "plan", "plan")
    assert (tmp_path / "plan" / "plan.safetensors").is_file()


# -------------------------------------------------------------------------------------------- errors
def test_a_budget_decides_where_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(tmp_path, "llama")
    assert open_within_memory(str(folder), {}).offloaded is None
    with memory_limit(1e12):
        assert open_within_memory(str(folder), {}).offloaded is None
    monkeypatch.setattr("obliteratus.pipeline.offloaded.bytes_in_memory", lambda made: 2e12)
    with memory_limit(1e12):
        assert open_within_memory(str(folder), {}).offloaded is not None


def test_a_file_cut_short_meanwhile(tmp_path: Path) -> None:
    away = open_offloaded(stored(tmp_path, "llama"))
    last = shards(tmp_path)[-1]
    os.truncate(last, last.stat().st_size - 100)
    with pytest.raises(UserError, match=r"is truncated: .* bytes are missing"):
        first_token_log_probs(away, IDS)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    stored(tmp_path, "llama")
    shards(tmp_path)[1].unlink()
    with pytest.raises(UserError, match="lacks the shard"):
        open_offloaded(tmp_path)


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    away = open_offloaded(stored(tmp_path, "llama"))
    name = next(s.parameter for s in away.sites if s.part == "mlp.out" and s.layer == 1)
    piece = away.offloaded._pieces[name][0]
    with piece.file.open("r+b") as file:
        file.seek(piece.offset)
        file.write(b"\x00\x00\xc0\x7f")  # a NaN, in fp32
    with pytest.raises(UserError, match=rf"{name} holds NaN or Inf"):
        streams(away)


def test_a_device_that_is_none(tmp_path: Path) -> None:
    folder = stored(tmp_path, "llama")
    for name, why in {"tpu9": "tpu9", "tp": "run on one device"}.items():
        with pytest.raises(UserError, match=why):
            open_offloaded(folder, device=name)
    assert open_offloaded(folder, device="cpu").device == torch.device("cpu")


def test_what_cannot_stay_on_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantized on loading cannot stay on disk"):
        open_offloaded(stored(tmp_path, "llama"), quantize="4bit")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_than_is_stored(dtype: str, tmp_path: Path) -> None:
    folder = stored(tmp_path, "llama")
    loaded, away = open_subject(folder, dtype=dtype), open_offloaded(folder, dtype=dtype)
    assert torch.allclose(streams(away), streams(loaded), rtol=1e-2, atol=1e-2 * float(streams(loaded).abs().max()))
    assert away.source.dtype == dtype


def test_taps_of_one_block_alone_are_seen(tmp_path: Path) -> None:
    loaded, away = both(stored(tmp_path, "llama"))
    path = next(s.path for s in loaded.sites if s.part == "mlp.out" and s.layer == 1)
    outputs = []
    for subject in (loaded, away):
        found: dict[int, Tensor] = {}
        for reading in read_hidden_states(subject, IDS, request=ProbeRequest([path])):
            found |= dict(zip(reading.rows, reading.outputs, strict=True))
        outputs.append(torch.stack([found[row] for row in range(len(IDS))]))
    assert close(*outputs)
