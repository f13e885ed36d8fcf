"""One run in many processes: start them, average their gradients, gather sharded weights.

torchrun starts the processes. PyTorch's own DDP (each process has a copy of the weights) or FSDP2 (each process has a
share of them) does the work. All processes do the same at the same time, evaluation and samples included. Only the
first process prints and writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cadd_min.utils.device import launched, torch_device
from cadd_min.utils.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run. This process has the number `rank` of `size`, from 0."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def mean(self, here: float | Tensor) -> float:
        """Return the mean of a number over the processes. All processes must call at the same time."""
        if self.size == 1:
            return float(here)
        value = torch.as_tensor(here, dtype=torch.float64, device=self.device)
        dist.all_reduce(value)
        return float(value) / self.size

    def any(self, here: bool) -> bool:
        """Tell whether `here` is true in any process. All processes must call at the same time."""
        return self.mean(float(here)) > 0

    def tell(self, text: str) -> str:
        """Return the text of the first process in all processes. All processes must call at the same time."""
        if self.size == 1:
            return text
        content = torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy()).to(self.device)
        length = torch.tensor(len(content), device=self.device)
        dist.broadcast(length, 0)
        content = content if self.first else content.new_empty(int(length))
        dist.broadcast(content, 0)
        return content.cpu().numpy().tobytes().decode()

    def in_first(self, f: Callable[[], T]) -> T | None:
        """Call f() in the first process alone, and return None in the others. All processes must call at the same time.

        An InputError of the first process is raised in all processes.
        """
        result, error = None, ""
        if self.first:
            try:
                result = f()
            except InputError as failure:
                error = str(failure)
        if error := self.tell(error):
            raise InputError(error)
        return result


@contextmanager
def world(device: str) -> Iterator[World]:
    """Join the processes that torchrun has started, each on its own GPU or all on the CPU.

    Without torchrun the world is this process alone. A world inside a world is the same. Raises InputError where this
    machine has no such device.
    """
    own = torch_device(device)
    if not launched():
        yield World(own)
        return
    if own.type == "cuda":
        own = torch_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(own)
    if dist.is_initialized():
        yield World(own, dist.get_rank(), dist.get_world_size())
        return
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield World(own, dist.get_rank(), dist.get_world_size())
        dist.barrier()  # a process that leaves early can crash another that still waits for it
    finally:
        dist.destroy_process_group()


class Through(nn.Module):
    """Call any function of the model as a forward: through(f, *args) = f(model, *args).

    DDP and FSDP2 act around forward, so every function of the weights has to go through it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, f: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return f(model, *args, **options)."""
        return f(self.model, *args, **options)


def shared(model: nn.Module, processes: World, shard: bool = False) -> nn.Module:
    """Wrap the model in a `Through` whose gradients are the mean over all processes.

    shard: each process keeps a share of every parameter, which becomes a DTensor. The first process has the values. The
    others may have the shapes alone, on the meta device. Without `shard` each process has and keeps all parameters.
    Raises InputError for `shard` without torchrun.
    """
    through = Through(model)
    if shard:
        check_shard(processes.device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(processes.device.type, (processes.size,))
        for block in model.blocks():  # type: ignore[operator]
            _receive(block, processes)
            fully_shard(block, mesh=mesh)
        _receive(through, processes)
        fully_shard(through, mesh=mesh, reshard_after_forward=True)  # a forward without a backward must free them
        return through
    if processes.size > 1 and any(p.requires_grad for p in model.parameters()):
        return nn.parallel.DistributedDataParallel(through, broadcast_buffers=False, gradient_as_bucket_view=True)
    return through


def _receive(module: nn.Module, processes: World) -> None:
    """Put a module on its device, with the first process's weights and buffers. What is sharded already stays so.

    Called a block at a time, so that no process but the first has more than a block whole.
    """
    for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values():
        if hasattr(tensor, "full_tensor"):
            continue
        meta, device = tensor.is_meta, processes.device
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if meta else tensor.detach().to(device)
        whole = whole.contiguous()
        dist.broadcast(whole.view(-1).view(torch.uint8), 0)
        if meta:  # in place, as several modules may hold the tensor
            own = nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
            torch.utils.swap_tensors(tensor, own)
        else:
            tensor.data = whole


def check_shard(device: torch.device) -> None:
    """Raise InputError where weights cannot be shared: without torchrun, or on a CPU by an old torch."""
    if not launched():
        raise InputError("shard needs processes to share with: torchrun --nproc-per-node=N train_text.py ...")
    if not can_shard(device):
        raise InputError("shard on a CPU needs torch 2.7 or newer: leave it out, or install a newer torch")


def can_shard(device: torch.device) -> bool:
    """Tell whether this torch can share weights on the device. FSDP2 asks even a CPU's stream for events."""
    return device.type != "cpu" or hasattr(torch.cpu.current_stream(), "record_event")


def accumulate_only(through: nn.Module, only: bool) -> None:
    """Keep the next backward's gradients in this process if `only`, else average them over the processes.

    Only the last micro-batch of a step averages.
    """
    if isinstance(through, nn.parallel.DistributedDataParallel):
        through.require_backward_grad_sync = not only
    elif (sync := getattr(through, "set_requires_gradient_sync", None)) is not None:
        sync(not only)  # type: ignore[operator]


def unsharded(value: Any, keep: bool = True) -> Any:
    """Return a state dict with every sharded tensor gathered on the CPU. All processes must call at the same time.

    keep: False puts None in the place of each sharded tensor, and saves the memory in processes that do not write.
    """
    if isinstance(value, dict):
        return {key: unsharded(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [unsharded(item, keep) for item in value]
    if not hasattr(value, "full_tensor"):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's share of a whole tensor if `like` is sharded, else the tensor itself."""
    mesh: Any = getattr(like, "device_mesh", None)
    if mesh is None or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), mesh, like.placements)  # type: ignore[attr-defined]
