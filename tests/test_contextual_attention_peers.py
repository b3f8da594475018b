"""Every backend against unmodified public code, float64, outputs and gradients.

Optional: needs a folder with checkouts of the public repositories (``INPAINT_PEERS=DIR``, or ``--peers DIR`` where
benches/ is collected too); see benches/peers.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benches.peers import PORTS, Attention, Port, load_port
from inpaint_kernels import contextual_attention, explain

TOLERANCE = 1e-10
CHANNELS = 8


@dataclass(frozen=True)
class Case:
    """Sizes of f and b at feature resolution; ``shared``: one tensor is both (self-attention, as in every network)."""

    f_size: tuple[int, int]
    b_size: tuple[int, int]
    batch: int = 1
    masked: bool = True
    fuse: bool = True
    amplitude: float = 1.0
    shared: bool = False

    def __str__(self) -> str:
        size = "x".join(map(str, self.f_size)) + (
            "" if self.f_size == self.b_size else "_" + "x".join(map(str, self.b_size))
        )
        flags = [name for name in ("masked", "fuse", "shared") if getattr(self, name)]
        return "-".join([size, f"batch{self.batch}", f"amplitude{self.amplitude:g}", *flags])


def _square(*size: int, **options: object) -> Case:
    return Case(size, size, **options)  # type: ignore[arg-type]


CASES = [
    *(
        _square(16, 16, masked=m, fuse=u, amplitude=a)
        for m in (False, True)
        for u in (False, True)
        for a in (1.0, 0.05)
    ),
    *(_square(24, 40, fuse=u, amplitude=a) for u in (False, True) for a in (1.0, 0.05)),
    _square(16, 16, batch=3),
    _square(16, 16, batch=2, shared=True),
    _square(24, 40, batch=2, masked=False, shared=True, amplitude=0.05),
    _square(20, 12, batch=2),
    _square(20, 12, fuse=False, amplitude=0.05),
    _square(26, 18, batch=2, amplitude=0.05),
    _square(26, 18, masked=False),
    _square(32, 32, shared=True),
    _square(32, 32, batch=2, amplitude=0.05),
    _square(64, 64, shared=True),
    _square(64, 64, amplitude=0.05),
    _square(17, 23),
    _square(17, 23, fuse=False, amplitude=0.05),
    _square(18, 23, batch=2, amplitude=0.05),
    *(Case((16, 24), (24, 20), fuse=u, amplitude=a) for u in (False, True) for a in (1.0, 0.05)),
    *(Case(f, b, batch=2, fuse=u) for f, b in (((32, 48), (16, 24)), ((24, 16), (16, 24))) for u in (False, True)),
]


def cases_of(port: Port) -> list[Case]:
    """The cases that the port computes, and as it was meant; without a fuse or a mask where it has none."""
    adapted = (replace(c, fuse=c.fuse and port.has_fuse, masked=c.masked and port.mask_scale > 0) for c in CASES)
    return list(dict.fromkeys(case for case in adapted if _is_defined(port, case)))


def _is_defined(port: Port, case: Case) -> bool:
    same_size = case.f_size == case.b_size
    square = same_size and case.f_size[0] == case.f_size[1]
    return not (
        (port.same_size_only and not same_size)
        or (port.same_size_with_fuse_only and case.fuse and not same_size)
        or (port.square_fuse_only and case.fuse and not square)
        or (port.even_only and any(side % 2 for side in (*case.f_size, *case.b_size)))
        or (port.has_fuse and not port.has_fuse_switch and not case.fuse)
        or case.f_size in port.unreliable_sizes
    )


def make_inputs(port: Port, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    f = case.amplitude * torch.randn(case.batch, CHANNELS, *case.f_size, dtype=torch.float64)
    b_size = tuple(port.value_scale * side for side in case.b_size)
    b = (
        f
        if case.shared and port.value_scale == 1
        else case.amplitude * torch.randn(case.batch, CHANNELS, *b_size, dtype=torch.float64)
    )
    mask = None
    if case.masked:
        height, width = (port.mask_scale * side for side in case.b_size)
        mask = torch.zeros(case.batch, 1, height, width, dtype=torch.float64)
        for sample in range(case.batch):  # touches the top border, differs between samples
            mask[sample, :, : height // 2, (1 + sample) * width // 8 : (1 + sample) * width // 8 + width // 3] = 1
    return f, b, mask


def ours(port: Port, f: Tensor, b: Tensor, mask: Tensor | None, fuse: bool, backend: str) -> Tensor:
    """The library's call that a user of the port would write instead."""
    preset = port.preset or port.name
    if preset in ("pennet", "ctsdg"):
        return contextual_attention(f, f, mask, value=b, preset=preset, backend=backend)
    if preset == "csnln":
        keys = F.interpolate(f, scale_factor=0.5, mode="bilinear")
        return contextual_attention(f, keys, value=f, preset=preset, backend=backend)
    return contextual_attention(f, b, mask, preset=preset, fuse=3 if fuse else 0, backend=backend)


def output_and_gradients(attention: Attention, f: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    shared = b is f
    f = f.detach().requires_grad_()
    b = f if shared else b.detach().requires_grad_()
    y = attention(f, b, mask)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    gradients = torch.autograd.grad((y * weight).sum(), (f,) if shared else (f, b), allow_unused=True)
    return (y.detach(), *(g for g in gradients if g is not None))


def largest_difference(port: Port, folder: Path, case: Case) -> dict[str, float]:
    """By backend: the largest absolute difference of the output and of the gradients."""
    f, b, mask = make_inputs(port, case)
    theirs = output_and_gradients(load_port(port, folder, fuse=case.fuse), f, b, mask)
    found = {}
    for backend in explain("contextual_attention", f, f, rate=1).usable:

        def attention(f: Tensor, b: Tensor, mask: Tensor | None, backend: str = backend) -> Tensor:
            return ours(port, f, b, mask, case.fuse, backend)

        mine = output_and_gradients(attention, f, b, mask)
        assert [got.shape for got in mine] == [expected.shape for expected in theirs]
        found[backend] = max((got - expected).abs().max().item() for got, expected in zip(mine, theirs, strict=True))
    return found


@pytest.fixture(scope="session")
def peers_folder(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--peers", None) or os.environ.get("INPAINT_PEERS")
    if not folder:
        pytest.skip("no checkouts of public ports (INPAINT_PEERS=DIR)")
    return Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("port", PORTS, ids=lambda port: port.name)
def test_every_backend_equals_the_public_port(port: Port, peers_folder: Path) -> None:
    if port.checkout(peers_folder) is None:
        pytest.skip(f"no checkout of {port.repository} in {peers_folder}")
    for case in cases_of(port):
        found = largest_difference(port, peers_folder, case)
        assert "reference" in found
        assert max(found.values()) <= TOLERANCE, f"{case}: {found}"
