"""A real llama.cpp, from the npm package that `make .venv/llama.cpp/ready` installs, called through its C interface.

It runs in a process of its own, because it ends the process where it meets what it does not expect:
`python -m tests.support.llama_cpp JOB.json RESULT.npz`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from ctypes import CDLL, POINTER, Structure, byref, c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PLACE = "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"
WHERE = [path / PLACE for path in (ROOT / ".venv/llama.cpp", Path(sys.prefix) / "llama.cpp")]
MISSING = "llama.cpp is not installed: `make .venv/llama.cpp/ready` needs npm and Linux on x86-64"
SECONDS = 600  # for one job on a busy core


def find_llama() -> Path | None:
    """Return the folder of llama.cpp's libraries, or None if it is not installed."""
    return next((folder for folder in WHERE if any(folder.glob("libllama.*.so"))), None)


@dataclass(frozen=True)
class Answers:
    """What llama.cpp makes of some prompts."""

    log_probs: np.ndarray
    """Of the first token of each answer, [prompts, vocabulary], fp32."""
    tokens: list[list[int]]
    """Greedy answers."""


def run_llama(
    model: Path, prompts: Sequence[Sequence[int]], folder: Path, tokens: int = 0, lora: str = "", control: str = ""
) -> Answers:
    """Return the answers to prompts given as token numbers. lora, control: files to load beside the model.

    Raises RuntimeError with llama.cpp's own messages if it does not load one of the files.
    """
    job, result = folder / "job.json", folder / "result.npz"
    wanted = Job(str(model), [list(map(int, prompt)) for prompt in prompts], tokens, lora, control)
    job.write_text(json.dumps(asdict(wanted)))
    command = [sys.executable, "-m", __name__, str(job), str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    with np.load(result) as found:
        logits, rows = found["logits"].astype(np.float64), found["tokens"]
    top = logits.max(1, keepdims=True)
    normal = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
    return Answers(normal.astype(np.float32), [[int(t) for t in row if t >= 0] for row in rows])


# ----------------------------------------------------------------------------- in the process of its own
@dataclass(frozen=True)
class Job:
    model: str
    prompts: list[list[int]]
    tokens: int
    lora: str
    control: str


class ModelParams(Structure):
    """llama_model_params of include/llama.h in llama.cpp 0.5.0."""

    _fields_ = [
        ("devices", c_void_p),
        ("overrides", c_void_p),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "extra_bufts", "no_host", "no_alloc", "mtp")),
    ]


class ContextParams(Structure):
    """llama_context_params of the same."""

    _fields_ = [
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "outs", "outs_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope", "pooling", "attention")),
        ("flash_attn", c_int32),
        *((name, c_float) for name in ("base", "scale", "ext", "attn", "fast", "slow")),
        ("yarn_ctx", c_uint32),
        ("defrag", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort", c_void_p),
        ("abort_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("other", c_void_p),
    ]


class Batch(Structure):
    _fields_ = [("n", c_int32), *((name, c_void_p) for name in ("token", "embd", "pos", "n_seq", "seq", "logits"))]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
    "llama_batch_get_one": (Batch, [c_void_p, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, c_void_p, c_size_t, c_void_p]),
    "llama_set_adapter_cvec": (c_int32, [c_void_p, c_void_p, c_size_t, c_int32, c_int32, c_int32]),
}


class Llama:
    """A model in llama.cpp on one CPU core, with an fp32 cache, so that it rounds no more than its types do."""

    def __init__(self, job: Job) -> None:
        folder = find_llama()
        assert folder is not None, MISSING
        CDLL(str(next(folder.glob("libggml.*.so")))).ggml_backend_load_all_from_path(str(folder).encode())
        self.lib: Any = CDLL(str(next(folder.glob("libllama.*.so"))))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self._check(self.lib.llama_model_load_from_file(job.model.encode(), params), job.model)
        self.context = self._check(self.lib.llama_init_from_model(self.model, self._context_params(job)), "context")
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        if job.lora:
            self._load_lora(job.lora)
        if job.control:
            self._load_control(job.control)

    def _context_params(self, job: Job) -> ContextParams:
        params: ContextParams = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = max(map(len, job.prompts)) + job.tokens + 32
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = params.flash_attn = 0  # fp32, and no flash attention
        return params

    def _load_lora(self, file: str) -> None:
        adapter = c_void_p(self._check(self.lib.llama_adapter_lora_init(self.model, file.encode()), file))
        assert self.lib.llama_set_adapters_lora(self.context, byref(adapter), 1, byref(c_float(1.0))) == 0

    def _load_control(self, file: str) -> None:
        """Add a control vector as common_control_vector_load_one does: layer 1 comes first."""
        import gguf

        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
        layers = {int(name.removeprefix("direction.")): values for name, values in tensors.items()}
        width = len(next(iter(layers.values())))
        data = np.zeros((max(layers), width), np.float32)
        for layer, values in layers.items():
            data[layer - 1] += values
        place = data.ctypes.data
        assert self.lib.llama_set_adapter_cvec(self.context, place, data.size, width, 1, max(layers)) == 0

    def answer(self, prompt: Sequence[int], tokens: int) -> tuple[np.ndarray, list[int]]:
        """Return the logits of the first token, and so many greedy ones up to the end of the answer."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        first = logits = self._decode(prompt)
        made: list[int] = []
        while len(made) < tokens:
            made.append(int(logits.argmax()))
            if self.lib.llama_vocab_is_eog(self.vocabulary, made[-1]):
                break
            logits = self._decode(made[-1:])
        return first, made

    def _decode(self, tokens: Sequence[int]) -> np.ndarray:
        numbers = np.array(tokens, np.int32)
        batch = self.lib.llama_batch_get_one(numbers.ctypes.data, len(numbers))
        assert self.lib.llama_decode(self.context, batch) == 0, "llama.cpp did not decode"
        size = self.lib.llama_vocab_n_tokens(self.vocabulary)
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (size,)).copy()

    @staticmethod
    def _check(handle: int | None, what: str) -> int:
        if not handle:
            raise RuntimeError(f"llama.cpp did not load {what}")
        return handle


def main(job_file: str, result_file: str) -> None:
    """Do a job and write its result."""
    job = Job(**json.loads(Path(job_file).read_text()))
    llama = Llama(job)
    answers = [llama.answer(prompt, job.tokens) for prompt in job.prompts]
    rows = np.full((len(answers), max(job.tokens, 1)), -1, np.int64)
    for row, (_, made) in zip(rows, answers, strict=True):
        row[: len(made)] = made
    np.savez(result_file, logits=np.stack([first for first, _ in answers]), tokens=rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
