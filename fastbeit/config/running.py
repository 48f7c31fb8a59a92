"""More sections of a configuration: who runs the steps, by which kernels, and what is said and kept of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from fastbeit.config.sections import Count, OnOff, OptimConfig, PathText, Section, Whole, refuse


class EngineConfig(Section):
    """Who runs the step, on how many ranks, in what precision."""

    name: Literal["auto", "single", "ddp", "deepspeed"] = Field(
        default="auto", description="auto: single on one rank, ddp on several"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="of DeepSpeed ZeRO, what ranks share out: 0 nothing, 1 fp32 masters and moments, 2 gradients too, "
        "3 weights too",
    )
    offload: Literal["none", "optimizer", "weights"] = Field(
        default="none",
        description="what ZeRO keeps in the host's memory: optimizer: fp32 masters and moments, updated there; "
        "weights: weights too, of stage 3",
    )
    deepspeed_config: PathText = Field(
        default="",
        description="JSON with more of DeepSpeed's own configuration; keys that fastbeit decides are refused",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda when there is one")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="of activations; weights and loss stay fp32; fp16 with a dynamic loss scale; auto: bf16 on cuda "
        "from Ampere on, fp16 on Volta and Turing, fp32 on the cpu",
    )
    compile: OnOff = Field(
        default="auto", description="torch.compile each block of the model, in pre-training; auto: on cuda"
    )
    checkpoint_blocks: bool = Field(
        default=False,
        description="recompute each block's activations in the backward: less memory, a quarter more time",
    )

    @model_validator(mode="after")
    def _deepspeed_does_it(self) -> "EngineConfig":
        wrong = []
        if self.name != "deepspeed":
            asked = {"offload": self.offload != "none", "deepspeed_config": bool(self.deepspeed_config)}
            wrong += [
                f"{key} is of DeepSpeed, and name is {self.name}; set name=deepspeed" for key in asked if asked[key]
            ]
        elif self.offload != "none" and self.zero_stage < (needed := 3 if self.offload == "weights" else 1):
            wrong.append(f"offload={self.offload} wants zero_stage {needed} or more; got {self.zero_stage}")
        if self.name == "deepspeed" and self.zero_stage == 3 and self.compile == "on":
            wrong.append("compile=on does not go with zero_stage 3, which gathers weights in hooks; set compile=auto")
        if self.name == "deepspeed" and self.precision == "fp16":
            wrong.append(
                "precision=fp16 has not been tried with DeepSpeed, which runs it on a GPU alone; set name=ddp, or "
                "precision=fp32"
            )
        refuse(wrong)
        return self


def optimizers_that_do_not_fit(optim: OptimConfig, engine: EngineConfig) -> Iterator[str]:
    """Where the optimizer cannot do what the engine asks of it."""
    chosen, on_host = f"optim.name={optim.name}", engine.name == "deepspeed" and engine.offload != "none"
    if optim.name == "ds_cpu_adam" and not on_host and engine.device != "cpu":
        yield (
            f"{chosen} updates weights that lie in the host's memory; set engine.device=cpu, or engine.name=deepspeed "
            "engine.offload=optimizer"
        )
    if engine.name != "deepspeed":
        return
    if optim.name in ("muon", "apex_lamb"):
        yield (
            f"{chosen} wants whole matrices, and DeepSpeed ZeRO cuts them into pieces; set engine.name=ddp, or "
            "optim.name=adamw"
        )
    elif optim.name == "apex_adam":
        yield f"{chosen} has not been tried with DeepSpeed; set engine.name=ddp, or optim.name=adamw"


class ProbeConfig(Section):
    """What the encoder knows of classes so far, by k-NN on its features (`fastbeit probe` looks closer)."""

    index: PathText = Field(default="", description="index of labelled images, which vote; empty: no probe")
    val_index: PathText = Field(default="", description="index of labelled images whose classes are voted for")
    every_epochs: Whole = Field(default=0, description="epochs of pre-training between probes; 0: only at the end")
    block: Whole | None = Field(
        default=None, description="whose output is looked at, from 0; null: three quarters up, as 8 of 12"
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> "ProbeConfig":
        given = {"index": self.index, "val_index": self.val_index}
        if len(set(map(bool, given.values()))) == 2:
            missing = next(name for name, value in given.items() if not value)
            raise ValueError(f"a probe wants index and val_index, and {missing} is empty; fastbeit index makes one")
        return self


Backend = Literal["auto", "triton", "reference"]
AttentionBackend = Literal["auto", "triton", "xformers", "sdpa", "eager"]


@dataclass(frozen=True)
class Kernels:
    """Which implementation runs each fused operator, and in what portions."""

    attention: AttentionBackend = "auto"
    masked_embed: Backend = "auto"
    loss: Backend = "auto"
    masks: Backend = "auto"
    attention_mib: int | None = None  # the two numbers as in `KernelsConfig`
    loss_rows: int | None = None

    @property
    def implementations(self) -> dict[str, Any]:
        """By operator."""
        return dict(attention=self.attention, masked_embed=self.masked_embed, loss=self.loss, masks=self.masks)

    @property
    def portions(self) -> dict[str, Any]:
        """By setting; None: the operator's own."""
        return dict(attention_mib=self.attention_mib, loss_rows=self.loss_rows)


