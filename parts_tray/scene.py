"""What lies in the tray: the rules, the anomalies that break them, and their ground truth."""

from dataclasses import dataclass, replace

import numpy as np

from .damage import DAMAGED, MARKS, STRUCTURAL, damage_part, draw_dent
from .light import (
    COMPARTMENT_RADIUS,
    WALL,
    Canvas,
    View,
    dent_mask,
    draw_tray,
    photograph,
    rounded_box,
)
from .parts import (
    CABLE_RADIUS,
    CONNECTOR_HALF,
    CONNECTORS,
    HEAD_LENGTH,
    HEAD_RADIUS,
    NUT_FLAT,
    SCREW_LENGTH,
    SHAFT_RADIUS,
    WASHER_RADIUS,
    Part,
    draw_part,
    silhouette,
    wound_mask,
)

COMPARTMENTS = {  # boxes (x0, y0, x1, y1), pixels from the centre of the tray
    "nuts": (-210.0, -210.0, -7.0, -54.0),
    "washers": (7.0, -210.0, 210.0, -54.0),
    "cable": (-210.0, -40.0, 210.0, 48.0),
    "long screws": (-210.0, 62.0, -7.0, 210.0),
    "short screws": (7.0, 62.0, 210.0, 210.0),
}
ROUND_PLACES = ((-33.0, -31.0), (33.0, -31.0), (-33.0, 31.0), (33.0, 31.0))  # from the centre
SCREW_PLACES = (-44.0, -6.0, 32.0)  # y from the centre; the heads are at HEAD_X
HEAD_X = -82.0
CONNECTOR_X = 150.0  # from the centre of the compartment, to both sides
KIND = {  # of the parts in a compartment
    "nuts": "nut",
    "washers": "washer",
    "long screws": "long screw",
    "short screws": "short screw",
}
OTHER = {"nuts": "washers", "long screws": "short screws"}  # the compartment to the right
COLOURS = tuple(CONNECTORS)

AREA = {  # of a part's outline, pixels
    "nut": 2 * 3**0.5 * NUT_FLAT**2,
    "washer": np.pi * WASHER_RADIUS**2,
    "connector": 4 * CONNECTOR_HALF[0] * CONNECTOR_HALF[1],
    "cable": 2 * CABLE_RADIUS * 2 * (CONNECTOR_X - CONNECTOR_HALF[0]),
} | {
    kind: 2 * HEAD_RADIUS * HEAD_LENGTH + 2 * SHAFT_RADIUS * (length - HEAD_LENGTH)
    for kind, length in SCREW_LENGTH.items()
}
LENGTH_DIFFERENCE = SCREW_LENGTH["long screw"] - SCREW_LENGTH["short screw"]

# Defect -> area in pixels that a fair localisation must cover, by kind of rule that it breaks.
LOGICAL = {
    "missing": {f"missing {kind}": AREA[kind] for kind in KIND.values()}
    | {"missing cable": 2 * AREA["connector"] + AREA["cable"]},
    "surplus": {f"surplus {kind}": AREA[kind] for kind in KIND.values()},
    "swapped": {
        "swapped nuts and washers": 3 * min(AREA["nut"], AREA["washer"]),
        "swapped screws": 2 * AREA["short screw"],
    },
    "mismatched": {"mismatched connectors": AREA["connector"]},
    "wrong length": {
        "long screws for short": 2 * 2 * SHAFT_RADIUS * LENGTH_DIFFERENCE,
        "short screws for long": 2 * 2 * SHAFT_RADIUS * LENGTH_DIFFERENCE,
    },
}
SPLITS = ("train", "validation", "good", "logical_anomalies", "structural_anomalies")


@dataclass(frozen=True)
class Drawing:
    """An image and its ground truth.

    Attributes:
        image: uint8, (SIZE, SIZE, 3).
        defect: its name, "" for a normal image.
        masks: boolean (SIZE, SIZE) each, one per defect.
    """

    image: np.ndarray
    defect: str
    masks: tuple[np.ndarray, ...]


