"""The researcher's command line: pretrain, fine-tune, evaluate and apply the model, on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sspformer.contract.console import command_app, run_app
from sspformer.contract.errors import Code, Refused

if TYPE_CHECKING:
    from sspformer.data.cohort import Cohort
    from sspformer.model.assembly import Architecture, Head

app = command_app(
    "The researcher: pretrains SSPFormer, fine-tunes a head on one BIDS dataset, evaluates it, applies it to scans.\n\n"
    "No network is used. Start with: sspformer finetune DATA --out head.safetensors"
)

Data = Annotated[Path, typer.Argument(metavar="DATA", help="A BIDS dataset.", show_default=False)]
EncoderFile = Annotated[Path | None, typer.Option("--encoder", help="Frozen encoder; the packaged one if not given.")]
HeadFile = Annotated[Path | None, typer.Option("--head", help="Head to start from; the packaged one if not given.")]
Contrasts = Annotated[list[str] | None, typer.Option("--contrast", help="BIDS suffix; repeat for more. Default T1w.")]
Cache = Annotated[Path, typer.Option(help="Feature cache; holds patient data.")]
Sigma = Annotated[float, typer.Option("--noise-sigma", min=0.001, max=0.99, help="Rician noise of the denoising task.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves the choice to torch.")]


@app.command()
def info(
    preset: Annotated[str, typer.Option(help="tiny, paper or base.")] = "paper",
    tail: Annotated[str, typer.Option(help="injected or paper.")] = "injected",
) -> None:
    """Count a preset's parameters."""
    from sspformer.describe import describe

    for line in describe(preset, tail):
        typer.echo(line)


