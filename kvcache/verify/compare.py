"""Differences between arrays of logits, or of hidden states."""

from __future__ import annotations

import numpy as np

from kvcache.backends import HostArray


def difference(one: HostArray, other: HostArray, partial: bool = False) -> float:
    """Return the largest difference of two arrays of the same shape; see :func:`differences`."""
    return float(np.max(differences(one, other, partial), initial=0.0))


def differences(one: HostArray, other: HostArray, partial: bool = False) -> HostArray:
    """Return the largest difference in each row of two arrays, float64 [rows].

    inf where one is finite and the other is not. partial: NaN stands for a number that is not
    known. Such numbers are left out, but for the largest of each row: if that is not known of the
    other row, they differ.
    """
    with np.errstate(invalid="ignore"):
        gaps = np.abs(one.astype(np.float64) - other.astype(np.float64))
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    unknown = np.isnan(gaps)
    if partial:
        unknown &= _is_largest(one) | _is_largest(other)
    gaps = np.where(same | (np.isnan(gaps) & ~unknown), 0.0, np.where(unknown, np.inf, gaps))
    largest: HostArray = gaps.max(axis=-1) if gaps.size else np.zeros(len(one))
    return largest


def tails(one: HostArray, other: HostArray) -> tuple[HostArray, HostArray]:
    """Return the last rows of both, as many as the shorter one has."""
    rows = min(len(one), len(other))
    return one[len(one) - rows :], other[len(other) - rows :]


def _is_largest(rows: HostArray) -> HostArray:
    """Return where each row has its largest number; False for a row of NaN."""
    filled = np.where(np.isnan(rows), -np.inf, rows)
    largest: HostArray = (filled == filled.max(axis=-1, keepdims=True)) & np.isfinite(filled)
    return largest
