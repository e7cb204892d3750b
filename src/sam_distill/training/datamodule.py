"""Training and validation loaders for a data source."""

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from sam_distill.data.base import DataSource, collate
from sam_distill.errors import UserError
from sam_distill.runs.hardware import Hardware
from sam_distill.types import Sample


class DistillationData(pl.LightningDataModule):
    """Data module: an endless training stream, measured in steps, and a small validation set, split without padding."""

    def __init__(self, source: DataSource, batch_size: int, seed: int, hardware: Hardware) -> None:
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.hardware = hardware

    def train_dataloader(self) -> DataLoader[Sample]:
        assert self.trainer is not None
        steps_done = self.trainer.global_step * self.trainer.accumulate_grad_batches
        stream = self.source.train_stream(
            start=steps_done * self.batch_size,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            batch_size=self.batch_size,
        )
        options = {"batch_size": self.batch_size, "persistent_workers": self.hardware.num_workers > 0}
        return self.hardware.loader(stream, collate_fn=collate, **options)

    def val_dataloader(self) -> DataLoader[Sample]:
        assert self.trainer is not None
        samples = self.source.val_samples()
        if not samples:
            raise UserError("not one of the validation images can be read")
        rank_samples = samples[self.trainer.global_rank :: self.trainer.world_size]
        return self.hardware.loader(rank_samples, batch_size=self.batch_size, collate_fn=collate, num_workers=0)
