"""Entry point of the command line: ``inpaint-kernels`` and ``python -m inpaint_kernels``."""

from __future__ import annotations

import importlib.util
import sys

_CLI_PACKAGES = {"typer": "typer", "rich": "rich", "PIL": "pillow", "skimage": "scikit-image"}


def main() -> None:
    """Run the command line; without its packages, say which pip command installs them and end with exit code 2."""
    missing = [package for module, package in _CLI_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f'The command line needs {", ".join(missing)}: pip install "inpaint-kernels[cli]"',
            file=sys.stderr,
        )
        raise SystemExit(2)
    from inpaint_kernels.cli import app

    app(prog_name="inpaint-kernels")


if __name__ == "__main__":
    main()
