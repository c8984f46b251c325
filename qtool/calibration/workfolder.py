"""The working folder of a calibration: finished layers and the two streams behind them, from which a killed run goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from typing_extensions import override

from qtool.errors import ModelError, UsageError
from qtool.formats.floats import U8, Float32
from qtool.storage.atomic import atomic_write, named_write_errors

if TYPE_CHECKING:
    import torch

    from qtool.calibration.gradients import LayerGradients
    from qtool.calibration.streams import Streams
    from qtool.scoring.transformers.activations import ActivationStore

States = Iterable[tuple[Hashable, "torch.Size"]]
"""Where tensors lie in a store, and their shapes."""

SUFFIX: Final = ".calibration"
_COVARIANCE: Final = "covariance:"
_STREAMS: Final = "streams"
_KEY: Final = "calibration.json"


@dataclass(frozen=True)
class RoundedLinear:
    """One quantized linear and what is known of it; its arrays lie in the layer's file.

    `relative_error` is |w - q| / |w|; `output_error` and `max_output_error` are of its output on the calibration inputs,
    over the RMS of the output, for this rounding and for plain `max`; `predicted_gain` is of its fused group.
    `source_crc32` is of the float32 values that were rounded, `checksums` (encoded) of the codes and block scales: by them
    a verification tells these bytes, made of that reference, from any others.
    """

    hf_name: str
    group: str
    global_scale: float
    relative_error: float
    output_error: float
    max_output_error: float
    predicted_gain: float
    source_crc32: int
    checksums: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkFolder:
    """A folder that this run alone writes."""

    path: Path

    @property
    def finished(self) -> int:
        """How many layers can be taken over: their files and the streams behind the last of them are there."""
        count = 0
        while self._layer(count).is_file():
            count += 1
        return next((number for number in range(count, 0, -1) if self._states(_STREAMS, number).is_file()), 0)

    def save_layer(self, layer: int, linears: Mapping[RoundedLinear, tuple[U8, U8]]) -> None:
        """Write a finished layer: facts, and codes and block scales by hf_name."""
        facts = json.dumps([asdict(linear) for linear in linears]).encode()
        arrays = {"facts": np.frombuffer(facts, np.uint8)}
        for linear, (packed, block_scales) in linears.items():
            arrays |= {f"{linear.hf_name}:packed": packed, f"{linear.hf_name}:scales": block_scales}
        with atomic_write(self._layer(layer)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def linears(self, layer: int) -> list[RoundedLinear]:
        """The facts of a finished layer."""
        with np.load(self._layer(layer)) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
        return [RoundedLinear(**{**each, "warnings": tuple(each["warnings"])}) for each in facts]

    def arrays(self, layer: int, hf_name: str) -> tuple[U8, U8]:
        """The codes and block scales of a linear of a finished layer."""
        with np.load(self._layer(layer)) as arrays:
            return arrays[f"{hf_name}:packed"], arrays[f"{hf_name}:scales"]

    def save_streams(self, layers: int, streams: Streams) -> None:
        """Write both streams as they are after `layers` layers, in the place of older ones."""
        self.save_states(_STREAMS, layers, streams.store, streams.states())

    def load_streams(self, layers: int, streams: Streams) -> None:
        """Read them back."""
        self.load_states(_STREAMS, layers, streams.store, streams.states())

    def save_states(self, name: str, number: int, store: ActivationStore, states: States) -> None:
        """Write tensors of a store, in the place of those of the number before or after."""
        with atomic_write(self._states(name, number)) as file:
            for key, _ in states:
                file.write(store[key].cpu().numpy().data)
        for other in (number - 1, number + 1):
            self._states(name, other).unlink(missing_ok=True)

    def load_states(self, name: str, number: int, store: ActivationStore, states: States) -> None:
        """Read them back."""
        import torch

        path = self._states(name, number)
        with path.open("rb") as file:
            for key, shape in states:
                state = torch.empty(shape)
                if file.readinto(state.numpy().data) != state.nbytes:
                    raise ModelError(
                        f"{path} is shorter than the streams of this run.",
                        f"Remove {self.path} to start over.",
                    )
                store[key] = state

    def forget_states(self, name: str) -> None:
        """Remove what `save_states` wrote last."""
        for path in self.path.glob(f"{name}-*.bin"):
            path.unlink()

    # The gradients of the answer, of all layers or of the last ones.

    def layers_without_gradients(self, layers: int) -> int:
        """How many layers, from the first, have no gradients yet."""
        return next((layer + 1 for layer in range(layers - 1, -1, -1) if not self._gradients(layer).is_file()), 0)

    def save_gradients(self, layer: int, found: LayerGradients) -> None:
        """Write what `gradients` found of a layer."""
        arrays = {f"squares:{name}": np.concatenate(parts) for name, parts in found.squares.items()}
        arrays |= {f"{_COVARIANCE}{linear}": each for linear, each in found.covariances.items()}
        with atomic_write(self._gradients(layer)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def gradients(self, layer: int, tokens: Sequence[int]) -> LayerGradients:
        """Those of a layer, whose covariances are read when they are asked for; `tokens` are those of each pass."""
        from qtool.calibration.gradients import LayerGradients

        kind, path = "squares:", self._gradients(layer)
        with np.load(path) as arrays:
            squares = {
                key.removeprefix(kind): np.split(arrays[key], np.cumsum(tokens)[:-1])
                for key in arrays.files
                if key.startswith(kind)
            }
        return LayerGradients(squares, _StoredCovariances(path))

    def remove(self) -> None:
        """Remove the folder, once its results are elsewhere."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _layer(self, number: int) -> Path:
        return self.path / f"layer-{number:04}.npz"

    def _states(self, name: str, number: int) -> Path:
        return self.path / f"{name}-{number:04}.bin"

    def _gradients(self, layer: int) -> Path:
        return self.path / f"gradients-{layer:04}.npz"


