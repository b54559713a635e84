"""A TCP proxy before a real store that loses answers: the request is carried out, and the client never hears.

It also keeps the heads of the requests that went through it, to see what was sent.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit


class LossyProxy:
    """Forwards to `endpoint`; the next `lose` answers to requests that begin with `method` and hold `text` are lost.

    What begins with a line that holds `slow` waits here, as if it were still being sent, until `go_on` is set.
    """

    def __init__(self, endpoint: str) -> None:
        address = urlsplit(endpoint)
        self._upstream = (address.hostname, address.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lose, self.method, self.text, self.lost = 0, b"PUT ", b"", 0
        self.slow, self.go_on = b"", threading.Event()
        # Something waits here; the last answer that was to be lost is; a DELETE has come.
        self.held, self.all_lost, self.deleting = threading.Event(), threading.Event(), threading.Event()
        self.heads: list[str] = []  # of the requests, lower case, as far as their first packet goes
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Ends the listener; its connections end with their peers."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(self._upstream)
        last = [b""]

        def upwards() -> None:
            with contextlib.suppress(OSError):
                while data := client.recv(65536):
                    if data.split(b" ", 1)[0] in (b"PUT", b"GET", b"POST", b"HEAD", b"DELETE"):
                        last[0] = data.split(b"\r\n", 1)[0]
                        self.heads.append(data.split(b"\r\n\r\n", 1)[0].decode(errors="replace").lower())
                        if last[0].startswith(b"DELETE "):
                            self.deleting.set()
                        if self.slow and self.slow in last[0]:
                            self.held.set()
                            self.go_on.wait(60)
                    server.sendall(data)
                server.shutdown(socket.SHUT_WR)

        threading.Thread(target=upwards, daemon=True).start()
        with contextlib.suppress(OSError), client, server:
            while data := server.recv(65536):
                if not data.startswith(b"HTTP/1.1 100") and self._loses(last[0]):
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)

    def _loses(self, request: bytes) -> bool:
        with self._lock:
            if self.lose > 0 and request.startswith(self.method) and self.text in request:
                self.lose -= 1
                self.lost += 1
                if not self.lose:
                    self.all_lost.set()
                return True
            return False


@contextlib.contextmanager
def lossy(endpoint: str) -> Iterator[LossyProxy]:
    """A proxy for the length of a block."""
    proxy = LossyProxy(endpoint)
    try:
        yield proxy
    finally:
        proxy.close()
