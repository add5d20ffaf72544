"""What instance types of clouds have, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30
T4, A10G, L4, L40S = 16384 * MIB, 22888 * MIB, 22888 * MIB, 45776 * MIB
A100, A100_80, H100, H200 = 40960 * MIB, 81920 * MIB, 81920 * MIB, 144384 * MIB
"""Memory of a GPU as AWS's DescribeInstanceTypes says it."""


@dataclass(frozen=True)
class Instance:
    cpus: int
    memory_bytes: int
    gpus: int
    gpu_memory_bytes: int
    usd_per_hour: float | None
    """On demand, Linux. None: not known here."""


# On-demand list prices of us-east-1 and us-west-2 (AWS, https://aws.amazon.com/ec2/pricing/on-demand) and of
# us-central1 (Google Cloud, https://cloud.google.com/compute/all-pricing), as public price catalogues repeated them in
# November 2026. Other regions cost more; spot instances less.
INSTANCES = {
    "m7i.large": Instance(2, 8 * GIB, 0, 0, 0.1008),
    "m7i.xlarge": Instance(4, 16 * GIB, 0, 0, 0.2016),
    "m7i.2xlarge": Instance(8, 32 * GIB, 0, 0, 0.4032),
    "g4dn.xlarge": Instance(4, 16 * GIB, 1, T4, 0.526),
    "g4dn.12xlarge": Instance(48, 192 * GIB, 4, T4, 3.912),
    "g5.xlarge": Instance(4, 16 * GIB, 1, A10G, 1.006),
    "g5.12xlarge": Instance(48, 192 * GIB, 4, A10G, 5.672),
    "g5.48xlarge": Instance(192, 768 * GIB, 8, A10G, 16.288),
    "g6.xlarge": Instance(4, 16 * GIB, 1, L4, 0.8048),
    "g6.12xlarge": Instance(48, 192 * GIB, 4, L4, 4.6016),
    "g6.48xlarge": Instance(192, 768 * GIB, 8, L4, 13.3504),
    "g6e.xlarge": Instance(4, 32 * GIB, 1, L40S, 1.861),
    "g6e.12xlarge": Instance(48, 384 * GIB, 4, L40S, 10.4926),
    "g6e.48xlarge": Instance(192, 1536 * GIB, 8, L40S, 30.1312),
    "p4d.24xlarge": Instance(96, 1152 * GIB, 8, A100, 21.9576),
    "p4de.24xlarge": Instance(96, 1152 * GIB, 8, A100_80, None),
    "p5.48xlarge": Instance(192, 2048 * GIB, 8, H100, 55.04),
    "p5en.48xlarge": Instance(192, 2048 * GIB, 8, H200, None),
    "a2-highgpu-1g": Instance(12, 85 * GIB, 1, A100, 3.673385),
    "a2-highgpu-2g": Instance(24, 170 * GIB, 2, A100, 7.34677),
    "a2-highgpu-4g": Instance(48, 340 * GIB, 4, A100, 14.69354),
    "a2-highgpu-8g": Instance(96, 680 * GIB, 8, A100, 29.38708),
    "a2-ultragpu-1g": Instance(12, 170 * GIB, 1, A100_80, 5.0688),
    "a2-ultragpu-8g": Instance(96, 1360 * GIB, 8, A100_80, 40.5504),
    "a3-highgpu-8g": Instance(208, 1872 * GIB, 8, H100, 88.49),
}
PRICED_REGIONS = ("us-east-1", "us-west-2", "us-central1")
