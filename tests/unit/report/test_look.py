"""The styles of series: a colour-blind reader, and one who prints in grey, can tell them apart."""

from itertools import combinations

import numpy as np
import pytest

from offramp.errors import ConfigError
from offramp.report.look import (
    DASHES,
    PAPER,
    SCREEN,
    STATIC_DASHES,
    check_size,
    look_of,
    styles,
)
from offramp.report.order import colours_of

# Machado, Oliveira and Fernandes (2009), severity 1: what a colour-blind eye sees, in linear RGB
EYES = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
LEAST_DISTANCE = 12.0
"""Least distance of two colours in CIELAB; some 2.3 are just noticed side by side."""
PAGE = {"white": 1.0, "dark": 0.0097}
"""Luminance of the pages' backgrounds."""
LOOKS = {"screen": SCREEN, "paper": PAPER}


def linear(colour):
    values = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(colour, eye):
    xyz = TO_XYZ @ np.clip(np.array(EYES[eye]) @ linear(colour), 0, 1)
    share = xyz / (TO_XYZ @ np.ones(3))
    root = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def contrast(colour, page):
    light, dark = sorted((float((TO_XYZ @ linear(colour))[1]), page), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("theme", LOOKS)
def test_colours_are_far_from_each_other_in_every_eye(theme, eye):
    seen = {colour: lab(colour, eye) for colour in LOOKS[theme].palette}
    assert len(seen) == 8
    distances = {
        pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in combinations(seen, 2)
    }
    nearest = min(distances, key=distances.__getitem__)
    least = LEAST_DISTANCE * (2 if eye == "normal" else 1)
    assert distances[nearest] >= least, (nearest, distances[nearest])


@pytest.mark.parametrize("theme", LOOKS)
def test_two_series_never_have_the_same_style_even_in_grey(theme):
    given = styles([f"series {n}" for n in range(35)], LOOKS[theme])
    for (_, one), (_, other) in combinations(given.items(), 2):
        assert (one.dash, one.shape) != (other.dash, other.shape)
    assert not [dash for dash in STATIC_DASHES if dash in DASHES]


@pytest.mark.parametrize(
    ("theme", "page"), [("screen", "white"), ("screen", "dark"), ("paper", "white")]
)
def test_colours_are_read_on_their_page(theme, page):
    look = LOOKS[theme]
    for colour in (*look.palette, *look.ordered, look.other, look.grey):
        assert contrast(colour, PAGE[page]) >= 2.9, colour


def test_ordered_colours_on_paper_are_in_the_order_of_their_lightness():
    names = [f"a {n}" for n in range(12)]
    colours = colours_of(names, {name: n for n, name in enumerate(names)}, PAPER)
    lightness = [lab(colour, "normal")[0] for colour in colours]
    assert lightness == sorted(lightness)
    assert len(set(colours)) == 12


def test_a_theme_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="theme: expected screen or paper, got 'dark'"):
        look_of("dark")


@pytest.mark.parametrize("size", [0, -5, 149, 4001, float("nan"), float("inf"), True, "300", None])
def test_a_size_is_a_number_in_range(size):
    with pytest.raises(ConfigError, match="width: expected a number from 150 to 4000"):
        check_size("width", size)
