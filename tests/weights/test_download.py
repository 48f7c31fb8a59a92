"""The download of OpenAI's dVAE adds up, whatever the network does; the server here fails as it is told to."""

import hashlib
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from fastbeit.cli import main
from fastbeit.errors import CANNOT_WRITE, CHECKPOINT_UNUSABLE, DATA_MISSING, RunError
from fastbeit.files import sha256
from fastbeit.tokenizer.disk import load_tokenizer
from fastbeit.weights import download as fetch
from fastbeit.weights.download import RETRIES, fetch_tokenizer
from helpers.dalle import TINY, official, official_tokens, random_images, save

OPENAI = fetch.SOURCES["openai"]
FILES = ENCODER, DECODER = OPENAI.files


@dataclass(frozen=True)
class Step:
    """How one request is answered."""

    cut: int | None = None  # the connection ends after so many bytes
    status: int = 200
    ranges: bool = True  # whether Range is honoured
    if_range: bool = True  # whether If-Range is
    shift: int = 0  # a 206 that begins so many bytes too late
    validator: str = 'ETag: "{}"'
    stall_s: float = 0.0  # nothing comes for so long, before the answer
    hang_s: float = 0.0  # and after it, with the connection left open


GOOD, BUSY = Step(), Step(status=503)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.plan: list[Step] = []  # of the next requests; those after it are answered well
        self.seen: list[tuple[str, str | None]] = []  # path and Range of each
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.source = OPENAI._replace(url=self.url)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that did not wait."""


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        name, wanted = self.path[1:], self.headers["Range"]
        self.server.seen.append((name, wanted))
        step = self.server.plan.pop(0) if self.server.plan else GOOD
        time.sleep(step.stall_s)
        if step.status != 200:
            self.send_error(step.status)
            return
        content = self.server.files[name]
        validator = step.validator.format(hashlib.sha256(content).hexdigest())
        is_same = self.headers["If-Range"] in (None, validator.partition(": ")[2]) or not step.if_range
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and step.ranges and is_same else None
        if begin is not None and begin >= len(content):
            self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        place = {} if begin is None else {"Content-Range": f"bytes {begin + step.shift}-{len(content)}/{len(content)}"}
        body = content[(begin or 0) + step.shift :]
        headers = dict([validator.split(": ")] if validator else [])
        self.answer(206 if place else 200, {**place, **headers, "Content-Length": str(len(body))})
        self.wfile.write(body[: step.cut])
        time.sleep(step.hang_s)

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not wanted."""


@pytest.fixture(autouse=True)
def unproven(monkeypatch):
    """Files here hold random weights; tests/weights/test_proof.py has trained ones."""
    monkeypatch.setattr("fastbeit.weights.tokenizers.prove", lambda encoder, decoder: "not proven")


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("nets")
    return {name: save(net, folder / name).read_bytes() for name, net in zip(FILES, official(TINY), strict=True)}


