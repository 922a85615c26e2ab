"""A synthetic scene with known ground truth: a shape that moves in one way after another.

The label of a frame is the motion going on, which no single frame shows: a model must remember to name it.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..errors import SourceError
from .frame import Frame, RgbImage, Source
from .opencv import require_cv2
from .sampling import Sampler

MOTIONS = ("still", "left", "right", "up", "down", "growing", "shrinking", "clockwise", "anticlockwise")
SHAPES = ("disc", "square", "triangle")
COLOURS = (
    (235, 70, 60),
    (70, 200, 90),
    (70, 120, 240),
    (240, 200, 60),
    (220, 90, 220),
    (80, 215, 220),
)  # RGB

# Sizes are fractions of the frame's short side; speeds are per second.
SMALLEST, LARGEST = 0.08, 0.24  # half the height of a shape
TRAVEL = 0.35
ORBIT = 0.20  # radius
TURN = math.pi  # angle
GROWTH = 1.5  # factor
SHORTEST, LONGEST = 0.8, 2.0  # seconds of one motion

LIMITS = {"seed": (0, 2**64 - 1), "frames": (1, 1_000_000), "width": (16, 16384), "height": (16, 16384)}
MOST_FPS = 1000

_SUBPIXEL = 4  # binary places of the coordinates that OpenCV draws at


@dataclass(frozen=True, slots=True)
class Truth:
    """What a synthetic frame shows."""

    label: str  # one of MOTIONS: how the shape moves from the frame before to this one
    shape: str  # one of SHAPES
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are exclusive


class SyntheticSource(Source):
    """`synthetic`, or with any of these options: `synthetic:seed=3,frames=300,width=320,height=240,fps=25`.

    The same options give the same frames, on any machine with the same OpenCV. The truth of a frame is
    `source.truth(frame.index)`. Frames come as fast as they are read.
    """

    live = False

    def __init__(self, spec: str, *, rate: float | None, on_report: Callable[[str], None]) -> None:
        super().__init__(spec, on_report)
        require_cv2()
        self.scene = _parse(spec)
        self.fps = self.scene.fps
        self.length = self.scene.frames
        self._sampler = Sampler(rate)
        self._next_index = 0
        rng = np.random.default_rng(self.scene.seed)
        self._background = _background(self.scene, rng)
        self._shape = str(rng.choice(SHAPES))
        self._colour = COLOURS[rng.integers(len(COLOURS))]
        self._choreography = _Choreography(self.scene, rng)
        self._report_rate_above_fps(rate)

    def read(self, timeout: float | None = None) -> Frame | None:
        while not self.ended:
            index = self._next_index
            if index == self.scene.frames:
                self.close()
                break
            self._next_index += 1
            timestamp = index / self.scene.fps
            if self._sampler.due(timestamp):
                return Frame(self.draw(index), index, timestamp, time.perf_counter())
        return None

    def close(self) -> None:
        self.ended = True

    def truth(self, index: int) -> Truth:
        """What frame `index` shows, whether or not it was read. Raises `IndexError` outside the scene."""
        pose = self._pose(index)
        reach = pose.radius + 1  # antialiasing
        left, top = max(0, math.floor(pose.x - reach)), max(0, math.floor(pose.y - reach))
        right = min(self.scene.width, math.ceil(pose.x + reach) + 1)
        bottom = min(self.scene.height, math.ceil(pose.y + reach) + 1)
        return Truth(pose.label, self._shape, (left, top, right, bottom))

    def draw(self, index: int) -> RgbImage:
        """Frame `index`, uint8 [height, width, 3] RGB. Raises `IndexError` outside the scene."""
        pose = self._pose(index)
        rgb = self._background.copy()
        _draw_shape(rgb, self._shape, self._colour, pose)
        return rgb

    def _pose(self, index: int) -> _Pose:
        if not 0 <= index < self.scene.frames:
            raise IndexError(f"frame {index} of a scene of {self.scene.frames}")
        return self._choreography.pose(index)


@dataclass(frozen=True, slots=True)
class _Scene:
    seed: int = 0
    frames: int = 300
    width: int = 320
    height: int = 240
    fps: float = 25.0


@dataclass(frozen=True, slots=True)
class _Pose:
    """The shape in one frame, in pixels; `label` is the motion that led there."""

    label: str
    x: float
    y: float
    radius: float


def _parse(spec: str) -> _Scene:
    options: dict[str, Any] = {}
    for option in filter(None, spec.partition(":")[2].split(",")):
        key, _, text = option.partition("=")
        if key not in {field.name for field in fields(_Scene)}:
            known = ", ".join(field.name for field in fields(_Scene))
            raise SourceError(f"source {spec}: unknown option {key!r}; the options are {known}")
        try:
            value = float(text) if key == "fps" else int(text)
        except ValueError as error:
            raise SourceError(f"source {spec}: {key} is {text!r}: must be a number") from error
        options[key] = value
    scene = _Scene(**options)
    for key, (least, most) in LIMITS.items():
        value = getattr(scene, key)
        if value < least:
            raise SourceError(f"source {spec}: {key} is {value}: must be at least {least}")
        if value > most:
            raise SourceError(f"source {spec}: {key} is {value}: must be at most {most}")
    if not 0 < scene.fps <= MOST_FPS:
        raise SourceError(f"source {spec}: fps is {scene.fps:g}: must be greater than 0 and at most {MOST_FPS}")
    return scene


@dataclass(frozen=True, slots=True)
class _Motion:
    """A motion from a pose, seen from frame `first` on; `angle` is where an orbit begins."""

    name: str
    first: int
    start: _Pose
    angle: float


class _Choreography:
    """Motions drawn at random, each from where the last one ended, all within the frame; drawn as far as frames are
    asked for.
    """

    def __init__(self, scene: _Scene, rng: np.random.Generator) -> None:
        self._scene = scene
        self._rng = rng
        self._side = min(scene.width, scene.height)
        radius = self._side * rng.uniform(SMALLEST, LARGEST)
        self._start = self._last = _Pose("still", scene.width / 2, scene.height / 2, radius)
        self._motions: list[_Motion] = []
        self._known = 1  # frames

    def pose(self, index: int) -> _Pose:
        """In frame `index`."""
        if index == 0:
            return self._start
        while self._known <= index:
            self._draw_motion()
        motion = self._motions[bisect_right(self._motions, index, key=lambda motion: motion.first) - 1]
        return self._moved(motion, index - motion.first + 1)

    def _draw_motion(self) -> None:
        steps = max(1, round(self._rng.uniform(SHORTEST, LONGEST) * self._scene.fps))
        angle = self._rng.uniform(0, 2 * math.pi)
        # In random order, so that the first that fits is a fair draw; standing still always fits.
        for name in [str(name) for name in self._rng.permutation(MOTIONS)] + ["still"]:
            motion = _Motion(name, self._known, self._last, angle)
            if name != "still" and name == self._last.label:
                continue
            if all(_fits(self._moved(motion, step), self._scene) for step in range(1, steps + 1)):
                break
        self._motions.append(motion)
        self._last = self._moved(motion, steps)
        self._known += steps

    def _moved(self, motion: _Motion, steps: int) -> _Pose:
        return _move(motion.start, motion.name, steps / self._scene.fps, motion.angle, self._side)


def _move(start: _Pose, motion: str, seconds: float, angle: float, side: int) -> _Pose:
    """Where a motion leads in some seconds. As y points down, growing angles turn clockwise."""
    x, y, radius = start.x, start.y, start.radius
    way = TRAVEL * side * seconds
    match motion:
        case "left":
            x -= way
        case "right":
            x += way
        case "up":
            y -= way
        case "down":
            y += way
        case "growing":
            radius *= GROWTH**seconds
        case "shrinking":
            radius /= GROWTH**seconds
        case "clockwise" | "anticlockwise":
            turned = angle + TURN * seconds * (1 if motion == "clockwise" else -1)
            x += ORBIT * side * (math.cos(turned) - math.cos(angle))
            y += ORBIT * side * (math.sin(turned) - math.sin(angle))
    return _Pose(motion, x, y, radius)


def _fits(pose: _Pose, scene: _Scene) -> bool:
    side = min(scene.width, scene.height)
    return (
        SMALLEST * side <= pose.radius <= LARGEST * side
        and pose.radius <= pose.x <= scene.width - 1 - pose.radius
        and pose.radius <= pose.y <= scene.height - 1 - pose.radius
    )


def _background(scene: _Scene, rng: np.random.Generator) -> RgbImage:
    """Soft grey clouds, [height, width, 3]: something to see, nothing that moves."""
    coarse = rng.uniform(60, 130, size=(6, 8)).astype(np.float32)
    cv2 = require_cv2()
    grey = cv2.resize(coarse, (scene.width, scene.height), interpolation=cv2.INTER_CUBIC)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def _draw_shape(rgb: RgbImage, shape: str, colour: tuple[int, int, int], pose: _Pose) -> None:
    cv2: Any = require_cv2()
    scale = 1 << _SUBPIXEL
    if shape == "disc":
        centre = (round(pose.x * scale), round(pose.y * scale))
        cv2.circle(rgb, centre, round(pose.radius * scale), colour, cv2.FILLED, cv2.LINE_AA, _SUBPIXEL)
        return
    corners = {"square": ((-1, -1), (1, -1), (1, 1), (-1, 1)), "triangle": ((0, -1), (1, 1), (-1, 1))}[shape]
    points = np.array([pose.x, pose.y]) + pose.radius * np.array(corners)
    cv2.fillPoly(rgb, [np.rint(points * scale).astype(np.int32)], colour, cv2.LINE_AA, _SUBPIXEL)
