"""What a loader gives, a line a sample: a process of its own, so that it can be killed.

python tests/helpers/batch_digests.py INDEX OUT '{"pipeline": "torch", ...}' RANK WORLD_SIZE FIRST_STEP NUM_STEPS
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from fastbeit.config.sections import DataConfig
from fastbeit.data.index.reader import open_index
from fastbeit.data.loader import make_loader

BATCH_SIZE, SEED = 6, 7


def write_digests(
    index: Path, out: Path, options: dict, rank: int = 0, world_size: int = 1, first_step: int = 0, num_steps: int = 1
) -> None:
    """One write a step: its lines are there whole or not at all, up to a kill in the middle of the write itself."""
    batches = make_loader(
        DataConfig.model_validate({"image_size": (32, 48), "tail": "wrap", **options}),
        open_index(index),
        token_size=(16, 24),
        batch_size=BATCH_SIZE,
        seed=SEED,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
        num_steps=num_steps,
    )
    with out.open("ab", buffering=0) as file:
        for batch in batches:
            assert batch.token_images is not None
            file.write(
                b"".join(
                    f"{sample} {epoch} {_digest(image)} {_digest(token_image)}\n".encode()
                    for sample, epoch, image, token_image in zip(
                        batch.sample.tolist(), batch.epoch.tolist(), batch.images, batch.token_images, strict=True
                    )
                )
            )


def _digest(image) -> str:
    return hashlib.sha256(image.cpu().numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    index, out, options, *numbers = sys.argv[1:]
    write_digests(Path(index), Path(out), json.loads(options), *(int(number) for number in numbers))
    sys.stdout.flush()
    os._exit(0)
