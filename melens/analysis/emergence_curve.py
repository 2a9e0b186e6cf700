"""The curve that Gallego-Feliciano et al. (2025) fit to a ratio over training: a logarithm under an exponential decay.

    fit = fit_curve(steps, ratios)      # None where nothing is determined
    fit.r2, fit.baseline, fit.at(steps)

Their equation 9 is `f(t) = A exp(-λ x_t) log(x_t) + K` with `x_t = γ t + t_0` and λ ≥ 0 (arXiv 2508.03616). As they do,
it is fitted as their equation 14, `f(t) = exp(-β t) (A_1 log(t + τ_0) + A_2) + K`, by a trust region on normalised
data. For given β and τ_0 it is linear in the rest: these three are solved for (Golub & Pereyra 1973), so that only two
are searched, from the best of a grid, and no guess is needed. Intervals are those of the covariance at the minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares
from scipy.special import lambertw, stdtrit

from melens.errors import MelensError
from melens.printing import Brief

__all__ = ["LEAST_POINTS", "CurveFit", "fit_curve"]

LEAST_POINTS = 10
"""Two for each of the five parameters: fewer are gone through by a curve that says nothing."""

_DECAYS = np.concatenate([[0.0], np.geomspace(0.1, 200, 16)])
_LOG_SHIFTS = np.linspace(np.log(1e-6), np.log(10), 16)
"""The grid of β and log τ_0 from which the fit starts, for steps from 0 to 1."""

_BOUNDS = [0, np.log(1e-8)], [1e4, np.log(1e3)]
"""Of β, which the paper keeps positive, and of log τ_0."""

_LEAST_DECAY = 1.0
"""Of β times the last step: over a training in which the factor falls less than to 1 / e, a decay and a baseline cannot
be told from a slower logarithm, whatever the covariance at the minimum says."""

_Points = Float[np.ndarray, " point"]


@dataclass(frozen=True, repr=False)
class CurveFit(Brief):
    """A fitted curve.

    Attributes:
        r2: coefficient of determination, on the points that it was fitted to.
        decay, shift, scale, offset, baseline: β, τ_0, A_1, A_2 and K of equation 14.
        intervals: of these five by name, 95%; empty where they are not `determined`.
        determined: whether the points tell the five apart: β is over 0 with its whole interval, and the factor falls to
            1 / e or less. Of a pure logarithm they cannot tell K from A_2; the curve and its `r2` hold all the same.
    """

    r2: float
    decay: float
    shift: float
    scale: float
    offset: float
    baseline: float
    intervals: dict[str, tuple[float, float]]
    determined: bool

    def at(self, steps: _Points) -> _Points:
        """Compute the curve."""
        return np.exp(-self.decay * steps) * (self.scale * np.log(steps + self.shift) + self.offset) + self.baseline

    @property
    def of_equation_9(self) -> dict[str, float] | None:
        """A, λ, γ, t_0 and K of equation 9; None where they are not determined or too large for a number."""
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            gamma = np.exp(self.offset / self.scale) if self.scale else np.inf
            shift, rate = self.shift * gamma, self.decay / gamma
            found = {"A": self.scale * np.exp(rate * shift), "lambda": rate, "gamma": gamma, "t_0": shift}
        found["K"] = self.baseline
        is_number = all(np.isfinite(value) for value in found.values()) and gamma > 0
        return {name: float(value) for name, value in found.items()} if self.determined and is_number else None

    @property
    def peak(self) -> float | None:
        """The step at which the curve turns, equation 13; None without one after step 0."""
        own = self.of_equation_9
        if own is None or own["lambda"] <= 0:
            return None
        turns = float((np.exp(lambertw(1 / own["lambda"]).real) - own["t_0"]) / own["gamma"])
        return turns if np.isfinite(turns) and turns > 0 else None


def fit_curve(steps: _Points, values: _Points) -> CurveFit | None:
    """Fit equation 9 to a quantity over training steps.

    Args:
        steps: of at least `LEAST_POINTS` checkpoints, all different.
        values: at these.

    Returns:
        The fit; None where the values are all alike, the fit did not converge, or it is no better than their mean.

    Raises:
        MelensError: too few points, or one that is no number.
    """
    steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if len(steps) < LEAST_POINTS:
        raise MelensError(f"The curve of five parameters takes {LEAST_POINTS} checkpoints; there are {len(steps)}.")
    if not (np.isfinite(steps).all() and np.isfinite(values).all()):
        raise MelensError("The curve takes numbers alone, without NaN or infinity.")
    span, low, height = float(steps.max()), float(values.min()), float(np.ptp(values))
    if span <= 0 or height <= 1e-9 * max(abs(low), 1e-9):
        return None
    t, y = steps / span, (values - low) / height
    found = least_squares(lambda x: _solved(x[0], x[1], t, y)[1], _start(t, y), bounds=_BOUNDS, x_scale=[1, 1])
    p = np.array([found.x[0], np.exp(found.x[1]), *_solved(found.x[0], found.x[1], t, y)[0]])
    residual = float(np.square(found.fun).sum())
    r2 = 1 - residual / float(np.square(y - y.mean()).sum())
    if found.status <= 0 or not np.isfinite(p).all() or r2 <= 0:
        return None
    return _in_units(p, _jacobian(p, t), residual, r2, span, low, height)


def _in_units(
    p: Float[np.ndarray, " 5"],
    jacobian: Float[np.ndarray, "point 5"],
    residual: float,
    r2: float,
    span: float,
    low: float,
    height: float,
) -> CurveFit:
    """Scale the parameters back, with their intervals: log(t / span + τ) = log(t + τ span) - log(span)."""
    units = np.diag([1 / span, span, height, height, height])
    units[3, 2] = -height * np.log(span)
    decay, shift, scale, offset, baseline = (float(value) for value in units @ p + [0, 0, 0, 0, low])
    sizes, freedom = np.linalg.norm(jacobian, axis=0), len(jacobian) - len(p)
    if p[0] < _LEAST_DECAY or not sizes.all() or np.linalg.matrix_rank(scaled := jacobian / sizes) < len(p):
        return CurveFit(r2, decay, shift, scale, offset, baseline, {}, False)
    covariance = np.linalg.inv(scaled.T @ scaled) / np.outer(sizes, sizes) * residual / freedom
    variances = np.diag(units @ covariance @ units.T).clip(min=0)
    reach = float(stdtrit(freedom, 0.975)) * np.sqrt(variances)
    names = ("decay", "shift", "scale", "offset", "baseline")
    ends = zip(names, (decay, shift, scale, offset, baseline), reach.tolist(), strict=True)
    intervals = {name: (value - own, value + own) for name, value, own in ends}
    determined = intervals["decay"][0] > 0
    return CurveFit(r2, decay, shift, scale, offset, baseline, intervals if determined else {}, determined)


def _jacobian(p: Float[np.ndarray, " 5"], t: _Points) -> Float[np.ndarray, "point 5"]:
    decay, shift, scale, offset, _ = p
    faded, log = np.exp(-decay * t), np.log(t + shift)
    columns = [-t * faded * (scale * log + offset), faded * scale / (t + shift), faded * log, faded, np.ones_like(t)]
    return np.stack(columns, axis=1)


def _solved(decay: float, log_shift: float, t: _Points, y: _Points) -> tuple[Float[np.ndarray, " 3"], _Points]:
    """Return A_1, A_2 and K for given β and log τ_0, by linear least squares, and what is left of the values."""
    faded = np.exp(-decay * t)
    design = np.stack([faded * np.log(t + np.exp(log_shift)), faded, np.ones_like(t)], axis=1)
    linear = np.linalg.lstsq(design, y, rcond=None)[0]
    return linear, design @ linear - y


def _start(t: _Points, y: _Points) -> Float[np.ndarray, " 2"]:
    """Return the β and log τ_0 of the grid that leave least."""
    grid = [(decay, shift) for decay in _DECAYS for shift in _LOG_SHIFTS]
    return np.array(min(grid, key=lambda own: float(np.square(_solved(own[0], own[1], t, y)[1]).sum())))
