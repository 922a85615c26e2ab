"""Scenes for the demo's model: a shape that moves and changes, over a background that shakes, flickers and distracts.

No single frame shows what is going on; the frames before it do. What a frame is to be called is fixed by the past
alone: the motion that most of the last `GRACE` frames belong to. Coordinates are fractions of the frame's side, with y
downwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np

LABELS = (
    "still",
    "left",
    "right",
    "up",
    "down",
    "approaching",
    "receding",
    "clockwise",
    "anticlockwise",
    "appearing",
    "disappearing",
    "nothing",
)
NEED_ROOM = ("left", "right", "up", "down", "approaching", "receding")
FPS = 25.0
LAG = 6  # frames
GRACE = 13  # frames; a new motion gives a frame its name from its seventh frame on, a quarter of a second late

SHORTEST, LONGEST = 22, 68  # frames of one motion
SPEED = (0.009, 0.020)  # sides a frame
GROWTH = (1.013, 1.028)  # factor a frame
TURN = (0.10, 0.18)  # radians a frame
RADIUS = (0.17, 0.32)  # of the shape, in sides
EMPTY = (14, 28)  # frames of nothing
FAINT = 0.15  # opacity from which a shape appears and to which it disappears
SHAPES = ("disc", "square", "triangle", "bar", "ring")


@dataclass(frozen=True)
class Pose:
    """The shape in one frame."""

    x: float
    y: float
    radius: float
    angle: float = 0.0
    opacity: float = 1.0


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        frames: uint8 [T, size, size, 3], RGB.
        labels: int64 [T], indices into `LABELS`, fixed by the frames up to each.
        state: float32 [T, 6], where the shape is: x and y from the centre, log radius, the direction it points in
            (x, y), opacity; each about 1 in size, and 0 where there is no shape.
        change: float32 [T, 6], how the shape changed over the last `LAG` frames: x, y, log radius, angle, opacity, and
            whether it is there; each about 1 in size.
    """

    frames: np.ndarray
    labels: np.ndarray
    state: np.ndarray
    change: np.ndarray


def draw_scene(seed: int, frames: int, size: int = 64) -> Scene:
    """Draw a scene. The same numbers give the same scene, at any size the same story."""
    rng = np.random.default_rng(seed)
    poses, motions, cuts = choreograph(rng, frames)
    background = _Background(rng, frames)
    looks = {index: _Look.random(rng) for index in sorted(cuts) if index < frames}  # each shape's, by its first frame
    noise = np.float32(rng.uniform(0, 9))
    flicker = (1 + rng.uniform(0, 0.03) * rng.standard_normal(frames)).astype(np.float32)
    grain = np.random.default_rng(seed)
    drawn = np.empty((frames, size, size, 3), np.uint8)
    for index, (pose, canvas) in enumerate(zip(poses, background.draw(size), strict=True)):
        if index in looks:
            sprite = looks[index].sprite(size)
        if pose.opacity > 0:
            _paste(canvas, sprite, pose, background.shake[index])
        canvas += grain.standard_normal(canvas.shape, np.float32) * noise
        canvas *= flicker[index]
        drawn[index] = canvas.clip(0, 255)
    return Scene(drawn, name_frames(motions), *_measure(poses, cuts))


def name_frames(motions: np.ndarray) -> np.ndarray:
    """The label of each frame: what most of the last `GRACE` frames show, the newest where two tie. int64 [T]"""
    named = motions.copy()
    for index in range(len(motions)):
        recent = motions[max(0, index + 1 - GRACE) : index + 1]
        counts = np.bincount(recent, minlength=len(LABELS))
        best = np.flatnonzero(counts == counts.max())
        named[index] = next(motion for motion in recent[::-1] if motion in best)
    return named


