"""The parts in the tray: their shapes, what a broken one lost, and how each is drawn.

Coordinates (u, v) are a part's own: from its centre, u along its axis. See `light` for units.
"""

from dataclasses import dataclass

import numpy as np

from .light import (
    SCALE,
    SIZE,
    Canvas,
    View,
    colour,
    grid,
    metal,
    noise,
    normals,
    plastic,
    rounded_box,
    smooth,
)

NUT_FLAT, NUT_HOLE, NUT_HEIGHT = 23.0, 12.0, 16.0  # half across the flats, radius, height
WASHER_RADIUS, WASHER_HOLE, WASHER_HEIGHT = 26.0, 13.0, 5.0
SCREW_LENGTH = {"long screw": 164.0, "short screw": 100.0}
HEAD_LENGTH, HEAD_RADIUS, SHAFT_RADIUS, PITCH = 22.0, 14.0, 8.5, 6.0
CONNECTOR_HALF, CONNECTOR_HEIGHT = (32.0, 23.0), 22.0
CABLE_RADIUS = 6.5

BRASS = colour(0.95, 0.68, 0.30)
STEEL = colour(0.62, 0.63, 0.65)
ZINC = colour(0.60, 0.61, 0.66)
COPPER = colour(0.95, 0.45, 0.25)
RUBBER = colour(0.020, 0.020, 0.022)
CONNECTORS = {"blue": colour(0.03, 0.12, 0.50), "orange": colour(0.75, 0.20, 0.02)}


@dataclass(frozen=True)
class Part:
    """A thing that lies in the tray.

    Attributes:
        kind: "nut", "washer", "long screw", "short screw", "connector" or "cable".
        compartment: name of the compartment it lies in.
        x, y: its centre, from the centre of the tray.
        angle: its rotation.
        seed: of its texture.
        colour: of a connector, a key of CONNECTORS.
        bends: of a cable: start (x, y, slope), end (x, y, slope), two sags.
        damage: of a broken part, see `wound`.
    """

    kind: str
    compartment: str
    x: float
    y: float
    angle: float
    seed: int
    colour: str = ""
    bends: tuple[float, ...] = ()
    damage: tuple[float, float] | None = None


