"""The demo: its plans, its folder, and that no process outlives it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from central.demo.hospitals import MARK, Hospital, claimed, given, shared_contrast
from central.demo.plans import PLAIN, PRIVATE, load_plan, public_size, write_plan
from central.demo.processes import running
from sspformer.contract.errors import Code, Refused
from sspformer.contract.privacy import MechanismEvent

DIGESTS = {"encoder": "sha256:" + "a" * 64, "head": "sha256:" + "b" * 64}

# A program that starts another one, which ignores SIGTERM, and writes both process ids down.
STUBBORN_TREE = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"],
    stdout=subprocess.PIPE)
child.stdout.readline()
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.replace(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""

# A demo that starts that tree and waits.
WAITING_DEMO = """
import sys, time
from pathlib import Path
from central.demo.processes import running
with running(Path(sys.argv[1])) as programs:
    programs.start("tree", sys.executable, sys.argv[2], sys.argv[3])
    time.sleep(600)
"""


def wait_for(path: Path, timeout_s: float = 20.0) -> list[int]:
    """Process ids that the tree wrote down."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
    return [int(pid) for pid in path.read_text().split()]


def alive(pids: list[int]) -> list[int]:
    """Which of the processes still run. A zombie waits for its parent to look and runs nothing."""
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    script = tmp_path / "tree.py"
    script.write_text(STUBBORN_TREE)
    return script


@pytest.mark.parametrize(
    ("patients", "known"), [(0, 2), (2, 2), (3, 2), (7, 4), (8, 8), (150, 128), (151, 128), (256, 256)]
)
def test_plan_knows_the_cohort_only_to_a_power_of_two(patients: int, known: int) -> None:
    assert public_size(patients) == known


def test_one_patient_more_leaves_the_private_plan_as_it_was() -> None:
    assert load_plan(PRIVATE, DIGESTS, 3, 149) == load_plan(PRIVATE, DIGESTS, 3, 150)


def test_private_plan_stays_within_epsilon_eight() -> None:
    from site_client.privacy.accounting import epsilon

    plan = load_plan(PRIVATE, DIGESTS, 3, 150)
    assert plan.private is not None
    spent = epsilon([MechanismEvent.of(plan.private, rounds=plan.rounds)], plan.private.delta)
    assert 6.0 < spent <= 8.0


@pytest.mark.parametrize("patients", [4, 16, 150, 1000])
def test_noise_moves_a_small_cohort_no_further_than_a_large_one(patients: int) -> None:
    def reach(size: int) -> float:
        private = load_plan(PRIVATE, DIGESTS, 3, size).private
        assert private is not None
        return private.learning_rate * private.noise_multiplier / private.expected_patients

    assert reach(patients) <= reach(128) * (1 + 1e-9)


def test_plain_plan_has_no_private_part_and_asks_what_two_sites_can_give() -> None:
    plan = load_plan(PLAIN, DIGESTS, 2, 150)
    assert plan.private is None
    assert plan.quorum == 2


def test_written_plan_is_what_central_run_reads(tmp_path: Path) -> None:
    import yaml

    from sspformer.contract.plan import RunPlan

    plan = load_plan(PRIVATE, DIGESTS, 3, 150)
    write_plan(plan, tmp_path / "plans" / "private.yaml")
    assert RunPlan.model_validate(yaml.safe_load((tmp_path / "plans" / "private.yaml").read_text())) == plan


def test_given_folders_become_hospitals(tmp_path: Path) -> None:
    folders = [tmp_path / "Hospital A", tmp_path / "hospital_b"]
    for folder in folders:
        (folder / "sub-1" / "anat").mkdir(parents=True)
        (folder / "sub-1" / "anat" / "sub-1_T1w.nii.gz").write_bytes(b"1234")
    hospitals = given(folders, tmp_path / "out")
    assert [hospital.name for hospital in hospitals] == ["hospital-a", "hospital-b"]
    assert [hospital.mri_bytes for hospital in hospitals] == [4, 4]


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"E-DATA.*nowhere"):
        given([tmp_path / "nowhere"], tmp_path)


