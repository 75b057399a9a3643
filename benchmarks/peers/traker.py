"""TRAK (traker): 512 random projections on the CPU, pair by pair."""

from __future__ import annotations

import logging
import tempfile

import torch
from trak import TRAKer
from trak.projectors import BasicProjector, ProjectionType

from peers.workload import Run, Workload

DIMENSIONS = 512


def trak(work: Workload) -> Run:
    size = sum(value.numel() for value in work.model.parameters())

    def run() -> torch.Tensor:
        # one block: the matrix is drawn once, where the default of 100 columns a block draws it anew for every batch
        projector = BasicProjector(size, DIMENSIONS, 0, ProjectionType.normal, "cpu", block_size=DIMENSIONS)
        traker = TRAKer(
            work.model, "image_classification", len(work.train[1]), save_dir=tempfile.mkdtemp(dir=work.scratch), device="cpu",
            projector=projector, proj_dim=None, use_half_precision=False, logging_level=logging.ERROR,
        )  # fmt: skip
        traker.load_checkpoint(work.model.state_dict(), model_id=0)
        for batch in work.batches(work.train):
            traker.featurize(batch, num_samples=len(batch[1]))
        traker.finalize_features()  # this frees the matrix, which only the path of several blocks draws again
        projector.generate_sketch_matrix(projector.generator_states[0])
        traker.start_scoring_checkpoint("held-out", work.model.state_dict(), 0, num_targets=len(work.valid[1]))
        for batch in work.batches(work.valid):
            traker.score(batch, num_samples=len(batch[1]))
        return -torch.from_numpy(traker.finalize_scores("held-out").copy())

    return run
