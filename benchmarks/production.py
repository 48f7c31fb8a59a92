"""Each kernel as its launcher launches it in a run of BEiT-B: what the compile gate and the predictions look at."""

from collections.abc import Iterator

from benchmarks.compiled import Case


def cross_entropy_cases() -> Iterator[Case]:
    from fastbeit_kernels import cross_entropy as ce

    rows = dict(labels_ptr="*i64", row_loss_ptr="*fp32", row_correct_ptr="*i32")
    scalars = dict(grad_loss_ptr="*fp32", count_ptr="*fp32")
    options = ce.launch_options(ce.MAX_BLOCK)
    for dtype in ("bf16", "fp32"):
        for kernel in (ce._cross_entropy_fwd_kernel, ce._cross_entropy_fwd_loop_kernel):
            for with_grad in (True, False) if dtype == "bf16" else (True,):
                constants = dict(IGNORE_INDEX=ce.IGNORE_INDEX, WITH_GRAD=with_grad, BLOCK_V=ce.MAX_BLOCK)
                yield Case(kernel, "grad" if with_grad else "loss", dtype, rows, constants, options)
        yield Case(ce._cross_entropy_bwd_kernel, "grad", dtype, scalars, dict(BLOCK_N=ce.MAX_BLOCK), options)


def cases() -> Iterator[Case]:
    yield from cross_entropy_cases()
