"""Parts of weights, without DeepSpeed; with it: test_parity.py and test_engine.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastbeit.config.running import EngineConfig
from fastbeit.engine import zero
from fastbeit.engine.ranks import World
from fastbeit.engine.sharded import (
    any_sharded,
    count_weights,
    cut,
    load_state,
    part_of,
    shape_of,
    shares_weights,
    whole,
)
from fastbeit.engine.zero import building, import_deepspeed
from fastbeit.errors import RunError

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 16])
def test_parts_are_all_of_a_tensor_and_zeros(num_ranks):
    value = torch.arange(1.0, 11).view(2, 5)
    size = -(-value.numel() // num_ranks)
    # as DeepSpeed cuts: equal parts, of which the last are shorter or empty
    parameter: Any = SimpleNamespace(ds_id=0, ds_tensor=torch.zeros(size), ds_shape=value.shape)
    assert shape_of(parameter) == value.shape and len(part_of(parameter)) == size
    parts = [cut(value, parameter, rank) for rank in range(num_ranks)]
    assert all(part.shape == (size,) for part in parts)
    joined = torch.cat(parts)
    assert torch.equal(joined[:10], value.flatten()) and not joined[10:].any()


def test_what_is_whole_stays_as_it_is():
    model = nn.Linear(2, 3)
    assert not any_sharded(model) and count_weights(model) == 9
    assert part_of(model.weight).data_ptr() == model.weight.data_ptr()
    with whole(model.parameters(), written=True):
        nn.init.zeros_(model.weight)
    load_state(model, {"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    assert model.weight.sum() == 6
    with pytest.raises(RuntimeError):
        load_state(model, {"weight": torch.ones(3, 2)})


def test_no_weights_are_shared_out_before_stage_3(monkeypatch):
    """Nor is DeepSpeed imported to build such a model."""
    group: Any = object()
    world = World(0, 2, CPU, group)
    monkeypatch.setattr(zero, "import_deepspeed", lambda device: pytest.fail("shared out"))
    for stage in range(3):
        settings = EngineConfig.model_validate({"name": "deepspeed", "zero_stage": stage})
        with building(settings, world):
            assert not shares_weights(settings) and not any_sharded(nn.Linear(2, 3))
    assert not shares_weights(EngineConfig(name="ddp", zero_stage=3))
    assert shares_weights(stage_3 := EngineConfig(name="deepspeed", zero_stage=3))
    with pytest.raises(pytest.fail.Exception, match="shared out"):
        building(stage_3, world)


@pytest.mark.parametrize(
    "version, is_old", [("0.19.7", True), ("0.19.8", False), ("0.19.10+cpu", False), ("1.0", False)]
)
def test_a_deepspeed_with_wrong_gradients_is_refused(monkeypatch, version, is_old):
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", version)
    if not is_old:
        assert import_deepspeed(CPU) is deepspeed
        return
    with pytest.raises(RunError, match=r"wants DeepSpeed 0\.19\.8 or newer, found 0\.19\.7"):
        import_deepspeed(CPU)


def test_what_a_user_adds_holds_where_the_model_is_made(monkeypatch, tmp_path):
    """Some of DeepSpeed's keys are read there alone."""
    import deepspeed

    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage3_allgather_sequential": true}}')
    settings = EngineConfig(name="deepspeed", zero_stage=3, deepspeed_config=str(tmp_path / "ds.json"))
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(deepspeed.zero, "Init", lambda config_dict_or_path: given.append(config_dict_or_path))
    building(settings, World(0, 1, CPU))
    zero = given[0]["zero_optimization"]
    assert zero["stage3_allgather_sequential"] is True and zero["stage"] == 3
    # it decides that weights are float32
    assert "bf16" not in given[0] and "fp16" not in given[0]
