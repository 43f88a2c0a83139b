"""Masked pretraining of the encoder: hide patches, add k-space and receiver noise, rebuild the clean slice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sspformer.checkpoint import save_module, save_tensors
from sspformer.contract.errors import Code, Refused
from sspformer.data.bids import read_dataset
from sspformer.data.slices import cut_slices
from sspformer.data.volume import read_volume
from sspformer.model.assembly import CHANNELS, Architecture, build_encoder
from sspformer.pretrain.masking import hidden_patches, k_space_noise


@dataclass(frozen=True)
class Recipe:
    """Every number of a pretraining run. `noise_sigma` is the largest receiver noise, drawn uniformly per batch."""

    steps: int = 600
    batch_slices: int = 8
    learning_rate: float = 6e-4
    warm_up: float = 0.05
    weight_decay: float = 0.05
    noise_sigma: float = 0.12
    inverse_frequency: bool = True
    k_space_noise: bool = True
    seed: int = 0


class MaskedModel(nn.Module):
    """Encoder, mask token and a linear read-out of pixels; only the encoder is kept."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.encoder = build_encoder(arch)
        self.mask_token = nn.Parameter(torch.zeros(arch.width))
        self.read_out = nn.Linear(arch.width, self.encoder.embedding.patch**2)

    def forward(self, input_BCHW: Tensor, hidden_BN: Tensor, target_B1HW: Tensor) -> Tensor:
        """Encode, read out, compare: mean squared error, hidden patches at twice the weight of visible ones."""
        patches_BNp = self.read_out(self.encoder(input_BCHW, hidden_BN, self.mask_token))
        target_BNp = nn.functional.unfold(
            target_B1HW, self.encoder.embedding.patch, stride=self.encoder.embedding.patch
        )
        error_BN = (patches_BNp - target_BNp.transpose(1, 2)).square().mean(dim=2)
        weight_BN = 1.0 + hidden_BN.to(error_BN.dtype)
        return (weight_BN * error_BN).sum() / weight_BN.sum()


def pretrain(
    arch: Architecture,
    slices_SHW: np.ndarray,
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    save_every: int = 200,
) -> Path:
    """Pretrain an encoder; resumes from `folder` where an unfinished run of the same recipe left off.

    Args:
        arch: the encoder's architecture.
        slices_SHW: clean slices in [0, 1], uint8 or float.
        recipe: the run.
        folder: receives ``encoder.safetensors`` (float16) and ``resume.safetensors``.
        device: where to train.
        on_step: called with (steps done, loss).
        save_every: steps between resumable checkpoints.

    Returns:
        Path of the encoder.

    Raises:
        Refused: E-TENSORS where the loss is not finite, E-STATE where `folder` holds another recipe's run.
    """
    torch.manual_seed(recipe.seed)
    model = MaskedModel(arch).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.95)
    )
    data = hashlib.sha256(np.ascontiguousarray(slices_SHW).tobytes()).hexdigest()
    facts = json.dumps([asdict(recipe), asdict(arch), data], sort_keys=True)
    start = _resume(folder / "resume.safetensors", model, optimizer, facts)
    for step in range(start, recipe.steps):
        # Seeded per step, so that a resumed run sees the batches an unbroken one would have seen.
        input_BCHW, hidden_BN, target = _batch(slices_SHW, recipe, step, model.encoder.embedding.patch, device)
        warm = min(1.0, (step + 1) / max(1.0, recipe.warm_up * recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * 0.5 * (1 + np.cos(np.pi * step / recipe.steps))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_BCHW, hidden_BN, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not np.isfinite(value := loss.item()):
            raise Refused(Code.TENSORS, f"the loss is not finite at step {step + 1}.", "lower the learning rate.")
        on_step(step + 1, value)
        if (step + 1) % save_every == 0:
            _save(folder / "resume.safetensors", model, optimizer, step + 1, facts)
    path = folder / "encoder.safetensors"
    save_module(path, model.encoder, arch, "encoder", half=True)
    return path


def collect_slices(
    folders: Iterable[Path],
    contrasts: tuple[str, ...],
    size_px: int,
    max_slices: int,
    progress: Callable[[int], None] = lambda done: None,
    on_skip: Callable[[str], None] = lambda reason: None,
) -> np.ndarray:
    """Slices of every usable scan of some BIDS datasets as uint8 (S, H, W).

    Broken scans are skipped; `on_skip` is called with the reason of each, `progress` with the slices so far.

    Raises:
        Refused: E-DATA where nothing is usable.
    """
    stacks = []
    for folder in folders:
        for scans in read_dataset(folder, contrasts).subjects.values():
            for scan in scans:
                try:
                    stacks.append(cut_slices(read_volume(scan.path), size_px, max_slices).images)
                except Refused as refusal:
                    on_skip(refusal.what)
                    continue
                progress(sum(len(s) for s in stacks))
    if not any(len(stack) for stack in stacks):
        raise Refused(Code.DATA, "no usable slice to pretrain on.", "check the folders and contrasts.")
    return (np.concatenate(stacks) * 255).round().astype(np.uint8)


def _batch(
    slices_SHW: np.ndarray, recipe: Recipe, step: int, patch: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.Generator(np.random.PCG64([recipe.seed, step]))
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    picked = slices_SHW[rng.integers(len(slices_SHW), size=recipe.batch_slices)]
    clean = torch.from_numpy(picked.astype(np.float32) / (255 if slices_SHW.dtype == np.uint8 else 1)).to(device)
    for axis in (1, 2):
        flip = torch.from_numpy(rng.random(len(clean)) < 0.5)
        clean[flip] = clean[flip].flip(axis)
    clean = (clean * torch.from_numpy(rng.uniform(0.9, 1.1, (len(clean), 1, 1)).astype(np.float32)).to(device)).clamp(
        0, 1
    )
    noisy = k_space_noise(clean[:, None], generator)[:, 0] if recipe.k_space_noise else clean
    sigma = float(rng.uniform(0, recipe.noise_sigma))
    noise = torch.randn((2, *clean.shape), generator=generator).to(device) * sigma
    noisy = torch.hypot(noisy + noise[0], noise[1])
    # Which contrast a slice stands for is drawn at random: every channel learns every appearance.
    channels = torch.from_numpy(rng.integers(len(CHANNELS), size=len(clean)))
    input_BCHW = torch.zeros(len(clean), len(CHANNELS), *clean.shape[1:], device=device)
    input_BCHW[torch.arange(len(clean)), channels] = noisy
    hidden_BN = hidden_patches(input_BCHW, patch, generator, recipe.inverse_frequency)
    return input_BCHW, hidden_BN, clean[:, None]


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, facts: str) -> None:
    tensors = {f"model.{n}": p.detach().cpu() for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"{key}.{name}": state[key].detach().cpu() for key in ("exp_avg", "exp_avg_sq")}
    save_tensors(path, tensors, {"step": str(step), "facts": facts})


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, facts: str) -> int:
    if not path.exists():
        return 0
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata["facts"] != facts:
                raise Refused(
                    Code.STATE,
                    f"{path} belongs to another recipe or other data.",
                    "choose another folder, or remove it.",
                )
            step = int(metadata["step"])
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(file.get_tensor(f"model.{name}"))
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(step)),
                        "exp_avg": file.get_tensor(f"exp_avg.{name}").to(parameter.device),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}").to(parameter.device),
                    }
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise Refused(Code.STATE, f"{path} is damaged ({type(error).__name__}).", "remove it to start anew.") from error
    return step
