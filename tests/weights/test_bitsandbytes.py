"""Weights packed by bitsandbytes, on its CPU back end: read as numbers, edited, packed once, reloaded."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.checkpoints import read_weights
from tests.support.plans import PlanMaker, random_basis
from tests.support.tiny import BLOCKS, run_of, tiny, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from obliteratus.core.errors import UnsupportedModelError, UserError
from obliteratus.core.types import Edit, Plan, PromptSet, Shift, Subject
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.live.compile import compile_changes
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.rebirth import save as rebirth
from obliteratus.rebirth.save import save
from obliteratus.summon.load import open_subject, read_config
from obliteratus.summon.summary import summarize_model
from obliteratus.weights.bitsandbytes import unpacked_shape
from obliteratus.weights.matrices import count_inputs, read_weight
from obliteratus.weights.quantization import choose_storage_format
from obliteratus.weights.side_files import copy_side_files
from obliteratus.weights.sources import locate

pytest.importorskip("bitsandbytes")
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
SIZES = {"llama": {**BLOCKS, "intermediate_size": 128}, "qwen2": {**BLOCKS, "intermediate_size": 128}, "gpt2": BLOCKS}
CASES = [("llama", "nf4"), ("llama", "int8"), ("gpt2", "nf4"), ("gpt2", "int8"), ("llama", "fp4 double")]
Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """``folders(name)``: a full-precision model on disk; ``folders(name, kind)``: the same, stored packed."""

    @cache
    def make(name: str, kind: str = "") -> Path:
        folder: Path = tmp_path_factory.mktemp(f"{name}-{kind}".replace(" ", "-"))
        if kind:
            open_subject(make(name), quantize=KINDS[kind]).model.save_pretrained(folder)
        else:
            tiny(name, num_hidden_layers=2, **SIZES[name]).save_pretrained(folder, max_shard_size="100KB")
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return make


# --------------------------------------------------------------------------------- reading and opening
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_matrix_is_what_the_module_computes(name: str, kind: str, folders: Folders) -> None:
    """Also for Conv1D, which is packed the other way round, and after a forward pass, which moves int8's scales."""
    subject, plain = open_subject(folders(name, kind)), open_subject(folders(name))
    for _ in range(2):
        for site in subject.sites:
            module, exact = subject.module(site.path), read_weight(plain.module(site.path), site)
            weight = read_weight(module, site)
            assert weight.dtype == torch.float32
            assert weight.shape == exact.shape == (weight.shape[0], count_inputs(module, site))
            assert float((weight - exact).norm() / exact.norm()) < (0.02 if kind == "int8" else 0.15)
            if site.layout != "embedding":
                given = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
                bias = 0.0 if module.bias is None else module.bias.float()
                off = (module(given) - given @ weight.T - bias).norm() / module(given).norm()
                assert off < (0.02 if kind == "int8" else 1e-5)  # int8 rounds what goes in, too
        subject.model(torch.arange(12)[None])


def test_digest_quantization_and_coverage(folders: Folders) -> None:
    plain, here = open_subject(folders("llama")), open_subject(folders("llama"), quantize="4bit", self_test=True)
    assert here.source.quantization == "bitsandbytes nf4"
    assert here.source.digest == plain.source.digest  # the checkpoint's, whatever it is loaded as
    assert here.source.base == str(folders("llama"))
    stored = open_subject(folders("llama", "nf4"))
    assert (stored.source.quantization, stored.source.base) == ("bitsandbytes nf4", "")
    assert stored.source.digest == open_subject(folders("llama", "nf4")).source.digest
    assert (
        len({open_subject(folders("llama", kind)).source.digest for kind in ("nf4", "int8")} | {here.source.digest})
        == 3
    )


def test_the_digest_sees_the_scales(folders: Folders, tmp_path: Path) -> None:
    """Twice the weight has the same codes."""
    folder = tmp_path / "model"
    tiny("llama", num_hidden_layers=2, **SIZES["llama"]).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    doubled = open_subject(folder)
    doubled.module("model.layers.0.mlp.down_proj").weight.mul_(2)
    doubled.model.save_pretrained(folder)
    twice = tmp_path / "packed"
    open_subject(folder, quantize="4bit").model.save_pretrained(twice)
    tiny_tokenizer().save_pretrained(twice)
    assert open_subject(twice).source.digest != open_subject(folders("llama", "nf4")).source.digest


