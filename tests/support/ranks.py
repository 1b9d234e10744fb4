"""How does a test run a function on several processes? `run_ranks` forks them from the test's own process.

Forking 8 takes a fraction of a second where spawning 8 that import torch takes 8 s; the function and its
arguments need not be picklable (closures are fine), only what it returns.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # backward(gradient) imports it: once here, not in every fork

Result = TypeVar("Result")

TIMEOUT_SECONDS = 120.0
GRACE_SECONDS = 2.0  # what the other ranks get, after one has failed, to say what they saw


class RankError(AssertionError):
    """At least one rank raised, crashed, or did not end in time."""


def run_ranks(world: int, fn: Callable[..., Result], *args: Any, timeout_seconds: float = TIMEOUT_SECONDS) -> list[Result]:
    """Call `fn(rank, *args)` on `world` forked processes joined in a gloo group; return the results by rank.

    Each process runs one thread, and all pass a barrier before the group is destroyed. Tensors come back as
    copies. The traceback of the rank that failed first is the message of the `RankError` raised here; on a
    timeout every process is killed, after it has written its stacks to standard error.
    """
    fork = multiprocessing.get_context("fork")
    gc.collect()  # a process group of an earlier test would wait for its threads in a fork, which has none
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        readers: dict[Connection, int] = {}
        processes = []
        try:
            for rank in range(world):
                reader, writer = fork.Pipe(duplex=False)
                process = fork.Process(
                    target=_run_rank,
                    args=(rank, world, folder, writer, timeout_seconds, fn, args),
                    daemon=True,
                )
                process.start()
                writer.close()
                readers[reader] = rank
                processes.append(process)
            results, failures = _collect(readers, timeout_seconds)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
        for rank in sorted(set(range(world)) - set(results) - {failed for _, failed, _ in failures}):
            died = processes[rank].exitcode
            failures.append((time.monotonic(), rank, f"no result (exit code {died}; -9: killed here)"))
        if failures:
            (_, rank, message), *others = sorted(failures)
            also = [f"then rank {other}: {text.strip().splitlines()[-1]}" for _, other, text in others]
            raise RankError("\n".join([f"rank {rank} of {world}: {message}", *also]))
    return [results[rank] for rank in range(world)]


def _collect(readers: dict[Connection, int], timeout_seconds: float) -> tuple[dict[int, Any], list[tuple[float, int, str]]]:
    """Read one message per rank until all spoke or the time is up: results, (time, rank, text) failures."""
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    waiting = dict(readers)
    deadline = time.monotonic() + timeout_seconds
    while waiting and (left := deadline - time.monotonic()) > 0:
        for reader in wait(list(waiting), timeout=left):
            assert isinstance(reader, Connection)
            rank = waiting.pop(reader)
            try:
                moment, failed, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                moment, failed, value = 0.0, True, "crashed without a traceback\n"  # at 0: others saw its end
            if failed:
                failures.append((moment, rank, value))
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            else:
                results[rank] = value
    if waiting and not failures:
        silent = ", ".join(str(rank) for rank in sorted(waiting.values()))
        failures.append((0.0, min(waiting.values()), f"no result after {timeout_seconds:g} s; silent ranks: {silent}\n"))
    return results, failures


def _run_rank(
    rank: int,
    world: int,
    folder: str,
    writer: Connection,
    timeout_seconds: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The whole life of one forked process."""
    faulthandler.dump_traceback_later(0.95 * timeout_seconds, file=2)
    torch.set_num_threads(1)  # also keeps the child out of OpenMP's threads, which a fork does not copy
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    failed = False
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        payload = pickle.dumps((0.0, failed, fn(rank, *args)))
        dist.barrier()  # without it a rank that leaves early now and then aborts the others
    except BaseException:  # SystemExit and KeyboardInterrupt must reach the test, too
        failed = True
        payload = pickle.dumps((time.monotonic(), failed, traceback.format_exc()))
    writer.send_bytes(payload)
    writer.close()
    if failed:
        os._exit(1)  # the group is broken: destroying it could hang
    dist.destroy_process_group()
