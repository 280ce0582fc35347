"""A plan baked onto a checkpoint's own files: what was measured is what is saved, all else stays byte for byte, and
neither a kill nor a full disk nor a broken file leaves anything that looks finished."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.support.checkpoints import SMALL, shards, stored
from tests.support.plans import PlanMaker, random_basis
from tests.support.tiny import MODELS, run_of, tiny, tiny_subject, tiny_tokenizer

from obliteratus.cli.apply_plan import apply_plan
from obliteratus.core.clock import Clock
from obliteratus.core.errors import UserError
from obliteratus.core.types import Blend, Edit, Plan, Shift, Subject
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.writers import can_hold_anchors
from obliteratus.rebirth import save as rebirth
from obliteratus.rebirth.save import save
from obliteratus.summon.load import open_subject
from obliteratus.weights.checkpoint import find_own_checkpoint
from obliteratus.weights.rewrite import FinishedFiles, read_finished_hashes, rewrite_file
from obliteratus.weights.safetensors_io import read_header

IDS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
INDEX = "model.safetensors.index.json"
KILLS = 5


def raw(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor's dtype and bytes, by name, as the files hold them."""
    found = {}
    for file in shards(folder):
        data, header = file.read_bytes(), read_header(file)
        for name, entry in header.entries.items():
            start = len(header.raw) + entry.start
            found[name] = (entry.dtype, data[start : start + entry.size])
    return found


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights_of(folder: Path) -> dict[str, str]:
    return {name: known for name, known in sums(folder).items() if name.endswith((".safetensors", INDEX))}


@torch.no_grad()
def logits(subject: Subject) -> torch.Tensor:
    found: torch.Tensor = subject.model(IDS).logits
    return found


def live(subject: Subject, plan: Plan) -> torch.Tensor:
    with applied(subject, plan):
        return logits(subject)


