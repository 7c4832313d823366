"""A small hub on loopback: the calls by which `huggingface_hub` makes repositories, uploads and downloads."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, READER = "hf_writer", "hf_reader"
"""Tokens of the account `me`, and of one that may not write there."""
_LARGE = (".safetensors", ".png")
"""Ends of the names of files that go by git-lfs."""


class Hub:
    """Repositories by name, their commits, and faults to come.

    `repositories[name]` has `private`, `branches` (commit by name) and `commits` (files by path, by commit).
    """

    def __init__(self):
        self.repositories, self.objects, self.requests = {}, {}, []
        self.breaks_uploads = False
        """Close the connection in the midst of an upload of a large file."""

    def files(self, name, revision="main"):
        """Content of the files of a repository by path."""
        repository = self.repositories[name]
        return repository["commits"][repository["branches"].get(revision, revision)]

    def commit(self, name, branch, changes):
        """Put files (bytes by path, None for one that goes) onto a branch; the commit's name."""
        repository = self.repositories[name]
        parent = repository["commits"].get(repository["branches"].get(branch), {})
        files = {path: data for path, data in {**parent, **changes}.items() if data is not None}
        count = len(repository["commits"])
        commit = hashlib.sha1(f"{name} {branch} {count}".encode()).hexdigest()
        repository["commits"][commit], repository["branches"][branch] = files, commit
        return commit

    def create(self, name, private=False):
        """Make an empty repository."""
        self.repositories[name] = {"private": private, "branches": {}, "commits": {}}
        self.commit(name, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})


@contextmanager
def serving(hub):
    """Serve a hub; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub, server.daemon_threads = hub, True
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, value=None, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        fields = {"Content-Length": str(len(body)), **{name.replace("_", "-"): text for name, text in headers.items()}}
        for name, text in fields.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        hub = self.server.hub
        hub.requests.append(f"{self.command} {path}")
        if hub.breaks_uploads and path.startswith("/lfs/"):
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READER):
            self.refuse(401, "", "Invalid username or password.")
            return
        for pattern, action in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                name = match.groupdict().get("name")
                if name is not None and not self.allowed(name, token):
                    return
                action(self, body, **match.groupdict())
                return
        self.refuse(404, "", f"no such call: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def allowed(self, name, token):
        """Refuse who may not read or write a repository, or may not know of it."""
        repository = self.server.hub.repositories.get(name)
        if repository is None or (repository["private"] and token != TOKEN):
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif self.command in ("POST", "PUT") and token != TOKEN:
            self.refuse(403, "", "you may not write here")
        else:
            return True
        return False

    def create(self, body):
        wanted = json.loads(body)
        owner, hub = wanted["organization"] or "me", self.server.hub
        name = f"{owner}/{wanted['name']}"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if owner != "me" or token != TOKEN:
            self.refuse(403, "", f'You don\'t have the rights to create a model under the namespace "{owner}"')
        elif name in hub.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"})
        else:
            hub.create(name, wanted.get("visibility") == "private" or wanted.get("private", False))
            self.answer(200, {"url": f"{self.server.address}/{name}"})

    def validate(self, body):
        card = json.loads(body)["content"]
        known = yaml.safe_load(card.split("---\n")[1]).get("license", "mit") in ("mit", "apache-2.0")
        errors = [] if known else [{"message": '"license" must be one of [mit, apache-2.0]'}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def branch(self, body, name, revision):
        branches = self.server.hub.repositories[name]["branches"]
        if revision in branches:
            self.refuse(409, "", "Reference already exists")
            return
        branches[revision] = branches["main"]
        self.answer(200)

    def preupload(self, body, name, revision):
        files = json.loads(body)["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(_LARGE) else "regular", "shouldIgnore": False}
            for f in files
        ]
        self.answer(200, {"files": modes})

    def batch(self, body, name):
        hub = self.server.hub
        objects = [{"oid": each["oid"], "size": each["size"]} for each in json.loads(body)["objects"]]
        for each in objects:
            if each["oid"] not in hub.objects:
                each["actions"] = {"upload": {"href": f"{self.server.address}/lfs/{each['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.hub.objects[oid] = body
        self.answer(200)

    def commit(self, body, name, revision):
        hub, changes = self.server.hub, {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
            else:
                hub.repositories[name]["message"] = value["summary"]
        commit = hub.commit(name, revision, changes)
        url = f"{self.server.address}/{name}/commit/{commit}"
        self.answer(200, {"commitUrl": url, "commitOid": commit, "success": True, "pullRequestUrl": None})

    def info(self, body, name, revision="main"):
        repository = self.server.hub.repositories[name]
        commit = repository["branches"].get(revision, revision)
        if commit not in repository["commits"]:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings = [{"rfilename": path} for path in repository["commits"][commit]]
        about = {"_id": name, "id": name, "sha": commit, "private": repository["private"], "siblings": siblings}
        self.answer(200, {**about, "tags": [], "downloads": 0, "modelId": name})

    def tree(self, body, name, revision):
        found = []
        for path, data in sorted(self.server.hub.files(name, revision).items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if path.endswith(_LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            found.append(entry)
        self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def resolve(self, body, name, revision, path):
        repository = self.server.hub.repositories[name]
        data = self.server.hub.files(name, revision).get(path)
        if data is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        tag = (hashlib.sha256 if path.endswith(_LARGE) else hashlib.sha1)(data).hexdigest()
        commit = repository["branches"].get(revision, revision)
        self.answer(200, data, ETag=f'"{tag}"', X_Repo_Commit=commit, X_Linked_Size=str(len(data)))


_NAME, _REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w./-]+)"
_ROUTES = (
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/branch/{_REVISION}", _Handler.branch),
    (rf"POST /api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", _Handler.put),
    (rf"POST /api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/{_REVISION}", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    (rf"(GET|HEAD) /{_NAME}/resolve/(?P<revision>[\w.-]+)/(?P<path>.+)", _Handler.resolve),
)
