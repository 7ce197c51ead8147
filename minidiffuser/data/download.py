"""Downloading from strangers: what img2dataset does, with the doors locked.

`img2dataset` shards a list of URLs, downloads with many threads and processes (or Spark, or Ray),
and writes parquet.  It follows any redirect to any scheme and address, waits for a slow server
without end and decodes whatever arrives.  Two of its classes are replaced here, and travel to its
worker processes by pickle:

    SafeDownloader   http and https only, no private addresses, an end in time and in size
    SafeResizer      decodes with Pillow: known formats, a limit of pixels, upright, on white

Run as ``python -m minidiffuser.data.download settings.json``, it is the process behind
:func:`minidiffuser.data.fetch.fetch`.
"""

import fcntl
import http.client
import importlib
import io
import ipaddress
import json
import os
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote, urljoin, urlsplit

from PIL import Image

from ..images import load_image

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network
try:
    from img2dataset.downloader import Downloader, is_disallowed
    from img2dataset.main import download as img2dataset_download
    from img2dataset.resizer import Resizer
except ImportError as error:
    raise ValueError(f"fetching needs img2dataset ({error}): pip install 'minidiffuser[fetch]'"
                     ) from None

HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; minidiffuser, with img2dataset)",
           "Accept": "image/*", "Connection": "close"}
CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses in IPv6's clothes


class Refused(Exception):
    """A download that is not made or not finished, and why, in few words."""


@dataclass
class Limits:
    """What a download may take.

    Args:
        timeout: seconds without a sign of life. deadline: seconds for all of it, with redirects.
        max_bytes: of a file. max_pixels: of an image. min_side: pixels of its shorter side.
        redirects: how many are followed.
        allow_hosts: hosts that may have a private address, as their URLs write them.
        rate: requests begun per second by this process; None for no limit.
    """

    timeout: float = 10.0
    deadline: float = 30.0
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    min_side: int = 2
    redirects: int = 5
    allow_hosts: tuple[str, ...] = ()
    rate: float | None = None


# ---- the network ---------------------------------------------------------------------------------


@dataclass
class Turn:
    """Lets requests begin at a steady rate, over all threads of a process."""

    rate: float | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    next: float = 0.0

    def wait(self) -> None:
        if self.rate is None:
            return
        with self.lock:
            begin = self.next = max(self.next + 1 / self.rate, time.monotonic())
        time.sleep(max(0.0, begin - time.monotonic()))


def check_address(address: str) -> None:
    """Raise Refused for an address that is not on the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = [ip]
    if ip.version == 6:  # addresses of version 4 wrapped in one of version 6
        inner += [i for i in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())) if i]
        if ip in NAT64:
            inner.append(ipaddress.ip_address(int(ip) & 0xFFFFFFFF))
    if any(not i.is_global or i.is_multicast for i in inner):
        raise Refused("private address")


def connect(host: str, port: int, limits: Limits) -> socket.socket:
    """A connection to an address that was checked.

    The name is resolved once and the checked address is the one connected to: a name that changes
    its answer in between (DNS rebinding) gains nothing.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise Refused("unknown host") from None
    if host not in limits.allow_hosts:
        for *_, address in found:
            check_address(address[0])
    for family, kind, protocol, _, address in found:
        wire = socket.socket(family, kind, protocol)
        wire.settimeout(limits.timeout)
        try:
            wire.connect(address)
            return wire
        except OSError as error:
            wire.close()
            reason = "timed out" if isinstance(error, TimeoutError) else "connection failed"
    raise Refused(reason)


class Guard:
    """Ends a connection at the deadline, whatever it is waiting for: a drip is never idle."""

    def __init__(self, wire: socket.socket, seconds: float):
        self.wire, self.expired = wire, False
        self.timer = threading.Timer(max(0.0, seconds), self.end)
        self.timer.daemon = True

    def end(self) -> None:
        self.expired = True
        with suppress(OSError):  # it may have ended by itself
            self.wire.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Guard":
        self.timer.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.timer.cancel()
        self.wire.close()
        if self.expired:
            raise Refused("too slow") from None