def replace_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """A file with other tensors, its metadata kept."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


# ------------------------------------------------------------------------------ streamed ≡ in memory ≡ live
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_family_is_baked_as_in_memory_and_answers_as_live(
    name: str, make_plan: PlanMaker, tmp_path: Path
) -> None:
    subject = open_subject(stored(tmp_path / "model", name))
    plan = make_plan(subject, strength=0.8)
    expected = live(subject, plan)
    run = save(subject, plan, run_of(subject), tmp_path / "out")
    assert "from_memory" not in run.saved
    assert run.saved["onto"]["name"] == str(tmp_path / "model")
    before, after = raw(tmp_path / "model"), raw(tmp_path / "out")
    assert list(before) == list(after)
    fresh = open_subject(tmp_path / "out")
    new, exact, old = fresh.model.state_dict(), bake(subject, plan), subject.model.state_dict()
    for key in new:
        if key in exact:
            torch.testing.assert_close(new[key], exact[key](), rtol=1e-6, atol=1e-7)
            assert not torch.equal(new[key], old[key])
        else:
            assert torch.equal(new[key], old[key])
    torch.testing.assert_close(logits(fresh), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    other = live(subject, make_plan(subject, strength=0.8, seed=1))
    assert not torch.allclose(logits(fresh), other, rtol=1e-4, atol=1e-4)


WRITING, ENDS, READING = ("attn.out", "mlp.out"), ("embed", "unembed"), ("mlp.in", "router", "attn.in")


@pytest.mark.parametrize(
    ("name", "parts"),
    [("llama", ENDS), ("llama", READING), ("mixtral", WRITING), ("mixtral", READING), ("gpt_oss", READING)],
)
def test_one_file_or_many_hold_the_same(
    name: str, parts: tuple[str, ...], make_plan: PlanMaker, tmp_path: Path
) -> None:
    made = {}
    for shard in (SMALL, "1GB"):
        source = stored(tmp_path / f"model{shard}", name, shard)
        subject = open_subject(source)
        there = [part for part in parts if part != "router" or any(s.part == "router" for s in subject.sites)]
        plan = make_plan(subject, there)
        run = save(subject, plan, run_of(subject), tmp_path / f"out{shard}")
        assert "from_memory" not in run.saved
        assert [f.name for f in shards(tmp_path / f"out{shard}")] == [f.name for f in shards(source)]
        made[shard] = {k: v for file in shards(tmp_path / f"out{shard}") for k, v in load_file(file).items()}
        found = logits(open_subject(tmp_path / f"out{shard}"))
        torch.testing.assert_close(found, live(subject, plan), rtol=1e-4, atol=1e-4)
    assert len(shards(tmp_path / f"out{SMALL}")) > 2
    assert made[SMALL].keys() == made["1GB"].keys()
    for key, value in made[SMALL].items():  # products of numbers that lie elsewhere in the file differ in the last bit
        torch.testing.assert_close(value, made["1GB"][key], rtol=1e-6, atol=1e-7)


def test_experts_kept_one_by_one_are_edited_and_blended_one_by_one(tmp_path: Path) -> None:
    subject = open_subject(stored(tmp_path / "model", "mixtral"))
    site = next(s for s in subject.sites if s.part == "expert.out")
    one, two = (type(site)(**{**vars(site), "expert": expert}) for expert in (1, 2))
    basis = random_basis(subject.width, 2, 0)
    changes = (Blend(one, torch.tensor([0, 3]), 0.4), Edit(one, basis, 1.0), Edit(two, basis, 0.5, "columns"))
    plan = Plan(changes, subject.source.digest)
    run = save(subject, plan, run_of(subject), tmp_path / "out")
    assert run.saved["onto"]["tensors"] == {"edited": 2, "added": 0}
    torch.testing.assert_close(logits(open_subject(tmp_path / "out")), live(subject, plan), rtol=1e-4, atol=1e-4)
    before, after = raw(tmp_path / "model"), raw(tmp_path / "out")
    changed = {key for key in before if before[key] != after[key]}
    assert len(changed) == 2
    assert all(".experts.1." in key or ".experts.2." in key for key in changed)


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1", "olmoe"])  # switches of both halves and of one
def test_new_biases_and_a_parted_head_go_into_the_last_file_and_the_index(
    name: str, make_plan: PlanMaker, tmp_path: Path
) -> None:
    subject = open_subject(stored(tmp_path / "model", name))
    anchored = make_plan(subject, ("attn.out", "mlp.out"), anchored=True)
    kept = [edit for edit in anchored.edits if can_hold_anchors(subject, [edit.site])]
    plan = Plan((*kept, *make_plan(subject, ("embed",)).edits), anchored.model)
    run = save(subject, plan, run_of(subject), tmp_path / "out")
    before, after = raw(tmp_path / "model"), raw(tmp_path / "out")
    new = after.keys() - before.keys()
    assert run.saved["onto"]["tensors"]["added"] == len(new) > 0
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    old = json.loads((tmp_path / "model" / INDEX).read_text())
    assert {index["weight_map"][key] for key in new} == {shards(tmp_path / "out")[-1].name}
    assert {key: index["weight_map"][key] for key in before} == old["weight_map"]
    assert index["metadata"]["total_size"] - old["metadata"]["total_size"] == sum(len(after[key][1]) for key in new)
    torch.testing.assert_close(logits(open_subject(tmp_path / "out")), live(subject, plan), rtol=1e-4, atol=1e-4)


def test_names_without_the_backbones_prefix_stay_so(make_plan: PlanMaker, tmp_path: Path) -> None:
    """As GPT-2's own files have them; the head that parts from the table still finds its place."""
    folder = stored(tmp_path / "model", "gpt2", "1GB")

    def bare(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)

    replace_tensors(folder / "model.safetensors", bare)
    subject = open_subject(folder)
    plan = make_plan(subject, ("embed", "mlp.out"))
    save(subject, plan, run_of(subject), tmp_path / "out")
    after = raw(tmp_path / "out")
    assert after.keys() - raw(folder).keys() == {"lm_head.weight"}
    assert after["lm_head.weight"] == raw(folder)["wte.weight"]  # the head is what the table was
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    torch.testing.assert_close(logits(open_subject(tmp_path / "out")), live(subject, plan), rtol=1e-4, atol=1e-4)


