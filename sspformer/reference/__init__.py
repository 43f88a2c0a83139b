"""The packaged reference encoder and warm denoising head; see MODEL_CARD.md beside this file."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
ENCODER = FOLDER / "encoder.safetensors"
HEAD = FOLDER / "head-denoise.safetensors"
