"""The hospitals of the demo: their data, and the folders of coordinator and sites."""

from __future__ import annotations

import fcntl
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from central.config import CentralConfig
from central.demo.processes import Programs
from sspformer.contract.durable import write_file
from sspformer.contract.errors import Code, Refused
from sspformer.contract.supervise import free_port

WARPED = ("north", "east", "west")
HOST = "127.0.0.1"
MARK = ".sspformer-demo"
MAX_EPSILON = 8.0
CONTRASTS = ("T1w", "FLAIR", "T2w", "PDw", "T2starw")  # in the order of preference
FEWEST = 4  # subjects with the contrast: two to train on, two held out


@dataclass(frozen=True)
class Hospital:
    """One hospital: its name, its BIDS dataset, its site folder and what it sends to join."""

    name: str
    data: Path
    folder: Path
    usable: int | None = None

    @property
    def request(self) -> Path:
        """What `site-client init` writes for the coordinator."""
        return self.folder / "request.json"

    @property
    def local_head(self) -> Path:
        """What `site-client finetune` leaves: the head of a hospital that trained alone."""
        return self.folder / "heads" / "local.safetensors"

    def scores(self, out: Path) -> Path:
        """Where its evaluation goes."""
        return out / "scores" / f"{self.name}.json"

    def pictures(self, out: Path) -> Path:
        """Where its example slices go."""
        return out / "scores" / f"{self.name}.npz"

    def with_usable(self, said: str) -> Hospital:
        """This hospital with the number of training patients that `site-client finetune` counted.

        Raises:
            Refused: E-COHORT, it has fewer than two, or nobody to evaluate on.
        """
        counted = re.search(r"^(\d+) patients, .*$\n?.*held-out", said, re.MULTILINE)
        patients = int(counted.group(1)) if counted else 0
        if patients < 2:
            raise Refused(
                Code.COHORT,
                f"{self.name}: fewer than two usable training patients, or none to evaluate on.",
                "add patients; four are the least.",
            )
        return replace(self, usable=patients)

    @property
    def declared_patients(self) -> int:
        """Training patients as the hospital declares them: counted, or before that three in four of its folders."""
        return self.usable or sum(path.is_dir() for path in self.data.glob("sub-*")) * 3 // 4

    def subjects_with(self, contrast: str) -> int:
        """Subjects that have a scan of a contrast, by file name; enhanced scans do not count."""
        return sum(
            any("_ce-" not in scan.name for scan in folder.glob(f"**/anat/*_{contrast}.nii*"))
            for folder in self.data.glob("sub-*")
        )

    @property
    def mri_bytes(self) -> int:
        """Bytes of all image files under the data folder."""
        return sum(path.stat().st_size for path in self.data.rglob("*.nii*") if path.is_file())


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold an empty folder for the demo. An earlier demo's files are removed, anything else is left alone.

    Raises:
        Refused: E-STATE when the folder holds something else, belongs to a running demo, or cannot be made.
    """
    try:
        if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
            raise Refused(Code.STATE, f"{out} holds files that no demo made.", "name another folder: OUT=folder.")
        out.mkdir(parents=True, exist_ok=True)
        with (out / MARK).open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(
                    Code.STATE, f"a demo is running in {out}.", "wait for it, or name another OUT=."
                ) from None
            for path in out.iterdir():
                if path.name != MARK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield
    except OSError as error:
        raise Refused(
            Code.STATE, f"{out} cannot be used ({error.strerror}).", "name a folder you may write: OUT=folder."
        ) from None


def given(folders: Sequence[Path], out: Path) -> list[Hospital]:
    """Take BIDS folders as hospitals, named after the folders.

    Raises:
        Refused: E-DATA for a folder that is missing, E-CONFIG for two of one name.
    """
    hospitals = []
    for folder in folders:
        if not folder.is_dir():
            raise Refused(Code.DATA, f"{folder} is not a folder.", "name BIDS datasets: SITES='dir dir dir'.")
        name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "site"
        if name in {hospital.name for hospital in hospitals}:
            raise Refused(Code.CONFIG, f"two of the folders are called {name}.", "rename one of them.")
        hospitals.append(Hospital(name, folder.resolve(), out / "sites" / name))
    return hospitals


def shared_contrast(hospitals: Sequence[Hospital]) -> str:
    """The contrast that most hospitals have enough of; T1w where several are equal."""
    return max(CONTRASTS, key=lambda c: sum(hospital.subjects_with(c) >= FEWEST for hospital in hospitals))


def make_warped(programs: Programs, out: Path, patients: int, seed: int) -> list[Hospital]:
    """Make three hospitals of patients warped from one average brain, side by side."""
    hospitals = [Hospital(name, out / "data" / name, out / "sites" / name) for name in WARPED]
    names = [f"cohort-{hospital.name}" for hospital in hospitals]
    for name, hospital in zip(names, hospitals, strict=True):
        options = ("--hospital", hospital.name, "--patients", str(patients), "--seed", str(seed))
        programs.start(name, "sspformer", "cohort", hospital.data, *options)
    programs.wait(*names, timeout_s=600)
    return hospitals


def found(programs: Programs, state: Path) -> str:
    """Make the coordinator and publish the packaged encoder and warm head; return its key's fingerprint."""
    gateway_port, superlink_port = free_port(), free_port()
    ports = ("--gateway-port", str(gateway_port), "--superlink-port", str(superlink_port))
    said = programs.run("central-init", "central", "init", state, "--name", "demo", "--host", HOST, *ports)
    fingerprint = _fingerprint(said, "central init", programs.log("central-init"))
    reference = Path(programs.run("reference", "sspformer", "reference", "--path").strip().splitlines()[-1])
    encoder, head = reference / "encoder.safetensors", reference / "head-denoise.safetensors"
    programs.run("central-publish", "central", "publish", state, "--encoder", encoder, "--head", head)
    return fingerprint


