"""Small copies of pictures, which a report carries so that a person sees what a pair was about.

Rule: small enough that a report of fifty pairs can be mailed.
"""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Final

from PIL import Image

from qtool.inputs.items import ImageSource
from qtool.inputs.vision import load_image

LONGEST_SIDE: Final = 160
_FEW_COLOURS: Final = 256


def thumbnail(source: ImageSource) -> str:
    """The picture as a `data:` URL of at most 160 pixels a side: PNG where it has few colours, else JPEG."""
    picture = load_image(source)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    kind = "png" if picture.getcolors(_FEW_COLOURS) else "jpeg"
    buffer = BytesIO()
    picture.save(buffer, kind, quality=80, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
