"""What was done to a checkpoint is recovered from its weights, and nothing is called what it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tests.support.gguf_files import write_gguf
from tests.support.plans import random_basis, random_plan
from tests.support.traced import bake_edit, change_matrices, change_weights, make_base
from typer.testing import CliRunner

from obliteratus.audit.page import write_trace
from obliteratus.audit.refusal import compare_directions
from obliteratus.audit.tensor_trace import FULL_RANK, NOISE, PROJECTION, REQUANTIZATION, ROUNDING, SCALING, UNKNOWN
from obliteratus.audit.trace import TraceReport, trace_models
from obliteratus.audit.verdict import ADAPTER, NOTHING, TRAINING
from obliteratus.cli.app import app
from obliteratus.core.errors import UserError
from obliteratus.core.norms import NormRule
from obliteratus.core.types import Edit, Plan, Shift, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import check_fits, load_plan
from obliteratus.inference.logits import first_token_log_probs, kl_divergence
from obliteratus.summon.load import open_subject

WRITERS = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def subject(base: Path) -> Subject:
    return open_subject(base)


def one_direction(subject: Subject, strength: float = 1.0, norm: NormRule = "none", seed: int = 0) -> Plan:
    """The same direction at all writers of blocks."""
    row = random_basis(subject.width, 1, seed)
    return Plan(
        tuple(replace(edit, basis=row) for edit in random_plan(subject, k=1, strength=strength, norm=norm).edits),
        subject.source.digest,
    )


def low_rank(rank: int, size: float = 0.05) -> Callable[[torch.Tensor], torch.Tensor]:
    draw = torch.Generator().manual_seed(5)

    def add(weight: torch.Tensor) -> torch.Tensor:
        made = torch.randn(weight.shape[0], rank, generator=draw) @ torch.randn(rank, weight.shape[1], generator=draw)
        return weight + size * weight.norm() / made.norm() * made

    return add


def check_recovered(found: TraceReport, plan: Plan, strengths: bool = True) -> None:
    """The traced plan has the same directions on the same matrices, and strengths."""
    assert found.verdict.kind == PROJECTION
    assert found.explained > 0.999
    made = found.plan.by_site()
    assert set(made) == set(plan.by_site())
    for name, (wanted,) in plan.by_site().items():
        (own,) = made[name]
        assert isinstance(own, Edit)
        assert isinstance(wanted, Edit)
        overlap = (wanted.basis @ torch.linalg.qr(own.basis.T)[0]).square().sum() / len(wanted.basis)
        assert float(overlap) == pytest.approx(1, abs=1e-4)
        if strengths:
            assert own.strength == pytest.approx(wanted.strength, abs=1e-3)


# ------------------------------------------------------------------------------------------- projections
@pytest.mark.parametrize("norm", ["none", "columns", "whole", "rows", "unit_rows", "unit_rows_rank_3"])
def test_a_projection_is_recovered_under_every_norm_rule(
    norm: NormRule, base: Path, subject: Subject, tmp_path: Path
) -> None:
    plan = one_direction(subject, 0.8, norm)
    found = trace_models(bake_edit(base, plan, tmp_path / "edited"), base)
    check_recovered(found, plan)
    assert {trace.rule for trace in found.tensors} == {norm}
    assert found.shared is not None
    assert found.shared.share == pytest.approx(1, abs=1e-3)


def test_several_directions_are_recovered_each_with_its_own_at_every_matrix(
    base: Path, subject: Subject, tmp_path: Path
) -> None:
    plan = random_plan(subject, k=3, strength=1.0)
    found = trace_models(bake_edit(base, plan, tmp_path / "edited"), base)
    check_recovered(found, plan)
    assert {trace.rank for trace in found.tensors} == {3}
    assert found.shared is not None
    assert found.shared.share < 0.5  # they share none


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mixtral"])
def test_layouts_gains_and_experts_are_traced(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", name)
    subject = open_subject(base)
    parts = ("attn.out", "expert.out") if name == "mixtral" else ("attn.out", "mlp.out")
    plan = random_plan(subject, parts, k=1)
    found = trace_models(bake_edit(base, plan, tmp_path / "edited"), base)
    assert found.verdict.kind == PROJECTION
    assert found.explained > 0.999


def test_readers_are_traced_from_the_right(base: Path, subject: Subject, tmp_path: Path) -> None:
    sites = [site for site in subject.sites if site.part == "mlp.in"]
    gained = [load_file(base / "model.safetensors")[f"{site.gain}.weight"] for site in sites]
    row = random_basis(subject.width, 1, 1)
    edits = tuple(Edit(site, row * gain, 1.0, covectors=row / gain) for site, gain in zip(sites, gained, strict=True))
    found = trace_models(bake_edit(base, Plan(edits, subject.source.digest), tmp_path / "edited"), base)
    assert found.verdict.kind == PROJECTION
    assert {trace.side for trace in found.tensors} == {"right"}
    assert found.explained > 0.999
    assert found.shared is not None
    assert abs(float(found.shared.direction @ row[0])) > 0.999  # in the stream's coordinates, before the gain


def test_an_oblique_projection_is_told_from_an_adapter(base: Path, subject: Subject, tmp_path: Path) -> None:
    """One matrix could be either; all of them together share directions only if it is a projection."""
    plan = one_direction(subject)
    lean = random_basis(subject.width, 1, 7)
    oblique = [
        replace(edit, covectors=edit.basis + 0.8 * (lean - lean @ edit.basis.T * edit.basis))
        for edit in plan.edits
        if isinstance(edit, Edit)
    ]
    found = trace_models(bake_edit(base, replace(plan, edits=tuple(oblique)), tmp_path / "edited"), base)
    check_recovered(found, plan)
    assert found.verdict.oblique
    ranks = change_matrices(WRITERS, low_rank(1))
    assert trace_models(change_weights(base, tmp_path / "adapter", ranks), base).verdict.kind == ADAPTER


def test_an_edit_of_some_heads_is_one(base: Path, subject: Subject, tmp_path: Path) -> None:
    size = subject.width // 4
    plan = one_direction(subject, norm="columns")
    edits = [replace(e, site=replace(e.site, span=(size, 2 * size))) for e in plan.edits if e.site.part == "attn.out"]
    found = trace_models(bake_edit(base, replace(plan, edits=tuple(edits)), tmp_path / "edited"), base)
    assert found.explained > 0.999
    assert {change.site.span for change in found.plan.edits} == {(size, 2 * size)}


def test_what_a_bias_gained_is_a_shift(tmp_path: Path) -> None:
    """An anchored edit that was saved switches biases on; the base has none."""
    base = make_base(tmp_path / "base")
    subject = open_subject(base)
    plan = random_plan(subject, k=1, anchored=True)
    found = trace_models(bake_edit(base, plan, tmp_path / "edited"), base)
    assert found.verdict.kind == PROJECTION
    assert found.explained > 0.999
    shifts = [change for change in found.plan.edits if isinstance(change, Shift)]
    assert len(shifts) == len(plan.edits)


def test_the_plan_does_to_the_base_what_was_done_to_it(base: Path, subject: Subject, tmp_path: Path) -> None:
    plan = random_plan(subject, k=2, strength=0.7, norm="columns")
    edited = bake_edit(base, plan, tmp_path / "edited")
    write_trace(trace_models(edited, base), tmp_path / "out")
    traced = load_plan(tmp_path / "out/plan")
    check_fits(subject, traced)  # the digest is the base's
    ids = [[1, 2, 3], [4, 5, 6, 7]]
    wanted = first_token_log_probs(open_subject(edited), ids)
    before = first_token_log_probs(subject, ids)
    with applied(subject, traced):
        found = first_token_log_probs(subject, ids)
    assert float(kl_divergence(wanted, found).max()) < 1e-6
    assert float(kl_divergence(wanted, before).max()) > 1e-4  # the edit is seen at all


# --------------------------------------------------------------------------------- negative controls
def test_the_same_model_has_not_changed(base: Path) -> None:
    found = trace_models(base, base)
    assert found.verdict.kind == NOTHING
    assert not found.tensors
    assert not found.plan.edits


@pytest.mark.parametrize("parts", [WRITERS, ("q_proj", "v_proj"), ("up_proj", "down_proj")])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_random_change_of_low_rank_is_no_projection(
    parts: tuple[str, ...], rank: int, base: Path, tmp_path: Path
) -> None:
    found = trace_models(change_weights(base, tmp_path / "edited", change_matrices(parts, low_rank(rank))), base)
    assert found.verdict.kind == ADAPTER
    assert {trace.rank for trace in found.tensors} == {rank}
    assert found.shared is None


def test_a_random_direction_is_not_the_refusal_direction(base: Path, subject: Subject, tmp_path: Path) -> None:
    plan = one_direction(subject)
    found = trace_models(bake_edit(base, plan, tmp_path / "edited"), base)
    assert found.shared is not None
    known = plan.edits[0]
    assert isinstance(known, Edit)
    same = compare_directions(found.tensors, found.shared, known.basis.expand(subject.n_layers + 1, -1))
    other = compare_directions(
        found.tensors, found.shared, random_basis(subject.width, 1, 9).expand(subject.n_layers + 1, -1)
    )
    assert same.own > 0.999
    assert same.best > same.chance
    assert other.own < 0.3  # four standard deviations of a random cosine would be 0.5
    assert other.best < other.chance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_another_dtype_is_rounding(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    def cast(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtype) for name, tensor in weights.items()}

    copy = change_weights(base, tmp_path / "copy", cast)
    assert trace_models(copy, base).verdict.kind == ROUNDING
    assert trace_models(base, copy).verdict.kind == ROUNDING  # a finer copy of a coarser base
    assert (
        trace_models(
            change_weights(copy, tmp_path / "fp32", lambda w: {n: t.float() for n, t in w.items()}), copy
        ).verdict.kind
        == NOTHING
    )


def test_an_edit_stored_in_bf16_is_explained_but_for_its_rounding(base: Path, subject: Subject, tmp_path: Path) -> None:
    plan = one_direction(subject, 1.0, "columns")
    edited = bake_edit(base, plan, tmp_path / "edited")
    rounded = change_weights(edited, tmp_path / "bf16", lambda w: {n: t.bfloat16() for n, t in w.items()})
    found = trace_models(rounded, base)
    assert found.verdict.kind == PROJECTION
    assert found.explained > 0.98
    assert {t.kind for t in found.tensors if t.site is not None and t.site.role == "reads"} == {ROUNDING}


def quantized(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    own = gguf.GGMLQuantizationType[kind]
    return lambda t: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(t.numpy(), own), own))


CHANGES: dict[str, tuple[str, Any]] = {
    "Q8_0": (REQUANTIZATION, change_matrices(("layers",), quantized("Q8_0"))),
    "Q4_0": (REQUANTIZATION, change_matrices(("layers",), quantized("Q4_0"))),
    "noise": (NOISE, change_matrices(("layers",), lambda t: t + 0.01 * torch.randn(t.shape) * t.std())),
    "scaled": (SCALING, change_matrices(("down_proj",), lambda t: 1.1 * t)),
    "rows moved": (UNKNOWN, change_matrices(("down_proj",), lambda t: t.roll(1, 0))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_no_edit_gets_its_own_name_and_no_plan(name: str, base: Path, tmp_path: Path) -> None:
    kind, change = CHANGES[name]
    torch.manual_seed(0)
    found = trace_models(change_weights(base, tmp_path / "changed", change), base)
    assert found.verdict.kind == kind
    assert not found.plan.edits
    assert found.explained == 0


def test_training_is_told_from_noise_and_adapters(base: Path, tmp_path: Path) -> None:
    subject = open_subject(base)
    model = subject.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    draw = torch.Generator().manual_seed(0)
    batch = torch.randint(
        0, 256, (2, 32), generator=draw
    )  # the same each time: gradients of new random tokens are noise
    for _ in range(12):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "trained")
    found = trace_models(tmp_path / "trained", base)
    assert found.verdict.kind == TRAINING
    assert sum(trace.kind == FULL_RANK for trace in found.tensors) > 10


# -------------------------------------------------------------------------------------- errors, command
def test_models_that_cannot_be_compared_are_refused(base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "qwen3")
    with pytest.raises(UserError, match=r"model_type is qwen3, that of .* is llama"):
        trace_models(other, base)
    wider = make_base(tmp_path / "wider", intermediate_size=96)
    with pytest.raises(UserError, match="intermediate_size is 96"):
        trace_models(wider, base)
    lacking = change_weights(base, tmp_path / "lacking", lambda w: {n: t for n, t in w.items() if "1.mlp.up" not in n})
    with pytest.raises(UserError, match=r"1 tensors are missing, e\.g\. model\.layers\.1\.mlp\.up_proj"):
        trace_models(lacking, base)
    broken = change_weights(base, tmp_path / "broken", change_matrices(("1.mlp.up",), lambda t: t * float("nan")))
    with pytest.raises(UserError, match="NaN or Inf"):
        trace_models(broken, base)


def test_a_gguf_file_is_compared_with_the_model_that_it_was_made_from(tmp_path: Path) -> None:
    """The file's writer leaves the rows of queries and keys in their order, which readers of Llama's files undo."""
    base = make_base(tmp_path / "base", hidden_size=32, intermediate_size=56)
    file = write_gguf(tmp_path / "model.gguf", seed=0)
    assert trace_models(file, file).verdict.kind == NOTHING
    found = trace_models(file, base)
    assert {trace.name.split(".")[-2] for trace in found.tensors} == {"q_proj", "k_proj"}
    assert found.verdict.kind == UNKNOWN


@pytest.mark.parametrize("form", ["4bit", "8bit"])
def test_a_model_packed_by_bitsandbytes_is_requantized(form: str, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    packed = open_subject(base, quantize=form)
    packed.model.save_pretrained(tmp_path / "packed")
    packed.tokenizer.save_pretrained(tmp_path / "packed")
    found = trace_models(tmp_path / "packed", base)
    assert found.verdict.kind == REQUANTIZATION
    grids = {"4bit": {"4 bits"}, "8bit": {"8 bits in rows"}}
    assert {trace.grid for trace in found.tensors if trace.kind == REQUANTIZATION} == grids[form]
    assert not found.plan.edits


def test_the_command_prints_few_lines_and_writes_a_folder(base: Path, subject: Subject, tmp_path: Path) -> None:
    edited = bake_edit(base, one_direction(subject), tmp_path / "edited")
    out = tmp_path / "out"
    command = ["trace", str(edited), "--against", str(base), "--quiet", "--out", str(out)]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert "projection" in shown.output
    lines = [line for line in shown.output.splitlines() if not any(str(p) in line for p in (out, base, edited))]
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 80
    document = json.loads((out / "trace.json").read_text())
    assert document["verdict"]["kind"] == PROJECTION
    page = (out / "index.html").read_text()
    assert "A projection: 6 of" in page
    assert str(tmp_path) not in page
    applied_to = ["apply", str(out / "plan"), str(base), "--out", str(tmp_path / "again"), "--quiet"]
    assert CliRunner().invoke(app, applied_to).exit_code == 0
    assert trace_models(tmp_path / "again", edited).explained < 0.01  # no structure is left between the two


def test_json_is_one_document_and_errors_are_one_line(base: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["trace", str(base), "--against", str(base), "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["verdict"]["kind"] == NOTHING
    x = tmp_path / "x.txt"
    x.write_text("Why?\nHow?\n", encoding="utf-8")
    half = CliRunner().invoke(app, ["trace", str(base), "--against", str(base), "--target", str(x), "--quiet"])
    assert half.exit_code == 2
    assert "--control is missing" in half.output
