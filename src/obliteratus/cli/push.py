"""The command push: put the result of a run into a repository of the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from obliteratus.cli.options import Json, Quiet, Verbose, show_progress, start
from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import require_file

if TYPE_CHECKING:
    from obliteratus.share.selection import Selection
    from obliteratus.share.upload import Pushed

Folder = Annotated[Path, typer.Argument(help="Output folder of a run or a search.")]
Repo = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")]
Public = Annotated[bool, typer.Option("--public", help="Make a public repository; the default is a private one.")]
Yes = Annotated[bool, typer.Option("--yes", help="Make the repository without asking.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List files and sizes, and send nothing.")]
WithPrompts = Annotated[bool, typer.Option("--with-prompts", help="Upload the prompts too.")]
WithAnswers = Annotated[
    bool, typer.Option("--with-answers", help="Upload all answers and pages too. Needs --with-prompts.")
]


def push(
    run_dir: Folder,
    repo: Repo,
    public: Public = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    with_prompts: WithPrompts = False,
    with_answers: WithAnswers = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upload the result of a run with its card to a repository of the hub: weights or plan, figures, how to repeat it.

    Prompts and answers stay here unless they are asked for. A push that was interrupted goes on where it stopped.
    """
    require_file(run_dir, "run.json")
    with TemporaryDirectory(prefix="obliteratus-push-") as staging:
        with show_progress(quiet, verbose) as clock, start(clock):
            from obliteratus.share.selection import select_files
            from obliteratus.share.upload import check_name, find_repository, push_files

            check_name(repo)
            selection = select_files(run_dir, Path(staging), repo, with_prompts, with_answers)
            sizes = {upload.name: upload.bytes for upload in selection.uploads}
            place = None if dry_run else find_repository(repo)
        if place is None:
            show_pushed(selection, sizes, repo, None, json)
            return
        if place.private is None and not yes:  # asked where no progress is shown
            ask(f"{repo} does not exist. Make it as a {'public' if public else 'private'} repository?")
        with show_progress(quiet, verbose) as clock, clock.time("PUSH"), keep_on_interrupt():
            pushed = push_files(place, selection, public)
    show_pushed(selection, sizes, repo, pushed, json)


@contextmanager
def keep_on_interrupt() -> Iterator[None]:
    """Let an interrupt say what becomes of what was sent."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("; the hub keeps the files that arrived, and the same command goes on") from error


def ask(question: str) -> None:
    """Ask a question on the terminal, and raise UserError unless the answer is yes.

    Where nobody can answer it raises too, and says what to pass.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(f"{question.partition('. ')[0]}; add --yes to make it, --public if it is to be public")
    if not typer.confirm(question, err=True):
        raise UserError(f"{question.partition(' ')[0]}: nothing was made or sent, as you wish")


def show_pushed(selection: Selection, sizes: dict[str, int], repo: str, pushed: Pushed | None, json: bool) -> None:
    """Print the files with their sizes, what stays here, and where the others are."""
    from obliteratus.cli.terminal import format_bytes, results, say, show_json, show_table

    if json:
        where = None if pushed is None else vars(pushed)
        show_json({"repo": repo, "files": sizes, "left_out": dict(selection.left_out), "pushed": where})
        return
    rows = [[name, format_bytes(size)] for name, size in sizes.items()]
    show_table("Would be uploaded" if pushed is None else "Uploaded", ["file", "size"], rows)
    if selection.left_out:
        stays = [[name, why] for name, why in selection.left_out.items()]
        show_table("Stays here", ["file", "because it"], stays)
    if pushed is None:
        say(f"Nothing was sent. {format_bytes(sum(sizes.values()))} would go to {repo}.", "Done")
        return
    kind = "private" if pushed.private else "public"
    say(f"{pushed.url} ({kind}{', made for it' if pushed.created else ''})", "Pushed")
    say(f"commit {pushed.commit}", "Done")
    if any(name == "reproduce.json" for name in sizes):
        results.out("")
        say(f"obliteratus reproduce hub:{repo} does the run again and compares.", "Next")
