"""The schema of a panel's lines, which is strict: unknown fields and values of other types are errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from qtool.errors import UsageError
from qtool.inputs.items import is_text

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def _as_tuple(value: Any) -> Any:
    # Strict mode takes no list for a tuple, and a side of one text may be written without brackets.
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str) else value


def _as_videos(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list):
        return tuple({"file": video} if isinstance(video, str) else video for video in value)
    return value


def _as_sides(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


def _not_a_flag(value: Any) -> Any:
    # bool is a subclass of int, and `"label": true` is a mistake more often than a grade.
    if isinstance(value, bool):
        message = "Expected a number, not true or false"
        raise ValueError(message)  # noqa: TRY004 - pydantic reports ValueError only
    return value


Side = Annotated[tuple[str, ...] | None, BeforeValidator(_as_tuple)]
HIGHEST_GRADE: Final = 100
MOST_FRAMES: Final = 1 << 16
Grade = Annotated[Annotated[float, Field(ge=0, le=HIGHEST_GRADE, allow_inf_nan=False)], BeforeValidator(_not_a_flag)]
Id = Annotated[str, Field(min_length=1)]
MOST_PIXELS: Final = 1 << 26
"""Of a picture that a panel asks for, 37 times the official bound: pictures are made larger up to `min_pixels`."""
Pixels = Annotated[int | None, Field(ge=1, le=MOST_PIXELS)]


def _no_lone_surrogates(value: Any) -> Any:
    # JSON may contain one as \ud83d, Python keeps it, and no tokenizer or server takes it.
    if isinstance(value, str) and not is_text(value):
        message = "Text contains a lone surrogate (half of a character)"
        raise ValueError(message)
    return value


Text = Annotated[str, BeforeValidator(_no_lone_surrogates)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class HeaderLine(_Line):
    """The first line of a published panel."""

    qtool_panel: Literal[1]
    name: Id
    license: str
    modality: Literal["text", "image", "video", "mixed"]
    labels: Literal["graded", "binary", "none"]
    instruction: Text | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class VideoLine(_Line):
    """A video: a file, or its frames; a plain string stands for a file."""

    file: Id | None = None
    # The bounds stand inside of the unions: outside, behind a validator, pydantic applies them to null, too, and crashes.
    frames: Annotated[Annotated[tuple[Id, ...], Field(min_length=1)] | None, BeforeValidator(_as_tuple)] = None
    fps: Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, BeforeValidator(_not_a_flag)] = None
    max_frames: Annotated[int | None, Field(ge=1, le=MOST_FRAMES)] = None

    @model_validator(mode="after")
    def _is_file_or_frames(self) -> VideoLine:
        if (self.file is None) == (self.frames is None):
            message = "Expected either file or frames"
            raise ValueError(message)
        if self.frames is not None and self.fps is not None:
            message = "fps applies to a file; a list of frames is scored as it is"
            raise ValueError(message)
        return self


class SidesLine(_Line):
    """The content of a query; `min_pixels` and `max_pixels` bound its images, `total_pixels` each list of frames."""

    text: Annotated[tuple[Text, ...] | None, BeforeValidator(_as_tuple)] = None
    image: Side = None
    video: Annotated[tuple[VideoLine, ...] | None, BeforeValidator(_as_videos)] = None
    min_pixels: Pixels = None
    max_pixels: Pixels = None
    total_pixels: Annotated[int | None, Field(ge=1, le=MOST_PIXELS * MOST_FRAMES)] = None

    @property
    def is_blank(self) -> bool:
        """Whether no content was given, not even an empty list."""
        return self.text is None and self.image is None and self.video is None


class DocumentLine(SidesLine):
    """The content of a document, with its id and relevance."""

    id: Id | None = None
    label: Grade | None = None


class QueryLine(_Line):
    """A query with its documents; a plain string stands for its text."""

    id: Id | None = None
    query: Annotated[SidesLine, BeforeValidator(_as_sides)]
    instruction: Text | None = None
    documents: Annotated[list[Annotated[DocumentLine, BeforeValidator(_as_sides)]], Field(min_length=1)]


_CONTENT: Final = "Expected a text, or an object with text, image or video"
_SHAPES: Final = {
    HeaderLine.__name__: "Expected an object with qtool_panel",
    QueryLine.__name__: 'Expected an object {"query": …, "documents": […]}',
    SidesLine.__name__: _CONTENT,
    DocumentLine.__name__: _CONTENT,
    VideoLine.__name__: "Expected a path, or an object with file or frames",
}
"""What is expected where the value is not an object."""

LineT = TypeVar("LineT", bound=_Line)


def parse_line(shape: type[LineT], value: object, where: str) -> LineT:
    """One decoded line as `shape`. Raises UsageError with a message that begins with `where`."""
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = f"{where}: {_field(first['loc'])}{_problem(first)}."
        raise UsageError(message) from error


def _problem(error: ErrorDetails) -> str:
    if error["type"] == "model_type":  # pydantic's own message names our classes
        return _SHAPES[error["ctx"]["class_name"]]
    return error["msg"].removeprefix("Value error, ")


def _field(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return f"{path}: " if path else ""
