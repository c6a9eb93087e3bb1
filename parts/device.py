"""Where a script runs: device, precision, processes, signals; and what makes a CPU fast.

device = Device(cfg.device, cfg.dtype)     # also as one of torchrun's processes
with device.autocast():
    loss = loss_sum(model, device.put(batch))
(total,) = device.sum(loss.item())
device.close()
"""

import contextlib
import ctypes
import datetime
import gc
import math
import os
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from parts.common import UserError, owning


class Device:
    """A device, a precision, and this process's `rank` among `world` (1 without torchrun).

    Args:
        name: auto, cpu, mps, cuda (with torchrun, the local rank's), or cuda:<number>.
        dtype: auto, bfloat16, float16 or float32, for autocast.

    Raises UserError if this PyTorch has no such device.
    """

    def __init__(self, name: str, dtype: str):
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.is_first = self.rank == 0
        self.torch_device = find_device(name)
        if self.world > 1 and name.startswith("cuda:"):
            raise UserError(f"device={name} is one GPU, for {self.world} processes: set cuda")
        self.type = self.torch_device.type
        if self.type == "cuda":
            torch.cuda.set_device(self.torch_device)
            torch.set_float32_matmul_precision("high")  # TF32
        if dtype == "auto":
            dtype = "bfloat16" if computes_in_bfloat16(self.type) else "float32"
        self.dtype = getattr(torch, dtype)
        if self.world > 1:
            # If the compiler were first imported later, it would keep gloo's threads alive.
            from torch import _dynamo  # noqa: F401

            dist.init_process_group("cpu:gloo,cuda:nccl" if self.type == "cuda" else "gloo")
            # For waiting while one rank downloads or is slow.
            self.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    def close(self) -> None:
        """Close the process group: a gloo thread that outlives Python aborts the process."""
        if self.world > 1:
            gc.collect()  # nothing may hold the group any more
            dist.destroy_process_group()

    def autocast(self):
        return torch.autocast(self.type, self.dtype, enabled=self.dtype != torch.float32)

    def put(self, tensors: dict) -> dict:
        """Copy tensors to the device; from pinned memory, so that the copy overlaps the step."""
        is_cuda = self.type == "cuda"
        if is_cuda:
            tensors = {name: x.pin_memory() for name, x in tensors.items()}
        return {name: x.to(self.torch_device, non_blocking=is_cuda) for name, x in tensors.items()}

    # -- all processes together ---------------------------------------------------------------

    def sum(self, *numbers: float) -> list[float]:
        """Return each number summed over all processes."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.sum(flag)[0] > 0

    def gather(self, item) -> list:
        """Return every process's item, by rank, once all processes are here."""
        items = [item] * self.world
        if self.world > 1:
            dist.all_gather_object(items, item, self.patient)
        return items

    def on_first(self, work):
        """Return what `work()` returns on rank 0, on every rank. If it raises, all exit."""
        outcome = [False, None]  # whether it succeeded, and what it returned
        try:
            if self.is_first:
                outcome = [True, work()]
        finally:  # the others are told before rank 0 raises
            if self.world > 1:
                dist.broadcast_object_list(outcome, 0, self.patient)
        succeeded, result = outcome
        if not succeeded:
            raise SystemExit(1)  # rank 0 says why
        return result

    @contextlib.contextmanager
    def owning(self, path: Path, what: str):
        """Hold a lock file (common.owning) on rank 0. If another process does, all exit."""
        with contextlib.ExitStack() as stack:
            self.on_first(lambda: stack.enter_context(owning(path, what)))
            yield

    # -- random states, so that a resumed run draws the same numbers --------------------------

    def random_states(self) -> dict[str, torch.Tensor]:
        """Return the states of PyTorch's generators, the CPU's and the device's."""
        states = {"cpu": torch.get_rng_state()}
        if self.type != "cpu":
            states[self.type] = getattr(torch, self.type).get_rng_state()
        return states

    def set_random_states(self, states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if self.type in states and self.type != "cpu":
            getattr(torch, self.type).set_rng_state(states[self.type])

    # -- speed --------------------------------------------------------------------------------

    def matmul_rate(self, tries: int = 8) -> float:
        """Return the FLOP/s of a large matrix product here and now, in this precision.

        Matrices grow until a product takes 10 ms, or to a largest size, beyond which a CPU without
        bfloat16 would take seconds.
        """
        n, seconds = 128, 0.0
        self.matmul_seconds(n)  # a GPU's first product also loads the library
        while seconds < 0.01 and n < (8192 if self.type == "cuda" else 1024):
            n *= 2
            seconds = self.matmul_seconds(n)
        return 2 * n**3 / min(self.matmul_seconds(n) for _ in range(tries))

    def matmul_seconds(self, n: int) -> float:
        """Return the seconds that a product of two (n, n) matrices takes."""
        own = torch.Generator(self.torch_device)  # leaves the draws of training alone
        a = torch.randn(n, n, device=self.torch_device, generator=own).to(self.dtype)
        a[0, 0].item()  # waits until a GPU has drawn them
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        return time.perf_counter() - begin

    def compiles(self, asked: bool | None) -> bool:
        """Whether to compile. None means: on CUDA, if there is a C compiler, which Triton needs.

        Raises UserError if it was asked for and there is none.
        """
        variable, names = "CXX", ["g++", "clang++"]
        if self.type == "cuda":
            variable, names = "CC", ["gcc", "clang", "cc"]
        names = [os.environ[variable]] if variable in os.environ else names
        has_compiler = any(map(shutil.which, names))
        if asked and not has_compiler:
            raise UserError(
                f"torch.compile needs a C/C++ compiler, none found ({' '.join(names)}): "
                f"set --compile=False"
            )
        if asked is None:
            return self.type == "cuda" and has_compiler
        return asked

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model to train with: under DDP if there are more processes."""
        return nn.parallel.DistributedDataParallel(model) if self.world > 1 else model


def find_device(name: str) -> torch.device:
    """Return the device of that name. Raise UserError if this PyTorch has none."""
    known = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        known.append("mps")
    known.append("cpu")
    if name == "auto":
        name = known[0].partition(":")[0]
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name not in known:
        raise UserError(f"device={name}: this PyTorch sees only {' '.join(known)}")
    return torch.device(name)


def computes_in_bfloat16(device_type: str) -> bool:
    """Whether a device has bfloat16 in hardware, and so is faster in it than in float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # PyTorch has no public one
    return device_type == "cpu" and probe is not None and probe()


class Signals:
    """SIGTERM and SIGINT ask for a stop after the step; a second one ends the process at once.

    SIGHUP (a closed terminal, a lost connection) asks too, but never ends the process: the shell
    and the system send one each. So do SIGUSR1 and SIGUSR2, by which schedulers such as Slurm warn.
    What is ignored when training starts stays ignored, as SIGHUP does under nohup.

    A scheduler may signal torchrun and its processes, and torchrun passes its own on to them:
    what comes within `echo` seconds of the first is the same signal.
    """

    def __init__(self, echo: float):
        self.asked = False
        self.first_at = math.inf
        self.echo = echo
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)
        for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):  # which Windows lacks
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.hang_up)

    def hang_up(self, number, frame) -> None:
        self.asked = True

    def ask(self, number, frame) -> None:
        now = time.monotonic()
        if now > self.first_at + self.echo:
            os._exit(128 + number)
        self.asked = True
        self.first_at = min(now, self.first_at)


