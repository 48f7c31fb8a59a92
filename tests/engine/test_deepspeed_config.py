"""What DeepSpeed is told: all of it from one place, and what a user adds to it."""

import json
import re
from typing import Any

import pytest
import torch

from fastbeit.config.read import configure
from fastbeit.config.running import EngineConfig
from fastbeit.config.sections import OptimConfig
from fastbeit.engine.deepspeed_config import DECIDED, FREE, deepspeed_config, read_theirs
from fastbeit.errors import ConfigError


def made(stage: int = 1, clip: float = 3.0, **engine) -> dict:
    settings = EngineConfig.model_validate({"name": "deepspeed", "zero_stage": stage, **engine})
    sizes = {"accumulate": 2, "num_ranks": 4, "num_weights": 1000, "on_cuda": False}
    sizes["theirs"] = read_theirs(settings.deepspeed_config)
    optim = OptimConfig(batch_size=64, clip_grad=clip)
    return deepspeed_config(settings, optim, dtype=torch.bfloat16, **sizes)


@pytest.fixture
def with_json(tmp_path):
    def with_json(content: object, **engine) -> dict:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return made(deepspeed_config=str(path), **engine)

    return with_json


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_deepspeed_would_decide_otherwise_is_written(stage):
    config = made(stage)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (64, 8)
    assert config["gradient_accumulation_steps"] == 2
    # of stage 0 the gradients are whole, and fastbeit clips them
    assert config["gradient_clipping"] == (3.0 if stage else 0.0)
    assert made(stage, clip=0)["gradient_clipping"] == 0.0
    assert config["torch_autocast"].items() >= {"enabled": True, "dtype": "bfloat16"}.items()
    assert config["bf16"]["check_grad_overflow"] is True and config["zero_force_ds_cpu_optimizer"] is False
    zero = config["zero_optimization"]
    assert zero["stage"] == stage and "offload_optimizer" not in zero and "offload_param" not in zero
    # no buffer is larger than the model
    assert all(value <= 1000 for key, value in zero.items() if "bucket" in key or "live" in key)


def test_what_is_offloaded_is_said():
    zero = made(2, offload="optimizer")["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False} and "offload_param" not in zero
    zero = made(3, offload="weights")["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"


def test_deepspeed_takes_every_key_that_a_user_may_set():
    """DeepSpeed itself ignores unknown keys of the top level and of flops_profiler; elsewhere it refuses them."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as Optimizer
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig as Weights

    read = set()

    class Given(dict):
        """Writes down which keys are read."""

        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

    values = {dict: {}, str: "fp32", bool: True, int: 1, float: 1.0}
    DeepSpeedConfig(Given({"train_batch_size": 1} | {key: values[kind] for key, kind in FREE[""].items()}))
    assert FREE[""].keys() <= read
    profiler: Any = DeepSpeedFlopsProfilerConfig({})
    assert FREE["flops_profiler"].keys() <= vars(profiler).keys()
    for place, section in (
        ("comms_logger", CommsLoggerConfig),
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_optimizer", Optimizer),
        ("zero_optimization.offload_param", Weights),
    ):
        fields = section.model_fields
        assert FREE[place].keys() <= {*fields, *(field.alias for field in fields.values())}


def test_a_users_keys_are_merged(with_json):
    given = {"zero_optimization": {"reduce_bucket_size": 5e7, "overlap_comm": True}, "wall_clock_breakdown": True}
    config = with_json(given | {"flops_profiler": {"enabled": True}, "memory_breakdown": True})
    assert config["zero_optimization"]["stage"] == 1 and config["zero_optimization"]["reduce_bucket_size"] == 5e7
    assert config["zero_optimization"]["overlap_comm"] is True and config["wall_clock_breakdown"] is True
    assert config["flops_profiler"] == {"enabled": True} and config["gradient_clipping"] == 3.0
    pinned = {"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}
    merged = with_json(pinned, stage=2, offload="optimizer")["zero_optimization"]
    assert merged["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize("key", DECIDED)
def test_what_fastbeit_decides_is_refused_by_name(with_json, key):
    content: object = 1
    for name in reversed(key.split(".")):
        content = {name: content}
    with pytest.raises(ConfigError, match=f"{re.escape(key)} is decided by "):
        with_json(content)


@pytest.mark.parametrize(
    "content, said",
    [
        ({"gradient_cliping": 1}, "gradient_cliping is not a key .*; did you mean gradient_clipping?"),
        (
            {"zero_optimization": {"overlap_com": 1}},
            "zero_optimization.overlap_com is not .* did you mean overlap_comm",
        ),
        ({"xyz": 1}, "xyz is not a key that fastbeit passes on to DeepSpeed; known here: comms_logger, "),
        ({"zero_optimization": 1}, "zero_optimization wants an object; got 1"),
        ({"wall_clock_breakdown": 1}, "wall_clock_breakdown wants true or false; got 1"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, 'reduce_bucket_size wants a whole number .* got "5e8"'),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "reduce_bucket_size wants a whole number"),
        ('{"zero_optimization": {"sub_group_size": Infinity}}', "sub_group_size wants a whole number"),
        ('{"zero_optimization": {"sub_group_size": 1e400}}', "sub_group_size wants a whole number"),
        ({"steps_per_print": 0}, "steps_per_print is not a key that fastbeit passes on"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "zero_hpz_partition_size is not a key"),
        ({"zero_optimization": {"offload_optimizer": {"nvme_path": "/x"}}}, "offload_optimizer.nvme_path is not a key"),
        ([], "holds a list; wanted a JSON file with one object"),
        ("{", "is no JSON"),
        ('{"dump_state": true, "dump_state": false}', "'dump_state' is given twice"),
        ("[" * 100_000, "is no JSON"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_what_cannot_be_taken_is_said(with_json, content, said):
    with pytest.raises(ConfigError, match=said):
        with_json(content)


def test_all_that_is_wrong_is_said_at_once(with_json):
    with pytest.raises(ConfigError) as caught:
        with_json({"fp16": {}, "xyz": 1, "zero_optimization": {"stage": 2}})
    assert len(str(caught.value).splitlines()) == 3


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory; wanted a JSON file"):
        made(deepspeed_config=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match="Is a directory"):
        made(deepspeed_config=str(tmp_path))


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["offload=optimizer"], "offload is of DeepSpeed, and name is auto; set name=deepspeed"),
        (["deepspeed_config=x.json", "name=ddp"], "deepspeed_config is of DeepSpeed, and name is ddp"),
        (["name=deepspeed", "zero_stage=0", "offload=optimizer"], "wants zero_stage 1 or more; got 0"),
        (["name=deepspeed", "zero_stage=2", "offload=weights"], "wants zero_stage 3 or more; got 2"),
        (["name=deepspeed", "zero_stage=4"], "zero_stage"),
        (["name=deepspeed", "zero_stage=3", "compile=on"], "compile=on does not go with zero_stage 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_settings_that_do_not_fit_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        configure(EngineConfig, overrides)
