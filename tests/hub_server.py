"""A Hub of one's own: a server on this machine that speaks the few endpoints by which repositories are written and read."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit


COMMIT = "0" * 40


class HubServer(ThreadingHTTPServer):
    """Holds `repositories`, by name the files of each, and `large_files`, by hash what was uploaded as such."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large_files: dict[str, bytes] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send a process here, and nowhere else."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_of_nobody",
        }


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Serve while the context lasts."""
    with HubServer() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits for the acknowledgement of its headers
    server: HubServer

    def do_POST(self):
        path, body = self.parts, self.read()
        if path == ["api", "repos", "create"]:
            options = json.loads(body)
            name = f"{options['organization']}/{options['name']}"
            self.server.repositories.setdefault(name, {})
            self.answer({"url": f"{self.address}/{name}", "name": name})
        elif path == ["api", "validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
        elif path[-3:] == ["lfs", "objects", "batch"]:
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.address}/large/{item['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif path[4] == "preupload":
            self.answer({"files": [self.upload_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif path[4] == "commit":
            self.commit(self.server.repositories["/".join(path[2:4])], body.splitlines())
            self.answer({"commitUrl": f"{self.address}/{path[2]}/{path[3]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({"error": f"POST {self.path}"}, status=501)

    def do_PUT(self):
        self.server.large_files[self.parts[-1]] = self.read()
        self.answer({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.parts[:2] == ["api", "models"]:
            owner, name, *rest = self.parts[2:]
            files = self.server.repositories.get(f"{owner}/{name}", {})
            if rest[:1] != ["tree"]:
                self.answer({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []})
            elif len(rest) == 2:
                self.answer([{"type": "file", "path": file, "size": len(files[file]), "oid": ""} for file in files])
            else:
                self.answer({}, status=404, headers={"X-Error-Code": "EntryNotFound"})
            return
        owner, name, _, _, *path = self.parts  # <owner>/<name>/resolve/<revision>/<path>
        content = self.server.repositories.get(f"{owner}/{name}", {}).get("/".join(path))
        if content is None:
            self.answer({}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            self.answer(content)

    @property
    def parts(self) -> list[str]:
        return urlsplit(self.path).path.strip("/").split("/")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def upload_mode(self, path: str) -> dict:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def commit(self, files: dict[str, bytes], lines: list[bytes]):
        for line in lines:
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: bytes | list | dict, status: int = 200, headers: dict[str, str] | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        """Keep the output of tests clean."""
