"""How llama.cpp and Ollama load what was saved, written beside it: a Modelfile and command lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

OLLAMA_MODELFILE = "Modelfile"
COMMANDS = "llama-cpp.sh"
ADAPTER_OPTIONS: Mapping[str, str] = {"lora-gguf": "--lora", "control-vector": "--control-vector"}
SCALED: Mapping[str, str] = {form: f"{option}-scaled" for form, option in ADAPTER_OPTIONS.items()}


def write_loading_files(folder: Path, form: str, file: str, base: str, prefix: str = "") -> list[str]:
    """Write the files that say how to load ``file``, of a GGUF form, and return their names.

    base: path of the GGUF file that an adapter belongs to, or what the model is called where that is not known.
    prefix: what the files' names begin with.
    """
    texts = {f"{prefix}{COMMANDS}": render_commands(form, file, base)}
    if form != "control-vector":  # Ollama has no place for one
        name = f"{prefix}{OLLAMA_MODELFILE}"
        texts[name] = render_modelfile(form, file, base, name)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted(texts)


def render_modelfile(form: str, file: str, base: str, name: str = OLLAMA_MODELFILE) -> str:
    """Return a Modelfile of that name for Ollama, which takes the chat template from the GGUF file."""
    if form == "gguf":
        return f"# ollama create NAME -f {name}\nFROM ./{file}\n"
    return f"# ollama create NAME -f {name}\n{_explain(base)}FROM {_place(base)}\nADAPTER ./{file}\n"


def render_commands(form: str, file: str, base: str) -> str:
    """Return llama.cpp's command lines as a shell script of two lines: a chat, and a server."""
    model, option, notes = _quote(file), "", ""
    if form in ADAPTER_OPTIONS:
        model, option = _quote(_place(base)), f" {ADAPTER_OPTIONS[form]} {_quote(file)}"
        notes = f"{_explain(base)}# {SCALED[form]} {_quote(file)}:0.5 has half the strength.\n"
    return f"{notes}llama-cli -m {model}{option} -cnv\nllama-server -m {model}{option} --host 127.0.0.1 --port 8080\n"


def _explain(base: str) -> str:
    return "" if base.endswith(".gguf") else f"# BASE.gguf stands for a GGUF file of {base}.\n"


def _place(base: str) -> str:
    return base if base.endswith(".gguf") else "BASE.gguf"


def _quote(path: str) -> str:
    plain = all(character.isalnum() or character in "./_-+:=@%," for character in path)
    return path if plain else "'" + path.replace("'", "'\\''") + "'"
