"""OpenAI's dVAE from where someone keeps it: downloaded, in as many pieces as the network makes of it, and imported.

A download that was cut goes on after the bytes in `NAME.part`, if the server still has the file that they are of:
`NAME.part.etag` remembers what it calls that file, for `If-Range` (RFC 9110, 13.1.5). A server that knows no ranges, or
has another file by now, sends all of it, which then replaces what was there.
"""

import sys
import time
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from fastbeit import __version__
from fastbeit.errors import CANNOT_WRITE, DATA_MISSING, RunError, TokenizerError
from fastbeit.files import sha256, sync
from fastbeit.tokenizer.disk import refuse_to_replace
from fastbeit.weights.tokenizers import import_tokenizer, read_released


class Source(NamedTuple):
    """Where files of the tokenizer are kept."""

    url: str  # of their folder
    files: tuple[str, ...]


# one network, in three places; OpenAI's alone has the decoder, which pictures of tokens want
SOURCES = {
    "openai": Source("https://cdn.openai.com/dall-e", ("encoder.pkl", "decoder.pkl")),
    "flava": Source("https://huggingface.co/facebook/flava-image-codebook/resolve/main", ("pytorch_model.bin",)),
    "mmpretrain": Source("https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt", ("dalle_encoder.pth",)),
}
TIMEOUT_S, CHUNK_BYTES = 30.0, 1 << 18
RETRIES = 5  # in a row without a byte between them
BUSY = {408, 429, 500, 502, 503, 504}  # answers that another time may be better


class Dropped(Exception):
    """The server was not reached, or did not send all."""

    def __init__(self, message: str, num_bytes: int = 0, worth_another: bool = True) -> None:
        super().__init__(message)
        self.num_bytes, self.worth_another = num_bytes, worth_another  # received before; whether to try again


def fetch_tokenizer(out: Path, source: Source = SOURCES["openai"], pause_s: float = 1.0) -> str:
    """Have a source's files in `out`, import them, and return a report for the user; files that are there are kept.

    Args:
        pause_s: before the first retry; it doubles with each.

    Raises:
        RunError: there is no network or no such file (exit code 66), `out` holds another tokenizer (2), or cannot be
            written (74).
        TokenizerError: what came, or was there, is no such tokenizer.
    """
    missing = [name for name in source.files if not (out / name).is_file()]
    if missing:
        refuse_to_replace(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in missing:
            download(f"{source.url}/{name}", out / name, pause_s)
    except Dropped as err:
        raise RunError(_by_hand(str(err), source, out), DATA_MISSING) from err
    except OSError as err:
        raise RunError(f"'{out}' cannot be written: {err}", CANNOT_WRITE) from err
    sums = [f"sha256 {sha256(out / name)}  {out / name}" for name in source.files]
    try:
        report = import_tokenizer([out / name for name in source.files], out, {"url": source.url})
    except TokenizerError as err:
        raise TokenizerError(f"{err}; delete what is wrong in '{out}' and give the same command again") from None
    return "\n".join([*sums, "compare these with a copy that you trust: no published checksums are known", report])


def _by_hand(reason: str, source: Source, out: Path) -> str:
    lines = [f"  {source.url}/{name}  to  {out / name}" for name in source.files if not (out / name).is_file()]
    others = ", ".join(name for name, other in SOURCES.items() if other != source)
    return "\n".join(
        [
            f"{reason}; without a network here, download by hand",
            *lines,
            f"the same command then goes on from there; --from {others} asks another server",
        ]
    )


def download(url: str, path: Path, pause_s: float = 1.0) -> None:
    """Put a file of weights in its place when all of it is there and can be read.

    Raises:
        Dropped: the server cannot be reached, has no such file, or fails again and again; what came is kept.
        TokenizerError: what came is no such weights; it is not kept.
        OSError: the disk.
    """
    part, failures, any_came = path.with_name(path.name + ".part"), 0, False
    if not sys.stderr.isatty():
        print(f"downloading {url} to {path}", file=sys.stderr)
    while True:
        try:
            _receive(url, part)
            break
        except Dropped as err:
            any_came |= err.num_bytes > 0
            failures = 1 if err.num_bytes else failures + 1
            # where nothing ever came there is no network, most likely: said at once
            if not any_came or not err.worth_another or failures > RETRIES:
                raise
            time.sleep(pause_s * 2 ** (failures - 1))
    try:
        read_released(part)
    except TokenizerError as err:
        _forget(part)
        raise TokenizerError(f"{url} did not send weights: {err}") from None
    sync(part)
    part.replace(path)
    _etag_file(part).unlink(missing_ok=True)


def _receive(url: str, part: Path) -> None:
    """One connection: what is missing of a file, appended to what is there; errors as `download`."""
    begin, etag = _kept(part)
    request = Request(url, headers={"User-Agent": f"fastbeit/{__version__}"})
    if begin:
        request.add_header("Range", f"bytes={begin}-")
        request.add_header("If-Range", etag)
    with _open(request) as response:
        sent = response.headers.get("Content-Range", "")
        if isinstance(response, HTTPError) and sent == f"bytes */{begin}":
            # all of it was there
            return
        goes_on = sent.startswith(f"bytes {begin}-") and _name_of(response) in ("", etag)
        if isinstance(response, HTTPError) or response.status == 206 and not goes_on:
            if not begin:
                raise Dropped(f"{url}: wanted all of it, got {response.status} '{sent}'", worth_another=False)
            # what is there does not go on with these bytes: begin again
            _forget(part)
            return _receive(url, part)
        if response.status != 206:
            begin = 0
            part.write_bytes(b"")
            _etag_file(part).write_text(_name_of(response))
        _append(response, part, begin, url)


def _open(request: Request) -> HTTPResponse | HTTPError:
    """The error is a 416: there are no bytes from where they were asked for."""
    try:
        return urlopen(request, timeout=TIMEOUT_S)
    except HTTPError as err:
        if err.code == 416:
            return err
        err.close()
        raise Dropped(f"{request.full_url}: {err.code} {err.reason}", worth_another=err.code in BUSY) from None
    except (OSError, HTTPException) as err:
        raise Dropped(f"{request.full_url} cannot be reached ({getattr(err, 'reason', err)})") from None


def _append(response: HTTPResponse, part: Path, begin: int, url: str) -> None:
    length = response.headers.get("Content-Length")
    total = begin + int(length) if length else None
    received = 0
    shown = {"unit": "B", "unit_scale": True, "dynamic_ncols": True, "disable": not sys.stderr.isatty()}
    with part.open("ab") as file, tqdm(desc=part.stem, total=total, initial=begin, **shown) as bar:
        while chunk := _chunk(response, received, url):
            file.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
    if total is not None and begin + received < total:
        raise Dropped(f"{url} was cut after {begin + received:,} of {total:,} bytes", received)


def _chunk(response: HTTPResponse, received: int, url: str) -> bytes:
    try:
        return response.read1(CHUNK_BYTES)
    except (OSError, HTTPException) as err:
        raise Dropped(f"{url} was cut ({err})", received) from None


def _name_of(response: HTTPResponse | HTTPError) -> str:
    """What the server calls this content; a weak ETag may stand for several, and does not count."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _kept(part: Path) -> tuple[int, str]:
    """How many bytes are there, and what they are of; none, where nobody can say."""
    file = _etag_file(part)
    etag = file.read_text(errors="replace") if file.is_file() and part.is_file() else ""
    return (part.stat().st_size, etag) if etag else (0, "")


def _etag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _etag_file(part).unlink(missing_ok=True)