@pytest.fixture
def server(nets, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(dict(nets)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetched(server: Server, out: Path, *plan: Step) -> list[str | None]:
    """Fetch, make sure that what is there now is what the server has, and return the ranges asked of the encoder."""
    server.plan, server.seen = list(plan), []
    fetch_tokenizer(out, server.source, pause_s=0)
    assert not server.plan
    assert {name: (out / name).read_bytes() for name in FILES} == server.files
    assert sorted(path.name for path in out.iterdir()) == [DECODER, "dvae.json", "dvae.safetensors", ENCODER]
    return [begin for name, begin in server.seen if name == ENCODER]


def failed(server: Server, out: Path, *plan: Step) -> str:
    """Fetch in vain; the message."""
    server.plan, server.seen = list(plan), []
    with pytest.raises(RunError) as err:
        fetch_tokenizer(out, server.source, pause_s=0)
    assert err.value.exit_code == DATA_MISSING and not server.plan
    return str(err.value)


def test_the_pair_is_fetched_and_imported(server, tmp_path):
    out = tmp_path / "deep" / "dvae"
    report = fetch_tokenizer(out, server.source)
    for name in FILES:
        assert f"sha256 {sha256(out / name)}  {out / name}" in report
    assert "compare" in report and "32 words; encodes and decodes" in report
    assert server.url in (out / "dvae.json").read_text()
    pixels = random_images(1, 16, 24)
    assert torch.equal(load_tokenizer(out).encode(pixels), official_tokens(official(TINY)[0], pixels))
    # what is there is not asked for again
    assert fetched(server, out) == [] and fetch_tokenizer(out, server.source) == report


@pytest.mark.parametrize("name", ["flava", "mmpretrain"])
def test_copies_of_others_hold_an_encoder_alone(server, tmp_path, monkeypatch, capsys, name):
    (file,) = fetch.SOURCES[name].files
    server.files = {file: save(official(TINY)[0].state_dict(), tmp_path / "x").read_bytes()}
    monkeypatch.setitem(fetch.SOURCES, name, fetch.SOURCES[name]._replace(url=server.url))
    assert main(["tokenizer", "fetch", "--from", name, "-o", str(tmp_path / "dvae")]) == 0
    assert "no decoder" in capsys.readouterr().out and [path for path, _ in server.seen] == [file]


def test_a_connection_that_is_cut_is_made_again_from_there(server, tmp_path):
    ranges = fetched(server, tmp_path, Step(cut=1000), Step(cut=50_000), GOOD, Step(cut=7), GOOD)
    assert ranges == [None, "bytes=1000-", "bytes=51000-"]
    assert server.seen[-1] == (DECODER, "bytes=7-")


def test_a_later_command_goes_on(server, tmp_path):
    message = failed(server, tmp_path, Step(cut=1000), *[BUSY] * RETRIES)
    assert "encoder.pkl: 503" in message
    assert (tmp_path / "encoder.pkl.part").stat().st_size == 1000
    # a command that gets no byte gives up at once
    assert "503" in failed(server, tmp_path, BUSY)
    assert fetched(server, tmp_path) == ["bytes=1000-"]


def test_retries_count_anew_after_each_byte(server, tmp_path):
    ranges = fetched(server, tmp_path, *[Step(cut=10), BUSY] * (2 * RETRIES), GOOD)
    assert ranges[-1] == f"bytes={20 * RETRIES}-"


BEGIN_AGAIN = {
    "knows no ranges": (GOOD, [Step(ranges=False)], ["bytes=1000-"]),
    "sends other bytes": (GOOD, [Step(shift=3)], ["bytes=1000-", None]),
    "has a weak ETag": (Step(validator='ETag: W/"{}"'), [], [None]),
    "says nothing": (Step(validator=""), [], [None]),
}


@pytest.mark.parametrize("how, plan, ranges", BEGIN_AGAIN.values(), ids=list(BEGIN_AGAIN))
def test_a_server_that_cannot_go_on_sends_all(server, tmp_path, how, plan, ranges):
    cut = Step(cut=1000, validator=how.validator)
    failed(server, tmp_path, cut, *[BUSY] * RETRIES)
    assert fetched(server, tmp_path, *plan) == ranges


def test_last_modified_will_do(server, tmp_path):
    step = Step(cut=1000, validator="Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT")
    failed(server, tmp_path, step, *[BUSY] * RETRIES)
    assert fetched(server, tmp_path, Step(validator=step.validator)) == ["bytes=1000-"]


@pytest.mark.parametrize("if_range, ranges", [(True, ["bytes=100000-"]), (False, ["bytes=100000-", None])])
def test_a_file_that_changed_is_no_mixture(server, tmp_path, if_range, ranges):
    other = save(official(TINY)[0].half().float(), tmp_path / "other").read_bytes()
    (tmp_path / "other").unlink()
    failed(server, tmp_path, Step(cut=100_000), *[BUSY] * RETRIES)
    server.files[ENCODER] = other
    assert fetched(server, tmp_path, Step(if_range=if_range)) == ranges


def test_a_part_that_is_whole_is_taken(server, tmp_path):
    whole = len(server.files[ENCODER])
    failed(server, tmp_path, Step(cut=whole - 1), *[BUSY] * RETRIES)
    (tmp_path / "encoder.pkl.part").write_bytes(server.files[ENCODER])
    assert fetched(server, tmp_path) == [f"bytes={whole}-"]


def test_a_part_that_is_too_long_is_not(server, tmp_path):
    failed(server, tmp_path, Step(cut=1000), *[BUSY] * RETRIES)
    (tmp_path / "encoder.pkl.part").write_bytes(bytes(1 << 20))
    assert fetched(server, tmp_path) == [f"bytes={1 << 20}-", None]


@pytest.mark.parametrize("status", [404, 403, 416, 503])
def test_a_server_without_the_file(server, tmp_path, status):
    message = failed(server, tmp_path, Step(status=status))
    assert str(status) in message
    for name in FILES:
        assert f"{server.url}/{name}  to  {tmp_path / name}" in message


def test_what_cannot_get_better_is_not_tried_again(server, tmp_path):
    failed(server, tmp_path, Step(cut=1000), Step(status=404))
    assert (tmp_path / "encoder.pkl.part").stat().st_size == 1000


def test_an_error_page_is_no_weights_and_is_not_kept(server, tmp_path):
    good = server.files[ENCODER]
    server.files[ENCODER] = b"<html>We'll be back soon</html>"
    with pytest.raises(RunError, match="encoder.pkl did not send weights: .* is a web page") as err:
        fetch_tokenizer(tmp_path, server.source)
    assert err.value.exit_code == CHECKPOINT_UNUSABLE and list(tmp_path.iterdir()) == []
    server.files[ENCODER] = good
    assert fetched(server, tmp_path) == [None]


def test_a_server_that_stalls_is_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT_S", 1.0)  # on a busy machine an answer takes a while
    assert "timed out" in failed(server, tmp_path, Step(stall_s=10))
    assert fetched(server, tmp_path, Step(cut=1000, hang_s=10)) == [None, "bytes=1000-"]


def test_without_a_network_it_says_what_to_do_at_once(tmp_path, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(RunError, match="cannot be reached .*refused.*\n.*encoder.pkl  to .*\n.*decoder.pkl  to "):
            # it would wait for a day
            fetch_tokenizer(tmp_path, OPENAI._replace(url=url), pause_s=86_400)

    def no_network(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(fetch, "urlopen", no_network)
    assert main(["tokenizer", "fetch", "-o", str(tmp_path)]) == DATA_MISSING
    stderr = capsys.readouterr().err
    assert "Name or service not known" in stderr and "Traceback" not in stderr
    for name in FILES:
        assert f"https://cdn.openai.com/dall-e/{name}  to  {tmp_path / name}" in stderr


def test_files_put_there_by_hand_are_taken(server, tmp_path, nets):
    (tmp_path / ENCODER).write_bytes(nets[ENCODER])
    assert f"{DECODER}  to  " in (message := failed(server, tmp_path, Step(status=404)))
    assert f"{ENCODER}  to  " not in message
    (tmp_path / DECODER).write_text("<html>not found</html>")
    with pytest.raises(RunError, match="decoder.pkl' is a web page.*; delete what is wrong in"):
        fetch_tokenizer(tmp_path, server.source)
    (tmp_path / DECODER).unlink()
    assert fetched(server, tmp_path) == []


def test_a_place_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written") as err:
        fetch_tokenizer(tmp_path / "file", server.source)
    assert err.value.exit_code == CANNOT_WRITE