def test_inspect_knows_what_it_will_take(folders: Folders) -> None:
    for kind, label in (("nf4", "bitsandbytes nf4"), ("int8", "bitsandbytes int8")):
        subject = open_subject(folders("llama", kind))
        found = summarize_model(folders("llama", kind))
        assert (found.quantization, found.packed, found.sites) == (label, True, subject.sites)
        held = sum(t.numel() * t.element_size() for t in subject.model.state_dict().values())
        assert found.loaded_bytes == pytest.approx(held, rel=0.02)
        on_loading = summarize_model(folders("llama"), quantize=KINDS[kind])
        assert replace(found, source="") == replace(on_loading, source="")
    assert summarize_model(folders("llama")).loaded_bytes == summarize_model(folders("llama")).weight_bytes["float32"]


# ------------------------------------------------------------------------------------------ live edits
class Counts:
    """How often matrices are unpacked and packed, and how many unpacked ones there are at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, subject: Subject) -> None:
        import bitsandbytes.functional as functional

        own = {p.data_ptr() for p in subject.model.parameters()}
        self.read, self.packed, self.alive, self.most = 0, 0, 0, 0
        for name in ("dequantize_4bit", "int8_vectorwise_dequant"):
            monkeypatch.setattr(functional, name, self._reading(vars(functional)[name], own))
        for name in ("quantize_4bit", "int8_vectorwise_quant"):
            monkeypatch.setattr(functional, name, self._packing(vars(functional)[name]))

    def _reading(self, real: Callable[..., Any], own: set[int]) -> Callable[..., Any]:
        def read(codes: torch.Tensor, *rest: Any) -> Any:
            made = real(codes, *rest)
            if codes.data_ptr() in own:  # the other calls measure what packing lost
                self.read += 1
                self.alive += 1
                self.most = max(self.most, self.alive)
                weakref.finalize(made.untyped_storage(), self._gone)
            return made

        return read

    def _packing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def pack(*args: Any, **options: Any) -> Any:
            self.packed += 1
            return real(*args, **options)

        return pack

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_live_edits_unpack_only_where_a_norm_rule_measures(
    kind: str, folders: Folders, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_subject(folders("llama", kind))
    counts = Counts(monkeypatch, subject)
    for norm, most in (("none", 0), ("columns", 4)):
        for edits in make_plan(subject, norm=norm).by_site().values():
            compile_changes(subject.module(edits[0].site.path), edits)
        assert counts.read == most
    assert counts.most <= 1


@pytest.mark.parametrize(("name", "kind"), CASES[:4])
def test_live_is_the_edit_of_the_numbers(name: str, kind: str, folders: Folders, make_plan: PlanMaker) -> None:
    """At strength 1 nothing along the directions is left in what a writer puts out, whatever the weights' format."""
    subject = open_subject(folders(name, kind))
    plan = make_plan(subject, norm="columns")
    seen: dict[str, torch.Tensor] = {}
    with applied(subject, plan):
        for edit in plan.edits:
            subject.module(edit.site.path).register_forward_hook(
                lambda m, a, out, path=edit.site.path: seen.__setitem__(path, out)
            )
        subject.model(torch.arange(20)[None])
    for edit in plan.edits:
        bias = subject.module(edit.site.path).bias
        out = seen[edit.site.path]
        assert (out @ edit.basis.T).norm() < 1e-5 * out.norm(), (edit.site.path, bias is None)


# --------------------------------------------------------------------------------------------- REBIRTH
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_merged_packs_once_and_leaves_the_rest_alone(
    name: str, kind: str, folders: Folders, make_plan: PlanMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_subject(folders(name, kind))
    subject.model(torch.arange(12)[None])  # formats must survive use
    first, second = make_plan(subject, norm="columns"), make_plan(subject, norm="columns", seed=1)
    plan = first + second
    with monkeypatch.context() as patch:
        counts = Counts(patch, subject)
        (tmp_path / "merged").mkdir()
        copy_side_files(folders(name, kind), tmp_path / "merged")
        notes = rebirth.WRITERS["merged"](subject, plan, tmp_path / "merged")
        gc.collect()
    paths = {edits[0].site.path for edits in plan.by_site().values()}
    assert (counts.read, counts.packed, counts.most) == (len(paths), len(paths), 1)
    assert notes["requantized"]["matrices"] == len(paths)
    before, after = read_weights(folders(name, kind)), read_weights(tmp_path / "merged")
    assert before.keys() == after.keys()
    touched = {key for key in before if any(key.startswith(f"{path}.") for path in paths)}
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - touched)
    assert all(not torch.equal(before[f"{p}.weight"], after[f"{p}.weight"]) for p in paths)
    fresh = open_subject(tmp_path / "merged")
    lost = _lost(subject, fresh, plan)
    assert lost == pytest.approx(notes["requantized"]["error"], rel=1e-3)
    assert lost < (0.02 if kind == "int8" else 0.3)
    assert notes["requantized"]["kept"] == pytest.approx(1, abs=0.1)


