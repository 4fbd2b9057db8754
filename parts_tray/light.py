"""How the tray is lit and photographed: height fields, materials, shadows, lens and sensor.

A scene is a height field and two pictures: the light that the surroundings give, which is reduced
in corners, and the light of the lamp, which is removed in its shadow. Lengths are in image pixels,
angles in radians, light is linear; x points right, y down, z to the camera.
"""

from dataclasses import dataclass

import numpy as np
from skimage.filters import gaussian

SIZE = 480  # width and height of an image
SCALE = 2  # samples per pixel and axis while drawing a part

TRAY_HALF, TRAY_RADIUS = 226.0, 22.0  # half the side of the tray, radius of its corners
RIM = 24.0  # height of the rim and of the walls over the floor
WALL = 9.0  # width of the sloping side of a wall
COMPARTMENT_RADIUS = 22.0


def colour(red: float, green: float, blue: float) -> np.ndarray:
    """A colour in linear light, (3, 1, 1); 32 bits, as everything here, for speed."""
    return np.array([red, green, blue], np.float32)[:, None, None]


PLASTIC = colour(0.068, 0.085, 0.108)
BENCH = colour(0.46, 0.45, 0.43)

TO_LAMP = (-0.402, -0.491, 0.773)  # unit vectors; the second is halfway to the camera
HALFWAY = (-0.213, -0.261, 0.942)
LINEAR = np.linspace(0, 1, 2**15)
SRGB = np.where(LINEAR < 0.0031308, 12.92 * LINEAR, 1.055 * LINEAR ** (1 / 2.4) - 0.055)
SRGB = np.rint(255 * SRGB).astype(np.uint8)  # linear light, in 2^15 steps -> 8-bit sRGB
# What metal mirrors: brightness, direction (x, y) and spread of a panel, a window, a dark object.
REFLECTIONS = (
    (0.55, -0.45, -0.55, 0.16),
    (0.30, 0.75, -0.10, 0.10),
    (-0.14, 0.35, 0.60, 0.12),
)


@dataclass(frozen=True)
class View:
    """Where the tray lies under the camera and how it is lit.

    Attributes:
        dx, dy, angle: shift and rotation of the tray.
        exposure, slope_x, slope_y: brightness, and its relative change from the centre to an edge.
        warmth: relative change of red against blue.
        blur: standard deviation of the lens blur.
    """

    dx: float
    dy: float
    angle: float
    exposure: float
    slope_x: float
    slope_y: float
    warmth: float
    blur: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Tray coordinates, from the centre of the tray -> image coordinates."""
        c, s = float(np.cos(self.angle)), float(np.sin(self.angle))
        return SIZE / 2 + self.dx + c * x - s * y, SIZE / 2 + self.dy + s * x + c * y

    def tray_coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """Every pixel's position in the tray, from its centre: two arrays (SIZE, SIZE)."""
        x, y = grid()
        x, y = x - (SIZE / 2 + self.dx), y - (SIZE / 2 + self.dy)
        c, s = float(np.cos(self.angle)), float(np.sin(self.angle))
        return c * x + s * y, c * y - s * x


