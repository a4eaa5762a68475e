"""Picture sizes of nearly one area and many shapes, as SDXL was trained (its report, appendix I)."""

import math
from collections.abc import Sequence

Size = tuple[int, int]


def bucket_sizes(resolution: int, step: int = 64, max_ratio: float = 2.0) -> list[Size]:
    """(height, width) in multiples of `step`, of an area just not above resolution squared, squares first.

    For each longer side from `resolution` on, the shorter one is the largest multiple that keeps the area within
    resolution squared, so that no bucket needs more memory than the square one. Raises ValueError for a resolution
    that is not a positive multiple of `step`.
    """
    if resolution < step or resolution % step:
        raise ValueError(
            f"`resolution={resolution}` with aspect buckets must be a multiple of `bucket_step={step}`, e.g. "
            f"{max(step, round(resolution / step) * step)}."
        )
    sizes = [(resolution, resolution)]
    for longer in range(resolution + step, resolution * resolution // step + 1, step):
        shorter = resolution * resolution // longer // step * step
        if longer / shorter > max_ratio:
            break
        sizes += [(shorter, longer), (longer, shorter)]
    return sizes


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape (as the logarithm of height / width) is nearest to that of `size`; ties: the earlier."""
    shape = math.log(size[0] / size[1])
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - shape))
