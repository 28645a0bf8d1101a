"""Differences of bits per byte between models, with 95 % intervals that carry two sources of uncertainty.

Another choice of held-out documents would give another figure, and so would another seed. Documents are the same for
all models, so they are resampled in pairs (bootstrap; Efron and Tibshirani 1993). Of seeds there are few: their mean
has a t-interval. The two variances are added, and the degrees of freedom are those of Welch and Satterthwaite (1947).

Shapes: S seeds, D documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from jaxlm.tokenizers.base import InputError

Nats = npt.NDArray[np.float64]

_RESAMPLES = 4_000


@dataclass(frozen=True)
class Estimate:
    """A figure in bits per byte, and how far chance may have moved it.

    Attributes:
      value: the mean over seeds.
      low, high: its 95 % interval; None for a single document and seed. With one seed it is that of documents alone.
      se_documents, se_seeds: standard errors by documents and by seeds; None where there is only one.
    """

    value: float
    low: float | None
    high: float | None
    se_documents: float | None
    se_seeds: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval, which has to carry both sources of uncertainty."""
        if self.low is None or self.high is None or self.se_seeds is None or self.se_documents is None:
            return False
        return not self.low <= 0.0 <= self.high


def estimate(nats_SD: Nats, bytes_D: npt.NDArray[np.int64]) -> Estimate:
    """Bits per byte of a model trained with several seeds, from the nats of each held-out document."""
    return _estimate([nats_SD], bytes_D)


def difference(a_SD: Nats, b_SD: Nats, bytes_D: npt.NDArray[np.int64]) -> Estimate:
    """Bits per byte of the first model minus that of the second, over the same documents; seeds are not paired.

    Raises:
      InputError: the models were not scored on the same documents.
    """
    return _estimate([a_SD, -b_SD], bytes_D)


def _estimate(parts: list[Nats], bytes_D: npt.NDArray[np.int64]) -> Estimate:
    if any(part.ndim != 2 or part.shape[1] != len(bytes_D) for part in parts):
        raise InputError("The models were scored on different documents; score them on the same ones.")
    bits_D = sum(part.mean(axis=0) for part in parts) / math.log(2)
    value = float(bits_D.sum() / bytes_D.sum())
    # Variances of independent causes, each with its degrees of freedom.
    variances: list[tuple[float, int]] = []
    se_documents = None
    if len(bytes_D) > 1:
        se_documents = _documents_error(bits_D, bytes_D)
        variances.append((se_documents**2, len(bytes_D) - 1))
    se_seeds = None
    if all(len(part) > 1 for part in parts):
        of_seeds = [part.sum(axis=1) / math.log(2) / bytes_D.sum() for part in parts]
        of_means = [(float(scores.var(ddof=1)) / len(scores), len(scores) - 1) for scores in of_seeds]
        se_seeds = math.sqrt(sum(variance for variance, _ in of_means))
        variances += of_means
    total = sum(variance for variance, _ in variances)
    if not variances:
        return Estimate(value, None, None, None, None)
    half = 0.0
    if total > 0.0:
        degrees = total**2 / sum(variance**2 / freedom for variance, freedom in variances)
        half = float(student.ppf(0.975, degrees)) * math.sqrt(total)
    return Estimate(value, value - half, value + half, se_documents, se_seeds)


def _documents_error(bits_D: Nats, bytes_D: npt.NDArray[np.int64]) -> float:
    """The standard error over documents of a ratio of sums, by resampling documents with replacement."""
    count = len(bits_D)
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(np.float64)
    ratios = (weights @ bits_D) / (weights @ bytes_D.astype(np.float64))
    # A resample varies as if there were (D - 1) / D documents, which tells for a few.
    return float(ratios.std() * math.sqrt(count / (count - 1)))
