"""A small Hub on 127.0.0.1: the endpoints that huggingface_hub uses to upload, list and download, with faults on
demand.

Written from the documentation of the Hub's API and the requests of the client; everything is kept in memory. Commits
are atomic, as on the Hub. `faults` defines which requests fail, and how.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.support.hub_server_rules import metadata_errors

LARGE = 10 << 20
PAGE = 7  # entries per page of a tree, so few that clients have to paginate
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.onnx filter=lfs diff=lfs merge=lfs -text\n"
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(oid: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


@dataclass
class Entry:
    """A file of a commit: its bytes or, for a large file, the SHA-256 under which they are stored."""

    content: bytes = b""
    lfs: str | None = None
    size: int = 0


@dataclass
class Repo:
    """A repository: branches map names to commits, and each commit is a complete tree."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    trees: dict[str, dict[str, Entry]] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, Entry], summary: str) -> str:
        self.summaries.append(summary)
        sha = hashlib.sha1(f"{len(self.summaries)} {summary} {sorted(tree)}".encode()).hexdigest()
        self.trees[sha] = tree
        self.branches[branch] = sha
        return sha

    def read(self, branch: str, name: str) -> bytes:
        entry = self.trees[self.branches[branch]][name]
        return self.large[entry.lfs] if entry.lfs else entry.content


