"""What a GPU reaches: products, memory, its last cache and the link, timed through torch.

Written for any torch device, so that it runs where there is no GPU, too.
"""

from collections.abc import Callable
from time import perf_counter

import torch

from ktlab.placement.machine import Gpu

PRODUCT = 8192
"""Rows and columns of the timed product; smaller ones do not fill a large GPU."""
LARGE_BYTES, SMALL_BYTES = 1 << 30, 16 << 20
"""Copied within the device: out of every cache, and within the last one."""
LINK_BYTES = 256 << 20
REPEATS = 10


def measured_gpus() -> tuple[tuple[Gpu, ...], dict[str, float]]:
    """(the first GPU, {"pcie": bytes/s}); nothing where torch sees none."""
    if not torch.cuda.is_available():
        return (), {}
    properties = torch.cuda.get_device_properties(0)
    device = torch.device("cuda:0")
    bandwidth = copy_rate(device, LARGE_BYTES)
    gpu = Gpu(
        name=properties.name,
        flop_per_s=product_rate(device, torch.bfloat16),
        float32_flop_per_s=product_rate(device, torch.float32),
        bandwidth=bandwidth,
        # So small a copy may take less than its launch; no cache is slower than memory.
        cache_bandwidth=max(copy_rate(device, SMALL_BYTES), bandwidth),
        vram=int(properties.total_memory),
        multiprocessors=int(properties.multi_processor_count),
    )
    pcie = link_rate(device)
    torch.cuda.empty_cache()  # torch keeps what was freed; others may want it
    return (gpu,), {"pcie": pcie}


def product_rate(device: torch.device, dtype: torch.dtype, size: int = PRODUCT) -> float:
    """FLOP/s of a product with float32 sums; of float32 as torch does it unless told otherwise."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _seconds(lambda: a @ a, device)


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes/s read and written together by a copy within the device."""
    source = torch.ones(nbytes // 2, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return nbytes / _seconds(lambda: target.copy_(source), device)


def link_rate(device: torch.device, nbytes: int = LINK_BYTES) -> float:
    """Bytes/s of a copy from pinned memory to the device."""
    pinned = device.type == "cuda"
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(nbytes, device=device, dtype=torch.uint8)
    return nbytes / _seconds(lambda: target.copy_(source, non_blocking=True), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, over a few that follow one another; the first does not count."""
    run()
    _wait(device)
    start = perf_counter()
    for _ in range(REPEATS):
        run()
    _wait(device)
    return (perf_counter() - start) / REPEATS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
