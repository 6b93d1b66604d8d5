"""Rank, world size and device of this process, and torch.distributed's process group.

The group's backend is gloo on CPUs and nccl on GPUs.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_scan.world.processes import LOOPBACK, available_cores

LISTEN_BACKLOG = 4096


@dataclass(frozen=True)
class World:
    """Rank of this process, number of ranks, and the device of its tensors."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")


_current = World()


def current() -> World:
    """The open world; if none was opened, a world of one rank on the CPU."""
    return _current


def cores_per_rank(world: World) -> int:
    """Number of cores for the threads of this rank.

    The launcher sets CORES_PER_RANK where Slurm binds every task to cores of its own; elsewhere the
    ranks of a node share its cores.
    """
    available = available_cores()
    per_rank = int(os.environ.get("CORES_PER_RANK", 0))
    if per_rank:
        return min(per_rank, available)
    return max(1, available // world.local_world_size)


def device_for(name: str, local_rank: int = 0) -> torch.device:
    """This rank's device for "auto", "cpu" or "cuda". Raises ValueError if there is no such GPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("runtime.device: cuda, but this machine has no GPU; allowed: auto, cpu")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ValueError(
            f"local rank {local_rank} needs a GPU of its own, this machine has {num_gpus}; "
            "start fewer processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def open_world(device: str = "auto", timeout_s: float = 1800.0) -> World:
    """Join the other ranks: nccl on GPUs, gloo on CPUs.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without RANK
    this process is the only rank. ``timeout_s`` is the limit of every collective.
    """
    global _current
    env = os.environ
    local_rank = int(env.get("LOCAL_RANK", 0))
    world = World(
        rank=int(env.get("RANK", 0)),
        world_size=int(env.get("WORLD_SIZE", 1)),
        local_rank=local_rank,
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
        device=device_for(device, local_rank),
    )
    if world.world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_s)
        store = None
        if env.get("MASTER_ADDR") == LOOPBACK:
            store = _local_store(world.rank, world.world_size, timeout)
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout
        )
    _current = world
    return world


def _local_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The rendezvous of ranks on one machine, reachable from this machine only.

    PyTorch's own store listens on all addresses. gloo too is limited to the loopback interface.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    port = int(os.environ["MASTER_PORT"])
    listener = None
    if rank == 0:
        listener = socket.create_server((LOOPBACK, port), backlog=LISTEN_BACKLOG).detach()
    return dist.TCPStore(LOOPBACK, port, world_size, rank == 0, timeout, master_listen_fd=listener)


def close_world() -> None:
    """Leave the world. May be called twice."""
    global _current
    if dist.is_initialized():
        dist.destroy_process_group()
    _current = World()


def wrap_ddp(module: torch.nn.Module) -> torch.nn.Module:
    """The module in DistributedDataParallel, or itself on a single rank or if nothing is trained.

    Buffers are not broadcast: methods update them equally on all ranks, and sending MoCo's queue
    would cost 33 MB per step.
    """
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    if _current.world_size == 1 or not is_trained:
        return module
    return torch.nn.parallel.DistributedDataParallel(
        module, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