def _fingerprint(said: str, command: str, log: Path) -> str:
    """What a command printed to be read out to the other side."""
    found = re.search(r"[Ff]ingerprint[^:\n]*:\s*([0-9a-fA-F:]{16,})", said)
    if found is None:
        raise Refused(Code.INTERNAL, f"{command} named no fingerprint.", f"read {log}")
    return found.group(1)


def join(programs: Programs, state: Path, hospital: Hospital, fingerprint: str) -> None:
    """Bring one hospital in: keys made at the site, admitted by the coordinator, its key pinned by the site.

    Each side is told the fingerprint that the other printed, as two people would by phone.
    """
    site = hospital.folder
    admission = site.parent / f"{hospital.name}-admission.json"
    log = f"join-{hospital.name}"
    said = programs.run(log, "site-client", "init", site, "--name", hospital.name, "--data", hospital.data)
    own = ("--fingerprint", _fingerprint(said, "site-client init", programs.log(log)))
    _set_policy(site / "site.yaml")
    programs.run(log, "central", "admit", state, hospital.request, *own, "--output", admission)
    programs.run(log, "site-client", "accept", site, admission, "--fingerprint", fingerprint)


def _set_policy(path: Path) -> None:
    """Let this site take part in both runs of the demo: a cautious hospital would refuse the one without DP."""
    settings = yaml.safe_load(path.read_text())
    settings["policy"] = settings.get("policy", {}) | {
        "require_dp": False,
        "min_patients": 2,
        "max_epsilon": MAX_EPSILON,
    }
    write_file(path, yaml.safe_dump(settings, sort_keys=False).encode())


def is_listening(state: Path) -> bool:
    """Whether the coordinator's gateway and SuperLink accept connections."""
    config = CentralConfig.load(state / "central.yaml")
    for port in (config.gateway_port, config.superlink_port):
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex((HOST, port)) != 0:
                return False
    return True