@dataclass(frozen=True)
class _StoredCovariances(Mapping[str, Float32]):
    """By linear, from a layer's file: those of the 2B shape have 360 MB together."""

    path: Path

    @override
    def __getitem__(self, linear: str) -> Float32:
        with np.load(self.path) as arrays:
            found: Float32 = arrays[f"{_COVARIANCE}{linear}"]
            return found

    @override
    def __iter__(self) -> Iterator[str]:
        with np.load(self.path) as arrays:
            yield from (key.removeprefix(_COVARIANCE) for key in arrays.files if key.startswith(_COVARIANCE))

    @override
    def __len__(self) -> int:
        return sum(1 for _ in self)


@contextmanager
def work_folder(output: Path, key: Mapping[str, Any], *, force: bool) -> Iterator[WorkFolder]:
    """The working folder beside `output`, new or of an interrupted run with the same `key`, and locked.

    Raises UsageError where it belongs to another calibration (`force` starts over) or another run is writing it.
    """
    path = output.with_name(output.name + SUFFIX)
    text = json.dumps(key, indent=2, sort_keys=True)
    with named_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"Another run is writing {path}.", "Wait until it has ended, or choose another --output."
                ) from None
            _prepare(path, text, force=force)
            yield WorkFolder(path)
        finally:
            os.close(descriptor)


def _prepare(path: Path, text: str, *, force: bool) -> None:
    known = path / _KEY
    if known.is_file() and known.read_text(encoding="utf-8") == text:
        return
    left = [each for each in path.iterdir() if not each.name.endswith(".new")]
    if left and not known.is_file():
        raise UsageError(f"{path} exists and was not written by qtool quantize.", "Choose another --output.")
    if left and not force:
        raise UsageError(
            f"{path} holds an interrupted calibration with another model, recipe, effort or data.",
            "Run it with the same options to go on, or pass --force to start over.",
        )
    for each in left:
        each.unlink()
    with atomic_write(known) as file:
        file.write(text.encode())
