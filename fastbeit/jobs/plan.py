"""What a run takes on GPUs that need not be there: memory, time, disk, processor cores (docs/planning.md)."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastbeit.config.pretrain import Config
from fastbeit.config.sections import Size
from fastbeit.data.epochs import steps_per_epoch
from fastbeit.engine.cards import Card, card_of
from fastbeit.engine.choices import DVAE, Fitted, choices, fit, footprint_of, num_outputs, row_of, token_size
from fastbeit.engine.forecast import (
    HOST_MEMORY,
    LINK_SHARE,
    RECOMPUTE_TIME,
    StepTime,
    exchange_ms,
    exchange_passes,
    offload_ms,
    overlap_ms,
    step_ms,
)
from fastbeit.engine.measured import (
    HOST_MS,
    LARGE_PHOTOS,
    PHOTOS,
    SHARDED_PHOTOS,
    TOKENIZED,
    TOKENIZED_ON,
    TOKENIZED_VIEW,
    measured_step,
)
from fastbeit.engine.memory import SMALL, WEIGHT_BYTES, count_weights, expected_room
from fastbeit.engine.work import step_flops, tokenizer_flops
from fastbeit.errors import ConfigError, writing
from fastbeit.files import write_whole
from fastbeit.plural import counted

NUM_CROPS = 8  # of a token cache, where the config has none
TOKEN_BYTES = 2
KB, GIB = 1024, 2**30


@dataclass(frozen=True)
class Machine:
    """What a run is planned for."""

    gpus: int
    gpu: str  # as in `CARDS`
    gpus_per_node: int
    images: int  # of the data set
    image_kb: float  # average on disk

    @property
    def card(self) -> Card:
        return card_of(self.gpu)

    @property
    def on_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True)
class Run:
    """A run with tokens of one source."""

    time: StepTime
    exposed_ms: float  # as in `StepTime`
    step_ms: float
    without_overlap_ms: float
    images_per_s: float  # of all GPUs
    gpu_images_per_s: float
    hours: float
    node_read_mb_per_s: float
    node_cores: dict[str, int]  # that decoding takes, by kind of image


@dataclass(frozen=True)
class Cache:
    """A token cache."""

    num_crops: int
    crop_bytes: int
    num_bytes: int
    hours: float  # that all GPUs take to make it


@dataclass(frozen=True)
class Plan:
    machine: Machine
    card: Card
    batch_size: int
    num_steps: int
    epochs: float
    parameters: int
    flops: int  # of an image, forward and backward
    flops_authors: int
    tokenizer_flops: int | None  # of an image; None: nothing is tokenized
    room_bytes: int
    engines: list[Fitted]
    checkpoint_blocks: str  # whether it is needed
    compute: str  # where its time comes from
    tokenizer: str  # likewise
    runs: dict[str, Run]
    cache: Cache | None


def plan(config: Config, machine: Machine, json_file: Path | None) -> str:
    """The plan as text; the same numbers go into the JSON file.

    Raises:
        RunError: bad machine or config (2); the file cannot be written (74).
    """
    found = make_plan(config, machine)
    if json_file:
        with writing(f"'{json_file}'"):
            json_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(json_file, json.dumps(asdict(found), indent=1) + "\n")
    return "\n".join([*_head(found), *_memory(found), *_time(found), *_data(found)])


def make_plan(config: Config, machine: Machine) -> Plan:
    _check(config, machine)
    optim, outputs = config.optim, num_outputs(config)
    per_epoch = steps_per_epoch(machine.images, optim.batch_size, config.data.tail)
    num_steps = optim.steps or optim.epochs * per_epoch
    engines = choices(config, machine.card, machine.gpus)
    step = next(one for one in engines if one.engine == row_of(config.engine))
    view = token_size(config)
    tokens_per_s, tokenizer = _tokenizing(machine.card, view) if view else (math.inf, "")
    compute_ms, host_ms, compute = _computing(config, machine, step)
    sources = {"tokens on the fly": tokens_per_s, "stored tokens": math.inf} if view else {"pixels": math.inf}
    runs = {}
    for source, rate in sources.items():
        tokenizer_ms = 1e3 * optim.batch_size / machine.gpus / rate
        time = StepTime(compute_ms, tokenizer_ms, host_ms, *_exchanging(config, machine, step, compute_ms))
        runs[source] = _run(config, machine, time, num_steps, "two views" if tokenizer_ms else "one view")
    return Plan(
        machine=machine,
        card=machine.card,
        batch_size=optim.batch_size,
        num_steps=num_steps,
        epochs=num_steps / per_epoch,
        parameters=count_weights(config, outputs),
        flops=step_flops(config, outputs),
        flops_authors=step_flops(config, outputs, authors=True),
        tokenizer_flops=tokenizer_flops(DVAE, view) if view else None,
        room_bytes=expected_room(machine.card.memory_gib),
        engines=engines,
        checkpoint_blocks=_advice(config, machine, step),
        compute=compute,
        tokenizer=tokenizer,
        runs=runs,
        cache=_cache(config, machine, tokens_per_s) if view else None,
    )


def _check(config: Config, machine: Machine) -> None:
    card_of(machine.gpu)
    if min(machine.gpus, machine.gpus_per_node, machine.images) < 1 or machine.image_kb <= 0:
        raise ConfigError("--gpus, --gpus-per-node, --images and --image-kb want at least 1")
    if machine.gpus % machine.on_node:
        near = max(1, round(machine.gpus / machine.gpus_per_node)) * machine.gpus_per_node
        raise ConfigError(
            f"--gpus {machine.gpus} does not fill nodes of {machine.gpus_per_node}; try {near}, or another "
            "--gpus-per-node"
        )
    batch_size, accumulate = config.optim.batch_size, config.optim.accumulate
    share = machine.gpus * (1 if accumulate == "auto" else accumulate)
    if batch_size % share:
        raise ConfigError(
            f"optim.batch_size {batch_size} is not a multiple of {share}, GPUs times micro-batches; "
            f"try optim.batch_size={max(1, round(batch_size / share)) * share}"
        )
    if config.engine.precision not in ("auto", "bf16"):
        raise ConfigError(
            f"a plan's times are those of bf16; got engine.precision={config.engine.precision}; leave it out"
        )


def _exchanging(config: Config, machine: Machine, step: Fitted, compute_ms: float) -> tuple[float, float, float]:
    """Milliseconds of a step's exchange between cards, of what it may run beside, and of that with the host."""
    engine, num_weights = config.engine, count_weights(config, num_outputs(config))
    ranks = machine.gpus, machine.gpus_per_node
    return (
        exchange_ms(machine.card, *ranks, WEIGHT_BYTES * num_weights, exchange_passes(engine, step.accumulate)),
        overlap_ms(engine, compute_ms, step.accumulate),
        offload_ms(machine.card, engine, *ranks, num_weights, step.accumulate),
    )


