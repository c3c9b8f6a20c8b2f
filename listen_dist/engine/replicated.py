"""The replicated part: fp32 trainables, the same bits on every rank."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from listen_dist import dist
from listen_dist.errors import ListenError


class DriftError(ListenError):
    """Ranks hold different trainables; the run must not go on."""


class ReplicatedTrainables:
    """One flat gradient buffer for all learned parameters, reduced once a step.

    Every `p.grad` is a view into `grads`, so that accumulation, the one all-reduce and
    clipping need no copy. Behind the gradients ride along the loss, how many ranks were asked
    to stop, and `observed` sums for running statistics among the module's buffers.
    """

    def __init__(self, module: nn.Module, observed: int = 0) -> None:
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if any(torch.finfo(p.dtype).bits < 32 for p in self.parameters):
            raise ValueError("trainables must be float32 (or float64)")
        size = sum(p.numel() for p in self.parameters)
        self._buffer = torch.zeros(size + 2 + observed, device=self.parameters[0].device)
        self.grads, self._riders = self._buffer[:size], self._buffer[size:]
        self.zero_grads()

    def zero_grads(self) -> None:
        """Zero the buffer and point every parameter's gradient into it (again)."""
        self._buffer.zero_()
        offset = 0
        for p in self.parameters:
            p.grad = self.grads[offset : offset + p.numel()].view_as(p)
            offset += p.numel()

    def reduce(self, loss: torch.Tensor, stop: bool, observed: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum the gradients over ranks: one flat fp32 all-reduce, once per optimizer step.

        Args:
            loss: this rank's share of the loss, a scalar.
            stop: this rank was asked to stop.
            observed: this rank's share of the sums, [observed].

        Returns:
            the loss of the global batch and the number of ranks that were asked to stop, scalars; the sums of all.
        """
        self._riders[0], self._riders[1] = loss, float(stop)
        if observed is not None:
            self._riders[2:] = observed
        dist.sum_(self._buffer)
        return self._riders[0], self._riders[1], self._riders[2:]

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients to a global norm of at most `max_norm` (0: leave them).

        Returns:
            the norm before clipping, a scalar tensor; the same on every rank after `reduce`.
        """
        norm = torch.linalg.vector_norm(self.grads)
        if max_norm > 0:
            self.grads.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def checksum(self) -> str:
        """sha256 over the bytes of all learned parameters and of the buffers beside them."""
        digest = hashlib.sha256()
        for tensor in (*self.parameters, *self.module.buffers()):
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def prove_equal(self, step: int) -> None:
        """Compare the checksums of all ranks.

        Raises:
            DriftError: naming the step and the ranks that differ from rank 0.
        """
        sums = dist.gather_objects(self.checksum())
        wrong = [rank for rank, value in enumerate(sums) if value != sums[0]]
        if wrong:
            raise DriftError(f"step {step}: the learned parameters of ranks {wrong} differ from rank 0's; "
                             "go on from the last checkpoint, and look for faulty memory on those ranks")
