"""Training steps of preset `paper`: with cached features against the encoder in the loop, with DP against without."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from site_client.privacy.mechanism import assign_gradient, private_gradient
from site_client.privacy.sampling import CryptoSource
from sspformer.data.cache import FeatureCache
from sspformer.data.cohort import Cohort, open_cohort
from sspformer.finetune import select_trainable, slice_batch
from sspformer.model.assembly import CHANNELS, Head, architecture, build_encoder
from sspformer.model.encoder import Encoder
from sspformer.tasks.denoise import Denoise
from tests.bench.measure import Ratio, interleave
from tests.bench.phantoms import make_dataset

PATIENTS = 4
SLICES_EACH = 2  # the batch of every step here: 4 patients x 2 slices
CPU = torch.device("cpu")


class Bench:
    """Model, cached cohort and the steps on them."""

    def __init__(self, folder: Path, preset: str) -> None:
        torch.manual_seed(0)
        arch = architecture(preset)
        self.encoder: Encoder = build_encoder(arch).eval()
        self.head = Head(arch).train()
        self.task = Denoise(0.10)
        cache = FeatureCache(folder / "cache", self.encoder, "sha256:" + "0" * 64, self.task, arch.size_px, SLICES_EACH)
        self.cohort: Cohort = open_cohort(make_dataset(folder / "bids", 2 * PATIENTS), ("T1w",), cache)
        self.patients = self.cohort.train[:PATIENTS]
        self.source = CryptoSource()
        self.use("head")

    def use(self, part: str) -> None:
        """Train this part of the head."""
        self.parameters = select_trainable(self.head, part)
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-4)

    def picks(self, patients: list[str]) -> list[tuple[str, int]]:
        return [(patient, number) for patient in patients for number in range(SLICES_EACH)]

    def loss(self, patients: list[str], *, encode: bool = False) -> torch.Tensor:
        features, base, target, inside = slice_batch(self.cohort, self.picks(patients), CPU)
        if encode:
            image = torch.zeros(len(base), len(CHANNELS), *base.shape[-2:])
            image[:, :1] = base
            with torch.inference_mode():
                encoded = self.encoder(image)
            features = encoded.clone()
        return self.task.loss(self.head(features, base), target, inside)

    def plain_step(self, *, encode: bool = False) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.patients, encode=encode).backward()
        self.optimizer.step()

    def private_step(self) -> None:
        gradient = private_gradient(
            self.parameters,
            self.patients,
            lambda patient: self.loss([patient]),
            clipping_norm=0.1,
            noise_multiplier=1.31,
            expected_patients=float(PATIENTS),
            source=self.source,
        )
        assign_gradient(self.parameters, gradient)
        self.optimizer.step()


def step_ratios(repetitions: int, threads: int, preset: str = "paper") -> list[Ratio]:
    """Both comparisons of steps; every step draws the same slices."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), preset)
        batch = f"{PATIENTS} patients x {SLICES_EACH} slices, {threads} threads"
        in_loop, cached = interleave(lambda: bench.plain_step(encode=True), bench.plain_step, repetitions)
        ratios = [Ratio("encoder in the loop / cached features", in_loop, cached, 4.0, "at least", batch)]
        for part in ("head", "tail"):
            bench.use(part)
            private, plain = interleave(bench.private_step, bench.plain_step, repetitions)
            count = sum(p.numel() for p in bench.parameters)
            note = f"{batch}, {count / 1e6:.2f} M trained"
            ratios.append(Ratio(f"DP step / plain step ({part})", private, plain, 1.15, "at most", note))
    return ratios
