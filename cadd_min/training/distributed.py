"""Many processes as one: who they are, how their gradients meet, how sharded weights become whole again.

torchrun starts the processes; PyTorch's own DDP (a copy of the weights in each) or FSDP2 (a share of them in each)
does the work. All do the same at the same time, evaluation and samples too; only the first one prints and writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cadd_min.utils.device import torch_device
from cadd_min.utils.errors import InputError


@dataclass(frozen=True)
class World:
    """The processes of a run; `rank` is this one's number among `size`."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def mean(self, here: float | Tensor) -> float:
        """The mean of a number over the processes. All must ask at the same time."""
        if self.size == 1:
            return float(here)
        value = torch.as_tensor(here, dtype=torch.float64, device=self.device)
        dist.all_reduce(value)
        return float(value) / self.size

    def any(self, here: bool) -> bool:
        """Whether it holds in any of the processes. All must ask at the same time."""
        return self.mean(float(here)) > 0


def launched() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def world(device: str) -> Iterator[World]:
    """The processes that torchrun has started, each on a GPU of its own, or all on the CPU; without it, this one."""
    if not launched():
        yield World(torch_device(device))
        return
    own = torch_device(device)
    if own.type == "cuda":
        own = torch_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield World(own, dist.get_rank(), dist.get_world_size())
        dist.barrier()  # one that leaves while another still listens to it can end that one, too
    finally:
        dist.destroy_process_group()


class Through(nn.Module):
    """Runs a function of the model as its own forward, through(f, *args) = f(model, *args): DDP and FSDP2 act there."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, f: Callable[..., Any], *args: Any, **given: Any) -> Any:
        return f(self.model, *args, **given)


def shared(model: nn.Module, processes: World, shard: bool = False) -> nn.Module:
    """A `Through` of the model whose gradients are the mean over all processes.

    shard: each process keeps a share of every parameter, which become DTensors; else all keep all. Raises InputError
    where there is nobody to share with.
    """
    through = Through(model)
    if shard:
        if not launched():
            raise InputError("shard needs processes to share with: torchrun --nproc-per-node=N train_text.py ...")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(processes.device.type, (processes.size,))
        for block in model.blocks():  # type: ignore[operator]
            fully_shard(block, mesh=mesh)
        fully_shard(through, mesh=mesh, reshard_after_forward=True)  # a look at the weights leaves none of them whole
        return through
    if processes.size > 1 and any(p.requires_grad for p in model.parameters()):
        return nn.parallel.DistributedDataParallel(through, broadcast_buffers=False, gradient_as_bucket_view=True)
    return through


def accumulate_only(through: nn.Module, only: bool) -> None:
    """Whether the next backward keeps its gradients to itself: all but the last micro-batch of a step do."""
    if isinstance(through, nn.parallel.DistributedDataParallel):
        through.require_backward_grad_sync = not only
    elif (sync := getattr(through, "set_requires_gradient_sync", None)) is not None:
        sync(not only)  # type: ignore[operator]


def whole(value: Any, keep: bool = True) -> Any:
    """A state dict with every sharded tensor made whole, on the CPU. All processes must ask at the same time.

    keep: whether this process wants it; else None stands in the place of each, and takes no memory.
    """
    if isinstance(value, dict):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item, keep) for item in value]
    if not hasattr(value, "full_tensor"):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, if `like` is sharded; else the tensor."""
    mesh: Any = getattr(like, "device_mesh", None)
    if mesh is None or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), mesh, like.placements)  # type: ignore[attr-defined]