def download(url: str, limits: Limits, directives: set[str] | None = None) -> bytes:
    """The file at a URL.

    Args:
        directives: values of the header X-Robots-Tag that forbid the use of an image.

    Raises:
        Refused: it was not to be had, with the reason.
    """
    end = time.monotonic() + limits.deadline
    for _ in range(limits.redirects + 1):
        parts = checked_url(url)
        host, port = parts.hostname, parts.port or CONNECTIONS[parts.scheme].default_port
        wire = connect(host, port, limits)
        with Guard(wire, end - time.monotonic()) as guard:
            if parts.scheme == "https":
                guard.wire = ssl.create_default_context().wrap_socket(
                    wire, server_hostname=host, do_handshake_on_connect=False)
                guard.wire.do_handshake()
            connection = CONNECTIONS[parts.scheme](host, port)
            connection.sock = guard.wire
            connection.request("GET", target_of(parts), headers=HEADERS)
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308) and response.headers["Location"]:
                url = urljoin(url, response.headers["Location"])
                continue
            if response.status != 200:
                raise Refused(f"http {response.status}")
            if directives and is_disallowed(response.headers, "minidiffuser", directives):
                raise Refused("disallowed by X-Robots-Tag")
            return read_image(response, limits)
    raise Refused("too many redirects")


def checked_url(url: str):
    """The parts of a URL that may be asked for: http or https, ASCII host, valid port."""
    try:
        parts = urlsplit((url or "").strip())
        scheme, host, _ = parts.scheme.lower(), parts.hostname, parts.port
        if scheme not in ("http", "https"):
            raise Refused(f"scheme {scheme or 'missing'}")
        if not host or "\\" in parts.netloc:
            raise Refused("bad url")
        if not host.isascii():
            parts = parts._replace(netloc=parts.netloc.lower().replace(
                host, host.encode("idna").decode()))
        return parts._replace(scheme=scheme)
    except ValueError:
        raise Refused("bad url") from None


def target_of(parts) -> str:
    """What stands in the request line: path and query, in ASCII."""
    path, query = (quote(x, safe="/%:@!$&'()*+,;=~-._?") for x in (parts.path or "/", parts.query))
    return f"{path}?{query}" if query else path


def read_image(response: http.client.HTTPResponse, limits: Limits) -> bytes:
    """The body of a response. Its first bytes decide whether it is an image, not what it claims."""
    claimed = (response.headers.get_content_type() or "").lower()
    promised = response.length or 0  # None where the server does not say
    if promised > limits.max_bytes:
        raise Refused("too many bytes")
    body = bytearray()
    while chunk := response.read(65_536 if body else 16):
        body += chunk
        if not body.startswith(MAGIC):
            plain = claimed.startswith("image/") and claimed != "image/svg+xml"
            raise Refused("not an image" if plain else f"not an image: {claimed}")
        if len(body) > limits.max_bytes:
            raise Refused("too many bytes")
    if len(body) < promised:
        raise Refused("cut off")
    if not body:
        raise Refused("empty file")
    return bytes(body)


def download_row(turn: Turn, limits: Limits, row, timeout, agent, directives):
    """What img2dataset calls for each row: (key, url) -> (key, file or None, reason or None)."""
    key, url = row
    try:
        checked_url(url)  # what is refused unasked takes no turn
        turn.wait()
        return key, io.BytesIO(download(url, limits, directives)), None
    except Refused as error:
        return key, None, str(error)
    except TimeoutError:
        return key, None, "timed out"
    except ssl.SSLError:
        return key, None, "bad certificate or handshake"
    except (http.client.HTTPException, ConnectionError, ValueError, OSError) as error:
        short = isinstance(error, http.client.IncompleteRead)
        return key, None, "cut off" if short else "broken response"


