"""A stock vLLM, as a client sees it: our own server behind a proxy that does not know our routes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx


@contextmanager
def stock(url: str) -> Iterator[str]:
    """The url of such a proxy before the server at `url`."""
    with httpx.Client(base_url=url, timeout=120) as behind:

        class Proxy(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._pass(None)

            def do_POST(self) -> None:
                self._pass(self.rfile.read(int(self.headers["content-length"])))

            def _pass(self, body: bytes | None) -> None:
                if self.path.startswith("/claas/"):
                    status, content = 404, b'{"detail": "Not Found"}'
                else:
                    answer = behind.request(
                        self.command, self.path, content=body, headers={"content-type": "application/json"}
                    )
                    status, content = answer.status_code, answer.content
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
            thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield f"http://127.0.0.1:{proxy.server_address[1]}"
            finally:
                proxy.shutdown()
                thread.join(10)
