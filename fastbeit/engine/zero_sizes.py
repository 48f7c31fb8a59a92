"""How many weights DeepSpeed's ZeRO moves, or keeps, at a time; imports no torch, so that the planner can ask too.

DeepSpeed's own defaults are for larger models: buckets of 500 million weights, whatever the model has, would take more
memory than BEiT-L itself; and a reuse distance of a billion would keep all weights of such a model gathered from the
forward to the backward, so that stage 3 saved nothing. Read in DeepSpeed 0.19.8.
"""

SHARED_STATE = 200_000_000  # of stages 1 and 2: gradients that are added, and weights that are gathered, at a time
SHARED_WEIGHTS = 50_000_000  # of stage 3: gradients that are added, and weights that are gathered ahead, at a time
# weights stay gathered that are used again within so many: in the backward, what its recomputed block has just used
REUSED_WITHIN = 50_000_000
LIVE = 200_000_000  # gathered at once: DeepSpeed gathers ahead until there are so many
PERSISTENT = 100_000  # smaller parameters are whole on each rank: norms, biases, tables


def bucket_sizes(num_weights: int, stage: int) -> dict[str, int]:
    """By DeepSpeed's keys of `zero_optimization`, in weights, each at most the model's; stage 0 has none."""
    # DeepSpeed wants an even number of the weights that are gathered
    most = max(2, num_weights - num_weights % 2)
    sizes = {"reduce_bucket_size": SHARED_STATE, "allgather_bucket_size": SHARED_STATE} if stage else {}
    if stage == 3:
        sizes = {
            "reduce_bucket_size": SHARED_WEIGHTS,
            "stage3_prefetch_bucket_size": SHARED_WEIGHTS,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": REUSED_WITHIN,
        }
    return {key: min(size, most) for key, size in sizes.items()}
