"""K- and I-quants, which llama.cpp makes: by its program `llama-quantize`, or by its library with the same arguments.

The file that llama.cpp writes is read again, to check that nothing was lost that must be kept.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from qtool.errors import ModelError, SetupError, UsageError
from qtool.export.gguf_plan import LLAMA_QUANTIZE_TYPES
from qtool.export.tensor_types import TensorType, chosen_types
from qtool.formats.ggml import FLOAT_TYPES, Q8_0
from qtool.progress import Progress, ignore
from qtool.storage.gguf import GgufFile, GgufTensor, read_gguf
from qtool.storage.gguf_model import RANK_HEAD, TOKEN_EMBEDDING

PROGRAM: Final = "llama-quantize"
LIBRARY: Final = "llama_cpp"
_SUPER_BLOCK: Final = 256  # values that every K-quant and IQ4_XS packs together
_CHANGED_KEYS: Final = ("general.file_type",)
_STEP: Final = re.compile(r"\[ *(\d+)/ *(\d+)\]")
_NO_IMATRIX_DATA: Final = re.compile(r"did not find weights for (blk\.\S+)")
_TAIL: Final = 8


@dataclass(frozen=True)
class Quantizer:
    """A command that takes the arguments of `llama-quantize`."""

    name: str
    command: tuple[str, ...]

    def quantize(
        self,
        source: Path,
        target: Path,
        type_name: str,
        imatrix: Path | None = None,
        progress: Progress = ignore,
        tensor_types: Sequence[TensorType] = (),
    ) -> None:
        """Write `source`, a file of F32, F16 or BF16 tensors, as `target` in one of LLAMA_QUANTIZE_TYPES.

        The rank head keeps its element type, the token embedding becomes Q8_0 in every type, and all metadata but the
        file type is kept; the first of `tensor_types` that matches a matrix is its type. Raises ModelError for a source that cannot be quantized to the type, and SetupError where
        llama.cpp fails or its file is not as requested; then no target is left.
        """
        header = read_gguf(source)
        _require_quantizable(header, type_name, tensor_types)
        if imatrix is not None and not imatrix.is_file():
            raise UsageError(f"No such file: --imatrix {imatrix}.")
        try:
            output = self._run(_arguments(header, source, target, type_name, imatrix, tensor_types), imatrix, progress)
            _check_imatrix_used(imatrix, output)
            _check(self.name, header, target, type_name, tensor_types)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def _run(self, arguments: list[str], imatrix: Path | None, progress: Progress) -> list[str]:
        # The path of the matrix is written into the metadata; run in its folder, this is only its name.
        folder = imatrix.absolute().parent if imatrix else None
        with subprocess.Popen(  # noqa: S603 - llama.cpp's program, or this Python
            [*self.command, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                output = list(_output_lines(process, progress))
            except BaseException:  # on Ctrl-C, Popen would wait for it
                process.kill()
                process.wait()
                raise
        if process.returncode:
            tail = "\n".join(output[-_TAIL:]) or "It printed nothing."
            raise SetupError(f"{self.name} failed with exit status {process.returncode}:\n{tail}", _UPDATE)
        return output


def find_quantizer() -> Quantizer:
    """`llama-quantize` on PATH, else the library of an installed llama-cpp-python; raises SetupError without either."""
    program = shutil.which(PROGRAM)
    if program is not None:
        program = str(Path(program).absolute())  # it is started in another folder
        return Quantizer(program, (program,))
    if find_spec(LIBRARY) is not None:
        # In a process of its own, since llama.cpp prints, and aborts the process on a failed assertion.
        return Quantizer("llama-cpp-python", (sys.executable, "-m", "qtool.export.libllama"))
    wanted = ", ".join(LLAMA_QUANTIZE_TYPES)
    raise SetupError(
        f"{wanted} need llama.cpp: found neither {PROGRAM} on PATH nor the package llama-cpp-python.", _INSTALL
    )


_INSTALL: Final = (
    "Put a llama.cpp release (https://github.com/ggml-org/llama.cpp/releases) on PATH, "
    "or compile its library (needs a C++ compiler and some ten minutes): pip install 'llama-cpp-python>=0.3.36'"
)
_UPDATE: Final = "Update llama.cpp: qtool is tested with that of llama-cpp-python 0.3.36."


def _require_quantizable(source: GgufFile, type_name: str, tensor_types: Sequence[TensorType]) -> None:
    chosen = chosen_types(tensor_types, source.tensors)
    for tensor in source.tensors.values():
        where = f"{source.name}: {tensor.gguf_name} {list(tensor.shape)}"
        if tensor.type not in FLOAT_TYPES:
            raise ModelError(f"{where} is {tensor.type.name}; {type_name} needs F32, F16 or BF16.")
        block = Q8_0.block if tensor.gguf_name == TOKEN_EMBEDDING else _SUPER_BLOCK
        if _is_quantized(tensor) and tensor.gguf_name not in chosen and tensor.shape[-1] % block:
            raise ModelError(
                f"{where}: The row length is not a multiple of {block}, the block size of {type_name}.",
                "llama.cpp would silently choose another type. Use q8_0 or f16, which take this model.",
            )


def _is_quantized(tensor: GgufTensor) -> bool:
    """Whether llama.cpp, given `_arguments`, quantizes this tensor of a language model."""
    return len(tensor.shape) > 1 and not tensor.gguf_name.endswith("_norm.weight") and tensor.gguf_name != RANK_HEAD


def _arguments(
    header: GgufFile,
    source: Path,
    target: Path,
    type_name: str,
    imatrix: Path | None,
    tensor_types: Sequence[TensorType],
) -> list[str]:
    arguments = ["--token-embedding-type", Q8_0.name.lower()]
    if RANK_HEAD in header.tensors:  # the left side is a regular expression, searched in each name
        pattern = re.escape(RANK_HEAD.removesuffix(".weight"))
        arguments += ["--tensor-type", f"{pattern}={header.tensors[RANK_HEAD].type.name.lower()}"]
    for each in tensor_types:
        arguments += ["--tensor-type", each.argument]
    if imatrix is not None:
        arguments += ["--imatrix", imatrix.name]
    return [*arguments, str(source.absolute()), str(target.absolute()), type_name.upper()]


def _output_lines(process: subprocess.Popen[str], progress: Progress) -> Iterator[str]:
    """The output of a quantizer line by line; its count of tensors goes to `progress`."""
    for line in process.stdout or ():
        if step := _STEP.match(line):
            progress(int(step[1]), int(step[2]))
        if text := line.strip():
            yield text


def _check_imatrix_used(imatrix: Path | None, output: list[str]) -> None:
    missing = [match[1] for line in output if (match := _NO_IMATRIX_DATA.search(line))]
    if missing:  # llama.cpp only warns
        raise UsageError(
            f"--imatrix {imatrix} has no data for {missing[0]} (matrices without data: {len(missing)}).",
            "Check that it was made for this model.",
        )


def _check(name: str, source: GgufFile, target: Path, type_name: str, tensor_types: Sequence[TensorType]) -> None:
    try:
        faults = list(_faults(source, read_gguf(target), type_name, tensor_types))
    except ModelError as error:  # also for a full disk, which llama.cpp does not notice
        raise SetupError(
            f"{name} wrote an incomplete file: {error.message}", "Check that the disk is not full."
        ) from None
    if faults:
        raise SetupError(f"{name} wrote another file than requested: {'; '.join(faults)}.", _UPDATE)


def _faults(source: GgufFile, made: GgufFile, type_name: str, tensor_types: Sequence[TensorType]) -> Iterator[str]:
    if made.get("general.file_type") != LLAMA_QUANTIZE_TYPES[type_name]:
        yield f"the file type is {made.get('general.file_type')}, not {type_name}"
    for key, value in source.metadata.items():
        if key not in _CHANGED_KEYS and made.metadata.get(key) != value:
            yield f"the metadata {key} is {'changed' if key in made.metadata else 'lost'}"
    before = {gguf_name: tensor.shape for gguf_name, tensor in source.tensors.items()}
    if before != {gguf_name: tensor.shape for gguf_name, tensor in made.tensors.items()}:
        yield "the tensors are not those of the source"
        return
    chosen = chosen_types(tensor_types, source.tensors)
    for gguf_name, tensor in made.tensors.items():
        if gguf_name == TOKEN_EMBEDDING:
            wanted = Q8_0
        elif not _is_quantized(tensor):
            wanted = source.tensors[gguf_name].type
        elif gguf_name in chosen:
            wanted = chosen[gguf_name].type
        else:
            continue
        if tensor.type != wanted:
            yield f"{gguf_name} is {tensor.type.name}, not {wanted.name}"