def grid(
    scale: int = 1, top: int = 0, bottom: int = SIZE, left: int = 0, right: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Image coordinates x (1, W) and y (H, 1) of the samples of a window, `scale` to a pixel."""
    y = (np.arange(top * scale, bottom * scale, dtype=np.float32)[:, None] + 0.5) / scale
    x = (np.arange(left * scale, right * scale, dtype=np.float32)[None] + 0.5) / scale
    return x, y


def rounded_box(
    u: np.ndarray, v: np.ndarray, half_u: float, half_v: float, radius: float
) -> np.ndarray:
    """Signed distance to a box around the origin with round corners, negative inside."""
    a, b = np.abs(u) - (half_u - radius), np.abs(v) - (half_v - radius)
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - radius


def smooth(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, a smooth step between them."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def noise(rng: np.random.Generator, shape: tuple[int, ...], sigma) -> np.ndarray:
    """White noise of standard deviation 1, then blurred by `sigma` samples, which lowers it."""
    return gaussian(rng.standard_normal(shape, np.float32), sigma)


class Canvas:
    """A scene under construction; parts are drawn finer and averaged down to pixels.

    Args:
        view: where the tray lies.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.height = np.zeros((SIZE, SIZE), np.float32)
        self.ambient = np.zeros((3, SIZE, SIZE), np.float32)
        self.lamp = np.zeros((3, SIZE, SIZE), np.float32)

    def put(self, where, alpha, height, light) -> None:
        """Lay a lit surface over what is there.

        Args:
            where: slices of the pixels, (h, w) of them.
            alpha: share of each sample that it covers, (h SCALE, w SCALE).
            height: its height, of the same shape.
            light: from the surroundings and from the lamp, (3, h SCALE, w SCALE) each.
        """
        rest = 1 - _to_pixels(alpha)
        self.height[where] = self.height[where] * rest + _to_pixels(height * alpha)
        for target, source in zip((self.ambient, self.lamp), light, strict=True):
            target[:, *where] = target[:, *where] * rest + _to_pixels(source * alpha)

    def develop(self) -> np.ndarray:
        """The lit scene with its shadows: linear light, shape (3, SIZE, SIZE)."""
        hollow = np.clip(gaussian(self.height, 9, truncate=3) - self.height, 0, None) / RIM
        corner = np.clip(gaussian(self.height, 3) - self.height, 0, None) / RIM
        open_to_room = np.clip(1 - 0.75 * hollow - 0.8 * corner, 0.15, 1)
        lit = 1 - _shadow(self.height)
        return self.ambient * open_to_room + self.lamp * lit


def _to_pixels(samples: np.ndarray) -> np.ndarray:
    """Mean of the samples of each pixel."""
    corners = [samples[..., i::SCALE, j::SCALE] for i in range(SCALE) for j in range(SCALE)]
    return sum(corners) / SCALE**2


def _shadow(height: np.ndarray) -> np.ndarray:
    """Share of the lamp that is hidden at each pixel: 0 lit, 1 in full shadow.

    Walks from every pixel towards the lamp; what stands above the ray casts a shadow that is the
    softer the farther away it is.
    """
    away = float(np.hypot(*TO_LAMP[:2]))
    step_x, step_y, slope = (c / away for c in TO_LAMP)
    shade = np.zeros_like(height)
    for d in np.arange(1.5, 1.3 * RIM / slope + 4, 1.5).tolist():
        towards = np.roll(height, (-round(d * step_y), -round(d * step_x)), (0, 1))
        np.maximum(shade, (towards - height - d * slope) / (1.5 + 0.28 * d), out=shade)
    return gaussian(0.92 * smooth(shade, 0, 1), 1.3)


def normals(height: np.ndarray, slope_x=0.0, slope_y=0.0, scale: int = SCALE):
    """Unit normals (x, y, z) of a height field, `scale` samples to a pixel, with slopes added."""
    gy, gx = np.gradient(height, np.float32(1 / scale))
    gx, gy = gx + slope_x, gy + slope_y
    nz = 1 / np.sqrt(1 + gx * gx + gy * gy)
    return -gx * nz, -gy * nz, nz


def plastic(normal, albedo: np.ndarray, gloss: float, power: float):
    """Light of plastic or rubber.

    Args:
        normal: unit normals, three arrays (h, w).
        albedo: its colour, (3, h, w).
        gloss: strength of the lamp's highlight.
        power: sharpness of the highlight.

    Returns:
        From the surroundings and from the lamp, (3, h, w) each.
    """
    _, ny, nz = normal
    around = 0.30 + 0.30 * nz + 0.10 * ny
    sheen = 0.05 * gloss * (1 - nz) ** 2
    shine = 0.30 * gloss * _facing(normal, HALFWAY) ** power
    lamp = albedo * _facing(normal, TO_LAMP) + shine
    return albedo * around + sheen, lamp


def metal(normal, tint: np.ndarray, power: float, grain: np.ndarray | float = 1.0, along=None):
    """Light of metal that mirrors the room.

    Args:
        normal: unit normals, three arrays (h, w).
        tint: colour of the metal, (3, 1, 1).
        power: sharpness of the lamp's highlight.
        grain: relative brightness of its texture, (h, w).
        along: direction (x, y) of the brush marks; they spread the highlight across themselves.

    Returns:
        From the surroundings and from the lamp, (3, h, w) each.
    """
    nx, ny, nz = normal
    rx, ry, rz = 2 * nz * nx, 2 * nz * ny, 2 * nz * nz - 1
    room = 0.16 + 0.20 * smooth(rz, -0.2, 0.9)
    for brightness, x, y, spread in REFLECTIONS:
        room = room + brightness * np.exp(-((rx - x) ** 2 + (ry - y) ** 2) / spread)
    if along is None:
        shine = _facing(normal, HALFWAY) ** power
    else:
        across = along[0] * HALFWAY[0] + along[1] * HALFWAY[1]
        shine = np.exp(-power * across * across) * np.clip(nz, 0, 1) ** 4
    lamp = 0.22 * _facing(normal, TO_LAMP) + 0.75 * shine
    return (room * grain) * tint, (lamp * grain) * tint


def _facing(normal, direction: tuple[float, ...]) -> np.ndarray:
    return np.clip(sum(n * d for n, d in zip(normal, direction, strict=True)), 0, 1)


def draw_tray(canvas: Canvas, compartments, rng: np.random.Generator, dents=()) -> None:
    """The bench, the tray and its empty compartments.

    Args:
        canvas: what to draw on.
        compartments: boxes (x0, y0, x1, y1) in the tray.
        rng: for the textures.
        dents: (x, y, radius_u, radius_v, angle, depth) each, in the tray.
    """
    u, v = canvas.view.tray_coordinates()
    edge = rounded_box(u, v, TRAY_HALF, TRAY_HALF, TRAY_RADIUS)
    height = np.full((SIZE, SIZE), RIM, np.float32)
    for x0, y0, x1, y1 in compartments:
        half = (x1 - x0) / 2, (y1 - y0) / 2
        box = rounded_box(u - (x0 + x1) / 2, v - (y0 + y1) / 2, *half, COMPARTMENT_RADIUS)
        np.minimum(height, RIM * smooth(box, -WALL, 0), out=height)
    height *= smooth(-edge, 0, 5)
    for x, y, radius_u, radius_v, angle, depth in dents:
        a, b = _turned(u - x, v - y, angle)
        r2 = (a / radius_u) ** 2 + (b / radius_v) ** 2
        height += depth * (0.45 * r2 - 1) * np.exp(-r2)  # a dimple with a raised rim
    grain = noise(rng, (SIZE, SIZE), 0.6)
    patches = noise(rng, (SIZE // 4, SIZE // 4), 1.25).repeat(4, 0).repeat(4, 1)
    gy, gx = np.gradient(grain)
    normal = normals(height, 0.16 * gx, 0.16 * gy, scale=1)
    albedo = (1 + 0.05 * grain + 0.04 * gaussian(patches, 2)) * PLASTIC
    ambient, lamp = plastic(normal, albedo, gloss=0.45, power=14)
    streaks = gaussian(noise(rng, (SIZE, SIZE // 8), (0.5, 3)).repeat(8, 1), (0, 4))
    brushed = (1 + 0.29 * streaks) * BENCH
    cover = np.clip(0.5 - edge, 0, 1)
    canvas.height[:] = cover * height
    canvas.ambient[:] = cover * ambient + (1 - cover) * 0.40 * brushed
    canvas.lamp[:] = cover * lamp + (1 - cover) * 0.45 * brushed


def dent_mask(view: View, dent: tuple[float, ...]) -> np.ndarray:
    """Pixels of a dent of `draw_tray`: boolean (SIZE, SIZE)."""
    x, y, radius_u, radius_v, angle, _ = dent
    u, v = view.tray_coordinates()
    a, b = _turned(u - x, v - y, angle)
    return (a / radius_u) ** 2 + (b / radius_v) ** 2 < 1.5**2


def _turned(u: np.ndarray, v: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along axes that are turned by `angle`."""
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return c * u + s * v, c * v - s * u


def photograph(light: np.ndarray, view: View, rng: np.random.Generator) -> np.ndarray:
    """Lens and sensor: linear light (3, SIZE, SIZE) -> 8-bit sRGB (SIZE, SIZE, 3)."""
    x, y = grid()
    x, y = 2 * x / SIZE - 1, 2 * y / SIZE - 1
    vignette = 1 - 0.13 * (x * x + y * y)
    shading = view.exposure * vignette * (1 + view.slope_x * x + view.slope_y * y)
    white = colour(1 + view.warmth, 1, 1 - view.warmth)
    light = gaussian(light, view.blur, channel_axis=0) * shading * white
    light = 1.12 * light / (1 + 0.12 * light * light)  # highlights saturate softly
    deviation = np.sqrt(1.4e-6 + 3.6e-5 * np.clip(light, 0, None))  # read noise and shot noise
    light += deviation * rng.standard_normal(light.shape, np.float32)
    step = (np.clip(light, 0, 1) * (len(SRGB) - 1)).astype(np.uint16)
    return SRGB[np.moveaxis(step, 0, 2)]