@app.command()
def pretrain(
    data: Annotated[list[Path], typer.Argument(metavar="DATA...", help="BIDS datasets.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the encoder and the resumable state.")],
    preset: Annotated[str, typer.Option(help="tiny, paper or base.")] = "tiny",
    contrast: Contrasts = None,
    steps: Annotated[int, typer.Option(min=1)] = 600,
    batch: Annotated[int, typer.Option(min=1, help="Slices per step.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Pretrain an encoder on unlabelled MRI; run again to resume."""
    import torch

    from sspformer.model.assembly import architecture
    from sspformer.pretrain.loop import Recipe, collect_slices
    from sspformer.pretrain.loop import pretrain as run
    from sspformer.progress import shown

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise Refused(Code.CONFIG, f"--device {device} is not available here.", "give --device cpu.")
    arch = architecture(preset)
    with shown() as progress:
        skipped: list[str] = []
        slices = collect_slices(
            data,
            tuple(contrast or ("T1w", "T2w", "FLAIR")),
            arch.size_px,
            24,
            lambda done: progress("slices", done, 0),
            skipped.append,
        )
        path = run(arch, slices, Recipe(steps=steps, batch_slices=batch), out, torch.device(device),
                   lambda step, loss: progress(f"pretraining on {len(slices)} slices", step, steps))  # fmt: skip
    for reason in skipped[:5]:
        typer.echo(f"skipped: {reason}", err=True)
    if len(skipped) > 5:
        typer.echo(f"skipped {len(skipped) - 5} more scans", err=True)
    typer.echo(f"{path}")


@app.command()
def finetune(
    data: Data,
    out: Annotated[Path, typer.Option(help="Head to write.")],
    encoder: EncoderFile = None,
    head: HeadFile = None,
    contrast: Contrasts = None,
    noise_sigma: Sigma = 0.10,
    steps: Annotated[int, typer.Option(min=1)] = 120,
    batch: Annotated[int, typer.Option(min=1, help="Slices per step.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=1e-8, max=1)] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    cache: Cache = Path(".sspformer-cache"),
    threads: Threads = 0,
) -> None:
    """Fine-tune a head on one dataset; the encoder stays frozen.

    The file also says how large gradients were on DATA, for private training: publish it only where DATA may be public.
    """
    from sspformer.checkpoint import check_new, save_module
    from sspformer.finetune import gradient_rms, train
    from sspformer.progress import shown
    from sspformer.reference import HEAD
    from sspformer.tasks.denoise import Denoise

    check_new(out)
    with shown() as progress:
        start = {"start": head or HEAD}
        arch, loaded, cohort = _open(data, encoder, start, contrast, noise_sigma, cache, threads, progress)
        model = loaded["start"]
        train(model, cohort, Denoise(noise_sigma), steps=steps, batch_slices=batch, learning_rate=learning_rate,
              trainable="head", seed=seed, on_step=lambda done, loss: progress("training", done, steps))  # fmt: skip
        sizes = gradient_rms(model, cohort, Denoise(noise_sigma))
    digest = save_module(out, model, arch, "head", gradient_rms=sizes, encoder_digest=cohort.cache.encoder_digest)
    for line in cohort.skipped_lines():
        typer.echo(line, err=True)
    typer.echo(f"{out}: {len(cohort.train)} patients, {steps} steps, {digest}")


@app.command()
def evaluate(
    data: Data,
    head: Annotated[list[str] | None, typer.Option(help="A head to score, as name=path; repeat for more.")] = None,
    encoder: EncoderFile = None,
    contrast: Contrasts = None,
    noise_sigma: Sigma = 0.10,
    cache: Cache = Path(".sspformer-cache"),
    threads: Threads = 0,
) -> None:
    """Score heads, non-local means and the input on held-out patients."""
    from sspformer.evaluate import evaluate as score
    from sspformer.evaluate import named_paths
    from sspformer.progress import shown
    from sspformer.reference import HEAD
    from sspformer.tasks.denoise import Denoise

    # The packaged head is the one to beat, unless another encoder was given: then it does not fit.
    paths = ({"warm": HEAD} if encoder is None else {}) | named_paths(head or ())
    with shown() as progress:
        _, loaded, cohort = _open(data, encoder, paths, contrast, noise_sigma, cache, threads, progress)
        scored = score(cohort, Denoise(noise_sigma), loaded)
    for line in cohort.skipped_lines():
        typer.echo(line, err=True)
    typer.echo(f"{len(cohort.test)} held-out patients; inside the head | whole slice")
    for name in scored.scores:
        typer.echo(
            f"{name:<12} PSNR {scored.mean(name, 'psnr'):6.2f} dB  SSIM {scored.mean(name, 'ssim'):.3f}  |  "
            f"PSNR {scored.mean(name, 'psnr_whole'):6.2f} dB  SSIM {scored.mean(name, 'ssim_whole'):.3f}"
        )


@app.command()
def predict(
    source: Annotated[Path, typer.Argument(metavar="IN.nii.gz", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT.nii.gz", help="Must not exist.", show_default=False)],
    encoder: EncoderFile = None,
    head: HeadFile = None,
    contrast: Annotated[str | None, typer.Option(help="BIDS suffix, where the file's name does not state it.")] = None,
) -> None:
    """Denoise a scan; the output is a BIDS derivative on the input's own grid."""
    from sspformer.checkpoint import file_digest, load_encoder, load_head
    from sspformer.predict import advice, check_target, save_prediction
    from sspformer.predict import predict as run
    from sspformer.progress import shown
    from sspformer.reference import ENCODER, HEAD

    check_target(target)
    model, arch = load_encoder(encoder or ENCODER)
    encoder_digest = file_digest(encoder or ENCODER)
    restorer = load_head(head or HEAD, of=arch, encoder_digest=encoder_digest)[0].eval()
    with shown() as progress:
        result = run(source, model, restorer, contrast, lambda d, n: progress("slices", d, n))
    facts = {"Encoder": encoder_digest, "Head": file_digest(head or HEAD), "Task": "denoise"}
    save_prediction(result, source, target, facts)
    for line in (f"{target}", *advice(result)):
        typer.echo(line)


@app.command()
def cohort(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New BIDS dataset.", show_default=False)],
    hospital: Annotated[str, typer.Option(help="north, east or west.")],
    patients: Annotated[int, typer.Option(min=1)] = 20,
    slices: Annotated[int, typer.Option(min=1, max=12, help="Slices per patient.")] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a hospital of patients warped from one average brain: for demos and tests, not different people."""
    from sspformer.data.mni import make_hospital
    from sspformer.progress import shown

    with shown() as progress:
        make_hospital(folder, hospital, patients, seed, slices, lambda done, total: progress("patients", done, total))
    typer.echo(f"{folder}: {patients} patients warped from the MNI152 average brain")


@app.command()
def reference(
    path: Annotated[bool, typer.Option("--path", help="Print the folder of the packaged weights.")] = False,
    make: Annotated[Path | None, typer.Option(help="Make them anew into this folder (20 minutes or more).")] = None,
    work: Annotated[Path, typer.Option(help="Folder for data and resumable state.")] = Path("runs/reference"),
) -> None:
    """The packaged reference encoder and warm head: where they are, or make them."""
    from sspformer.reference import ENCODER, FOLDER, HEAD

    if make is not None:
        from sspformer.pretrain.reference import ReferenceRecipe, make_reference
        from sspformer.progress import shown

        with shown() as progress:
            for made in make_reference(ReferenceRecipe(), work, make, progress):
                typer.echo(made)
    elif path:
        typer.echo(FOLDER)
    else:
        from sspformer.checkpoint import file_digest

        for file in (ENCODER, HEAD):
            typer.echo(f"{file.name}  {file.stat().st_size / 1e6:.2f} MB  {file_digest(file)}")
        typer.echo((FOLDER / "MODEL_CARD.md").read_text())


def _open(  # type: ignore[no-untyped-def]
    data, encoder_path, head_paths, contrast, noise_sigma, cache, threads, progress
) -> tuple[Architecture, dict[str, Head], Cohort]:
    """Weights first: that a head does not fit is said before a dataset is read."""
    import torch

    from sspformer.checkpoint import file_digest, load_encoder, load_head
    from sspformer.data.cache import FeatureCache
    from sspformer.data.cohort import open_cohort
    from sspformer.reference import ENCODER
    from sspformer.tasks.denoise import Denoise

    if threads:
        torch.set_num_threads(threads)
    path = encoder_path or ENCODER
    encoder, arch = load_encoder(path)
    digest = file_digest(path)
    heads = {name: load_head(p, of=arch, encoder_digest=digest)[0].eval() for name, p in head_paths.items()}
    features = FeatureCache(cache, encoder, digest, Denoise(noise_sigma), arch.size_px, max_slices=6)
    cohort = open_cohort(data, tuple(contrast or ("T1w",)), features,
                         progress=lambda done, total: progress("patients read", done, total))  # fmt: skip
    return arch, heads, cohort


def main() -> None:
    """Entry point of `sspformer`."""
    run_app(app)


if __name__ == "__main__":
    main()
