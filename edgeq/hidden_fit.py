"""Fitting `HiddenModel`s: principal factors of the hidden activations of an MLP, held back as far as other text asks for it.

A factor model is fitted to some windows of the calibration text and judged on others, held back: by the squared error of down_proj's
output after cuts to a few widths. Noise times a number above 1 holds the regression back, as a ridge does; so many times are tried, and
so are the mean alone and nothing at all, and the best is kept. Compensation is then never worse than none on text it has not seen, as
far as a calibration text can tell.

SmolLM2-135M, fitted to three quarters of a text in many languages and notations and judged on the fourth: in every layer and quarter,
regression left 0.73 to 0.97 of the error of no compensation, the mean alone 0.95 to 1.00, and noise times 2 was the best in most. So it
was for a fit judged on WikiText. Perplexity after cuts by 15 / 25 %, calibrated on the default text, with and without compensation:
WikiText 38.9 / 49.1 and 42.3 / 59.1, Python source 12.6 / 18.7 and 13.6 / 25.6, program messages in French, German and Spanish
31.6 / 47.3 and 34.8 / 62.2. Calibrated on Python source, judged on WikiText: 51.0 / 68.1 and 51.2 / 71.3.
"""

from __future__ import annotations

import numpy as np
import torch

from edgeq.compensation import HiddenModel, regression
from edgeq.sensitivity import Moments

# A channel keeps at least this share of its variance as noise of its own, so that no regression weight grows without bound.
_LEAST_NOISE = 0.05
_SWEEPS = 6
_NOISE = (1.0, 2.0, 4.0, 8.0)
UNCHECKED_NOISE = 2.0  # without held-back windows
_KEPT = (0.5, 0.8)  # widths of the cuts that are judged
_OUTPUTS = 32  # random directions of down_proj's output that stand for all of them


def hidden_model(mean: torch.Tensor, second: torch.Tensor, *, rank: int) -> HiddenModel:
    """Factor model of hidden activations with this mean (n_ff,) and these second moments (n_ff, n_ff).

    Principal factors of the correlation matrix: eigenvectors of it less its noise, and the noise from them, in turns. The eigenvectors
    come from subspace iteration, started at random with a fixed seed, so that no (n_ff, n_ff) decomposition is needed.
    """
    covariance = torch.addr(second, mean, mean, alpha=-1)
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    n_ff, rank = len(mean), min(rank, len(mean))
    noise, factors = torch.ones_like(mean), mean.new_zeros(n_ff, rank)
    if rank:
        unit = torch.where(deviation > 0, 1 / deviation, 0)
        correlation = covariance.mul_(unit[:, None]).mul_(unit)
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(n_ff, min(rank + 8, n_ff), generator=generator).to(mean)
        noise = noise / 2
        for sweep in range(_SWEEPS):
            for _ in range(4 if sweep == 0 else 2):
                basis = torch.linalg.qr(correlation @ basis - noise[:, None] * basis)[0]
            values, vectors = torch.linalg.eigh(basis.T @ (correlation @ basis - noise[:, None] * basis))
            factors = (basis @ vectors)[:, -rank:] * values[-rank:].clamp_min(0).sqrt()
            noise = (1 - factors.square().sum(1)).clamp(_LEAST_NOISE, 1)
    return HiddenModel(
        mean=mean.cpu().numpy(), factors=(factors * deviation[:, None]).cpu().numpy(), noise=(noise * deviation.square()).cpu().numpy()
    )


def held_back_noise(model: HiddenModel, down: torch.Tensor, seen: Moments) -> HiddenModel:
    """The model with what makes cuts err least on other text: more noise, or no factors, or no mean either.

    down (n_embd, n_ff), its columns and the moments of the other text in the model's order.
    """
    sketch = torch.randn(_OUTPUTS, len(down), generator=torch.Generator().manual_seed(0)).to(down)
    outputs = sketch @ down if len(down) > _OUTPUTS else down
    candidates = [with_noise(model, times) for times in _NOISE] if model.factors.any() else []
    candidates += [HiddenModel(mean=mean, factors=0 * model.factors, noise=model.noise) for mean in (model.mean, 0 * model.mean)]
    return min(candidates, key=lambda candidate: _error(candidate, outputs, seen))


def with_noise(model: HiddenModel, times: float) -> HiddenModel:
    """The same with all noise multiplied."""
    return HiddenModel(mean=model.mean, factors=model.factors, noise=model.noise * np.float32(times))


def _error(model: HiddenModel, outputs: torch.Tensor, seen: Moments) -> float:
    """Mean squared error of outputs (n, n_ff) times activations with these moments after cuts, relative to that of doing nothing."""
    total, matrix = 0.0, outputs.cpu().numpy()
    for kept in {round(share * len(model.mean)) for share in _KEPT}:
        found = regression(model, kept)
        lost = outputs[:, kept:]
        change = torch.cat((outputs[:, :kept] - torch.from_numpy(found.columns(matrix)).to(outputs), lost), 1)
        bias = torch.from_numpy(found.bias(matrix[:, kept:])).to(outputs)
        error = ((change @ seen.second) * change).sum() - 2 * bias @ (change @ seen.mean) + bias @ bias
        alone = ((lost @ seen.second[kept:, kept:]) * lost).sum()
        total += float(error / alone) if alone > 0 else 0.0
    return total
