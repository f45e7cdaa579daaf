"""As much of the Hugging Face Hub, on loopback, as fetching a dataset's files asks for, with faults to order.

It knows one dataset in one or more commits, lists it with sizes and SHA-256, and sends a request for a file on to
another port, as the Hub does to its CDN; there files are served whole or from a byte on.
"""

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

REPOSITORY = "kjj0/fineweb10B-gpt2"
COMMIT = "c0ffee" + 34 * "0"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients that are killed are no error."""


class Hub:
    """`files`: name -> bytes, what is listed. `faults`: what goes wrong, all off:

    status        {path's beginning: [statuses to answer with before it works, None for ever]}
    serve         {name: bytes served in place of the listed ones}
    drop_after    break the connection after so many bytes, `drops` times
    rate          bytes a second of one connection; total_rate: of all together
    ignore_range  send all where a part is asked for
    portal        answer everything with a page to log in on, as some networks do
    """

    def __init__(self, files):
        self.files = dict(files)
        self.commits = {"main": COMMIT}  # what each revision is now; a commit that was listed once stays
        self.listed = set()
        self.faults = SimpleNamespace(status={}, serve={}, drop_after=None, drops=0, rate=None, total_rate=None, ignore_range=False, portal=False)
        self.requests = []  # (host port's role, path, headers)
        self.sent = {}  # name -> bytes sent
        self.lock = threading.Lock()
        self.most_at_once = self.at_once = 0
        self.hub, self.cdn = (Server(("127.0.0.1", 0), make_handler(self, role)) for role in ("hub", "cdn"))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.hub.server_port}"

    def commit_of(self, revision):
        """The commit that a revision is, None for an unknown one."""
        return revision if revision in self.listed else self.commits.get(revision)

    def listing(self, commit):
        self.listed.add(commit)
        siblings = [{"rfilename": ".gitattributes", "size": 3, "blobId": "0"}, {"rfilename": "../escape.bin", "size": 3, "blobId": "0"}]
        for name, content in self.files.items():
            lfs = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            siblings.append({"rfilename": name, "size": len(content), "blobId": "0", "lfs": lfs})
        return {"id": REPOSITORY, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0}

    def fault_status(self, path):
        """The status that a request is to fail with, or None."""
        with self.lock:
            for beginning, statuses in self.faults.status.items():
                if path.startswith(beginning) and statuses:
                    return statuses[0] if statuses[-1] is None else statuses.pop(0)


def make_handler(hub, role):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            hub.requests.append((role, path, dict(self.headers)))
            try:
                if hub.faults.portal:
                    self.answer(200, b"<html>please log in</html>", Content_Type="text/html")
                elif status := hub.fault_status(path):
                    self.answer(status, b'{"error": "as ordered"}', Content_Type="application/json")
                elif role == "cdn":
                    self.send_file(path.rpartition("/")[2])
                elif found := re.fullmatch(f"/api/datasets/{REPOSITORY}/revision/(.+)", path):
                    self.send_listing(found[1])
                elif (found := re.fullmatch(f"/datasets/{REPOSITORY}/resolve/([^/]+)/(.+)", path)) and hub.commit_of(found[1]) and found[2] in hub.files:
                    location = f"http://127.0.0.1:{hub.cdn.server_port}/blobs/{found[2]}?signature=secret"
                    self.answer(302, Location=location, X_Repo_Commit=hub.commit_of(found[1]))
                else:
                    self.answer(404, b'{"error": "not found"}', X_Error_Code="EntryNotFound")
            except (BrokenPipeError, ConnectionResetError):  # the client was killed
                self.close_connection = True

        def send_listing(self, revision):
            if commit := hub.commit_of(revision):
                self.answer(200, json.dumps(hub.listing(commit)).encode(), Content_Type="application/json")
            else:
                self.answer(404, b'{"error": "no such revision"}', X_Error_Code="RevisionNotFound")

        def send_file(self, name):
            content = hub.faults.serve.get(name, hub.files[name])
            range_header = self.headers.get("Range") if not hub.faults.ignore_range else None
            start = int(re.fullmatch(r"bytes=(\d+)-", range_header)[1]) if range_header else 0
            if start >= len(content):
                return self.answer(416, Content_Range=f"bytes */{len(content)}")
            self.send_response(206 if range_header else 200)
            if range_header:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            with hub.lock:
                hub.at_once += 1
                hub.most_at_once = max(hub.most_at_once, hub.at_once)
            try:
                self.send_bytes(name, content[start:])
            finally:
                with hub.lock:
                    hub.at_once -= 1

        def send_bytes(self, name, content):
            with hub.lock:
                drops = hub.faults.drops > 0
                hub.faults.drops -= drops
            end = min(len(content), hub.faults.drop_after) if drops else len(content)
            piece = min(2**16, (hub.faults.rate or hub.faults.total_rate or 2**20) // 20)
            for position in range(0, end, piece):
                chunk = content[position : min(position + piece, end)]
                if hub.faults.rate:
                    time.sleep(len(chunk) / hub.faults.rate)
                if hub.faults.total_rate:
                    time.sleep(len(chunk) / hub.faults.total_rate * hub.at_once)
                self.wfile.write(chunk)
                with hub.lock:
                    hub.sent[name] = hub.sent.get(name, 0) + len(chunk)
            if drops:
                self.close_connection = True
                self.connection.shutdown(2)

    return Handler


@contextmanager
def serve(files):
    hub = Hub(files)
    servers = (hub.hub, hub.cdn)
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