def _lost(subject: Subject, fresh: Subject, plan: Plan) -> float:
    """‖stored − exact edit‖ / ‖exact edit‖ over all edited matrices, reckoned apart from the code under test."""
    off = whole = 0.0
    for edits in plan.by_site().values():
        path = edits[0].site.path
        weight = read_weight(subject.module(path), edits[0].site).double()
        for edit in edits:
            assert isinstance(edit, Edit)
            q = edit.basis.double()
            cut = weight - q.T @ (q @ weight)
            weight = cut * (weight.norm(dim=0) / cut.norm(dim=0))
        saved = read_weight(fresh.module(path), edits[0].site).double()
        off, whole = off + float((saved - weight).square().sum()), whole + float(weight.square().sum())
    return float((off / whole) ** 0.5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_saved_answers_as_reloaded_and_nearly_as_live(
    kind: str, folders: Folders, make_plan: PlanMaker, prompts: PromptSet, tmp_path: Path
) -> None:
    subject = open_subject(folders("llama", kind))
    plan = make_plan(subject)
    run = save(subject, plan, run_of(subject), tmp_path / "out", "merged", prompts)
    assert run.saved["rescore"]["max_kl"] < (0.01 if kind == "int8" else 0.1)  # the edit itself moves it by 0.2
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"quantized again as {subject.source.quantization}" in card
    mark = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert mark["load_in_4bit"] == (kind == "nf4")
    ids = render_prompts(subject, prompts["target"])
    one, two = (first_token_log_probs(open_subject(tmp_path / "out"), ids) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_on_packed_weights(
    kind: str, folders: Folders, make_plan: PlanMaker, prompts: PromptSet, tmp_path: Path
) -> None:
    subject = open_subject(folders("llama", kind))
    run = save(subject, make_plan(subject), run_of(subject), tmp_path / "out", "adapter", prompts)
    assert run.saved["rescore"]["max_kl"] < (1e-3 if kind == "int8" else 1e-5)
    assert run.saved["adapter"]["error"] == 0.0
    before = open_subject(folders("llama", kind)).model.state_dict()
    after = subject.model.state_dict()  # PEFT has been taken off again
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


# --------------------------------------------------------------------------- the full-precision sibling
@pytest.mark.parametrize(
    ("name", "parts"), [("llama", ("attn.out", "mlp.out")), ("qwen2", ("embed", "mlp.out")), ("gpt2", ("mlp.out",))]
)
def test_quantized_on_loading_bakes_into_its_source(
    name: str, parts: tuple[str, ...], folders: Folders, make_plan: PlanMaker, prompts: PromptSet, tmp_path: Path
) -> None:
    """Bit for bit what the full-precision model would have been saved as; also tied tables (qwen2) and Conv1D."""
    subject, plain = open_subject(folders(name), quantize="4bit"), open_subject(folders(name))
    plan = make_plan(subject, parts)
    run = save(subject, plan, run_of(subject), tmp_path / "out", "merged", prompts)
    assert run.saved["base"] == str(folders(name))
    save(plain, plan, run_of(plain), tmp_path / "plain", "merged", prompts)
    ours, theirs = read_weights(tmp_path / "out"), read_weights(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) == len(list(folders(name).glob("*.safetensors")))
    mine, other = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("out", "plain"))
    assert mine["tie_word_embeddings"] == other["tie_word_embeddings"]
    assert "quantization_config" not in mine
    assert "full-precision weights" in (tmp_path / "out" / "README.md").read_text()
    again = (open_subject(tmp_path / x).model(torch.arange(9)[None]).logits for x in ("out", "plain"))
    assert torch.equal(*again)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_checkpoint_bakes_into_the_base_that_is_given(
    kind: str, folders: Folders, make_plan: PlanMaker, tmp_path: Path
) -> None:
    subject, plain = open_subject(folders("llama", kind)), open_subject(folders("llama"))
    plan = make_plan(subject)
    save(subject, plan, run_of(subject), tmp_path / "out", "merged", base=str(folders("llama")))
    exact = {k: v() for k, v in bake(plain, Plan(plan.edits, plain.source.digest)).items()}
    saved = read_weights(tmp_path / "out")
    assert all(torch.equal(saved[key], exact[key]) for key in exact)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_another_base_is_refused_even_where_only_one_direction_differs(
    kind: str, folders: Folders, make_plan: PlanMaker, tmp_path: Path
) -> None:
    """A sibling that was edited once before looks alike to any tolerance but that of its codes."""
    plain, subject = open_subject(folders("llama")), open_subject(folders("llama", kind))
    save(plain, make_plan(plain, seed=3), run_of(plain), tmp_path / "edited", "merged")
    with pytest.raises(UserError, match=r"differs from the matrix that was quantized \(\d+\.\d% of its codes differ\)"):
        save(subject, make_plan(subject), run_of(subject), tmp_path / "out", base=str(tmp_path / "edited"))
    tiny("llama", num_hidden_layers=2).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match="its hidden_size is 32, the model's is 64"):
        save(subject, make_plan(subject), run_of(subject), tmp_path / "out", base=str(tmp_path / "small"))
    with pytest.raises(UserError, match="this checkpoint is quantized"):
        save(subject, make_plan(subject), run_of(subject), tmp_path / "out", base=str(folders("llama", kind)))
    with pytest.raises(UserError, match="works only with --save merged"):
        save(subject, make_plan(subject), run_of(subject), tmp_path / "out", "adapter", base=str(folders("llama")))
    with pytest.raises(UserError, match="is not quantized, and is edited itself"):
        save(plain, make_plan(plain), run_of(plain), tmp_path / "out", base=str(folders("llama")))
    assert not (tmp_path / "out").exists()


