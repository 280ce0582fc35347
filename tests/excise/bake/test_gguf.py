"""A plan baked onto a GGUF file is the live edit; all else keeps every byte, and what does not fit is refused first."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from tests.support.gguf_files import write_gguf
from tests.support.plans import PlanMaker, random_basis
from tests.support.tiny import run_of

from obliteratus.core.errors import UserError
from obliteratus.core.types import Edit, Mask, Plan, Shift, Subject, ZeroOutput
from obliteratus.excise.bake import gguf as baking
from obliteratus.excise.bake.gguf import bake_into_gguf
from obliteratus.excise.bake.gguf_checks import check_gguf_fits
from obliteratus.excise.bake.gguf_names import GgufModel
from obliteratus.excise.live.hooks import applied
from obliteratus.rebirth.gguf import save_as_file
from obliteratus.summon.load import open_subject
from obliteratus.summon.model_samples import ModelSamples, sample_model
from obliteratus.weights.gguf_blocks import CODES, decode, encode
from obliteratus.weights.gguf_io import read_gguf
from obliteratus.weights.rewrite_gguf import rewrite_gguf

IDS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3_moe"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(write_gguf(tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf", request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf"))


def model_of(subject: Subject) -> GgufModel:
    return GgufModel(read_gguf(Path(subject.source.id)))


@torch.no_grad()
def logits(subject: Subject, plan: Plan | None = None) -> torch.Tensor:
    with applied(subject, plan or Plan()):
        found: torch.Tensor = subject.model(IDS).logits
    return found


def bake(subject: Subject, plan: Plan, target: Path) -> dict[str, Any]:
    check_gguf_fits(model_of(subject), plan, sample_model(subject))
    return bake_into_gguf(model_of(subject), plan, target)


PLANS: dict[str, dict[str, Any]] = {
    "writers": {},
    "columns": {"norm": "columns", "strength": 0.7},
    "rows": {"norm": "rows"},
    "embedding": {"parts": ("embed", "mlp.out")},
    "readers": {"parts": ("attn.in", "mlp.in", "attn.out")},
    "head": {"parts": ("unembed", "attn.out")},
}


@pytest.mark.parametrize("name", PLANS)
def test_the_baked_file_is_the_live_edit(name: str, subject: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    plan = make_plan(subject, **PLANS[name])
    bake(subject, plan, tmp_path / "edited.gguf")
    live, saved = logits(subject, plan), logits(open_subject(tmp_path / "edited.gguf"))
    torch.testing.assert_close(saved, live, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(subject), live, atol=1e-2)


def test_other_changes_are_baked_as_well(llama: Subject, tmp_path: Path) -> None:
    writers = [site for site in llama.sites if site.part == "mlp.out"]
    heads = next(site for site in llama.sites if site.part == "attn.out")
    plan = Plan(
        (
            Mask(writers[0], torch.tensor([3, 5])),
            ZeroOutput(writers[1]),
            Edit(replace(heads, span=(8, 16)), random_basis(llama.width, 2, 3), 1.0),
            Shift(writers[2], torch.linspace(-1, 1, llama.width)),
        ),
        llama.source.digest,
    )
    bake(llama, plan, tmp_path / "edited.gguf")
    torch.testing.assert_close(
        logits(open_subject(tmp_path / "edited.gguf")), logits(llama, plan), rtol=1e-4, atol=1e-4
    )


def test_new_biases_are_written_and_loaded(llama: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    """transformers has a switch for them that GGUF files do not hold: the file's tensors set it."""
    plan = make_plan(llama, anchored=True)
    record = bake(llama, plan, tmp_path / "edited.gguf")
    assert record["onto"]["tensors"] == {"edited": 6, "added": 6}
    added = read_gguf(tmp_path / "edited.gguf").tensors.keys() - read_gguf(Path(llama.source.id)).tensors.keys()
    assert added == {f"blk.{i}.{name}.bias" for i in range(3) for name in ("attn_output", "ffn_down")}
    torch.testing.assert_close(
        logits(open_subject(tmp_path / "edited.gguf")), logits(llama, plan), rtol=1e-4, atol=1e-4
    )


