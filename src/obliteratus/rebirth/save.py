"""REBIRTH: a plan becomes a saved model, adapter or plan; then it is loaded again and scored again."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.registry import unknown_name
from obliteratus.core.results import Run
from obliteratus.core.run_folder import check_disk, check_free, publish, write_atomic
from obliteratus.core.types import Plan, Prompt, PromptSet, Subject
from obliteratus.excise.bake.adapter import save_adapter
from obliteratus.excise.bake.base_checkpoint import BaseCheckpoint, find_base_checkpoint, explain_unbakeable
from obliteratus.excise.bake.quantized import RequantizationLosses
from obliteratus.excise.bake.tensors import bake, bake_in_pieces, find_bias_switches
from obliteratus.excise.bake.write_checkpoint import bake_into_checkpoint
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import first_token_log_probs, kl_divergence
from obliteratus.rebirth.model_card import model_card
from obliteratus.rebirth.tolerance import is_quantized, tolerance
from obliteratus.summon.load import open_subject
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.summon.sites import find_tied_ends
from obliteratus.weights.bitsandbytes import padded_note_shapes
from obliteratus.weights.quantization import read_quantization_config
from obliteratus.weights.rewrite import explain_full_disk, describe_files, remove_finished_files, remove_unfinished_files
from obliteratus.weights.safetensors_io import list_dtypes, write_index, write_shard

Form = Literal["merged", "adapter", "plan"]
FORMS = ("merged", "adapter", "plan")
MAX_SHARD = 2 * 10**9  # bytes: of a file; what a merge adds to memory is one matrix
SAMPLE = 8  # prompts of each group that are scored again: a mismatch shows on the first, chance does not on eight
NEUTRAL = ("Name three colours.", "How many days has a week?", "Write one sentence about rain.")


def save(
    subject: Subject,
    plan: Plan,
    run: Run,
    out: str | Path,
    form: Form = "merged",
    prompts: PromptSet | None = None,
    base: str = "",
) -> Run:
    """Save what the run made, reload it, score it again, and only then let the folder appear.

    form: ``merged`` (a whole model, as transformers loads it), ``adapter`` (PEFT) or ``plan``. The subject stays
    as it was. prompts: held-out ones to score again with; some neutral ones if None. base: of a quantized model, the
    full-precision checkpoint that ``merged`` bakes into; see `find_base_checkpoint`. Returns the run as saved.
    Raises UserError where the folder is in use, the disk is too small, the plan cannot take that form, or what
    was saved does not answer as what was measured.
    """
    out = Path(out)
    check_free(out)
    partial = out.with_name(out.name + ".saving")  # not the folder of a run that could be resumed
    check_disk(out, bytes_needed(subject, form, base), partial)
    partial.mkdir(parents=True, exist_ok=True)
    run = write_output(subject, plan, run, partial, form, prompts, base)
    publish(partial, out)
    return run


def write_output(
    subject: Subject, plan: Plan, run: Run, partial: Path, form: Form, prompts: PromptSet | None = None, base: str = ""
) -> Run:
    """Everything of `save` but the last rename, into ``partial/output``."""
    folder = partial / "output"
    with explain_full_disk(folder):
        remove_unfinished_files(folder)
        files = find_base_checkpoint(subject, base) if form == "merged" else None
        onto = None if files is None else BaseCheckpoint(subject, files, find_tied_ends(subject))
        notes = _write_anew(subject, plan, folder, form) if onto is None else _write_onto(onto, plan, folder)
        save_plan(plan, folder)
        rescore = _rescored(subject, plan, folder, form, _sample(prompts))
        saved = {"form": form, **notes, "rescore": rescore, "files": describe_files(folder)}
        run = run.model_copy(update={"status": "done", "saved": saved})
        (folder / "README.md").write_text(model_card(run))
        write_atomic(folder / "run.json", run.model_dump_json(indent=1))
    return run


def check_form(form: str, base: str = "") -> None:
    """UserError for a form that does not exist, or a base that it has no use for."""
    if form not in FORMS:
        raise UserError(unknown_name("--save form", form, FORMS))
    if base and form != "merged":
        raise UserError(f"--base {base}: is for --save merged; leave it out with --save {form}")


def bytes_needed(subject: Subject, form: Form, base: str = "") -> int:
    """Bytes that saving may take: all weights for a merged model, a tenth of them for the others. UserError for a
    ``base`` that is none."""
    check_form(form, base)
    if form == "adapter" and subject.offloaded is not None:
        raise UserError("--save adapter: needs the whole model in memory; allow more with --memory, or --save plan")
    files = find_base_checkpoint(subject, base) if form == "merged" else None
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    weights = weights if files is None else files.size
    return int((1.1 if form == "merged" else 0.1) * weights) + 10**7  # tokenizer and cards: < 10 MB


# ------------------------------------------------------------------------------------------ writing
def _write_merged(subject: Subject, plan: Plan, folder: Path) -> dict[str, Any]:
    """All weights, shard by shard, edited ones computed as they are written: one matrix at a time."""
    config, losses = copy.deepcopy(subject.model.config), RequantizationLosses()
    edits = bake(subject, plan, losses)
    for key in find_bias_switches(subject, plan).values():
        setattr(config, key, True)
    state: dict[str, Any] = dict(subject.model.state_dict())
    state |= {name: edits[name]() for name in edits.keys() - state.keys()}  # new biases: small
    state |= {name: like for name, like in padded_note_shapes(state).items() if name in edits}
    if ends := find_tied_ends(subject):
        if any(end in edits for end in ends):  # the other stays as it was, so the two part
            config.tie_word_embeddings = False
        else:
            state.pop(ends[1])
    split = split_torch_state_dict_into_shards(state, max_shard_size=MAX_SHARD)
    for name, members in split.filename_to_tensors.items():
        parts = {key: partial(bake_in_pieces, edits[key]) for key in members if key in edits}
        write_shard(folder / name, {key: state[key] for key in members}, parts)
    if split.is_sharded:
        write_index(folder, split.tensor_to_filename, split.metadata["total_size"])
    config.save_pretrained(folder)
    _write_rest(subject, folder)
    return {"requantized": losses.summary()} if losses.by_path else {}


def _write_onto(onto: BaseCheckpoint, plan: Plan, folder: Path) -> dict[str, Any]:
    """Baked onto files that are there, or, where those of a plain model do not serve, written from memory."""
    why = explain_unbakeable(onto, plan)
    if why and onto.subject.offloaded is not None:
        raise UserError(f"{why}, and the weights do not fit into memory: allow more with --memory, or --save plan")
    if why:
        note("REBIRTH", f"{why}: all weights are written anew, from memory")
        return {**_write_anew(onto.subject, plan, folder, "merged"), "from_memory": why}
    notes = bake_into_checkpoint(onto, plan, folder)
    _write_rest(onto.subject, folder)
    return notes


def _write_anew(subject: Subject, plan: Plan, folder: Path, form: Form) -> dict[str, Any]:
    remove_finished_files(folder)
    return WRITERS[form](subject, plan, folder)


def _write_rest(subject: Subject, folder: Path) -> None:
    subject.model.generation_config.save_pretrained(folder)
    subject.tokenizer.save_pretrained(folder)


def _write_adapter(subject: Subject, plan: Plan, folder: Path) -> dict[str, Any]:
    subject.tokenizer.save_pretrained(folder)
    return {"adapter": save_adapter(subject, plan, folder)}


def _write_plan(subject: Subject, plan: Plan, folder: Path) -> dict[str, Any]:
    return {}


WRITERS: dict[str, Callable[[Subject, Plan, Path], dict[str, Any]]] = {
    "merged": _write_merged,
    "adapter": _write_adapter,
    "plan": _write_plan,
}


# ------------------------------------------------------------------------------------- scoring again
@contextmanager
def reload_output(subject: Subject, folder: Path, form: Form) -> Iterator[Subject]:
    """What was saved, loaded from disk as a user would."""
    if form == "merged":
        alike: dict[str, Any] = {"dtype": subject.source.dtype, "thinking": subject.thinking}
        if subject.offloaded is None:
            fresh = open_subject(folder, **alike, quantize=_again(subject, folder))
        else:
            fresh = open_offloaded(folder, **alike)
        yield fresh
        del fresh
        gc.collect()  # once a run: the second model goes before anything else is made
    elif form == "adapter":
        with _adapted(subject, folder) as adapted:
            yield adapted
    else:
        with applied(subject, load_plan(folder)):
            yield subject


def _again(subject: Subject, folder: Path) -> dict[str, Any]:
    """How to quantize what was saved in full precision as the subject is: its own memory is then enough."""
    saved = json.loads((folder / "config.json").read_text())
    mark = {} if "quantization_config" in saved else read_quantization_config(subject.model.config)
    return {key: value for key, value in mark.items() if key != "quant_method" and not key.startswith("_")}


@contextmanager
def _adapted(subject: Subject, folder: Path) -> Iterator[Subject]:
    wrapped = PeftModel.from_pretrained(subject.model, folder)
    try:
        yield replace(subject, model=wrapped.base_model.model)
    finally:
        wrapped.unload()


def _sample(prompts: PromptSet | None) -> PromptSet:
    if prompts is None:
        return PromptSet({"target": tuple(Prompt(t) for t in NEUTRAL)})
    return PromptSet({g: ps[:SAMPLE] for g, ps in prompts.groups.items() if g in ("target", "control")})


def _rescored(subject: Subject, plan: Plan, folder: Path, form: Form, sample: PromptSet) -> dict[str, Any]:
    prompts = [p for members in sample.groups.values() for p in members]
    ids = render_prompts(subject, prompts)
    with applied(subject, plan):
        live = first_token_log_probs(subject, ids, title="REBIRTH live")
    with reload_output(subject, folder, form) as fresh:
        saved = first_token_log_probs(fresh, ids, title="REBIRTH reloaded")
    worst, limit = float(kl_divergence(live, saved).max()), tolerance(subject, form, list_dtypes(folder))
    if not worst <= limit:
        what = subject.source.quantization or subject.source.dtype
        raise UserError(
            f"{folder}: what was saved does not answer as what was measured (KL {worst:.2g} nats, at most "
            f"{limit:.0e} is allowed for {what}); {_way_out(form, form == 'merged' and is_quantized(subject))}"
        )
    same = float((live.argmax(-1) == saved.argmax(-1)).float().mean())
    return {"prompts": len(prompts), "max_kl": worst, "tolerance": limit, "same_first_token": same}


def _way_out(form: Form, packed: bool) -> str:
    if packed:
        return "packing costs this plan too much: give the full-precision --base, or use --save adapter"
    if form == "adapter":
        return "an adapter cannot hold a norm rule exactly: use --save merged, or --set excise.norm=none"
    return "this is a bug: please report it with run.json"
