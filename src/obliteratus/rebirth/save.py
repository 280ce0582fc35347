"""REBIRTH: save a plan as a model, an adapter or a plan file, reload what was saved, and check that it matches."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from obliteratus.core.choices import GGUF_FORMS, Form, check_form_name
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, shows_progress
from obliteratus.core.results import Run
from obliteratus.core.run_folder import check_disk, check_free, publish, write_atomic
from obliteratus.core.types import Plan, Prompt, PromptSet, Subject
from obliteratus.excise.bake.adapter import save_adapter
from obliteratus.excise.bake.base_checkpoint import BaseCheckpoint, explain_unbakeable, find_base_checkpoint
from obliteratus.excise.bake.quantized import RequantizationLosses
from obliteratus.excise.bake.tensors import bake, find_bias_switches
from obliteratus.excise.bake.write_checkpoint import bake_into_checkpoint
from obliteratus.excise.bake.write_weights import write_weights
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import first_token_log_probs, kl_divergence
from obliteratus.rebirth.base_card import read_base_card
from obliteratus.rebirth.gguf import estimate_gguf_bytes, is_gguf, open_gguf_model, write_for_subject
from obliteratus.rebirth.model_card import render_model_card
from obliteratus.rebirth.own_plan import describe_own_plan
from obliteratus.rebirth.reload_gguf import find_saved_gguf, with_llama_adapter
from obliteratus.rebirth.tolerance import choose_tolerance, is_quantized
from obliteratus.summon.load import open_subject
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.summon.model_samples import sample_model
from obliteratus.summon.sites import find_tied_ends, is_tied
from obliteratus.weights.adapters import copy_merged, find_adapted
from obliteratus.weights.bitsandbytes import padded_note_shapes
from obliteratus.weights.config_entries import add_older_names, change_config, complete_config, find_text_key
from obliteratus.weights.names import list_unpacked
from obliteratus.weights.portable import make_tokenizer_portable, read_json, write_json
from obliteratus.weights.quantization import read_quantization_config
from obliteratus.weights.rewrite import (
    describe_files,
    explain_full_disk,
    remove_finished_files,
    remove_unfinished_files,
)
from obliteratus.weights.safetensors_io import list_dtypes
from obliteratus.weights.side_files import copy_side_files, find_side_folder, has_tokenizer

MAX_SHARD = 2 * 10**9  # bytes of a file; memory is needed for one matrix only
SAMPLE = 8  # prompts of each group scored after reloading: a real mismatch shows on the first
NEUTRAL = ("Name three colors.", "How many days has a week?", "Write one sentence about rain.")


@shows_progress
def save(
    subject: Subject,
    plan: Plan,
    run: Run | None = None,
    out: str | Path = "",
    form: Form = "merged",
    prompts: PromptSet | None = None,
    base: str = "",
) -> Run:
    """Save the plan, reload and rescore what was saved, move it to ``out`` if it matches, and return the saved run.

    The subject is not changed. run: the record of the run that made the plan; None for a plan of one's own. out: a
    folder that does not exist yet. form: ``merged`` (a whole model, as transformers loads it), ``adapter`` (PEFT),
    ``plan``, ``gguf`` (the GGUF file that the subject was loaded from, edited), or ``lora-gguf`` or ``control-vector``
    (for llama.cpp). prompts: held-out prompts to rescore with; neutral ones if None. base: the full-precision
    checkpoint that ``merged`` bakes into if the model is quantized; see `find_base_checkpoint`.
    Adapters that `wrap` found are merged into a copy. Raises UserError if the folder is in use, the disk is too small,
    the plan cannot be saved in that form, or the reloaded model differs from the measured one.

    >>> ob.save(subject, plan, out="edited", form="plan").saved["form"]
    'plan'
    """
    if not isinstance(run, Run | None) or not str(out):
        raise UserError(
            "save: name the output folder, as in save(subject, plan, out='edited') or save(…, run, 'edited')"
        )
    out, run = Path(out), run or describe_own_plan(subject, plan)
    check_free(out)
    subject = _merge_adapters(subject, form)
    partial = out.with_name(out.name + ".saving")  # another name than that of a run that could be resumed
    check_disk(out, estimate_saved_bytes(subject, form, base), partial)
    partial.mkdir(parents=True, exist_ok=True)
    run = write_output(subject, plan, run, partial, form, prompts, base)
    publish(partial, out)
    return run


def write_output(
    subject: Subject, plan: Plan, run: Run, partial: Path, form: Form, prompts: PromptSet | None = None, base: str = ""
) -> Run:
    """Do everything that `save` does except the final move; the files are written to ``partial/output``."""
    folder = partial / "output"
    with explain_full_disk(folder):
        remove_unfinished_files(folder)
        files = find_base_checkpoint(subject, base) if form == "merged" else None
        base_checkpoint = None if files is None else BaseCheckpoint(subject, files, find_tied_ends(subject))
        if base_checkpoint is None:
            notes = _write_from_memory(subject, plan, folder, form)
        else:
            notes = _write_from_files(base_checkpoint, plan, folder)
        source = find_side_folder(subject.source.id, subject.source.revision)
        notes |= _write_side_files(subject, source, folder, form, notes.get("rewritten", {}))
        notes |= {"base_model": read_base_card(subject.source.id, source)}
        save_plan(plan, folder, sample_model(subject))
        rescore = _rescore(subject, plan, folder, form, _sample_prompts(prompts))
        saved = {"form": form, **notes, "rescore": rescore, "files": describe_files(folder)}
        run = run.model_copy(update={"status": "done", "saved": saved})
        (folder / "README.md").write_text(render_model_card(run), encoding="utf-8")
        write_atomic(folder / "run.json", run.model_dump_json(indent=1))
    return run


def write_merged_model(subject: Subject, folder: Path) -> dict[str, Any]:
    """Write a model whose own adapters are merged into a copy of it, with the files beside its source's weights.

    Returns why files differ from those of the source. The subject is not changed.
    """
    merged = _merge_adapters(subject, "merged")
    folder.mkdir(exist_ok=True)
    with explain_full_disk(folder):
        notes = _write_merged(merged, Plan((), merged.source.digest), folder)
        source = find_side_folder(subject.source.id, subject.source.revision)
        return _write_side_files(merged, source, folder, "merged", notes["rewritten"])


def _merge_adapters(subject: Subject, form: Form) -> Subject:
    """Return the subject with its adapters in its weights. Raises UserError for a form in which they would be lost."""
    if form == "plan" or not find_adapted(subject.model):
        return subject
    if form != "merged":
        raise UserError(f"--save {form}: the model has adapters of its own, which only merged holds too; save that")
    model = copy_merged(subject.model)
    if not is_tied(model):  # an adapter of the embedding alone has parted it from the head
        model.config.get_text_config().tie_word_embeddings = False
    return replace(subject, model=model)


def default_form(model: str) -> Form:
    """Return the form that a model is saved in unless another is asked for: that in which it was given."""
    return "gguf" if is_gguf(model) else "merged"


def check_form(form: str, base: str = "", model: str = "") -> None:
    """Raise UserError if there is no such form, if it has no use for a base, or if the model cannot be saved in it."""
    check_form_name(form)
    if base and form != "merged":
        raise UserError(f"--base {base}: works only with --save merged; leave it out with --save {form}")
    if form == "gguf" and model and not is_gguf(model):
        open_gguf_model(model)


def estimate_saved_bytes(subject: Subject, form: Form, base: str = "") -> int:
    """Return the bytes to allow for: those of all weights for a merged model, a tenth of them for the other forms.

    Raises UserError if the form cannot be saved, or if ``base`` is not a suitable checkpoint.
    """
    check_form(form, base)
    if form == "adapter" and subject.offloaded is not None:
        raise UserError("--save adapter: the whole model must be in memory; give a larger --memory, or use --save plan")
    if form in GGUF_FORMS:
        return estimate_gguf_bytes(form, subject.source.id)
    files = find_base_checkpoint(subject, base) if form == "merged" else None
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    weights = weights if files is None else files.size
    return int((1.1 if form == "merged" else 0.1) * weights) + 10**7  # tokenizer and cards: < 10 MB


# ------------------------------------------------------------------------------------------ writing
def _write_merged(subject: Subject, plan: Plan, folder: Path) -> dict[str, Any]:
    """Write all weights shard by shard; edited matrices are computed one at a time, as they are written."""
    config, losses = copy.deepcopy(subject.model.config), RequantizationLosses()
    edits = bake(subject, plan, losses)
    changes = dict.fromkeys(find_bias_switches(subject, plan).values(), True)
    state: dict[str, Any] = dict(subject.model.state_dict())
    state |= {name: edits[name]() for name in edits.keys() - state.keys()}  # new biases are small
    state |= {name: like for name, like in padded_note_shapes(state).items() if name in edits}
    if ends := find_tied_ends(subject):
        if any(end in edits for end in ends):  # only one of the two is edited, so they are no longer equal
            changes["tie_word_embeddings"] = False
        else:
            state.pop(ends[1])
    write_weights(subject.model, state, edits, folder, MAX_SHARD)
    rewritten = _write_config(subject, config, changes, folder)
    return {"rewritten": rewritten} | ({"requantized": losses.summary()} if losses.by_path else {})


def _write_from_files(base: BaseCheckpoint, plan: Plan, folder: Path) -> dict[str, Any]:
    """Copy the base's files with the plan baked in; write from memory if these files cannot be used."""
    reason = explain_unbakeable(base, plan)
    if reason and base.subject.offloaded is not None:
        raise UserError(f"{reason}, and the weights do not fit into memory: give a larger --memory, or use --save plan")
    if reason:
        note("REBIRTH", f"{reason}: all weights are written from memory instead")
        return {**_write_from_memory(base.subject, plan, folder, "merged"), "from_memory": reason}
    return bake_into_checkpoint(base, plan, folder)


