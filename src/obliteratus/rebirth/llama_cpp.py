"""How llama.cpp and Ollama load what was saved, written beside it: a Modelfile and command lines."""

from __future__ import annotations

from pathlib import Path

OLLAMA_MODELFILE = "Modelfile"
COMMANDS = "llama-cpp.sh"


def write_loading_files(folder: Path, form: str, file: str, base: str, prefix: str = "") -> list[str]:
    """Write the files that say how to load ``file``, of a GGUF form, and return their names.

    base: path of the GGUF file that an adapter belongs to, or what the model is called where that is not known.
    prefix: what the files' names begin with.
    """
    texts = {f"{prefix}{COMMANDS}": render_commands(form, file, base)}
    if form != "control-vector":  # Ollama has no place for one
        texts[f"{prefix}{OLLAMA_MODELFILE}"] = render_modelfile(form, file, base)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted(texts)


def render_modelfile(form: str, file: str, base: str) -> str:
    """Return a Modelfile for Ollama, which takes the chat template from the GGUF file."""
    if form == "gguf":
        return f"# ollama create NAME -f {OLLAMA_MODELFILE}\nFROM ./{file}\n"
    return f"# ollama create NAME -f {OLLAMA_MODELFILE}\n{_explain(base)}FROM {_place(base)}\nADAPTER ./{file}\n"


def render_commands(form: str, file: str, base: str) -> str:
    """Return llama.cpp's command lines as a shell script of two lines: a chat, and a server."""
    model = file if form == "gguf" else _place(base)
    option = {
        "gguf": "",
        "lora-gguf": f" --lora {_quote(file)}",
        "control-vector": f" --control-vector {_quote(file)}",
    }[form]
    note = "" if form == "gguf" else _explain(base)
    scale = {
        "lora-gguf": f"# --lora-scaled {_quote(file)}:0.5 has half the strength.\n",
        "control-vector": f"# --control-vector-scaled {_quote(file)}:0.5 has half the strength.\n",
    }.get(form, "")
    lines = [f"{program} -m {_quote(model)}{option}" for program in ("llama-cli", "llama-server")]
    return f"{note}{scale}{lines[0]} -cnv\n{lines[1]} --host 127.0.0.1 --port 8080\n"


def _explain(base: str) -> str:
    return "" if base.endswith(".gguf") else f"# BASE.gguf stands for a GGUF file of {base}.\n"


def _place(base: str) -> str:
    return base if base.endswith(".gguf") else "BASE.gguf"


def _quote(path: str) -> str:
    plain = all(character.isalnum() or character in "./_-+:=@%," for character in path)
    return path if plain else "'" + path.replace("'", "'\\''") + "'"
