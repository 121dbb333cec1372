"""GPUs as their vendors describe them: the ceilings that an estimate of time and fit goes by."""

from __future__ import annotations

from dataclasses import dataclass

from mm.config import ConfigError

GPUS_PER_MACHINE = 8  # of all platforms below


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU in a machine of eight. Rates are peaks: TFLOP/s without sparsity, GB/s in one direction, GB = 1e9."""

    bf16: float  # TFLOP/s of matrix products in bfloat16
    fp32: float  # ... and in float32 without TF32, which is torch's default
    memory: float  # GB
    bandwidth: float  # GB/s of that memory
    link: float  # GB/s to the GPUs of the same machine
    network: float  # GB/s to other machines, one adapter a GPU


# Data sheets: "NVIDIA A100 Tensor Core GPU" (SXM), "NVIDIA H100 Tensor Core GPU" (SXM), "NVIDIA H200 Tensor Core GPU"
# (SXM), "NVIDIA DGX B200", "AMD Instinct MI300X". They give links in both directions together (600, 900, 900, 1800 and
# 7 x 128 GB/s), half of which is here, and matrix rates with sparsity, half of which is without. Networks: DGX A100 has
# one adapter of 200 Gb/s a GPU, DGX H100, H200 and B200 one of 400 Gb/s, which is assumed for the MI300X too.
GPUS = {
    "a100-40": Gpu(bf16=312.0, fp32=19.5, memory=40, bandwidth=1555, link=300, network=25),
    "a100-80": Gpu(bf16=312.0, fp32=19.5, memory=80, bandwidth=2039, link=300, network=25),
    "h100": Gpu(bf16=989.4, fp32=66.9, memory=80, bandwidth=3350, link=450, network=50),
    "h200": Gpu(bf16=989.4, fp32=66.9, memory=141, bandwidth=4800, link=450, network=50),
    "b200": Gpu(bf16=2250.0, fp32=75.0, memory=180, bandwidth=8000, link=900, network=50),
    "mi300x": Gpu(bf16=1307.4, fp32=163.4, memory=192, bandwidth=5300, link=448, network=50),
}


def gpu(name: str) -> Gpu:
    """The GPU of that name. Raises ConfigError for one that is not in the table."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: known are {', '.join(GPUS)}")
    return GPUS[name]
