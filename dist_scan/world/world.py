"""The processes that work together: who this one is, on which device, and how they meet. GPU or CPU, place 1 of 4."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among its peers. `device` is where its tensors live."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")


_current = World()
LOOPBACK = "127.0.0.1"


def current() -> World:
    """The open world; a world of one on the CPU when none was opened."""
    return _current


def cores(world: World) -> int:
    """Cores for this rank's threads. Slurm binds a task to its own when it was told how many (the launcher says so in CORES_PER_RANK):
    to divide those by the ranks of the node once more would leave one loader thread of twelve. Elsewhere the ranks here share all."""
    mine = len(os.sched_getaffinity(0))
    told = int(os.environ.get("CORES_PER_RANK", 0))
    return min(told, mine) if told else max(1, mine // world.local_world_size)


def device_for(wanted: str, local_rank: int = 0) -> torch.device:
    """auto, cpu or cuda -> this rank's device. Raises ValueError for a GPU that is not there."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "runtime.device: 'cuda' was asked for but this machine has no GPU; allowed: auto, cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} here); start fewer processes"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def open_world(device: str = "auto", timeout_s: float = 1800.0) -> World:
    """Join the world that RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Without RANK this process is alone and nothing is opened. nccl on GPUs, gloo on CPUs.
    """
    global _current
    env = os.environ
    rank, world_size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local_rank, local_size = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    place = device_for(device, local_rank)
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout_s)
        store = (
            _store_on_this_machine(rank, world_size, limit)
            if env.get("MASTER_ADDR") == LOOPBACK
            else None
        )
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=limit
        )
    _current = World(rank, world_size, local_rank, local_size, place)
    return _current


def _store_on_this_machine(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The rendezvous of a run on one machine, which nobody outside can reach: torch's own would listen on every address.
    gloo's connections stay on the loopback interface too."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    port = int(os.environ["MASTER_PORT"])
    if rank > 0:
        return dist.TCPStore(LOOPBACK, port, world_size, False, timeout)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    listener.listen(4096)
    return dist.TCPStore(
        LOOPBACK, port, world_size, True, timeout, master_listen_fd=listener.detach()
    )


def close_world() -> None:
    """Leave the world. Safe to call twice."""
    global _current
    if dist.is_initialized():
        dist.destroy_process_group()
    _current = World()


def wrap(module: torch.nn.Module) -> torch.nn.Module:
    """DDP around a method; the module itself when alone or when nothing is trained.

    Buffers are not broadcast: what a method remembers is the same on all ranks by construction (methods/base.py), and
    broadcasting MoCo's queue at every step costs 33 MB for nothing.
    """
    if _current.world_size == 1 or not any(p.requires_grad for p in module.parameters()):
        return module
    return torch.nn.parallel.DistributedDataParallel(
        module, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
