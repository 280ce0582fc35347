"""Run transformers 4.57 in a process of its own, for it cannot be imported beside a newer release.

python transformers4.py make FOLDER            tiny models, as that release saves them
python transformers4.py logits FILE FOLDER …   next-token logits of what the folders hold, adapters included
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

OLD = Path(sys.prefix) / "transformers-4.57"
PROMPT = "user: How deep is the sea?\nassistant:"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
COMMON = {
    "vocab_size": 272,
    "hidden_size": 64,  # bitsandbytes packs blocks of 64
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "rope_theta": 50_000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
TIED = {"tie_word_embeddings": True}
GEMMA = {**COMMON, **TIED, "rope_local_base_freq": 2_000.0, "sliding_window": 8, "query_pre_attn_scalar": 16}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**COMMON, "rope_scaling": LLAMA3, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", {**COMMON, **TIED}),
    "gemma3": ("gemma3", {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4}),
    "mixture": (
        "qwen3_moe",
        {**COMMON, **TIED, "moe_intermediate_size": 64, **EXPERTS},
    ),
}
SIDE_FILES = {
    "README.md": "---\nlicense: other\nlicense_name: tiny-terms\nlanguage:\n- en\n- de\n---\n# Tiny\n",
    "LICENSE": "Terms of the tiny model.\n",
    "preprocessor_config.json": '{"image_processor_type":  "SiglipImageProcessor"}',
    "additional_chat_templates/rag.jinja": "{{ messages }}",
    "notes/how.txt": "made here\n",
}


def call(*arguments: object) -> None:
    """Run this file under transformers 4.57."""
    env = {**os.environ, "PYTHONPATH": str(OLD), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]


def make_models(folder: Path) -> None:
    """Make a random model of each kind, with the files that public ones have beside their weights."""
    call("make", folder)


def read_logits(file: Path, folders: Sequence[Path]) -> dict[str, np.ndarray]:
    """Return the logits behind `PROMPT` of what each folder holds, as transformers 4.57 loads it."""
    call("logits", file, *folders)
    with np.load(file) as found:
        return {str(folder): found[str(number)] for number, folder in enumerate(folders)}


# ---------------------------------------------------------------------------------- inside the other process
def _make(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

    for name, (model_type, options) in KINDS.items():
        config = AutoConfig.for_model(model_type, **options)
        torch.manual_seed(0)
        model: Any = (
            Gemma3ForConditionalGeneration(config) if name == "gemma3" else AutoModelForCausalLM.from_config(config)
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.generation_config.max_length = 77
        model.save_pretrained(folder / name)
        _make_tokenizer().save_pretrained(folder / name)
        for file, text in SIDE_FILES.items():
            path = folder / name / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _make_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    marks = ("<bos>", "<eos>", "<pad>", "<|eot|>", "<|header|>")
    made.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=["<|eot|>", "<|header|>"],
        model_max_length=256,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _measure(file: Path, folders: Sequence[Path]) -> None:
    found = {str(number): _logits(folder) for number, folder in enumerate(folders)}
    np.savez(file, **found)


def _logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    base, adapter = folder, None
    if (folder / "adapter_config.json").is_file():
        adapter, base = (
            folder,
            Path(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]),
        )
    kind = json.loads((base / "config.json").read_text())["model_type"]
    loader: Any = AutoModelForImageTextToText if kind == "gemma3" else AutoModelForCausalLM
    model: Any = loader.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    for module in model.modules():  # bitsandbytes' other layout computes in bf16
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "How deep is the sea?"}], tokenize=False)
    assert text.startswith("<bos>user: How deep"), text
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits: np.ndarray = model(ids).logits[0, -1].float().numpy()
    return logits


if __name__ == "__main__":
    if sys.argv[1] == "make":
        _make(Path(sys.argv[2]))
    else:
        _measure(Path(sys.argv[2]), [Path(folder) for folder in sys.argv[3:]])