def outline(part: Part, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to a part's outline with its holes filled, negative inside."""
    match part.kind:
        case "nut":
            sides = [abs(u * np.cos(a) + v * np.sin(a)) for a in (0.0, np.pi / 3, 2 * np.pi / 3)]
            return np.maximum(np.maximum.reduce(sides) - NUT_FLAT, np.hypot(u, v) - 1.13 * NUT_FLAT)
        case "washer":
            return np.hypot(u, v) - WASHER_RADIUS
        case "connector":
            return rounded_box(u, v, *CONNECTOR_HALF, 5)
        case "cable":
            return np.maximum(_beside_cable(part, u, v) - CABLE_RADIUS, -_from_cable_end(part, u))
    start, length = u + SCREW_LENGTH[part.kind] / 2, SCREW_LENGTH[part.kind]
    head = rounded_box(start - HEAD_LENGTH / 2, v, HEAD_LENGTH / 2, HEAD_RADIUS, 2.5)
    middle, half = (length + HEAD_LENGTH) / 2, (length - HEAD_LENGTH) / 2
    return np.minimum(head, rounded_box(start - middle, v, half, SHAFT_RADIUS, 3))


def wound(part: Part, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to what a damaged part lost, negative where it is lost.

    The two numbers of `part.damage` are: of a nut, the direction and the radius of the chip; of a
    washer, the direction and half the angle of the gap; of a cable, the middle and half the length
    of the bare section; of a screw, where it snapped, from its head, and the slant of the fracture.
    """
    first, second = part.damage
    rough = 0.8 * np.sin(1.7 * v + part.seed % 7) + 0.6 * np.sin(0.9 * u + 2.3 * v)
    match part.kind:
        case "nut":
            x, y = 1.2 * NUT_FLAT * np.cos(first), 1.2 * NUT_FLAT * np.sin(first)
            return np.hypot(u - x, v - y) - second + rough
        case "washer":
            turn = (np.arctan2(v, u) - first + np.pi) % (2 * np.pi) - np.pi
            return (np.abs(turn) - second) * np.hypot(u, v) + rough
        case "cable":
            return np.abs(u - first) - second + rough
    return first - u - SCREW_LENGTH[part.kind] / 2 + second * v + rough


def window(part: Part, view: View, scale: int = 1):
    """The pixels around a part: their slices, and u and v of their samples, `scale` to a pixel."""
    match part.kind:
        case "nut" | "washer":
            half_u, half_v = 28.0, 28.0
        case "connector":
            half_u, half_v = CONNECTOR_HALF[0] + 3, CONNECTOR_HALF[1] + 3
        case "cable":
            half_u, half_v = (part.bends[3] - part.bends[0]) / 2 + 2, 34.0
        case _:
            half_u, half_v = SCREW_LENGTH[part.kind] / 2 + 3, HEAD_RADIUS + 3
    cx, cy = view.place(part.x, part.y)
    c, s = float(np.cos(part.angle + view.angle)), float(np.sin(part.angle + view.angle))
    rx, ry = abs(c) * half_u + abs(s) * half_v, abs(s) * half_u + abs(c) * half_v
    top, bottom, left, right = int(cy - ry), int(cy + ry + 1), int(cx - rx), int(cx + rx + 1)
    x, y = grid(scale, top, bottom, left, right)
    u, v = c * (x - cx) + s * (y - cy), c * (y - cy) - s * (x - cx)
    return (slice(top, bottom), slice(left, right)), u, v


def silhouette(part: Part, view: View, margin: float = 0.0) -> np.ndarray:
    """Pixels that a part covers, its holes included: boolean (SIZE, SIZE)."""
    mask = np.zeros((SIZE, SIZE), bool)
    where, u, v = window(part, view)
    mask[where] = outline(part, u, v) <= margin
    return mask


def wound_mask(part: Part, view: View) -> np.ndarray:
    """Pixels of a part's damage, what it lost included: boolean (SIZE, SIZE)."""
    mask = np.zeros((SIZE, SIZE), bool)
    where, u, v = window(part, view)
    mask[where] = (wound(part, u, v) <= 2) & (outline(part, u, v) <= 0)
    return mask


def draw_part(canvas: Canvas, part: Part) -> None:
    """Draw a part where it lies."""
    where, u, v = window(part, canvas.view, SCALE)
    rng = np.random.default_rng(part.seed)
    distance = outline(part, u, v)
    cover = np.clip(0.5 - distance * SCALE, 0, 1)
    match part.kind:
        case "nut":
            hole, top, light = _nut(u, v, distance, part.angle + canvas.view.angle, rng)
        case "washer":
            hole, top, light = _washer(u, v, distance, part.angle + canvas.view.angle, rng)
        case "connector":
            hole, top, light = _connector(part, u, v, distance, rng)
        case "cable":
            hole, top, light = _cable(part, u, v, rng)
        case _:
            hole, top, light = _screw(SCREW_LENGTH[part.kind], u, v, rng)
    cover = cover * (1 - hole)
    if part.damage and part.kind != "cable":
        lost = wound(part, u, v)
        cover = cover * np.clip(0.5 + lost * SCALE, 0, 1)
        fracture = np.exp(-((lost / 1.8) ** 2)) * rng.uniform(0.5, 1.3, lost.shape)
        light = [side + fracture * (0.16 - 0.7 * side) for side in light]
    canvas.put(where, cover, top, light)


def _nut(u, v, distance, angle, rng):
    """Each of these returns the share of holes, the height, and the light of a part's samples."""
    radius = np.hypot(u, v)
    top = NUT_HEIGHT - 0.55 * np.clip(radius - 0.93 * NUT_FLAT, 0, None)
    top -= 0.9 * np.clip(distance + 1.2, 0, None) + 0.9 * np.clip(NUT_HOLE + 2.6 - radius, 0, None)
    normal = normals(top + 0.3 * noise(rng, u.shape, 3))
    light = metal(normal, BRASS, 40, _turning_marks(radius, rng), _around(u, v, radius, angle))
    depth = np.clip((NUT_HOLE + 0.3 - radius) / 3.2, 0, 1)
    helix = np.sin(2 * np.pi * radius / 1.5 + np.arctan2(v, u))
    thread = np.clip(0.75 - 0.6 * depth + 0.25 * helix, 0.08, 1)
    thread = np.where(depth > 0, thread, 1)
    hole = np.clip(0.5 - (radius - NUT_HOLE + 3) * SCALE, 0, 1)
    return hole, np.maximum(top, 0), [side * thread for side in light]


def _washer(u, v, distance, angle, rng):
    radius = np.hypot(u, v)
    rim = np.clip(np.minimum(-distance, radius - WASHER_HOLE), 0, None)
    top = WASHER_HEIGHT - 1.6 * np.exp(-rim / 1.1)
    normal = normals(top + 0.45 * noise(rng, u.shape, 4))
    light = metal(normal, STEEL, 35, _turning_marks(radius, rng), _around(u, v, radius, angle))
    return np.clip(0.5 - (radius - WASHER_HOLE) * SCALE, 0, 1), top, light


def _turning_marks(radius: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness of the circles that a lathe leaves, around 1."""
    marks = 1 + 0.16 * rng.standard_normal(64)
    return np.interp(radius, 0.6 * np.arange(64), marks).astype(np.float32)


def _around(u, v, radius, angle):
    """Direction (x, y) of the circles around a part's centre."""
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return (-c * v - s * u) / (radius + 1e-3), (c * u - s * v) / (radius + 1e-3)


def _screw(length, u, v, rng):
    along = u + length / 2
    turn = (along + 0.16 * v) / PITCH + float(rng.random())
    tooth = np.abs(2 * (turn - np.floor(turn)) - 1)  # 1 on a crest of the thread, 0 in a root
    point = 0.72 + 0.28 * np.clip((length - along) / 4, 0, 1)
    radius = (SHAFT_RADIUS - 2.2 * (1 - smooth(tooth, 0.1, 0.85))) * point
    shaft = np.sqrt(np.clip(radius**2 - v * v, 0.02, None))
    knurl = 0.35 * np.sin(22 * np.arcsin(np.clip(v / HEAD_RADIUS, -1, 1)))
    bevel = np.clip(1.8 - along, 0, None) + np.clip(along - HEAD_LENGTH + 1.8, 0, None)
    head = np.sqrt(np.clip(HEAD_RADIUS**2 - v * v, 0.02, None)) + knurl - 0.7 * bevel
    is_head = along < HEAD_LENGTH
    top = np.where(is_head, head, shaft) + 0.75 * HEAD_RADIUS
    groove = np.where(is_head, 1, 0.42 + 0.58 * smooth(tooth, 0.05, 0.6))
    grain = (1 + 0.10 * noise(rng, u.shape, 0.6)) * groove
    return 0.0, top, metal(normals(top), ZINC, 30, grain)


def _connector(part, u, v, distance, rng):
    u = u if part.x < 0 else -u  # the cable leaves towards the middle of the tray
    ribs = 0.7 * np.cos(2 * np.pi * u / 6.3) * ((u > 8) & (u < 27)) * smooth(-distance, 3, 6)
    well = smooth(-rounded_box(u + 13, np.abs(v) - 9.5, 11, 5.5, 2), -0.6, 1.4)
    top = CONNECTOR_HEIGHT - 0.16 * np.clip(distance + 5, 0, None) ** 2 + ribs - 9 * well
    grain = noise(rng, u.shape, 1)
    albedo = (1 + 0.12 * grain) * CONNECTORS[part.colour]
    ambient, lamp = plastic(normals(top, 0.05 * grain), albedo, gloss=0.6, power=30)
    across = (np.abs(v) - 9.5) / 2.4
    is_pin = (np.abs(across) < 0.92) & (np.abs(u + 13) < 8)
    shine = np.sqrt(np.clip(1 - across**2, 0, 1))
    ambient = np.where(is_pin, BRASS * 0.35 * shine, ambient * (1 - 0.45 * well))
    lamp = np.where(is_pin, BRASS * 0.40 * shine**3, lamp * (1 - 0.50 * well))
    return 0.0, top, (ambient, lamp)


def _cable(part, u, v, rng):
    beside, end = _beside_cable(part, u, v), _from_cable_end(part, u)
    inside = np.clip(beside, 0, CABLE_RADIUS)
    collar = smooth(-end, -17, -15) * (np.sin(2 * np.pi * end / 4.5) > 0)
    top = CABLE_RADIUS + np.sqrt(np.clip(CABLE_RADIUS**2 - inside**2, 0.05, None)) + 1.2 * collar
    grain = noise(rng, u.shape, 1.2)
    albedo = (1 + 0.25 * grain) * RUBBER
    light = plastic(normals(top, 0.1 * grain), albedo, gloss=0.55, power=14)
    if part.damage is None:
        return 0.0, top, light
    bare = smooth(-wound(part, u, v), -0.5, 0.5)
    across = v + part.y - _cable_line(part, u)[0]
    strands = 0.7 * np.cos(2 * np.pi * (across + 0.35 * u) / 3.4)
    wire = CABLE_RADIUS + np.sqrt(np.clip((CABLE_RADIUS - 1.5) ** 2 - inside**2, 0.05, None))
    top = top + bare * (wire + strands - top)
    copper = metal(normals(top), COPPER, 30, 0.75 + 0.35 * strands)
    light = [a + bare * (b - a) for a, b in zip(light, copper, strict=True)]
    return bare * smooth(inside, CABLE_RADIUS - 2, CABLE_RADIUS - 1), top, light


def _beside_cable(part: Part, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance from the centre line of a cable."""
    y, slope = _cable_line(part, u)
    return np.abs(v + part.y - y) / np.hypot(1, slope)


def _from_cable_end(part: Part, u: np.ndarray) -> np.ndarray:
    """Distance to the nearer end of a cable, along u, negative beyond it."""
    return np.minimum(u + part.x - part.bends[0], part.bends[3] - part.x - u)


def _cable_line(part: Part, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y in the tray, and slope, of a cable's centre line at u: a Hermite curve with two sags."""
    x0, y0, slope0, x1, y1, slope1, sag, wave = part.bends
    length = x1 - x0
    t = np.clip((u + part.x - x0) / length, 0, 1)
    y = (2 * t**3 - 3 * t**2 + 1) * y0 + (3 * t**2 - 2 * t**3) * y1
    y = y + length * ((t**3 - 2 * t**2 + t) * slope0 + (t**3 - t**2) * slope1)
    y = y + sag * np.sin(np.pi * t) ** 2 + wave * np.sin(2 * np.pi * t) * np.sin(np.pi * t)
    return y, np.gradient(y, axis=1) / np.gradient(u, axis=1)
