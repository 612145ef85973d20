"""Learners in processes of their own, which call the functions of tests with their `Reduce`."""

from __future__ import annotations

import multiprocessing
import pickle
from typing import Any

import torch

from learners.core.together import find_store, join, open_store

ADDRESS = "127.0.0.1"
LONGEST_WAIT = 60.0


def serve(pipe: Any, rank: int, size: int, timeout_s: float, kind: str) -> None:
    """What each process does: joins the others, then answers calls until it is ended."""
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    if rank == 0:
        store = open_store(ADDRESS, LONGEST_WAIT)
        pipe.send(store.port)
    else:
        store = find_store(ADDRESS, pipe.recv(), LONGEST_WAIT)
    reduce = join(store, rank, size, torch.device(kind), timeout_s)
    while True:
        function, arguments = pipe.recv()
        try:
            answer = function(reduce, *arguments)
        except Exception as error:
            answer = error
        pipe.send_bytes(pickle.dumps(answer))  # without the memory that torch would share


class Learners:
    """`size` of them on devices of one kind, until `close`."""

    def __init__(self, size: int, timeout_s: float = LONGEST_WAIT, kind: str = "cpu") -> None:
        spawn = multiprocessing.get_context("spawn")
        self.size = size
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            arguments = (theirs, rank, size, timeout_s, kind)
            process = spawn.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        assert self.pipes[0].poll(LONGEST_WAIT), "the first learner opened no store"
        port = self.pipes[0].recv()
        for pipe in self.pipes[1:]:
            pipe.send(port)

    def start(self, rank: int, function, *arguments) -> None:
        """Calls a function of a module as `function(reduce, *arguments)` on one of them."""
        self.pipes[rank].send((function, arguments))

    def finish(self, rank: int) -> Any:
        """What it returned; raises what it raised."""
        assert self.pipes[rank].poll(LONGEST_WAIT), f"learner {rank} does not answer"
        answer = pickle.loads(self.pipes[rank].recv_bytes())
        if isinstance(answer, Exception):
            raise answer
        return answer

    def run(self, function, *arguments) -> list[Any]:
        """The answers of all, in their order."""
        for rank in range(self.size):
            self.start(rank, function, *arguments)
        return [self.finish(rank) for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join(LONGEST_WAIT)
