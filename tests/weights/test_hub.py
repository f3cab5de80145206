"""Failures of the hub.

A local server implements as much of its protocol as a download needs, and fails as it is told.
"""

import contextlib
import email.utils
import hashlib
import http.server
import json
import os
import pathlib
import shlex
import subprocess
import sys
import threading
import time

import huggingface_hub
import pytest
from huggingface_hub import constants, utils
from huggingface_hub import errors as hub_errors

from referee_jax.weights import generators, hub, load

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "clip"}', "model.safetensors": b"weights " * 4000, "pytorch_model.bin": b"no"}
FILES["README.md"] = b"---\nlicense: openrail++\ntags: [x]\n---\n# A model\n"


class FakeHub(http.server.ThreadingHTTPServer):
    """A request (`GET /path`) that has the word of one of `failures`, `(word, status, headers)`, uses it up."""

    daemon_threads = True

    def __init__(self, failures=(), always=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.always = list(failures), always
        self.asked, self.lock = [], threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def models(self):
        """The requests, without those that the library makes for itself."""
        return [request for request, _ in self.asked if "some/" in request]

    def failure(self, request):
        with self.lock:
            for one in self.failures:
                if one[0] in request:
                    self.failures.remove(one)
                    return one
        return self.always


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):  # noqa: N802 - the library's name
        self.do_GET()

    def do_GET(self):  # noqa: N802
        request = f"{self.command} {self.path}"
        self.server.asked.append((request, time.monotonic()))
        failure = self.server.failure(request)
        if failure and failure[1] == "silence":
            time.sleep(3)
            self.close_connection = True
        elif failure:
            self.answer(b'{"error": "on order"}', failure[1], failure[2])
        elif "/tree/" in self.path:
            self.answer(
                json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in FILES.items()
                    ]
                ).encode()
            )
        elif self.path.startswith("/api/models/"):
            self.answer(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": [], "tags": []}).encode())
        elif (name := self.path.rsplit("/", 1)[1]) in FILES:
            if "slow" in self.path:
                time.sleep(1)
            self.answer(
                FILES[name], 200, {"ETag": f'"{hashlib.sha1(FILES[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            )
        else:
            self.answer(b"", 404, {})

    def answer(self, data, status=200, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextlib.contextmanager
def serve(*failures, always=None):
    server = FakeHub(failures, always)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


PATTERNS = ["config.json", "model.safetensors", "model-*-of-*.safetensors"]


@pytest.fixture
def client(monkeypatch, tmp_path):
    """`client(server)` points this process to a server; its cache is `tmp_path`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.1)

    def point(server):
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    utils.disable_progress_bars()
    yield point
    utils.enable_progress_bars()
    huggingface_hub.close_session()


def resolve(revision=None):
    return hub.resolve("some/model", revision, PATTERNS)


def environment(server, cache):
    variables = {"HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    return os.environ | variables | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def run_command(command, server, cache):
    """Runs an `hf ...` as a user would after reading the message."""
    program, *rest = shlex.split(command)
    program = pathlib.Path(sys.executable).with_name(program)
    subprocess.run([program, *rest], env=environment(server, cache), check=True, timeout=120, stdout=subprocess.DEVNULL)


def holds_the_files(directory):
    names = {file.name: file.read_bytes() for file in pathlib.Path(directory).iterdir()}
    assert names == {name: FILES[name] for name in ("README.md", "config.json", "model.safetensors")}


@pytest.mark.parametrize(
    ("failures", "revision", "retries"),
    [
        ([("/api/models/", 503, {}), ("/api/models/", 500, {})], None, 2),
        ([("/api/models/", "silence", {})], None, 1),
        ([("/tree/", "silence", {})], COMMIT, 0),  # here huggingface_hub asks again by itself, but would wait for ever
        ([("GET /some/model/resolve", 502, {})] * 2, COMMIT, 1),
    ],
    ids=["5xx", "silence", "silent listing", "5xx of two files at once"],
)
def test_a_passing_failure_is_waited_for(failures, revision, retries, client, caplog):
    with serve(*failures) as server:
        client(server)
        directory = resolve(revision)
    holds_the_files(directory)
    assert not server.failures and directory.name == COMMIT
    assert caplog.text.count("of 4); again in") == retries


def test_retry_after_is_honoured(client):
    with serve(("/api/models/", 429, {"Retry-After": "2"})) as server:
        client(server)
        holds_the_files(resolve())
    first, second = (when for request, when in server.asked if "/revision/" in request)
    assert second - first > 2


def test_a_hub_that_stays_away(client, tmp_path, caplog):
    """One line after a few tries.

    The command that it names gets what is then found without the hub.
    """
    with serve(always=("", 500, {})) as server:
        client(server)
        with pytest.raises(load.WeightsError) as caught:
            resolve()
    assert len(server.models) == hub.TRIES and caplog.text.count("again in") == hub.TRIES - 1
    message = str(caught.value)
    assert "\n" not in message and message.startswith("some/model is not a local directory, and getting it from the")
    assert "500 Internal Server Error" in message or "500 Server Error" in message
    command = message.partition("where there is a network, run: ")[2]
    assert command == hub.download_command("some/model", None, [*PATTERNS, "README.md"])
    with serve() as server:
        run_command(command, server, tmp_path)
    with serve(always=("", 500, {})) as server:
        client(server)
        holds_the_files(resolve())


LOGIN = r"`hf auth login` \(or HF_TOKEN\)"
BAD_TOKEN = "Invalid credentials in Authorization header"
# What is refused -> the request, status and headers of the hub's answer; the message.
REFUSALS = {
    "gated, anonymous": (
        "/resolve/", 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted. Please log in."},
        rf"to those who accept its terms: accept them at http://.*/some/model, and log in with {LOGIN}$",
    ),
    "gated, not accepted": (
        "/resolve/", 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."},
        rf"to those who accept its terms: accept them at http://.*/some/model, and log in with {LOGIN}$",
    ),
    "gated listing": (
        "/api/models/", 403, {"X-Error-Code": "GatedRepo"},
        rf"to those who accept its terms: accept them at http://.*/some/model, and log in with {LOGIN}$",
    ),
    "private or misspelt, anonymous": (
        "/api/models/", 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."},
        rf"the hub has no some/model, or it is private: correct the name, or log in with {LOGIN} as who may read it$",
    ),
    "private or misspelt, logged in": (
        "/api/models/", 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
        rf"the hub has no some/model, or it is private: correct the name, or log in with {LOGIN} as who may read it$",
    ),
    "bad token": (
        "/api/models/", 401, {"X-Error-Message": BAD_TOKEN},
        rf"the hub does not accept the token of this machine \({BAD_TOKEN}\): log in anew with {LOGIN}$",
    ),
    "old token": (
        "/api/models/", 401, {"X-Error-Message": 'User Access Token "mine" is expired'},
        rf"token of this machine \(User Access Token \"mine\" is expired\): log in anew with {LOGIN}$",
    ),
    "narrow token": (
        "/api/models/", 403, {"X-Error-Message": "The token has no right to read"},
        rf"the hub forbids some/model \(The token has no right to read\): log in with {LOGIN} as who may read it$",
    ),
    "unknown revision": (
        "/revision/", 404, {"X-Error-Code": "RevisionNotFound"},
        r"some/model has no revision 'v9' on the hub: choose one of http://.*/some/model/commits/main$",
    ),
    "disabled": (
        "/api/models/", 403, {"X-Error-Message": "Access to this resource is disabled."},
        "the hub has disabled some/model: choose another checkpoint$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_which_it_is(case, client):
    """And what to do; it is not asked again, nor is a command named that would fail as well."""
    request, status, headers, message = REFUSALS[case]
    with serve(*[(request, status, headers)] * 9) as server:
        client(server)
        with pytest.raises(load.WeightsError, match=message) as caught:
            resolve("v9")
    assert str(caught.value).startswith("some/model is not a local directory, and ")
    assert "hf download" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_commit(client):
    with serve(("/tree/", 404, {"X-Error-Code": "RevisionNotFound"})) as server:
        client(server)
        with pytest.raises(load.WeightsError, match=rf"some/model has no revision '{COMMIT}' on the hub"):
            resolve(COMMIT)


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (["model.fp16.safetensors", "model.bf16.safetensors"], ["model.fp16.safetensors", "model.bf16.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors", "pytorch_model.fp16.bin"],
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"],
        ),
    ],
)
def test_a_variant_is_fetched_where_there_is_nothing_else(there, fetched, client, monkeypatch):
    monkeypatch.setitem(globals(), "FILES", {name: b"{}" for name in ("config.json", *there)})
    with serve() as server:
        client(server)
        directory = load.fetch_referee("some/model")
    assert {file.name for file in directory.iterdir()} == {"config.json", *fetched}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "only safetensors are read, as pickled files can run code"),
        ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors is a LoRA: one of a generator"),
        ("v1-5-pruned.safetensors", "a checkpoint is a directory"),
    ],
)
def test_a_repository_of_another_layout(name, message, client, monkeypatch):
    """What is there is named, though it is not fetched."""
    monkeypatch.setitem(globals(), "FILES", {"README.md": b"", name: b"weights"})
    with serve() as server:
        client(server)
        for fetch in (load.fetch_referee, generators.load_generator):
            with pytest.raises(load.WeightsError, match=rf"some/model: .*is missing \(there is {name}\); {message}"):
                fetch("some/model")
    assert not [request for request in server.models if name in request]


@pytest.mark.parametrize(("revision", "requests"), [(None, 1), (COMMIT, 0)])
def test_the_cache_serves_while_the_hub_is_away(revision, requests, client):
    with serve() as server:
        client(server)
        resolve()
    with serve(always=("", 429, {"Retry-After": "100"})) as server:
        client(server)
        holds_the_files(resolve(revision))
    assert len(server.models) == requests


def test_the_commit_of_what_is_in_the_cache(client, tmp_path):
    with serve() as server:
        client(server)
        assert hub.commit("some/model", None) is None
        hub.resolve("some/model", None, PATTERNS)
        assert hub.commit("some/model", None) == hub.commit("some/model", COMMIT) == COMMIT
        assert hub.commit("some/model", "0" * 40) is None
    assert hub.commit(str(tmp_path), None) is None and hub.commit("no id!", None) is None


def test_the_license_of_a_checkpoint(client, tmp_path):
    """As its card says, which came with the files."""
    assert hub.license_of("some/model", None) is None
    with serve() as server:
        client(server)
        resolve()
    assert hub.license_of("some/model", None) == hub.license_of("some/model", COMMIT) == "openrail++"
    for text in ("---\nlicense: [\n---\n", "# no front matter", "---\nlicense: \n---\n", "\udcff"):
        (tmp_path / "README.md").write_text(text, errors="surrogateescape")
        assert hub.license_of(str(tmp_path), None) is None


def test_a_cache_without_the_card_serves_while_the_hub_is_away(client):
    with serve() as server:
        client(server)
        (resolve() / "README.md").unlink()
    with serve(always=("", 429, {"Retry-After": "400"})) as server:
        client(server)
        directory = resolve()
    assert sorted(file.name for file in directory.iterdir()) == ["config.json", "model.safetensors"]
    assert hub.license_of("some/model", None) is None


def test_half_a_snapshot_is_not_taken_for_one(client):
    with serve() as server:
        client(server)
        (resolve() / "model.safetensors").unlink()
    with serve(always=("", 503, {})) as server:
        client(server)
        with pytest.raises(
            load.WeightsError, match=r"is incomplete: 1 file\(s\) are missing \(model\.safetensors\).* run: hf"
        ):
            resolve()


RESOLVE = """
import sys
from referee_jax.weights import hub
print(hub.resolve(sys.argv[1], None, sys.argv[2:]))
"""


def test_two_processes_download_once(tmp_path):
    with serve() as server:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", RESOLVE, "some/slow", *PATTERNS],
                env=environment(server, tmp_path),
                cwd=pathlib.Path(hub.__file__).parents[2],
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for process in processes:
            holds_the_files(process.communicate(timeout=120)[0].strip())
    downloads = sorted(asked for asked in server.models if asked.startswith("GET /some"))
    assert downloads == [
        f"GET /some/slow/resolve/{COMMIT}/{name}" for name in ("README.md", "config.json", "model.safetensors")
    ]


def test_one_waits_for_the_other(client, caplog):
    """Threads for processes: a lock is of the file that was opened."""
    inside, most = [], []

    def hold():
        with hub._one_at_a_time("some/model"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.3)
            inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1] and "another process is getting some/model; waiting for it" in caplog.text


def test_without_a_lock_it_is_downloaded_all_the_same(client, tmp_path):
    (tmp_path / ".locks" / "referee_jax--some--model.lock").mkdir(parents=True)
    with serve() as server:
        client(server)
        holds_the_files(resolve())


def test_a_file_that_is_not_as_long_as_the_hub_says(client, tmp_path):
    with serve() as server:
        client(server)
        blob = (resolve() / "model.safetensors").resolve()
        blob.write_bytes(blob.read_bytes()[:-1])
        with pytest.raises(
            load.WeightsError, match=r"/model\.safetensors is damaged: 31999 bytes, on the hub 32000"
        ) as caught:
            resolve()
        run_command(str(caught.value).partition("; run: ")[2], server, tmp_path)
        holds_the_files(resolve())


# How long is waited, and for what.


class Answer:
    def __init__(self, status, **headers):
        self.status_code, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


def failed(answer=None, error=hub_errors.HTTPError):
    """An error as huggingface_hub raises it: without an answer of the server, the cause of another."""
    cause = error("failed")
    if answer:
        cause.response = answer
    outer = hub_errors.LocalEntryNotFoundError("not in the cache")
    outer.__cause__ = cause
    return outer


@pytest.mark.parametrize(
    ("error", "tries", "low", "high"),
    [
        (failed(), 1, 2, 3),  # the line is down
        (failed(), 3, 8, 12),
        (failed(Answer(503)), 2, 4, 6),
        (failed(Answer(429, retry_after="7")), 1, 7, 8),
        (failed(Answer(429, retry_after="1")), 1, 2, 3),
        (failed(Answer(429, ratelimit='"api";r=0;t=55')), 1, 55, 56),
        (failed(Answer(503, retry_after="nonsense")), 1, 2, 3),
    ],
)
def test_waiting(error, tries, low, high):
    waits = {hub._wait(error, tries) for _ in range(20)}
    assert all(low <= wait <= high for wait in waits) and len(waits) > 10


def test_waiting_until_a_date():
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < hub._wait(failed(Answer(503, retry_after=date)), 1) < 61


@pytest.mark.parametrize(
    "error",
    [
        failed(Answer(404)),
        failed(Answer(403)),
        failed(Answer(429, retry_after="3600")),
        failed(error=hub_errors.OfflineModeIsEnabled),
        OSError(28, "No space left on device"),
    ],
)
def test_what_will_not_pass_is_not_waited_for(error):
    assert hub._wait(error, 1) is None


def test_a_referee_is_one_command():
    """All that is read of it, the tokenizer and the image processor included."""
    with pytest.raises(load.WeightsError) as caught:
        load.fetch_referee("Salesforce/blip-itm-base-coco")
    for name in ("config.json", "model.safetensors", "'*token*.json'", "preprocessor_config.json"):
        assert f" --include {name}" in str(caught.value)


def test_a_version_is_what_is_read(client, tmp_path):
    """Of a directory, its digest: of names and contents, without what nothing is read from; of the hub, the commit."""
    directory = tmp_path / "clip"
    for name, content in {"config.json": "{}", "unet/model.safetensors": "weights", ".cache/x.json": "a"}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    before = hub.version(str(directory))
    assert before == hub.version(str(directory), "main") and len(before) == 16
    for name in ("README.md", ".cache/x.json", "pytorch_model.bin"):
        (directory / name).write_text("other")
    assert hub.version(str(directory)) == before
    (directory / "unet" / "model.safetensors").rename(directory / "model.safetensors")
    moved = hub.version(str(directory))
    (directory / "model.safetensors").write_text("Weights")
    assert len({before, moved, hub.version(str(directory))}) == 3
    assert hub.version("shapes/clip") == hub.digest(hub.ASSETS / "clip") != hub.version("shapes/blip2")
    with serve() as server:
        client(server)
        assert hub.version("some/model") == COMMIT
