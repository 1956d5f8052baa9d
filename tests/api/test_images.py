"""Images of a conversation, before any of them is decoded."""

from __future__ import annotations

import asyncio
import base64

import pytest

from everlearn.api.images import LONG_URL, ImageReader, take_pictures
from everlearn.config import ImageSettings
from everlearn.errors import TooLarge
from everlearn.types import BaseModelInfo
from tests.tiny_vision import VISION


def test_images_of_a_request_are_bounded_together() -> None:
    """An address is short and its image isn't, so the size of the request says nothing."""
    info = BaseModelInfo("tiny", "/nowhere", "Qwen3VLForConditionalGeneration", 512, 64, 512, [0], vision=VISION)
    files = [b"1" * LONG_URL, b"2" * 1000]  # the first is decoded in a thread
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(f).decode()}"}} for f in files]
    messages = [{"role": "user", "content": parts}]
    reader = ImageReader(info, ImageSettings())
    shown, pictures = asyncio.run(take_pictures(messages, reader, LONG_URL + 1000))
    assert [picture.data for picture in pictures] == files and shown[0]["content"] == [{"type": "image"}] * 2
    with pytest.raises(TooLarge, match=r"content\[1\].*api\.max_body_bytes"):
        asyncio.run(take_pictures(messages, reader, LONG_URL + 999))
