"""The group of all commands. A command's module is imported when the command is called, or its help is shown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from obliteratus.core.errors import UserError
from obliteratus.core.interrupt import INTERRUPTED, raise_on_interrupt

PANELS: Mapping[str, Mapping[str, str]] = {
    "Edit": {"demo": "run", "run": "run", "search": "run", "apply": "apply", "harden": "harden"},
    "Measure": {
        "verify": "verify",
        "audit": "audit",
        "trace": "trace",
        "judge": "judge",
        "bench": "bench",
        "compare": "side_by_side",
        "analyze": "analyze",
        "study": "study",
        "report": "study",
    },
    "Look": {
        "methods": "methods",
        "behaviors": "behaviors",
        "inspect": "inspect",
        "chat": "chat",
        "serve": "serve",
        "ui": "ui",
        "doctor": "doctor",
    },
    "Share": {"push": "push", "reproduce": "reproduce"},
}
"""Heading in ``--help`` → command → module in this package, which holds a function of the command's name."""
COMMANDS = {name: (module, panel) for panel, modules in PANELS.items() for name, module in modules.items()}
# Old name → new name, of options and commands.
RENAMED = {"--quantise": "--quantize", "study-from-yaml": "study --from-yaml"}
UsageError: Any = typer.BadParameter.__base__  # typer does not export it


def load_command(name: str) -> Any:
    """Import a command's module, and return the command as typer runs it."""
    module, panel = COMMANDS[name]
    function = vars(import_module(f"obliteratus.cli.{module}"))[name]
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    alone.command(name, rich_help_panel=panel)(handle_errors(function))
    return typer.main.get_command(alone)


def handle_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command: a UserError prints one line and exits with 2, an interrupt exits with 130.

    Any other exception is a bug and shows its traceback.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            raise_on_interrupt()
            from obliteratus.cli.usage import check_usage

            check_usage(command.__name__, kwargs)
            command(*args, **kwargs)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo(f"interrupted{error}" if str(error) else "interrupted; nothing was written", err=True)
            raise typer.Exit(INTERRUPTED) from error

    return run


class Commands(TyperGroup):
    """The group of all commands. It names the new name of an option or command that was renamed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands: dict[str, Any] = dict.fromkeys(COMMANDS)  # None until it is asked for

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, or None if there is none of that name."""
        if cmd_name in self.commands and self.commands[cmd_name] is None:
            self.commands[cmd_name] = load_command(cmd_name)
        return self.commands.get(cmd_name)

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command. A usage error is one line, as every other error of the user's."""
        run: Any = super().main
        if not options.pop("standalone_mode", True):
            return run(*args, **options, standalone_mode=False)
        try:
            code = run(*args, **options, standalone_mode=False)
        except UsageError as error:
            said = " ".join(error.format_message().split()).rstrip(".")
            command = error.ctx.command_path if error.ctx else "obliteratus"
            if said:  # without any argument the help was shown
                typer.echo(f"error: {said}; see {command} --help", err=True)
            code = 2
        except typer.Abort:
            typer.echo("interrupted; nothing was written", err=True)
            code = INTERRUPTED
        raise SystemExit(code or 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        for arg in args:
            name = arg.partition("=")[0]
            if name in RENAMED and (name.startswith("--") or arg is args[0]):
                typer.echo(f"error: '{name}' is now called '{RENAMED[name]}'", err=True)
                raise typer.Exit(2)
        return super().resolve_command(ctx, args)
