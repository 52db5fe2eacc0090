"""Several processes, of torchrun or another launcher, that train one network as one process does.

Every function may be called in a process that runs alone too, where it does nothing.
"""

import contextlib
import datetime
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

# Longest wait of a rank for the others: rank 0 may measure the features of millions of images. For
# a rank that died there is no wait: torchrun stops the rest.
PATIENCE = datetime.timedelta(days=30)
START = datetime.timedelta(minutes=10)  # longest wait for the store of torchrun, or of rank 0
GRACE = 300  # seconds that a rank has to save and end, once torchrun is no more
POLL = 0.01  # seconds between looks into the store

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by a launcher

# Variables in which other programs tell each task that they start how many there are. SLURM_NTASKS
# is also seen by what an allocation runs beside its tasks, which have a SLURM_PROCID.
TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
HOW_TO_START = (
    "start one torchrun on each host, or let your launcher set RANK, WORLD_SIZE, LOCAL_RANK, "
    "MASTER_ADDR and MASTER_PORT for each process (docs/scaling.md); for one process alone set "
    "WORLD_SIZE=1"
)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within the `with` block the processes of a launch are one group.

    It speaks NCCL for CUDA tensors and gloo for those of the CPU. The processes leave it together;
    where one ends by an error, torchrun stops the others. Raises as `check_launch`.
    """
    check_launch(os.environ)
    if world() == 1:
        yield
        return
    if by_torchrun():
        # The parent is noted before the store answers, which shows that torchrun was alive then.
        threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    store = _store()
    store = dist.PrefixStore(_new_token(store), store)
    dist.init_process_group(store=store, rank=rank(), world_size=world(), timeout=PATIENCE)
    try:
        yield
        barrier()
    finally:
        dist.destroy_process_group()


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise ValueError, which says how to start, unless the variables of a launch make sense.

    Without any the process is alone. So would be each of several tasks of srun or mpirun, of which
    every one would write the same run.
    """
    values = {name: environment[name] for name in LAUNCH if environment.get(name)}
    if not values.keys() & {"RANK", "WORLD_SIZE"}:
        for name in TASKS:
            number = environment.get(name, "")
            is_task = name != "SLURM_NTASKS" or "SLURM_PROCID" in environment
            if is_task and number.isdecimal() and int(number) > 1:
                raise ValueError(
                    f"{name}={number}, but RANK and WORLD_SIZE are not set, so that each of "
                    f"{number} tasks would believe it is alone: {HOW_TO_START}"
                )
        return
    if values.get("WORLD_SIZE") == "1" and values.get("RANK", "0") == "0":
        return
    words = ", ".join(f"{name}={value}" for name, value in values.items())
    if missing := [name for name in LAUNCH if name not in values]:
        raise ValueError(f"{words} without {', '.join(missing)}: {HOW_TO_START}")
    numbers = [values[name] for name in LAUNCH if name != "MASTER_ADDR"]
    if all(map(str.isdecimal, numbers)):
        rank, world, local_rank, port = map(int, numbers)
        if max(rank, local_rank) < world and 0 < port < 2**16:
            return
    raise ValueError(f"{words} contradict each other: {HOW_TO_START}")


def by_torchrun() -> bool:
    """True if torchrun started this process: it stops the others where one ends."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _store() -> dist.Store:
    """Store through which processes exchange addresses; ConnectionError where nobody answers."""
    try:
        store, *_ = next(rendezvous("env://", timeout=START))
    except RuntimeError as error:
        server = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") else "rank 0"
        raise ConnectionError(
            f"no answer from {server} at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}; "
            "it has ended, or another machine cannot be reached"
        ) from error
    store.set_timeout(PATIENCE)
    return store


def _end_with(parent: int) -> None:
    """End this process once `parent`, torchrun, is no more: nobody else would.

    SIGTERM lets it save. A process that waits for another in a collective never comes to handle it,
    so SIGKILL follows `GRACE` seconds later.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _new_token(store: dist.Store) -> str:
    """A random word of this start of the job, which rank 0 draws and the others learn from it.

    torchrun keeps one store over its restarts, in which processes find the addresses of dead ones
    (github.com/pytorch/pytorch/issues/135712), so every start needs a prefix of its own there. An
    answer counts where it quotes the word that the asking process has just drawn.
    """
    word = uuid.uuid4().hex
    if rank():
        store.set(f"ask/{rank()}", word)
        while not (answer := store.get(f"answer/{rank()}").decode()).startswith(word):
            time.sleep(POLL)
        token = answer.removeprefix(word)
        store.set(f"thanks/{rank()}", token)
        return token
    for r in range(1, world()):
        thanks = f"thanks/{r}"
        while not (store.check([thanks]) and store.get(thanks).decode() == word):
            store.set(f"answer/{r}", store.get(f"ask/{r}").decode() + word)
            time.sleep(POLL)
    return word


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK") or 0)


def world() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """True in the process that writes and reports."""
    return rank() == 0


def local_device(device: torch.device) -> torch.device:
    """`device`, but a GPU of its own for each of several processes where it is a GPU."""
    if device.type != "cuda" or world() == 1:
        return device
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # where NCCL looks
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
