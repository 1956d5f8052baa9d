"""Forms as a program shows them: fields with labels, buttons, checkboxes; drawn with Pillow and the font that it brings.

A form follows from its seed: what is on it, where, and in which colours. Pixels count from the upper left corner.
"""

from __future__ import annotations

import random
from io import BytesIO
from typing import Literal

import msgspec
from PIL import Image, ImageDraw, ImageFont

from everlearn.errors import InvalidRequest

Kind = Literal["field", "button", "checkbox"]
NAMES: dict[Kind, tuple[str, ...]] = {
    "field": ("Name", "Email", "Phone", "City", "Street", "Country", "Company", "Date", "Note", "Code"),
    "button": ("Save", "Cancel", "Send", "Delete", "Back", "Next", "Help", "Print", "Search", "Reset"),
    "checkbox": ("Agree", "Gift", "News", "Private", "Urgent", "Public", "Paid", "Draft", "Copy", "Sound"),
}
CELL_WIDTH, CELL_HEIGHT = 9.0, 2.4  # what a widget takes at least, in sizes of the font
SMALLEST_FONT = 9


class Widget(msgspec.Struct, frozen=True):
    """`box`: left, top, right, bottom of what reacts to a click; for a field the box to write in, without its label."""

    kind: Kind
    name: str
    box: tuple[float, float, float, float]

    def distance(self, x: float, y: float) -> float:
        """How many pixels a point is away from the box; 0 inside and on its edge."""
        left, top, right, bottom = self.box
        dx, dy = max(left - x, 0.0, x - right), max(top - y, 0.0, y - bottom)
        return float((dx * dx + dy * dy) ** 0.5)


class Form(msgspec.Struct, frozen=True):
    """`png` is the picture; names of widgets are unique on a form."""

    width: int
    height: int
    widgets: tuple[Widget, ...]
    png: bytes

    @property
    def diagonal(self) -> float:
        return float((self.width**2 + self.height**2) ** 0.5)


class Palette(msgspec.Struct, frozen=True):
    page: str
    ink: str
    box: str
    edge: str
    button: str
    button_ink: str


PALETTES = (
    Palette("#f4f4f6", "#202024", "#ffffff", "#8a8a94", "#3465c8", "#ffffff"),
    Palette("#ffffff", "#111111", "#fafafa", "#555555", "#dddddd", "#111111"),
    Palette("#22262e", "#e8e8ea", "#30353f", "#707886", "#4a9c6d", "#ffffff"),
    Palette("#fbf3e4", "#3a2c16", "#fffdf8", "#a68a5c", "#b4562c", "#ffffff"),
)


def make_form(seed: int | str, width: int, height: int, density: float = 0.8) -> Form:
    """A form of width x height pixels. `density`: the share of places that hold a widget; there are two at least.

    Raises InvalidRequest where there is no room for two places.
    """
    rng = random.Random(f"form:{seed}")
    font_size = max(SMALLEST_FONT, round(min(width, height) / 24))
    cells = _cells(rng, width, height, font_size)
    if len(cells) < 2:
        least = f"{round(CELL_WIDTH * font_size)} x {round(2 * CELL_HEIGHT * font_size)}"
        raise InvalidRequest(f"a form of {width} x {height} pixels has no room for two widgets; it needs {least} at least", param="size")
    chosen = sorted(rng.sample(range(len(cells)), max(2, round(density * len(cells)))))
    left = {kind: rng.sample(names, len(names)) for kind, names in NAMES.items()}
    picture = Image.new("RGB", (width, height))
    pen = _Pen(ImageDraw.Draw(picture), rng.choice(PALETTES), font_size)
    pen.draw.rectangle((0, 0, width, height), fill=pen.palette.page)
    widgets = []
    for index in chosen:
        kinds = [kind for kind, names in left.items() if names]
        if not kinds:
            break
        kind = rng.choice(kinds)
        widgets.append(pen.widget(rng, kind, left[kind].pop(), cells[index]))
    file = BytesIO()
    picture.save(file, "PNG")
    return Form(width, height, tuple(widgets), file.getvalue())


def _cells(rng: random.Random, width: int, height: int, font_size: int) -> list[tuple[float, float, float, float]]:
    """Lines of places; each line is divided anew, and the lines' heights vary."""
    cells = []
    least_height, least_width = CELL_HEIGHT * font_size, CELL_WIDTH * font_size
    top = rng.uniform(0, 0.5) * font_size
    while top + least_height <= height:
        bottom = min(float(height), top + least_height * rng.uniform(1.0, 1.4))
        columns = rng.randint(1, max(1, int(width // least_width)))
        for column in range(columns if width >= least_width else 0):
            cells.append((width * column / columns, top, width * (column + 1) / columns, bottom))
        top = bottom
    return cells


class _Pen:
    def __init__(self, draw: ImageDraw.ImageDraw, palette: Palette, font_size: int):
        self.draw, self.palette, self.size = draw, palette, font_size
        self.font = ImageFont.load_default(font_size)

    def widget(self, rng: random.Random, kind: Kind, name: str, cell: tuple[float, float, float, float]) -> Widget:
        """Draws it within its cell, and says where it reacts to a click."""
        left, top, right, bottom = cell
        middle, half, gap = (top + bottom) / 2, 0.85 * self.size, 0.5 * self.size
        text = self.font.getlength(name)
        if kind == "button":
            wide = min(text + 2 * self.size, right - left - 2 * gap)
            start = rng.uniform(left + gap, right - gap - wide)
            box = (start, middle - half, start + wide, middle + half)
            self.draw.rounded_rectangle(box, radius=self.size / 3, fill=self.palette.button, outline=self.palette.edge)
            self.draw.text((start + wide / 2, middle), name, font=self.font, fill=self.palette.button_ink, anchor="mm")
        elif kind == "field":
            start = left + gap + text + gap
            box = (start, middle - half, max(start + self.size, right - gap - rng.uniform(0, (right - start - gap) / 3)), middle + half)
            self.draw.text((left + gap, middle), name, font=self.font, fill=self.palette.ink, anchor="lm")
            self.draw.rectangle(box, fill=self.palette.box, outline=self.palette.edge)
        else:
            square = self.size
            start = rng.uniform(left + gap, max(left + gap, right - 2 * gap - square - text))
            tick = (start, middle - square / 2, start + square, middle + square / 2)
            self.draw.rectangle(tick, fill=self.palette.box, outline=self.palette.edge)
            self.draw.text((start + square + gap, middle), name, font=self.font, fill=self.palette.ink, anchor="lm")
            box = (start, middle - square / 2, start + square + gap + text, middle + square / 2)
        return Widget(kind, name, box)
