"""A checkpoint's tokenizer as transformers, and with it vLLM and SGLang, build it: by AutoTokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.errors import ModelError


@dataclass(frozen=True)
class AutoTokenized:
    """An AutoTokenizer."""

    tokenizer: Any

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, with what the tokenizer itself adds; longer ones than it takes are cut, as engines do.

        Raises ModelError where it fails.
        """
        with _guarded():
            encoded = self.tokenizer(list(texts), truncation=True)["input_ids"]
            return [[int(each) for each in ids] for ids in encoded]


def read_auto_tokenizer(directory: Path) -> AutoTokenized:
    """The tokenizer in `directory`; code that it names there is never run. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    with _guarded():
        built = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    return AutoTokenized(built)


@contextmanager
def _guarded() -> Iterator[None]:
    """What a stranger's tokenizer makes transformers say or raise: silence and ModelError."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{reason:.300}") from error
    finally:
        logging.set_verbosity(verbosity)
