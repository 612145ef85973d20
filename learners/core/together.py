"""Several learners, each in a process of its own, over torch.distributed.

Gloo carries tensors between processors, NCCL between graphics cards. What is exchanged travels as
bytes with its structure in front, so that it arrives exactly as it was, whatever its types are and
however unequal the learners' shares.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from learners.core.blocks import group_bounds
from learners.core.errors import LearnersParted
from learners.core.reduce import Block, Part, sum_in_order


class Together:
    """One of several learners: a rank of the process group that `join` made. See `Reduce`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def own(self, blocks: Sequence[Block]) -> Sequence[Block]:
        """Block b belongs to learner ⌊b · learners / blocks⌋."""
        return blocks[slice(*group_bounds(len(blocks), self.size)[self.rank])]

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        """Adds the parts of all learners from first to last, on every learner.

        Raises:
            LearnersParted: a learner ended, or did not come in time.
        """
        return sum_in_order(self.gather(parts))

    def gather(self, parts: Sequence[Part]) -> list[Part]:
        """The parts of all learners, on this one's device.

        Raises:
            LearnersParted: a learner ended, or did not come in time.
        """
        header, body = packed(parts, self.device)
        sizes = self.exchanged(torch.tensor([len(header), len(body)], device=self.device))
        lengths = [size.tolist() for size in sizes]
        longest = max(header_size + body_size for header_size, body_size in lengths)
        sent = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        sent[: len(header)] = header.to(self.device)
        sent[len(header) : len(header) + len(body)] = body
        found: list[Part] = []
        for (header_size, body_size), message in zip(lengths, self.exchanged(sent), strict=True):
            rest = longest - header_size - body_size
            structure, content, _ = torch.split(message, [header_size, body_size, rest])
            found += unpacked(structure, content)
        return found

    def exchanged(self, own: Tensor) -> list[Tensor]:
        """The tensors of all learners, all of one shape."""
        received = [torch.empty_like(own) for _ in range(self.size)]
        try:
            dist.all_gather(received, own)
        except RuntimeError as error:
            raise LearnersParted(
                f"learner {self.rank + 1} of {self.size} lost another one: {error}"
            ) from error
        return received


def open_store(address: str, timeout_s: float) -> TCPStore:
    """The store at which learners meet, served by this process on a free port of `address`."""
    server = socket.create_server((address, 0))
    port = server.getsockname()[1]
    return TCPStore(
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )


def find_store(address: str, port: int, timeout_s: float) -> TCPStore:
    """The store that another process serves.

    Raises:
        LearnersParted: there is none within `timeout_s`.
    """
    limit = timedelta(seconds=timeout_s)
    try:
        return TCPStore(address, port, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        raise LearnersParted(f"no learner answers at {address}:{port}: {error}") from error


def join(store: Store, rank: int, size: int, device: torch.device, timeout_s: float) -> Together:
    """Makes this process one of `size` learners; returns once all of them are there.

    Args:
        store: the same for all.
        rank: of this one; blocks are shared out in the order of ranks.
        size: number of learners.
        device: where this one computes; all on processors, or each on a card of its own.
        timeout_s: seconds after which whoever waits for another one gives up, here and later.

    Raises:
        LearnersParted: not all of them came.
    """
    cuda = device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=torch.device("cuda", torch.cuda.current_device()) if cuda else None,
        )
    except RuntimeError as error:
        raise LearnersParted(
            f"learner {rank + 1} of {size} did not find the others: {error}"
        ) from error
    return Together(device)


# --- Parts as bytes ---


def packed(parts: Sequence[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """The structure of some parts, and their tensors one after the other, both as bytes."""
    tensors: list[Tensor] = []

    def structure(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: structure(entry) for name, entry in part.items()}
        tensors.append(part.detach().to(device).contiguous().view(-1).view(torch.uint8))
        return [str(part.dtype).removeprefix("torch."), list(part.shape)]

    described = json.dumps([structure(part) for part in parts])
    header = torch.frombuffer(bytearray(described, "utf-8"), dtype=torch.uint8)
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    return header, torch.cat([empty, *tensors])


def unpacked(header: Tensor, body: Tensor) -> list[Any]:
    """The inverse of `packed`."""
    described = json.loads(header.cpu().numpy().tobytes())
    pieces = iter(torch.split(body, [num_bytes(leaf) for leaf in leaves_of(described)]))

    def part(structure: Any) -> Any:
        if isinstance(structure, dict):
            return {name: part(entry) for name, entry in structure.items()}
        name, shape = structure
        # A copy: it begins where its type may, and what it came in with can go.
        return next(pieces).clone().view(getattr(torch, name)).view(shape)

    return [part(structure) for structure in described]


def leaves_of(described: Sequence[Any]) -> Iterator[Any]:
    """[type, shape] of every tensor of some structures, in order."""
    for structure in described:
        if isinstance(structure, dict):
            yield from leaves_of(list(structure.values()))
        else:
            yield structure


def num_bytes(leaf: Any) -> int:
    """Of a tensor of this type and shape."""
    name, shape = leaf
    return int(getattr(torch, name).itemsize * prod(shape))
