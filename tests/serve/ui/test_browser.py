"""The workbench in a real browser, as a new user meets it. The model is tiny and real, the server a process of its own.

Chromium is the system's own (Debian's package ``chromium``), driven by playwright; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.refuser import asked, refuser
from tests.support.variants import vary

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
pytest.importorskip("gradio", reason="gradio is not installed (pip install 'obliteratus[ui]')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (apt-get install chromium)")
REFUSAL = "I cannot help with that."
QUICK = 20_000  # ms in which the page answers to a click on a busy machine; it usually takes a few hundred
RUN = 90_000  # ms in which a run on the tiny model ends
sync_api.expect.set_options(timeout=QUICK)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that refuses prompts with a #, and files of prompts."""
    folder = tmp_path_factory.mktemp("files")
    subject = refuser(word=REFUSAL)
    subject.model.save_pretrained(folder / "refuser")
    subject.tokenizer.save_pretrained(folder / "refuser")
    for group, prompts in vary(asked(), 3).groups.items():
        (folder / f"{group}.txt").write_text("\n".join(prompt.text for prompt in prompts))
    (folder / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff\xfe" * 100)
    return folder


@pytest.fixture(scope="module")
def address(files: Path) -> Iterator[str]:
    """The address of a server that was started as a user starts it."""
    command = [sys.executable, "-m", "obliteratus", "ui", str(files / "refuser"), "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with (files / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--workspace", str(files / "work")], stdout=subprocess.PIPE, stderr=log, text=True, env=env
        )
    try:
        assert server.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
        assert found, (files / "log").read_text()
        yield found[0]
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
        said = (files / "log").read_text()
        assert "Traceback" not in said, said[-3000:]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    """A tab on the page. Whatever it asks of another machine fails the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    asked_for: list[str] = []
    page.on("request", lambda request: asked_for.append(request.url))
    page.set_default_timeout(QUICK)
    open_page(page, address)
    yield page
    page.close()
    assert asked_for
    assert [url for url in asked_for if not url.startswith((address, "data:", "blob:", "about:"))] == []


def open_page(page: Any, address: str) -> None:
    page.goto(address)
    page.wait_for_selector("#start", timeout=RUN)
    page.wait_for_selector("#jobs .jobs")


def upload(page: Any, group: str, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator(f"#{group}-upload").click()
    chooser.value.set_files(str(path))


def choose_own_files(page: Any, files: Path) -> None:
    page.get_by_label("My files").check()
    for group in ("target", "control"):
        upload(page, group, files / f"{group}.txt")
        expect(page.locator("#upload-said")).to_contain_text("36 prompts")
        expect(page.locator(f"#{group}-file input")).to_have_value(re.compile(rf"{group}(-\d+)?\.txt"))


def expect(locator: Any) -> Any:
    return sync_api.expect(locator)


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).first.click()


def set_option(page: Any, elem_id: str, text: str) -> None:
    if not page.locator(f"#{elem_id}").is_visible():
        page.locator("#more > button").click()
    page.locator(f"#{elem_id} input, #{elem_id} textarea").first.fill(text)


def ask(page: Any, text: str) -> None:
    page.locator("#text textarea").fill(text)
    page.locator("#send").click()


def last_answer(page: Any, side: str) -> Any:
    return page.locator(f"#chat-{side} .bot.message").last


def turn_dial(page: Any, value: str) -> None:
    field = page.locator("#dial input[type=number]")
    field.fill(value)
    field.press("Tab")


def choose_method(page: Any, name: str) -> None:
    page.locator("#method input").fill(name)
    page.locator("#method input").press("Enter")


def begin_long_run(page: Any, name: str) -> Any:
    """Start a search of many trials, and return what the strip shows of it once it is under way."""
    set_option(page, "run-name", name)
    set_option(page, "trials", "5000")
    choose_method(page, "leace_search")
    page.locator("#start").click()
    job = page.locator(".job", has_text=f"Run {name}")
    expect(job.locator(".track")).to_be_visible(timeout=RUN)
    return job


def test_from_start_to_a_saved_model(tab: Any, files: Path) -> None:
    """Upload, run, read, take the model home, talk at several strengths, and save another form."""
    choose_own_files(tab, files)
    set_option(tab, "run-name", "first")
    choose_method(tab, "lean")  # the model has too few layers for a method that edits the last quarter
    tab.locator("#start").click()
    expect(tab.locator("#run-said")).to_contain_text("It has begun")
    expect(tab.locator(".job", has_text="Run first")).to_have_attribute("data-status", "done", timeout=RUN)
    open_tab(tab, "Results")
    expect(tab.locator("#run input")).to_have_value("first")
    check_saved_model(tab, files / "work" / "runs" / "first")
    check_dial(tab)
    check_export(tab, files / "work" / "exports")


def check_saved_model(page: Any, folder: Path) -> None:
    """The refusals are gone, the page shows the run, and the download is what was saved."""
    record = json.loads((folder / "run.json").read_text())
    assert record["before"]["refusal.target"]["value"] == 1
    assert record["after"]["refusal.target"]["value"] == 0
    expect(page.locator("#page .run, #page iframe")).to_be_visible()
    with page.expect_download() as download:
        page.locator("#files a.archive").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        assert archive.read("first/model.safetensors") == (folder / "model.safetensors").read_bytes()


def check_dial(page: Any) -> None:
    """Both models answer side by side; the dial at 0 is the unedited model, and each turn of it answers again."""
    open_tab(page, "Chat")
    expect(page.locator("#voice input")).to_have_value("first")
    page.locator("#chat-more > button").click()
    page.locator("#tokens input").fill("12")
    ask(page, "Tell me # about stars?")
    expect(last_answer(page, "base")).to_contain_text(REFUSAL, timeout=RUN)
    expect(last_answer(page, "edited")).to_contain_text("Y")
    expect(page.locator("#chat-said")).to_contain_text("Cut off at 12 tokens")
    for strength, answer in (("0", REFUSAL), ("-1", REFUSAL), ("1", "Y")):
        turn_dial(page, strength)
        expect(last_answer(page, "edited")).to_contain_text(answer)
    expect(last_answer(page, "edited")).not_to_contain_text(REFUSAL)
    expect(page.locator("#chat-edited .bot.message")).to_have_count(1)


def check_export(page: Any, folder: Path) -> None:
    open_tab(page, "Results")
    page.locator("#export > button").click()
    page.locator("#export-save").click()
    expect(page.locator(".job", has_text="Export first-adapter")).to_have_attribute("data-status", "done", timeout=RUN)
    expect(page.locator("#exports input")).to_have_value("first-adapter")
    expect(page.locator("#export-files")).to_contain_text("Download first-adapter")
    assert (folder / "first-adapter" / "adapter_model.safetensors").is_file()


def test_two_tabs_see_one_job_and_either_stops_it(tab: Any, browser: Any, address: str, files: Path) -> None:
    """It says that what was finished is kept, and a resumed run takes it up and is stopped again."""
    choose_own_files(tab, files)
    job = begin_long_run(tab, "long")
    other = browser.new_page(viewport={"width": 390, "height": 800})
    open_page(other, address)
    seen = other.locator(".job", has_text="Run long")
    expect(seen).to_have_attribute("data-status", "running")
    expect(seen.locator(".line.small", has_text="SEARCH")).to_be_visible(timeout=RUN)
    number = seen.get_attribute("data-job")
    assert number == job.get_attribute("data-job")
    other.locator("#stop").click()
    for page in (tab, other):
        expect(page.locator(f".job[data-job='{number}']")).to_have_attribute("data-status", "stopped", timeout=RUN)
    expect(job).to_contain_text("Its finished stages are kept")
    assert (files / "work" / "runs" / "long.partial").is_dir()
    assert not (files / "work" / "runs" / "long").exists()

    open_tab(other, "Results")
    other.locator("#interrupted-runs > button").click()
    expect(other.locator("#interrupted input")).to_have_value("long")
    other.locator("#resume").click()
    again = tab.locator(".job", has_text="Resume long")
    expect(again).to_contain_text("restored from the interrupted run", timeout=RUN)
    tab.locator("#stop").click()
    expect(again).to_have_attribute("data-status", "stopped", timeout=RUN)
    other.locator("#discard").click()
    expect(other.locator("#interrupted-said")).to_contain_text("It is removed")
    assert not (files / "work" / "runs" / "long.partial").exists()
    other.close()


def test_bad_input_gets_one_line_and_the_page_goes_on(tab: Any, files: Path) -> None:
    tab.get_by_label("My files").check()
    upload(tab, "target", files / "picture.txt")
    expect(tab.locator("#upload-said .error")).to_contain_text("picture.txt: the file is not UTF-8 text")
    assert "picture.txt" not in {path.name for path in (files / "work" / "prompts").iterdir()}
    assert not [path for path in (files / "work" / ".uploads").rglob("*") if path.is_file() and path.stat().st_size]
    tab.locator("#model input").fill("/etc")
    tab.locator("#model input").press("Enter")
    choose_own_files(tab, files)
    tab.locator("#start").click()
    expect(tab.locator("#run-said .error")).to_contain_text("/etc: choose a model of the list")

    open_tab(tab, "Chat")
    expect(tab.locator("#voice input")).not_to_have_value("")
    ask(tab, "word " * 200)
    expect(tab.locator("#chat-said .error")).to_contain_text("this turn is too long", timeout=RUN)
    expect(tab.locator("#text textarea")).to_have_value(re.compile("word "))
    ask(tab, "Tell me # about stars?")
    expect(last_answer(tab, "base")).to_contain_text(REFUSAL)