def _advice(config: Config, machine: Machine, step: Fitted) -> str:
    if config.engine.checkpoint_blocks:
        return "is set"
    if step.fits and step.micro_batch >= min(SMALL, config.optim.batch_size // machine.gpus):
        return "not needed"
    other = fit(config, machine.card, machine.gpus, checkpoint_blocks=True)
    if step.fits:
        return f"not needed; with it {other.micro_batch} images a micro-batch, not {step.micro_batch}"
    return f"needed: micro-batches of {other.micro_batch} fit with it" if other.fits else "does not help: nothing fits"


def _computing(config: Config, machine: Machine, step: Fitted) -> tuple[float, float, str]:
    """Milliseconds of the card and of the host for a step's images on a GPU, and where they come from."""
    card, images = machine.card, config.optim.batch_size // machine.gpus
    if timed := measured_step(config, card):
        return (
            timed.step_ms / timed.images * images,
            timed.host_ms * step.accumulate,
            f"measured on an {card.name} with {timed.images} images, taken per image",
        )
    outputs = num_outputs(config)
    kept = footprint_of(config, machine.gpus, checkpoint_blocks=False)
    ms = step_ms(card, images, step_flops(config, outputs), kept.saved, count_weights(config, outputs))
    again = RECOMPUTE_TIME if config.engine.checkpoint_blocks else 1.0
    whose = "" if card.shares.known else ", at the share of its data sheet that an H100 reaches"
    return again * ms, HOST_MS * config.model.depth * step.accumulate, f"predicted, a lower bound{whose}"


def _tokenizing(card: Card, view: Size) -> tuple[float, str]:
    """Images/s of a GPU, and where that comes from."""
    known = TOKENIZED_ON
    if card is known and view == TOKENIZED_VIEW:
        return TOKENIZED, f"measured on an {known.name}"
    flops = TOKENIZED * tokenizer_flops(DVAE, TOKENIZED_VIEW) * card.peak / known.peak
    return flops / tokenizer_flops(
        DVAE, view
    ), f"predicted, at the share of its data sheet that an {known.name} reaches"


def _run(config: Config, machine: Machine, time: StepTime, num_steps: int, views: str) -> Run:
    images_per_s = 1e3 * config.optim.batch_size / time.total_ms
    of_node = images_per_s * machine.on_node / machine.gpus
    jitter = config.data.jitter_on if config.data.jitter else "off"
    kinds = {
        "500 x 375": PHOTOS[views][jitter],
        "3 megapixels": LARGE_PHOTOS[jitter],
        "3 megapixels, after fastbeit shard": SHARDED_PHOTOS[jitter],
    }
    return Run(
        time=time,
        exposed_ms=time.exposed_ms,
        without_overlap_ms=time.without_overlap_ms,
        step_ms=time.total_ms,
        images_per_s=images_per_s,
        gpu_images_per_s=images_per_s / machine.gpus,
        hours=num_steps * time.total_ms / 3.6e6,
        node_read_mb_per_s=of_node * machine.image_kb * KB / 1e6,
        node_cores={kind: math.ceil(of_node / rate) for kind, rate in kinds.items()},
    )


def _cache(config: Config, machine: Machine, tokens_per_s: float) -> Cache:
    num_crops, crop_bytes = config.data.num_crops or NUM_CROPS, TOKEN_BYTES * config.num_patches
    crops = machine.images * num_crops
    return Cache(num_crops, crop_bytes, crops * crop_bytes, crops / (tokens_per_s * machine.gpus) / 3600)


def _head(found: Plan) -> list[str]:
    machine = found.machine
    nodes = machine.gpus // machine.on_node
    lines = [
        f"{machine.gpus} x {found.card.name}, {counted(nodes, 'node')} of {machine.on_node}; {found.batch_size} "
        f"images a step, {found.batch_size // machine.gpus} a GPU",
        f"{found.num_steps:,} steps, {found.epochs:,.0f} epochs of {machine.images:,} images",
        f"{found.card.name}: {found.card.peak / 1e12:g} TFLOP/s of bf16, {found.card.bandwidth / 1e9:,.0f} GB/s",
        "",
        f"parameters           {found.parameters:,}",
        f"FLOPs an image       {found.flops / 1e9:.1f} G forward and backward; the authors' way "
        f"{found.flops_authors / 1e9:.1f} G",
    ]
    if found.tokenizer_flops:
        lines.append(f"  tokens on the fly  {found.tokenizer_flops / 1e9:.1f} G more: the forward of OpenAI's dVAE")
    return lines


def _memory(found: Plan) -> list[str]:
    parts = ["weights", "gradients", "optimizer", "batches", "workspace"]
    parts += ["average"] if any(one.footprint.average for one in found.engines) else []
    title, width = "".join(f"{part:>10}" for part in parts), max(8, *(len(one.engine) for one in found.engines))
    lines = [
        "",
        f"GiB a GPU, of which a step finds {found.room_bytes / GIB:.1f} free; saved and temporary: MiB an image",
        f"{'':<{width}}{title}{'saved':>8}{'temp.':>7}{'images':>8}{'times':>6}{'peak':>7}",
    ]
    for one in found.engines:
        cells = "".join(f"{getattr(one.footprint, part) / GIB:10.2f}" for part in parts)
        of_image = f"{one.footprint.saved / 2**20:8.1f}{one.footprint.temporary / 2**20:7.1f}"
        micro = f"{one.micro_batch:8}{one.accumulate:6}{one.peak_bytes / GIB:7.1f}"
        lines.append(f"{one.engine:<{width}}{cells}{of_image}{micro}{'' if one.fits else '  does not fit'}")
    if host := max(one.footprint.host for one in found.engines):
        lines.append(
            f"offload: {host / GIB:.1f} GiB a GPU in the host's memory, {found.machine.on_node * host / GIB:.1f} a "
            "node; page-locked, up to twice as much"
        )
    return [*lines, f"engine.checkpoint_blocks: {found.checkpoint_blocks}"]


def _row(name: str, values: Iterable[str]) -> str:
    return f"{name:<42}" + "".join(f"{value:>19}" for value in values)


def _time(found: Plan) -> list[str]:
    runs = found.runs.values()
    times, card = [run.time for run in runs], found.card
    is_offloaded = any(time.offload_ms for time in times)
    offload = [_row("offload", (f"{time.offload_ms:.1f}" for time in times))] if is_offloaded else []
    lines = [
        "",
        _row("ms a step", found.runs),
        _row("compute", (f"{time.compute_ms:.1f}" for time in times)),
        _row("tokenizer", (f"{time.tokenizer_ms:.1f}" for time in times)),
        _row("host, beside both", (f"{time.host_ms:.1f}" for time in times)),
        _row("exchange between cards", (f"{time.exchange_ms:.1f}" for time in times)),
        _row("  of which the card waits for", (f"{run.exposed_ms:.1f}" for run in runs)),
        *offload,
        _row("step", (f"{run.step_ms:.1f}" for run in runs)),
        _row("step, if nothing overlapped", (f"{run.without_overlap_ms:.1f}" for run in runs)),
        _row("images/s", (f"{run.images_per_s:,.0f}" for run in runs)),
        _row("images/s of a GPU", (f"{run.gpu_images_per_s:,.0f}" for run in runs)),
        _row("hours", (f"{run.hours:,.1f}" for run in runs)),
        _row("days", (f"{run.hours / 24:,.1f}" for run in runs)),
        f"compute: {found.compute}",
    ]
    if any(time.host_ms > time.compute_ms + time.tokenizer_ms for time in times):
        lines.append("the host is slower than the card: more images a GPU and step would cost no time")
    if found.tokenizer:
        lines.append(f"tokenizer: {found.tokenizer}")
    if is_offloaded:
        lines.append(
            f"offload: predicted, at {LINK_SHARE:.0%} of {card.to_host / 1e9:g} GB/s to the host, and with AdamW at "
            f"{HOST_MEMORY / 1e9:g} GB/s of its memory"
        )
    return [
        *lines,
        f"exchange: predicted, at {LINK_SHARE:.0%} of {card.link / 1e9:g} GB/s to the cards of a node, and of "
        f"{card.network / 1e9:.3g} GB/s a card to other nodes",
    ]


def _data(found: Plan) -> list[str]:
    machine, runs = found.machine, found.runs.values()
    lines = ["", _row("a node's data", found.runs)]
    lines.append(_row("read, MB/s", (f"{run.node_read_mb_per_s:,.0f}" for run in runs)))
    for kind in next(iter(runs)).node_cores:
        lines.append(_row(f"cores, {kind}", (f"{run.node_cores[kind]:,}" for run in runs)))
    lines += [
        f"read: {machine.image_kb:g} KB an image (--image-kb); ImageNet-1k: 147.9 GB of tar files, 1,281,167 images",
        "cores: of the torch pipeline, measured on a CPU; DALI on a GPU is not measured",
    ]
    if cache := found.cache:
        lines.append(
            f"token cache: {cache.num_bytes / 1e9:.2f} GB for {cache.num_crops} crops an image, {cache.crop_bytes} "
            f"bytes each; the GPUs take {60 * cache.hours:.0f} minutes to make it, if the cores keep up"
        )
    return lines
