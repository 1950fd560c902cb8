"""A stand-in for W&B's server: it keeps what wandb sends, and its faults are modes.

    with WandbServer() as server:
        subprocess.run(command, env={**os.environ, **server.environment(home)})
        (run,) = server.runs.values()
        print(run.history[-1])

It answers what wandb 0.31 asks, and no more. `server.mode` may be changed at any time:

    "healthy"
    "refused"      the port is closed, until another mode opens it again
    "hanging"      requests are taken, and never answered
    "slow start"   a new run is made at once, and confirmed after `start_delay` seconds
    "bad key"      nobody has this key
    500, 429, 403  what every request is answered with
"""

import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

USER = "learner"
HISTORY, SUMMARY, EVENTS = "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl"
# What the real server says to a key that it does not know.
NOT_LOGGED_IN = {"errors": [{"message": "user is not logged in", "path": ["upsertBucket"]}]}


@dataclass
class Run:
    """What has arrived of a run. lines: of the files that are sent by the line, by number."""

    settings: dict = field(default_factory=dict)  # tags, groupName, displayName, ...
    config: dict = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[dict] = field(default_factory=list)
    complete: bool = False
    exit_code: int | None = None

    def take(self, message: dict) -> None:
        """Some lines of each file, and the first one's number: what comes twice is kept once."""
        for name, part in message.get("files", {}).items():
            numbered = enumerate(part["content"], start=part["offset"])
            self.lines.setdefault(name, {}).update(numbered)
        self.complete = message.get("complete", False)
        self.exit_code = message.get("exitcode")

    def read(self, name: str) -> list[dict]:
        """The rows of a file. Raises KeyError when one in between is missing."""
        lines = self.lines.get(name, {})
        return [json.loads(lines[number]) for number in range(len(lines))]

    @property
    def history(self) -> list[dict]:
        return self.read(HISTORY)

    def curve(self, key: str, axis: str = "step") -> list[tuple[float, float]]:
        """What W&B draws: the values of a key over those of another."""
        return [(row[axis], row[key]) for row in self.history if key in row]

    @property
    def summary(self) -> dict:
        return (self.read(SUMMARY) or [{}])[0]


