"""What `inspect --memory` reckons: the bytes are those that a run reads, and little memory means that weights stay on
disk. How near seconds and peaks come is measured in `bench.streaming`: they are the machine's."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.checkpoints import stored
from tests.support.variants import vary

from obliteratus.core.errors import UserError
from obliteratus.core.types import PromptSet
from obliteratus.forecast.offloaded import forecast_run
from obliteratus.inference.memory_needs import bytes_in_memory, bytes_offloaded
from obliteratus.pipeline.offloaded import adapt_recipe
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.summon.summary import summarize_model


@pytest.fixture
def many(prompts: PromptSet) -> PromptSet:
    return vary(prompts, 4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_bytes_are_those_that_are_read(name: str, tmp_path: Path, many: PromptSet, tight: None) -> None:
    folder = stored(tmp_path, name, max_position_embeddings=128)
    made = load_recipe("two_directions")
    found = forecast_run(summarize_model(str(folder)), 1e12, made, many, {})
    assert list(found["stages"]) == ["PROBE × 1", "VERIFY", "SAVE", "SCORE × 2"]
    away = open_offloaded(folder)
    before = away.offloaded.bytes_read
    run(adapt_recipe(away, made), away, many, force=True)
    expected = found["stages"]["PROBE × 1"]["read"] + found["stages"]["VERIFY"]["read"]
    # beside them the norm rule looks at a few, and what stays in memory after the first stage is not read again
    assert away.offloaded.bytes_read - before == pytest.approx(expected, rel=0.05)
    assert all(stage["seconds"] > 0 for stage in found["stages"].values())
    assert found["weights"] == "on disk"


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model fits into memory."""
    monkeypatch.setattr("obliteratus.forecast.offloaded.bytes_in_memory", lambda made: 2 * 10**12)


def test_what_fits_is_loaded(tmp_path: Path, many: PromptSet) -> None:
    made = summarize_model(str(stored(tmp_path, "llama")))
    found = forecast_run(made, 1e12, load_recipe("two_directions"), many, {})
    assert found["weights"] == "in memory"
    assert found["peak"] == pytest.approx(bytes_in_memory(made), rel=0.2)
    with pytest.raises(UserError, match="with the weights left on disk"):
        forecast_run(made, bytes_offloaded(made) / 10, load_recipe("two_directions"), many, {})