def _measure(poses: list[Pose], cuts: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """`Scene.state` and `Scene.change` of poses."""
    x, y, radius, angle, opacity = np.array([(p.x, p.y, p.radius, p.angle, p.opacity) for p in poses]).T
    seen = opacity > 0
    state = np.stack([(x - 0.5) * 4, (y - 0.5) * 4, np.log(radius / 0.23) * 3, np.cos(angle), np.sin(angle), opacity])
    # the shape that a frame shows began at `first`; nothing is known of it before
    first = np.maximum.accumulate(np.where([index in cuts for index in range(len(poses))], np.arange(len(poses)), 0))
    before = np.maximum(np.arange(len(poses)) - LAG, first)
    scales = (1 / (SPEED[1] * LAG), 1 / (SPEED[1] * LAG), 1 / (np.log(GROWTH[1]) * LAG), 1 / (TURN[1] * LAG), 6.0)
    tracks = zip((x, y, np.log(radius), angle, opacity), scales, strict=True)
    change = np.stack([*((track - track[before]) * scale for track, scale in tracks), seen])
    return (state * seen).T.astype(np.float32), (change * seen).T.astype(np.float32)


def choreograph(rng: np.random.Generator, frames: int) -> tuple[list[Pose], np.ndarray, set[int]]:
    """One motion after another, each within the frame.

    Returns:
        The pose of each frame, the motion that led to it (int64 [T]), and the frames at which another shape begins.
    """
    poses: list[Pose] = []
    motions: list[int] = []
    cuts = {0}
    pose = _somewhere(rng)
    motion = "still"
    skip = int(rng.integers(0, 3 * LONGEST))  # so that a scene may begin in the middle of any motion
    while len(poses) < skip + frames:
        motion, path = _next_motion(rng, pose, motion)
        if motion == "appearing":
            cuts.add(len(poses))
        poses += path
        motions += [LABELS.index(motion)] * len(path)
        pose = path[-1]
    cuts = {max(0, cut - skip) for cut in cuts}
    return poses[skip : skip + frames], np.array(motions[skip : skip + frames], np.int64), cuts


def _somewhere(rng: np.random.Generator) -> Pose:
    radius = float(np.exp(rng.uniform(*np.log(RADIUS))))
    x, y = rng.uniform(radius, 1 - radius, 2)
    return Pose(float(x), float(y), radius, float(rng.uniform(0, 2 * np.pi)))


def _next_motion(rng: np.random.Generator, pose: Pose, last: str) -> tuple[str, list[Pose]]:
    length = int(rng.integers(SHORTEST, LONGEST + 1))
    if last == "disappearing":
        return "nothing", [replace(pose, opacity=0.0)] * int(rng.integers(*EMPTY))
    if last == "nothing":
        pose = _somewhere(rng)
        return "appearing", [replace(pose, opacity=FAINT + (1 - FAINT) * (step + 1) / length) for step in range(length)]
    # what needs room is often impossible, so it is tried more often
    tried = ["still", "clockwise", "anticlockwise", "disappearing", *NEED_ROOM * 2]
    for name in rng.permutation([name for name in tried if name != last]):
        path = _path(rng, pose, str(name), length)
        if len(path) >= SHORTEST:
            return str(name), path
    raise AssertionError("a shape can always stand still or disappear")


def _path(rng: np.random.Generator, pose: Pose, motion: str, length: int) -> list[Pose]:
    """The poses of a motion from `pose` on, as far as they stay within the frame."""
    speed, growth, turn = rng.uniform(*SPEED), rng.uniform(*GROWTH), rng.uniform(*TURN)
    path: list[Pose] = []
    for step in range(1, length + 1):
        match motion:
            case "left":
                moved = replace(pose, x=pose.x - speed * step)
            case "right":
                moved = replace(pose, x=pose.x + speed * step)
            case "up":
                moved = replace(pose, y=pose.y - speed * step)
            case "down":
                moved = replace(pose, y=pose.y + speed * step)
            case "approaching":
                moved = replace(pose, radius=pose.radius * growth**step)
            case "receding":
                moved = replace(pose, radius=pose.radius / growth**step)
            case "clockwise":
                moved = replace(pose, angle=pose.angle + turn * step)
            case "anticlockwise":
                moved = replace(pose, angle=pose.angle - turn * step)
            case "disappearing":
                moved = replace(pose, opacity=1 - (1 - FAINT) * step / length)
            case _:
                moved = pose
        margin = 0.7 * moved.radius
        if not (RADIUS[0] * 0.8 <= moved.radius <= RADIUS[1] * 1.1):
            break
        if not (margin <= moved.x <= 1 - margin and margin <= moved.y <= 1 - margin):
            break
        path.append(moved)
    return path


@dataclass(frozen=True)
class _Look:
    """What a shape looks like: two colours, so that it has a direction, and stripes."""

    shape: str
    colours: np.ndarray  # [2, 3]
    stripes: float  # a radius
    contrast: float

    @classmethod
    def random(cls, rng: np.random.Generator) -> _Look:
        # lighter than the background, one half by far; any hue
        levels = np.array([rng.uniform(215, 255), rng.uniform(100, 135)])
        hues = rng.uniform(0.7, 1.0, (2, 3))
        colours = levels[:, None] * hues / hues.max(-1, keepdims=True)
        return cls(str(rng.choice(SHAPES)), colours, rng.uniform(1, 3), rng.uniform(0, 0.15))

    def sprite(self, size: int) -> np.ndarray:
        """float32 [side, side, 4], premultiplied RGBA; the shape's radius is 0.4 sides."""
        side = max(24, size // 2)
        v, u = np.meshgrid(*[(np.arange(side) + 0.5) / side * 2.5 - 1.25] * 2, indexing="ij")  # radius is 1
        r = np.hypot(u, v)
        match self.shape:
            case "disc":
                inside = 1 - r
            case "square":
                inside = 0.85 - np.maximum(np.abs(u), np.abs(v))
            case "triangle":
                inside = np.minimum(0.6 - v, 0.5 * (v + 1.1) - np.abs(u) * 0.87)
            case "bar":
                inside = np.minimum(1.05 - np.abs(u), 0.5 - np.abs(v))
            case _:
                inside = np.minimum(1 - r, r - 0.45)
        alpha = np.clip(inside * side / 2.5 + 0.5, 0, 1)
        half = np.clip(u * side / 5 + 0.5, 0, 1)[..., None]
        rgb = self.colours[0] * half + self.colours[1] * (1 - half)
        rgb = rgb * (1 + self.contrast * np.sin(self.stripes * np.pi * v))[..., None]
        sprite = np.dstack([np.clip(rgb, 0, 255) * alpha[..., None], alpha]).astype(np.float32)
        return sprite


def _paste(canvas: np.ndarray, sprite: np.ndarray, pose: Pose, shake: np.ndarray) -> None:
    """Draw a sprite onto float32 [size, size, 3], in place."""
    size, side = canvas.shape[0], sprite.shape[0]
    scale = pose.radius * size / (0.4 * side)
    cos, sin = np.cos(pose.angle) * scale, np.sin(pose.angle) * scale
    centre = (side - 1) / 2
    x, y = (pose.x + shake[0]) * size - 0.5, (pose.y + shake[1]) * size - 0.5
    matrix = np.array([[cos, -sin, x - cos * centre + sin * centre], [sin, cos, y - sin * centre - cos * centre]])
    warped = cv2.warpAffine(sprite, matrix, (size, size), flags=cv2.INTER_LINEAR)
    canvas *= 1 - pose.opacity * warped[..., 3:]
    canvas += pose.opacity * warped[..., :3]


class _Background:
    """A texture, small things that stand or drift about, and the camera's shake [T, 2], in sides."""

    def __init__(self, rng: np.random.Generator, frames: int) -> None:
        self._grain = rng.uniform(-1, 1, (int(rng.integers(3, 14)),) * 2 + (3,)).astype(np.float32)
        mean = rng.uniform(15, 90)
        self.mean = mean * rng.uniform(0.6, 1.0, 3)
        self._contrast = rng.uniform(5, 30)
        self._stripes = (rng.uniform(0, 15), rng.uniform(0, 2 * np.pi), rng.uniform(2, 12))
        shake = np.zeros((frames, 2))
        strength = rng.uniform(0, 0.012) * (rng.random() < 0.6)
        for index in range(1, frames):
            shake[index] = 0.7 * shake[index - 1] + strength * rng.standard_normal(2) * 0.7
        self.shake = shake
        self._distractors = []
        for _ in range(rng.integers(0, 4)):
            start, drift = rng.uniform(0, 1, 2), rng.uniform(-0.012, 0.012, 2) * (rng.random() < 0.6)
            self._distractors.append((start, drift, rng.uniform(0.015, 0.035), rng.uniform(0, 255, 3)))

    def draw(self, size: int) -> Iterator[np.ndarray]:
        """Each frame, float32 [size, size, 3]."""
        margin = size // 8
        whole = size + 2 * margin
        grain = cv2.resize(self._grain, (whole, whole), interpolation=cv2.INTER_CUBIC) * self._contrast
        strength, angle, count = self._stripes
        y, x = np.meshgrid(*[(np.arange(whole) - margin) / size] * 2, indexing="ij")
        stripes = strength * np.sin(2 * np.pi * count * (x * np.cos(angle) + y * np.sin(angle)))
        picture = np.clip(self.mean + grain + stripes[..., None], 0, 255).astype(np.float32)
        for index, (dx, dy) in enumerate(self.shake * size):
            matrix = np.array([[1, 0, dx - margin], [0, 1, dy - margin]])
            canvas = cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_LINEAR)
            for start, drift, radius, colour in self._distractors:
                place = (start + drift * index) % 1.2 - 0.1
                centre = np.rint((place * size + (dx, dy)) * 16).astype(int).tolist()
                cv2.circle(canvas, centre, round(radius * size * 16), colour.tolist(), cv2.FILLED, cv2.LINE_8, 4)
            yield canvas
