"""A stand-in for Omni's REST API, for the tests and benchmarks of omni_refresh.

It prints one line of JSON (its addresses, key and model) when it is ready, and serves until its
standard input ends or SIGTERM, SIGINT or SIGHUP arrives: the input ends when the test dies,
however it dies, so no test can leave this process behind.

/api/v1/... behaves as Omni is documented to; a test orders anything else through /control/...,
on the plain http address only: settings, faults, the record of what was asked, a reset.
"""
import contextlib
import datetime
import email.utils
import gzip
import http
import itertools
import json
import math
import os
import re
import secrets
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
import zlib
from collections import defaultdict, deque

# Random, so that a client which talks to the instance of another test is refused; unless this is
# to take the place of one that was killed.
KEY = os.environ.get("OMNI_API_KEY") or "omni_osk_" + secrets.token_hex(24)
MODEL = os.environ.get("OMNI_API_MODEL") or str(uuid.uuid4())
BRANCH = str(uuid.uuid4())

# What POST /control/set can change. Of several values the first is the default.
SETTINGS = {
    "key": KEY,                             # the one accepted; a change revokes or rotates it
    "forbidden": (False, True),             # every API request is answered 403
    "error_shape": (1, 2, 3),               # see error_body()
    "rate_limit": 0,                        # requests of one key in a window; 0 means no limit
    "rate_window": 60.0,                    # seconds; a shorter one lets a test see its end
    "retry_after": ("off", "seconds", "date"),
    "dbt": (True, False),                   # the connection has dbt
    "branch_based_refresh": (False, True),  # the connection's "Branch-based schema refresh"
    "models": 5,                            # how many there are
    "refresh_status": ("running", "completed", "failed"),
    "job_id": (True, False),                # older instances answer a refresh without jobId
    "job_seconds": 0.05,                    # how long a job runs
    "job_result": "COMPLETED",              # its last status, an undocumented one for example
    "job_spelling": ("documented", "openapi"),
    "job_early_404s": 0,                    # so many polls of a new job do not find it yet
    "job_forbidden": (False, True),         # polls are answered 403
    "schemas": ["warehouse.public"],        # those that Omni knows of each model
    "record": (True, False),                # a long benchmark saves memory by only counting
    "catalog": "",                          # a shell command that prints what the database has; see scan()
}

# Where the plain http address is, and the file, if any, to which each request is added: as it
# arrives, and once more as it is answered. So the record outlives a kill -9.
PORT = int(os.environ.get("OMNI_API_PORT") or 0)
RECORD = os.environ.get("OMNI_API_RECORD")

PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


class Refusal(Exception):
    """An answer other than 200: Refusal(status, detail, headers)."""


def render(status, body, headers=None):
    """Builds a whole answer, so that one send suffices. A header that is None is left out."""
    headers = {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}
    lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items() if v is not None)
    return f"HTTP/1.1 {status} {PHRASES.get(status, '')}\r\n{lines}\r\n".encode("latin-1") + body


def error_body(shape, status, detail):
    if shape == 3:
        return {"error": PHRASES[status], "message": detail}
    urn = {"schemas": ["urn:ietf:params:scim:api:messages:2.0:Error"]} if shape == 2 else {}
    return {"detail": detail, **urn, "status": status}


def make_models(count):
    """The first is MODEL; names and kinds are null here and there, as Omni's may be."""
    models, connection = {}, str(uuid.uuid4())
    for i in range(count):
        model, branch = (MODEL, BRANCH) if i == 0 else (str(uuid.uuid4()), str(uuid.uuid4()))
        kind = ("SHARED", "SCHEMA", "SHARED_EXTENSION", None)[i % 4]
        models[model] = {
            "id": model, "name": None if i % 3 == 2 else f"Model {i}", "modelKind": kind,
            "connectionId": connection,
            "baseModelId": MODEL if kind == "SHARED_EXTENSION" else None,
            "createdAt": "2025-01-01T00:00:00.000Z", "updatedAt": "2025-01-01T00:00:00.000Z",
            "deletedAt": None,
            "branches": [{"id": branch, "name": f"branch-{i}"}] if kind == "SHARED" else [],
        }
    return models


