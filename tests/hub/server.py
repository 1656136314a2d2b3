"""
A stand-in for the Hub: what the real client asks for when it makes a repository, uploads files, commits and downloads.

Large files go by Xet, or by LFS in one part or several, as the client chooses. Faults can be injected: a refused
token, a repository that may not be written, answers of an overloaded server, connections that are cut before or in the
middle of a request.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .xet import Storage


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
LARGE = (".safetensors", ".bin")
USER = "someone"


@dataclass
class Repo:
    """A repository: its files as they are at the last commit, by path."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Fault:
    """
    What goes wrong with some requests.

    Args:
        request (`str`):
            Regular expression that the method and path of the request match.
        what (`int` or `str`):
            Status to answer, `"cut"` to close the connection without one, or `"cut in the middle"` to do so when half
            of the request's body has come.
        times (`int`):
            How often.
        after (`int`):
            How many matching requests go well before.
    """

    request: str
    what: int | str
    times: int = 1
    after: int = 0


@dataclass(frozen=True)
class Refusal(Exception):
    """An answer that is an error."""

    status: int
    message: str
    code: str | None = None  # how the Hub tells the client more than by the status


class StandIn:
    """
    The server, on a free port of this machine. A context manager.

    Args:
        tokens (`dict[str, str]`):
            Tokens and their roles, `"read"` or `"write"`.
        part_size (`int`, *optional*):
            Size of the parts in which large files are uploaded; one part if not given.
    """

    def __init__(self, tokens: dict[str, str], part_size: int | None = None):
        self.tokens, self.part_size = tokens, part_size
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files by their SHA-256
        self.xet = Storage()
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.uploaded: list[tuple[str, int]] = []  # large files that came over the wire whole, and their sizes
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault_of(self, request: str) -> int | str | None:
        """What is to go wrong with a request, if anything."""
        with self.lock:
            for fault in self.faults:
                if re.search(fault.request, request):
                    if fault.after:
                        fault.after -= 1
                    elif fault.times:
                        fault.times -= 1
                        return fault.what
        return None

    def stored(self) -> bytes:
        """Everything that was uploaded, for a search."""
        files = [content for repo in self.repos.values() for content in repo.files.values()]
        messages = [json.dumps(repo.commits).encode() for repo in self.repos.values()]
        return b"\n".join([*files, *messages, *self.objects.values(), *self.xet.blocks.values()])


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def _handle(self) -> None:
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault_of(request)
        if isinstance(fault, str):
            if fault == "cut in the middle":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._cut()
        self.body = self._read_body()
        if fault is not None:
            return self._answer({"error": "injected"}, fault)
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                try:
                    with self.hub.lock:
                        return answer(self, **match.groupdict())
                except Refusal as refusal:
                    return self._refuse(refusal)
        return self._refuse(Refusal(404, f"the stand-in does not know {request}", "RepoNotFound"))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, refusal: Refusal) -> None:
        headers = {"X-Error-Message": refusal.message}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        self._answer({"error": refusal.message}, refusal.status, headers)

    # Who may do what

    def _role(self) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid username or password.")
        return self.hub.tokens[token]

    def _may_write(self, repo: str) -> None:
        if self._role() != "write" or not repo.startswith(f"{USER}/"):
            raise Refusal(403, f"You don't have the rights to write to {repo}")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self._role() not in ("read", "write")):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    # Answers

    def whoami(self) -> None:
        role = self._role()
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self._answer({"type": "user", "id": "1", "name": USER, "orgs": [], "auth": auth})

    def create(self) -> None:
        asked = json.loads(self.body)
        self._role()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        self._may_write(name)
        existed = name in self.hub.repos
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos.setdefault(name, Repo(private))
        address = {"url": f"{self.hub.url}/{name}", "name": name}
        self._answer({**address, "error": "exists"} if existed else address, 409 if existed else 200)

    def auth_check(self, repo: str) -> None:
        self._repo(repo)
        self._may_write(repo)
        self._answer({})

    def validate(self) -> None:
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        problems = [f'"{name}" must be a string' for name in ("license", "library_name") if name in metadata]
        problems = [problem for problem in problems if not isinstance(metadata[problem.split('"')[1]], str)]
        errors = [{"message": problem} for problem in problems]
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str) -> None:
        self._may_write(repo)
        files = self._repo(repo).files
        answer = []
        for asked in json.loads(self.body)["files"]:
            path, large = asked["path"], asked["path"].endswith(LARGE)
            base64.b64decode(asked["sample"], validate=True)
            known = {"oid": _oid(files[path], large)} if path in files else {}
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self._answer({"files": answer})

    def batch(self, repo: str) -> None:
        self._may_write(repo)
        asked = json.loads(self.body)
        assert asked["operation"] == "upload"
        assert asked["hash_algo"] == "sha256"
        self._answer({"transfer": "basic", "objects": [self._actions(wanted) for wanted in asked["objects"]]})

    def _actions(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.hub.objects:
            return wanted  # nothing to do
        upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}"}
        if self.hub.part_size:
            count = -(-size // self.hub.part_size)
            upload = {"href": f"{self.hub.url}/lfs/{oid}/complete", "header": {"chunk_size": str(self.hub.part_size)}}
            upload["header"] |= {str(part + 1): f"{self.hub.url}/lfs/{oid}/{part + 1}" for part in range(count)}
        return {**wanted, "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}}

    def put(self, oid: str) -> None:
        self._store(oid, self.body)
        self._answer({})

    def put_part(self, oid: str, part: str) -> None:
        self.hub.parts[oid, int(part)] = self.body
        self._answer({}, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self._store(oid, b"".join(self.hub.parts[oid, number] for number in sorted(numbers)))
        self._answer({})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content has another SHA-256")
        self.hub.objects[oid] = content
        self.hub.uploaded.append((oid, len(content)))

    def verify(self, oid: str) -> None:
        size = json.loads(self.body)["size"]
        stored = self.hub.objects.get(oid)
        self._answer({}, 200 if stored is not None and len(stored) == size else 404)

    def commit(self, repo: str) -> None:
        self._may_write(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        files: dict[str, bytes] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects and value["oid"] not in self.hub.xet.hashes:
                    raise Refusal(400, f"{value['path']}: its content was not uploaded")
                files[value["path"]] = self.hub.objects.get(value["oid"], Pointer(value["oid"].encode()))
            else:
                raise Refusal(400, f"the stand-in cannot commit a {line['key']}")
        kept = self._repo(repo)
        kept.files |= files
        kept.commits.append({"summary": lines[0]["value"]["summary"], "files": sorted(files)})
        address = f"{self.hub.url}/{repo}/commit/{kept.head}"
        self._answer({"success": True, "commitUrl": address, "commitOid": kept.head, "pullRequestUrl": None})

    def info(self, repo: str) -> None:
        kept = self._repo(repo)
        files = [{"rfilename": name} for name in kept.files]
        self._answer({"id": repo, "modelId": repo, "sha": kept.head, "private": kept.private, "siblings": files})

    def tree(self, repo: str) -> None:
        files = self._repo(repo).files
        listed = [
            {"type": "file", "path": name, "oid": _oid(content, False), "size": len(content)}
            for name, content in files.items()
        ]
        self._answer(listed)

    def resolve(self, repo: str, path: str) -> None:
        kept = self._repo(repo)
        if path not in kept.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        content = kept.files[path]
        if isinstance(content, Pointer):
            sha256 = content.decode()
            terms = self.hub.xet.files[self.hub.xet.hashes[sha256]]
            headers = {
                "X-Repo-Commit": kept.head,
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(sum(term.size for term in terms)),
                "X-Xet-Hash": self.hub.xet.hashes[sha256],
                "X-Xet-Refresh-Route": f"{self.hub.url}/api/models/{repo}/xet-read-token/main",
            }
            return self._answer(b"", headers=headers)
        return self._answer(
            content, headers={"X-Repo-Commit": kept.head, "ETag": f'"{_oid(content, path.endswith(LARGE))}"'}
        )

    # Xet

    def xet_token(self, repo: str, kind: str) -> None:
        self._may_write(repo) if kind == "write" else self._repo(repo)
        answer = {"casUrl": self.hub.url, "accessToken": "for-xet", "exp": 2**32}
        names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
        self._answer(answer, headers={header: str(answer[name]) for name, header in names.items()})

    def put_block(self, block: str) -> None:
        self.hub.xet.blocks[block] = self.body
        self.hub.uploaded.append((block, len(self.body)))
        self._answer({"was_inserted": True})

    def put_shard(self) -> None:
        self.hub.xet.add_shard(self.body)
        self._answer({"result": 1})

    def reconstruct(self, name: str) -> None:
        self._answer(self.hub.xet.reconstruction(name, f"{self.hub.url}/xet/blocks"))

    def get_block(self, block: str) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        content = self.hub.xet.blocks[block]
        place = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._answer(content[first : last + 1], 206, place)

    def ignore(self) -> None:
        self._answer({})


class Pointer(bytes):
    """The SHA-256 of a file that lies in Xet, in the place of its content."""


def _oid(content: bytes, large: bool) -> str:
    """How the Hub identifies a file: a large one by its SHA-256, another as git does."""
    if isinstance(content, Pointer):
        return content.decode()
    return (
        hashlib.sha256(content).hexdigest()
        if large
        else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    )


OID = "(?P<oid>[0-9a-f]{64})"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{REPO}/auth-check/write", _Handler.auth_check),
    ("POST", f"/api/models/{REPO}/preupload/main", _Handler.preupload),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", f"/lfs/{OID}", _Handler.put),
    ("PUT", f"/lfs/{OID}/(?P<part>\\d+)", _Handler.put_part),
    ("POST", f"/lfs/{OID}/complete", _Handler.complete),
    ("POST", f"/lfs/{OID}/verify", _Handler.verify),
    ("POST", f"/api/models/{REPO}/commit/main", _Handler.commit),
    ("GET", f"/api/models/{REPO}(/revision/[^/]+)?", _Handler.info),
    ("GET", f"/api/models/{REPO}/tree/[^/]+(/.*)?", _Handler.tree),
    ("GET", f"/api/models/{REPO}/xet-(?P<kind>write|read)-token/main", _Handler.xet_token),
    ("POST", "/v1/xorbs/default/(?P<block>[0-9a-f]{64})", _Handler.put_block),
    ("POST", "/v1/shards", _Handler.put_shard),
    ("GET", "/v1/reconstructions/(?P<name>[0-9a-f]{64})", _Handler.reconstruct),
    ("GET", "/xet/blocks/(?P<block>[0-9a-f]{64})", _Handler.get_block),
    ("POST", "/v1/telemetry", _Handler.ignore),
    ("GET|HEAD", f"/{REPO}/resolve/[^/]+/(?P<path>.+)", _Handler.resolve),
]
