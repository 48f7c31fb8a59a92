"""Some steps of a tiny model by Muon, of as many ranks as there are."""

import torch
from torch import Tensor

from fastbeit.config.pretrain import Config
from fastbeit.config.sections import OptimConfig
from fastbeit.engine.ddp import TorchEngine
from fastbeit.engine.optimizer_state import read_state
from fastbeit.engine.ranks import World
from fastbeit.jobs.pretrain import blank_inputs
from fastbeit.train.optim import make_optimizer
from helpers.tiny import SETTINGS, tiny_model


def train_by_muon(world: World) -> dict[str, Tensor]:
    """Weights and momentum after three steps of eight images, of which this rank has its share."""
    model, optim = tiny_model(), OptimConfig(name="muon", lr=0.01)
    engine = TorchEngine(model, make_optimizer(model, optim), world, torch.float32, 3.0)
    generator, config = torch.Generator().manual_seed(0), Config.model_validate(SETTINGS)
    images, masked, slots, labels, keep = blank_inputs(config, 8, world.device)
    for _ in range(3):
        images = torch.randint(256, images.shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(32, labels.shape, generator=generator)
        own = [one.chunk(world.size)[world.rank] for one in (images, masked, slots, labels, keep)]
        engine.accumulate(tuple(own), torch.tensor(labels.numel()), True)
        engine.step()
    return {name: value.clone() for name, value in (model.state_dict() | read_state(model, engine.optimizer)).items()}
