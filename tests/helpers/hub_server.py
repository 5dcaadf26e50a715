"""A small server on loopback that speaks as much of the hub's protocol as a client needs.

It serves repositories from memory, at one revision "main", with what huggingface_hub relies
on: ETag, X-Repo-Commit, X-Linked-ETag, X-Linked-Size and Range, and X-Error-Code for what
is not there. It takes uploads in commits, from who has the token. It can be told to
misbehave::

    with HubServer({"user/model": {"model.safetensors": b"..."}}) as server:
        server.faults["user/model", "model.safetensors"] = Fault.CUT
        # in another process: HF_ENDPOINT=server.endpoint
"""

import base64
import enum
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"

#: The token that may write.
TOKEN = "hf_may_write"


class Fault(enum.Enum):
    """How the server misbehaves for a file."""

    #: No answer goes beyond the middle of the file, whatever part was asked for.
    CUT = "cut"
    #: The first answer ends in the middle; the client may resume.
    CUT_ONCE = "cut once"
    #: As long as announced, but another content.
    WRONG_CONTENT = "wrong content"


class HubServer:
    """Use as a context manager. ``requests`` lists (method, path, Range header)."""

    def __init__(self, repositories):
        self.repositories = repositories
        self.faults = {}
        self.requests = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _etag(filename, content):
    """What the hub gives: SHA-256 for large files, git's SHA-1 for small text."""
    if filename.endswith(".json"):
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self._answer(with_body=False)

        def do_GET(self):
            self._answer(with_body=True)

        def do_POST(self):
            server.requests.append((self.command, self.path, None))
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._error(401, "Unauthorized", "Invalid token")
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                asked = json.loads(content)
                name = f"{asked['organization']}/{asked['name']}"
                answer = {"url": f"{server.endpoint}/{name}", "name": name}
                if name in server.repositories:
                    return self._json({**answer, "error": "You already created it"}, 409)
                server.repositories[name] = {}
                return self._json(answer)
            if path == "/api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
            if not found or found[1] not in server.repositories:
                return self._error(404, "RepoNotFound", "Repository not found")
            if found[2] == "preupload":
                files = [f["path"] for f in json.loads(content)["files"]]
                modes = [
                    {"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files
                ]
                return self._json({"files": modes})
            for line in content.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    value = item["value"]
                    uploaded = base64.b64decode(value["content"])
                    server.repositories[found[1]][value["path"]] = uploaded
            url = f"{server.endpoint}/{found[1]}/commit/{COMMIT}"
            self._json({"commitUrl": url, "commitOid": COMMIT, "success": True})

        def _json(self, answer, status=200):
            headers = {"Content-Type": "application/json"}
            self._send(status, json.dumps(answer).encode(), headers, with_body=True)

        def _answer(self, with_body):
            asked = self.headers.get("Range")
            server.requests.append((self.command, self.path, asked))
            path = self.path.partition("?")[0]
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            about = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/revision/([^/]+))?", path)
            name, revision = (
                (file[1], file[2]) if file else (about[1], about[3]) if about else (None, None)
            )
            files = server.repositories.get(name)
            if files is None:
                return self._error(404, "RepoNotFound", "Repository not found")
            if revision not in (None, "main", COMMIT):
                return self._error(404, "RevisionNotFound", "Invalid rev id")
            if about:
                siblings = [{"rfilename": filename} for filename in files]
                listing = {"id": name, "sha": COMMIT, "private": False, "siblings": siblings}
                return self._send(200, json.dumps(listing).encode(), {}, with_body)
            if file[3] not in files:
                return self._error(404, "EntryNotFound", "Entry not found")
            self._file(name, file[3], files[file[3]], asked, with_body)

        def _file(self, name, filename, content, asked, with_body):
            etag, size = _etag(filename, content), len(content)
            fault = server.faults.get((name, filename))
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if not filename.endswith(".json"):
                headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(size)}
            if fault is Fault.WRONG_CONTENT:
                content = bytes(len(content) - 1) + b"!"
            part = re.fullmatch(r"bytes=(\d+)-", asked or "")
            status = 206 if part else 200
            if part:
                start = int(part[1])
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
                content = content[start:]
            limit = None
            if with_body and fault in (Fault.CUT, Fault.CUT_ONCE):
                limit = max(size // 2 - (size - len(content)), 0)
                if fault is Fault.CUT_ONCE:
                    del server.faults[name, filename]
            self._send(status, content, headers, with_body, limit)

        def _send(self, status, content, headers, with_body, limit=None):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content[:limit])
            self.close_connection = limit is not None

        def _error(self, status, code, message):
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self._send(status, b"", headers, with_body=False)

        def log_message(self, *args):
            pass

    return Handler
