"""The program `qtool`, also as `python -m qtool`."""

from __future__ import annotations

import sys

from qtool.extras import import_failure


def main() -> None:
    """Run the command line; without the packages that it is written with, exit as without any other."""
    try:
        from qtool.cli import main as run

        run()
    except ImportError as error:
        if (error.name or "").startswith("qtool"):
            raise
        failure = import_failure(error)
        sys.stderr.write(f"error: {failure.message}\nhint:  {failure.hint}\n")
        raise SystemExit(failure.exit_code) from error


if __name__ == "__main__":
    main()
