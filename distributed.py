"""Training of one network by several processes, of any launcher, with the results of one process.

Every function may also be called in a process that runs alone, where it does nothing.
"""

import contextlib
import datetime
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from processes import launch
from processes.launch import Launch
from processes.watch import watched as watched_through

# Longest wait of a rank for the others: rank 0 may measure the features of millions of images. A
# rank that dies closes its connections, which ends the wait; for a rank that hangs see `watched`.
PATIENCE = datetime.timedelta(days=30)
START = datetime.timedelta(minutes=10)  # longest wait for the store of torchrun, or of rank 0
GRACE = 300  # seconds that a rank has to save and end, once its launcher has ended
POLL = 0.01  # seconds between looks into the store

_group_store: dist.Store | None = None  # of `joined`

# Words in errors of gloo and NCCL that mean that another process has ended.
LOST = r"closed by (remote )?peer|reset by peer|broken pipe|remote process exited|socket closed"


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes of a launch into one group within the `with` block.

    The group uses NCCL for CUDA tensors and gloo for CPU tensors. Its processes end together: when
    an error or a signal ends one of them, the others raise ConnectionError, even if their launcher
    does not stop them. Raises also what `launch.read` raises.
    """
    started = launch.read(os.environ)
    if started.world == 1:
        yield
        return
    if started.launcher in ("torchrun", "mpirun"):
        # The parent is noted before the store answers, which shows that torchrun was alive then.
        threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    store = _store(started)
    global _group_store
    place = {"rank": started.rank, "world_size": started.world}
    _group_store = dist.PrefixStore(_new_token(store, *place.values()), store)
    dist.init_process_group(store=_group_store, **place, timeout=PATIENCE)
    try:
        yield
        barrier()
    except RuntimeError as error:
        if re.search(LOST, str(error), re.IGNORECASE):
            raise ConnectionError(
                "another process of the job has ended; this one ends too"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def watched(hang_seconds: float) -> Iterator[None]:
    """End the job, with one line that names the process, if one hangs within the `with` block.

    The job ends after at most `hang_seconds` in which no process calls `processes.watch.did`; 0
    means no limit. The processes leave the block together: one that left alone would fall silent,
    and be taken for the one that hangs, while the main process writes its last checkpoint.
    """
    if world() == 1 or not hang_seconds:
        yield
        return
    with watched_through(_group_store.clone(), rank(), world(), hang_seconds):
        yield
        barrier()


def _store(started: Launch) -> dist.Store:
    """Store through which processes exchange addresses; ConnectionError where nobody answers."""
    try:
        if started.launcher == "torchrun":
            store, *_ = next(rendezvous("env://", timeout=START))
        else:
            store = dist.TCPStore(
                started.address, started.port, started.world, not started.rank, timeout=START
            )
    except RuntimeError as error:
        place = f"{started.address}:{started.port}"
        if started.rank == 0 and started.launcher != "torchrun":
            raise ConnectionError(
                f"rank 0 does not meet the others at {place}: {str(error).splitlines()[0]}; "
                "set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port"
            ) from error
        server = "torchrun" if started.launcher == "torchrun" else "rank 0"
        raise ConnectionError(
            f"no answer from {server} at {place}; it has ended, or its machine cannot be reached"
        ) from error
    store.set_timeout(PATIENCE)
    return store


def _end_with(parent: int) -> None:
    """End this process once `parent`, torchrun or mpirun, has ended: nothing else would.

    SIGTERM lets the process save. One that waits for another in a collective cannot handle it, so
    SIGKILL follows `GRACE` seconds later.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _new_token(store: dist.Store, rank: int, world: int) -> str:
    """A random word of this start of the job, which rank 0 draws and the others learn from it.

    torchrun keeps one store over its restarts, in which processes find the addresses of dead ones
    (github.com/pytorch/pytorch/issues/135712), so every start needs a prefix of its own there. An
    answer counts where it quotes the word that the asking process has just drawn.
    """
    word = uuid.uuid4().hex
    if rank:
        store.set(f"ask/{rank}", word)
        while not (answer := store.get(f"answer/{rank}").decode()).startswith(word):
            time.sleep(POLL)
        token = answer.removeprefix(word)
        store.set(f"thanks/{rank}", token)
        return token
    for r in range(1, world):
        thanks = f"thanks/{r}"
        while not (store.check([thanks]) and store.get(thanks).decode() == word):
            store.set(f"answer/{r}", store.get(f"ask/{r}").decode() + word)
            time.sleep(POLL)
    return word


