# SPDX-License-Identifier: Apache-2.0
"""Rates of GPUs and links: the only place for them. FLOP/s and bytes/s.

Four rates of bf16 matrix products differ, and each has its use:

- ``peak_flops``, the data sheet's, is what tensor cores do at the boost clock. A GPU that
  multiplies for long is held to its power limit and never reaches it. Model FLOP utilisation is
  relative to it, by convention.
- ``limit_flops`` is what large dense products of cuBLAS reach. Benchmarks and the simulator call
  the time at this rate the limit: no grouped GEMM of ours has been faster.
- ``product_flops`` is what our grouped GEMM reaches on large shapes. The simulator adds the time
  to read operands and write results that the products do not hide.
- ``pass_flops`` is the rate of a whole pass over typical layers, reads and writes included. By the
  simulator's sum passes run at 530 to 725 TFLOP/s; the cost model takes one rate for all, because
  it compares times of communication with the time of a pass and needs no more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NIC_BYTES_PER_S = 50e9  # 400 Gbit/s a GPU, one direction


@dataclass(frozen=True)
class Hardware:
    """Rates of one GPU with its NVLinks.

    Attributes:
        num_sms: SMs.
        peak_flops, limit_flops, product_flops, pass_flops: bf16 products on all SMs, FLOP/s; the
            module's docstring tells them apart.
        grouped_mm_flops: torch's grouped GEMM, a whole pass, FLOP/s.
        memory_bytes_per_s: HBM, reads and writes together.
        link_bytes_per_s: NVLink, one direction, used by SMs.
        copy_engine_bytes_per_s: NVLink, one direction, used by a copy engine.
        nccl_bytes_per_s: NVLink, one direction, used by NCCL's all-to-all.
        cta_pull_bytes_per_s: HBM traffic of one CTA that pulls tokens, reads and writes together.
        cta_push_bytes_per_s: the same of one CTA that sums results and pushes the sums.
    """

    num_sms: int
    peak_flops: float
    limit_flops: float
    product_flops: float
    pass_flops: float
    grouped_mm_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    copy_engine_bytes_per_s: float
    nccl_bytes_per_s: float
    cta_pull_bytes_per_s: float
    cta_push_bytes_per_s: float


# Peak: NVIDIA's H200 data sheet, SXM, dense. The rest is measured on H200s of one host.
H200 = Hardware(
    num_sms=132,
    peak_flops=989e12,
    limit_flops=760e12,
    product_flops=735e12,
    pass_flops=650e12,
    grouped_mm_flops=650e12,
    memory_bytes_per_s=3.3e12,
    link_bytes_per_s=340e9,
    copy_engine_bytes_per_s=370e9,
    nccl_bytes_per_s=230e9,
    cta_pull_bytes_per_s=50e9,
    cta_push_bytes_per_s=40e9,
)
# The same die and NVLinks with slower memory: 3.35 TB/s, the H200's 4.8 TB/s, by NVIDIA's data
# sheets of the SXM modules. Nothing here is measured on an H100: the memory's rate is scaled.
H100 = replace(H200, memory_bytes_per_s=2.3e12)

# Data-sheet peak of dense bf16 by a part of the device's name, the first that fits, FLOP/s.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": H100.peak_flops,
    "H200": H200.peak_flops,  # also the GH200
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's data-sheet peak of dense bf16 in FLOP/s, None where it is not known."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in device_name), None)
