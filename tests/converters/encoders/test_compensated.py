"""Rounding together: against an independent solution, and what it is worth."""

import numpy as np
import torch
from tiny_encoders import hf_encoder

from edgeq.converters.encoders.compensated import compensated, inverse_factor, round_together
from edgeq.converters.encoders.formats import EncoderFormat
from edgeq.converters.encoders.hf_bert import open_hf_encoder
from edgeq.converters.encoders.rounding import rounded
from edgeq.encoder_reference import EncoderReference
from edgeq.nbits import nbits_grid
from edgeq.nbits_encode import encode


def inputs(n_tokens, n_in, seed=0):
    """Inputs that go together, as those of a network do."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n_tokens, 6)) @ rng.standard_normal((6, n_in)) + 0.3 * rng.standard_normal((n_tokens, n_in))).astype(
        np.float32
    )


def test_errors_are_made_up_for_as_least_squares_would():
    """Reference: after each column, the columns that are left are moved by the exact least-squares solution (Hassibi and Stork 1993)."""
    rng, n_in = np.random.default_rng(1), 40
    weight, x = rng.standard_normal((3, n_in)).astype(np.float32), inputs(500, n_in)
    grid = nbits_grid(4, 32, symmetric=False, n_cols=n_in)
    together = torch.from_numpy(x.T @ x / len(x)).double()
    found = grid.decode(round_together(weight, inverse_factor(together), grid), n_in)
    _, scales, zeros = grid.unpack(encode(weight, grid))
    squares = together.numpy() + 0.01 * np.trace(together.numpy()) / n_in * np.eye(n_in)
    left, expected = weight.astype(np.float64), np.empty_like(weight, dtype=np.float64)
    for j in range(n_in):
        d, z = scales[:, j // 32], zeros[:, j // 32]
        expected[:, j] = (np.clip(np.rint(left[:, j] / d) + z, 0, 15) - z) * d
        behind = squares[j + 1 :, j + 1 :]
        if len(behind):
            left[:, j + 1 :] += np.outer(left[:, j] - expected[:, j], np.linalg.solve(behind, squares[j + 1 :, j]))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_outputs_lose_less_than_by_rounding_alone():
    rng = np.random.default_rng(2)
    weight, x = rng.standard_normal((24, 70)).astype(np.float32), inputs(1100, 70, seed=3)
    x, fresh = x[:900], x[900:]
    grid = nbits_grid(4, 32, symmetric=False, n_cols=70)
    alone = grid.decode(encode(weight, grid), 70)
    joint = grid.decode(round_together(weight, inverse_factor(torch.from_numpy(x.T @ x / len(x)).double()), grid), 70)
    lost = [np.square(fresh @ (values - weight).T).mean() for values in (alone, joint)]
    assert lost[1] < 0.6 * lost[0]


def test_inputs_that_are_always_zero(tmp_path):
    x = inputs(100, 33)
    x[:, 5] = 0
    factor = inverse_factor(torch.from_numpy(x.T @ x / len(x)).double())
    assert np.isfinite(factor).all() and (np.diag(factor) > 0).all()
    assert np.isfinite(inverse_factor(torch.zeros(4, 4, dtype=torch.float64))).all()


def test_a_model_keeps_more_of_itself(tmp_path):
    model, form = open_hf_encoder(hf_encoder(tmp_path / "m")), EncoderFormat("int4")
    plain = rounded(model, form)
    rng = np.random.default_rng(4)
    texts = [[2, *rng.integers(5, 200, 20).tolist(), 3] for _ in range(40)]
    found = compensated(model, form, plain, texts[:30])
    assert found.keys() == plain.keys()
    assert all(found[name].grid == plain[name].grid and found[name].shape == plain[name].shape for name in plain)
    changed = {name for name in plain if not np.array_equal(found[name].packed(), plain[name].packed())}
    assert changed == {f"layers.{i}.{role}.weight" for i in range(2) for role in ("wq", "wk", "wv", "wo", "up", "down")}
    source = EncoderReference(model.spec, model.tensors).hidden(texts[30:])
    lost = []
    for tensors in (plain, found):
        hidden = EncoderReference(model.spec, tensors).hidden(texts[30:])
        lost.append(float(sum((a - b).square().sum() for a, b in zip(source, hidden, strict=True))))
    assert lost[1] < lost[0]
