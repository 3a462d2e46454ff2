"""Intervals and controls: exact values where there are any, simulated truth where there are none."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, norm
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from lib.statistics import (
    Interval,
    _geometry,
    area_under,
    auroc,
    bootstrap,
    holm,
    one_dimensionality,
    paired_difference,
    permutation_pvalue,
    random_directions,
    rate,
    wilson,
)

LABELS = np.arange(64) < 32


def planted(delta: float) -> torch.Tensor:
    """Isotropic unit noise [64, 48] in which the first 32 rows are moved by delta along one direction."""
    rng = np.random.default_rng(0)
    axis = rng.normal(size=48)
    x = rng.normal(size=(len(LABELS), 48)) + delta * LABELS[:, None] * axis / np.linalg.norm(axis)
    return torch.tensor(x, dtype=torch.float32)


def numbers(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.lo, interval.hi


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "interval, text",
    [
        (Interval(0.12, 0.07, 0.20, 100), "0.12 [0.07, 0.20], n = 100"),
        (Interval(0.9801, 0.9552, 0.9955, 256), "0.980 [0.955, 0.996], n = 256"),
        (Interval(41.7, 30.2, 55.1, 30), "42 [30, 55], n = 30"),
        (Interval(1.0, 1.0, 1.0, 20), "1.0 [1.0, 1.0], n = 20"),
        (Interval(0.0, 0.0, 0.0, 20), "0.0 [0.0, 0.0], n = 20"),
    ],
)
def test_an_interval_prints_two_digits_of_its_width(interval, text):
    assert str(interval) == text


@pytest.mark.parametrize("k, n", [(0, 10), (10, 100), (15, 15), (81, 263)])
def test_wilson_is_the_formula(k, n):
    z, p = norm.ppf(0.975), k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert numbers(wilson(k, n)) == pytest.approx((p, centre - reach, centre + reach), abs=1e-12)


def test_wilson_of_a_published_case():
    # Newcombe (1998), Statistics in Medicine 17:857, table I: 81 of 263, method 3.
    assert numbers(wilson(81, 263))[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_rate_counts_booleans_and_refuses_scores():
    assert rate([True, False, True, True]) == wilson(3, 4) == rate(torch.tensor([1, 0, 1, 1]))
    with pytest.raises(ValueError, match="use bootstrap"):
        rate([0.5, 1.0])
    with pytest.raises(ValueError, match="at least one trial"):
        rate([])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-100, 100), min_size=2, max_size=30), st.integers(0, 9))
def test_a_bootstrap_interval_holds_its_value_and_is_seeded(values, seed):
    interval = bootstrap(values, seed=seed, resamples=400)
    assert min(values) <= interval.lo <= interval.value + 1e-9
    assert interval.value - 1e-9 <= interval.hi <= max(values)
    assert interval == bootstrap(values, seed=seed, resamples=400)


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -3e8])
def test_constant_data_have_an_interval_without_width(constant):
    interval = bootstrap([constant] * 7)
    assert interval.value == interval.lo == interval.hi == pytest.approx(constant)


@pytest.mark.parametrize("statistic", [np.max, np.median])
def test_where_bca_is_undefined_the_percentile_interval_stands_in(statistic):
    values = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0]
    interval = bootstrap(values, statistic)
    assert np.isfinite(numbers(interval)).all()
    assert interval.lo <= statistic(values) <= interval.hi


def test_a_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [bootstrap(rng.exponential(size=40), resamples=500) for _ in range(400)]
    coverage = np.mean([interval.lo <= 1 <= interval.hi for interval in found])
    # 95 % nominal, some 93 % for a mean of 40 skewed values; the standard error of 400 trials is 1.2 %.
    assert 0.89 <= coverage <= 0.98


def test_bad_values_are_refused():
    for values, reason in [([1.0], "at least two"), ([1.0, np.nan], "1 not finite"), ([[1.0, 2.0]], "shape")]:
        with pytest.raises(ValueError, match=reason):
            bootstrap(values)


# --- comparisons ------------------------------------------------------------------------------------------------------


def test_pairing_removes_what_the_prompts_share():
    rng = np.random.default_rng(1)
    prompts = rng.normal(scale=10, size=60)
    a, b = prompts + 1 + rng.normal(scale=0.5, size=60), prompts
    difference = paired_difference(a, b)
    assert difference == bootstrap(a - b)
    assert 0.7 < difference.lo < 1 < difference.hi < 1.3
    assert permutation_pvalue(a, b, paired=True, resamples=999) == pytest.approx(0.002)  # the least that 999 can show
    assert permutation_pvalue(a, b, paired=False, resamples=999) > 0.3


def test_permutation_pvalues_of_small_samples_are_exact():
    assert permutation_pvalue([1, 2, 3], [7, 8, 9], paired=False) == pytest.approx(2 / 20)
    assert permutation_pvalue([1, 2, 3, 4, 5], [0, 0, 0, 0, 0], paired=True) == pytest.approx(2 / 32)


@pytest.mark.parametrize("test", [paired_difference, lambda a, b: permutation_pvalue(a, b, paired=True)])
def test_pairs_of_unequal_length_are_an_error(test):
    with pytest.raises(ValueError, match="3 and 2"):
        test([1, 2, 3], [1, 2])


def test_holm_of_a_worked_case():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_the_raw_and_bonferroni(pvalues):
    p, adjusted = np.array(pvalues), holm(pvalues)
    assert (p <= adjusted).all() and (adjusted <= np.minimum(1, len(p) * p)).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()
    assert (adjusted >= false_discovery_control(p) - 1e-12).all()  # Benjamini-Hochberg promises less


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=15), st.lists(st.integers(0, 5), min_size=2, max_size=15))
def test_auroc_is_sklearns_with_an_interval_around_it(positive, negative):
    interval = auroc(positive, negative, resamples=300)
    truth = [1] * len(positive) + [0] * len(negative)
    assert interval.value == pytest.approx(roc_auc_score(truth, positive + negative))
    assert 0 <= interval.lo <= interval.value + 1e-9 and interval.value - 1e-9 <= interval.hi <= 1
    assert interval.n == len(truth)


# --- directions -------------------------------------------------------------------------------------------------------


def test_random_directions_have_the_norm_and_no_preference_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    directions = random_directions(2000, 16, norm=3.5, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert directions.dtype == torch.float32 and directions.shape == (2000, 16)
    torch.testing.assert_close(directions.norm(dim=1), torch.full((2000,), 3.5))
    second_moment = directions.T @ directions / 2000
    assert (second_moment - torch.eye(16) * 3.5**2 / 16).abs().max() < 0.12  # five standard errors
    assert torch.equal(directions, random_directions(2000, 16, norm=3.5, seed=0))
    assert not torch.equal(directions, random_directions(2000, 16, norm=3.5, seed=1))


def test_a_planted_direction_is_found():
    x = planted(delta=12)
    found = one_dimensionality(x, LABELS)
    assert found["cosine"].value > 0.99
    assert found["auroc"].lo > 0.99
    assert found["difference_share"].value > found["difference_share"].null_q95
    for name in ("cosine", "difference_share", "auroc"):
        assert found[name].pvalue == pytest.approx(1 / 201), name


def test_shuffled_labels_find_nothing():
    x = planted(delta=12)
    labels = np.random.default_rng(4).permutation(LABELS)
    found = one_dimensionality(x, labels)
    assert found["cosine"].value < 0.9
    assert found["auroc"].lo < 0.5 < found["auroc"].hi
    for name in ("cosine", "difference_share", "auroc"):
        assert found[name].pvalue > 0.05, name
        assert found[name].null_mean < found[name].null_q95, name


def test_a_cosine_is_only_as_good_as_its_null():
    x = planted(delta=0)
    x[:, 0] *= 40  # nearly all the variance along one axis that has nothing to do with the classes
    cosine = one_dimensionality(x, LABELS)["cosine"]
    assert cosine.null_q95 > 0.95


def test_the_gram_matrix_gives_what_pca_gives():
    x = planted(delta=3)
    found = one_dimensionality(x, LABELS, resamples=3, shuffles=3)
    centred = x.double().numpy() - x.double().numpy().mean(axis=0)
    pca = PCA(n_components=1, svd_solver="full").fit(centred)
    difference = centred[LABELS].mean(axis=0) - centred[~LABELS].mean(axis=0)
    difference /= np.linalg.norm(difference)
    assert found["pc1_share"].value == pytest.approx(pca.explained_variance_ratio_[0])
    assert found["cosine"].value == pytest.approx(abs(pca.components_[0] @ difference))
    assert found["difference_share"].value == pytest.approx(((centred @ difference) ** 2).sum() / (centred**2).sum())


def test_a_resample_weighs_prompts_as_if_they_were_repeated():
    x = planted(delta=3).double().numpy()
    drawn = np.random.default_rng(0).integers(len(x), size=len(x))
    rows, weights = np.unique(drawn, return_counts=True)
    once = _geometry(x[rows] @ x[rows].T, LABELS[rows, None], weights)
    repeated = _geometry(x[drawn] @ x[drawn].T, LABELS[drawn, None], np.ones(len(x)))
    np.testing.assert_allclose(once, repeated)


def test_intervals_hold_their_value_and_cover_the_population():
    scale, shift = (
        np.array([3, 1, 1, 1, 1]),
        np.array([2, 0, 0, 0, 0]),
    )  # spread and classes differ along the first axis
    variances = scale**2 + shift**2 / 4
    truth, covered = variances[0] / variances.sum(), 0
    for seed in range(60):
        x = np.random.default_rng(seed).normal(size=(len(LABELS), 5)) * scale + LABELS[:, None] * shift
        found = one_dimensionality(torch.tensor(x), LABELS, seed, resamples=60, shuffles=1)
        for name, interval in found.items():
            assert 0 <= interval.lo <= interval.value <= interval.hi <= 1, name
        covered += found["pc1_share"].lo <= truth <= found["pc1_share"].hi
    assert covered >= 50  # of 60: 57 expected with a standard deviation of 1.7


def test_dtype_and_width_do_not_matter():
    x = planted(delta=4)
    wide = torch.cat([x, torch.zeros(len(x), 4000)], dim=1)
    small = {"resamples": 5, "shuffles": 5}
    plain = one_dimensionality(x, LABELS, **small)["cosine"]
    padded = one_dimensionality(wide, LABELS, **small)["cosine"]
    half = one_dimensionality(x.bfloat16(), LABELS, **small)["cosine"]
    assert numbers(padded) == pytest.approx(numbers(plain))
    assert half.value == pytest.approx(plain.value, abs=0.01)


def test_too_few_prompts_and_odd_shapes_are_refused():
    x = planted(delta=1)
    for bad_x, labels in [(x, LABELS[:10]), (x, np.arange(64) < 4), (x[0], LABELS)]:
        with pytest.raises(ValueError, match="5 or more prompts a class"):
            one_dimensionality(bad_x, labels)
    with pytest.raises(ValueError, match="must vary"):
        one_dimensionality(torch.ones(64, 8), LABELS)


def test_it_is_quick_enough_for_every_layer():
    x = torch.randn(256, 576, generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    one_dimensionality(x, np.arange(256) < 128)
    assert time.process_time() - start < 10  # about one second; the bound allows for slow and busy machines


def test_the_area_under_a_curve_is_the_mean_effect_up_to_the_limit():
    damage = np.array([[0.0] * 4, [0.1] * 4, [0.3] * 4])
    effect = np.array([[1.0] * 5, [0.5] * 5, [0.5] * 5])
    found = area_under(effect, damage, limit=0.2)
    assert found.value == pytest.approx(0.75 / 2 + 0.5 / 2, abs=0.01) and found.lo == found.hi == found.value and found.n == 5
    assert area_under(effect, damage * 0, limit=0.2).value == pytest.approx(0.5, abs=0.01)  # effect for nothing
    assert area_under(effect * 0 + 1, damage, limit=0.2).value == 1.0
    rng = np.random.default_rng(0)
    noisy = area_under(np.clip(effect + rng.normal(0, 0.3, effect.shape), 0, 1), damage, limit=0.2)
    assert noisy.lo < noisy.value < noisy.hi
    with pytest.raises(ValueError, match="damage"):
        area_under(effect[:2], damage, limit=0.2)
