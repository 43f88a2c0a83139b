"""The story of a round on a real site folder: its order, its limits, and what is charged when something fails."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from site_client import local_round as story
from site_client import private_training
from site_client.local_round import finish, local_round
from site_client.policy import Policy
from site_client.privacy.events import Events, Reservation
from site_client.site import Site
from sspformer.checkpoint import file_digest, load_head
from sspformer.contract.errors import Code, Refused
from sspformer.contract.task import agreed_metrics
from sspformer.data import cache as cache_module
from sspformer.data.cache import FeatureCache
from sspformer.data.mni import make_hospital as make_warped
from sspformer.model.assembly import trainable_names
from sspformer.reference import ENCODER, HEAD
from tests.phantom import MINI, write_participants


def refusal(function, *args) -> Refused:
    with pytest.raises(Refused) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return caught.value


def kinds(hospital) -> list[str]:
    path = hospital.root / "privacy" / "events.jsonl"
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def steps(monkeypatch) -> list[str]:
    """Names of the steps of a round, in the order in which they really happen."""
    seen: list[str] = []

    def spy(owner, name, label):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            seen.append(label)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    spy(story, "check", "check")
    spy(Events, "reserve", "reserve")
    spy(Site, "prepare", "prepare")
    spy(Reservation, "start", "start")
    spy(private_training, "draw_patients", "draw")
    spy(FeatureCache, "load", "read")
    spy(story, "train_privately", "train")
    spy(story, "train_plainly", "train plainly")
    spy(story, "check_update_norm", "check norm")
    spy(Reservation, "spend", "spend")
    spy(Reservation, "release", "release")
    return seen


def without_repeats(seen: list[str]) -> list[str]:
    return [step for i, step in enumerate(seen) if i == 0 or seen[i - 1] != step]


def test_the_order_of_a_private_round(make_hospital, steps):
    hospital = make_hospital()
    local_round(hospital.open(), hospital.private_plan(), 1, {})
    order = [s for s in without_repeats([s for s in steps if s != "read"]) if s != "draw"]
    assert order == ["check", "reserve", "prepare", "check", "start", "train", "check norm", "spend"]
    assert steps.index("start") < steps.index("train") < steps.index("draw")
    assert kinds(hospital) == ["RESERVED", "STARTED", "SPENT"]


def test_started_is_on_the_disk_before_a_patient_is_drawn(make_hospital, monkeypatch):
    hospital = make_hospital()
    seen: list[list[str]] = []
    real = private_training.draw_patients
    monkeypatch.setattr(private_training, "draw_patients", lambda *args: seen.append(kinds(hospital)) or real(*args))
    local_round(hospital.open(), hospital.private_plan(), 1, {})
    assert seen
    assert set(map(tuple, seen)) == {("RESERVED", "STARTED")}


def test_a_private_round_is_charged_and_says_so(make_hospital):
    hospital = make_hospital()
    site, plan = hospital.open(), hospital.private_plan()
    first, second = (local_round(site, plan, number, {}) for number in (1, 2))
    spent = Events(hospital.root / "privacy").epsilon_spent(plan.private.delta)
    assert 0 < first.metrics["epsilon"] < second.metrics["epsilon"] == pytest.approx(spent)
    assert spent <= 8.0
    assert kinds(hospital) == ["RESERVED", "STARTED", "SPENT"] * 2


def test_a_private_update_is_of_the_private_part_and_is_noisy(make_hospital):
    hospital = make_hospital()
    site, plan = hospital.open(), hospital.private_plan()
    updates = [local_round(site, plan, 1, {}).update for _ in range(2)]
    head = site.prepare(plan).head_at({})
    assert set(updates[0]) == set(trainable_names(head, "norms"))
    assert all(np.isfinite(v).all() for v in updates[0].values())
    assert any(not np.array_equal(updates[0][n], updates[1][n]) for n in updates[0])  # fresh noise each time


def test_a_plain_round_is_bitwise_repeatable(make_hospital):
    hospital = make_hospital(require_dp=False)
    plan = hospital.plan()
    first = local_round(hospital.open(), plan, 1, {})
    again = local_round(hospital.open(), plan, 1, {})
    assert first.update.keys() == again.update.keys()
    assert all(np.array_equal(first.update[n], again.update[n]) for n in first.update)
    assert first.metrics == again.metrics
    second = local_round(hospital.open(), plan, 2, {})
    assert any(not np.array_equal(first.update[n], second.update[n]) for n in first.update)
    other_site = make_hospital("bravo", require_dp=False)
    other = local_round(other_site.open(), plan, 1, {})
    assert any(not np.array_equal(first.update[n], other.update[n]) for n in first.update)
    assert kinds(hospital) == []


def test_the_update_is_local_minus_global(make_hospital):
    """A head moved by a delta and trained gives the update alone, not the delta again."""
    hospital = make_hospital(require_dp=False)
    site, plan = hospital.open(), hospital.plan(local={"steps": 2, "batch_slices": 1, "learning_rate": 1e-9})
    names = [n for n, _ in site.prepare(plan).head_at({}).named_parameters()]
    delta = {n: np.full(site.head_shapes(plan)[n], 0.01, np.float32) for n in names}
    update = local_round(site, plan, 1, delta).update
    assert set(update) == set(names)
    assert max(float(np.abs(v).max()) for v in update.values()) < 1e-4
    moved, still = site.prepare(plan).head_at(delta), site.prepare(plan).head_at({})
    for (name, a), (_, b) in zip(moved.named_parameters(), still.named_parameters(), strict=True):
        torch.testing.assert_close(a - b, torch.full_like(a, 0.01), atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("changes", "policy", "code"),
    [
        ({}, {}, Code.PLAN),  # no DP where the site requires it
        ({"rounds": 900}, {"require_dp": False}, Code.PLAN),
        ({"local": {"steps": 5000}}, {"require_dp": False}, Code.PLAN),
        ({}, {"require_dp": False, "min_patients": 50}, Code.COHORT),
        ({"contrasts": ("FLAIR",)}, {"require_dp": False}, Code.DATA),
        ("noise", {}, Code.PLAN),
        ("budget", {}, Code.BUDGET),
        ("cohort", {}, Code.COHORT),
    ],
)
def test_a_plan_beyond_the_policy_is_refused_before_any_image_is_opened(
    make_hospital, monkeypatch, changes, policy, code
):
    hospital = make_hospital(**policy)
    plan = {
        "noise": lambda: hospital.private_plan(noise_multiplier=0.1),
        "budget": lambda: hospital.private_plan(noise_multiplier=0.5, steps=150),
        "cohort": lambda: hospital.private_plan(expected_patients=40.0),
    }[changes]() if isinstance(changes, str) else hospital.plan(**changes)  # fmt: skip
    opened: list[object] = []
    real = Path.open
    monkeypatch.setattr(nib, "load", lambda path, *a, **k: opened.append(path))
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: opened.append(path) if ".nii" in path.name else real(path, "rb").read()
    )
    assert refusal(local_round, hospital.open(), plan, 1, {}).code is code
    assert opened == []
    assert not (hospital.root / "cache").exists()
    assert kinds(hospital) == []


def test_that_spy_would_see_an_image(make_hospital, monkeypatch):
    hospital = make_hospital(require_dp=False)
    opened: list[object] = []
    monkeypatch.setattr(cache_module, "read_volume", lambda path: opened.append(path) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        local_round(hospital.open(), hospital.plan(), 1, {})
    assert opened


def test_when_the_budget_is_spent_no_round_starts(make_hospital):
    hospital = make_hospital(max_epsilon=3.0)
    site, plan, done = hospital.open(), hospital.private_plan(), 0
    for number in range(1, 40):
        try:
            local_round(site, plan, number, {})
        except Refused as refused:
            assert refused.code is Code.BUDGET  # noqa: PT017 - the number of rounds before it is the point
            break
        done += 1
    assert 1 <= done < 39
    assert Events(hospital.root / "privacy").epsilon_spent(1e-5) <= 3.0
    assert kinds(hospital) == ["RESERVED", "STARTED", "SPENT"] * done


@pytest.mark.parametrize(
    ("broken", "left"),
    [
        ("keep_history", ["RESERVED", "RELEASED"]),  # before a patient was trained on: nothing is charged
        ("private_gradient", ["RESERVED", "STARTED"]),  # in the middle: charged in full
        ("difference", ["RESERVED", "STARTED"]),
        ("check_update_norm", ["RESERVED", "STARTED"]),
    ],
)
def test_what_an_exception_costs(make_hospital, monkeypatch, broken, left):
    hospital = make_hospital()

    def crash(*args, **kwargs):
        raise RuntimeError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(private_training if broken == "private_gradient" else story, broken, crash)
        with pytest.raises(RuntimeError if broken == "keep_history" else Refused):
            local_round(hospital.open(), hospital.private_plan(), 1, {})
    assert kinds(hospital) == left
    charged = Events(hospital.root / "privacy").charged()
    assert len(charged) == ("STARTED" in left)
    local_round(hospital.open(), hospital.private_plan(), 1, {})  # and the site goes on
    assert kinds(hospital) == [*left, "RESERVED", "STARTED", "SPENT"]


def test_an_update_beyond_the_norm_stays_and_is_charged(make_hospital):
    hospital = make_hospital(max_update_norm=1e-9)
    assert refusal(local_round, hospital.open(), hospital.private_plan(), 1, {}).code is Code.INTERNAL
    assert kinds(hospital) == ["RESERVED", "STARTED"]
    hospital.allow(require_dp=False)
    assert refusal(local_round, hospital.open(), hospital.plan(), 1, {}).code is Code.TENSORS


FAULTS = [RuntimeError("x"), MemoryError(), KeyError("sub-01"), Refused(Code.DATA, "sub-01", "x"), OSError(5, "x")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("place", ["load", "difference", "check_update_norm", "spend"])
def test_after_start_every_failure_is_the_same_code(make_hospital, monkeypatch, place, fault):
    """A patient who is drawn, or not, must not decide which code leaves."""
    hospital = make_hospital()
    site, plan = hospital.open(), hospital.private_plan(sample_rate=0.5, steps=12)
    site.prepare(plan)

    def fail(*_, **__):
        raise fault

    owner = {"load": FeatureCache, "spend": Reservation}.get(place, story)
    real_start = Reservation.start
    monkeypatch.setattr(Reservation, "start", lambda own: real_start(own) or monkeypatch.setattr(owner, place, fail))
    assert refusal(local_round, site, plan, 1, {}).code is Code.INTERNAL
    assert kinds(hospital) == ["RESERVED", "STARTED"]


def test_mutant_without_the_rule_the_code_tells_what_went_wrong(make_hospital, monkeypatch):
    hospital = make_hospital(max_update_norm=1e-9)
    monkeypatch.setattr(story, "one_code", contextlib.nullcontext)
    assert refusal(local_round, hospital.open(), hospital.private_plan(), 1, {}).code is Code.TENSORS


def test_a_tightened_policy_counts_without_a_restart(make_hospital):
    hospital = make_hospital(require_dp=False)
    site, plan = hospital.open(), hospital.plan()
    update = local_round(site, plan, 1, {}).update
    hospital.allow(require_dp=True)
    assert refusal(local_round, site, plan, 2, {}).code is Code.PLAN
    assert refusal(finish, site, plan, update).code is Code.PLAN
    hospital.allow(require_dp=False, min_patients=50)
    assert refusal(local_round, site, plan, 2, {}).code is Code.COHORT
    hospital.allow(min_patients=2)
    path = hospital.root / "site.yaml"
    text = path.read_text()
    for broken in ("policy: [", text + "surprise: 1\n", ""):
        path.write_text(broken)
        assert refusal(local_round, site, plan, 2, {}).code is Code.CONFIG
        assert refusal(finish, site, plan, update).code is Code.CONFIG
    path.unlink()
    assert refusal(local_round, site, plan, 2, {}).code is Code.CONFIG
    path.write_text(text)
    assert local_round(site, plan, 2, {}).update


def test_mutant_a_policy_that_is_read_once_lets_the_round_through(make_hospital, monkeypatch):
    hospital = make_hospital(require_dp=False)
    site = hospital.open()
    monkeypatch.setattr(Site, "read_policy", lambda own: own.files.config.policy)
    hospital.allow(require_dp=True)
    assert local_round(site, hospital.plan(), 1, {}).update


def test_a_final_head_of_a_plan_beyond_the_policy_is_not_kept(make_hospital, monkeypatch):
    hospital = make_hospital()  # requires DP
    site, plan = hospital.open(), hospital.plan()
    assert refusal(finish, site, plan, {}).code is Code.PLAN
    assert not (hospital.root / "heads").exists()
    assert not (hospital.root / "cache").exists()
    monkeypatch.setattr(story, "check", lambda *_: None)  # the mutant
    finish(site, plan, {})
    assert (hospital.root / "heads" / "current.safetensors").exists()


def test_a_patient_who_opts_out_between_two_rounds_is_gone(make_hospital):
    hospital = make_hospital(require_dp=False)
    site, plan = hospital.open(), hospital.plan()
    local_round(site, plan, 1, {})
    cohort = site.prepare(plan).cohort
    victim = cohort.train[2]
    places = [entry.path for entry in cohort.entries[victim]]
    write_participants(hospital.data, {victim: "yes"})
    read: list[Path] = []
    real = FeatureCache.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureCache, "load", lambda cache, entry: read.append(entry.path) or real(cache, entry))
        local_round(site, plan, 2, {})
    assert read
    assert not set(places) & set(read)
    assert not any(path.exists() for path in places)
    assert victim not in site.prepare(plan).cohort.entries


def test_a_cache_that_was_emptied_is_filled_again_before_the_round_is_charged(make_hospital, monkeypatch):
    hospital = make_hospital()
    site, plan = hospital.open(), hospital.private_plan(sample_rate=0.5, steps=4)
    local_round(site, plan, 1, {})
    shutil.rmtree(hospital.root / "cache")
    whole: list[bool] = []
    real = Reservation.start
    monkeypatch.setattr(
        Reservation,
        "start",
        lambda own: whole.append(site._workspaces[next(iter(site._workspaces))].cohort.is_whole()) or real(own),
    )
    local_round(site, plan, 2, {})
    assert whole == [True]
    assert kinds(hospital) == ["RESERVED", "STARTED", "SPENT"] * 2


def test_broken_scans_leave_fewer_patients_than_the_plan_needs(make_hospital):
    """The listing was enough, the images are not: refused before the budget is touched for good."""
    hospital = make_hospital(min_patients=5)
    for path in sorted(hospital.data.glob("sub-*/anat/*"))[:6]:
        path.write_bytes(b"")
    assert refusal(local_round, hospital.open(), hospital.private_plan(), 1, {}).code is Code.COHORT
    assert kinds(hospital) == ["RESERVED", "RELEASED"]


def test_a_broken_scan_is_no_obstacle(make_hospital):
    hospital = make_hospital(require_dp=False)
    site, plan = hospital.open(), hospital.plan()
    victim = site.prepare(plan).cohort.train[0]
    shutil.rmtree(hospital.root / "cache")
    (hospital.data / victim / "anat" / f"{victim}_T1w.nii.gz").write_bytes(b"\x1f\x8b broken")
    site = hospital.open()
    assert local_round(site, plan, 1, {}).update
    assert [s.where.endswith(f"{victim}_T1w.nii.gz") for s in site.prepare(plan).cohort.skipped] == [True]


def test_only_agreed_numbers_go_back(make_hospital):
    hospital = make_hospital(require_dp=False)
    site = hospital.open()
    plain = local_round(site, hospital.plan(), 1, {}).metrics
    private = local_round(site, hospital.private_plan(), 1, {}).metrics
    assert set(plain) == {"patients_bucket", "steps"}
    assert set(private) == {"steps", "epsilon"}  # the cohort's size is a function of who is in it
    count = len(site.prepare(hospital.plan()).cohort.train)
    assert plain["patients_bucket"] <= count < 2 * plain["patients_bucket"]
    assert plain["patients_bucket"] in (1, 2, 4, 8)
    for numbers in (plain, private):
        assert set(agreed_metrics(dict(numbers))) == set(numbers)  # none is dropped or unknown at the wall


def test_history_stays_at_the_site(make_hospital):
    hospital = make_hospital(require_dp=False)
    site, plan = hospital.open(), hospital.plan()
    replies = [local_round(site, plan, number, {}) for number in (1, 2)]
    finish(site, plan, {})
    lines = [json.loads(line) for line in (hospital.root / "history" / "test.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert all(10 < line["psnr"] < 60 for line in lines)
    for reply in replies:
        assert not any("psnr" in name for name in reply.metrics)


def test_a_torn_line_of_the_history_harms_no_other(make_hospital):
    hospital = make_hospital(require_dp=False)
    site, plan = hospital.open(), hospital.plan()
    local_round(site, plan, 1, {})
    path = hospital.root / "history" / "test.jsonl"
    path.write_bytes(path.read_bytes() + b'{"round": 1, "ps')  # killed in the middle of a line
    local_round(site, plan, 2, {})
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i])["round"] for i in (0, 2)] == [0, 1]
    assert lines[1] == '{"round": 1, "ps'
    assert path.stat().st_mode & 0o077 == 0


def test_finish_keeps_the_final_head(make_hospital):
    hospital = make_hospital(require_dp=False)
    site, plan = hospital.open(), hospital.plan()
    update = local_round(site, plan, 1, {}).update
    finish(site, plan, update)
    current, arch = load_head(hospital.root / "heads" / "current.safetensors", encoder_digest=hospital.encoder)
    assert arch == MINI
    expected = dict(site.prepare(plan).head_at(update).named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in current.named_parameters())
    assert file_digest(hospital.root / "heads" / "test.safetensors") == file_digest(
        hospital.root / "heads" / "current.safetensors"
    )


def test_artifacts_must_be_there_and_be_themselves(make_hospital):
    hospital = make_hospital(require_dp=False)
    other = "sha256:" + "0" * 64
    assert refusal(local_round, hospital.open(), hospital.plan(encoder=other), 1, {}).code is Code.STATE
    path = hospital.root / "store" / hospital.encoder.replace(":", "-")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert refusal(local_round, hospital.open(), hospital.plan(), 1, {}).code is Code.DIGEST


def test_encoder_and_head_must_belong_together(make_hospital, tmp_path):
    hospital = make_hospital(require_dp=False)
    digest = file_digest(HEAD)
    shutil.copy(HEAD, hospital.root / "store" / digest.replace(":", "-"))
    assert refusal(local_round, hospital.open(), hospital.plan(head=digest), 1, {}).code is Code.TENSORS


def test_a_site_that_has_not_joined_cannot_open(tmp_path, make_hospital):
    hospital = make_hospital()
    (hospital.root / "keys" / "coordinator.pub").unlink()
    assert refusal(Site.open, hospital.root).code is Code.STATE
    assert refusal(Site.open, tmp_path / "nowhere").code is Code.CONFIG


def test_the_default_policy_asks_for_dp():
    assert Policy().require_dp


def test_a_round_on_warped_patients_with_the_packaged_weights(make_hospital):
    """The real preset at 224 px, on other axes than the canonical ones, plain and private."""
    hospital = make_hospital(require_dp=False)
    shutil.rmtree(hospital.data)
    make_warped(hospital.data, "west", 4, seed=3, slices=1)
    digests = {"encoder": file_digest(ENCODER), "head": file_digest(HEAD)}
    for role, path in (("encoder", ENCODER), ("head", HEAD)):
        shutil.copy(path, hospital.root / "store" / digests[role].replace(":", "-"))
    local = {"steps": 2, "batch_slices": 1, "learning_rate": 1e-4}
    site = hospital.open()
    plain = local_round(site, hospital.plan(**digests, local=local), 1, {})
    assert 0 < story.norm(plain.update) < 10
    plan = hospital.private_plan(sample_rate=0.4, expected_patients=1.5, steps=1, trainable="tail")
    private = local_round(site, plan.model_copy(update=digests), 1, {})
    assert all(name.startswith("tail.") for name in private.update)
    history = (hospital.root / "history" / "test.jsonl").read_text().splitlines()
    assert json.loads(history[0])["psnr"] > 22  # the warm head is better than the noisy input, about 20 dB
