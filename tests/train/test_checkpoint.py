import json
import re
import resource

import pytest
import torch

from fastbeit.errors import RunError
from fastbeit.files import sha256
from fastbeit.train.checkpoint import (
    find_checkpoint,
    load_model,
    load_optimizer,
    load_state,
    prune,
    resolve_checkpoint,
    save_checkpoint,
)

MODEL = {"a.weight": torch.arange(6.0).view(2, 3), "index": torch.arange(4)}
MOMENTS = {"exp_avg.a.weight": torch.ones(2, 3), "step.a.weight": torch.tensor(7.0)}


def save(folder, step):
    return save_checkpoint(folder, step, MODEL, MOMENTS, {"seed": 1})


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 12)
    assert path.name == "step-000012"
    torch.testing.assert_close(load_model(path), MODEL, rtol=0, atol=0)
    torch.testing.assert_close(load_optimizer(path), MOMENTS, rtol=0, atol=0)
    assert load_state(path) == {"step": 12, "seed": 1}
    assert find_checkpoint(tmp_path) == (path, [])


def test_the_newest_are_kept_in_order_of_their_numbers(tmp_path):
    # a seventh digit sorts before the sixth's as text
    for step in (999_998, 999_999, 1_000_000):
        save(tmp_path, step)
    prune(tmp_path, 2, set(), set())
    assert names(tmp_path) == {"step-999999", "step-1000000"}
    assert find_checkpoint(tmp_path)[0] == tmp_path / "step-1000000"


def test_only_what_verifies_counts_and_two_always_stay(tmp_path):
    for step in (2, 3, 4, 6, 8, 9):
        save(tmp_path, step)
    for step in (3, 8, 9):
        flip_a_bit(tmp_path / f"step-00000{step}/model.safetensors")
    resumed, written = tmp_path / "step-000004", tmp_path / "step-000006"
    prune(tmp_path, 2, {resumed, written}, {resumed, written})
    assert names(tmp_path) == {"step-000004", "step-000006", "step-000008", "step-000009"}
    prune(tmp_path, 1, {resumed, written}, {resumed, written})
    assert {"step-000004", "step-000006"} <= names(tmp_path)
    prune(tmp_path, 1, set(), set())
    assert "step-000006" in names(tmp_path) and "step-000004" not in names(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.unlink(), lambda path: path.write_text("")])
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path, name, damage):
    good = save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    found, problems = find_checkpoint(tmp_path)
    assert found == good
    assert len(problems) == 1 and problems[0].startswith("step-000002: ")


def test_a_manifest_that_names_too_little_is_not_believed(tmp_path):
    path = save(tmp_path, 1)
    (path / "MANIFEST.json").write_text(json.dumps({"version": 1, "files": {}}))
    with pytest.raises(RunError, match="not in the manifest") as caught:
        find_checkpoint(tmp_path)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("manifest", [{"version": 2}, {}], ids=["next", "none"])
def test_another_layout_is_passed_over_and_named(tmp_path, manifest):
    path = save(tmp_path, 1) / "MANIFEST.json"
    path.write_text(json.dumps({**manifest, "files": json.loads(path.read_text())["files"]}))
    with pytest.raises(RunError, match="version"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("MANIFEST.json", "[" * 100_000, "RecursionError"),
        ("MANIFEST.json", '{"version": true}', "version True"),
        ("MANIFEST.json", '{"version": 1, "files": {"../../out": {}}}', r"names '\.\./\.\./out'"),
        ("MANIFEST.json", "\0" * 64, "unreadable"),
        ("state.json", '{"step": -3}', "says step -3, which is not that of its name"),
        ("state.json", '{"step": 99}', "says step 99"),
        ("state.json", '{"step": true}', "says step True"),
        ("state.json", "[" * 100_000, "RecursionError"),
        ("state.json", "[1]", "TypeError"),
        ("state.json", "{}", "KeyError"),
    ],
    ids=lambda text: text[:16] if isinstance(text, str) else None,
)
def test_what_a_checkpoint_says_of_itself_is_read_with_care(tmp_path, name, text, problem):
    good = save(tmp_path, 1)
    rewritten(save(tmp_path, 2), name, text)
    found, (said,) = find_checkpoint(tmp_path)
    assert found == good and re.search(problem, said)


def rewritten(checkpoint, name: str, text: str) -> None:
    """Change a file of a checkpoint, and what its manifest says of it."""
    (checkpoint / name).write_text(text)
    if name != "MANIFEST.json":
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
        manifest["files"][name] = {"bytes": len(text), "sha256": sha256(checkpoint / name)}
        (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


def test_a_folder_that_is_named_almost_as_a_checkpoint_is_none(tmp_path):
    for name in "step-\N{SUPERSCRIPT TWO}", "step-", "step-1a":
        (tmp_path / name).mkdir()
    assert find_checkpoint(tmp_path) == (None, [])


def test_a_full_disk_leaves_what_was_there(tmp_path):
    good = save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(RunError, match="cannot be written") as caught:
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 74
    assert find_checkpoint(tmp_path) == (good, [])
    assert list(tmp_path.iterdir()) == [good]


def test_a_disk_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(RunError, match="cannot be written") as caught:
        save(tmp_path / "checkpoints", 1)
    assert caught.value.exit_code == 74


def test_remains_of_a_killed_save_are_invisible_and_go(tmp_path):
    (tmp_path / ".tmp-step-000009.123").mkdir()
    assert find_checkpoint(tmp_path) == (None, [])
    (tmp_path / "step-000008").mkdir()
    (tmp_path / "step-000008/.unfinished").touch()
    assert find_checkpoint(tmp_path) == (None, [])
    path = save(tmp_path, 1)
    prune(tmp_path, 1, set(), set())
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_step_can_be_saved_again(tmp_path):
    flip_a_bit(save(tmp_path, 1) / "model.safetensors")
    assert find_checkpoint(tmp_path / "none") == (None, [])
    assert find_checkpoint(save(tmp_path, 1).parent)[0] == tmp_path / "step-000001"


@pytest.mark.parametrize("word", ["", "checkpoints", "checkpoints/latest", "checkpoints/step-000002"])
def test_a_checkpoint_is_found_by_any_of_its_names(tmp_path, word):
    save(tmp_path / "checkpoints", 1)
    path = save(tmp_path / "checkpoints", 2)
    assert resolve_checkpoint(tmp_path / word) == path


def test_a_checkpoint_that_is_not_there_is_said(tmp_path):
    with pytest.raises(RunError, match="no checkpoint in"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(RunError, match="is not usable"):
        resolve_checkpoint(tmp_path / "step-000001")
