"""Seven families of curves: what they are, that they differ, and how that is measured."""

import numpy as np
import pytest

from kvcache.errors import BoundsError, ShapeError
from kvcache.reference.dit.toy_shapes import (
    FAMILIES,
    clean_curves,
    distance,
    prompt_tokens,
    shapes,
)

TOKENS = 32
NAMES = list(FAMILIES)
IDS = np.arange(1, 8)


def curve(name, tokens=TOKENS):
    """One clean curve as complex numbers."""
    x, y = clean_curves(tokens)[NAMES.index(name)].T
    return x + 1j * y


def moved(points, factor, shift=0j):
    """Samples turned and scaled by a complex `factor`, then shifted."""
    z = (points[..., 0] + 1j * points[..., 1]) * factor + shift
    return np.stack([z.real, z.imag], -1)


# The curves.


def test_clean_curves_are_centred_and_of_one_size():
    clean = clean_curves(TOKENS)
    assert clean.shape == (7, TOKENS, 2)
    assert clean.dtype == np.float64
    np.testing.assert_allclose(clean.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose((clean**2).sum(-1).mean(1), 1)


def test_circle_is_round_and_starts_on_the_right():
    np.testing.assert_allclose(np.abs(curve("circle")), 1)
    np.testing.assert_allclose(curve("circle")[[0, 8, 16]], [1, 1j, -1], atol=1e-12)


@pytest.mark.parametrize(("name", "corners"), [("square", 4), ("star", 10)])
def test_polygons_turn_at_their_corners_only(name, corners):
    z = curve(name, 10 * corners)
    steps = np.roll(z, -1) - z
    turns = np.angle(steps / np.roll(steps, 1))
    assert np.flatnonzero(np.abs(turns) > 1e-6).tolist() == list(range(0, 10 * corners, 10))
    assert turns.sum() == pytest.approx(2 * np.pi)
    np.testing.assert_allclose(np.abs(steps), np.abs(steps[0]))


def test_star_has_long_and_short_arms():
    radii = np.abs(curve("star", 100)[::10])
    np.testing.assert_allclose(radii / radii[0], [1, 0.4] * 5)


def test_cross_returns_to_its_centre_between_arms():
    z = curve("cross", 32)
    np.testing.assert_allclose(z[[4, 12, 20, 28]], 0, atol=1e-12)
    ends = z[[0, 8, 16, 24]]
    np.testing.assert_allclose(ends / ends[0], [1, 1j, -1, -1j], atol=1e-12)


def test_spiral_moves_outwards():
    z = curve("spiral")
    from_start = z[1:] - z[0]
    assert (np.diff(np.abs(from_start)) > 0).all()
    turned = np.unwrap(np.angle(from_start))
    assert (turned[-1] - turned[0]) / (2 * np.pi) == pytest.approx(2.5 * 30 / 32)


def test_moons_are_two_arches_that_interlock():
    z = curve("moons")
    steps = np.abs(np.diff(z))
    assert np.flatnonzero(steps > 2 * np.median(steps)).tolist() == [15]
    upper, lower = z[:16], z[16:]
    assert upper.imag.max() > lower.imag.max() > upper.imag.min() > lower.imag.min()
    assert upper.real.min() < lower.real.min() < upper.real.max() < lower.real.max()


def test_wave_has_two_periods():
    z = curve("wave")
    np.testing.assert_allclose(np.diff(z.real), z.real[1] - z.real[0])
    assert np.count_nonzero(np.diff(np.signbit(np.diff(z.imag)))) == 4


# Samples.


def test_samples_are_float32_and_repeatable():
    first, second, other = (shapes(np.random.default_rng(seed), IDS, TOKENS) for seed in (3, 3, 4))
    assert first.shape == (7, TOKENS, 2)
    assert first.dtype == np.float32
    assert first.tobytes() == second.tobytes()
    assert np.abs(first - other).max() > 0.1


def test_samples_of_one_prompt_differ_in_place_size_and_direction():
    many = shapes(np.random.default_rng(0), np.full(400, 1), TOKENS).astype(float)
    centre = many.mean(1)
    offset = many[:, 0] - centre
    for spread, expected in [
        (centre.std(0), 0.15),
        (np.log(np.hypot(*offset.T)).std(), 0.15),
        (np.arctan2(offset[:, 1], offset[:, 0]).std(), 0.25),
    ]:
        np.testing.assert_allclose(spread, expected, rtol=0.15)


def test_samples_are_near_their_own_family_and_no_other():
    ids = np.tile(IDS, 20)
    points = shapes(np.random.default_rng(1), ids, TOKENS)
    table = np.stack([distance(points, np.full(len(ids), i)) for i in IDS])
    np.testing.assert_array_equal(IDS[table.argmin(0)], ids)
    own = distance(points, ids)
    assert own.max() < 0.05
    assert own.min() > 0.01, "there is no noise"


# The distance.


def test_distance_ignores_place_size_and_direction():
    clean = clean_curves(TOKENS)
    np.testing.assert_allclose(distance(moved(clean, 3 * np.exp(2j), 5 - 1j), IDS), 0, atol=1e-7)
    mirrored = clean[2:3] * [1, -1]
    assert distance(mirrored, [3]) > 0.5


def test_distance_is_the_share_that_is_not_the_curve():
    clean = clean_curves(TOKENS)[:1]
    # Two turns in the time of one share nothing with a circle.
    u = np.arange(TOKENS) / TOKENS
    other = np.stack([np.cos(4 * np.pi * u), np.sin(4 * np.pi * u)], -1)[None]
    for share in (0.0, 0.3, 1.0):
        mixed = np.sqrt(1 - share**2) * clean + share * other
        np.testing.assert_allclose(distance(7 * mixed, [1]), share, atol=1e-7)


def test_distance_against_a_search_for_the_best_fit():
    points = shapes(np.random.default_rng(2), [5], TOKENS)
    centred = points[0] - points[0].mean(0)
    factors = np.linspace(0.5, 1.8, 131)[:, None] * np.exp(1j * np.linspace(-0.8, 0.8, 161))
    fits = moved(clean_curves(TOKENS)[4], factors.reshape(-1, 1))
    best = np.sqrt(((fits - centred) ** 2).sum((1, 2)).min() / (centred**2).sum())
    assert distance(points, [5])[0] == pytest.approx(best, rel=0.02)


def test_noise_is_far_from_everything():
    noise = np.random.default_rng(0).normal(size=(70, TOKENS, 2))
    assert distance(noise, np.tile(IDS, 10)).min() > 0.8
    assert distance(np.full((1, TOKENS, 2), 3.0), [1]) == 1, "points without extent"


# Prompts.


def test_prompt_tokens():
    tokens = prompt_tokens([3, 0], 4)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[3] * 4, [0] * 4]


@pytest.mark.parametrize(
    ("prompts", "tokens", "error", "says"),
    [
        ([0, 1], TOKENS, BoundsError, r"in \[1, 7\]; got 0 to 1. 0, the empty prompt"),
        ([8], TOKENS, BoundsError, "got 8 to 8"),
        ([[1]], TOKENS, ShapeError, r"integers, \[B\]; got int64 \(1, 1\)"),
        ([1.0], TOKENS, ShapeError, "got float64"),
        ([1], 7, ShapeError, "at least 8 points.*got 7"),
    ],
)
def test_bad_prompts(prompts, tokens, error, says):
    with pytest.raises(error, match=says):
        shapes(np.random.default_rng(0), prompts, tokens)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((32, 2), r"\[B, tokens, 2\]; got \(32, 2\)"),
        ((1, 32, 3), r"got \(1, 32, 3\)"),
        ((2, 32, 2), "one prompt per sample; got 1 for 2"),
    ],
)
def test_bad_samples(shape, says):
    with pytest.raises(ShapeError, match=says):
        distance(np.zeros(shape), [1])