def keep(request, file=RECORD and os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)):
    if file:
        os.write(file, json.dumps({"process": os.getpid(), **request}).encode() + b"\n")


class Omni:
    """All that a reset forgets. A request deals with the Omni of its arrival to its end, so that
    one which outlives a reset changes nothing that the next test sees."""

    def __init__(self):
        self.lock = threading.Lock()
        self.settings = {k: v[0] if isinstance(v, tuple) else v for k, v in SETTINGS.items()}
        self.models = make_models(self.settings["models"])
        self.jobs = {}
        self.known = {}                     # the model that scan() keeps
        self.windows = defaultdict(deque)   # key: times of the requests that count for its limit
        self.faults = []
        self.requests = []
        self.stats = {"requests": 0, "connections": 0, "in_flight": 0}
        self.connections = set()
        self.faulty = set()                 # connections with a fault under way

    # What /control/... does

    def set(self, changes):
        settings = dict(self.settings)
        for name, value in changes.items():
            if name not in SETTINGS:
                raise ValueError(f'unrecognized setting "{name}"')
            if not isinstance(SETTINGS[name], tuple):
                value = type(SETTINGS[name])(value)
            elif value not in SETTINGS[name]:
                raise ValueError(f'invalid value for setting "{name}": {value}')
            settings[name] = value
        with self.lock:
            self.settings = settings
            if "models" in changes:
                self.models = make_models(settings["models"])

    def order(self, fault, times=1, path=".*refresh", **extras):
        """Orders queue up: a request takes the oldest one that fits it and is not used up."""
        if fault == "none":
            return self.release()
        if fault not in FAULTS:
            raise ValueError(f'unrecognized fault "{fault}"')
        function, defaults = FAULTS[fault]
        for name in extras.keys() - defaults.keys():
            raise ValueError(f'fault "{fault}" has no parameter "{name}"')
        order = {"name": fault, "function": function, "extras": {**defaults, **extras},
                 "times": int(times), "path": re.compile(path)}
        with self.lock:
            self.faults.append(order)

    def release(self):
        """Forgets the faults and ends the requests that they hold up."""
        with self.lock:
            self.faults.clear()
            for connection in self.faulty:
                connection.cut()

    # The life of a request

    def arrive(self, connection, request):
        """Records a request before anything else happens to it; returns the fault it meets."""
        with self.lock:
            self.stats["requests"] += 1
            self.stats["in_flight"] += 1
            self.connections.add(connection.number)
            self.stats["connections"] = len(self.connections)
            request["n"] = self.stats["requests"]
            if self.settings["record"]:
                self.requests.append(request)
            keep(request)
            for fault in self.faults:
                if fault["times"] != 0 and fault["path"].search(request["path"]):
                    fault["times"] -= 1     # -1 never gets to 0
                    self.faulty.add(connection)
                    return fault
        return None

    def leave(self, connection, request, status):
        with self.lock:
            request["status"] = status
            keep(request)
            self.stats["in_flight"] -= 1
            self.faulty.discard(connection)

    def answer(self, request):
        """Acts on a request as Omni would; returns the status and the whole answer."""
        with self.lock:
            try:
                self.admit(request["headers"].get("authorization"))
                return 200, render(200, json.dumps(self.dispatch(request)).encode())
            except Refusal as refusal:
                status, detail, *headers = refusal.args
                body = error_body(self.settings["error_shape"], status, detail)
                return status, render(status, json.dumps(body).encode(), *headers)

    def admit(self, authorization):
        key = self.settings["key"]
        if authorization != f"Bearer {key}":
            raise Refusal(401, "Missing, invalid or revoked API key")
        if self.settings["rate_limit"] > 0:
            now, times = time.monotonic(), self.windows[key]
            while times and times[0] <= now - self.settings["rate_window"]:
                times.popleft()
            if len(times) >= self.settings["rate_limit"]:
                seconds = max(math.ceil(times[0] + self.settings["rate_window"] - now), 1)
                date = email.utils.formatdate(math.ceil(time.time()) + seconds, usegmt=True)
                value = {"off": None, "seconds": seconds, "date": date}
                raise Refusal(429, "Rate limit exceeded",
                              {"Retry-After": value[self.settings["retry_after"]]})
            times.append(now)
        if self.settings["forbidden"]:
            raise Refusal(403, "This API key lacks the permission")

    def dispatch(self, request):
        for method, pattern, function in ROUTES:
            if match := pattern.fullmatch(request["path"]):
                break
        else:
            raise Refusal(404, "No such resource")
        if method != request["method"]:
            raise Refusal(405, f"Use {method}", {"Allow": method})

        # A route's keyword-only arguments are the query parameters it knows. Omni may be more
        # lenient with others, but here one is a mistake of the client.
        query = urllib.parse.parse_qsl(request["query"], keep_blank_values=True)
        for name, _ in query:
            if name not in (function.__kwdefaults__ or {}):
                raise Refusal(400, f"{name}: Unrecognized parameter")
        if len(dict(query)) < len(query):
            raise Refusal(400, "Repeated parameter")
        groups = map(urllib.parse.unquote, match.groups())
        return function(self, request, *groups, **dict(query))

    # The routes

    def refresh(self, request, model_id, *, branch_id=None, hard_refresh="true", schemas=None,
                tables=None):
        model = self.model(model_id)
        if hard_refresh not in ("true", "false"):
            raise Refusal(400, "hard_refresh: Invalid boolean")
        if hard_refresh == "true" and (schemas is not None or tables is not None):
            raise Refusal(400, "schemas and tables require hard_refresh=false")
        if not self.settings["branch_based_refresh"]:
            if branch_id is not None:
                raise Refusal(400, "branch_id: not allowed, branch-based schema refresh is off")
        elif branch_id is None:
            raise Refusal(400, "branch_id: required, branch-based schema refresh is on")
        elif not UUID.fullmatch(branch_id):
            raise Refusal(400, "branch_id: Invalid uuid")
        elif branch_id.lower() not in [branch["id"] for branch in model["branches"]]:
            raise Refusal(404, "No such branch of this model")

        if self.settings["catalog"]:
            self.scan(hard_refresh == "true", *(text and text.split(",") for text in (schemas, tables)))
        return self.start_job(model, "refresh_schema")

    def dbt_sync(self, request, model_id, *, branch_id=None):
        model = self.model(model_id)
        if not self.settings["dbt"]:
            raise Refusal(405, "The connection has no dbt")
        if branch_id is None:
            raise Refusal(400, "branch_id: Required")
        if branch_id.lower() not in [branch["id"] for branch in model["branches"]]:
            raise Refusal(404, "No such branch of this model")
        return self.start_job(model, "dbt_sync")

    def start_job(self, model, job_type):
        status = self.settings["refresh_status"]
        answer = {"modelId": model["id"], "status": status}
        if self.settings["job_id"]:
            job_id = str(uuid.uuid4())
            running = status == "running"
            self.jobs[job_id] = {
                "type": job_type,
                "ends": time.monotonic() + (self.settings["job_seconds"] if running else 0),
                "result": self.settings["job_result"] if running else status.upper(),
                "early_404s": self.settings["job_early_404s"],
            }
            answer["jobId"] = job_id
        return answer

    def scan(self, hard, schemas, tables):
        """Keeps a model of the database as Omni does: a hard refresh makes it anew, a soft one adds
        what is new in the schemas and tables given. The command prints lines of a schema, a table,
        a column and its type, with tabs between them."""
        run = subprocess.run(self.settings["catalog"], shell=True, check=True, text=True,
                             stdout=subprocess.PIPE)
        if hard:
            self.known = {}
        for schema, table, column, kind in (line.split("\t") for line in run.stdout.splitlines()):
            if (schemas is None or schema in schemas) and (tables is None or table in tables):
                columns = self.known.setdefault(f"{schema}.{table}", {})
                if column:                  # a table may have none
                    columns.setdefault(column, kind)

    def job_status(self, request, job_id):
        if not UUID.fullmatch(job_id):
            raise Refusal(400, "jobId: Invalid uuid")
        if self.settings["job_forbidden"]:
            raise Refusal(403, "This API key may not read the job's connection")
        job = self.jobs.get(job_id.lower())
        if job is None or job["early_404s"] > 0:
            if job:
                job["early_404s"] -= 1
            raise Refusal(404, "No such job")
        documented = self.settings["job_spelling"] == "documented"
        running = "RUNNING" if documented else "IN_PROGRESS"
        return {"job_type": job["type"] if documented else job["type"].upper(),
                "job_id": job_id.lower(),
                "status": job["result"] if time.monotonic() >= job["ends"] else running}

    def list_models(self, request, *, name=None, modelKind=None, connectionId=None,
                    baseModelId=None, modelId=None, include=None, pageSize="20", cursor=None):
        wanted = {"id": modelId, "name": name, "modelKind": modelKind,
                  "connectionId": connectionId, "baseModelId": baseModelId}
        records = [model for model in self.models.values()
                   if all(v is None or model[k] == v for k, v in wanted.items())]
        if not (pageSize.isdecimal() and 1 <= int(pageSize) <= 100):
            raise Refusal(400, "pageSize: must be between 1 and 100")
        if include not in (None, "activeBranches"):
            raise Refusal(400, "include: Invalid value")
        # A cursor has characters that must be percent-encoded, which a client may forget.
        cursors = [f"+{model['id']}=" for model in records]
        if cursor not in (None, *cursors):
            raise Refusal(400, "cursor: Invalid value")
        start = 0 if cursor is None else cursors.index(cursor) + 1
        end = start + int(pageSize)
        more = end < len(records)
        return {
            "pageInfo": {"hasNextPage": more, "nextCursor": cursors[end - 1] if more else None,
                         "pageSize": int(pageSize), "totalRecords": len(records)},
            "records": [model if include else {**model, "branches": []}
                        for model in records[start:end]],
        }

    def cache_reset(self, request, model_id, policy):
        model = self.model(model_id)
        now = datetime.datetime.now(datetime.timezone.utc)
        try:
            body = json.loads(request["body"] or "{}")
            # Before Python 3.11, fromisoformat() does not know the Z.
            text = body.get("resetAt", now.isoformat()).replace("Z", "+00:00")
            reset_at = datetime.datetime.fromisoformat(text)
        except (ValueError, AttributeError):
            raise Refusal(400, "resetAt: Invalid ISO-8601 time") from None
        if reset_at.tzinfo is None:
            reset_at = reset_at.replace(tzinfo=datetime.timezone.utc)
        if reset_at > now:
            raise Refusal(400, "resetAt: must not be in the future")
        return {"success": True,
                "cache_reset": {"id": str(uuid.uuid4()), "model_id": model["id"],
                                "policy_name": policy, "created_at": now.isoformat(),
                                "updated_at": now.isoformat(), "reset_at": reset_at.isoformat()}}

    def list_schemas(self, request, model_id, *, branch_id=None):
        model = self.model(model_id)
        if branch_id is not None and branch_id not in [branch["id"] for branch in model["branches"]]:
            raise Refusal(404, "No such branch of this model")
        return {"schemas": self.settings["schemas"]}

    def model(self, model_id):
        if not UUID.fullmatch(model_id):
            raise Refusal(400, "modelId: Invalid uuid")
        if model_id.lower() not in self.models:
            raise Refusal(404, "No such model")
        return self.models[model_id.lower()]


