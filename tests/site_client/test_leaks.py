"""A patient's name is planted wherever a name can be; every fault is triggered; then everything that left, and every
log but the operator's own, is searched for it: raw, compressed, base64 and hexadecimal.
"""

from __future__ import annotations

import base64
import gzip
import json
import logging
import re
import shutil
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from site_client import app as app_module
from site_client import local_round as story
from site_client import private_training
from site_client.app import Answer, answer
from site_client.logs import EVENTS, Event, event, open_logs
from sspformer.contract.errors import Code, Refused
from sspformer.contract.keys import save_public
from sspformer.contract.plan import RunPlan
from sspformer.contract.task import RoundTask, plan_digest, seal_plan, seal_task
from sspformer.contract.tensors import decode, digest_tensors, encode, zeros

NAME = "MillerJohannes"
KEY = Ed25519PrivateKey.generate()


# -- the search --------------------------------------------------------------------------------------------------------


def holds_name(data: bytes) -> bool:
    """Whether the name is in the bytes in any of its forms, or in what is compressed inside them."""
    folded = data.lower()
    plain = NAME.lower().encode()
    forms = {plain, plain.hex().encode(), NAME.lower().encode("utf-16-le")}
    if any(form in folded for form in forms) or NAME.encode().hex() in folded.decode("latin-1"):
        return True
    for shift in range(3):  # base64 of a text that holds the name depends on where it begins
        inner = base64.b64encode(b"\0" * shift + NAME.encode())[4 * (shift > 0) : -4]
        if inner in data or inner.translate(bytes.maketrans(b"+/", b"-_")) in data:
            return True
    return any(holds_name(inside) for inside in _unpacked(data))