@dataclass
class Fault:
    """A fault injected into some requests.

    Args:
        request: a regular expression that is searched in "METHOD /path".
        how: a status to respond with; "drop" closes the connection without a response, "lose" does so after processing
            the request; "cut" sends half of the body; "corrupt" changes a byte of it.
        times: how often the fault occurs.
        headers: headers of the response.
    """

    request: str
    how: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """The server's state, which tests set up and inspect."""

    users: dict[str, str]  # names by token
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    multipart: int | None = None  # bytes per part of a multipart upload
    url: str = ""
    storage: str = ""  # URL of the storage for large files: another host, which must not see tokens
    lock: Any = field(default_factory=threading.RLock)

    def requests(self, pattern: str) -> list[str]:
        """The requests that match a pattern, as "METHOD /path"."""
        return [f"{method} {path}" for method, path, _ in self.log if re.search(pattern, f"{method} {path}")]

    def new_repo(self, name: str, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": Entry(ATTRIBUTES, size=len(ATTRIBUTES))}, "initial commit")
        return repo

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.request, request):
                    fault.times -= 1
                    return fault
        return None


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        named = {"X-Error-Code": code} if code else {}
        self.status, self.headers = status, {"X-Error-Message": message, **named, **headers}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.raw_path = parts.path
        with self.hub.lock:
            self.hub.log.append((self.command, path, dict(self.headers)))
        fault = self.hub.fault(f"{self.command} {path}")
        self.how = fault.how if fault else None
        if self.how == "drop":
            self.close_connection = True
            return
        body = self.read_body()
        if isinstance(self.how, int):
            assert fault is not None
            self.send(self.how, json.dumps({"error": "as the test asked"}).encode(), fault.headers)
            return
        try:
            with self.hub.lock:
                status, content, headers = self.route(path, body)
        except Refused as refused:
            self.send(refused.status, json.dumps({"error": str(refused)}).encode(), refused.headers)
            return
        if self.how == "lose":
            self.close_connection = True
            return
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        self.send(status, content, headers)

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self.spoiled(body) if self.command == "PUT" else body

    def spoiled(self, content: bytes) -> bytes:
        if self.how != "corrupt" or not content:
            return content
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        if self.command == "GET":
            content = self.spoiled(content)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.how == "cut":
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)

    # The handlers, by path. They run with the state locked.

    def route(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        for methods, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods:
                return getattr(self, name)(body, **found.groupdict())
        raise Refused(404, f"no such endpoint: {self.command} {path}")

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def repo(self, name: str, write: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(name)
        owns = user == name.split("/")[0]
        if repo is None or (repo.private and not owns):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refused(401, "Invalid username or password.")
        if write and not owns:
            raise Refused(403, f"Forbidden: {user} may not write to {name}")
        return repo

    def head(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.trees:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def whoami(self, body: bytes) -> Any:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return 200, {"type": "user", "name": user, "orgs": []}, {}

    def create(self, body: bytes) -> Any:
        asked, user = json.loads(body), self.user()
        owner = asked.get("organization") or user
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, {}
        self.hub.new_repo(name, bool(asked.get("private")) or asked.get("visibility") == "private")
        return 200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name}, {}

    def validate(self, body: bytes) -> Any:
        errors = [{"message": message} for message in metadata_errors(json.loads(body)["content"])]
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def info(self, body: bytes, repo: str, revision: str = "main") -> Any:
        found = self.repo(repo)
        sha = self.head(found, revision)
        names = [{"rfilename": name} for name in sorted(found.trees[sha])]
        return 200, {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": names}, {}

    def refs(self, body: bytes, repo: str) -> Any:
        branches = self.repo(repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        return 200, {"branches": listed, "tags": [], "converts": []}, {}

    def tree(self, body: bytes, repo: str, revision: str, place: str | None = None) -> Any:
        found = self.repo(repo)
        sha = self.head(found, revision)
        prefix = f"{place}/" if place else ""
        inside = {name: entry for name, entry in sorted(found.trees[sha].items()) if name.startswith(prefix)}
        if place and not inside:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        listed = []
        for name, entry in inside.items():
            if "/" in name[len(prefix) :] and self.query.get("recursive", ["false"])[0].lower() != "true":
                folder = {"type": "directory", "oid": "0" * 40, "size": 0}
                folder["path"] = prefix + name[len(prefix) :].split("/")[0]
                if folder not in listed:
                    listed.append(folder)
                continue
            one: dict[str, Any] = {"type": "file", "path": name, "size": entry.size}
            if entry.lfs:
                one["oid"] = git_hash(pointer(entry.lfs, entry.size))
                one["lfs"] = {"oid": entry.lfs, "size": entry.size, "pointerSize": len(pointer(entry.lfs, entry.size))}
            else:
                one["oid"] = git_hash(entry.content)
            listed.append(one)
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(listed):
            recursive = "&recursive=true" if "recursive" in self.query else ""
            headers["Link"] = f'<{self.hub.url}{self.raw_path}?cursor={start + PAGE}{recursive}>; rel="next"'
        return 200, listed[start : start + PAGE], headers

    def branch(self, body: bytes, repo: str, name: str) -> Any:
        found = self.repo(repo, write=True)
        if name in found.branches:
            raise Refused(409, "Reference already exists")
        asked = json.loads(body or b"{}")
        found.branches[name] = self.head(found, asked.get("startingPoint", "main"))
        return 200, {}, {}

    def preupload(self, body: bytes, repo: str, revision: str) -> Any:
        found = self.repo(repo, write=True)
        tree = found.trees[self.head(found, revision)]
        files = []
        for file in json.loads(body)["files"]:
            name, entry = file["path"], tree.get(file["path"])
            binary = b"\0" in base64.b64decode(file["sample"])
            large = binary or file["size"] > LARGE or name.endswith((".safetensors", ".onnx"))
            told = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if entry is not None:
                told["oid"] = entry.lfs or git_hash(entry.content)
            files.append(told)
        return 200, {"files": files}, {}

    def batch(self, body: bytes, repo: str) -> Any:
        found, asked = self.repo(repo, write=True), json.loads(body)
        objects = []
        for one in asked["objects"]:
            told = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in found.large:
                base = f"{self.hub.storage}/lfs/{repo}/{one['oid']}"
                upload: dict[str, Any] = {"href": base}
                if self.hub.multipart and one["size"] > self.hub.multipart:
                    count = -(-one["size"] // self.hub.multipart)
                    upload["href"] = f"{base}/complete"
                    upload["header"] = {str(part): f"{base}/part/{part}" for part in range(1, count + 1)}
                    upload["header"]["chunk_size"] = str(self.hub.multipart)
                told["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.hub.url}/lfs/{repo}/{one['oid']}/verify"},
                }
            objects.append(told)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def upload(self, body: bytes, repo: str, oid: str) -> Any:
        # The storage's URL is signed: it needs no token, and only the hash is checked.
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "BadDigest: the SHA-256 you specified did not match what we received")
        self.hub.repos[repo].large[oid] = body
        return 200, b"", {"ETag": f'"{oid}"'}

    def upload_part(self, body: bytes, repo: str, oid: str, part: str) -> Any:
        self.parts(repo, oid)[int(part)] = body
        return 200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}

    def complete(self, body: bytes, repo: str, oid: str) -> Any:
        asked, parts = json.loads(body), self.parts(repo, oid)
        whole = b"".join(parts[part["partNumber"]] for part in asked["parts"])
        return self.upload(whole, repo, oid)

    def parts(self, repo: str, oid: str) -> dict[int, bytes]:
        kept: dict[tuple[str, str], dict[int, bytes]] = self.hub.__dict__.setdefault("parts", {})
        return kept.setdefault((repo, oid), {})

    def verify(self, body: bytes, repo: str, oid: str) -> Any:
        stored = self.repo(repo, write=True).large.get(oid)
        if stored is None or len(stored) != json.loads(body)["size"]:
            raise Refused(404, "Object does not exist on the server")
        return 200, {}, {}

    def commit(self, body: bytes, repo: str, revision: str) -> Any:
        found = self.repo(repo, write=True)
        if revision not in found.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header"
        header, tree = lines[0]["value"], dict(found.trees[found.branches[revision]])
        if header.get("parentCommit") not in (None, found.branches[revision]):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                content = base64.b64decode(value["content"])
                if value["path"] == "README.md" and metadata_errors(content.decode()):
                    raise Refused(400, "Invalid metadata in README.md")
                content = self.spoiled(content)
                tree[value["path"]] = Entry(content, size=len(content))
            elif key == "lfsFile":
                stored = found.large.get(value["oid"])
                if stored is None:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                tree[value["path"]] = Entry(lfs=value["oid"], size=len(stored))
            elif key == "deletedFile":
                del tree[value["path"]]
            else:
                raise Refused(400, f"unknown operation {key}")
        sha = found.commit(revision, tree, header["summary"])
        return 200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True}, {}

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> Any:
        found = self.repo(repo)
        sha = self.head(found, revision)
        entry = found.trees[sha].get(name)
        if entry is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not entry.lfs:
            return 200, entry.content, {**headers, "ETag": f'"{git_hash(entry.content)}"'}
        headers |= {"X-Linked-Etag": f'"{entry.lfs}"', "X-Linked-Size": str(entry.size)}
        return 302, b"", {**headers, "Location": f"{self.hub.storage}/cdn/{repo}/{entry.lfs}?{quote(name)}"}

    def cdn(self, body: bytes, repo: str, oid: str) -> Any:
        content = self.hub.repos[repo].large[oid]
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return 200, content, headers
        first, last = int(found[1]), int(found[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, content[first : last + 1], headers


GET, POST, PUT = ("GET", "HEAD"), ("POST",), ("PUT",)
API, LFS = f"/api/models/{REPO}", rf"/lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})"
ROUTES = [
    (GET, "/api/whoami-v2", "whoami"),
    (POST, "/api/repos/create", "create"),
    (POST, "/api/validate-yaml", "validate"),
    (GET, API, "info"),
    (GET, f"{API}/revision/(?P<revision>.+)", "info"),
    (GET, f"{API}/refs", "refs"),
    (GET, f"{API}/tree/(?P<revision>[^/]+)(?:/(?P<place>.+))?", "tree"),
    (POST, f"{API}/branch/(?P<name>.+)", "branch"),
    (POST, f"{API}/preupload/(?P<revision>.+)", "preupload"),
    (POST, f"{API}/commit/(?P<revision>.+)", "commit"),
    (POST, rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    (PUT, LFS, "upload"),
    (PUT, rf"{LFS}/part/(?P<part>\d+)", "upload_part"),
    (POST, f"{LFS}/complete", "complete"),
    (POST, f"{LFS}/verify", "verify"),
    (GET, f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "resolve"),
    (GET, f"/cdn/{REPO}/(?P<oid>[0-9a-f]{{64}})", "cdn"),
]


class QuietServer(ThreadingHTTPServer):
    """Does not report clients that disconnect, which some tests do on purpose."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def running_hub(users: dict[str, str]) -> Iterator[Hub]:
    """Runs a Hub within the context.

    Args:
        users: user names by token.
    """
    hub = Hub(users)
    server = QuietServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.storage = hub.url.replace("127.0.0.1", "localhost")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
