"""NVIDIA apex: whether that is what is installed under the name, and whether its optimizers can be used."""

import importlib

# as its README says; without the two variables a build is quiet, and useless
BUILD = (
    "build it: git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install "
    "--no-build-isolation . (it wants ninja, and nvcc of the CUDA version of PyTorch)"
)


def why_no_apex(optimizer: str = "FusedAdam") -> tuple[str, str] | None:
    """What was found instead of apex's fused optimizer, and what to do before it is built; None: it can be imported.

    The package of that name on PyPI is a toolkit for web servers (Pyramid). A build without CUDA extensions can be
    imported, and fails when an optimizer is made.
    """
    try:
        optimizers = importlib.import_module("apex.optimizers")
        if not hasattr(optimizers, optimizer):
            return f"NVIDIA's apex, without {optimizer}", ""
        importlib.import_module("amp_C")
    except ModuleNotFoundError as err:
        missing = err.name or ""
        if missing == "apex":
            return "apex is not installed", ""
        if missing == "amp_C":
            return "NVIDIA's apex, built without its CUDA extensions: amp_C is missing", ""
        if missing.startswith("apex"):
            return "not NVIDIA's apex, but an unrelated package of that name", "pip uninstall apex"
        return f"apex cannot be imported: {err}", ""
    except ImportError as err:
        return f"apex was built for another PyTorch: {err}", "pip uninstall apex"
    return None
