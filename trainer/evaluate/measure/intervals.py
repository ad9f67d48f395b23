"""How certain a difference of two losses is: the interval of a paired comparison over documents."""

import numpy as np
from numpy.typing import NDArray

from trainer.run.evaluations import FEWEST

_SUBSETS = 1999
_ALL_SUBSETS_OF = 11
"""Up to this many clusters every subset is taken; above, about as many are drawn at random."""
_AT_ONCE = 2**22  # values of the subsets in memory

Figures = NDArray[np.float64]


def difference_interval(
    before: Figures, after: Figures, tokens: Figures, clusters: NDArray[np.int64], level: float = 0.95
) -> tuple[float, float] | None:
    """Return the interval of (sum of `after` - sum of `before`) / sum of `tokens`, all (documents,).

    None means that there are too few documents for the promise of `level`, or that a loss is no finite number.
    Documents of one of the `clusters`, such as the pieces of a long text, are not independent draws and count as one.

    The ends of the interval are quantiles of the same ratio over random subsets of the clusters (Hartigan 1969, "Using
    subsample values as typical values"). This inverts the test that flips the signs of the clusters' residuals. It is
    exact for any number and any lengths of documents, as long as a change that helps is as likely as one that hurts as
    much. A bootstrap's percentiles are far too narrow for few documents. The subsets are the same in every call.
    """
    _, members = np.unique(clusters, return_inverse=True)
    changes, sizes = (np.bincount(members, figures).astype(np.float64) for figures in (after - before, tokens))
    counted = sizes > 0
    ratios = _subset_ratios(changes[counted], sizes[counted])
    outside = int((1 - level) / 2 * (len(ratios) + 1) + 1e-9)
    if np.count_nonzero(counted) < FEWEST or not outside or not np.isfinite(changes).all():
        return None
    return float(ratios[outside - 1]), float(ratios[-outside])


def clusters_of(
    lengths: NDArray[np.int64], longest: int | None, hashes: NDArray[np.uint64] | None = None
) -> NDArray[np.int64]:
    """Return the cluster of each document of a set.

    If rows are split into pieces of `longest` tokens, a document that follows such a piece may be the rest of the same
    row. Rows whose documents have the same `hashes` change alike: a copy is no second draw.
    """
    rows = np.arange(len(lengths))
    if longest is not None and len(lengths):
        rows = np.cumsum(np.concatenate([[0], lengths[:-1] != longest]))
    if hashes is None:
        return rows
    totals = np.zeros(len(rows), np.uint64)
    np.add.at(totals, rows, hashes)
    return np.unique(totals, return_inverse=True)[1][rows]


def _subset_ratios(changes: Figures, sizes: Figures) -> Figures:
    """Return the ratio of the sums over each of some subsets, sorted. The empty subset has none."""
    clusters, draw = len(sizes), np.random.default_rng(0)
    if clusters <= _ALL_SUBSETS_OF:
        every = (np.arange(1, 2**clusters)[:, None] >> np.arange(clusters)) & 1
        return np.sort((every @ changes) / (every @ sizes))
    found, step = list[Figures](), max(1, _AT_ONCE // clusters)
    for first in range(0, _SUBSETS, step):
        chosen = draw.integers(0, 2, size=(min(step, _SUBSETS - first), clusters), dtype=np.int8).astype(np.float64)
        found.append((chosen @ changes) / (chosen @ sizes).clip(min=sizes.min()))
    return np.sort(np.concatenate(found))
