"""How sure: intervals over prompts, tests, norm-matched random directions, and how one-dimensional a contrast is.

Knows numbers; knows nothing of models or prompts. One value a prompt: samples of one prompt are not independent, so
average them first. Every random draw has a seeded generator of its own.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from math import floor, log10

import numpy as np
import torch
from scipy import stats
from scipy.linalg import eigh
from scipy.special import expit, logit
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits
from torch import Tensor

CONFIDENCE = 0.95
FOLDS = 5


@dataclass(frozen=True)
class Interval:
    """An estimate, its confidence limits in the estimate's own unit, and the number n of prompts behind it."""

    value: float
    lo: float
    hi: float
    n: int

    def __str__(self) -> str:
        """Rounded to two significant digits of the width: "0.12 [0.07, 0.20], n = 100"."""
        digits = max(0, 1 - floor(log10((self.hi - self.lo) or abs(self.value) or 1)))
        return f"{self.value:.{digits}f} [{self.lo:.{digits}f}, {self.hi:.{digits}f}], n = {self.n}"

    def columns(self, name: str) -> dict[str, float]:
        """The estimate and its limits as columns of a table: name, name_lo, name_hi."""
        return {name: self.value, f"{name}_lo": self.lo, f"{name}_hi": self.hi}


@dataclass(frozen=True)
class Controlled(Interval):
    """An interval and its null under shuffled labels: mean, 95th percentile, one-sided p-value of the estimate."""

    null_mean: float
    null_q95: float
    pvalue: float


