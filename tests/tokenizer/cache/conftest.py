"""A tiny run with a bad image, its tokens, and what trains with them."""

import json
import os
from pathlib import Path

import pytest

from fastbeit.jobs.pretrain import pretrain
from helpers.caches import BAD_IMAGE, CHUNK_CROPS, configured, make
from helpers.tiny import make_parts, write_config


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Config, index and tokenizer; one image went bad after it was indexed."""
    folder = tmp_path_factory.mktemp("parts")
    parts = {**make_parts(folder), "config": str(write_config(folder / "tiny.yaml"))}
    (folder / "photos" / f"{BAD_IMAGE:02}.jpg").write_bytes(b"")
    return parts


@pytest.fixture(scope="module", autouse=True)
def small():
    """Chunks of few rows; one thread, since nets of this size only wait for a second one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbeit.tokenizer.cache.writer.CHUNK_CROPS", CHUNK_CROPS)
        patch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
        yield


@pytest.fixture(scope="module")
def tokens(parts, tmp_path_factory) -> Path:
    """A finished cache, for reading only."""
    folder = tmp_path_factory.mktemp("finished") / "tokens"
    assert make(parts, folder) == 0
    return folder


@pytest.fixture
def train(parts, tmp_path):
    """Trains with overrides; gives what each line of its log says of steps and of validations."""

    def train(out: str, **overrides) -> list[dict]:
        config = configured(parts, out=tmp_path / out, **overrides)
        assert pretrain(config, ["fastbeit", "pretrain", "x.yaml"]) == 0
        lines = [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        return [line for line in lines if line.get("event") != "tokenizer"]

    return train
