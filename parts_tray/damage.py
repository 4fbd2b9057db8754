"""Structural defects of the tray: what is damaged and how it looks.

    scratch        a groove over the tray and over whatever lies in its way
    dent           a dimple in the floor or in a wall of the tray
    stain          oil, rust or a powdery residue
    broken nut     a corner is gone
    broken washer  a piece of the ring is gone
    snapped screw  its end is gone
    hair           a foreign fibre, dark, red or white, with its shadow
    frayed cable   the sheath is gone for a while, copper shows

Dents and damaged parts are drawn with the tray; the others are laid over the lit picture. Each is
masked by its own pixels, what a broken part lost included.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from skimage.filters import gaussian

from .light import SIZE, colour, grid, noise, smooth
from .parts import SCREW_LENGTH, Part

STRUCTURAL = (
    "scratch",
    "dent",
    "stain",
    "broken nut",
    "hair",
    "snapped screw",
    "frayed cable",
    "broken washer",
)
DAMAGED = {  # defect -> the kinds of parts that it can happen to
    "broken nut": ("nut",),
    "broken washer": ("washer",),
    "snapped screw": ("long screw", "short screw"),
    "frayed cable": ("cable",),
}
# Bare ground and walls, from the centre of the tray: where no part hides a dent.
DENT_PLACES = (
    (-75.0, -100.0),
    (142.0, -100.0),
    (-110.0, 178.0),
    (60.0, 178.0),
    (165.0, 140.0),
    (0.0, -120.0),
    (0.0, 130.0),
    (-120.0, -47.0),
    (100.0, 55.0),
)
STAINS = (  # linear light that comes back, share of the ground that it hides
    (colour(0.020, 0.014, 0.008), 0.75),  # oil
    (colour(0.26, 0.085, 0.022), 0.75),  # rust
    (colour(0.50, 0.50, 0.47), 0.60),  # powder
)
HAIRS = (colour(0.012, 0.008, 0.006), colour(0.35, 0.02, 0.03), colour(0.80, 0.80, 0.76))


def draw_dent(rng: np.random.Generator) -> tuple[float, ...]:
    """A dent for `draw_tray`: (x, y, radius_u, radius_v, angle, depth)."""
    x, y = DENT_PLACES[rng.integers(len(DENT_PLACES))]
    radii = rng.uniform(8, 14, 2)
    depth = rng.uniform(5, 9)
    return (x + rng.uniform(-8, 8), y + rng.uniform(-4, 4), *radii, rng.uniform(0, np.pi), depth)


def damage_part(part: Part, rng: np.random.Generator) -> Part:
    """The part, broken or frayed (see `parts.wound` for the numbers)."""
    match part.kind:
        case "nut":
            damage = (np.pi / 6 + np.pi / 3 * rng.integers(6), rng.uniform(10, 16))
        case "washer":
            damage = (rng.uniform(0, 2 * np.pi), rng.uniform(0.12, 0.55))
        case "cable":
            damage = (rng.uniform(-60, 60), rng.uniform(9, 22))
        case _:
            damage = (SCREW_LENGTH[part.kind] * rng.uniform(0.55, 0.8), rng.uniform(-0.5, 0.5))
    return replace(part, damage=damage)


def scratch(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scratch a picture.

    Args:
        light: linear light, (3, SIZE, SIZE), changed in place.
        rng: of where and how.

    Returns:
        The pixels of the scratch, boolean (SIZE, SIZE).
    """
    start = rng.uniform(70, SIZE - 70, 2)
    angle, length = rng.uniform(0, np.pi), rng.uniform(60, 170)
    towards = np.array([np.cos(angle), np.sin(angle)])
    if towards @ (SIZE / 2 - start) < 0:  # stay on the tray
        towards = -towards
    end = start + length * towards
    bow = (start + end) / 2 + rng.uniform(-0.12, 0.12) * length * np.array(
        [-towards[1], towards[0]]
    )
    distance, along = _curve(np.stack([start, bow, end]), 40)
    pressure = 0.65 + 0.35 * np.sin(along * rng.uniform(9, 25) + rng.uniform(0, 6))
    pressure *= smooth(along, 0, 0.08) * smooth(1 - along, 0, 0.25) * rng.uniform(0.7, 1.0)
    ridge = np.exp(-((distance / rng.uniform(0.8, 1.5)) ** 2)) * pressure
    groove = 0.55 * np.roll(ridge, (2, 1), (0, 1))
    light *= 1 - groove
    light += ridge * (0.30 - 0.1 * light)
    return np.maximum(ridge, groove) > 0.12


def hair(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lay a fibre on a picture; as `scratch`."""
    points, turn = [rng.uniform(110, SIZE - 110, 2)], rng.uniform(0, 2 * np.pi)
    for _ in range(rng.integers(3, 5)):
        turn += rng.uniform(-1.1, 1.1)
        points.append(points[-1] + rng.uniform(25, 50) * np.array([np.cos(turn), np.sin(turn)]))
    distance, _ = _curve(np.clip(points, 25, SIZE - 25), 60)
    radius = rng.uniform(0.7, 1.3)
    cover = np.clip(radius + 0.5 - distance, 0, 1)
    shadow = gaussian(np.roll(cover, (3, 2), (0, 1)), 1.2)
    light *= 1 - 0.6 * shadow
    sheen = 0.75 + 0.25 * np.clip(1 - distance / radius, 0, 1)
    light += cover * (sheen * HAIRS[rng.integers(len(HAIRS))] - light)
    return distance <= radius + 0.8


def stain(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stain a picture; as `scratch`."""
    x, y = grid()
    cx, cy = rng.uniform(75, SIZE - 75, 2)
    radius = rng.uniform(13, 34)
    shape = noise(rng, (SIZE, SIZE), radius / 3)
    field = 1 - np.hypot(x - cx, y - cy) / radius + 0.22 * shape / shape.std()
    tint, hides = STAINS[rng.integers(len(STAINS))]
    cover = smooth(field, 0, 0.16)
    rim = np.exp(-(((field - 0.14) / 0.09) ** 2)) * cover
    share = hides * cover * (0.75 + 0.25 * rim) * (1 + 0.18 * noise(rng, (SIZE, SIZE), 0.8))
    light += np.clip(share, 0, 1) * (tint * (1 - 0.35 * rim) - light)
    return cover > 0.2


MARKS = {"scratch": scratch, "hair": hair, "stain": stain}


def _curve(points: np.ndarray, pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel's distance from the Bezier curve of control points (N, 2), and how far along.

    Returns:
        The distance, and the position 0..1 of the nearest point of the curve, (SIZE, SIZE) each.
    """
    t = np.linspace(0, 1, pieces + 1)[:, None]
    levels = list(points)  # de Casteljau
    while len(levels) > 1:
        levels = [a + t * (b - a) for a, b in pairwise(levels)]
    x, y = grid()
    distance, along = np.full((SIZE, SIZE), np.inf), np.zeros((SIZE, SIZE))
    for k, (a, b) in enumerate(pairwise(levels[0])):
        (ax, ay), (dx, dy) = a, b - a
        s = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
        d = np.hypot(x - ax - s * dx, y - ay - s * dy)
        nearer = d < distance
        distance[nearer], along[nearer] = d[nearer], ((k + s) / pieces)[nearer]
    return distance, along
