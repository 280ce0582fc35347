"""`obliteratus serve` on the astronomy organism, asked by OpenAI's client: throughput, and what is left of requests.

together: 50 requests at once, all under one plan at one strength; mixed: under five settings of two plans and the
unedited model. one_at_a_time: requests in a row, of which a sample is measured; speedup: tokens a second over those.
hang_up: 50 streams, of which every second client hangs up after its first token; freed: seconds until the server has
only the others' rows. stop: SIGTERM while 50 are being answered, with a second of grace; kill: SIGKILL, and a new
server on the same port. Requests are counted as answered, told (an error of the server's), cut off (the connection
broke, which a client sees), and lost (none of these). before, after: threads, open files and memory of the server
after the first round and after all others.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import openai
import psutil

from bench.chat import make_plan
from bench.common import describe_machine, load_organism, parse_options, print_report, say
from obliteratus.excise.plan import save_plan

REQUESTS, SMOKE_REQUESTS = 50, 4
TOKENS, SMOKE_TOKENS = 24, 4
LONG = 200  # tokens of answers that are not to end by themselves before something happens to them
SAMPLE = 6  # requests one at a time; the rest would take as long each
BASE = "organism:astronomy"
SETTINGS = ((BASE, None), ("plain", 1.0), ("plain", 0.5), ("columns", 1.0), ("columns", -0.5))
SECONDS = 600  # that a client waits: more than all of them together take on a busy machine


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    @classmethod
    def start(cls, plans: Path, port: int = 0) -> Server:
        """Start a server and wait until it listens."""
        options = ["--plan", f"plain={plans / 'none'}", "--plan", f"columns={plans / 'columns'}", "--grace", "1"]
        command = [sys.executable, "-m", "obliteratus", "serve", BASE, *options, "--port", str(port)]
        process = subprocess.Popen([*command, "--json", "--quiet"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = ""
        for line in process.stdout:
            lines += line
            if line.startswith("}"):
                return cls(process, json.loads(lines)["url"])
        raise RuntimeError(f"the server did not start: {lines}")

    @property
    def port(self) -> int:
        return int(self.url.removesuffix("/v1").rpartition(":")[2])

    def describe(self) -> dict[str, float]:
        """Return what the process holds."""
        own = psutil.Process(self.process.pid)
        return {"threads": own.num_threads(), "files": own.num_fds(), "MB": own.memory_info().rss / 1e6}

    def end(self, number: int) -> tuple[int, float]:
        """Send a signal. Return the exit code, and the seconds until the process was gone."""
        start = time.perf_counter()
        self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        return code, time.perf_counter() - start


@dataclass
class Asked:
    """How a request ended, for its client."""

    outcome: str = "lost"
    tokens: int = 0
    seconds: float = 0.0


class Client:
    """OpenAI's client, asking many at once."""

    def __init__(self, server: Server, tokens: int, questions: Sequence[str]) -> None:
        limits = {"api_key": "none", "max_retries": 0, "timeout": SECONDS}
        self.api = openai.AsyncOpenAI(base_url=server.url, **limits)  # type: ignore[arg-type]
        self.tokens, self.questions = tokens, questions

    async def ask(self, n: int, model: str, strength: float | None, tokens: int = 0, hang_up: bool = False) -> Asked:
        """Ask the n-th question as a stream, and return what became of it."""
        asked, start = Asked(), time.perf_counter()
        turn: Any = {"role": "user", "content": self.questions[n % len(self.questions)]}
        extra = {} if strength is None else {"strength": strength}
        try:
            stream = await self.api.chat.completions.create(
                model=model,
                messages=[turn],
                max_tokens=tokens or self.tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            )
            async for chunk in stream:
                if chunk.usage:
                    asked.tokens, asked.outcome = chunk.usage.completion_tokens, "answered"
                elif hang_up and chunk.choices[0].delta.content:
                    await stream.close()
                    asked.outcome = "hung up"
                    break
        except openai.APIConnectionError:
            asked.outcome = "cut off"
        except openai.APIError:
            asked.outcome = "told"
        except Exception as error:  # noqa: BLE001 — the client lets some errors of the connection through as they are
            asked.outcome = "cut off" if "httpcore" in type(error).__module__ + str(type(error).__mro__) else "lost"
        asked.seconds = time.perf_counter() - start
        return asked

    async def ask_all(self, n: int, settings: Sequence[tuple[str, float | None]], **options: Any) -> list[Asked]:
        """Ask n questions at once, under the settings in turn."""
        return await asyncio.gather(*(self.ask(i, *settings[i % len(settings)], **options) for i in range(n)))

    async def read_health(self) -> dict[str, Any]:
        """Return how many requests run and wait."""
        found: Any = await self.api.get("../health", cast_to=object)
        return dict(found)


