"""What accelerators can do, by the device kind that JAX reports: for rooflines, utilisation and plans of memory.

TPUs: https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x ("System architecture", read in November 2026).
NVIDIA's: the data sheets of A100 (SXM4) and H100 (SXM5), dense rates without sparsity.
"""

import dataclasses
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip. A TPU v4 or TPU7x chip may be two of JAX's devices; see `of_device`.

    Attributes:
      name: as in a topology's name, such as 'v5e'.
      device_kind: how JAX's name of it begins.
      flops: peak of bfloat16 matrix products, FLOP/s.
      hbm_bytes: memory.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s to other chips of the slice (or to GPUs of the host), both directions and all links added.
      clock: of a TPU's cores, Hz: the peak rate over what its matrix units do in a cycle; None where that is not told.
      dcn_bandwidth: bytes/s to other slices, of this chip's share of its host's network, one direction; None unknown.
    """

    name: str
    device_kind: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    clock: float | None = None
    dcn_bandwidth: float | None = None

    def share(self, devices: int) -> "Chip":
        """What each of the chip's `devices` has."""
        if devices == 1:
            return self
        return dataclasses.replace(
            self,
            flops=self.flops / devices,
            hbm_bytes=self.hbm_bytes // devices,
            hbm_bandwidth=self.hbm_bandwidth / devices,
            link_bandwidth=self.link_bandwidth / devices,
            dcn_bandwidth=None if self.dcn_bandwidth is None else self.dcn_bandwidth / devices,
        )


CHIPS = (
    # v4: 6 links of 50 GB/s each way.
    Chip(
        name="v4",
        device_kind="TPU v4",
        flops=275e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1228e9,
        link_bandwidth=600e9,
        clock=1.05e9,
    ),
    # v5e: a pod of 256 has 6.4 Tbit/s to the data centre's network.
    Chip(
        name="v5e",
        device_kind="TPU v5 lite",
        flops=197e12,
        hbm_bytes=16 * GIB,
        hbm_bandwidth=819e9,
        link_bandwidth=400e9,
        clock=1.50e9,
        dcn_bandwidth=6.4e12 / 8 / 256,
    ),
    Chip(
        name="v5p",
        device_kind="TPU v5",
        flops=459e12,
        hbm_bytes=95 * GIB,
        hbm_bandwidth=2765e9,
        link_bandwidth=1200e9,
        clock=1.75e9,
        dcn_bandwidth=50e9 / 8,
    ),
    Chip(
        name="v6e",
        device_kind="TPU v6 lite",
        flops=918e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1638e9,
        link_bandwidth=800e9,
        clock=1.75e9,
        dcn_bandwidth=100e9 / 8,
    ),
    Chip(
        name="tpu7x",
        device_kind="TPU7x",
        flops=2307e12,
        hbm_bytes=192 * GIB,
        hbm_bandwidth=7380e9,
        link_bandwidth=1200e9,
        dcn_bandwidth=100e9 / 8,
    ),
    Chip(
        name="a100-40gb",
        device_kind="NVIDIA A100-SXM4-40GB",
        flops=312e12,
        hbm_bytes=40 * GIB,
        hbm_bandwidth=1555e9,
        link_bandwidth=600e9,
    ),
    Chip(
        name="a100-80gb",
        device_kind="NVIDIA A100-SXM4-80GB",
        flops=312e12,
        hbm_bytes=80 * GIB,
        hbm_bandwidth=2039e9,
        link_bandwidth=600e9,
    ),
    Chip(
        name="h100",
        device_kind="NVIDIA H100 80GB HBM3",
        flops=989e12,
        hbm_bytes=80 * GIB,
        hbm_bandwidth=3350e9,
        link_bandwidth=900e9,
    ),
)


def of_device(device: Any) -> Chip | None:
    """What one of JAX's devices has of its chip; None for a device that is not in the table, such as a CPU.

    JAX makes one device of a v5p's two cores, and two devices of a TPU7x's; v4 is either. A device says how many cores
    it has in `num_cores`.
    """
    matching = [chip for chip in CHIPS if device.device_kind.startswith(chip.device_kind)]
    if not matching:
        return None
    chip = max(matching, key=lambda chip: len(chip.device_kind))  # 'TPU v5' also begins 'TPU v5 lite'
    halved = chip.name in ("v4", "tpu7x") and getattr(device, "num_cores", 1) == 1
    return chip.share(2 if halved else 1)