def _unpacked(data: bytes) -> Iterator[bytes]:
    for start in (match.start() for match in re.finditer(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]", data)):
        with suppress(zlib.error):
            yield zlib.decompressobj(47).decompress(data[start:], 1 << 24)
    for start in (match.start() for match in re.finditer(re.escape(b"\x28\xb5\x2f\xfd"), data)):
        with suppress(zstandard.ZstdError):
            yield zstandard.ZstdDecompressor().decompressobj().decompress(data[start:])


TEXT = f"sub-{NAME}_T1w.nii.gz".encode()


@pytest.mark.parametrize("lead", [b"", b"a", b"ab", b"abcd"])
@pytest.mark.parametrize(
    "hide",
    [bytes, gzip.compress, zlib.compress, zstandard.ZstdCompressor().compress, base64.b64encode,
     base64.urlsafe_b64encode, lambda t: t.hex().encode(), lambda t: t.hex().upper().encode(), bytes.lower,
     lambda t: gzip.compress(base64.b64encode(t)), lambda t: t.decode().encode("utf-16-le")],
)  # fmt: skip
def test_the_search_finds_every_form(hide: Callable[[bytes], bytes], lead: bytes) -> None:
    assert holds_name(b"before " + hide(lead + TEXT) + b" after")
    assert not holds_name(b"before " + hide(lead + TEXT.replace(NAME.encode(), b"PetersenMathis")) + b" after")


# -- the plant ---------------------------------------------------------------------------------------------------------


def plant(hospital, monkeypatch) -> None:
    """The name in folder, path, header, extension, gzip header, sidecar, participants and environment."""
    data = hospital.data.with_name(f"ward-{NAME}")
    hospital.data.rename(data)
    for number, old in enumerate(sorted(data.glob("sub-*"))):
        subject = f"sub-{NAME}{number}"
        place = data / subject / "anat"
        place.mkdir(parents=True)
        for source in old.glob("anat/*.nii.gz"):
            image = nib.load(source)
            image.header["descrip"], image.header["db_name"] = NAME, NAME
            image.header["aux_file"], image.header["intent_name"] = NAME, NAME
            image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", NAME.encode()))
            target = place / f"{subject}_T1w.nii.gz"
            with target.open("wb") as raw, gzip.GzipFile(f"{NAME}.nii", "wb", fileobj=raw) as packed:
                packed.write(image.to_bytes())
            target.with_name(f"{subject}_T1w.json").write_text(json.dumps({"PatientName": NAME}))
        shutil.rmtree(old)
    (data / "participants.tsv").write_text(f"participant_id\topt_out\tname\nsub-{NAME}0\tno\t{NAME}\n")
    settings = yaml.safe_load((hospital.root / "site.yaml").read_text())
    (hospital.root / "site.yaml").write_text(yaml.safe_dump(settings | {"data": str(data)}))
    monkeypatch.setenv("PATIENT", NAME)
    object.__setattr__(hospital, "data", data)


@pytest.fixture
def clean_logging() -> Iterator[None]:
    """`open_logs` is for a process of its own; this one goes on."""
    root = logging.root
    before = (root.handlers[:], root.level, sys.excepthook, threading.excepthook, logging.raiseExceptions)
    others = [(known, known.handlers[:], known.propagate) for known in root.manager.loggerDict.values()
              if isinstance(known, logging.Logger)]  # fmt: skip
    yield
    logging.captureWarnings(False)
    for handler in set(root.handlers) - set(before[0]):
        handler.close()
    root.handlers, level, sys.excepthook, threading.excepthook, logging.raiseExceptions = before
    root.setLevel(level)
    EVENTS.handlers.clear()
    for known, handlers, propagate in others:
        known.handlers, known.propagate = handlers, propagate


class Worker:
    """An opened site with the worker's logs, and the bytes that it sends."""

    def __init__(self, hospital) -> None:
        self.logs = hospital.root / "logs"
        self.hospital = hospital
        self.logs.mkdir()
        self._stream = (self.logs / "worker.log").open("a")
        open_logs(hospital.root, self._stream)
        self.site = hospital.open()

    def ask(self, plan: RunPlan, kind: str = "train") -> tuple[Answer, bytes]:
        """The answer to a sealed task, and all bytes of the message that carries it."""
        delta = zeros(self.site.head_shapes(plan))
        number = 1 if kind == "train" else plan.rounds + 1
        task = RoundTask(plan_digest=plan_digest(plan), run=plan.run, round=number, kind=kind,
                         head_digest=digest_tensors(delta))  # fmt: skip
        said = answer(
            self.site, seal_plan(plan, KEY), seal_task(task, KEY), encode(delta), story.local_round, story.finish
        )
        request = Message(RecordDict(), dst_node_id=1, message_type="train")
        reply = app_module._pack(said, request)
        sent = message_to_proto(reply).SerializeToString() + repr(said).encode()
        if said.tensors:
            sent += b"".join(
                v.astype(np.float16).tobytes() for v in decode(said.tensors, self.site.head_shapes(plan)).values()
            )
        return said, sent

    def log(self) -> bytes:
        """Every log but the operator's own."""
        self._stream.flush()
        return b"".join(p.read_bytes() for p in self.logs.iterdir() if not p.name.startswith("operator.log"))

    def operator(self) -> Path:
        return self.logs / "operator.log"


@pytest.fixture
def make_worker(make_hospital, monkeypatch, clean_logging) -> Callable[..., Worker]:
    def make(**policy: object) -> Worker:
        hospital = make_hospital(**policy)
        for name in ("_run_id", "_node_id", "_task_id"):  # what a worker takes over with a task
            monkeypatch.setattr(TaskIdentity, name, 1)
        save_public(hospital.root / "keys" / "coordinator.pub", KEY.public_key())
        plant(hospital, monkeypatch)
        return Worker(hospital)

    return make


def scans(worker: Worker) -> list[Path]:
    found = sorted(worker.hospital.data.glob("sub-*/anat/*.nii.gz"))
    assert found
    return found


# -- the faults --------------------------------------------------------------------------------------------------------


def missing(worker: Worker, monkeypatch) -> None:
    for path in scans(worker):
        path.unlink()
        path.symlink_to(path.with_name(f"gone-{NAME}"))


def truncated(worker: Worker, monkeypatch) -> None:
    for path in scans(worker):
        path.write_bytes(path.read_bytes()[:600])


def not_a_number(worker: Worker, monkeypatch) -> None:
    for path in scans(worker):
        header = nib.load(path).header
        nib.Nifti1Image(np.full((56, 60, 4), np.nan, np.float32), np.eye(4), header).to_filename(path)


def no_folder(worker: Worker, monkeypatch) -> None:
    worker.hospital.data.rename(worker.hospital.data.with_name("elsewhere"))


def bad_table(worker: Worker, monkeypatch) -> None:
    (worker.hospital.data / "participants.tsv").write_bytes(f"participant_id\n{NAME}\xff".encode("latin-1"))


def bad_settings(worker: Worker, monkeypatch) -> None:
    with (worker.hospital.root / "site.yaml").open("a") as handle:
        handle.write(f"{NAME}: 1\n")


def policy_refusal(worker: Worker, monkeypatch) -> None:
    worker.hospital.allow(min_patients=50)


def crash(worker: Worker, monkeypatch) -> None:
    path = scans(worker)[0]

    def fail(*_: object, **__: object) -> None:
        warnings.warn(f"about {NAME}", RuntimeWarning, stacklevel=1)
        logging.getLogger("nibabel").error("%s", path)
        raise ValueError(f"{path}: {path.read_bytes()[:200]!r}")

    monkeypatch.setattr(story, "train_plainly", fail)
    monkeypatch.setattr(private_training, "private_gradient", fail)


def crash_with_a_refusal(worker: Worker, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Refused(Code.DATA, f"{scans(worker)[0]} is gone.", NAME)

    monkeypatch.setattr(story, "difference", fail)


FAULTS = {  # what goes wrong, the code that leaves, and the one that leaves in a private round
    missing: ("E-DATA", "E-DATA"),
    truncated: ("E-DATA", "E-DATA"),
    not_a_number: ("E-DATA", "E-DATA"),
    no_folder: ("E-DATA", "E-DATA"),
    bad_table: ("E-DATA", "E-DATA"),
    bad_settings: ("E-CONFIG", "E-CONFIG"),
    policy_refusal: ("E-COHORT", "E-COHORT"),
    crash: ("E-INTERNAL", "E-INTERNAL"),
    crash_with_a_refusal: ("E-DATA", "E-INTERNAL"),
}


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_fault_lets_the_name_out(make_worker, monkeypatch, fault, private):
    worker = make_worker(require_dp=False)
    plan = worker.hospital.private_plan() if private else worker.hospital.plan()
    fault(worker, monkeypatch)
    said, sent = worker.ask(plan)
    assert said == Answer(code=FAULTS[fault][private])
    assert not holds_name(sent)
    assert not holds_name(worker.log())
    assert f" {said.code}" in worker.log().decode()
    assert worker.operator().stat().st_mode & 0o077 == 0
    if fault is not policy_refusal:  # that refusal has no name to tell; in the others the plant was live
        assert NAME in worker.operator().read_text()


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_sound_round_lets_nothing_out_and_draws_are_not_counted(make_worker, private):
    worker = make_worker(require_dp=False)
    scans(worker)[0].write_bytes(b"broken")  # skipped
    plan = worker.hospital.private_plan() if private else worker.hospital.plan()
    for kind in ("train", "train", "final"):
        said, sent = worker.ask(plan, kind)
        assert said.code is None
        assert not holds_name(sent)
    assert not holds_name(worker.log())
    lines = [line.split(" ", 2)[2] for line in worker.log().decode().splitlines()]
    assert lines == ["TRAINED round=1", "REPEATED round=1", "FINISHED"]
    if private:
        assert "draws" in worker.operator().read_text()


def test_mutant_that_logs_the_text_is_found(make_worker, monkeypatch):
    worker = make_worker(require_dp=False)
    monkeypatch.setattr(app_module, "event", lambda *_: EVENTS.info("%s", sys.exc_info()[1]))
    truncated(worker, monkeypatch)
    worker.ask(worker.hospital.plan())
    assert holds_name(worker.log())


def test_mutant_that_sends_the_text_is_found(make_worker, monkeypatch):
    worker = make_worker(require_dp=False)
    truncated(worker, monkeypatch)
    monkeypatch.setattr(app_module, "Answer", lambda code: Answer(metrics={str(sys.exc_info()[1]): 1.0}))
    _, sent = worker.ask(worker.hospital.plan())
    assert holds_name(sent)


def test_what_nobody_caught_goes_to_the_operator(make_worker):
    worker = make_worker()

    def fail() -> None:
        raise RuntimeError(NAME)

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    sys.excepthook(RuntimeError, RuntimeError(NAME), None)
    assert worker.log().decode().count("E-INTERNAL") == 2
    assert not holds_name(worker.log())
    assert worker.operator().read_text().count(f"RuntimeError: {NAME}") == 2


def test_an_event_carries_no_text():
    with pytest.raises((AttributeError, ValueError)):
        event(NAME)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="invalid literal"):
        event(Event.TRAINED, round=NAME)  # type: ignore[arg-type]


def test_an_operator_log_that_was_open_to_others_is_closed(make_hospital, clean_logging):
    hospital = make_hospital()
    path = hospital.root / "logs" / "operator.log"
    path.parent.mkdir()
    path.write_text("old\n")
    path.chmod(0o644)
    open_logs(hospital.root, sys.stderr)
    assert path.stat().st_mode & 0o777 == 0o600