def describe(asked: Sequence[Asked], seconds: float) -> dict[str, Any]:
    """Return the outcomes, tokens a second, and the seconds of a request."""
    waits = sorted(one.seconds for one in asked)
    tokens = sum(one.tokens for one in asked)
    return {
        "outcomes": dict(Counter(one.outcome for one in asked)),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "median_request_seconds": median(waits),
        "longest_request_seconds": waits[-1],
    }


async def time_together(client: Client, n: int, settings: Sequence[tuple[str, float | None]]) -> dict[str, Any]:
    """Ask n questions at once."""
    start = time.perf_counter()
    asked = await client.ask_all(n, settings)
    return describe(asked, time.perf_counter() - start)


async def time_one_at_a_time(client: Client, n: int) -> dict[str, Any]:
    """Ask n questions in a row."""
    start = time.perf_counter()
    asked = [await client.ask(i, "plain", 1.0) for i in range(n)]
    return describe(asked, time.perf_counter() - start)


async def measure_throughput(client: Client, n: int, repeats: int) -> dict[str, Any]:
    """Measure all three in turns, so that a busy minute affects all of them, and return the medians' round."""
    rounds = []
    for _ in range(repeats):
        say("one at a time, together, mixed …")
        rounds.append(
            {
                "one_at_a_time": await time_one_at_a_time(client, min(n, SAMPLE)),
                "together": await time_together(client, n, [("plain", 1.0)]),
                "mixed": await time_together(client, n, SETTINGS),
            }
        )
    for one in rounds:
        rate = one["one_at_a_time"]["tokens_per_second"]
        one["speedup"] = {name: one[name]["tokens_per_second"] / rate for name in ("together", "mixed")}
    rounds.sort(key=lambda one: one["speedup"]["together"])
    return rounds[len(rounds) // 2]


async def measure_hang_ups(client: Client, n: int) -> dict[str, Any]:
    """Let every second client hang up after its first token, and see when its row is free."""
    before = (await client.read_health())["ended"]
    start = time.perf_counter()
    gone = asyncio.gather(*(client.ask(i, "plain", 1.0, hang_up=True) for i in range(0, n, 2)))
    stay = asyncio.gather(*(client.ask(i, "plain", 1.0) for i in range(1, n, 2)))
    left = await gone
    freed = time.perf_counter()
    while (await client.read_health())["ended"].get("canceled", 0) < before.get("canceled", 0) + len(left):
        await asyncio.sleep(0.02)
    freed = time.perf_counter() - freed
    found = describe([*left, *(await stay)], time.perf_counter() - start)
    health = await client.read_health()
    canceled = health["ended"].get("canceled", 0) - before.get("canceled", 0)
    return {**found, "freed": freed, "canceled": canceled, "running": health["running"], "waiting": health["waiting"]}


async def measure_end(server: Server, client: Client, n: int, number: int) -> dict[str, Any]:
    """End the server while n requests are being answered, and see what each client hears."""
    asking = asyncio.create_task(client.ask_all(n, [("plain", 1.0)], tokens=LONG))
    while not (await client.read_health())["running"]:
        await asyncio.sleep(0.02)
    code, seconds = await asyncio.to_thread(server.end, number)
    asked = await asking
    return {"outcomes": dict(Counter(one.outcome for one in asked)), "exit_code": code, "seconds": seconds}


async def measure(plans: Path, questions: Sequence[str], n: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Return all figures."""
    server = Server.start(plans)
    client = Client(server, tokens, questions)
    await client.ask_all(n, SETTINGS)  # what happens once is not measured, and no leak either
    before = server.describe()
    result: dict[str, Any] = await measure_throughput(client, n, repeats)
    say("hang-ups …")
    result["hang_up"] = await measure_hang_ups(client, n)
    result |= {"before": before, "after": server.describe(), "ended": (await client.read_health())["ended"]}
    say("SIGTERM …")
    result["stop"] = await measure_end(server, client, n, signal.SIGTERM)
    say("SIGKILL …")
    server = Server.start(plans, server.port)
    result["kill"] = await measure_end(server, Client(server, tokens, questions), n, signal.SIGKILL)
    server = Server.start(plans, server.port)
    again = await Client(server, tokens, questions).ask(0, "plain", 1.0)
    result["kill"]["restarted_on_its_port"] = again.outcome
    server.end(signal.SIGTERM)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures."""
    options = parse_options(__doc__, argv)
    subject, prompts = load_organism()
    questions = [prompt.text for prompt in prompts["control"][:REQUESTS]]
    n, tokens = (SMOKE_REQUESTS, SMOKE_TOKENS) if options.smoke else (REQUESTS, TOKENS)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        for norm in ("none", "columns"):
            save_plan(make_plan(subject, norm), Path(folder) / norm)
        found = asyncio.run(measure(Path(folder), questions, n, tokens, 1 if options.quick else options.repeats))
    print_report({"machine": describe_machine(), "requests": n, "tokens": tokens, **found}, options.json)


if __name__ == "__main__":
    main()
