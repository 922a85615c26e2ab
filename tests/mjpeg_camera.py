"""A network camera for tests: Motion JPEG over HTTP on loopback, as IP cameras serve it.

camera = MjpegCamera()
camera.start()
camera.address      # http://127.0.0.1:PORT/camera.mjpg
camera.freeze()     # stays connected, sends nothing
camera.stop()       # gone: connections drop, new ones are refused
camera.start()      # back on the same port
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np

BOUNDARY = "frame"


class MjpegCamera:
    """Serves `pictures` (BGR, uint8) in a loop at `fps`; by default a bright square that wanders."""

    def __init__(self, pictures: Sequence[np.ndarray] | None = None, fps: float = 50.0) -> None:
        self.fps = fps
        self.sent = 0  # pictures sent, to all clients together
        self.connections = 0  # accepted so far
        self._jpegs = [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures or wandering_square()]
        self._picture = itertools.count()
        self._port = 0  # any free one at the first start, the same one afterwards
        self._server: _Server | None = None
        self._frozen = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}/camera.mjpg"

    def start(self) -> None:
        self._frozen.clear()
        self._server = _Server(self, self._port)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def freeze(self) -> None:
        self._frozen.set()

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.gone.set()
            server.shutdown()
            server.drop_connections()
            server.server_close()

    def next_part(self) -> bytes:
        """The next picture as a part of the multipart stream; empty while frozen."""
        if self._frozen.is_set():
            return b""
        jpeg = self._jpegs[next(self._picture) % len(self._jpegs)]
        self.sent += 1
        head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
        return head.encode() + jpeg + b"\r\n"


def wandering_square(count: int = 60, height: int = 120, width: int = 160) -> list[np.ndarray]:
    pictures = []
    for step in range(count):
        picture = np.full((height, width, 3), 60, np.uint8)
        left = step * (width - 30) // count
        picture[40:70, left : left + 30] = (40, 200, 240)
        pictures.append(picture)
    return pictures


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, camera: MjpegCamera, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.camera = camera
        self.gone = threading.Event()
        self._connected: list[socket.socket] = []

    def process_request(self, request: socket.socket, client_address: object) -> None:
        self.camera.connections += 1
        self._connected.append(request)
        super().process_request(request, client_address)

    def drop_connections(self) -> None:
        for connection in self._connected:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients come and go


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        self.end_headers()
        while not self.server.gone.wait(1 / self.server.camera.fps):
            self.wfile.write(self.server.camera.next_part())

    def log_message(self, format: str, *arguments: object) -> None:
        pass
