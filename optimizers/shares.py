"""EMA weights and moments divided among processes, each of which updates a share of the weights.

This is stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054). A tensor that another process
has is represented here by one of its shape and dtype on the meta device, so that states keep their
form.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distributed
from storage.tensors import map_tensors


class Shares:
    """Division of the parameters among processes, each of which updates about as many numbers.

    Attributes:
        owners: rank of the process that updates each parameter; the same in every process.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        sizes, self.owners = [0] * distributed.world(), {}
        for parameter in sorted(parameters, key=torch.numel, reverse=True):
            owner = sizes.index(min(sizes))
            self.owners[parameter] = owner
            sizes[owner] += parameter.numel()

    def is_own(self, parameter: nn.Parameter) -> bool:
        """Whether this process updates `parameter`."""
        return self.owners[parameter] == distributed.rank()

    def keep_own(self, optimizer: torch.optim.Optimizer) -> None:
        """Remove the parameters of other processes, and their moments, from `optimizer`.

        Raises ValueError where the optimiser makes its moments only in the first step.
        """
        self.numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p not in optimizer.state for p in self.parameters):
            raise ValueError(
                "training.share_state needs an optimiser whose moments exist from the start: "
                "optim.optimizer='Adam' or 'Muon'"
            )
        self.elsewhere = {
            p: map_tensors(lambda moment: moment.to("meta"), optimizer.state.pop(p))
            for p in self.parameters
            if not self.is_own(p)
        }
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if self.is_own(p)]

    def state_dict(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The `state_dict` of an optimiser of all parameters, a share of which `optimizer` has."""
        groups = zip(optimizer.state_dict()["param_groups"], self.numbers, strict=True)
        moments = optimizer.state | self.elsewhere
        return {
            "state": {number: moments[p] for number, p in enumerate(self.parameters)},
            "param_groups": [group | {"params": numbers} for group, numbers in groups],
        }

    def load(self, optimizer: torch.optim.Optimizer, moments: dict[int, dict]) -> None:
        """Copy this process's share of the `moments` of all parameters into `optimizer`."""
        for number, parameter in enumerate(self.parameters):
            if self.is_own(parameter):
                for name, value in moments[number].items():
                    optimizer.state[parameter][name].copy_(value)

    def spread(self) -> None:
        """Send the parameters from the processes that have updated them to all others."""
        sent = [dist.broadcast(p.detach(), r, async_op=True) for p, r in self.owners.items()]
        for each in sent:
            each.wait()


def completed(state: Any, everywhere: bool = False) -> Any:
    """`state` with tensors in the host's memory in place of those that other processes have.

    Every process has to call it. Only the main one gets these tensors, unless `everywhere`.
    """
    tensors: list[Tensor] = []
    map_tensors(tensors.append, state)
    here = torch.tensor([[not tensor.is_meta for tensor in tensors]])
    of_ranks = distributed.gather(here)
    owners = iter(of_ranks.int().argmax(0).tolist())
    are_everywhere = iter(of_ranks.all(0).tolist())

    def complete(tensor: Tensor) -> Tensor:
        owner = next(owners)
        if next(are_everywhere):
            return tensor
        if owner == distributed.rank():
            content = tensor.detach().cpu().contiguous()
        else:
            content = torch.empty(tensor.shape, dtype=tensor.dtype)
        if everywhere:
            dist.broadcast(content, owner)
        elif owner and distributed.rank() == owner:
            dist.send(content, 0)
        elif owner and distributed.is_main():
            dist.recv(content, owner)
        return content if everywhere or distributed.is_main() else tensor

    return map_tensors(complete, state)
