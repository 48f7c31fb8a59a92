"""How large the buffers are that DeepSpeed ZeRO has beside weights, gradients and moments; in values, not bytes."""

BUCKET = 200_000_000  # of stages 1 and 2: most models in one
BUCKET_3, PREFETCH_3 = 50_000_000, 50_000_000
LIVE_3 = 200_000_000  # whole at a time
PERSISTENT_3 = 100_000  # smaller tensors stay whole


def bucket_sizes(num_weights: int, stage: int) -> dict[str, int]:
    """By DeepSpeed's names; none is larger than the model."""
    if stage < 3:
        sizes = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    else:
        sizes = {
            "reduce_bucket_size": BUCKET_3,
            "stage3_prefetch_bucket_size": PREFETCH_3,
            "stage3_max_live_parameters": LIVE_3,
            "stage3_param_persistence_threshold": PERSISTENT_3,
        }
    return {name: min(size, num_weights) for name, size in sizes.items()}
