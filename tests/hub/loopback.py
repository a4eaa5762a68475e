"""A Hub on 127.0.0.1 that speaks what huggingface_hub's client uses, keeps all in memory, and fails on demand.

Repositories have branches of commits, a commit maps paths to content. Large files go through the LFS protocol. Private
repositories need the token; so does every write. `faults` is a list of `Fault`s; a request takes the first that fits.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "Zz9" * 11
LARGE = 100_000  # bytes from which a file goes through LFS


@dataclass
class Fault:
    """What to do wrong: `kind` at requests of `method` whose path has the pattern `path`, the next `times` times.

    "status" answers with `value`; "cut" closes the connection after `value` bytes of the body; "short" announces and
    sends only `value` bytes; "etag" announces the etag `value`; "garbage" sends content whose last byte is another.
    """

    kind: str
    path: str
    value: object = None
    method: str = "GET"
    times: int = 1


@dataclass
class Repository:
    private: bool = False
    commits: dict = field(default_factory=dict)  # id -> {path: bytes}
    branches: dict = field(default_factory=dict)  # name -> commit id
    messages: list = field(default_factory=list)


class LoopbackHub:
    """`with LoopbackHub() as server: server.url`; `requests` are (method, path) in order."""

    def __init__(self):
        self.repositories, self.blobs, self.faults, self.requests, self.headers = {}, {}, [], [], []
        self.lock = threading.Lock()
        outer = self

        class Bound(_Handler):
            hub = outer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo_id, files, private=False, branch="main"):
        """Make a commit without the protocol; `files` are {path: bytes}."""
        repo = self.repositories.setdefault(repo_id, Repository(private))
        self.commit(repo, branch, files, "put")

    def commit(self, repo, branch, changes, message):
        content = {**repo.commits.get(repo.branches.get(branch), {}), **changes}
        commit = hashlib.sha1(f"{branch} {message} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = content
        repo.branches[branch] = commit
        repo.messages.append(message)
        return commit

    def fault(self, method, path, kinds):
        """Take the first fault that fits, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.kind in kinds and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args):
        """Silence."""

    def do_GET(self):
        self.route("GET")

    def do_HEAD(self):
        self.route("HEAD")

    def do_POST(self):
        self.route("POST")

    def do_PUT(self):
        self.route("PUT")

    def route(self, method):
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), split.query
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.hub.requests.append((method, path))
        self.hub.headers.append({name.lower(): value for name, value in self.headers.items()})
        fault = self.hub.fault(method, path, ("status",))
        if fault is not None:
            return self.error(int(fault.value), "on demand")
        for wanted, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in wanted:
                return action(self, **match.groupdict())
        return self.error(404, f"no route {method} {path}")

    # answers

    def send(self, content, status=200, headers=()):
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers):
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status, message, code=None):
        headers = [("X-Error-Message", message)] + ([("X-Error-Code", code)] if code else [])
        headers += [("Retry-After", "0")] if status == 429 else []
        self.send({"error": message}, status, headers)

    # lookups

    @property
    def known_user(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo, write=False):
        found = self.hub.repositories.get(repo)
        if write and not self.known_user:
            self.error(401, "Invalid credentials")
            return None
        if found is None or (found.private and not self.known_user):
            self.error(401 if not self.known_user else 404, "Repository not found", "RepoNotFound")
            return None
        return found

    def revision(self, repo, revision):
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            self.error(404, f"Revision {revision} not found", "RevisionNotFound")
            return None
        return commit

    # the API

    def create(self):
        if not self.known_user:
            return self.error(401, "Invalid credentials")
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo_id in self.hub.repositories:
            return self.send({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo_id}"}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.put(repo_id, {".gitattributes": b""}, private=bool(private))
        return self.send({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def validate(self):
        self.send({"errors": [], "warnings": []})

    def info(self, repo, revision="main"):
        found = self.repository(repo)
        commit = found and self.revision(found, revision)
        if commit:
            siblings = [{"rfilename": path} for path in sorted(found.commits[commit])]
            card = {}
            text = found.commits[commit].get("README.md", b"").decode()
            licence = re.search(r"^license: (.*)$", text, re.M)
            if licence:
                card["license"] = licence[1]
            self.send(
                {
                    "id": repo,
                    "sha": commit,
                    "private": found.private,
                    "siblings": siblings,
                    "cardData": card,
                    "tags": [],
                }
            )

    def tree(self, repo, revision):
        found = self.repository(repo)
        commit = found and self.revision(found, revision)
        if commit:
            self.send([_entry(path, content) for path, content in sorted(found.commits[commit].items())])

    def branch(self, repo, branch):
        found = self.repository(repo, write=True)
        if found:
            if branch in found.branches:
                return self.error(409, "Reference already exists")
            found.branches[branch] = found.branches["main"]
            self.send({})

    def preupload(self, repo, revision):
        found = self.repository(repo, write=True)
        if found:
            files = [
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if entry["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for entry in json.loads(self.body)["files"]
            ]
            self.send({"files": files})

    def batch(self, repo):
        found = self.repository(repo, write=True)
        if found:
            objects = []
            for entry in json.loads(self.body)["objects"]:
                answer = {"oid": entry["oid"], "size": entry["size"]}
                if entry["oid"] not in self.hub.blobs:
                    answer["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{entry['oid']}"}}
                objects.append(answer)
            self.send({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.chunked()
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, "content does not match its name")
        self.hub.blobs[oid] = self.body
        self.send({})

    def chunked(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def commit(self, repo, revision):
        found = self.repository(repo, write=True)
        if not found:
            return
        changes, message = {}, ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changes[value["path"]] = self.hub.blobs[value["oid"]]
        if "create_pr=1" in self.query:
            number = sum(name.startswith("refs/pr/") for name in found.branches) + 1
            branch = f"refs/pr/{number}"
            found.branches[branch] = found.branches["main"]
        else:
            branch = revision
        oid = self.hub.commit(found, branch, changes, message)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid}
        if "create_pr=1" in self.query:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{branch.rsplit('/', 1)[1]}"
        self.send(answer)

    def resolve(self, repo, revision, path):
        found = self.repository(repo)
        commit = found and self.revision(found, revision)
        if not commit:
            return
        content = found.commits[commit].get(path)
        if content is None:
            return self.error(404, "Entry not found", "EntryNotFound")
        entry, command, where = _entry(path, content), self.command, self.path
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        fault = self.hub.fault(command, where, ("etag", "cut", "short", "garbage"))
        if fault is not None and fault.kind == "etag":
            etag = str(fault.value)
        if fault is not None and fault.kind == "garbage":
            content = content[:-1] + bytes([content[-1] ^ 255])
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        whole = len(content)
        if asked:
            start = int(asked[1])
            content = content[start : int(asked[2]) + 1 if asked[2] else None]
        if fault is not None and fault.kind == "short":
            content = content[: int(fault.value)]
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        if "lfs" in entry:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(whole))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{whole}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if command == "HEAD":
            return
        if fault is not None and fault.kind == "cut":
            self.wfile.write(content[: int(fault.value)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(content)


def _entry(path, content):
    """A file as the tree lists it: git's name of the content, or the sha256 of a large one."""
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": git}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("GET",), rf"/api/models/{_REPO}", _Handler.info),
    (("GET",), rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    (("GET",), rf"/api/models/{_REPO}/tree/(?P<revision>.+)", _Handler.tree),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    (("POST",), rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/upload/(?P<oid>\w+)", _Handler.upload),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)", _Handler.resolve),
)
