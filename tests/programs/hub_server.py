"""A local Hub server, in memory, with the part of the protocol that huggingface_hub uses for models and datasets.

It follows huggingface_hub 2.4 (`_commit_api.py`, `lfs.py`, `hf_api.py`, `file_download.py`). It does not support Xet:
clients must set `HF_HUB_DISABLE_XET=1`.

    with HubServer({"hf_secret": "someone"}) as hub:
        HfApi(endpoint=hub.url, token="hf_secret").create_repo("someone/model")
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".parquet", ".pt")
POINTER_SIZE = 134


@dataclass(frozen=True)
class File:
    """A file in a commit. `sha256` is set for large files (LFS)."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def describe(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": POINTER_SIZE}
        return entry


@dataclass
class Repo:
    """A repository.

    Attributes:
        kind: "models" or "datasets".
        commits: the files of each commit by oid, oldest first.
        messages: the commit messages, oldest first.
        branches: oid of the last commit by branch.
    """

    name: str
    kind: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], message: str, branch: str = "main") -> str:
        oid = hashlib.sha1(f"{self.kind} {self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        self.branches[branch] = oid
        return oid

    @property
    def files(self) -> dict[str, File]:
        return self.commits[self.branches["main"]]


class Refusal(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


class HubServer:
    """The server, a context manager.

    Attributes:
        tokens: user by token. Users may write to repositories under their name and read their private ones.
        repos: repositories by (kind, name).
        log: method and path of each request.
        failures: (method, path pattern, failure), each applied once, to the next matching request. A failure is a
            status code, or "drop": read half of the body and close the connection.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.log: list[str] = []
        self.failures: list[tuple[str, str, int | str]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        hub = self

        class BoundHandler(Handler):
            pass

        BoundHandler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another host for the client, which must not send its token there.
        self.storage = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take_failure(self, method: str, path: str) -> int | str | None:
        with self.lock:
            for i, (failing_method, pattern, action) in enumerate(self.failures):
                if method == failing_method and re.search(pattern, path):
                    del self.failures[i]
                    return action
        return None


class Handler(BaseHTTPRequestHandler):
    """A request handler. `ROUTES` maps methods and path patterns to the functions that answer."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        length = int(self.headers.get("Content-Length", 0))
        self.hub.log.append(f"{self.command} {parts.path}")
        action = self.hub.take_failure(self.command, parts.path)
        if action == "drop":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = (
            self._read_chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        )
        try:
            if isinstance(action, int):
                raise Refusal(action, "Service Unavailable")
            for methods, pattern, route in ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in methods.split():
                    with self.hub.lock:
                        route(self, **{name: unquote(value) for name, value in match.groupdict(default="").items()})
                    return
            raise Refusal(404, f"no route for {self.command} {parts.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.answer(refusal.status, {"error": refusal.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Authentication and lookup

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def check_no_token(self) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "a token was sent to the storage")

    def repo(self, kind: str, name: str, write: bool = False) -> Repo:
        user = self.user()
        repo = self.hub.repos.get((kind, name))
        is_owner = user is not None and name.split("/")[0] == user
        if repo is None or (repo.private and not is_owner):
            # The response does not reveal whether a private repository exists.
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and not is_owner:
            raise Refusal(403, f"you don't have the rights to write to {name}")
        return repo

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    # Accounts and repositories

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self.answer(200, {"type": "user", "name": user, "orgs": []})

    def create(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        request = json.loads(self.body)
        owner = request.get("organization") or user
        if owner != user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        kind = f"{request.get('type') or 'model'}s"
        name = f"{owner}/{request['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if (kind, name) in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": url})
            return
        repo = Repo(name, kind, private=request.get("visibility") == "private" or request.get("private", False))
        repo.commit({".gitattributes": File(b"*.safetensors filter=lfs\n")}, "initial commit")
        self.hub.repos[kind, name] = repo
        self.answer(200, {"url": url, "name": name})

    def check_access(self, kind: str, name: str, write: str) -> None:
        self.repo(kind, name, write=bool(write))
        self.answer(200, {})

    def validate_yaml(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repo = self.repo(kind, name)
        oid, files = self.files(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.answer(
            200,
            {"id": name, "sha": oid, "private": repo.private, "gated": repo.gated, "disabled": False, "tags": []}
            | {"siblings": siblings, "lastModified": DATE, "createdAt": DATE, "downloads": 0, "likes": 0},
        )

    def refs(self, kind: str, name: str) -> None:
        repo = self.repo(kind, name)
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
            for branch, oid in repo.branches.items()
        ]
        self.answer(200, {"branches": branches, "converts": [], "tags": []})

    def commits(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name)
        described = [
            {"id": oid, "title": message, "message": "", "date": DATE, "authors": [{"user": name.split("/")[0]}]}
            for oid, message in zip(repo.commits, repo.messages, strict=True)
        ]
        self.answer(200, described[::-1])

    def tree(self, kind: str, name: str, revision: str, path: str) -> None:
        _, files = self.files(self.repo(kind, name), revision)
        entries: dict[str, dict[str, Any]] = {}
        for file_path, file in sorted(files.items()):
            parents = [str(parent) for parent in PurePosixPath(file_path).parents][:-1]
            for parent in parents:
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
            entries[file_path] = file.describe(file_path)
        below = [entry for place, entry in entries.items() if not path or place.startswith(f"{path}/")]
        if path and not below:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            depth = path.count("/") + 1 if path else 0
            below = [entry for entry in below if entry["path"].count("/") == depth]
        self.answer(200, below)

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        _, files = self.files(self.repo(kind, name), revision)
        found = []
        for path in parse_qs(self.body.decode()).get("paths", []):
            if path in files:
                found.append(files[path].describe(path))
            elif any(place.startswith(f"{path}/") for place in files):
                found.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
        self.answer(200, found)

    # Uploads

    def preupload(self, kind: str, name: str, revision: str) -> None:
        _, files = self.files(self.repo(kind, name, write=True), revision)
        described = []
        for item in json.loads(self.body)["files"]:
            path = item["path"]
            file = files.get(path)
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            entry = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            described.append(entry | ({"oid": file.sha256 or file.oid} if file else {}))
        self.answer(200, {"files": described})

    def lfs_batch(self, kind: str, name: str) -> None:
        self.repo(kind or "models", name, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large_files:
                # The client sends no token to the upload address.
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.storage}/lfs/{item['oid']}"},
                    "verify": {"href": f"{self.hub.storage}/lfs/{item['oid']}/verify"},
                }
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        self.check_no_token()
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not match its hash")
        self.hub.large_files[oid] = self.body
        self.answer(200)

    def lfs_verify(self, oid: str) -> None:
        item = json.loads(self.body)
        if len(self.hub.large_files.get(oid, b"")) != item["size"]:
            raise Refusal(404, "not uploaded")
        self.answer(200)

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name, write=True)
        _, files = self.files(repo, revision)
        files = dict(files)
        message = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise Refusal(400, f"{value['path']} was never uploaded")
                files[value["path"]] = File(self.hub.large_files[value["oid"]], value["oid"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"cannot {operation['key']}")
        oid = repo.commit(files, message, revision)
        self.answer(200, {"success": True, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    # Downloads

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.repo(kind or "models", name)
        if repo.gated and self.user() != name.split("/")[0]:
            raise Refusal(403, f"Access to {name} is restricted and you are not in the authorized list", "GatedRepo")
        oid, files = self.files(repo, revision)
        headers = {"X-Repo-Commit": oid}
        file = files.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        if file.sha256 is None:
            self.send_file(file.content, {**headers, "ETag": f'"{file.oid}"'})
        else:
            # Large files are served by the storage.
            linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            self.answer(302, b"", {**headers, **linked, "Location": f"{self.hub.storage}/lfs/{file.sha256}"})

    def lfs_download(self, oid: str) -> None:
        self.check_no_token()
        self.send_file(self.hub.large_files[oid], {"ETag": f'"{oid}"'})

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if byte_range is None:
            self.answer(200, content, {**headers, "Accept-Ranges": "bytes"})
            return
        first, last = int(byte_range[1]), int(byte_range[2] or len(content) - 1)
        part = content[first : last + 1]
        content_range = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        self.answer(206, part, {**headers, "Content-Range": content_range})


KIND, NAME, REVISION = r"/(?P<kind>models|datasets)", r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api{KIND}/{NAME}/auth-check(?P<write>/write)?", Handler.check_access),
    ("GET", rf"/api{KIND}/{NAME}", Handler.info),
    ("GET", rf"/api{KIND}/{NAME}/revision/{REVISION}", Handler.info),
    ("GET", rf"/api{KIND}/{NAME}/refs", Handler.refs),
    ("GET", rf"/api{KIND}/{NAME}/commits/{REVISION}", Handler.commits),
    ("GET", rf"/api{KIND}/{NAME}/tree/{REVISION}/?(?P<path>.*)", Handler.tree),
    ("POST", rf"/api{KIND}/{NAME}/paths-info/{REVISION}", Handler.paths_info),
    ("POST", rf"/api{KIND}/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/api{KIND}/{NAME}/commit/{REVISION}", Handler.commit),
    ("POST", rf"(?:/(?P<kind>datasets))?/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.lfs_verify),
    ("GET HEAD", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_download),
    ("GET HEAD", rf"(?:/(?P<kind>datasets))?/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
