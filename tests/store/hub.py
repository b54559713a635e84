"""A stand-in for a model hub: the few routes that `snapshot_download` asks, over a folder. The real one is not here."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(folder: Path, repository: str) -> Iterator[str]:
    """The address of a hub that has one repository, the files below `folder`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            api, files = f"/api/models/{repository}", f"/{repository}/resolve/"
            if path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name, "size": (folder / name).stat().st_size} for name in names]
                self._answer(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings, "tags": []}).encode())
            elif path.startswith(f"{api}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": COMMIT}
                    for name in names
                ]
                self._answer(json.dumps(entries).encode())
            elif path.startswith(files) and (name := path.removeprefix(files).partition("/")[2]) in names:
                self._answer((folder / name).read_bytes())
            else:
                self._answer(b'{"error": "Repository not found"}', 404, "RepoNotFound")

        def _answer(self, data: bytes, status: int = 200, error: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Keeps the test's output readable."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
