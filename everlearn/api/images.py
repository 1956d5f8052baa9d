"""The images of one request: is each what it says, does this model see it, how many tokens does it take, is it all not too much?

What is wrong with an image is found here, from its header where that is enough; the engine gets files that can be decoded and grids that
fit them. CPU work: reading a request with images is for `look_at` (everlearn/render/images.py).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Any, NamedTuple

import numpy as np

from everlearn.config import ImageSettings
from everlearn.errors import InvalidRequest, TooLarge, Unsupported
from everlearn.render import images
from everlearn.render.patches import grid_of, seen_pixels
from everlearn.types import BaseModelInfo, ImageSpan, VisionInfo

LOW_DETAIL = 512 * 512  # pixels that an image of detail "low" is seen with
LONG_URL = 256 * 1024  # characters; decoding more of them would hold up the event loop


class ImageReader:
    """Reads images for one base model and counts their pixels against images.request_pixels. One for each request."""

    def __init__(self, info: BaseModelInfo, settings: ImageSettings):
        self.info, self.settings = info, settings
        self.pixels = 0

    def vision(self, param: str) -> VisionInfo:
        """How the model takes images. Raises Unsupported where it takes none."""
        if self.info.vision is None:
            raise Unsupported(
                f"{param} holds an image; {self.info.name} reads text alone: send text, or choose a model that sees", param=param
            )
        return self.info.vision

    def read(
        self, data: bytes, start: int, param: str, *, format: str = "", expected: int | None = None, max_pixels: int | None = None
    ) -> ImageSpan:
        """Where the image stands among tokens. `format` (PNG, JPEG) is what the client says that it is, `expected` how many tokens it
        counts with; `max_pixels` bounds the image that the model sees closer than the model's own settings."""
        vision = self.vision(param)
        image = images.inspect(data, self.settings, param)
        if format and image.format != format:
            raise InvalidRequest(f"{param} is said to be a {format} and is a {image.format}; send its true format", param=param)
        if image.animated:
            raise InvalidRequest(f"{param} is an animation; a model sees one picture: send the frame that you mean", param=param)
        rows, columns = grid_of(image.width, image.height, vision, param, max_pixels)
        if expected is not None and expected != rows * columns:
            raise InvalidRequest(
                f"{param}.expected_tokens is {expected}; an image of {image.width} x {image.height} pixels takes {rows * columns} tokens "
                f"({rows} x {columns}) of {self.info.name}: count with its image processor, or leave expected_tokens out",
                param=f"{param}.expected_tokens",
            )
        self._count(image, seen_pixels(rows, columns, vision), param)
        if start + rows * columns > self.info.max_context:
            raise InvalidRequest(
                f"{param} takes {rows * columns} tokens after {start} others; {self.info.name} reads at most {self.info.max_context}: "
                "send a smaller image",
                param=param,
                code="context_length_exceeded",
            )
        return ImageSpan(start, rows, columns, data)

    def placeholder(self, span: ImageSpan) -> np.ndarray:
        """int32: the tokens that stand for the image."""
        return np.full(span.num_tokens, self.vision("image").image, np.int32)

    def _count(self, image: images.Image, seen: int, param: str) -> None:
        self.pixels += max(image.width * image.height, seen)
        if self.pixels > self.settings.request_pixels:
            raise TooLarge(
                f"{param}: the request's images have more than {self.settings.request_pixels} pixels in all (images.request_pixels); "
                "send them in several requests",
                param=param,
            )


def from_base64(text: str, settings: ImageSettings, param: str) -> bytes:
    if len(text) * 3 // 4 > settings.max_bytes + 2:
        raise TooLarge(f"{param} has more than {settings.max_bytes} bytes (images.max_bytes); send a smaller image", param=param)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{param} is not valid base64: {error}", param=param) from None


async def load(url: str, settings: ImageSettings, param: str) -> bytes:
    """The file at a data URL, or at another host's where the owner allows that (images.remote)."""
    if url.startswith("data:"):
        if len(url) > LONG_URL:
            return await asyncio.to_thread(images.data_of, url, settings, param)
        return images.data_of(url, settings, param)
    if not url.startswith(("http://", "https://")):
        raise Unsupported(f"{param} is neither a data URL nor one of another host; this server opens no files for its clients", param=param)
    return (await images.fetch(url, settings, param)).data


# ---- images of a conversation ----


class Picture(NamedTuple):
    """An image of a message, read and not decoded. `max_pixels`: as its sender wants it seen."""

    data: bytes
    param: str
    max_pixels: int | None


async def take_pictures(messages: list[dict[str, Any]], reader: ImageReader, most_bytes: int) -> tuple[list[dict[str, Any]], list[Picture]]:
    """The messages with a bare `image` part for every image, and the images in their order: `most_bytes` (api.max_body_bytes) together,
    because an address is short and its image isn't. Raises Unsupported for a model that reads text alone."""
    shown: list[dict[str, Any]] = []
    pictures: list[Picture] = []
    num_bytes = 0
    for place, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list) and any(part.get("type") == "image_url" for part in content):
            parts: list[dict[str, Any]] = []
            for number, part in enumerate(content):
                if part.get("type") == "image_url":
                    pictures.append(await _picture(part["image_url"], reader, f"messages[{place}].content[{number}]"))
                    num_bytes += len(pictures[-1].data)
                    if num_bytes > most_bytes:
                        what = "the request's images have more bytes than a request may have (api.max_body_bytes)"
                        raise TooLarge(f"{pictures[-1].param}: {what}; send them in several requests", param=pictures[-1].param)
                    part = {"type": "image"}
                parts.append(part)
            message = {**message, "content": parts}
        shown.append(message)
    return shown, pictures


async def _picture(given: dict[str, Any], reader: ImageReader, param: str) -> Picture:
    reader.vision(param)
    data = await load(given["url"], reader.settings, param)
    return Picture(data, param, LOW_DETAIL if given.get("detail") == "low" else None)


def place_pictures(prompt: list[int], pictures: list[Picture], reader: ImageReader) -> tuple[list[int], list[ImageSpan]]:
    """The prompt with as many tokens in place of each image token as its image takes. CPU work."""
    if not pictures:
        return prompt, []
    token = reader.vision(pictures[0].param).image
    places = [i for i, number in enumerate(prompt) if number == token]
    if len(places) != len(pictures):
        raise InvalidRequest(
            f"messages show {len(pictures)} images, and the chat template makes {len(places)} places for them; "
            "leave the image token out of the assistant's texts, and images out of messages that the model can't see them in",
            param="messages",
        )
    whole: list[int] = []
    spans: list[ImageSpan] = []
    for place, before, picture in zip(places, [-1, *places], pictures, strict=False):
        whole += prompt[before + 1 : place]
        spans.append(reader.read(picture.data, len(whole), picture.param, max_pixels=picture.max_pixels))
        whole += [token] * spans[-1].num_tokens
    return whole + prompt[places[-1] + 1 :], spans
