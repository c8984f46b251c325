"""`python -m tests.without torch,transformers -- inspect MODEL`: qtool as it runs where packages are not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = {"modelopt": "nvidia-modelopt", "PIL": "pillow", "yaml": "pyyaml"}


def qtool_without(modules, *arguments, cwd=None, **environment):
    """Run qtool in a process that finds none of `modules`, nor their versions."""
    command = [sys.executable, "-m", "tests.without", ",".join(modules), "--", *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": path, **environment}
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def hide(modules):
    """From now on this process finds none of `modules`."""
    names = {DISTRIBUTIONS.get(module, module).replace("-", "_") for module in modules}

    class Without(PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            return None if fullname.partition(".")[0] in modules else super().find_spec(fullname, path, target)

        @classmethod
        def find_distributions(cls, *context):
            found = PathFinder.find_distributions(*context)
            return (each for each in found if each.metadata["Name"].lower().replace("-", "_") not in names)

    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]


if __name__ == "__main__":
    hide(set(sys.argv[1].split(",")) - {""})
    sys.argv = ["qtool", *sys.argv[sys.argv.index("--") + 1 :]]
    from qtool.__main__ import main

    main()
