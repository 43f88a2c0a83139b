"""A hospital on its own: train a head, compare heads, denoise a scan. No coordinator, no network."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from site_client.folder import SiteFolder
from site_client.workspace import Artifacts, Workspace, open_workspace
from sspformer.checkpoint import file_digest, load_encoder, load_head, save_module
from sspformer.contract.durable import write_secret
from sspformer.contract.errors import Code, Refused
from sspformer.contract.manifest import verify_manifest
from sspformer.contract.plan import LocalTraining, RunPlan
from sspformer.contract.settings import load_settings
from sspformer.evaluate import METRICS, evaluate
from sspformer.finetune import train
from sspformer.predict import advice, check_target, predict, save_prediction
from sspformer.reference import ENCODER, HEAD

DEFAULT_STEPS = 120
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


def finetune_alone(
    root: Path, plan_path: Path | None, contrasts: Sequence[str], steps: int | None, progress: Progress
) -> list[str]:
    """Train a head on this site's patients alone, with as many steps as a whole run would take.

    Args:
        root: the site's folder.
        plan_path: take contrasts, noise and training from a run's plan, for a fair comparison with it.
        contrasts: BIDS suffixes, where no plan is given.
        steps: optimizer steps; None means those of the plan's rounds together, or `DEFAULT_STEPS`.
        progress: called as work goes on.

    Returns:
        Lines for the operator.
    """
    files = SiteFolder.open(root)
    plan = load_settings(plan_path, RunPlan) if plan_path else None
    workspace = _workspace(files, plan, contrasts, progress)
    local = plan.local if plan else LocalTraining()
    total = steps or (local.steps * plan.rounds if plan else DEFAULT_STEPS)
    head = workspace.head_at({})
    train(
        head,
        workspace.cohort,
        workspace.task,
        steps=total,
        batch_slices=local.batch_slices,
        learning_rate=local.learning_rate,
        trainable=local.trainable,
        seed=int.from_bytes(hashlib.sha256(f"alone/{files.config.name}".encode()).digest()[:8], "big"),
        on_step=lambda done, loss: progress("training", done, total),
    )
    path = root / "heads" / "local.safetensors"
    save_module(path, head.cpu(), workspace.arch, "head", encoder_digest=workspace.encoder_digest, secret=True)
    lines = [f"{len(workspace.cohort.train)} patients, {total} steps: {path}"]
    if workspace.cohort.test:
        heads = {"warm": workspace.head_at({}), "local": head}
        scored = evaluate(workspace.cohort, workspace.task, heads, baselines=False)
        lines += [f"  PSNR inside the head, {len(workspace.cohort.test)} held-out patients: " + ", ".join(
            f"{name} {scored.mean(name, 'psnr'):.2f} dB" for name in scored.scores)]  # fmt: skip
    return lines + workspace.cohort.skipped_lines()


def evaluate_site(
    root: Path,
    heads: Mapping[str, Path],
    plan_path: Path | None,
    contrasts: Sequence[str],
    json_path: Path | None,
    pictures_path: Path | None,
    progress: Progress,
) -> list[str]:
    """Score the input, non-local means, the warm head and the given heads on the held-out patients.

    The files are for this site: they are written where the operator says, for the operator alone, and sent nowhere.
    """
    files = SiteFolder.open(root)
    plan = load_settings(plan_path, RunPlan) if plan_path else None
    workspace = _workspace(files, plan, contrasts, progress)
    loaded = {"warm": workspace.head_at({})} | {name: workspace.head_of(path) for name, path in heads.items()}
    progress("scoring", 0, 1)
    scored = evaluate(workspace.cohort, workspace.task, loaded)
    progress("scoring", 1, 1)
    methods = {name: {metric: scored.mean(name, metric) for metric in METRICS} for name in scored.scores}
    if json_path is not None:
        counts = {"patients_train": len(workspace.cohort.train), "patients_test": len(workspace.cohort.test)}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        write_secret(
            json_path, json.dumps(counts | {"methods": methods, "per_patient": scored.scores}, indent=1).encode()
        )
    if pictures_path is not None:
        pictures_path.parent.mkdir(parents=True, exist_ok=True)
        packed = io.BytesIO()
        np.savez_compressed(packed, **scored.pictures)  # type: ignore[arg-type]
        write_secret(pictures_path, packed.getvalue())
    table = [f"{name:<10} PSNR {m['psnr']:6.2f} dB  SSIM {m['ssim']:.3f}" for name, m in methods.items()]
    return [
        f"{len(workspace.cohort.test)} held-out patients, inside the head:",
        *table,
        *workspace.cohort.skipped_lines(),
    ]


def apply_head(
    root: Path, source: Path, target: Path, head_path: Path | None, contrast: str | None, progress: Progress
) -> list[str]:
    """Denoise one scan: with the last run's head, else the one that this site trained alone, else the warm one."""
    check_target(target)
    files = SiteFolder.open(root)
    torch.set_num_threads(files.config.threads)
    artifacts = _artifacts(files, None)
    trained = [root / "heads" / name for name in ("current.safetensors", "local.safetensors")]
    chosen = head_path or next((path for path in trained if path.exists()), artifacts.head)
    encoder, arch = load_encoder(artifacts.encoder, artifacts.encoder_digest)
    encoder_digest = file_digest(artifacts.encoder)
    head, _ = load_head(chosen, of=arch, encoder_digest=encoder_digest)
    result = predict(source, encoder, head.eval(), contrast, lambda done, total: progress("slices", done, total))
    facts = {"Encoder": encoder_digest, "Head": file_digest(chosen), "Task": "denoise"}
    save_prediction(result, source, target, facts)
    shape = "x".join(map(str, result.data.shape))
    return [f"{target}: {shape}, on the grid of {source.name}, with head {chosen}", *advice(result)]


def _workspace(files: SiteFolder, plan: RunPlan | None, contrasts: Sequence[str], progress: Progress) -> Workspace:
    asked = plan.contrasts if plan else tuple(contrasts) or ("T1w",)
    sigma = plan.noise_sigma if plan else 0.10
    return open_workspace(
        files, _artifacts(files, plan), asked, sigma, lambda done, total: progress("patients read", done, total)
    )


def _artifacts(files: SiteFolder, plan: RunPlan | None) -> Artifacts:
    """What the plan names; else what the coordinator published, where this site has fetched it; else the packaged pair.

    Raises:
        Refused: E-STATE where the plan's pair is not here: another pair would make every comparison wrong.
    """
    if plan is not None:
        encoder, head = (files.store / digest.replace(":", "-") for digest in (plan.encoder, plan.head))
        if not (encoder.exists() and head.exists()):
            packaged = {ENCODER: plan.encoder, HEAD: plan.head}
            if any(file_digest(path) != digest for path, digest in packaged.items()):
                raise Refused(
                    Code.STATE,
                    f"the encoder or head of plan {plan.run} is neither in {files.store} nor packaged.",
                    "run: site-client fetch SITE",
                )
            encoder, head = ENCODER, HEAD
        return Artifacts(encoder, head, plan.encoder, plan.head)
    if files.manifest_path.exists():
        manifest = verify_manifest(files.manifest_path.read_bytes(), files.coordinator_key())
        encoder, head = files.artifact_path(manifest.encoder), files.artifact_path(manifest.head)
        return Artifacts(encoder, head, manifest.encoder.digest, manifest.head.digest)
    if not ENCODER.exists():
        raise Refused(Code.STATE, "the packaged reference weights are missing.", "install the package again.")
    return Artifacts(ENCODER, HEAD)
