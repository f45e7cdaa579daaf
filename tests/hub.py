"""As much of the Hugging Face Hub, on loopback, as fetching a dataset's files asks for, with faults to order.

It knows one dataset in one or more commits, lists it with sizes and SHA-256, and sends a request for a file on to
another port, as the Hub does to its CDN.
"""

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "kjj0/fineweb10B-gpt2"
COMMIT = "c0ffee" + 34 * "0"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients that are killed are no error."""


class Hub:
    """What it serves, and what goes wrong when it does; a test changes the attributes."""

    def __init__(self, files):
        self.files = dict(files)  # name -> bytes, what is listed
        self.commits = {"main": COMMIT}  # what each revision is now
        self.status = {}  # beginning of a path -> statuses to answer with before it works; the last one None: for ever
        self.serve = {}  # name -> bytes served in place of the listed ones
        self.rate = None  # bytes a second of one connection
        self.portal = False  # answer everything with a page to log in on, as some networks do
        self.requests = []  # (role of the port, path)
        self.sent = {}  # name -> bytes sent
        self.lock = threading.Lock()
        self.hub, self.cdn = (Server(("127.0.0.1", 0), make_handler(self, role)) for role in ("hub", "cdn"))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.hub.server_port}"

    def commit_of(self, revision):
        """The commit that a revision is, None if it is unknown."""
        return self.commits.get(revision, revision if re.fullmatch("[0-9a-f]{40}", revision) else None)

    def tree(self):
        """Every file as the tree lists it; the names of both of the Hub's interfaces are in each."""
        entries = [{"type": "file", "path": ".gitattributes", "size": 3}]
        for name, content in self.files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            lfs = {"size": len(content), "oid": sha256, "sha256": sha256, "pointerSize": 134}
            entries.append({"type": "file", "path": name, "size": len(content), "lfs": lfs})
        return [entry | {"rfilename": entry["path"], "oid": 40 * "0", "blobId": 40 * "0"} for entry in entries]

    def info(self, commit):
        """The dataset in a commit, with every file as a sibling."""
        return {"id": REPOSITORY, "sha": commit, "siblings": self.tree(), "private": False, "tags": [], "downloads": 0}

    def fault(self, path):
        """The status that a request is to fail with, or None."""
        with self.lock:
            for beginning, statuses in self.status.items():
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
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            hub.requests.append((role, path))
            try:
                if hub.portal:
                    self.answer(200, b"<html>please log in</html>", Content_Type="text/html")
                elif status := hub.fault(path):
                    self.answer(status, b'{"error": "as ordered"}', Content_Type="application/json")
                elif role == "cdn":
                    self.send_file(path.rpartition("/")[2])
                else:
                    self.answer_as_hub(path)
            except (BrokenPipeError, ConnectionResetError):  # the client was killed
                self.close_connection = True

        do_HEAD = do_GET

        def answer_as_hub(self, path):
            found = re.fullmatch(f"/(?:api/)?datasets/{REPOSITORY}/(revision|tree|resolve)/([^/]+)/?(.*)", path)
            commit = found and hub.commit_of(found[2])
            if commit is None:
                self.answer(404, b'{"error": "not found"}', X_Error_Code="RevisionNotFound")
            elif found[1] == "resolve":
                content = hub.files[found[3]]
                self.answer(302, Location=f"http://localhost:{hub.cdn.server_port}/blobs/{found[3]}?signature=secret",
                            X_Repo_Commit=commit, X_Linked_Size=str(len(content)),
                            X_Linked_Etag=hashlib.sha256(content).hexdigest())
            else:
                body = hub.info(commit) if found[1] == "revision" else hub.tree()
                self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

        def send_file(self, name):
            content = hub.serve.get(name, hub.files[name])
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            size = 2**16 if hub.rate is None else hub.rate // 20
            for position in range(0, len(content), size):
                time.sleep(0 if hub.rate is None else size / hub.rate)
                self.wfile.write(piece := content[position : position + size])
                with hub.lock:
                    hub.sent[name] = hub.sent.get(name, 0) + len(piece)

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
