"""Write the general calibration sets: `python -m tools.calibration [-o FOLDER]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.calibration.build import CALIBRATION, build_picture_set, build_text_set, provenance
from tools.panels.build import write_panel


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(prog="python -m tools.calibration", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=CALIBRATION, help="the folder of the sets")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for built in (build_text_set(), build_picture_set()):
        write_panel(built, folder)
        print(f"{built.name}: {len(built.content):,} bytes, {len(built.pictures)} pictures")
    (folder / "SOURCES.md").write_text(provenance(), encoding="utf-8")


if __name__ == "__main__":
    main()
