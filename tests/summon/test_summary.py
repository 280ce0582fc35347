"""A summary without weights agrees with the loaded model."""

from __future__ import annotations

import pytest
from tests.support.tiny import MODELS, tiny_config, tiny_subject

from obliteratus.summon.coverage import count_coverage
from obliteratus.summon.sites import find_architecture, is_tied
from obliteratus.summon.summary import summarize_model

NAMES = sorted(MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_outline_agrees_with_the_loaded_model(name: str, tmp_path) -> None:
    subject = tiny_subject(name)
    subject.model.config.save_pretrained(tmp_path)  # no weights there
    found = summarize_model(tmp_path)
    assert found.sites == subject.sites
    assert (found.n_layers, found.width) == (subject.n_layers, subject.width)
    assert found.n_params == subject.model.num_parameters()
    assert found.tied == is_tied(subject.model)
    assert found.coverage == count_coverage(subject.model, subject.sites, find_architecture(subject.model.config))


def test_outline_forecasts_memory(tmp_path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    found = summarize_model(tmp_path, dtype="bf16")
    assert found.dtype == "bfloat16"
    assert found.kv_bytes_per_token == 2 * 3 * 2 * 8 * 2  # k and v × layers × kv heads × head_dim × bytes
    assert found.weight_bytes == {
        "float32": 4 * found.n_params,
        **dict.fromkeys(("bfloat16", "float16"), 2 * found.n_params),
    }
