"""Compiles what a call of the kernels would launch, for a GPU that need not be there, and prints a JSON report.

`python ahead_of_time.py 90`. The public functions run as they are, on CPU tensors, with a driver that says "sm_90" and
launches that only compile; so the arguments, alignments and launch choices are those of a user's call. It does not know
how fast anything is. TRITON_INTERPRET must not be set.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from spatialprobe.kernels import launch
from spatialprobe.kernels.contrastive_loss import contrastive_loss
from spatialprobe.kernels.pool_features import accumulate, pool_features
from spatialprobe.kernels.probe_input import grouped_probe_input, probe_input

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = {  # what is looked for in the machine code (SASS)
    "wide_loads": r"\bLDG\.[.A-Z0-9]*128\b",  # 16 bytes a thread
    "narrow_loads": r"\bLDG\.E\.(?:U8|S8|U16|S16)\b",
    "async_copies": r"\bLDGSTS[.A-Z0-9]*128\b|\bUBLKCP\b|\bUTMALDG\b",
    "wide_stores": r"\bSTG[.A-Z0-9]*[.]128\b",
    "hmma": r"\bHMMA\b|\bQMMA\b|\bIMMA\b",
    "wgmma": r"\b[HQI]GMMA\b",
    "tcgen05": r"\bUTC[A-Z]*MMA\b",
}


@dataclass
class Compiled:
    """One kernel as one call compiles it."""

    case: str
    kernel: str
    registers: int
    spilled: int  # bytes of stack a thread, which is where registers are spilled to
    shared: int  # bytes of shared memory
    warps: int
    counts: dict[str, int]  # empty for kernels that no test asks for: the disassembler takes as long as the compiler


class Driver:
    """As much of a GPU as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def main(capability: int) -> None:
    found: list[Compiled] = []
    triton.runtime.driver.set_active(Driver(capability))
    launch.capability = lambda device: capability
    launch.INTERPRET = True  # lets CPU tensors through the door; kernels are already decorated for a GPU
    compile_only = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = compile_only(self, *args, grid=grid, warmup=True, **options)
        found.append(inspect(case, self.__name__, kernel))
        return kernel

    JITFunction.run = run
    for case, call in cases(capability).items():  # noqa: B007 - `run` reads it
        call()
    print(json.dumps([asdict(each) for each in found]))


def cases(capability: int) -> dict:
    """Calls at the channels, grids and dtypes in use, with few tokens: their number does not change the code."""
    wan = torch.zeros(1, 2, 30, 52, 5120, dtype=torch.bfloat16)
    cogvideo = torch.zeros(1, 2, 30, 45, 3072, dtype=torch.bfloat16)
    total = torch.zeros(1, 2, 15, 26, 5120)
    pool = lambda x, grid, dtype, **o: lambda: pool_features(x, (0, 1), grid, dtype=dtype, impl="triton", **o)  # noqa: E731
    found = {
        "pool 2x2 float16": pool(wan, (15, 26), torch.float16),
        "pool 2x2 int8 layer": pool(wan, (15, 26), torch.int8, norm="layer"),
        "pool uneven float16": pool(cogvideo, (15, 22), torch.float16, norm="l2"),
        "pool 14x14 float16": pool(wan, (14, 14), torch.float16),
        "pool last of several": pool(wan, (15, 26), torch.float16, onto=total),
        "pool 4 steps at once": pool(
            wan[None].expand(4, -1, -1, -1, -1, -1), (15, 26), torch.float16, weight=[0.25] * 4
        ),
        "pool accumulate": lambda: accumulate(wan, (0, 1), (15, 26), total, weight=0.25, impl="triton"),
        "pool 2x2 float8": pool(wan, (15, 26), torch.float8_e4m3fn),
    }
    tokens = 1024
    stats = {"mean": torch.zeros(tokens), "rstd": torch.ones(tokens)}
    scaled = stats | {"scale": torch.ones(tokens)}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("int8", torch.int8)):
        x, known = torch.zeros(tokens, 5120, dtype=dtype), scaled if dtype == torch.int8 else stats
        found[f"linear {name} 128"] = train_step(x, 128, **known)
    half = torch.zeros(tokens, 5120, dtype=torch.bfloat16)
    found["linear float8 128"] = train_step(torch.zeros(tokens, 5120, dtype=torch.float8_e4m3fn), 128, **scaled)
    found["linear bfloat16 32"] = train_step(half, 32, **stats)
    found["linear own stats 128"] = train_step(half, 128)
    found["linear gelu l2 32"] = train_step(half, 32, activation="gelu", normalize=True, **stats)
    found["linear large 2048"] = train_step(half, 2048, activation="gelu", **stats)
    found["linear grouped 8 x 32"] = grouped(half, 8, 32, **stats)
    several = {name: [x] * 3 for name, x in stats.items()}
    found["linear 3 tensors 32"] = grouped([half.clone() for _ in range(3)], 3, 32, **several)
    pixels, ids = torch.zeros(2, 256, 32), torch.zeros(2, 256, dtype=torch.int64)
    found["contrastive"] = lambda: contrastive_loss(pixels.requires_grad_(), ids, impl="triton").backward()
    return found


def train_step(x: torch.Tensor, width: int, **options):
    def call() -> None:
        weight, bias = torch.zeros(width, x.shape[1], requires_grad=True), torch.zeros(width, requires_grad=True)
        gamma, beta = (torch.zeros(x.shape[1], requires_grad=True) for _ in range(2))
        y = probe_input(x, weight, bias, gamma, beta, out_dtype=torch.bfloat16, impl="triton", **options)
        y.sum().backward()

    return call


def grouped(x, probes: int, width: int, **options):
    def call() -> None:
        channels = (x if isinstance(x, torch.Tensor) else x[0]).shape[-1]
        weight = torch.zeros(probes, width, channels, requires_grad=True)
        y = grouped_probe_input(x, weight, out_dtype=torch.bfloat16, normalize=True, impl="triton", **options)
        (y if isinstance(y, torch.Tensor) else torch.stack(y)).sum().backward()

    return call


def inspect(case: str, name: str, kernel) -> Compiled:
    """Registers and stack as the assembler notes them, instructions as the disassembler shows them."""
    cubin, code = kernel.asm["cubin"], ""
    usage = tool("cuobjdump", "-res-usage", cubin=cubin)
    if name not in ("_upstream_kernel", "_epilogue_kernel"):
        code = tool("nvdisasm", "--print-code", "--no-dataflow", cubin=cubin)
    return Compiled(
        case,
        name,
        int(re.search(r"REG:(\d+)", usage).group(1)),
        int(re.search(r"STACK:(\d+)", usage).group(1)),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        {what: len(re.findall(pattern, code)) for what, pattern in COUNTED.items()} if code else {},
    )


@cache  # several cases launch one kernel
def tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([NVIDIA / name, *options, file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    main(int(sys.argv[1]))
