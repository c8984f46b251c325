"""Write the general panels: `python -m tools.panels [-o FOLDER]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.panels.build import PANELS, build_image_panel, build_text_panel, write_panel


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(prog="python -m tools.panels", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=PANELS, help="the folder of the panels")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for panel in (build_text_panel(), build_image_panel()):
        write_panel(panel, folder)
        print(f"{panel.name}: {len(panel.content):,} bytes, {len(panel.pictures)} pictures")


if __name__ == "__main__":
    main()
