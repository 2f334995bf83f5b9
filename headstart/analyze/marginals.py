"""How the values of one tensor are distributed: moments, the law that predicts them best, the weight of their tail."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from baselines.distributions.auto_fit import held_out_log_probs, simplest_family
from baselines.distributions.families import FAMILIES
from baselines.distributions.statistical import thin_values
from zoo.statistics.power_law import fit_every_xmin, select_best_fit

MOST = 1 << 17  # values that laws and tails are fitted to; moments are of all
TAIL = 0.25  # of the distances from the median: the most that a tail may be
CANDIDATES = 200  # for where it begins
FEWEST = 50  # values in a tail; fewer find one in anything
PIECE = 1 << 22  # values that are float64 at a time


def marginal(values: Tensor, most: int = MOST) -> dict[str, Any]:
    """values [n], any float dtype, on any device -> JSON values:

    count, mean, std, skewness, kurtosis, min, max   of all values; std with divisor n, kurtosis plain (3: normal)
    family      of `laws.LAWS`: the first in that order that predicts held-out values as well as the best
                (within two standard errors, as in the method auto-fit); a quarter of at most `most` values is held out
    scores      family -> mean held-out log-likelihood, in nats per value
    law         parameters of the family, fitted to those at most `most` values
    tail_index  how fast the share of values further than x from the median falls: as x^-tail_index. Maximum likelihood
                (Hill's estimator) above the distance at which the law's Kolmogorov-Smirnov distance is least (Clauset,
                Shalizi & Newman 0706.1062), one of 200 within the largest quarter, with 50 values or more above it.
                About nu for Student's t; moments of an order below it exist. Exponential tails look like 4 to 6,
                normal ones like 8 to 14 (a hundred thousand values; a thousand look heavier, 2 to 7): only well below
                that is it a power law
    tail_fraction   share of the values that lie in that tail

    What constant values or too few cannot say is None, or empty: laws need 64 values, tails 50 distinct distances
    in the largest quarter. Ties, of bfloat16 or of pruned weights, count as they are."""
    values = values.flatten()
    low, high = values.min().item(), values.max().item()
    mean = _mean(values, 0.0, 1)
    second, third, fourth = (_mean(values, mean, power) if low < high else 0.0 for power in (2, 3, 4))
    few = thin_values(values.float(), most)
    scores = held_out_log_probs(few, list(FAMILIES))
    family = simplest_family(scores) if scores else None
    index, fraction = _tail(few.double())
    return {
        "count": len(values),
        "mean": mean,
        "std": second**0.5,
        "skewness": third / second**1.5 if second else None,
        "kurtosis": fourth / second**2 if second else None,
        "min": low,
        "max": high,
        "family": family,
        "scores": {name: score.mean().item() for name, score in scores.items()},
        "law": FAMILIES[family].fit(few) if family else {},
        "tail_index": index,
        "tail_fraction": fraction,
    }


def _mean(values: Tensor, centre: float, power: int) -> float:
    """Of (values - centre) ** power, in float64."""
    return sum((v.double() - centre).pow(power).sum().item() for v in values.split(PIECE)) / len(values)


def _tail(values: Tensor) -> tuple[float | None, float | None]:
    distances = (values - values.median()).abs()
    largest = distances.topk(math.ceil(TAIL * len(values))).values
    x, counts = np.unique(largest[largest > 0].cpu().numpy(), return_counts=True)
    if len(x) < FEWEST:
        return None, None
    alphas, misfits, starts = fit_every_xmin(np.log(x)[None], counts.astype(np.float64)[None], CANDIDATES)
    tails = counts[::-1].cumsum()[::-1][starts]
    best = select_best_fit(alphas, np.where(tails >= FEWEST, misfits, np.inf))[0]
    return float(alphas[0, best]) - 1, float(tails[best]) / len(values)