def test_what_is_not_edited_keeps_every_byte(llama: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    plan = make_plan(llama, ("mlp.out",))
    bake(llama, plan, tmp_path / "edited.gguf")
    before, after = read_gguf(Path(llama.source.id)), read_gguf(tmp_path / "edited.gguf")
    assert (after.raw, after.version, list(after.tensors)) == (before.raw, before.version, list(before.tensors))
    pairs = {name: (before.read_rows(t), after.read_rows(after.tensors[name])) for name, t in before.tensors.items()}
    assert {name for name, (old, new) in pairs.items() if not np.array_equal(old, new)} == {
        f"blk.{layer}.ffn_down.weight" for layer in range(3)
    }


# ------------------------------------------------------------------------------------ quantized types
def quantized(file: Path, target: Path, kind: T) -> Path:
    """The same file with its output matrices in another type; k-quants get random codes, since nothing writes them."""
    source = read_gguf(file)
    names = [name for name in source.tensors if name.endswith(("ffn_down.weight", "attn_output.weight"))]
    changed = {name: replace(source.tensors[name], type=kind) for name in names}
    edits = {name: partial(_encode, source, name, kind) for name in names}
    rewrite_gguf(source, target, edits, changed)
    return target


def _encode(source: Any, name: str, kind: T) -> list[np.ndarray]:
    values = decode(source.read_rows(source.tensors[name]), source.tensors[name].type)
    try:
        return [encode(values, kind)]
    except NotImplementedError:
        size = gguf.GGML_QUANT_SIZES[kind][1]
        draw = np.random.default_rng(0)
        stored = draw.integers(0, 256, (len(values), size * values.shape[1] // 256), dtype=np.uint8)
        blocks = stored.reshape(-1, size)
        for place in {T.Q2_K: (80, 82), T.Q3_K: (108,), T.Q6_K: (208,)}.get(kind, (0, 2)):
            blocks[:, place : place + 2] = np.full((len(blocks), 1), 2e-3, np.float16).view(np.uint8)
        return [stored]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows hold whole blocks of every type."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "wide.gguf", "llama", **sizes)


@pytest.mark.parametrize("kind", [*CODES, T.F16, T.BF16], ids=lambda kind: kind.name)
def test_an_edit_survives_in_every_type(kind: T, wide: Path, make_plan: PlanMaker, tmp_path: Path) -> None:
    """The stored matrix has lost the direction, where rounding the edited numbers alone would bring it back."""
    source = quantized(wide, tmp_path / "q.gguf", kind)
    subject = open_subject(source)
    plan = make_plan(subject, ("mlp.out",), k=1)
    record = bake(subject, plan, tmp_path / "edited.gguf")
    before, after = read_gguf(source), read_gguf(tmp_path / "edited.gguf")
    assert {t.type for t in after.tensors.values()} == {t.type for t in before.tensors.values()}
    for edit in plan.edits:
        name = f"blk.{edit.site.layer}.ffn_down.weight"
        old, new = (decode(file.read_rows(file.tensors[name]), kind) for file in (before, after))
        assert isinstance(edit, Edit)
        left = 0.2 if kind == T.Q2_K else 0.08  # four levels reach no further
        assert float((edit.basis @ new).norm()) < left * float((edit.basis @ old).norm())
        assert float((new - old).norm()) < 0.35 * float(old.norm())
    assert record["requantized"]["kept"] > 0.9


def test_a_type_that_nothing_writes_becomes_a_larger_one(wide: Path, make_plan: PlanMaker, tmp_path: Path) -> None:
    source = tmp_path / "q.gguf"
    header = read_gguf(wide)
    name = "blk.0.ffn_down.weight"
    block = np.zeros((256, 2 * gguf.GGML_QUANT_SIZES[T.IQ4_XS][1]), np.uint8)
    block[:, 0:2] = block[:, 136:138] = np.full((256, 1), 1e-3, np.float16).view(np.uint8)
    block[:, 8:136] = block[:, 144:272] = np.random.default_rng(0).integers(0, 256, (256, 128))
    rewrite_gguf(header, source, {name: lambda: [block]}, {name: replace(header.tensors[name], type=T.IQ4_XS)})
    subject = open_subject(source)
    plan = make_plan(subject, ("mlp.out",))
    record = bake(subject, plan, tmp_path / "edited.gguf")
    assert record["retyped"] == {name: "Q5_0"}
    edit, after = plan.edits[0], read_gguf(tmp_path / "edited.gguf")
    assert isinstance(edit, Edit)
    old, new = (
        decode(rows, kind) for rows, kind in ((block, T.IQ4_XS), (after.read_rows(after.tensors[name]), T.Q5_0))
    )
    exact = old - edit.basis.T @ (edit.basis @ old)
    assert float((new - exact).norm()) < 0.06 * float(old.norm())
    assert float((edit.basis @ new).norm()) < 0.08 * float((edit.basis @ old).norm())


# -------------------------------------------------------------------------------------- what is refused
def refused(model: GgufModel, plan: Plan, samples: ModelSamples) -> str:
    with pytest.raises(UserError) as error:
        check_gguf_fits(model, plan, samples)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_of_another_model_is_refused(llama: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    plan, samples = make_plan(llama), sample_model(llama)
    check_gguf_fits(model_of(llama), plan, samples)
    other = GgufModel(read_gguf(write_gguf(tmp_path / "other.gguf", "llama", seed=1)))
    assert "is of another model: its weights differ" in refused(other, plan, samples)
    shallow = GgufModel(read_gguf(write_gguf(tmp_path / "shallow.gguf", "llama", num_hidden_layers=2)))
    assert "it has 2 blocks, and the plan edits block 2" in refused(shallow, plan, samples)
    narrow = GgufModel(read_gguf(write_gguf(tmp_path / "narrow.gguf", "llama", hidden_size=64)))
    assert "directions have 32 numbers" in refused(narrow, plan, samples)


def test_another_vocabulary_is_refused(llama: Subject, make_plan: PlanMaker) -> None:
    plan, samples = make_plan(llama), sample_model(llama)
    assert "has a vocabulary of 264 tokens" in refused(model_of(llama), plan, replace(samples, rows=300))
    shifted = {n: samples.tokens[m] for n, m in zip(samples.tokens, [*samples.tokens][1:], strict=False)}
    assert "has another vocabulary" in refused(model_of(llama), plan, replace(samples, tokens=shifted))


def test_a_plan_that_says_nothing_of_its_model_is_refused(llama: Subject, make_plan: PlanMaker) -> None:
    assert "holds no samples" in refused(model_of(llama), make_plan(llama), ModelSamples())


def test_a_bias_without_a_place_is_refused(make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = open_subject(write_gguf(tmp_path / "qwen3.gguf", "qwen3"))
    message = refused(model_of(subject), make_plan(subject, anchored=True), sample_model(subject))
    assert "llama.cpp's 'qwen3' graph has none at blk.0.attn_output.bias" in message


def test_a_type_that_nothing_reads_is_refused(llama: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    source, name = read_gguf(Path(llama.source.id)), "blk.0.ffn_down.weight"
    changed = replace(source.tensors[name], type=T.I8)
    rewrite_gguf(source, tmp_path / "i8.gguf", {name: lambda: [np.zeros(changed.size, np.uint8)]}, {name: changed})
    message = refused(GgufModel(read_gguf(tmp_path / "i8.gguf")), make_plan(llama), sample_model(llama))
    assert "stored as I8, which the gguf package cannot read" in message


def test_a_plan_of_readers_is_checked_as_well(llama: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    other = GgufModel(read_gguf(write_gguf(tmp_path / "other.gguf", "llama", seed=1)))
    assert "is of another model" in refused(other, make_plan(llama, ("attn.in",)), sample_model(llama))


def test_an_adapter_file_is_no_model(llama: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = GgufModel(read_gguf(tmp_path / "adapter.gguf"))
    assert "holds no model but a adapter" in refused(model, make_plan(llama), sample_model(llama))


def test_an_interruption_leaves_nothing(
    llama: Subject, make_plan: PlanMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out, done = make_plan(llama), tmp_path / "edited.gguf", list[int]()

    def stop(self: Any) -> Any:
        done.append(1)
        if len(done) > 3:
            raise KeyboardInterrupt
        return original(self)

    original = baking.StoredMatrix.write
    with monkeypatch.context() as patch:
        patch.setattr(baking.StoredMatrix, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            save_as_file(model_of(llama), plan, sample_model(llama), run_of(llama), out)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".edited.partial").mkdir()  # what a killed process leaves
    (tmp_path / ".edited.partial/edited.gguf.new").write_bytes(b"half of it")
    save_as_file(model_of(llama), plan, sample_model(llama), run_of(llama), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "edited.Modelfile",
        "edited.gguf",
        "edited.json",
        "edited.llama-cpp.sh",
    ]