def defect_name(split: str, index: int) -> str:
    """Which defect the image `index` of a split shows; the types take turns."""
    if split == "structural_anomalies":
        return STRUCTURAL[index % len(STRUCTURAL)]
    if split == "logical_anomalies":
        names = list(list(LOGICAL.values())[index % len(LOGICAL)])
        return names[index // len(LOGICAL) % len(names)]
    return ""


def defects_config() -> list[dict]:
    """The content of defects_config.json, with MVTec LOCO's keys."""
    areas = {name: int(area) for names in LOGICAL.values() for name, area in names.items()}
    areas |= dict.fromkeys(STRUCTURAL, 1.0)
    return [
        {
            "defect_name": name.replace(" ", "_"),
            "pixel_value": 255 - i,
            "saturation_threshold": area,
            "relative_saturation": name in STRUCTURAL,
        }
        for i, (name, area) in enumerate(areas.items())
    ]


def draw(seed: int, split: str, index: int, *, without_defect: bool = False) -> Drawing:
    """Draw one image.

    Args:
        seed: of the data set.
        split: one of SPLITS.
        index: number of the image in its split; the image depends on nothing else.
        without_defect: draw the same tray, the same light and the same noise without its defect.

    Returns:
        The image with its ground truth.
    """
    key = [seed, SPLITS.index(split), index]
    scene, surface, sensor, accident = (np.random.default_rng([*key, i]) for i in range(4))
    view, parts = _view(scene), normal_parts(scene)
    defect = "" if without_defect else defect_name(split, index)
    masks, dents = [], []
    if defect in DAMAGED:
        parts, masks = _damage(parts, DAMAGED[defect], view, accident)
    elif defect == "dent":
        dents = [draw_dent(accident)]
        masks = [dent_mask(view, dents[0])]
    elif defect and defect not in MARKS:
        parts, masks = break_rule(parts, defect, view, accident)
    canvas = Canvas(view)
    draw_tray(canvas, COMPARTMENTS.values(), surface, dents)
    for part in parts:
        draw_part(canvas, part)
    light = canvas.develop()
    if defect in MARKS:
        masks = [MARKS[defect](light, accident)]
    return Drawing(photograph(light, view, sensor), defect, tuple(masks))


def _view(rng: np.random.Generator) -> View:
    return View(
        dx=rng.uniform(-4, 4),
        dy=rng.uniform(-4, 4),
        angle=np.radians(rng.uniform(-1, 1)),
        exposure=1 + rng.uniform(-0.06, 0.06),
        slope_x=rng.uniform(-0.03, 0.03),
        slope_y=rng.uniform(-0.03, 0.03),
        warmth=rng.uniform(-0.012, 0.012),
        blur=rng.uniform(0.55, 0.75),
    )


def normal_parts(rng: np.random.Generator) -> list[Part]:
    """The parts of a tray that obeys the rules, in the order in which they are laid down."""
    parts = []
    for name in KIND:
        places = ROUND_PLACES[:3] if name in ("nuts", "washers") else SCREW_PLACES[:2]
        parts += [_lay(name, KIND[name], place, rng) for place in range(len(places))]
    colour = COLOURS[rng.integers(2)]
    x0, y0, x1, y1 = COMPARTMENTS["cable"]
    ends = [
        Part(
            "connector",
            "cable",
            (x0 + x1) / 2 + side * CONNECTOR_X + rng.uniform(-4, 4),
            (y0 + y1) / 2 + rng.uniform(-3, 3),
            np.radians(rng.uniform(-3, 3)),
            int(rng.integers(2**31)),
            colour,
        )
        for side in (-1, 1)
    ]
    bends = ()
    for end, side in zip(ends, (1, -1), strict=True):
        reach = side * (CONNECTOR_HALF[0] - 2)
        slope = np.tan(end.angle)
        bends += (end.x + reach * np.cos(end.angle), end.y + reach * np.sin(end.angle), slope)
    bends += (rng.uniform(-8, 8), rng.uniform(-5, 5))
    middle = (bends[0] + bends[3]) / 2, (y0 + y1) / 2
    cable = Part("cable", "cable", *middle, 0.0, int(rng.integers(2**31)), bends=bends)
    return [*parts, cable, *ends]


def _lay(compartment: str, kind: str, place: int, rng: np.random.Generator) -> Part:
    """Lay a part on one of the places of a compartment, not quite exactly."""
    x0, y0, x1, y1 = COMPARTMENTS[compartment]
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    if kind in SCREW_LENGTH:
        x += HEAD_X + SCREW_LENGTH[kind] / 2 + rng.uniform(-4, 4)
        y += SCREW_PLACES[place] + rng.uniform(-2, 2)
        angle = np.radians(rng.uniform(-1.5, 1.5))
    else:
        x += ROUND_PLACES[place][0] + rng.uniform(-3, 3)
        y += ROUND_PLACES[place][1] + rng.uniform(-3, 3)
        angle = rng.uniform(0, 2 * np.pi)
    return Part(kind, compartment, x, y, angle, int(rng.integers(2**31)))


def break_rule(
    parts: list[Part], defect: str, view: View, rng: np.random.Generator
) -> tuple[list[Part], list[np.ndarray]]:
    """Break one rule.

    Returns:
        The parts and the masks of the ground truth.
    """
    action, _, what = defect.partition(" ")
    if defect == "missing cable":
        rest = [part for part in parts if part.compartment != "cable"]
        return rest, [compartment_mask("cable", view)]
    if action in ("missing", "surplus"):
        name = f"{what}s"
        inside = [part for part in parts if part.compartment == name]
        if action == "missing":
            # Any but the first: what is left looks like a normal tray wherever one looks closely.
            lost = inside[rng.integers(1, len(inside))]
            return [part for part in parts if part is not lost], [compartment_mask(name, view)]
        more = _lay(name, what, len(inside), rng)
        return [*parts, more], [_silhouettes([*inside, more], view)]
    if action == "swapped":
        left = "long screws" if what == "screws" else "nuts"
        moved = {left: OTHER[left], OTHER[left]: left}
        after = [_move(p, moved[p.compartment]) if p.compartment in moved else p for p in parts]
        both = [*parts, *after]
        return after, [
            _silhouettes([p for p in both if p.compartment == name], view) for name in moved
        ]
    if action == "mismatched":
        connectors = [part for part in parts if part.kind == "connector"]
        wrong = connectors[rng.integers(2)]
        other = COLOURS[1 - COLOURS.index(wrong.colour)]
        parts = [replace(p, colour=other) if p is wrong else p for p in parts]
        return parts, [_silhouettes(connectors, view)]
    name = f"{what.split()[-1]} screws"  # "long screws for short", "short screws for long"
    kind = f"{action} screw"
    right = [part for part in parts if part.compartment == name]
    wrong = [_lay(name, kind, place, rng) for place in range(len(right))]
    mask = _silhouettes([*right, *wrong], view)
    return [*(part for part in parts if part.compartment != name), *wrong], [mask]


def _move(part: Part, compartment: str) -> Part:
    """Lay a part on the same place of the compartment beside its own."""
    shift = COMPARTMENTS[compartment][0] - COMPARTMENTS[part.compartment][0]
    return replace(part, compartment=compartment, x=part.x + shift)


def _damage(
    parts: list[Part], kinds: tuple[str, ...], view: View, rng: np.random.Generator
) -> tuple[list[Part], list[np.ndarray]]:
    """Damage one part of the given kinds; returns as `break_rule`."""
    candidates = [i for i, part in enumerate(parts) if part.kind in kinds]
    i = candidates[rng.integers(len(candidates))]
    damaged = damage_part(parts[i], rng)
    return [*parts[:i], damaged, *parts[i + 1 :]], [wound_mask(damaged, view)]


def _silhouettes(parts: list[Part], view: View) -> np.ndarray:
    return np.logical_or.reduce([silhouette(part, view, margin=1.0) for part in parts])


def compartment_mask(name: str, view: View) -> np.ndarray:
    """Pixels of a compartment's floor: boolean (SIZE, SIZE)."""
    x0, y0, x1, y1 = COMPARTMENTS[name]
    u, v = view.tray_coordinates()
    half = (x1 - x0) / 2, (y1 - y0) / 2
    box = rounded_box(u - (x0 + x1) / 2, v - (y0 + y1) / 2, *half, COMPARTMENT_RADIUS)
    return box <= -WALL