# ---- img2dataset's two classes -------------------------------------------------------------------


class SafeDownloader(Downloader):
    """img2dataset's downloader of a shard, with :func:`download_row` in place of its own.

    Args:
        limits: what each download may take; the rest is img2dataset's.
    """

    def __init__(self, *args, limits: Limits, **kwargs):
        super().__init__(*args, **kwargs)
        self.limits = limits

    def download_shard(self, row) -> None:
        ask = partial(download_row, Turn(self.limits.rate), self.limits)
        with patch("img2dataset.downloader.download_image", ask):
            super().download_shard(row)


class SafeResizer(Resizer):
    """Decode with Pillow: formats of ``FORMATS``, within limits, as an upright RGB JPEG.

    The first frame of an animation; 16 bits scaled to 8; transparency over white.  The shorter side
    becomes ``image_size`` where it is longer; nothing is enlarged.
    """

    def __init__(self, *args, limits: Limits, **kwargs):
        super().__init__(*args, **kwargs)
        self.limits = limits

    def __call__(self, img_stream, blurring_bbox_list=None):
        """(file) -> JPEG, width, height, original width and height; or Nones and the reason."""
        try:
            return (*self.resize(img_stream), None)
        except Refused as error:
            return None, None, None, None, None, str(error)

    def resize(self, file: io.BytesIO) -> tuple[bytes, int, int, int, int]:
        file.seek(0)
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > self.limits.max_pixels:
                    raise Refused("decompression bomb")
                picture = load_image(image)
        except Image.DecompressionBombError:
            raise Refused("decompression bomb") from None
        except (OSError, SyntaxError, ValueError, MemoryError, struct.error):
            raise Refused("truncated or corrupt image") from None
        width, height = picture.size
        if min(width, height) < self.limits.min_side:
            raise Refused(f"a side below {self.limits.min_side} pixels")
        scale = self.image_size / min(width, height)
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=95)
        return out.getvalue(), *picture.size, width, height


# ---- the process ---------------------------------------------------------------------------------


def run(settings: dict) -> None:
    """Download everything that ``settings`` (written by `fetch`) names, into its folder."""
    folder = Path(settings["folder"])
    processes = settings["processes"]
    limits = Limits(**{**settings["limits"],
                       "allow_hosts": tuple(settings["limits"]["allow_hosts"])})
    if limits.rate:
        limits.rate /= processes
    kwargs = {"limits": limits}
    if settings["distributor"] == "pyspark":  # img2dataset would make a local session of its own
        sql = importlib.import_module("pyspark.sql")
        sql.SparkSession.builder.appName("minidiffuser data fetch").getOrCreate()
    its_own = vars(sys.modules["img2dataset.main"])  # a function of the package has this name too
    with patch.dict(its_own, Downloader=partial(SafeDownloader, **kwargs),
                    Resizer=partial(SafeResizer, **kwargs)):
        img2dataset_download(
            url_list=str(folder / "input"), input_format="parquet", url_col="URL",
            caption_col="TEXT", save_additional_columns=settings["columns"],
            output_folder=str(folder / "shards"), output_format="parquet", encode_format="jpg",
            image_size=settings["image_size"], number_sample_per_shard=settings["shard_rows"],
            processes_count=processes, thread_count=settings["threads"],
            timeout=limits.timeout, retries=settings["retries"], extract_exif=False,
            compute_hash="sha256", distributor=settings["distributor"],
            user_agent_token="minidiffuser",
        )


def end_with(parent: int) -> None:
    """End this process and all of its workers as soon as the one that began it is gone."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """The process that `fetch` starts: one at a time in a folder."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    with open(Path(settings["folder"]) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        run(settings)


if __name__ == "__main__":
    # Under its own name, by which the worker processes find its classes.
    from minidiffuser.data import download as module

    module.main()
