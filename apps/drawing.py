"""Drawing onto a picture: sizes, text, panels and colours, for pictures of any size.

Colours are BGR, as OpenCV has them.
"""

from __future__ import annotations

import colorsys
import unicodedata
from bisect import bisect_right

import cv2
import numpy as np

Colour = tuple[int, int, int]  # BGR

SMALLEST_WIDTH = 640
MOST_ENLARGED = 4096  # height to which a narrow picture is enlarged
FONT = cv2.FONT_HERSHEY_SIMPLEX
DRAWS_UNICODE = hasattr(cv2, "FontFace")  # from OpenCV 5 on; before, its fonts hold no more than ASCII
WHITE: Colour = (245, 245, 245)
GREY: Colour = (170, 170, 170)
PANEL: Colour = (26, 24, 22)
# Letters that Unicode does not take apart into a plain one and an accent
WITHOUT_ACCENTS = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D", "ł": "l", "Ł": "L"}
    | {"ı": "i", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'}
)
# Okabe and Ito's colours, told apart with every kind of colour vision, in BGR
DISTINCT: tuple[Colour, ...] = (
    (0, 159, 230),
    (233, 180, 86),
    (115, 158, 0),
    (66, 228, 240),
    (178, 114, 0),
    (0, 94, 213),
    (167, 121, 204),
    (150, 150, 150),
)


def enlarged(bgr: np.ndarray) -> np.ndarray:
    """`bgr` at least 640 pixels wide, with even sides (video codecs want them), but not enlarged to just any height."""
    height, width = bgr.shape[:2]
    scale = max(1.0, SMALLEST_WIDTH / width)
    size = (_even(width * scale), _even(min(height * scale, max(height, MOST_ENLARGED))))
    if size == (width, height):
        return bgr
    return cv2.resize(bgr, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_LINEAR)


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))


def text_unit(width: int) -> float:
    """Scale of text and margins: 1 at 640 pixels, growing more slowly than the picture."""
    return (width / SMALLEST_WIDTH) ** 0.8


def blend(canvas: np.ndarray, colour: np.ndarray, opacity: np.ndarray) -> None:
    """canvas = canvas + opacity * (colour - canvas), in place; opacity is float32 [height, width]."""
    # blendLinear divides by the sum of the weights, which is 1
    canvas[:] = cv2.blendLinear(colour, canvas, opacity, 1 - opacity)


def darken(canvas: np.ndarray, left: int, top: int, width: int, height: int) -> None:
    """Darkens a rectangle so that text on it can be read."""
    part = canvas[top : top + height, left : left + width]
    if not part.size:  # a picture of a few rows
        return
    background = np.empty_like(part)
    background[:] = PANEL
    part[:] = cv2.addWeighted(part, 0.28, background, 0.72, 0)


def put_text(canvas: np.ndarray, text: str, left: int, baseline: int, scale: float, colour: Colour) -> None:
    """Draws a line of text as far as this OpenCV has letters for it; `baseline` is a row of `canvas`."""
    cv2.putText(canvas, _drawable(text), (left, baseline), FONT, scale, colour, _stroke(scale), cv2.LINE_AA)


def text_width(text: str, scale: float) -> int:
    """Pixels that `put_text` takes."""
    return int(cv2.getTextSize(_drawable(text), FONT, scale, _stroke(scale))[0][0])


def shortened(text: str, scale: float, room: int) -> str:
    """`text`, cut to `room` pixels where it is longer."""
    if text_width(text, scale) <= room:
        return text
    count = bisect_right(range(len(text)), room, key=lambda count: text_width(text[:count] + "...", scale)) - 1
    return text[: max(0, count)] + "..."


def _drawable(text: str) -> str:
    """What this OpenCV can draw of a text: all of it, or its letters without their accents."""
    # A line break has no glyph, and half a surrogate pair cannot be handed to OpenCV at all.
    text = "".join(c if c.isprintable() else " " for c in text)
    if DRAWS_UNICODE or text.isascii():
        return text
    plain = unicodedata.normalize("NFKD", text.translate(WITHOUT_ACCENTS))
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def _stroke(scale: float) -> int:
    return 2 if scale > 0.9 else 1


def distinct_colours(count: int) -> list[Colour]:
    """Colours for so many labels, the first eight the easiest to tell apart."""
    colours = list(DISTINCT[:count])
    for i in range(len(colours), count):  # hues at the golden angle stay apart however many there are
        red, green, blue = colorsys.hsv_to_rgb((0.11 + i * 0.618034) % 1, 0.55 + 0.3 * (i % 2), 0.95)
        colours.append((round(255 * blue), round(255 * green), round(255 * red)))
    return colours