ROUTES = [(method, re.compile("/api/v1" + pattern), function) for method, pattern, function in (
    ("POST", r"/models/([^/]*)/refresh", Omni.refresh),
    ("POST", r"/models/([^/]*)/dbt-sync", Omni.dbt_sync),
    ("GET", r"/jobs/([^/]*)/status", Omni.job_status),
    ("GET", r"/models", Omni.list_models),
    ("POST", r"/models/([^/]*)/cache_reset/([^/]+)", Omni.cache_reset),
    ("GET", r"/models/([^/]*)/schemas", Omni.list_schemas),
)]


# Faults. Each returns the last bytes to be sent, after which the connection lives on, or None to
# have it closed. What acts as Omni would does so first: there, too, a lost answer undoes nothing.

def answer(connection, omni, request, status, headers, body, encoding):
    if isinstance(body, str):
        body = body.encode("utf-8", "surrogateescape")  # "\udcff" stands for the byte ff
    if encoding:                            # one that is not in ENCODERS is claimed only
        headers = {"Content-Encoding": encoding, **(headers or {})}
        body = ENCODERS.get(encoding, bytes)(body)
    return render(int(status), body, headers)


def raw(connection, omni, request, data, hang):
    connection.sock.sendall(data.encode("latin-1"))
    if hang:
        connection.pause()


