"""What an objective is: a module that owns its parameters and turns a batch and its encodings into a loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mm.models.model import Model
    from mm.types import Batch, Encoded, Loss


class Objective(nn.Module):
    """One term of the training loss; `weight` is applied by `TrainStep`."""

    weight: float
    reads: tuple[str, ...] | None = None  # modalities whose tokens it takes, not only the pooled vectors; None: all
    pairwise: bool = False  # over pairs of samples: a micro-batch alone would not do
    group: ProcessGroup | None = None  # the processes whose rows make up the batch; set by mm.distributed

    def forward(self, model: Model, batch: Batch, encoded: dict[str, Encoded]) -> Loss:
        raise NotImplementedError

    def changed(self, model: Model) -> None:
        """Called when the model got other weights or parts, before the first step."""

    def after_step(self, model: Model) -> None:
        """Called once after each optimizer step."""
