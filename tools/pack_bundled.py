"""Make a trained dVAE the bundled one: weights in fp16, and a card that says what they are worth on held-out photos.

python tools/pack_bundled.py photos/dvae photos/held_out.idx
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from fastbeit.config.sections import DataConfig
from fastbeit.config.tokenizer import Architecture
from fastbeit.data.index.reader import open_index
from fastbeit.data.loader import make_loader
from fastbeit.tokenizer.disk import BUNDLED, load_tokenizer, save_tokenizer
from fastbeit.tokenizer.dvae import Decoder, Encoder
from fastbeit.tokenizer.quality import Quality, measure_quality

CROPS = 64, 100  # images a batch, batches
SIZES = 64, 112  # of the crops: as it was trained, and as the token view of a 224 x 224 image


def main(trained: Path, held_out: Path) -> None:
    card = json.loads((trained / "dvae.json").read_text())
    tensors = load_file(trained / "dvae.safetensors")
    architecture = Architecture.model_validate(card["architecture"])
    nets = {"encoder": Encoder(architecture), "decoder": Decoder(architecture)}
    for name, net in nets.items():
        net.load_state_dict({key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.startswith(name)})
        net.half()
    origin = {
        **card["origin"],
        "precision": "trained as the command says, kept in float16",
        "photos": "tools/bundled_photos.py gathers them; fastbeit/assets/README.md names sources and licences",
    }
    save_tokenizer(BUNDLED, nets["encoder"], nets["decoder"], origin)
    # twice: what is measured is what the file holds
    origin["held_out"] = {f"crops of {size} pixels": measure(held_out, size) for size in SIZES}
    save_tokenizer(BUNDLED, nets["encoder"], nets["decoder"], origin)


def measure(held_out: Path, size: int) -> dict[str, float]:
    """On random crops without jitter, of 8 to 100 % of a picture."""
    batch_size, num_batches = CROPS
    batches = make_loader(
        DataConfig(image_size=(size, size), jitter=0, tail="wrap", num_workers=1, pipeline="torch"),
        open_index(held_out),
        token_size=None,
        batch_size=batch_size,
        seed=1,
        rank=0,
        world_size=1,
        first_step=0,
        num_steps=num_batches,
    )
    figures = measure_quality(load_tokenizer(BUNDLED), (batch.images for batch in batches)).figures()
    print(f"{size} pixels: {Quality.line(figures)}")
    return figures


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
