"""The page: a strip of jobs that every tab of every browser sees, and below it Run, Results and Chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from obliteratus.serve.ui import chat_tab, results_tab, run_tab
from obliteratus.serve.ui.events import AT_ONCE
from obliteratus.serve.ui.pages import show_jobs
from obliteratus.serve.ui.workbench import Workbench

REFRESH = 1.0  # seconds between two looks at the jobs, each of which takes 0.3 ms without what Gradio adds
STYLE = Path(__file__).with_name("style.css")
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    radius_size="sm",
    font=SYSTEM_FONTS,
    font_mono=("ui-monospace", "Consolas", "monospace"),
)


def build(bench: Workbench) -> gr.Blocks:
    """Return the page of a workbench. It keeps no state but a tab's own conversation."""
    page = gr.Blocks(title="OBLITERATUS", analytics_enabled=False, fill_width=True)
    with page:
        gr.HTML('<h1 class="brand">OBLITERATUS</h1>', padding=False)
        with gr.Row(elem_id="strip"):
            jobs = gr.HTML(lambda: show_jobs(bench.queue.states()), elem_id="jobs", padding=False, scale=5)
            stop = gr.Button("Stop", elem_id="stop", size="sm", scale=0, min_width=90, interactive=False)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Run", elem_id="run-tab"):
                run_tab.build(bench)
            with gr.Tab("Results", elem_id="results-tab"):
                results = results_tab.build(bench)
            with gr.Tab("Chat", elem_id="chat-tab"):
                talk = chat_tab.build(bench)
        stop.click(lambda: stop_current(bench), outputs=jobs, **AT_ONCE)
        _keep_current(bench, page, (jobs, stop), {**results, **talk})
    return page


def _keep_current(bench: Workbench, page: gr.Blocks, strip: tuple[Any, Any], lists: dict[Any, Any]) -> None:
    """Show jobs every second, and lists of runs when they have changed.

    strip: jobs, and the button that stops one. lists: dropdown → what it offers at the moment.
    """
    seen, timer = gr.State(None), gr.Timer(REFRESH)

    def refresh(known: Any, *chosen: Any) -> list[Any]:
        states, offered = bench.queue.states(), [offer() for offer in lists.values()]
        busy = gr.update(interactive=any(not state.finished for state in states))
        old = known or [None] * len(lists)
        runs = bench.workspace.list_runs()
        updates = [
            gr.skip() if now == before else update_list(now, before, value, value in runs)
            for now, before, value in zip(offered, old, chosen, strict=True)
        ]
        return [show_jobs(states), busy, offered, *updates]

    for happens in (page.load, timer.tick):
        happens(refresh, [seen, *lists], [*strip, seen, *lists], **AT_ONCE)


def update_list(offered: list[str], before: list[str] | None, chosen: Any, keep: bool) -> Any:
    """Return the change of a dropdown. Where nothing was chosen, the first is, and a new first one if not ``keep``."""
    is_new = before is not None and bool(offered) and offered[0] not in before
    value = chosen if chosen in offered and (keep or not is_new) else offered[0] if offered else None
    return gr.update(choices=offered, value=value)


def stop_current(bench: Workbench) -> str:
    """Stop the job that runs, or the first that waits, and return the strip."""
    busy = [state for state in bench.queue.states() if not state.finished]
    for state in sorted(busy, key=lambda state: state.status == "waiting")[:1]:
        bench.queue.stop(state.number)
    return show_jobs(bench.queue.states())