# ---------------------------------------------------------------------------------------------
# What makes a CPU fast. Each was measured (LOG.md); on a GPU all of it is PyTorch's own.


class Dropout(nn.Module):
    """nn.Dropout with cheap random numbers on a CPU.

    PyTorch draws a number per element, on one thread: a tenth of a training step. Here a draw of
    64 bits serves eight elements, with p rounded up to a multiple of 1/256: a quarter of the time.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        threshold = min(255, math.ceil(256 * self.p))
        bits = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None)
        kept = bits.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold
        return x * kept.to(x.dtype).mul_(256 / (256 - threshold))


NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, dropout: Dropout
) -> torch.Tensor:
    """scaled_dot_product_attention, or the three lines it stands for if these are faster.

    On a CPU the fused kernel's backward pass takes twice as long in bfloat16, and with dropout
    there is no fused kernel. On a GPU, cuDNN's may give NaN gradients if T % 128 is 64 (LOG.md).
    """
    p = dropout.p if dropout.training else 0.0
    if q.device.type != "cpu" or (p == 0 and q.dtype == torch.float32):
        with sdpa_kernel(NOT_CUDNN) if q.size(2) % 128 == 64 else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)
    weights = F.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
    return dropout(weights) @ v


def lay_out_by_columns(model: nn.Module) -> None:
    """Lay wide weights out by columns, for decoding: MKL multiplies one row by them up to 2.9
    times as fast, and a greedy step takes 0.6 of the time."""
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.size(0) > parameter.size(1):
            parameter.data = parameter.data.T.contiguous().T


def keep_freed_memory() -> None:
    """Ask glibc (Linux) to keep the memory that tensors free, for training: page faults on freshly
    mapped memory cost a CPU a twentieth of a step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: map only tensors above 1 GB on their own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep up to 2 GB of freed memory