def test_two_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent / "site").mkdir(parents=True)
    with pytest.raises(Refused, match="E-CONFIG"):
        given([tmp_path / "x" / "site", tmp_path / "y" / "site"], tmp_path)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(Refused, match="E-STATE"), claimed(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_earlier_demo_is_replaced_and_a_running_one_is_not(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with claimed(out):
        (out / "data").mkdir()
        (out / "summary.json").write_text("{}")
        with pytest.raises(Refused, match="a demo is running"), claimed(out):
            pass
        assert (out / "summary.json").exists()
    with claimed(out):
        assert [path.name for path in out.iterdir()] == [MARK]


def test_refusal_of_a_program_is_passed_on_in_one_line(tmp_path: Path) -> None:
    with running(tmp_path / "logs") as programs, pytest.raises(Refused, match=r"E-CONFIG: status: .*yaml") as refusal:
        programs.run("status", "central", "status", tmp_path / "nowhere")
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "logs") in refusal.value.next_step


def test_crash_of_a_program_names_its_log(tmp_path: Path) -> None:
    with running(tmp_path / "logs") as programs, pytest.raises(Refused, match="crash ended with status 3"):
        programs.run("crash", sys.executable, "-c", "raise SystemExit(3)")


def test_program_that_ends_in_the_background_is_noticed(tmp_path: Path) -> None:
    with running(tmp_path / "logs") as programs:
        programs.start("short", sys.executable, "-c", "raise SystemExit(1)").wait(20)
        with pytest.raises(Refused, match="short ended with status 1"):
            programs.check()


def test_success_and_failure_leave_no_process(tmp_path: Path, tree: Path) -> None:
    for number, failure in enumerate((None, RuntimeError("on the way"))):
        pids = tmp_path / f"pids-{number}"
        try:
            with running(tmp_path / "logs") as programs:
                programs.start("tree", sys.executable, tree, pids)
                started = wait_for(pids)
                assert alive(started) == started
                if failure is not None:
                    raise failure
        except RuntimeError:
            pass
        assert alive(started) == []


def test_orphans_of_a_killed_program_are_found(tmp_path: Path, tree: Path) -> None:
    with running(tmp_path / "logs") as programs:
        process = programs.start("tree", sys.executable, tree, tmp_path / "pids")
        started = wait_for(tmp_path / "pids")
        process.kill()
        process.wait()
        assert alive(started) == started[1:]
    assert alive(started) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_no_process(tmp_path: Path, tree: Path, number: signal.Signals) -> None:
    script = tmp_path / "demo.py"
    script.write_text(WAITING_DEMO)
    arguments = [str(tmp_path / "logs"), str(tree), str(tmp_path / "pids")]
    demo = subprocess.Popen([sys.executable, str(script), *arguments], stderr=subprocess.DEVNULL)
    started = wait_for(tmp_path / "pids")
    os.kill(demo.pid, number)
    assert demo.wait(40) != 0
    assert alive(started) == []


def test_killed_demo_takes_its_programs_along(tmp_path: Path, tree: Path) -> None:
    """Nobody can clean up after SIGKILL but the kernel: it stops the programs, and those stop what they started."""
    script = tmp_path / "demo.py"
    script.write_text(WAITING_DEMO)
    arguments = [str(tmp_path / "logs"), str(tree), str(tmp_path / "pids")]
    demo = subprocess.Popen([sys.executable, str(script), *arguments])
    started = wait_for(tmp_path / "pids")
    demo.kill()
    demo.wait()
    deadline = time.monotonic() + 10
    while alive(started[:1]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(started[:1]) == []
    for pid in alive(started):  # this tree's own child is stubborn by design
        os.kill(pid, signal.SIGKILL)


def test_a_hospital_says_how_many_of_its_patients_are_usable(tmp_path: Path) -> None:
    hospital = Hospital("a", tmp_path, tmp_path / "site")
    said = "patients read: 9/9\n7 patients, 96 steps: x.safetensors\n  PSNR inside the head, 2 held-out patients: ...\n"
    assert hospital.with_usable(said).declared_patients == 7
    for too_few in (said.replace("7 patients", "1 patients"), said.partition("  PSNR")[0], ""):
        with pytest.raises(Refused) as refusal:
            hospital.with_usable(too_few)
        assert refusal.value.code is Code.COHORT


def test_the_demo_takes_the_contrast_that_the_hospitals_share(tmp_path: Path) -> None:
    def hospital(name: str, **counts: int) -> Hospital:
        for contrast, count in counts.items():
            for i in range(count):
                folder = tmp_path / name / f"sub-{i}" / "anat"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"sub-{i}_{contrast}.nii.gz").touch()
                (folder / f"sub-{i}_ce-gadolinium_T2w.nii.gz").touch()
        return Hospital(name, tmp_path / name, tmp_path / "site")

    both, flair = hospital("both", T1w=5, FLAIR=5), hospital("flair", FLAIR=6, T1w=2)
    assert shared_contrast([both]) == "T1w"
    assert shared_contrast([both, flair]) == "FLAIR"
    assert both.subjects_with("T2w") == 0
    assert load_plan(PLAIN, DIGESTS, 2, 9, contrast="FLAIR").contrasts == ("FLAIR",)
