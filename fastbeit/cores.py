"""The processor cores that this process may use."""

import os


def num_cores() -> int:
    """As many as the scheduler lets it have, which in a container or under taskset is fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