def test_what_is_not_stored_by_itself_is_written_from_memory_and_said(make_plan: PlanMaker, tmp_path: Path) -> None:
    """A tied table that is stored as the head alone: its own name is nowhere."""
    folder = stored(tmp_path / "model", "qwen2", "1GB")

    def as_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    replace_tensors(folder / "model.safetensors", as_head)
    subject = open_subject(folder)
    plan = make_plan(subject, ("embed",))
    run = save(subject, plan, run_of(subject), tmp_path / "out")
    assert "model.embed_tokens.weight is stored in another form" in run.saved["from_memory"]
    assert "onto" not in run.saved
    usual = make_plan(subject, ("mlp.out",))
    assert "from_memory" not in save(subject, usual, run_of(subject), tmp_path / "usual").saved


# ------------------------------------------------------------------------------------- byte for byte
def furnished(folder: Path) -> Path:
    """A sharded checkpoint with what the model class does not know: a draft layer, a tower, a scale in fp8; odd
    metadata, a license, custom code, and old weights in other forms."""
    stored(folder, "llama")
    extra = {
        "mtp.layers.0.weight": torch.randn(5, 3).bfloat16(),
        "vision.table": torch.arange(7),
        "quant.scale": torch.randn(9).to(torch.float8_e4m3fn),
    }
    last = shards(folder)[-1]
    save_file({**load_file(last), **extra}, last, metadata={"format": "pt", "made_by": "a test"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(extra, last.name)
    index["metadata"]["note"] = "kept"
    (folder / INDEX).write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "draft_layers": 1}))
    for name in ("LICENSE", "modeling_own.py", "vocab.txt"):
        (folder / name).write_text(f"what {name} says")
    for name in ("pytorch_model.bin", "old.gguf", "consolidated.safetensors", "pytorch_model.bin.index.json"):
        (folder / name).write_text("old weights")
    return folder


def test_what_is_not_touched_is_byte_for_byte_what_it_was(tmp_path: Path) -> None:
    folder = furnished(tmp_path / "model")
    subject = open_subject(folder)
    site = next(s for s in subject.sites if s.part == "mlp.out")
    plan = Plan((Edit(site, random_basis(subject.width, 1, 0), 1.0),), subject.source.digest)
    source = sums(folder)
    run = save(subject, plan, run_of(subject), tmp_path / "out")
    assert sums(folder) == source
    before, after = raw(folder), raw(tmp_path / "out")
    assert list(before) == list(after)
    assert {key for key in before if before[key] != after[key]} == {site.parameter}
    made = sums(tmp_path / "out")
    untouched = [f.name for f in shards(folder) if site.parameter not in read_header(f).entries]
    assert len(untouched) == len(shards(folder)) - 1 == run.saved["onto"]["copied"]
    kept = [*untouched, INDEX, "LICENSE", "modeling_own.py", "vocab.txt"]
    assert {name: made[name] for name in kept} == {name: source[name] for name in kept}
    old, new = (json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (folder, tmp_path / "out"))
    assert new.keys() - old.keys() == {"rope_theta"}  # as transformers 4 reads it
    assert {key: new[key] for key in old} == old
    touched = next(f for f in shards(folder) if f.name not in untouched)
    assert made[touched.name] != source[touched.name]
    assert read_header(tmp_path / "out" / touched.name).raw == read_header(touched).raw
    assert not {"pytorch_model.bin", "old.gguf", "consolidated.safetensors"} & made.keys()
    assert "pytorch_model.bin.index.json" not in made
    assert {name: about["sha256"] for name, about in run.saved["files"].items()} == {
        n: made[n] for n in run.saved["files"]
    }
    assert all(about["bytes"] == (tmp_path / "out" / n).stat().st_size for n, about in run.saved["files"].items())