def _write_from_memory(subject: Subject, plan: Plan, folder: Path, form: Form) -> dict[str, Any]:
    remove_finished_files(folder)
    return WRITERS[form](subject, plan, folder)


def _write_config(subject: Subject, config: Any, changes: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the configuration, and return why it is not the model's own file.

    It is the model's own with the edit's changes, or what transformers makes of it in memory if it has no file. How the
    weights are stored is always as they are in memory.
    """
    config.save_pretrained(folder)
    made = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    source = find_side_folder(subject.source.id, subject.source.revision)
    own = add_older_names(made, config) if source is None else complete_config(read_json(source / "config.json"))
    for key in STORAGE:
        own.pop(key, None)
    own |= {key: made[key] for key in STORAGE if key in made}
    if "quantization_config" in own:
        own["quantization_config"]["llm_int8_skip_modules"] = list_unpacked(subject.model)
    write_json(folder / "config.json", change_config(own, find_text_key(config), changes))
    return {"config.json": "all weights were written from memory, in the form in which they were loaded"}


STORAGE = ("quantization_config", "dtype", "torch_dtype")
"""Entries of a configuration that say how weights are stored."""


def _write_side_files(
    subject: Subject, source: Path | None, folder: Path, form: Form, rewritten: dict[str, str]
) -> dict[str, Any]:
    """Copy the files beside the weights, or write them from memory where there are none, and return why any differs."""
    if form == "plan" or form in GGUF_FORMS:  # a GGUF file holds its tokenizer
        return {}
    copied = [] if source is None else copy_side_files(source, folder)
    rewritten = {**rewritten, "README.md": "the card of the edited model"}
    if not has_tokenizer(copied):
        subject.tokenizer.save_pretrained(folder)
        make_tokenizer_portable(folder)
        rewritten["tokenizer"] = f"written from memory: {subject.source.id} has no files of it"
    if form == "merged" and source is None:
        subject.model.generation_config.save_pretrained(folder)
    return {"rewritten": rewritten}


def _write_adapter(subject: Subject, plan: Plan, folder: Path) -> dict[str, Any]:
    return {"adapter": save_adapter(subject, plan, folder)}


def _write_plan(subject: Subject, plan: Plan, folder: Path) -> dict[str, Any]:
    return {}


WRITERS: dict[str, Callable[[Subject, Plan, Path], dict[str, Any]]] = {
    "merged": _write_merged,
    "adapter": _write_adapter,
    "plan": _write_plan,
    **{form: partial(write_for_subject, form=form) for form in GGUF_FORMS},
}


# ------------------------------------------------------------------------------------- rescoring
@contextmanager
def reload_output(subject: Subject, folder: Path, form: Form) -> Iterator[Subject]:
    """Yield what was saved, loaded from disk as a user would load it."""
    if form == "merged":
        options: dict[str, Any] = {"dtype": subject.source.dtype, "chat": subject.chat}
        if subject.offloaded is None:
            fresh = open_subject(folder, **options, quantize=_quantization_options(subject, folder))
        else:
            fresh = open_offloaded(folder, **options)
        yield fresh
        del fresh
        gc.collect()  # once a run: frees the second model before anything else is allocated
    elif form == "gguf":
        fresh = open_subject(find_saved_gguf(folder), dtype=subject.source.dtype, chat=subject.chat)
        yield fresh
        del fresh
        gc.collect()  # as above
    elif form == "adapter":
        with _with_adapter(subject, folder) as adapted:
            yield adapted
    elif form in GGUF_FORMS:
        with with_llama_adapter(subject, find_saved_gguf(folder)):
            yield subject
    else:
        with applied(subject, load_plan(folder)):
            yield subject


def _quantization_options(subject: Subject, folder: Path) -> dict[str, Any]:
    """Return options that quantize full-precision files as the subject is, so that they need no more memory."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {} if "quantization_config" in saved else read_quantization_config(subject.model.config)
    return {key: value for key, value in config.items() if key != "quant_method" and not key.startswith("_")}


@contextmanager
def _with_adapter(subject: Subject, folder: Path) -> Iterator[Subject]:
    from peft import PeftModel  # imported here because it takes a second

    wrapped = PeftModel.from_pretrained(subject.model, folder)
    try:
        yield replace(subject, model=wrapped.base_model.model)
    finally:
        wrapped.unload()


def _sample_prompts(prompts: PromptSet | None) -> PromptSet:
    if prompts is None:
        return PromptSet({"target": tuple(Prompt(t) for t in NEUTRAL)})
    return PromptSet({g: ps[:SAMPLE] for g, ps in prompts.groups.items() if g in ("target", "control")})


def _rescore(subject: Subject, plan: Plan, folder: Path, form: Form, sample: PromptSet) -> dict[str, Any]:
    prompts = [p for members in sample.groups.values() for p in members]
    ids = render_prompts(subject, prompts)
    with applied(subject, plan):
        live = first_token_log_probs(subject, ids, title="REBIRTH live")
    with reload_output(subject, folder, form) as fresh:
        saved = first_token_log_probs(fresh, ids, title="REBIRTH reloaded")
    max_kl, limit = float(kl_divergence(live, saved).max()), choose_tolerance(subject, form, list_dtypes(folder))
    if not max_kl <= limit:
        precision = subject.source.quantization or subject.source.dtype
        raise UserError(
            f"{folder}: the reloaded model differs from the measured one (KL {max_kl:.2g} nats, and {precision} allows "
            f"at most {limit:.0e}); {_suggest_remedy(form, form == 'merged' and is_quantized(subject))}"
        )
    same = float((live.argmax(-1) == saved.argmax(-1)).float().mean())
    return {"prompts": len(prompts), "max_kl": max_kl, "tolerance": limit, "same_first_token": same}


def _suggest_remedy(form: Form, requantized: bool) -> str:
    if requantized:
        return "quantizing again loses too much of this plan: give the full-precision --base, or use --save adapter"
    if form == "adapter":
        return "an adapter cannot hold a norm rule exactly: use --save merged, or --set excise.norm=none"
    return "this is a bug: please report it with run.json"
