"""How sure a difference of two losses is: a paired bootstrap over documents."""

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_AT_ONCE = 2**22  # values of a resampling in memory


def difference_interval(
    before: NDArray[np.float64], after: NDArray[np.float64], tokens: NDArray[np.float64], level: float = 0.95
) -> tuple[float, float]:
    """The interval of (sum of `after` - sum of `before`) / sum of `tokens`, all (documents,) of the same documents.

    Percentiles of `RESAMPLES` resamplings of whole documents with replacement (Efron and Tibshirani 1993, chapter 13): tokens of one
    document are no independent draws. The draws are the same in every call.
    """
    draw, documents = np.random.default_rng(0), len(tokens)
    changes, found = after - before, list[NDArray[np.float64]]()
    step = max(1, _AT_ONCE // documents)
    for first in range(0, RESAMPLES, step):
        chosen = draw.integers(0, documents, size=(min(step, RESAMPLES - first), documents))
        found.append(changes[chosen].sum(axis=1) / tokens[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