class KernelsConfig(Section):
    """Which implementation runs the fused operators."""

    backend: Backend = Field(
        default="auto", description="of all: triton: its kernels; reference: plain PyTorch; auto: triton on cuda"
    )
    attention: AttentionBackend | None = Field(
        default=None,
        description="of attention: triton: ours; xformers: its memory_efficient_attention; sdpa: PyTorch's fused "
        "attention; eager: by its definition; auto: what `fastbeit doctor --tune` found best here, else triton on cuda "
        "where there is a relative-position bias, else sdpa; null: auto, or sdpa where backend is reference",
    )
    masked_embed: Backend | None = Field(default=None, description="of the masked embedding; null: backend")
    loss: Backend | None = Field(default=None, description="of the head with its cross-entropy; null: backend")
    masks: Backend | None = Field(default=None, description="of drawing masks; null: backend")
    attention_mib: Count | None = Field(
        default=None,
        description="MiB of scores that the backward of triton's attention has in memory at once; null: what `fastbeit "
        "doctor --tune` found best here, else 512",
    )
    loss_rows: Count | None = Field(
        default=None,
        description="rows whose logits the loss has in memory at once; null: what `fastbeit doctor --tune` found best "
        "here, else as many as take 1/64 of the card's memory",
    )

    @property
    def by_op(self) -> Kernels:
        every = self.backend
        # not every model has an attention that Triton takes
        attention = self.attention or ("sdpa" if every == "reference" else "auto")
        names = self.masked_embed or every, self.loss or every, self.masks or every
        return Kernels(attention, *names, self.attention_mib, self.loss_rows)


class LogConfig(Section):
    """What a training says and keeps."""

    every: Count = Field(default=10, description="steps between log lines")
    save_every: Whole = Field(default=1000, description="steps between checkpoints; 0: only at the end")
    keep: Count = Field(
        default=3, description="checkpoints kept, newest first, of those that verify; the one that was resumed from too"
    )
    wandb: str = Field(
        default="",
        max_length=128,
        description="project of Weights & Biases that figures, pictures and settings go to; empty: nothing is sent",
    )

    @model_validator(mode="after")
    def _wandb_is_a_name(self) -> "LogConfig":
        if wrong := sorted(set(self.wandb) & set("/\\#?%:")):
            raise ValueError(f"wandb wants a project's name, without {' '.join(wrong)}; got '{self.wandb}'")
        return self


class PretrainLogConfig(LogConfig):
    """The same, and how often held-out images are evaluated."""

    val_every: Whole = Field(default=0, description="steps between validations; 0: only at the end")
    val_crops: Count = Field(default=1, description="crops an image that validation looks at")
