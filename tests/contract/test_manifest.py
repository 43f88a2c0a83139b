"""The manifest."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sspformer.contract.envelope import seal
from sspformer.contract.errors import Code, Refused
from sspformer.contract.manifest import Artifact, Manifest, blob_name, seal_manifest, verify_manifest

KEY = Ed25519PrivateKey.generate()
ENCODER = {
    "role": "encoder",
    "digest": "sha256:" + "a" * 64,
    "bytes": 100,
    "preset": "tiny",
    "task": None,
    "file_name": "encoder.safetensors",
}
HEAD = ENCODER | {"role": "head", "digest": "sha256:" + "b" * 64, "task": "denoise"}
FINE = {"federation": "demo", "sequence": 1, "artifacts": [ENCODER, HEAD]}


def test_a_manifest_reads_back():
    manifest = Manifest.model_validate(FINE)
    assert verify_manifest(seal_manifest(manifest, KEY), KEY.public_key()) == manifest
    assert manifest.encoder == Artifact.model_validate(ENCODER)
    assert manifest.head.task == "denoise"
    assert manifest.head.blob_name == blob_name(manifest.head.digest) == "sha256-" + "b" * 64


WRONG = {
    "no artifacts": FINE | {"artifacts": []},
    "two encoders": FINE | {"artifacts": [ENCODER, ENCODER, HEAD]},
    "no head": FINE | {"artifacts": [ENCODER]},
    "path in the digest": FINE | {"artifacts": [ENCODER | {"digest": "sha256:../../keys"}, HEAD]},
    "line end after the digest": FINE | {"artifacts": [ENCODER | {"digest": "sha256:" + "a" * 64 + "\n"}, HEAD]},
    "path in the file name": FINE | {"artifacts": [ENCODER | {"file_name": "../x"}, HEAD]},
    "no bytes": FINE | {"artifacts": [ENCODER | {"bytes": 0}, HEAD]},
    "too many bytes": FINE | {"artifacts": [ENCODER | {"bytes": 1 << 40}, HEAD]},
    "bytes as text": FINE | {"artifacts": [ENCODER | {"bytes": "100"}, HEAD]},
    "an unknown field": FINE | {"run": "code"},
    "sequence zero": FINE | {"sequence": 0},
}


@pytest.mark.parametrize("payload", WRONG.values(), ids=WRONG.keys())
def test_a_signed_but_wrong_manifest_is_refused(payload):
    with pytest.raises(Refused) as refusal:
        verify_manifest(seal("manifest", payload, KEY), KEY.public_key())
    assert refusal.value.code == Code.FORMAT
