"""Privacy records: immutable, canonical, and without an epsilon."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from sspformer.contract.plan import PrivateTraining
from sspformer.contract.privacy import MechanismEvent

EVENT = MechanismEvent(sample_rate=0.2, noise_multiplier=1.31, steps=5, clipping_norm=0.5)


def test_canonical_bytes_are_stable_and_say_what_the_numbers_protect():
    assert EVENT.canonical() == (
        b'{"adjacency":"add-remove","clipping_norm":0.5,"noise_multiplier":1.31,"sample_rate":0.2,"steps":5,"unit":"patient"}'
    )
    assert MechanismEvent.model_validate_json(EVENT.canonical()) == EVENT


def test_no_epsilon_is_stored():
    assert not {"epsilon", "eps", "delta"} & set(MechanismEvent.model_fields)
    with pytest.raises(ValidationError):
        MechanismEvent.model_validate({**json.loads(EVENT.canonical()), "epsilon": 1.0})


def test_records_do_not_change():
    with pytest.raises(ValidationError):
        EVENT.steps = 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"sample_rate": 0},
        {"sample_rate": 1.01},
        {"steps": 0},
        {"clipping_norm": 0},
        {"unit": "slice"},
        {"adjacency": "replace-one"},
    ],
)
def test_what_has_no_guarantee_is_no_record(wrong):
    with pytest.raises(ValidationError):
        MechanismEvent.model_validate({**json.loads(EVENT.canonical()), **wrong})


def test_event_of_a_plan_counts_the_steps_of_all_rounds():
    private = PrivateTraining(
        expected_patients=9.6, noise_multiplier=1.31, clipping_norm=0.5, learning_rate=3e-4, steps=5
    )
    assert MechanismEvent.of(private) == EVENT
    assert MechanismEvent.of(private, rounds=15).steps == 75


def test_the_record_loads_no_torch():
    code = "import sys, sspformer.contract.privacy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
