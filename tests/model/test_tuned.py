"""The table of what was tuned: read for just its key, or passed over with a reason; never the end of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbeit.config.pretrain import Config
from fastbeit.errors import RunError
from fastbeit.jobs.pretrain import blank_inputs
from fastbeit.model import tuned
from fastbeit.model.beit import make_beit
from fastbeit.model.tuned import key_of, look_up, micro_batch, table_path, write_table
from fastbeit_kernels.linear_cross_entropy import linear_cross_entropy
from fastbeit_kernels.relative_attention import relative_attention_reference
from helpers.tiny import SETTINGS

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CHOICES = dict(attention="sdpa", attention_mib=None, loss_rows=4096)
TIMES = {"attention=sdpa": 4.8}


def key(num_ranks: int = 1, **settings: Any) -> tuned.Key:
    return key_of(Config.model_validate(SETTINGS | settings), 32, num_ranks, CPU)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "tuned.json"
    write_table(path, key(), CHOICES, TIMES)
    return path


def test_what_is_written_is_read(table: Path):
    assert look_up(table, key()) == tuned.Found(CHOICES, f"as tuned, '{table}'")
    assert [path.name for path in table.parent.iterdir()] == ["tuned.json"]


def test_there_is_an_entry_a_key(table: Path):
    other = key() | dict(device="another")
    write_table(table, other, CHOICES | dict(loss_rows=None), TIMES)
    write_table(table, key(), CHOICES | dict(loss_rows=1024), TIMES)
    assert look_up(table, other).choices["loss_rows"] is None
    assert look_up(table, key()).choices["loss_rows"] == 1024
    assert len(json.loads(table.read_text())["entries"]) == 2


def test_without_a_table_nothing_was_tuned(tmp_path: Path):
    assert look_up(tmp_path / "tuned.json", key()) == tuned.Found({}, "nothing was tuned on this machine")


@pytest.mark.parametrize("name", ["device", "torch", "triton", "fastbeit", "images", "slots", "width", "dtype"])
def test_another_device_version_or_shape_is_not_taken(table: Path, name: str):
    found = look_up(table, key() | {name: "another"})
    assert not found.choices and f"the nearest: {name} {key()[name]}, here another" in found.why


def test_the_key_is_that_of_the_settings():
    assert key(seed=5, out="x") == key()
    for change in (
        dict(optim=dict(batch_size=16)),
        dict(optim=dict(batch_size=8, accumulate=2)),
        dict(masking=dict(num_masked=5, min_block=2)),
        dict(engine=dict(precision="bf16")),
        dict(engine=dict(compile="on")),
        dict(engine=dict(checkpoint_blocks=True)),
        dict(objective="pixels"),
    ):
        assert key(1, **change) != key(), change
    assert key(num_ranks=2)["images"] == 4
    assert set(key()) >= {"device", "torch", "triton", "fastbeit"}


def test_on_a_card_its_name_and_its_cuda_belong_to_the_key(monkeypatch: pytest.MonkeyPatch):
    as_on_a_card(monkeypatch, 80)
    config = Config.model_validate(dict(engine=dict(precision="bf16", compile="on")))
    found = key_of(config, 8192, 8, CUDA)
    assert found["device"] == "NVIDIA H100" and {"cuda", "hip"} <= found.keys() and found["images"] == 256


# 2,048 images a step; a formula of the whole card, alike in the doctor and in a run
@pytest.mark.parametrize("memory_gib, num_ranks, images", [(80, 8, 256), (80, 1, 1024), (24, 8, 256), (12, 8, 64)])
def test_the_micro_batch_is_what_has_room(
    monkeypatch: pytest.MonkeyPatch, memory_gib: int, num_ranks: int, images: int
):
    as_on_a_card(monkeypatch, memory_gib)
    config = Config.model_validate(dict(engine=dict(precision="bf16")))
    assert micro_batch(config, 8192, num_ranks, CUDA) == images


def as_on_a_card(monkeypatch: pytest.MonkeyPatch, memory_gib: int) -> None:
    class Properties:
        total_memory = memory_gib * 2**30

    monkeypatch.setattr(tuned.torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(tuned.torch.cuda, "get_device_name", lambda device: "NVIDIA H100")


def changed(change: Callable[[dict], Any]) -> Callable[[str], str]:
    def spoil(text: str) -> str:
        table = json.loads(text)
        change(table)
        return json.dumps(table)

    return spoil


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no table": lambda text: "[1, 2]",
    "deep": lambda text: "[" * 100_000,
    "another format": changed(lambda table: table.update(format="fastbeit-tuned-7")),
    "no entries": changed(lambda table: table.pop("entries")),
    "another entry": changed(lambda table: table["entries"].append(7)),
    "another setting": changed(lambda table: table["entries"][0]["choices"].update(colour="blue")),
    "a name of nobody": changed(lambda table: table["entries"][0]["choices"].update(attention="magic")),
    "no number of rows": changed(lambda table: table["entries"][0]["choices"].update(loss_rows=-3)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_table_that_cannot_be_used_is_passed_over_and_begun_anew(table: Path, damage: str):
    table.write_text(DAMAGES[damage](table.read_text()))
    found = look_up(table, key())
    assert not found.choices and found.why.startswith(f"'{table}' is passed over: ")
    assert damage != "another format" or "format fastbeit-tuned-7, wanted fastbeit-tuned-1" in found.why
    write_table(table, key(), CHOICES, TIMES)
    assert look_up(table, key()).choices == CHOICES


def test_bytes_that_are_no_text_and_a_folder_are_passed_over(table: Path, tmp_path: Path):
    table.write_bytes(b"\xff\xfe\x80")
    assert "is passed over" in look_up(table, key()).why
    assert "is passed over" in look_up(tmp_path, key()).why


def test_portions_reach_the_operators(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def attention(qkv: Tensor, bias: Tensor, *, workspace: int | None, backend: str) -> Tensor:
        asked["workspace"] = workspace
        return relative_attention_reference(qkv, bias)

    def loss(*args: Any, chunk: int | None, **options: Any) -> Any:
        asked["chunk"] = chunk
        return linear_cross_entropy(*args, **options)

    monkeypatch.setattr("fastbeit.model.attention.relative_attention", attention)
    monkeypatch.setattr("fastbeit.model.beit.linear_cross_entropy", loss)
    for mib, rows in ((3, 5), (None, None)):
        kernels = dict(attention="triton", attention_mib=mib, loss_rows=rows)
        config = Config.model_validate(SETTINGS | dict(kernels=kernels))
        make_beit(config, 32)(*blank_inputs(config, 2, CPU))
        assert asked == dict(workspace=mib and mib * 2**20, chunk=rows)


def test_what_cannot_be_kept_is_an_exit_code(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="what was tuned, .* cannot be written: .*set XDG_CACHE_HOME") as err:
        write_table(tmp_path / "file" / "tuned.json", key(), CHOICES, TIMES)
    assert err.value.exit_code == 73


def test_it_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table_path() == tmp_path / "fastbeit" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert table_path() == Path("/home/me/.cache/fastbeit/tuned.json")
