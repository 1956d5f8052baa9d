"""Images in requests: from a data URL or, where the owner allows it, from another host; checked before they cost anything.

An image is refused by its format, its bytes and its pixels, read from its header, before a pixel is decoded. A remote host is looked up
once and the connection goes to an address that was checked, so that neither a redirect nor a name that changes its address leads into
the server's own network. Models that read text alone refuse images by name (`everlearn/render/template.py`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextvars
import ipaddress
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

import msgspec

from everlearn.config import ImageSettings
from everlearn.errors import InvalidRequest, TooLarge, Unavailable, Unsupported

if TYPE_CHECKING:
    import httpcore
    from PIL.Image import Image as Pillow

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_REDIRECTS = 3
ORIENTATION = 0x0112  # an EXIF tag, and Pillow's name for what undoes each of its values; from SIDEWAYS on the sides change places
TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
SIDEWAYS = 5
DATA_URL = re.compile(r"data:([\w.+/-]{0,64})(;[\w.=+-]{1,64}){0,4};base64,", re.ASCII)
# Prefixes whose addresses hold an IPv4 address that the packet ends up at.
NAT64 = ipaddress.ip_network("64:ff9b::/96")
T = TypeVar("T")

# A small file can be a large image, and each may take images.max_pixels of memory for a moment: these threads are as many as are decoded
# at a time. They are images' own: what waits for its turn must not hold a thread that reads of the store are waiting for.
_decoders = ThreadPoolExecutor(2, thread_name_prefix="images")
_lookups = ThreadPoolExecutor(4, thread_name_prefix="lookups")  # of hosts: nothing ends one before its resolver gives up


class Image(msgspec.Struct, frozen=True):
    """An image whose header was checked and whose pixels can be decoded. Sides as it is looked at: turned as its EXIF says."""

    format: str
    width: int
    height: int
    data: bytes
    animated: bool = False


def decode(data_url: str, settings: ImageSettings, param: str = "messages") -> Image:
    """The image of a `data:image/...;base64,` URL. `param` names the part of the request in errors."""
    return inspect(data_of(data_url, settings, param), settings, param)


def data_of(data_url: str, settings: ImageSettings, param: str = "messages") -> bytes:
    """The file in a data URL, not looked at yet."""
    head = DATA_URL.match(data_url)
    if head is None:
        raise InvalidRequest(f"{param} is no data URL of an image; send data:image/png;base64,...", param=param)
    if (len(data_url) - head.end()) * 3 // 4 > settings.max_bytes + 2:
        raise TooLarge(f"{param} has more than {settings.max_bytes} bytes (images.max_bytes); send a smaller image", param=param)
    try:
        return base64.b64decode(data_url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"{param} is not valid base64: {error}", param=param) from None


async def look_at(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, which looks at images, in one of the threads that decode them."""
    call = partial(contextvars.copy_context().run, function, *args)
    return await asyncio.get_running_loop().run_in_executor(_decoders, call)


def inspect(data: bytes, settings: ImageSettings, param: str = "messages") -> Image:
    """Checks format, bytes and pixels, then decodes once to see that the image is whole. CPU work: call it in a thread."""
    from PIL import Image as Files
    from PIL import UnidentifiedImageError

    if len(data) > settings.max_bytes:
        raise TooLarge(f"{param} has {len(data)} bytes; {settings.max_bytes} is the limit (images.max_bytes)", param=param)
    try:
        with Files.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > settings.max_pixels:
                raise TooLarge(
                    f"{param} has {width} x {height} pixels; {settings.max_pixels} in all is the limit (images.max_pixels)", param=param
                )
            image.load()
            animated = bool(getattr(image, "is_animated", False))
            if turn_of(image) >= SIDEWAYS:
                width, height = height, width
            return Image(str(image.format), width, height, data, animated)
    except UnidentifiedImageError:
        raise InvalidRequest(f"{param} is no image of a known format; {', '.join(FORMATS)} are", param=param) from None
    except (Files.DecompressionBombError, Files.DecompressionBombWarning):
        raise TooLarge(f"{param} has more than {settings.max_pixels} pixels (images.max_pixels)", param=param) from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise InvalidRequest(f"{param} is a broken image: {error}", param=param) from None


def turn_of(image: Pillow) -> int:
    """How its EXIF says that it lies, 1 to 8. A file may say anything there: what is none of these numbers is 1, as it is."""
    found = image.getexif().get(ORIENTATION)
    return int(found) if found in TURNS else 1


