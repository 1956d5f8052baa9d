"""Images of requests: what is decoded, what is refused before it costs anything, and where the server never connects to."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from PIL import Image as Pillow

from everlearn.config import ImageSettings
from everlearn.errors import InvalidRequest, TooLarge, Unavailable, Unsupported
from everlearn.render import images

SETTINGS = ImageSettings()
OPEN = ImageSettings(remote=True, max_bytes=4_000, timeout_seconds=2.0)


def picture(format: str = "PNG", size: tuple[int, int] = (8, 4)) -> bytes:
    out = BytesIO()
    Pillow.new("RGB", size, (200, 30, 30)).save(out, format)
    return out.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large and has hardly any pixels."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(1_000)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    )


@pytest.mark.parametrize("format", images.FORMATS)
def test_known_formats_are_decoded_whatever_the_url_calls_them(format: str):
    image = images.decode(data_url(picture(format)), SETTINGS)
    assert (image.format, image.width, image.height) == (format, 8, 4)
    assert Pillow.open(BytesIO(image.data)).size == (8, 4)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("https://example.com/a.png", InvalidRequest),
        ("data:image/png,plain", InvalidRequest),
        ("data:image/png;base64,!!!!", InvalidRequest),
        ("data:" + "a/" * 100_000 + ";base64,", InvalidRequest),
        (data_url(b""), InvalidRequest),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), InvalidRequest),
        (data_url(b"%PDF-1.7"), InvalidRequest),
        (data_url(picture()[:40]), InvalidRequest),
        (data_url(picture("BMP")), InvalidRequest),
        (data_url(png_header(50_000, 50_000)), TooLarge),
        (data_url(png_header(10_000, 10_000)), TooLarge),
        (data_url(png_header(2**31 - 1, 2**31 - 1)), TooLarge),
        (data_url(b"\0" * (21 * 2**20)), TooLarge),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_images_are_refused(url: str, error: type[Exception]):
    with pytest.raises(error, match=r"messages\[0\]") as caught:
        images.decode(url, SETTINGS, "messages[0].content[1]")
    assert caught.value.param == "messages[0].content[1]"


def test_limits_are_settings():
    with pytest.raises(TooLarge, match=r"images\.max_pixels"):
        images.decode(data_url(picture(size=(30, 30))), ImageSettings(max_pixels=800))
    with pytest.raises(TooLarge, match=r"images\.max_bytes"):
        images.decode(data_url(picture()), ImageSettings(max_bytes=20))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_never_connected_to(address: str):
    assert not images.is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1"])
def test_addresses_of_the_internet(address: str):
    assert images.is_public(address)


# ---- fetching, from a server of the test's own ----


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        host = self.headers["Host"]
        redirects = {"/again": "/again", "/once": "/image", "/inside": "http://127.0.0.1:1/", "/file": "file:///etc/passwd"}
        if path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[path])
            self.end_headers()
            return
        self.send_response(404 if path == "/missing" else 200)
        if path == "/zipped":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that has had enough hangs up
            if path == "/endless":
                while True:
                    self.wfile.write(b"x" * 1_000)
            elif path == "/slow":
                threading.Event().wait(4)
            else:
                self.wfile.write(picture() if path != "/text" else f"hello {host}".encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(url: str, settings: ImageSettings = OPEN, here: bool = True) -> images.Image:
    """With `here`, the machine's own address is allowed, as the internet is otherwise."""
    allowed = (lambda address: address == "127.0.0.1") if here else images.is_public
    return asyncio.run(images.fetch(url, settings, "messages[0]", allowed))


def test_remote_images_are_off_unless_the_owner_wants_them(host: str):
    with pytest.raises(Unsupported, match=r"images\.remote"):
        fetch(f"{host}/image", SETTINGS)
    assert fetch(f"{host}/image").format == "PNG"
    assert fetch(f"{host}/once").width == 8


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_this_machine_is_not_the_internet(host: str, name: str):
    with pytest.raises(InvalidRequest, match=r"messages\[0\]"):
        fetch(host.replace("127.0.0.1", name) + "/image", here=False)


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("/missing", InvalidRequest, "404"),
        ("/zipped", InvalidRequest, "200 and no image"),
        ("/text", InvalidRequest, "no image"),
        ("/again", InvalidRequest, "redirected more than 3"),
        ("/inside", InvalidRequest, "can't be fetched|public internet"),
        ("/file", InvalidRequest, "no URL that this server fetches"),
        ("/endless", TooLarge, "4000 bytes"),
        ("/slow", Unavailable, "within 2 s"),
    ],
)
def test_what_another_host_may_answer(host: str, path: str, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        fetch(host + path)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a/b",
        "http://",
        "http://user:pass@127.0.0.1/",
        "http://127.0.0.1:99999/",
        "http://a b/",
        "http://ä.example/",
        "http://h/\r\nX: y",
    ],
)
def test_urls_that_are_not_even_tried(url: str):
    with pytest.raises(InvalidRequest):
        fetch(url)