def wilson(k: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Rate k / n with its score interval (Wilson 1927), which keeps a width at 0 and at n hits."""
    if n < 1:
        raise ValueError("a rate needs at least one trial, got n = 0")
    limits = stats.binomtest(int(k), int(n)).proportion_ci(confidence, method="wilson")
    return Interval(k / n, float(limits.low), float(limits.high), int(n))


def rate(hits: Sequence[bool], confidence: float = CONFIDENCE) -> Interval:
    """Share of true values in `hits`, one boolean (or 0 / 1) a prompt, with its Wilson interval."""
    hits = np.asarray(hits)
    if not np.isin(hits, (0, 1)).all():
        raise ValueError("hits must be booleans; use bootstrap for scores")
    return wilson(int(hits.sum()), hits.size, confidence)


def bootstrap(
    values: Sequence[float],
    statistic: Callable = np.mean,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    resamples: int = 5000,
) -> Interval:
    """`statistic` of one value a prompt, [n >= 2], with its BCa interval (Efron 1987).

    BCa is undefined when every resample falls on one side of the estimate (a maximum) or the jackknife never varies (a
    median of ties): the percentile interval of the same resamples then stands in. Constant data give lo = hi = value.
    """
    values = _finite(values)
    if len(values) < 2:
        raise ValueError(f"an interval over prompts needs at least two, got {len(values)}")
    if np.ptp(values) == 0:  # means of resamples would differ from the value by rounding
        constant = float(statistic(values))
        return Interval(constant, constant, constant, len(values))
    return _bca((values,), statistic, confidence, seed, resamples)


def paired_difference(
    a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0, resamples: int = 5000
) -> Interval:
    """Mean of a - b over the same prompts in the same order, with its bootstrap interval."""
    a, b = _pairs(a, b)
    return bootstrap(a - b, np.mean, confidence, seed, resamples)


def paired_ratio(
    a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0, resamples: int = 5000
) -> Interval:
    """mean(a) / mean(b) over the same prompts in the same order, with its BCa interval; prompts are resampled in pairs."""
    a, b = _pairs(a, b)
    if len(a) < 2:
        raise ValueError(f"an interval over prompts needs at least two, got {len(a)}")
    return _bca((a, b), lambda a, b, axis=-1: a.mean(axis=axis) / b.mean(axis=axis), confidence, seed, resamples, paired=True)


def permutation_pvalue(a: Sequence[float], b: Sequence[float], *, paired: bool, seed: int = 0, resamples: int = 9999) -> float:
    """Two-sided p-value of the difference of means; exact where at most `resamples` permutations exist.

    paired: a[i] and b[i] are one prompt and swap places; otherwise prompts move between the groups.
    """
    a, b = _pairs(a, b) if paired else (_finite(a), _finite(b))
    result = stats.permutation_test(
        (a, b),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=resamples,
        batch=1000,  # bounds the memory
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """Step-down adjusted p-values (Holm 1979), in the order given: reject those <= the family-wise error rate."""
    p = _finite(pvalues)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def area_under(
    effect: Sequence[Sequence[float]],
    damage: Sequence[Sequence[float]],
    limit: float,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """Mean effect over damages from 0 to `limit`, as a dose takes both along: one number for a whole dose-response curve.

    effect: [doses, n], damage: [doses, m], one value a prompt, the first dose none at all. Between doses both are taken as linear;
    damage that falls from a dose to the next counts as staying, and beyond the last dose the effect stays. Percentile limits, prompts of
    each kind resampled.
    """
    tables = [np.asarray(table, dtype=float) for table in (effect, damage)]
    if any(table.ndim != 2 or not np.isfinite(table).all() for table in tables) or len(tables[0]) != len(tables[1]):
        raise ValueError(f"need finite effect [doses, n] and damage [doses, m], got {[table.shape for table in tables]}")

    def area(effects: np.ndarray, damages: np.ndarray) -> float:
        grid = np.linspace(0, limit, 201)
        return float(np.interp(grid, np.maximum.accumulate(damages), effects).mean())

    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        draws.append(area(*(table[:, rng.integers(table.shape[1], size=table.shape[1])].mean(1) for table in tables)))
    lo, hi = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = area(*(table.mean(1) for table in tables))
    return Interval(value, float(min(lo, value)), float(max(hi, value)), tables[0].shape[1])


def auroc(
    positive_scores: Sequence[float],
    negative_scores: Sequence[float],
    confidence: float = CONFIDENCE,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """P(a positive scores above a negative), ties counted half, with its BCa interval; resampled within class.

    Perfect separation gives [1, 1], since no resample can undo it: read n beside it.
    """
    scores = _finite(positive_scores), _finite(negative_scores)
    if min(map(len, scores)) < 2:
        raise ValueError(f"auroc needs at least two scores of each class, got {len(scores[0])} and {len(scores[1])}")
    return _bca(scores, _rank_auroc, confidence, seed, resamples)


def random_directions(n: int, d: int, norm: float, seed: int) -> Tensor:
    """Isotropic random vectors [n, d], float32, each of length `norm`: the control for every steering effect."""
    draws = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (draws * norm / draws.norm(dim=1, keepdim=True)).float()


def one_dimensionality(
    x: Tensor, labels: Sequence[bool], seed: int = 0, resamples: int = 200, shuffles: int = 200
) -> dict[str, Interval | Controlled]:
    """Is what separates two classes of prompts one direction? x: activations [n, d]; labels: [n], e.g. true = harmful.

    pc1_share         share of the total variance along the first principal component; knows no labels, so has no null
    cosine            |cos(first principal component, difference of class means)|
    difference_share  share of the total variance along the difference of class means
    auroc             of each prompt's projection on the difference of means of the other folds (5 stratified folds)

    Limits: 95 %, prompts resampled within class; the first three +-1.96 bootstrap standard errors around the logit of
    the estimate, since duplicates in a resample raise the shares and lower the cosine, so that percentiles can miss the
    estimate. They measure spread at this n: for d >> n noise inflates both shares, hence the held-out auroc. The nulls
    refit on shuffled labels, and matter: even a random split's mean difference leans towards high variance.
    Everything comes from the [n, n] Gram matrix, so d costs one product. Raises ValueError below 5 prompts a class.
    """
    x, labels = torch.as_tensor(x).detach().to("cpu", torch.float64).numpy(), np.asarray(labels, dtype=bool)
    classes = np.flatnonzero(labels), np.flatnonzero(~labels)
    if x.ndim != 2 or x.shape[:1] != labels.shape or min(map(len, classes)) < FOLDS:
        sizes = " + ".join(str(len(rows)) for rows in classes)
        raise ValueError(f"need x [n, d], labels [n] and {FOLDS} or more prompts a class, got x {x.shape}, labels {sizes}")
    n, rng = len(labels), np.random.default_rng(seed)
    x = x - x.mean(axis=0)
    gram = x @ x.T
    if not np.trace(gram) > 0:
        raise ValueError("x must be finite and must vary")

    folds = np.empty(n, dtype=int)
    for fold, (_, test) in enumerate(StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, labels)):
        folds[test] = fold
    orders = np.stack([np.arange(n), *(rng.permutation(n) for _ in range(shuffles))], axis=1)
    y = labels[orders]  # [n, 1 + shuffles]; column 0 has the true labels
    scores = _held_out_projections(gram, y, folds[orders])
    separations = _rank_auroc(*(scores.T[side.T].reshape(shuffles + 1, -1) for side in (y, ~y)))

    with threadpool_limits(1):  # many small eigenproblems: threads would only wait for each other
        shares = _geometry(gram, y, np.ones(n))
        draws = np.empty((resamples, 3))
        for r in range(resamples):
            weights = np.bincount(np.concatenate([rng.choice(rows, len(rows)) for rows in classes]), minlength=n)
            rows = np.flatnonzero(weights)
            draws[r] = _geometry(gram[np.ix_(rows, rows)], labels[rows, None], weights[rows])[:, 0]

    intervals = [_logit_interval(estimate, column, n) for estimate, column in zip(shares[:, 0], draws.T, strict=True)]
    separation = auroc(scores[classes[0], 0], scores[classes[1], 0], seed=seed)
    return {
        "pc1_share": intervals[0],
        "cosine": _control(intervals[1], shares[1, 1:]),
        "difference_share": _control(intervals[2], shares[2, 1:]),
        "auroc": _control(separation, separations[1:]),
    }


def _geometry(gram: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """pc1_share, cosine and difference_share, [3, s], for labels [n, s]; prompt i counts weights[i] > 0 times."""
    mean = gram @ weights / weights.sum()
    gram = gram - mean[:, None] - mean + weights @ mean / weights.sum()
    root, total = np.sqrt(weights), weights @ gram.diagonal()
    (top,), axis = eigh(root[:, None] * gram * root, subset_by_index=[len(gram) - 1] * 2)
    along = _projections(gram, labels * weights[:, None], ~labels * weights[:, None])
    cosine = np.abs((root * axis[:, 0]) @ along) / np.sqrt(top)
    return np.stack([np.full_like(cosine, top / total), np.minimum(cosine, 1), weights @ along**2 / total])


def _projections(gram: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Prompts [n] on the unit difference of the means that weights positive and negative [n, s] make: [n, s]."""
    contrast = positive / positive.sum(axis=0) - negative / negative.sum(axis=0)
    raw = gram @ contrast
    tiny = 1e-12 * gram.diagonal().mean()  # equal means have no direction: projections of zero, not 0 / 0
    return raw / np.sqrt(np.maximum((contrast * raw).sum(axis=0), tiny))


def _held_out_projections(gram: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Each prompt on the unit mean difference of the other folds, from the midpoint of their means; all [n, s]."""
    scores = np.empty(labels.shape)
    for fold in range(FOLDS):
        train, test = folds != fold, folds == fold
        along = _projections(gram, train & labels, train & ~labels)
        midpoint = (along.mean(axis=0, where=train & labels) + along.mean(axis=0, where=train & ~labels)) / 2
        scores[test] = (along - midpoint)[test]
    return scores


def _rank_auroc(positive: np.ndarray, negative: np.ndarray, axis: int = -1) -> np.ndarray:
    """AUROC along the last axis from midranks (Mann-Whitney U / pairs)."""
    pairs, k = positive.shape[-1] * negative.shape[-1], positive.shape[-1]
    ranks = stats.rankdata(np.concatenate([positive, negative], axis=axis), axis=axis)
    return (ranks[..., :k].sum(axis=axis) - k * (k + 1) / 2) / pairs


def _logit_interval(value: float, draws: np.ndarray, n: int) -> Interval:
    """value in (0, 1) with a normal interval on the logit scale, its standard error that of the bootstrap draws."""
    centre, *spread = logit(np.clip([value, *draws], 1e-12, 1 - 1e-12))
    reach = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.std(spread)
    lo, hi = expit([centre - reach, centre + reach])
    return Interval(float(value), float(min(lo, value)), float(max(hi, value)), n)  # the clip must not pass the value


def _control(estimate: Interval, null: np.ndarray) -> Controlled:
    """The estimate beside draws of its null; p counts the estimate itself as one of them (Phipson and Smyth 2010)."""
    pvalue = (1 + np.sum(null >= estimate.value)) / (1 + len(null))
    return Controlled(*astuple(estimate), float(null.mean()), float(np.quantile(null, 0.95)), float(pvalue))


def _bca(samples: tuple, statistic: Callable, confidence: float, seed: int, resamples: int, paired: bool = False) -> Interval:
    """BCa interval of statistic(*samples), or the percentile interval where BCa is undefined."""
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # how scipy says "undefined"; the limits are checked below
        result = stats.bootstrap(samples, statistic, n_resamples=resamples, confidence_level=confidence, paired=paired, rng=rng)
    limits = np.array(result.confidence_interval)
    if not np.isfinite(limits).all():
        limits = np.quantile(result.bootstrap_distribution, [(1 - confidence) / 2, (1 + confidence) / 2])
    n = len(samples[0]) if paired else sum(map(len, samples))
    return Interval(float(statistic(*samples)), float(limits[0]), float(limits[1]), n)


def _finite(values: Sequence[float]) -> np.ndarray:
    """values as a float64 vector. Raises ValueError for another shape, NaN or infinity."""
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not np.isfinite(values).all():
        bad = np.sum(~np.isfinite(values))
        raise ValueError(f"need one finite number a prompt, got shape {values.shape} with {bad} not finite")
    return values


def _pairs(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Two float64 vectors over the same prompts. Raises ValueError where the lengths differ."""
    a, b = _finite(a), _finite(b)
    if len(a) != len(b):
        raise ValueError(f"paired values must be of the same prompts, got {len(a)} and {len(b)}")
    return a, b