def rank() -> int:
    """Number of this process in the group, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes of the group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the process that writes and reports."""
    return rank() == 0


def local_device(device: torch.device) -> torch.device:
    """`device`, but a GPU of its own for each of several processes where it is a GPU."""
    if device.type != "cuda" or world() == 1:
        return device
    # with srun --gpus-per-task each task sees only one GPU
    one_each = torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    torch.cuda.set_device(0 if one_each else launch.read(os.environ).local_rank)  # which NCCL uses
    return torch.device("cuda", torch.cuda.current_device())


def mean(x: Tensor) -> Tensor:
    """The mean of `x` over the processes."""
    if world() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world()


def any_of(flag: bool) -> bool:
    """True if `flag` is, in any of the processes; their hosts agree on it without a GPU."""
    if world() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def barrier() -> None:
    """Wait until all processes have reached this call."""
    any_of(False)


def gather(rows: Tensor) -> Tensor:
    """The `rows` (B, ...) of all processes in the order of their ranks, (world * B, ...)."""
    if world() == 1:
        return rows
    content = rows.contiguous().view(-1).view(torch.uint8)  # gloo has no whole numbers of 16 bits
    parts = [torch.empty_like(content) for _ in range(world())]
    dist.all_gather(parts, content)
    return torch.cat(parts).view(rows.dtype).view(world() * len(rows), *rows.shape[1:])


def from_main(text: Callable[[], str]) -> str:
    """The main process's result of `text()`, in every process."""
    if world() == 1:
        return text()
    content = torch.tensor(
        [*(text() if is_main() else "").encode(errors="surrogatepass")], dtype=torch.uint8
    )
    size = torch.tensor(len(content))
    dist.broadcast(size, 0)
    content = content if is_main() else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return bytes(content.tolist()).decode(errors="surrogatepass")


def check_same(name: str, words: str) -> None:
    """Raise ValueError unless `words`, which describe `name`, equal those of the main process."""
    if (main := from_main(lambda: words)) != words:
        raise ValueError(
            f"rank {rank()} has other {name} than rank 0: {words:.200}, not {main:.200}"
        )


def check_agreement(step: int, weights: Iterable[Tensor]) -> None:
    """Raise FloatingPointError, in every process, unless all have the same step and weights.

    The error names the first that differs from the main one. Weights are compared by the sums of
    their bits as whole numbers.
    """
    if world() == 1:
        return
    words = [w.detach().contiguous().flatten().view(torch.int32) for w in weights]
    sums = torch.stack([w.sum(dtype=torch.int64) for w in words])
    of_ranks = gather(torch.cat([sums.new_tensor([step]), sums])[None])
    same = (of_ranks == of_ranks[0]).all(1).tolist()
    if not all(same):
        raise FloatingPointError(
            f"rank {same.index(False)} has another step or other weights than rank 0 at step "
            f"{step}; start again from the last checkpoint"
        )


def averaging_gradients(network: nn.Module, some_unused: bool = False) -> nn.Module:
    """`network` whose backward leaves the mean of the processes' gradients in its parameters.

    The mean is taken while backward still runs. Weights are not made equal here: they are drawn
    from the same seed or loaded from the same file, and `check_agreement` finds where they differ.
    `some_unused` says that its output does not depend on all of its parameters.
    """
    if world() == 1:
        return network
    return DistributedDataParallel(
        network,
        forward_sync_buffers=False,  # they are constants
        init_sync=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=some_unused,
    )


def check_division(images: int, accumulate: int = 1) -> None:
    """Raise ValueError unless processes and micro-batches share the images of a step evenly."""
    shards = world() * accumulate
    if images % shards:
        raise ValueError(
            f"the {images} images of a step cannot be split evenly into {shards} shards "
            f"({world()} processes, training.accumulate={accumulate}); change "
            "training.batch_size or training.small_batch_size"
        )
