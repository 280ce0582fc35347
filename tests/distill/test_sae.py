"""Sparse autoencoders: the mathematics against its formula, the stop, and features that were planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.notes import Notes
from tests.support.sparse_features import FEATURES, ROWS, WIDTH, acts_of, sparse_rows
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations, Directions
from obliteratus.distill import find_directions
from obliteratus.distill.autoencoder import SparseAutoencoder
from obliteratus.distill.train_autoencoder import (
    Training,
    count_dead_features,
    fit_autoencoder,
    make_row_space,
    sae_gradients,
    sae_loss,
)

ALL: dict[str, Any] = {"streams": "all"}


def found(acts: Activations, **options: Any) -> Directions:
    return find_directions(acts, [Step(use="sae", **(ALL | options))])


def unit(x: Tensor) -> Tensor:
    """Rows as the step scales them: [streams, rows, width]."""
    x = (x - x.mean(0)).transpose(0, 1)
    return x / x.square().sum(2).mean(1).sqrt()[:, None, None]


def random_autoencoder(streams: int = 2, features: int = 7, width: int = 5, seed: int = 0) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(streams, width, features), (streams, features), (streams, features, width), (streams, width)]
    return SparseAutoencoder(*(torch.randn(s, generator=generator) for s in shapes))


# -------------------------------------------------------------------------------------------- the mathematics
def test_loss_and_gradient_are_the_formulas() -> None:
    autoencoder = random_autoencoder()
    x = torch.randn(2, 11, 5, generator=torch.Generator().manual_seed(1))
    for stream in range(2):
        encoder, bias, decoder, offset = (p[stream].double().requires_grad_() for p in autoencoder.parameters)
        rows = x[stream].double()
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:  # one row at a time: nothing of the batched form is shared
            fired = torch.clamp(encoder.T @ (row - offset) + bias, min=0)
            rebuilt = decoder.T @ fired + offset
            total = total + ((row - rebuilt) ** 2).sum() + 0.3 * fired.abs().sum()
        loss = total / len(rows)
        torch.testing.assert_close(sae_loss(x, autoencoder, 0.3)[stream].double(), loss.detach(), rtol=1e-5, atol=0)
        for ours, truth in zip(
            sae_gradients(x, autoencoder, 0.3), torch.autograd.grad(loss, [encoder, bias, decoder, offset]), strict=True
        ):
            torch.testing.assert_close(ours[stream].double(), truth, rtol=1e-4, atol=1e-4)


def test_dead_features_are_counted() -> None:
    autoencoder = random_autoencoder(features=6)
    autoencoder.bias[0, :2] = -1e6  # two that can never fire, and in the second stream one
    autoencoder.bias[1, 5] = -1e6
    autoencoder.bias[0, 2:] = autoencoder.bias[1, :5] = 1e3
    x = torch.randn(2, 11, 5, generator=torch.Generator().manual_seed(1))
    assert count_dead_features(autoencoder, x).tolist() == [2, 1]


def test_decoder_rows_stay_unit_and_streams_do_not_meet() -> None:
    x = unit(sparse_rows(200, streams=3)[0])
    how = Training(max_epochs=4)
    together = fit_autoencoder(x, how)
    torch.testing.assert_close(together.autoencoder.decoder.norm(dim=2), torch.ones(3, 2 * WIDTH), rtol=0, atol=1e-5)
    for stream in range(3):
        alone = fit_autoencoder(x[stream : stream + 1], how)
        torch.testing.assert_close(alone.explained, together.explained[stream : stream + 1], rtol=0, atol=1e-3)
        assert alone.epochs == together.epochs[stream]


def test_the_row_space_holds_the_rows_and_nothing_else() -> None:
    """Its rows are orthonormal, the axes are the principal ones; a autoencoder carried outside does the same there."""
    x = torch.randn(2, 9, 20, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, 20)
    for rows in (x, x.mT.contiguous()):  # fewer rows than dimensions, and more
        space = make_row_space(rows, torch.Generator().manual_seed(0))
        k = min(rows.shape[1:])
        eye = torch.eye(k).expand(2, k, k)
        torch.testing.assert_close(space.basis @ space.basis.mT, eye, rtol=0, atol=1e-5)
        inner = space.to_coordinates(rows)
        torch.testing.assert_close(inner @ space.basis, rows, rtol=1e-4, atol=1e-4)
        spread = (inner @ space.axes.mT).norm(dim=1).double()
        torch.testing.assert_close(spread, torch.linalg.svdvals(rows.double()), rtol=1e-4, atol=1e-4)
        autoencoder = random_autoencoder(width=k)
        outside = space.to_full_width(autoencoder)
        torch.testing.assert_close(outside.encode(rows), autoencoder.encode(inner), rtol=1e-3, atol=1e-3)
    elsewhere = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(2))
    space = make_row_space(x, torch.Generator().manual_seed(0))
    assert not torch.allclose(
        space.to_coordinates(elsewhere) @ space.basis, elsewhere, atol=0.1
    )  # nine rows span no twenty


def test_the_row_space_does_not_depend_on_rounding() -> None:
    """Signs of singular vectors are drawn anew by rounding; the coordinates are not."""
    x = torch.randn(1, 9, 20, generator=torch.Generator().manual_seed(1))
    one, other = (make_row_space(rows, torch.Generator().manual_seed(0)).basis for rows in (x, x * 1000 / 999))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert not torch.allclose(one, make_row_space(x, torch.Generator().manual_seed(1)).basis, atol=0.1)


# --------------------------------------------------------------------------------------------------- the stop
def test_training_ends_where_the_held_out_loss_gains_no_more() -> None:
    x = unit(sparse_rows(ROWS)[0])
    ours, fixed = (
        fit_autoencoder(x, Training(max_epochs=100)),
        fit_autoencoder(x, Training(max_epochs=100, patience=100)),
    )
    assert int(ours.epochs) < 60
    assert int(fixed.epochs) == 100
    assert float(ours.explained) > float(fixed.explained) - 0.02
    assert float(ours.explained) > 0.8


def test_training_goes_on_while_the_loss_falls() -> None:
    assert int(fit_autoencoder(unit(sparse_rows(ROWS)[0]), Training(max_epochs=4, min_gain=0.001)).epochs) == 4


def test_each_stream_stops_by_itself() -> None:
    x = unit(sparse_rows(200, streams=2)[0])
    x[1] = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5  # nothing to be learned
    both = fit_autoencoder(x, Training(max_epochs=60))
    assert int(both.epochs[1]) < int(both.epochs[0])
    for stream in range(2):
        assert int(fit_autoencoder(x[stream : stream + 1], Training(max_epochs=60)).epochs) == int(both.epochs[stream])


# ---------------------------------------------------------------------------------------------- the directions
def test_a_planted_sparse_feature_is_found() -> None:
    rows, truth = sparse_rows(ROWS, streams=2)
    directions = found(acts_of(rows), features=1)
    assert (directions.basis[:, 0] @ truth[0] > 0.9).all()  # sign included
    assert (directions.raw > 10).all()


def test_shuffled_labels_find_nothing() -> None:
    rows, _ = sparse_rows(ROWS, streams=2)
    shuffled = rows[torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))]
    assert (found(acts_of(shuffled)).basis == 0).all()


def test_only_what_separates_gives_a_direction() -> None:
    rows, truth = sparse_rows(ROWS)
    many = found(acts_of(rows), features=16)
    given = many.basis[0][many.basis[0].norm(dim=1) > 0.5]
    assert 1 <= len(given) < 16
    assert (given[0] @ truth[0]) > 0.9


@pytest.mark.parametrize("factor", [1000.0, 2.0**-12])
def test_the_scale_of_the_rows_does_not_matter(factor: float) -> None:
    rows, _ = sparse_rows(ROWS)
    one, other = found(acts_of(rows)), found(acts_of(rows * factor))
    torch.testing.assert_close(
        one.basis, other.basis, rtol=0, atol=3e-2
    )  # rounding grows over 200 steps of Adam, to 0.02 on AMD
    torch.testing.assert_close(one.score, other.score, rtol=0, atol=1e-3)


def test_the_same_seed_gives_the_same_and_the_global_generator_is_not_touched() -> None:
    acts = acts_of(sparse_rows(ROWS)[0])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = found(acts)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(found(acts).basis, one.basis)
    assert not torch.equal(found(acts, training={"seed": 1}).basis, one.basis)


@pytest.mark.parametrize(("streams", "expected"), [("best", [1, 2, 4, 5]), ([0.0, 0.6], [0, 3]), ("all", range(6))])
def test_only_the_chosen_streams_are_trained(streams: Any, expected: Any) -> None:
    rows, _ = sparse_rows(ROWS, streams=6)
    for weak in (0, 3):  # half the behavior and a constant: a small share of the stream
        rows[:, weak] += 20
    chosen = found(acts_of(rows), streams=streams, features=1)
    assert chosen.score.nonzero().flatten().tolist() == list(expected)


def test_what_was_trained_is_reported() -> None:
    notes = Notes()
    with report_to(notes):
        found(acts_of(sparse_rows(100)[0]), device="cpu", training={"max_epochs": 2})
    assert len(notes.texts) == 1
    for part in ("1 streams of 96 features", "% of held-out rows explained, 2 epochs", "on cpu (as requested)"):
        assert part in notes.texts[0]


# --------------------------------------------------------------------------------------------- trained elsewhere
def saved(folder: Path, truth: Tensor, **changes: Any) -> str:
    """A SAELens file whose features are the planted ones; decoder rows are not of unit length."""
    dual = torch.linalg.pinv(truth)  # [width, features]: reads each feature by itself
    tensors = {"W_enc": dual, "b_enc": torch.full((FEATURES,), -0.3), "W_dec": 2 * truth, "b_dec": torch.zeros(WIDTH)}
    tensors |= changes
    path = folder / "sae_weights.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)
    return str(path)


@pytest.mark.parametrize("threshold", [None, torch.full((FEATURES,), 0.2)])
def test_a_pretrained_coder_gives_its_own_rows(tmp_path: Path, threshold: Tensor | None) -> None:
    rows, truth = sparse_rows(ROWS, streams=3)
    path = saved(tmp_path, truth, threshold=threshold)
    directions = found(acts_of(rows), pretrained=path, stream=1)
    torch.testing.assert_close(directions.basis[1, 0], truth[0], rtol=0, atol=1e-5)
    assert (directions.basis[[0, 2]] == 0).all()


def test_the_decoder_bias_is_taken_off_unless_the_config_says_no(tmp_path: Path) -> None:
    from obliteratus.distill.autoencoder import load_autoencoder

    rows, truth = sparse_rows(20)
    offset = torch.linspace(-1, 1, WIDTH)
    path = saved(tmp_path, truth, b_dec=offset)
    x, encoder = rows[:, 0], torch.linalg.pinv(truth)
    for applied in (True, False):
        (tmp_path / "cfg.json").write_text(json.dumps({"apply_b_dec_to_input": applied}))
        expected = torch.relu((x - offset * applied) @ encoder - 0.3)
        torch.testing.assert_close(load_autoencoder(path, WIDTH).encode(x[None])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"W_dec": torch.ones(FEATURES, 64), "W_enc": torch.ones(64, FEATURES)}, {}, r"is 64 wide .* stream is 48"),
        ({"W_enc": None, "b_enc": None}, {}, "has no W_enc, b_enc; a SAELens file needs W_enc, b_enc, W_dec, b_dec"),
        ({"b_enc": torch.ones(3)}, {}, r"b_enc is \[3\], not \[10\]"),
        ({}, {"architecture": "topk"}, "architecture 'topk' is not supported; use one of standard, jumprelu"),
        ({}, {"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm' is not supported"),
    ],
)
def test_a_pretrained_file_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], config: dict[str, str], message: str
) -> None:
    rows, truth = sparse_rows(60)
    path = saved(tmp_path, truth, **changes)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        found(acts_of(rows), pretrained=path, stream=0)


# ------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": "no.safetensors", "stream": 0}, "pretrained SAE 'no.safetensors' cannot be read"),
        ({"pretrained": "no.safetensors"}, "needs stream, the index it was trained on, 0 to 0; got None"),
        ({"pretrained": "no.safetensors", "stream": 4}, "0 to 0; got 4"),
        ({"training": {"epochs": 3}}, "key 'training.epochs' does not exist; did you mean 'training.max_epochs'"),
        ({"streams": []}, "streams"),
        ({"features": 65}, "features: input should be less than or equal to 64"),
    ],
)
def test_what_cannot_run_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        found(acts_of(sparse_rows(60)[0]), **options)


def test_too_few_prompts_are_refused_and_groups_that_agree_give_nothing() -> None:
    with pytest.raises(UserError, match="40 prompts are too few to train on; give 50 or more"):
        found(acts_of(sparse_rows(40)[0]))
    same = sparse_rows(60)[0][:30]
    assert (found(acts_of(torch.cat([same, same]))).basis == 0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="this machine has no CUDA GPU"):
        found(acts_of(sparse_rows(60)[0]), device="cuda")