def upright(image: Pillow) -> Pillow:
    """The image as it is looked at. Pillow's own exif_transpose also writes the EXIF anew, and fails where that holds odd values."""
    from PIL.Image import Transpose

    turn = turn_of(image)
    return image.transpose(Transpose[TURNS[turn]]) if turn in TURNS else image


# ---- other hosts ----


def is_public(address: str) -> bool:
    """Whether packets to `address` leave for the internet: not this machine, its network, a cloud's metadata or a multicast group."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo[1] if parsed.teredo else None)
        if parsed in NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return parsed.is_global and not parsed.is_multicast


async def fetch(url: str, settings: ImageSettings, param: str = "messages", allowed: Callable[[str], bool] = is_public) -> Image:
    """The image at an http(s) URL. Raises Unsupported where the owner didn't allow remote images (images.remote)."""
    if not settings.remote:
        raise Unsupported(f"{param} is the URL of another host; this server fetches none (images.remote), send a data URL", param=param)
    try:
        async with asyncio.timeout(settings.timeout_seconds):
            data = await _download(url, settings, param, allowed)
    except TimeoutError:
        limit = f"{settings.timeout_seconds:g} s (images.timeout_seconds)"
        raise Unavailable(f"{param} did not arrive within {limit}; send it as a data URL", param=param) from None
    return await look_at(inspect, data, settings, param)


async def _download(url: str, settings: ImageSettings, param: str, allowed: Callable[[str], bool]) -> bytes:
    import httpcore

    async with httpcore.AsyncConnectionPool(network_backend=_guarded(allowed, param), retries=0, max_connections=1) as pool:
        for _ in range(MAX_REDIRECTS + 1):
            _check_url(url, param)
            headers: dict[bytes | str, bytes | str] = {
                "Host": urlsplit(url).netloc,
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "everlearn",
            }
            try:
                async with pool.stream("GET", url, headers=headers) as response:
                    found = {name.lower(): value for name, value in response.headers}
                    if response.status in (301, 302, 303, 307, 308) and b"location" in found:
                        url = urljoin(url, found[b"location"].decode("latin-1"))
                        continue
                    if response.status != 200 or found.get(b"content-encoding", b"identity") != b"identity":
                        raise InvalidRequest(f"{param}: the host answered {response.status} and no image", param=param)
                    return await _read(response.aiter_stream(), settings, param)
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, httpcore.TimeoutException) as error:
                raise InvalidRequest(f"{param} can't be fetched: {type(error).__name__} {error}", param=param) from None
        raise InvalidRequest(f"{param} is redirected more than {MAX_REDIRECTS} times", param=param)


def _check_url(url: str, param: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and not parts.username and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or any(character <= " " for character in url):
        raise InvalidRequest(f"{param} is no URL that this server fetches; https://host/path is", param=param)


async def _read(pieces: AsyncIterator[bytes], settings: ImageSettings, param: str) -> bytes:
    data = bytearray()
    async for piece in pieces:
        data += piece
        if len(data) > settings.max_bytes:
            raise TooLarge(f"{param} has more than {settings.max_bytes} bytes (images.max_bytes)", param=param)
    return bytes(data)


def _guarded(allowed: Callable[[str], bool], param: str) -> httpcore.AsyncNetworkBackend:
    """A network that looks a host up once, refuses it if any of its addresses isn't allowed, and connects to the address it checked."""
    import httpcore

    class Guarded(httpcore.AsyncNetworkBackend):
        def __init__(self) -> None:
            self.network = httpcore.AnyIOBackend()

        async def connect_tcp(
            self,
            host: str,
            port: int,
            timeout: float | None = None,
            local_address: str | None = None,
            socket_options: Iterable[Any] | None = None,
        ) -> httpcore.AsyncNetworkStream:
            try:
                look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
                found = await asyncio.get_running_loop().run_in_executor(_lookups, look_up)
            except (OSError, UnicodeError):
                raise InvalidRequest(f"{param}: the host {host[:200]!r} is not known", param=param) from None
            addresses = [str(entry[4][0]) for entry in found]
            if not addresses or not all(map(allowed, addresses)):
                raise InvalidRequest(f"{param}: the host {host[:200]!r} is not on the public internet", param=param)
            return await self.network.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

        async def sleep(self, seconds: float) -> None:
            await asyncio.sleep(seconds)

    return Guarded()
