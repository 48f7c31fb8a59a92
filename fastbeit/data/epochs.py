"""How many steps make an epoch."""

from fastbeit.errors import ConfigError


def steps_per_epoch(num_images: int, batch_size: int, tail: str) -> int:
    """Steps that make an epoch; with tail=wrap rounded up, since epochs flow into one another there.

    Raises:
        ConfigError: tail=drop would drop every image.
    """
    if tail == "wrap":
        return -(-num_images // batch_size)
    if num_images < batch_size:
        raise ConfigError(
            f"optim.batch_size {batch_size} is more than the {num_images} images of the index, and data.tail=drop "
            f"leaves out what fills no batch; set data.tail=wrap, or optim.batch_size to at most {num_images}"
        )
    return num_images // batch_size
