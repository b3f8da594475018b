"""Models of this library in IOPaint (https://github.com/Sanster/IOPaint), beside its own erase models.

    python -m inpaint_kernels.plugins.iopaint WEIGHTS start --port 8080

registers the weights as the model "inpaint-kernels" and starts IOPaint with it; every other word goes to IOPaint as it
is (``start``, ``run``, ``list``, ...). In one's own script :func:`register` does the first half.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch

from inpaint_kernels.pipeline import inpaint
from inpaint_kernels.pretrained import load_pretrained

NAME = "inpaint-kernels"


def register(weights: str | os.PathLike[str], name: str = NAME, **options: Any) -> Any:
    """Add a model to IOPaint's list.

    Args:
        weights: as of :func:`inpaint_kernels.load_pretrained`; read when IOPaint starts the model.
        name: that IOPaint shows.
        **options: of :func:`inpaint_kernels.inpaint`, for example ``blend="poisson"``.

    Returns:
        The subclass of IOPaint's ``InpaintModel``.

    Raises:
        ModuleNotFoundError: IOPaint is not installed.
    """
    from iopaint.model import models

    models[name] = model_class(weights, name, **options)
    return models[name]


def model_class(weights: str | os.PathLike[str], name: str = NAME, **options: Any) -> Any:
    """A subclass of IOPaint's ``InpaintModel``, arguments as of :func:`register`."""
    from iopaint.model.base import InpaintModel

    class Model(InpaintModel):  # type: ignore[misc]
        """See the module."""

        pad_mod = 1  # any size is taken
        is_erase_model = True

        def init_model(self, device: Any, **_: Any) -> None:
            """Read the weights."""
            self.model = load_pretrained(weights).to(device)

        @staticmethod
        def is_downloaded() -> bool:
            """Whether the weights are there: IOPaint downloads nothing."""
            return os.path.exists(weights)

        def forward(self, image: Any, mask: Any, config: Any) -> Any:
            """RGB [H, W, 3] and mask [H, W, 1], 255 in the hole, both uint8 -> BGR [H, W, 3] uint8."""
            hole = np.asarray(mask).reshape(image.shape[:2]) > 127
            if not hole.any():
                return np.ascontiguousarray(image[:, :, ::-1])
            filled = inpaint(self.model, np.ascontiguousarray(image), hole, **options).completed
            return np.ascontiguousarray(filled[:, :, ::-1])

    Model.name = name
    return Model


def main() -> None:
    """Run IOPaint's command line with the weights that come first."""
    if len(sys.argv) < 3:
        print(f"usage: python -m {__spec__.name} WEIGHTS start|run|list [IOPaint's options]", file=sys.stderr)
        raise SystemExit(2)
    weights, command, *rest = sys.argv[1:]
    register(weights)
    from iopaint.cli import typer_app

    chosen = ["--model", NAME] if command in ("start", "run") and "--model" not in rest else []
    torch.set_grad_enabled(False)
    typer_app([command, *chosen, *rest])


if __name__ == "__main__":
    main()