def test_steering_leaves_every_matrix_alone(tmp_path: Path) -> None:
    subject = open_subject(stored(tmp_path / "model", "llama_biased"))
    site = next(s for s in subject.sites if s.part == "mlp.out")
    plan = Plan((Shift(site, torch.ones(subject.width)),), subject.source.digest)
    save(subject, plan, run_of(subject), tmp_path / "out")
    before, after = raw(tmp_path / "model"), raw(tmp_path / "out")
    assert {key for key in before if before[key] != after[key]} == {f"{site.path}.bias"}


@pytest.mark.parametrize(("kept", "loaded"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_stored_numbers_are_edited_and_rounded_once_to_the_stored_dtype(
    kept: str, loaded: str, make_plan: PlanMaker, tmp_path: Path
) -> None:
    """Whatever they were loaded in."""
    folder = tmp_path / "model"
    tiny("llama").to(getattr(torch, kept)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    subject, exact = open_subject(folder, dtype=loaded), open_subject(folder, dtype="float32")
    plan = make_plan(subject, norm="columns")
    save(subject, plan, run_of(subject), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {getattr(torch, kept)}
    for key, value in bake(exact, plan).items():
        assert torch.equal(saved[key], value().to(getattr(torch, kept)))
    twice = bake(subject, plan)
    if loaded == "bfloat16":  # the negative control: an edit of what had been rounded before
        assert any(not torch.equal(saved[key], value().float()) for key, value in twice.items())


def test_new_tensors_stay_aligned(tmp_path: Path) -> None:
    """Numbers of odd length and several widths: readers map the file, and cannot read askew."""
    tensors = {"a": torch.randn(3), "b": torch.randn(3).bfloat16(), "c": torch.ones(5, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "in", metadata={"x": "y"})
    like = {"d": torch.empty(3, device="meta"), "e": torch.empty(1, 5, dtype=torch.bfloat16, device="meta")}
    made = {"d": torch.randn(3), "e": torch.randn(1, 5).bfloat16()}
    known = rewrite_file(tmp_path / "in", tmp_path / "out", {k: lambda k=k: [made[k]] for k in made}, like)
    found = load_file(tmp_path / "out")
    assert all(torch.equal(found[key], value) for key, value in {**tensors, **made}.items())
    assert known == hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest()
    assert read_header(tmp_path / "out").metadata == {"x": "y"}
    with pytest.raises(ValueError, match="a takes 12 bytes, but its pieces take 8"):
        rewrite_file(tmp_path / "in", tmp_path / "other", {"a": lambda: [torch.ones(2)]}, {})
    assert not list(tmp_path.glob("other*"))


# ------------------------------------------------------------------------------------------- memory
def peak(work: Callable[[], Any]) -> int:
    """Bytes by which the process's resident memory rose at most meanwhile."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak: proc(5)
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def test_one_tensor_is_in_memory_at_a_time(make_plan: PlanMaker, tmp_path: Path) -> None:
    """A shard of 180 MB: 12 edited matrices of 1 and 4 MB, and a tensor of 80 MB that the model does not have."""
    folder = stored(tmp_path / "model", "llama", "1GB", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    file = folder / "model.safetensors"
    replace_tensors(file, lambda tensors: tensors.update(unknown=torch.ones(20_000_000)))
    assert file.stat().st_size > 150e6
    subject = open_subject(folder)
    plan = make_plan(subject)
    (tmp_path / "out").mkdir()
    files = find_own_checkpoint(subject)
    assert files is not None
    onto = rebirth.BaseCheckpoint(subject, files)
    (tmp_path / "warm").mkdir()
    rebirth.bake_into_checkpoint(onto, plan, tmp_path / "warm")
    took = peak(lambda: rebirth.bake_into_checkpoint(onto, plan, tmp_path / "out"))
    assert took < 40e6
    assert peak(lambda: load_file(file)["unknown"].sum()) > 60e6  # what is seen where a whole tensor is held


# ------------------------------------------------------------------------------------- kills and resumes
def child(work: Callable[[], Any]) -> int:
    """The id of a process that does this and nothing else, and ends without any cleaning up."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def killed(work: Callable[[], Any], seconds: float) -> bool:
    """Whether kill −9 after that time met it at work."""
    process = child(work)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def test_a_kill_at_any_moment_is_gone_on_from(make_plan: PlanMaker, tmp_path: Path) -> None:
    """Moments spread over the time that it takes: afterwards the same bytes as of an undisturbed run."""
    folder = stored(tmp_path / "model", "llama", "300KB", hidden_size=128, intermediate_size=512, num_hidden_layers=6)
    subject = open_subject(folder)
    plan, source = make_plan(subject), sums(folder)

    def bake(out: Path) -> Any:
        return save(subject, plan, run_of(subject), out)

    start = time.perf_counter()
    bake(tmp_path / "whole")
    took = time.perf_counter() - start
    expected = weights_of(tmp_path / "whole")
    assert len(expected) > 10
    draw, met, kept = random.Random(0), 0, 0
    for number in range(KILLS):
        out = tmp_path / f"out{number}"
        hit = killed(lambda out=out: bake(out), (0.02 + 0.88 * (number + draw.random()) / KILLS) * took)
        met += hit
        assert out.exists() != hit
        if hit:
            partial = out.with_name(f"{out.name}.saving") / "output"
            kept += len(read_finished_hashes(partial)) > 0
            bake(out)
        assert weights_of(out) == expected
        assert not out.with_name(f"{out.name}.saving").exists()
    assert met >= KILLS // 2
    assert kept > 0
    assert sums(folder) == source


def test_only_files_with_their_sum_are_trusted(make_plan: PlanMaker, tmp_path: Path) -> None:
    """A finished file is not written again; one that was altered meanwhile is, and so are all of another plan."""
    subject = open_subject(stored(tmp_path / "model", "llama"))
    plan, other, folder = make_plan(subject), make_plan(subject, seed=1), tmp_path / "out"
    folder.mkdir()
    files = find_own_checkpoint(subject)
    assert files is not None
    onto = rebirth.BaseCheckpoint(subject, files)

    def times() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in shards(folder)}

    rebirth.bake_into_checkpoint(onto, plan, folder)
    first, expected = times(), weights_of(folder)
    rebirth.bake_into_checkpoint(onto, plan, folder)
    assert times() == first
    broken = shards(folder)[1]
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    at = times()
    rebirth.bake_into_checkpoint(onto, plan, folder)
    assert {name for name, when in times().items() if when != at[name]} == {broken.name}
    assert weights_of(folder) == expected
    rebirth.bake_into_checkpoint(onto, other, folder)
    assert all(when != first[name] for name, when in times().items())
    assert weights_of(folder) != expected


def test_a_stale_record_of_another_form_is_forgotten(make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = open_subject(stored(tmp_path / "model", "llama"))
    partial = tmp_path / "out.saving"
    (partial / "output").mkdir(parents=True)
    done = FinishedFiles(partial / "output", "an older bake")
    done.write("model-old.safetensors", lambda path: str(path.write_bytes(b"x")))
    save(subject, make_plan(subject), run_of(subject), tmp_path / "out", "plan")
    assert not list((tmp_path / "out").glob("model*"))


# ------------------------------------------------------------------------------- disks and broken files
def test_a_disk_that_fills_up_is_one_line_and_can_be_gone_on_from(make_plan: PlanMaker, tmp_path: Path) -> None:
    """A limit on a file's length stands in for the disk: writing fails in the same place, with its own number."""
    folder = stored(tmp_path / "model", "llama", "150KB", hidden_size=128, intermediate_size=512, num_hidden_layers=2)
    subject = open_subject(folder)
    plan, source = make_plan(subject), sums(folder)
    largest = max(file.stat().st_size for file in shards(folder))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, largest - 1000))
        try:
            save(subject, plan, run_of(subject), tmp_path / "out")
        except UserError as error:
            os.write(told[1], str(error).encode())

    told = os.pipe()
    os.waitpid(child(limited), 0)
    os.close(told[1])
    message = os.read(told[0], 10_000).decode()
    os.close(told[0])
    assert "cannot be written: File too large; make room there" in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.new"))
    assert sums(folder) == source
    save(subject, plan, run_of(subject), tmp_path / "out")
    save(subject, plan, run_of(subject), tmp_path / "again")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "again")


def missing(file: Path) -> None:
    file.unlink()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def altered(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 64
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (missing, "lacks the shard"),
        (truncated, "is truncated"),
        (altered, "was altered: its SHA-256|differs from what was loaded"),
    ],
)
def test_a_broken_file_is_named_and_nothing_appears(
    harm: Callable[[Path], None], message: str, make_plan: PlanMaker, tmp_path: Path
) -> None:
    """After it was loaded; the source is itself the output of a run, which recorded its sums."""
    first = open_subject(stored(tmp_path / "model", "llama"))
    save(first, make_plan(first), run_of(first), tmp_path / "source")
    for number in range(len(shards(tmp_path / "source"))):
        folder = shutil.copytree(tmp_path / "source", tmp_path / f"source{number}")
        subject = open_subject(folder)
        harm(shards(folder)[number])
        source = sums(folder)
        with pytest.raises(UserError, match=message) as caught:
            save(subject, make_plan(subject, seed=1), run_of(subject), tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert sums(folder) == source
        assert not (tmp_path / "out").exists()


def test_an_altered_matrix_is_noticed_without_any_recorded_sum(make_plan: PlanMaker, tmp_path: Path) -> None:
    folder = stored(tmp_path / "model", "llama", "1GB")
    subject = open_subject(folder)
    plan = make_plan(subject)
    replace_tensors(folder / "model.safetensors", lambda t: t[plan.edits[0].site.parameter].add_(1e-6))
    with pytest.raises(UserError, match=r"self_attn.o_proj.weight differs from what was loaded: its file was altered"):
        save(subject, plan, run_of(subject), tmp_path / "out")


def test_a_dtype_that_cannot_be_edited_is_named_where_it_is_touched(make_plan: PlanMaker, tmp_path: Path) -> None:
    folder = stored(tmp_path / "model", "llama", "1GB")
    name = "model.layers.1.mlp.down_proj.weight"

    def eighth(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    replace_tensors(folder / "model.safetensors", eighth)
    subject = open_subject(folder)
    with pytest.raises(UserError, match=rf"model.safetensors: {name} is stored as F8_E4M3, which cannot be edited"):
        save(subject, make_plan(subject), run_of(subject), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save(subject, make_plan(subject, ("attn.out",)), run_of(subject), tmp_path / "attention")
    assert raw(tmp_path / "attention")[name] == raw(folder)[name]


# ------------------------------------------------------------------------------------------ one path
def test_apply_takes_the_same_path(make_plan: PlanMaker, tmp_path: Path) -> None:
    folder = furnished(tmp_path / "model")
    subject = open_subject(folder)
    save(subject, make_plan(subject), run_of(subject), tmp_path / "plan", "plan")
    save(subject, make_plan(subject), run_of(subject), tmp_path / "merged")
    document: Mapping[str, Any] = apply_plan(tmp_path / "plan", str(folder), tmp_path / "out", "merged", {}, Clock())
    assert document["saved"]["onto"]["name"] == str(folder)
    assert weights_of(tmp_path / "out") == {**weights_of(tmp_path / "merged")}


def test_what_has_no_files_of_its_own_is_written_from_memory(make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = tiny_subject("llama")
    run = save(subject, make_plan(subject), run_of(subject), tmp_path / "out")
    assert not {"onto", "from_memory"} & run.saved.keys()
    assert find_own_checkpoint(subject) is None
