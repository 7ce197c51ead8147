"""A web server on loopback that does what the web does to a crawler, and counts who asks.

``CASES`` maps the first part of a path to (what the server does, what a fetch must make of it):
``None`` for an image, otherwise the reason it fails.
"""

import io
import itertools
import struct
import threading
import time
import zlib
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image, ImageDraw


def picture(size=(48, 32), mode="RGB"):
    """A red square top left and a blue one bottom right, on white."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, size[0] // 3, size[1] // 3), fill="red")
    draw.rectangle((size[0] * 2 // 3, size[1] * 2 // 3, *size), fill="blue")
    return image.convert(mode)


def encoded(kind, image=None, **how):
    file = io.BytesIO()
    (image or picture()).save(file, kind, **how)
    return file.getvalue()


def rotated():
    """A picture that lies on its side, with a note (EXIF orientation 6) to turn it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", picture().transpose(Image.Transpose.ROTATE_90), exif=exif, quality=95)


def bomb(side=30_000):
    """A PNG of 900 million white pixels in a few kilobytes."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    pixels = zlib.compress(b"\0" * (side // 8 + 1) * 2000, 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def animated():
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_180)]
    return encoded("GIF", frames[0], save_all=True, append_images=frames[1:], duration=50)


def sixteen_bit():
    ramp = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    return encoded("PNG", Image.fromarray(ramp))


def garbled(data):
    """The same length and the same beginning, and nonsense in the middle."""
    return data[:24] + bytes(b ^ 0x5A for b in data[24:])


def body(data, kind="image/png"):
    return lambda handler: handler.answer(200, data, kind)


def status(code):
    return lambda handler: handler.answer(code, b"no", "text/plain")


def redirect(where):
    return lambda handler: handler.answer(302, b"", "text/plain", Location=where)


def hang(handler):
    time.sleep(6)


def drip(handler):
    """A byte now and then: never silent for as long as a timeout, and never done."""
    handler.head(200, "image/png", 10_000)
    for byte in itertools.chain(encoded("PNG")[:16], itertools.repeat(0)):
        handler.wfile.write(bytes([byte]))
        time.sleep(0.2)


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in itertools.count():
        handler.wfile.write(b"X-%d: 1\r\n" % i)
        time.sleep(0.2)


def cut_off(handler):
    data = encoded("PNG")
    handler.head(200, "image/png", len(data))
    handler.wfile.write(data[: len(data) // 2])


def endless(handler):
    """More bytes than anyone allows, and no word of how many."""
    handler.head(200, "image/jpeg", None)
    handler.wfile.write(encoded("JPEG"))
    for _ in range(200):
        handler.wfile.write(b"\0" * 65_536)


def robots(handler):
    handler.answer(200, encoded("PNG"), "image/png", **{"X-Robots-Tag": "noai"})


PNG, JPEG, WEBP, GIF = (encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF"))
HTML = b"<!doctype html><html><body>This domain is for sale</body></html>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
BAD = "truncated or corrupt image"

CASES = {
    # images, as they come
    "png": (body(PNG), None),
    "jpeg": (body(JPEG, "image/jpeg"), None),
    "webp": (body(WEBP, "image/webp"), None),
    "gif": (body(GIF, "image/gif"), None),
    "cmyk": (body(encoded("JPEG", picture(mode="CMYK")), "image/jpeg"), None),
    "sixteen": (body(sixteen_bit()), None),
    "palette": (body(encoded("PNG", picture(mode="P"))), None),
    "transparent": (body(encoded("PNG", Image.new("RGBA", (20, 20), (9, 9, 9, 0)))), None),
    "animated": (body(animated(), "image/gif"), None),
    "rotated": (body(rotated(), "image/jpeg"), None),
    "large": (body(encoded("JPEG", picture((900, 600))), "image/jpeg"), None),
    "mislabelled": (body(JPEG, "image/png"), None),
    "untyped": (body(PNG, "application/octet-stream"), None),
    "wrongtype": (body(PNG, "text/plain"), None),
    "moved": (redirect("/png/elsewhere"), None),
    # not images
    "html": (body(HTML, "text/html"), "not an image: text/html"),
    "htmlasimage": (body(HTML, "image/jpeg"), "not an image"),
    "svg": (body(SVG, "image/svg+xml"), "not an image: image/svg+xml"),
    "json": (body(b'{"error": "gone"}', "application/json"), "not an image: application/json"),
    "empty": (body(b""), "empty file"),
    # damaged or dangerous ones
    "truncpng": (body(PNG[: len(PNG) // 2]), BAD),
    "truncjpeg": (body(JPEG[: len(JPEG) // 2], "image/jpeg"), BAD),
    "truncwebp": (body(WEBP[: len(WEBP) // 2], "image/webp"), BAD),
    "truncgif": (body(GIF[: len(GIF) // 2], "image/gif"), BAD),
    "badpng": (body(garbled(PNG)), BAD),
    "badjpeg": (body(garbled(JPEG), "image/jpeg"), BAD),
    "badwebp": (body(garbled(WEBP), "image/webp"), BAD),
    "badgif": (body(GIF[:10] + b"\0" * 20, "image/gif"), BAD),
    "bomb": (body(bomb()), "decompression bomb"),
    "tiny": (body(encoded("PNG", picture((1, 1)))), "a side below 2 pixels"),
    "robots": (robots, "disallowed by X-Robots-Tag"),
    "endless": (endless, "too many bytes"),
    "cutoff": (cut_off, "cut off"),
    # servers
    "404": (status(404), "http 404"),
    "410": (status(410), "http 410"),
    "403": (status(403), "http 403"),
    "500": (status(500), "http 500"),
    "503": (status(503), "http 503"),
    "hang": (hang, "timed out"),
    "drip": (drip, "too slow"),
    "dripheaders": (drip_headers, "too slow"),
    "loop": (redirect("/loop/again"), "too many redirects"),
    "tofile": (redirect("file:///etc/passwd"), "scheme file"),
    "toftp": (redirect("ftp://127.0.0.1/x.png"), "scheme ftp"),
    "toprivate": (redirect("http://127.0.0.2:9/x.png"), "private address"),
    "tolocalhost": (redirect("http://localhost:9/x.png"), "private address"),
    "nonsense": (lambda handler: handler.wfile.write(b"\x16\x03 what?\r\n\r\n"), "broken response"),
}


SCRIPTS = ["ein Äpfel & Öl", "красное яблоко", "红苹果", "لا تفاحة حمراء", "लाल सेब", "赤いりんご",
           "빨간 사과", "תפוח אדום", "κόκκινο μήλο", "แอปเปิ้ล", "🍎 emoji",
           "quote\"s, comma\nnewline", "a" * 3000]
# Rows that are refused without asking any server.
UNASKED = {"file:///etc/passwd": "scheme file", "ftp://127.0.0.1/a.png": "scheme ftp",
           "data:image/png;base64,iVBORw0KGgo=": "scheme data", "javascript:alert(1)":
           "scheme javascript", "": "scheme missing", "no url at all": "scheme missing",
           "http://": "bad url", "http://a:99999/b.png": "bad url"}
PRIVATE = ["http://127.0.0.2/a", "http://localhost/a", "http://10.1.2.3/a", "http://192.168.0.1/a",
           "http://172.16.9.9/a", "http://169.254.169.254/latest/meta-data", "http://[::1]/a",
           "http://[::ffff:127.0.0.1]/a", "http://100.64.0.1/a", "http://0.0.0.0/a",
           "http://[64:ff9b::7f00:1]/a", "http://224.0.0.1/a", "http://2130706433/a"]
SLOW = {case for case, (_, why) in CASES.items() if why in ("timed out", "too slow")}


def crawl_rows(url, plain=2100):
    """URLs of every case and of ``plain`` more of the quick ones; captions; what a fetch must say.

    The last is the reason that a row fails for, or None for an image.
    """
    quick = itertools.cycle(case for case in CASES if case not in SLOW and case != "endless")
    cases = [*CASES, *SLOW, *(next(quick) for _ in range(plain))]
    urls = [f"{url}/{case}/{i}?größe=ü {SCRIPTS[i % 5]}" for i, case in enumerate(cases)]
    reasons = [CASES[case][1] for case in cases]
    urls += [*UNASKED, *PRIVATE]
    reasons += [*UNASKED.values(), *["private address"] * len(PRIVATE)]
    return urls, [SCRIPTS[i % len(SCRIPTS)] for i in range(len(urls))], reasons


class Handler(BaseHTTPRequestHandler):
    """Looks up the first part of the path in CASES."""

    def do_GET(self):
        case = self.path.split("/")[1].split("?")[0]
        with self.server.lock:
            self.server.asked[self.path] += 1
        self.close_connection = True
        with suppress(BrokenPipeError, ConnectionResetError):  # they had enough
            CASES[case][0](self)

    def answer(self, code, data, kind, **headers):
        self.head(code, kind, len(data), **headers)
        self.wfile.write(data)

    def head(self, code, kind, length, **headers):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """As many at once as ask."""

    daemon_threads = True
    request_queue_size = 256


class HostileServer:
    """``with HostileServer() as server``: ``server.url``, and ``server.asked`` by path."""

    def __enter__(self):
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.asked, self.server.lock = Counter(), threading.Lock()
        self.asked = self.server.asked
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
