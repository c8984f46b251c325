"""What llama.cpp's own converter writes for the demo models, as digests; `python -m tests.export.digests` makes them anew.

That needs llama.cpp's converter (see tests/upstream.py); the tests need only the digests.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qtool.storage.gguf import encode_value, read_gguf
from tests.export.models import MODELS, RERANKERS, WITH_PICTURES

STORED = Path(__file__).with_name("upstream_digests.json")
TYPES = ("f32", "f16", "bf16", "q8_0")


def digest(path):
    """Types and digests of the tensors, digests of the metadata values, of one GGUF file."""
    gguf = read_gguf(path)
    data = path.read_bytes()

    def of_tensor(tensor):
        content = hashlib.sha256(data[tensor.offset : tensor.offset + tensor.nbytes]).hexdigest()
        return [tensor.type.name, list(tensor.shape), content]

    return {
        "tensors": {name: of_tensor(tensor) for name, tensor in gguf.tensors.items()},
        "metadata": {key: hashlib.sha256(encode_value(value)).hexdigest() for key, value in gguf.metadata.items()},
    }


def main(folder):
    from tests import upstream

    digests = {}
    for name, make in MODELS.items():
        model = make(folder / name)
        for outtype in TYPES:
            for mmproj in (False, True) if name in WITH_PICTURES else (False,):
                path = folder / f"{name}-{outtype}-{mmproj}.gguf"
                upstream.convert(model, path, outtype, mmproj=mmproj, as_reranker=name in RERANKERS)
                digests[f"{name} {outtype} {'mmproj' if mmproj else 'model'}"] = digest(path)
    STORED.write_text(json.dumps(digests, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