def redirect(connection, omni, request, location):
    return render(301, b"", {"Location": location})


def echo_key(connection, omni, request):
    key = request["headers"].get("authorization", "").replace("Bearer ", "", 1)
    escaped = "".join(f"\\u{ord(c):04x}" for c in key)
    detail = f'"Invalid token {json.dumps(key)[1:-1]}, which is {escaped}"'
    return render(401, f'{{"detail": {detail}, "status": 401}}'.encode())


def hang(connection, omni, request):
    connection.pause()


def hang_middle(connection, omni, request):
    _, reply = omni.answer(request)
    body = reply.index(b"\r\n\r\n") + 4
    connection.sock.sendall(reply[:(body + len(reply)) // 2])
    connection.pause()


def close_in_headers(connection, omni, request):
    _, reply = omni.answer(request)
    connection.sock.sendall(reply[:reply.index(b"\r\n\r\n") - 1])


def reset(connection, omni, request):
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def close(connection, omni, request):
    pass


def delay(connection, omni, request, delay):
    _, reply = omni.answer(request)
    return reply if connection.pause(delay) else None


def hold(connection, omni, request, file):
    """Answers once there is such a file."""
    _, reply = omni.answer(request)
    while not os.path.exists(file):
        if not connection.pause(0.02):
            return None
    return reply


def drip(connection, omni, request, delay):
    _, reply = omni.answer(request)
    for i in range(len(reply) - 1):
        connection.sock.sendall(reply[i:i + 1])
        if not connection.pause(delay):
            return None
    return reply[-1:]


def huge(connection, omni, request, size):
    """Chunked: the client has to count, no Content-Length tells it beforehand."""
    head = render(200, b"", {"Content-Length": None, "Transfer-Encoding": "chunked"})
    start, piece, end = (b"%x\r\n%b\r\n" % (len(b), b)
                         for b in (b'{"status": "', b"x" * 65536, b'"}'))
    connection.sock.sendall(head + start)
    for _ in range(int(size) // 65536):
        connection.sock.sendall(piece)
    return end + b"0\r\n\r\n"


def plain(body, status=200, headers=None):
    return answer, {"status": status, "headers": headers, "body": body, "encoding": None}


def odd(value):
    """A body that suits any request but for one odd value, where a client will look for it."""
    return plain(b'{"jobId": "%b", "job_id": "%b", "modelId": "%b", "job_type": "refresh_schema", '
                 b'"status": %b, "detail": %b}'
                 % (MODEL.encode(), MODEL.encode(), MODEL.encode(), value, value))


ENCODERS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}

# The parameters of a fault with their defaults; those of "answer" suit every plain() and odd().
FAULTS = {
    "answer": plain("", status=500),
    "empty": plain(""),
    "html_502": plain("<html><head><title>502 Bad Gateway</title></head></html>\n", status=502,
                      headers={"Content-Type": "text/html"}),
    "wrong_shape": plain("[1, 2]"),
    "truncated": plain('{"jobId": "' + MODEL + '", "status": "comp'),
    "nested": odd(b"[" * 200_000 + b"]" * 200_000),
    "not_utf8": odd(b'"completed\xff\xfe"'),
    "nul": odd(b'"completed\0hidden"'),
    "nul_escape": odd(b'"completed\\u0000hidden"'),
    "raw": (raw, {"data": "", "hang": False}),
    "redirect": (redirect, {"location": "https://elsewhere.example/login"}),
    "echo_key": (echo_key, {}),
    "hang": (hang, {}),
    "hang_middle": (hang_middle, {}),
    "reset": (reset, {}),
    "close": (close, {}),
    "close_in_headers": (close_in_headers, {}),
    "delay": (delay, {"delay": 1.0}),
    "hold": (hold, {"file": ""}),
    "drip": (drip, {"delay": 0.1}),
    "huge": (huge, {"size": 100 << 20}),
}


class Server:
    """What outlives a reset, and the control requests, which do not count as API requests."""

    def __init__(self):
        self.omni = Omni()
        self.numbers = itertools.count(1)   # of connections; next() is atomic

    def control(self, request):
        omni, action, reply = self.omni, f"{request['method']} {request['path']}", {}
        try:
            arguments = json.loads(request["body"] or "{}")
            if action == "POST /control/set":
                omni.set(arguments)
            elif action == "POST /control/fault":
                omni.order(**arguments)
            elif action == "POST /control/reset":
                self.omni = Omni()
                omni.release()
            elif action == "GET /control/stats":
                reply = omni.stats
            elif action == "GET /control/known":
                reply = omni.known
            elif action == "GET /control/requests":
                reply = omni.requests
            else:
                raise ValueError(f"unrecognized control request: {action}")
            with omni.lock:
                return render(200, json.dumps(reply).encode())
        except (ValueError, TypeError, AttributeError, re.error) as error:
            return render(400, json.dumps({"error": str(error)}).encode())


class Connection:
    """Speaks HTTP/1.1 on one socket, in a thread of its own. The http.server of Python would take
    several times as long for each request and write to the log."""

    def __init__(self, server, sock, context=None):
        self.server, self.sock, self.context = server, sock, context
        self.number = next(server.numbers)
        self.buffer = b""

    def run(self):
        with contextlib.suppress(OSError):  # the client went away, as in some tests it should
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.context:    # not sooner: a client stuck in its handshake holds up only itself
                self.sock = self.context.wrap_socket(self.sock, server_side=True)
            while (request := self.read()) and self.serve(request):
                pass
        self.sock.close()

    def read(self):
        """Returns the next request in the form in which it is recorded; None at the end."""
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            if not self.receive():
                return None
        start, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
        method, target, version = start.split(" ")
        path, _, query = target.partition("?")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        stop = end + 4 + int(headers.get("content-length", 0))
        while len(self.buffer) < stop:
            if not self.receive():
                return None
        body, self.buffer = self.buffer[end + 4:stop], self.buffer[stop:]
        self.keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        return {"n": None, "time": time.time(), "method": method, "path": path, "query": query,
                "headers": headers, "body": body.decode("utf-8", "surrogatepass"),
                "connection": self.number, "tls": self.context is not None, "status": None}

    def receive(self):
        data = self.sock.recv(65536)
        self.buffer += data
        return data

    def serve(self, request):
        """Answers a request; tells whether the connection can take another one."""
        if self.context is None and request["path"].startswith("/control/"):
            self.sock.sendall(self.server.control(request))
            return self.keep
        omni = self.server.omni
        fault = omni.arrive(self, request)
        status = fault and fault["name"]
        try:
            if fault:
                reply = fault["function"](self, omni, request, **fault["extras"])
            else:
                status, reply = omni.answer(request)
        finally:
            omni.leave(self, request, status)   # a client that has the answer finds it recorded
        if reply is None:
            return False
        self.sock.sendall(reply)
        return self.keep

    def pause(self, seconds=None):
        """Waits; true when the time is over, false when the client is gone or cut() was called."""
        # A timeout of 0 would mean not to wait at all, and raise another error.
        self.sock.settimeout(None if seconds is None else max(float(seconds), 1e-6))
        try:
            while self.receive():
                pass
            return False
        except socket.timeout:
            return True
        finally:
            self.sock.settimeout(None)

    def cut(self):
        """Ends what the connection's own thread waits for, so not by way of its TLS state."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)


def listen(handle, port=0, host="127.0.0.1"):
    """Calls handle(socket) for each connection, in a new thread; returns the port."""
    listener = socket.create_server((host, port), backlog=1024)

    def accept():
        while True:
            threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener.getsockname()[1]


def fill_backlog(host):
    """Returns a listener whose further connections the kernel leaves incomplete, and its fill."""
    sockets = [socket.create_server((host, 0), backlog=0)]
    while True:
        sockets.append(socket.socket())
        sockets[-1].settimeout(0.05)        # far longer than a loopback connection takes
        try:
            sockets[-1].connect(sockets[0].getsockname())
        except socket.timeout:
            return sockets


# "openssl ca" rather than "openssl x509", which cannot date a certificate back in the OpenSSL of
# every release. The listeners share one key and one request; the sections name their hosts.
OPENSSL_CONFIG = """
[req]
distinguished_name = name
x509_extensions = authority
[name]
commonName = supplied
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[ca]
default_ca = ca
database = index.txt
unique_subject = no
new_certs_dir = .
rand_serial = yes
default_md = sha256
default_days = 30
policy = name
[good]
subjectAltName = DNS:localhost, DNS:two.example, IP:127.0.0.1
authorityKeyIdentifier = keyid
[wrong_host]
subjectAltName = DNS:elsewhere.example
authorityKeyIdentifier = keyid
"""


def make_certificates(directory):
    """Makes ca.pem and the listeners' certificates; returns a TLS context for each."""
    def openssl(command, *more):
        done = subprocess.run(["openssl", *command.split(), "-config", "openssl.cnf", *more],
                              cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            sys.exit(f"openssl {command}: {done.stdout}")

    def issue(name, authority, hosts, dates=""):
        openssl(f"ca -batch -notext -in server.csr -cert {authority}.pem -keyfile {authority}.key"
                f" -extensions {hosts} -out {name}.pem {dates}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"{directory}/{name}.pem", f"{directory}/server.key")
        return context

    with open(f"{directory}/openssl.cnf", "w") as config, open(f"{directory}/index.txt", "w"):
        config.write(OPENSSL_CONFIG)
    new = "req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    openssl(f"{new} -x509 -days 30 -keyout ca.key -out ca.pem", "-subj", "/CN=omni_api CA")
    openssl(f"{new} -x509 -days 30 -keyout other.key -out other.pem", "-subj", "/CN=another CA")
    openssl(f"{new} -keyout server.key -out server.csr", "-subj", "/CN=omni_api")
    return {
        "https": issue("good", "ca", "good"),
        "https_wrong_host": issue("wrong_host", "ca", "wrong_host"),
        "https_expired": issue("expired", "ca", "good",
                               "-startdate 20200101000000Z -enddate 20200102000000Z"),
        "https_unknown_ca": issue("unknown_ca", "other", "good"),
    }


def main():
    # Blocked before there are threads, so that none but sigwait() gets them: whenever one comes,
    # the directory is removed.
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with tempfile.TemporaryDirectory(prefix="omni_api_") as directory:
        server = Server()
        refused = socket.socket()           # bound, so that nobody else comes to listen there
        refused.bind(("127.0.0.1", 0))
        filled = fill_backlog("127.0.0.1")
        first = fill_backlog("127.0.0.2")   # of the two addresses of a host
        silent = socket.create_server(("127.0.0.1", 0), backlog=1024)   # the kernel alone accepts
        ports = {name: sock.getsockname()[1] for name, sock in (
            ("refused", refused), ("connect_hangs", filled[0]), ("tls_hangs", silent))}
        contexts = make_certificates(directory)
        ports["second_address"] = listen(lambda sock: Connection(server, sock, contexts["https"]).run(),
                                         first[0].getsockname()[1], "127.0.0.3")
        for name, context in contexts.items():
            ports[name] = listen(lambda sock, context=context:
                                 Connection(server, sock, context).run())
        urls = {name: f"https://127.0.0.1:{port}" for name, port in ports.items()}
        urls["second_address"] = f"https://two.example:{ports['second_address']}"
        port = listen(lambda sock: Connection(server, sock).run(), PORT)
        urls["http"] = f"http://127.0.0.1:{port}"
        ready = {**urls, "ca": f"{directory}/ca.pem", "key": KEY, "model": MODEL, "branch": BRANCH}
        print(json.dumps(ready), flush=True)

        def watch_input():
            with contextlib.suppress(OSError):
                while os.read(0, 65536):
                    pass
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch_input, daemon=True).start()
        signal.sigwait(signals)
    os._exit(0)     # at once, whatever the connections' threads are doing


if __name__ == "__main__":
    main()
