"""llama.cpp as an oracle: its own converter, and the sources that `make engines` compiles its quantizer from.

One pinned release, checked by its hash, is unpacked in `.engines`; a checkout named by QTOOL_LLAMA_CPP takes precedence.

`python -m tests.upstream` fetches it: 77 MB, of which 55 MB stay. The source distribution of llama-cpp-python carries
llama.cpp with the gguf-py that belongs to it, so PyPI is all that is needed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

VERSION = "0.3.36"
URL = (
    "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    f"llama_cpp_python-{VERSION}.tar.gz"
)
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

ENGINES = Path(__file__).parent.parent / ".engines"
SOURCES = ENGINES / "llama.cpp"
PROGRAMS = ENGINES / "bin"
PACKAGES = ENGINES / "python"
"""Where the package `llama_cpp` lies; its library lies in PROGRAMS."""

_ROOT = f"llama_cpp_python-{VERSION}"
_PARTS = (
    *("convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/"),
    *("CMakeLists.txt", "LICENSE", "licenses/", "cmake/", "common/", "ggml/", "include/", "src/", "tools/", "vendor/"),
)
_RUNNER = """
import runpy, sys
converter, *sys.argv[1:] = sys.argv[1:]
root = converter.rpartition("/")[0]
sys.path[:0] = [root + "/gguf-py", root]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv[0] = converter
runpy.run_path(converter, run_name="__main__")
"""
"""It refuses tokenizers whose hash it does not know, as the demo models'; all of the family split words as Qwen2 does."""


class NotHere(Exception):  # noqa: N818 - not a mistake, but a reason to skip
    """llama.cpp has not been fetched."""


def converter() -> Path:
    """llama.cpp's convert_hf_to_gguf.py; raises NotHere, with the way to get it, where there is none."""
    root = Path(os.environ.get("QTOOL_LLAMA_CPP") or SOURCES)
    path = root.absolute() / "convert_hf_to_gguf.py"
    if not path.is_file():
        raise NotHere(f"{path} is missing: run `python -m tests.upstream`, or let QTOOL_LLAMA_CPP name a checkout")
    return path


def command(folder: Path, outfile: Path, outtype: str) -> list[str]:
    """The command line of its converter."""
    arguments = [str(folder), "--outfile", str(outfile.absolute()), "--outtype", outtype]
    return [sys.executable, "-c", _RUNNER, str(converter()), *arguments]


def convert(model: Path, outfile: Path, outtype: str, *, mmproj: bool = False, as_reranker: bool = False) -> Path:
    """Write `outfile` with llama.cpp's converter, which takes a model for a reranker when its folder is called so."""
    is_vision = json.loads((model / "config.json").read_text())["model_type"] == "qwen3_vl"
    name = {(True, True): "qwen3-vl-reranker", (True, False): "qwen3-reranker"}.get((as_reranker, is_vision), "model")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, name)
        folder.symlink_to(model.absolute())
        more = ["--mmproj"] if mmproj else []
        done = subprocess.run([*command(folder, outfile, outtype), *more], capture_output=True, text=True, check=False)
    if done.returncode or not outfile.is_file():
        raise RuntimeError(f"llama.cpp's converter failed:\n{done.stderr[-3000:]}")
    return outfile


def fetch() -> None:
    """Download and unpack the pinned release unless it is there."""
    stamp = SOURCES / "qtool-sha256"
    if stamp.is_file() and stamp.read_text() == SHA256:
        return
    for folder in (SOURCES, PACKAGES / "llama_cpp", ENGINES / "build"):  # of another release, its objects included
        shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(_download())) as archive:
        _unpack(archive, f"{_ROOT}/vendor/llama.cpp/", _PARTS, SOURCES)
        _unpack(archive, f"{_ROOT}/", ("llama_cpp/",), PACKAGES)
    stamp.write_text(SHA256)


def _download() -> bytes:
    with urllib.request.urlopen(URL) as response:  # noqa: S310 - that one address
        content = response.read()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{URL} has the SHA-256 {found}, expected {SHA256}")
    return content


def _unpack(archive: tarfile.TarFile, root: str, parts: tuple[str, ...], target: Path) -> None:
    members = []
    for member in archive.getmembers():
        name = member.name.removeprefix(root)
        if name != member.name and name.startswith(parts) and member.isfile():
            members.append(member.replace(name=name, deep=False))
    archive.extractall(target, members, filter="data")


if __name__ == "__main__":
    fetch()