@dataclass
class Artifact:
    """What has arrived of an artifact."""

    name: str
    type: str
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class WandbServer:
    """See above. runs and artifacts: by id, in the order in which they began."""

    def __init__(self, start_delay: float = 25):
        self.start_delay = start_delay
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.changed = threading.Condition()
        self.listener: Listener | None = None
        self.port = 0  # any that is free
        self.mode = "healthy"

    def __enter__(self) -> "WandbServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.mode = "refused"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: Path) -> dict[str, str]:
        """With it a program finds this server, and neither another one nor the user's settings."""
        home.mkdir(exist_ok=True)
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_MODE": "online",
            "WANDB_ERROR_REPORTING": "false",
            "HOME": str(home),
        }

    # ---------------------------------------------------------------------------------- modes

    @property
    def mode(self) -> str | int:
        return self._mode

    @mode.setter
    def mode(self, mode: str | int) -> None:
        with self.changed:
            self._mode = mode
            self.changed.notify_all()
        if self.listener and mode == "refused":
            self.listener.shutdown()
            self.listener.server_close()
            self.listener = None
        elif not self.listener and mode != "refused":
            self.listener = Listener(("127.0.0.1", self.port), Connection)
            self.listener.answer = self.answer
            self.port = self.listener.server_port
            threading.Thread(target=self.listener.serve_forever, args=[0.02], daemon=True).start()

    def wait_while(self, mode: str, seconds: float | None = None) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.mode != mode, seconds)

    # -------------------------------------------------------------------------------- answers

    def answer(self, path: str, body: bytes) -> tuple[int, dict] | None:
        """-> status and content, None to break the connection."""
        if self.mode in ("refused", "hanging"):
            self.wait_while("hanging")
            return None
        if isinstance(self.mode, int):
            return self.mode, {}
        if path.startswith("/upload/"):
            _, _, owner, name = path.split("/", maxsplit=3)
            (self.runs | self.artifacts)[owner].files[name] = body
            return 200, {}
        message = json.loads(body)
        if path.endswith("/file_stream"):
            self.runs[path.split("/")[-2]].take(message)
            return 200, {}
        operation = re.search(r"(query|mutation) (\w+)", message["query"])[2]
        if self.mode == "bad key" and operation != "Viewer":
            return 401, NOT_LOGGED_IN
        given = message.get("variables") or {}
        return 200, {"data": self.graphql(operation, given.get("input", given))}

    def graphql(self, operation: str, given: dict) -> dict:
        match operation:
            case "Viewer":
                known = {"id": "1", "entity": USER, "username": USER, "flags": "{}"}
                return {"viewer": None if self.mode == "bad key" else known}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": None}
            case "UpsertBucket":
                return {"upsertBucket": self.change_run(given)}
            case "RunResumeStatus":
                bucket = self.status(given["name"]) if given["name"] in self.runs else None
                return {"model": {**project(given["project"]), "bucket": bucket}}
            case "NotifyScriptableRunAlert":
                self.runs[given["runName"]].alerts.append(given)
                return {"notifyScriptableRunAlert": {"success": True}}
            case "CreateRunFiles":
                files = [self.place(given["run"], name) for name in given["files"]]
                return {"createRunFiles": {"runID": given["run"], "files": files}}
            case "ArtifactType":  # asked before a table is logged: is there another of this name?
                return {"project": None}
            case "CreateArtifact":
                id = f"artifact-{len(self.artifacts)}"
                name, type = given["artifactCollectionName"], given["artifactTypeName"]
                self.artifacts[id] = Artifact(name, type)
                return {"createArtifact": {"artifact": {"id": id, "state": "PENDING"}}}
            case "CreateArtifactManifest":
                file = self.place(given["artifactID"], given["name"])
                return {"createArtifactManifest": {"artifactManifest": {"id": "1", "file": file}}}
            case "CreateArtifactFiles":
                files = given["artifactFiles"]
                edges = [{"node": self.place(file["artifactID"], file["name"])} for file in files]
                return {"createArtifactFiles": {"files": {"edges": edges}}}
            case "CommitArtifact":
                self.artifacts[given["artifactID"]].committed = True
                return {"commitArtifact": {"artifact": {"id": given["artifactID"]}}}
        raise NotImplementedError(operation)

    def place(self, owner: str, name: str) -> dict:
        """Where to upload a file of a run or an artifact to."""
        url = f"{self.url}/upload/{owner}/{name}"
        return {
            "id": name,
            "name": name,
            "storagePath": name,
            "uploadUrl": url,
            "artifact": {"id": owner},
        }

    def change_run(self, given: dict) -> dict:
        """Make a run, or change what is given of it."""
        id, new = given["name"], given["name"] not in self.runs
        run = self.runs.setdefault(id, Run())
        run.settings |= {name: value for name, value in given.items() if value is not None}
        config = json.loads(run.settings.get("config", "{}"))
        run.config = {name: entry["value"] for name, entry in config.items()}
        if new:
            self.wait_while("slow start", self.start_delay)
        return {"bucket": {**self.status(id), "project": project(given["project"])}}

    def status(self, id: str) -> dict:
        """What a program has to know that goes on with a run."""
        run = self.runs[id]
        return {
            "id": id,
            "name": id,
            "displayName": run.settings.get("displayName"),
            "config": run.settings.get("config"),
            "tags": run.settings.get("tags"),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.lines.get(EVENTS, ())),
            "logLineCount": len(run.lines.get("output.log", ())),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": json.dumps([json.dumps(row) for row in run.read(EVENTS)[-1:]]),
            "wandbConfig": json.dumps({"t": 1}),  # without it, the run would pass for a new one
        }


def project(name: str) -> dict:
    return {"id": "1", "name": name, "entity": {"id": "1", "name": USER}}


class Listener(ThreadingHTTPServer):
    """An open port. Each connection has a thread of its own."""

    def handle_error(self, *connection: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # somebody has not waited
            super().handle_error(*connection)


class Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # with it, a connection lasts for many requests

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.server.answer(self.path, body)
        if answer is None:
            self.close_connection = True
            return
        status, content = answer[0], json.dumps(answer[1]).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""