def told(note: torch.Tensor) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(bytes(note.tolist()))
    return read


def test_steering_alone_changes_no_code(folders: Folders, tmp_path: Path) -> None:
    """A shift is all bias: the matrix stays as it is, byte for byte."""
    subject = open_subject(folders("llama", "nf4"))
    site = next(s for s in subject.sites if s.part == "mlp.out")
    plan = Plan((Shift(site, torch.ones(64)),), subject.source.digest)
    save(subject, plan, run_of(subject), tmp_path / "out")
    before, after = read_weights(folders("llama", "nf4")), read_weights(tmp_path / "out")
    notes = {key for key in before if ".quant_state." in key}  # JSON, blanks at its end
    assert notes
    assert all(torch.equal(before[key], after[key]) for key in before.keys() - notes)
    assert all(told(before[key]) == told(after[key]) for key in notes)
    assert torch.equal(after[f"{site.path}.bias"], torch.ones(64))


def test_base_none_packs_again(folders: Folders, make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = open_subject(folders("llama"), quantize="8bit")
    run = save(subject, make_plan(subject), run_of(subject), tmp_path / "out", base="none")
    assert run.saved["requantized"]["matrices"] == 4
    assert open_subject(tmp_path / "out").source.quantization == "bitsandbytes int8"


def test_a_base_rounded_to_bf16_first_is_the_same_one(folders: Folders, make_plan: PlanMaker, tmp_path: Path) -> None:
    """Most packed checkpoints were made from bf16, whatever the base is stored in."""
    subject = open_subject(folders("llama"), quantize="4bit", dtype="bfloat16")
    run = save(subject, make_plan(subject), run_of(subject), tmp_path / "out")
    assert run.saved["base"] == str(folders("llama"))
    assert {v.dtype for v in read_weights(tmp_path / "out").values()} == {torch.float32}


# --------------------------------------------------------------------------------------------- refusals
def marked(folder: Path, mark: dict[str, Any]) -> Path:
    """A model folder whose configuration names a quantization, and whose weights would give themselves away."""
    tiny("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": mark}))
    return folder


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            "quantized as gptq, which is not supported: its",
        ),
        ({"quant_method": "awq", "bits": 4}, "quantized as awq, which is not supported"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "quantized as compressed-tensors"),
        ({"quant_method": "torchao", "quant_type": "int4"}, "quantized as torchao"),
        ({"quant_method": "zipped"}, "quantized as zipped, which is not supported: this format is unknown here"),
        ({"bits": 3}, "quantized as a format without a name"),
    ],
    ids=["gptq", "awq", "compressed", "torchao", "unknown", "nameless"],
)
def test_other_formats_are_refused_by_name(mark: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = marked(tmp_path / "model", mark)
    for opener in (open_subject, summarize_model):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            opener(folder)
        assert "\n" not in str(caught.value)
        assert "FP8, MXFP8 and MXFP4" in str(caught.value)


def test_fp8_is_loaded_as_floats_and_edited_as_such(make_plan: PlanMaker, tmp_path: Path) -> None:
    """A tiny checkpoint with float8 blocks and their scales, as the large ones have."""
    folder = tmp_path / "fp8"
    exact = tiny("llama", num_hidden_layers=2, **SIZES["llama"])
    exact.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(folder / "model.safetensors").items()}
    for key in [k for k in tensors if "_proj" in k]:
        scale = tensors[key].float().abs().max() / 448  # the largest float8_e4m3fn
        tensors[f"{key}_scale_inv"] = scale.reshape(1, 1)
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    mark = {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": mark}))
    subject = open_subject(folder)
    assert (subject.source.quantization, subject.source.dtype) == ("fp8", "bfloat16")
    assert summarize_model(folder).quantization == "fp8"
    site = next(s for s in subject.sites if s.part == "attn.out")
    assert not summarize_model(folder).packed
    weight = read_weight(subject.module(site.path), site)
    assert float((weight - read_weight(exact.get_submodule(site.path), site)).norm() / weight.norm()) < 0.05
    run = save(subject, make_plan(subject), run_of(subject), tmp_path / "out")
    assert "requantized" not in run.saved
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {v.dtype for v in read_weights(tmp_path / "out").values()} == {torch.bfloat16}


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def test_mxfp4_comes_as_floats(tmp_path: Path) -> None:
    """`choose_storage_format` dequantizes a tiny gpt-oss file, with 32 codes and an exponent a block."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16, "num_key_value_heads": 2}
    common = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("gpt_oss", vocab_size=264, dtype="bfloat16", **sizes, **common)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = {k: v.bfloat16() for k, v in load_file(tmp_path / "model.safetensors").items()}
    draw = torch.Generator().manual_seed(0)
    expected = {}
    for name, rows in (("gate_up_proj", 128), ("down_proj", 64)):
        stem = f"model.layers.0.mlp.experts.{name}"
        blocks = torch.randint(0, 256, (2, rows, 2, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(118, 124, (2, rows, 2), generator=draw, dtype=torch.uint8)
        codes = torch.stack([blocks & 0xF, blocks >> 4], -1).flatten(-2).long()
        values = FP4[codes] * 2.0 ** (scales.float() - 127)[..., None]
        expected[name] = values.reshape(2, rows, 64).mT  # gpt-oss keeps its experts [in, out]
        del tensors[stem]
        tensors |= {f"{stem}_blocks": blocks, f"{stem}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mark = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "quantization_config": mark}))
    origin = locate(tmp_path)
    storage = choose_storage_format(origin, read_config(origin))
    assert (storage.label, storage.packed) == ("mxfp4", False)
    experts = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", **storage.options).model.layers[0].mlp.experts
    )
    for name, values in expected.items():
        assert torch.equal(experts.get_parameter(name).float(), values)


def test_what_cannot_be_quantized(folders: Folders) -> None:
    with pytest.raises(UserError, match=r"is already quantized \(bitsandbytes nf4\); leave --quantize out"):
        open_subject(folders("llama", "nf4"), quantize="4bit")
    with pytest.raises(UserError, match="--quantize '5bit' does not exist"):
        open_subject(folders("llama"), quantize="5bit")


def test_bytes_kept_as_bf16_are_not_taken_for_numbers(folders: Folders) -> None:
    """bnb_4bit_quant_storage=bfloat16, as FSDP wants it: codes whose bits spell NaN."""
    subject = open_subject(folders("llama"), quantize={**KINDS["nf4"], "bnb_4bit_quant_storage": "bfloat16"})
    site = next(s for s in subject.sites if s.part == "attn.out")
    module = subject.module(site.path)
    assert module.weight.dtype == torch.bfloat16
    assert unpacked_shape(module.weight) == tuple(open_subject(folders("llama")).module(site.path).weight.shape)
    assert torch.isfinite(read_weight(module, site)).all()
    q = random_basis(64, 1, 0)
    edit = next(Edit(s, q, 1.0) for s in subject.sites if s.part == "mlp.out")
    made = {k: v() for k, v in bake(subject, Plan((edit,), subject.source.digest)).items()}
    assert made[f"{edit.site.path}.weight"].dtype == torch.bfloat16
