"""A training run: steps, checkpoints, logs and sample rows in one folder, alone or under torchrun."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from inpaint_kernels._files import write_atomically
from inpaint_kernels.checkpoint_files import CheckpointError
from inpaint_kernels.models.edge_connect import canny
from inpaint_kernels.models.training import Batch
from inpaint_kernels.pretrained import write_model
from inpaint_kernels.processes import Group, group
from inpaint_kernels.trainer import state as files
from inpaint_kernels.trainer.config import TrainingConfig, first_difference, read_config, write_config
from inpaint_kernels.trainer.holes import HoleMaker, Holes, seeded_generator, shares
from inpaint_kernels.trainer.photos import PhotoFolder, image_batches
from inpaint_kernels.trainer.rows import Samples
from inpaint_kernels.trainer.systems import Trainee, make_trainee

Report = Callable[[int, Mapping[str, float]], None]
"""Called after every step with the number of steps made and the last means of the losses."""

CONFIG = "config.toml"
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why. The last checkpoint stays."""


def train(
    config: TrainingConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    report: Report = lambda step, losses: None,
) -> int:
    """Train as a configuration says.

    The folder gets ``config.toml``; in ``checkpoints/STEP`` the model (``model.safetensors``, with ``ema``
    ``ema.safetensors`` too; :func:`inpaint_kernels.load_pretrained` reads both) and ``state.safetensors``; in ``rows``
    sample rows; and TensorBoard's events. Under ``torchrun`` every process takes its share of each step's images, and
    gradients are averaged: the run is that of one process, but for statistics of batch norms, which are the first
    process's.

    An interrupt or a request to terminate lets the step end and saves a checkpoint.

    Args:
        config: of :func:`.config.read_config`; ``photos`` must be set.
        folder: of the run; is made.
        resume: whether a run in the folder goes on, from its last checkpoint, with the very numbers that it would have
            had without a break. What of the configuration may differ then is :data:`.config.FREE`.
        report: see :data:`Report`.

    Returns:
        The number of steps made: fewer than ``config.steps`` after an interrupt.

    Raises:
        ValueError: something of the configuration does not fit, or the folder holds a run.
        CheckpointError: ``start`` or a checkpoint cannot be read.
        TrainingError: a loss is no longer finite.
    """
    if config.photos is None:
        raise ValueError("photos: expected the folder of the photos to train on, got none")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with group(backend) as processes:
        return _Run(config, Path(folder), processes, resume).go_on(report)


class _Run:
    """One process's part of a run."""

    def __init__(self, config: TrainingConfig, folder: Path, processes: Group, resume: bool) -> None:
        self.config, self.folder, self.processes = config, folder, processes
        if config.batch % (processes.size * config.accumulate):
            raise ValueError(
                f"batch: expected a multiple of accumulate x processes, {config.accumulate} x {processes.size}, "
                f"got {config.batch}"
            )
        newest = files.newest_checkpoint(folder)
        _check_folder(config, folder, newest, resume)
        self.device = device_of(config.device, processes.rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # that of the collective operations on objects
        assert config.photos is not None  # train has seen to it
        self.photos = PhotoFolder(
            config.photos, config.image_size, shortest=config.shortest, flip=config.flip, seed=config.seed
        )
        self.holes = HoleMaker(config, self.device)
        self.parts = shares(config.batch, config.accumulate, processes.rank, processes.size)
        self.trainee: Trainee = make_trainee(config, self.device)
        self.system = self.trainee.system
        self.system.reduce_gradients = self._share_gradients if processes.size > 1 else None
        if config.precision == "float16":
            self.system.scaler = torch.amp.GradScaler(self.device.type)
        self.ema = (
            AveragedModel(self.trainee.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
        )
        self.steps = 0
        if newest is not None:
            self._load(newest)
        self.samples = Samples(config) if config.rows and processes.rank == 0 else None
        processes.wait()  # no process writes before all have seen that the folder is in order
        if processes.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            text = write_config(config).encode()
            write_atomically(folder / CONFIG, lambda stream: stream.write(text))

    # Steps ------------------------------------------------------------------------------------------------------------

    def go_on(self, report: Report) -> int:
        """Make the steps that are left; returns how many have been made in all."""
        config = self.config
        if self.steps >= config.steps:
            return self.steps
        images = image_batches(
            self.photos,
            self.parts,
            first=self.steps,
            last=config.steps,
            images_of_a_step=config.batch,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        with self._writer() as writer, _interrupts() as interrupted:
            if self.steps == 0:
                self._draw(writer)
            while self.steps < config.steps:
                losses = self._step(images)
                self._log(writer, losses)
                report(self.steps, self._means)
                self._draw(writer)
                stop = self.processes.any(interrupted.is_set())
                if stop or self.steps == config.steps or self.steps % config.save_every == 0:
                    self._save()
                if stop:
                    break
        return self.steps

    def _step(self, images: Iterator[Tensor]) -> dict[str, Tensor]:
        config, system = self.config, self.system
        phase = config.phase_of(self.steps)
        if phase != system.phase:
            system.phase = phase
        system.rate_factor = self._rate_factor()
        # Drawn from the step's number, so that nothing random needs to be kept; each process has its own.
        system.random = seeded_generator(config.seed, self.steps, 1 + self.processes.rank)
        holes = self.holes(self.steps)
        batches = [self._batch(next(images), holes.of(part)) for part in self.parts]
        precision = PRECISIONS[config.precision]
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            losses = system.step(*batches)
        self.steps += 1
        if self.processes.size > 1:
            self._share_statistics()
        if self.ema is not None:
            self.ema.update_parameters(self.trainee.model)
        return losses

    def _batch(self, images: Tensor, holes: Holes) -> Batch:
        image = images.to(self.device, non_blocking=True).float() / 255
        sketch = None
        if getattr(self.trainee.model, "guided", False):  # a guided DeepFill v2 paints along lines: here Canny's
            sketch = canny(image, torch.zeros_like(image[:, :1], dtype=torch.bool))
        return Batch(image, holes.mask, holes.boxes, holes.real_boxes, sketch)

    def _rate_factor(self) -> float:
        if not self.config.rates:
            return 1.0
        steps, factors = zip(*self.config.rates, strict=True)
        return float(np.interp(self.steps, steps, factors))

    # Several processes ------------------------------------------------------------------------------------------------

    def _share_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Their means over the processes.

        torch's DistributedDataParallel serves one forward before each backward, and no ``torch.autograd.grad``; the
        critics run three times a step, and DeepFill v1's gradient penalty is such a gradient.
        """
        self.processes.average([p.grad for p in parameters if p.grad is not None])

    def _share_statistics(self) -> None:
        networks = self.system.networks.values()
        self.processes.broadcast([b for network in networks for b in network.buffers() if b.is_floating_point()])

    # Logs -------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _writer(self) -> Iterator[SummaryWriter | None]:
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._means: dict[str, float] = {}
        self._since = self.steps, time.perf_counter()
        if self.processes.rank:
            yield None
            return
        with SummaryWriter(str(self.folder), purge_step=self.steps + 1) as writer:
            yield writer

    def _log(self, writer: SummaryWriter | None, losses: Mapping[str, Tensor]) -> None:
        for name, loss in losses.items():
            total, count = self._sums.get(name, (torch.zeros((), device=loss.device), 0))
            self._sums[name] = total + loss.float(), count + 1
        if self.steps % self.config.log_every and self.steps != self.config.steps:
            return
        means = torch.stack([total / count for total, count in self._sums.values()])
        self.processes.average([means])
        self._means = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums.clear()
        for name, mean in self._means.items():
            if not math.isfinite(mean):
                raise TrainingError(f"the loss {name!r} is {mean} around step {self.steps}")
        if writer is not None:
            for name, mean in self._means.items():
                writer.add_scalar(f"loss/{name}", mean, self.steps)
            for name, optimizer in self.system.optimizers.items():
                writer.add_scalar(f"rate/{name}", optimizer.param_groups[0]["lr"], self.steps)
            (steps, started), self._since = self._since, (self.steps, time.perf_counter())
            rate = (self.steps - steps) * self.config.batch / (self._since[1] - started)
            writer.add_scalar("speed/images per second", rate, self.steps)
            if self.device.type == "cuda":
                writer.add_scalar("memory/peak MiB", torch.cuda.max_memory_allocated(self.device) / 2**20, self.steps)

    def _draw(self, writer: SummaryWriter | None) -> None:
        due = self.steps % self.config.rows_every == 0 or self.steps == self.config.steps
        if self.samples is None or writer is None or not due:
            return
        row = self.samples.draw(self.trainee.model)
        path = self.folder / "rows" / f"{self.steps:08}.jpg"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda stream: Image.fromarray(row.picture).save(stream, "jpeg", quality=90))
        writer.add_image("rows", row.picture, self.steps, dataformats="HWC")
        writer.add_scalar("rows/hole PSNR", row.hole_psnr, self.steps)
        writer.add_scalar("rows/hole L1", row.hole_l1, self.steps)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.processes.rank:
            return
        folder = files.checkpoint_folder(self.folder, self.steps)
        folder.mkdir(parents=True, exist_ok=True)
        origin = self.trainee.origin | {"steps": str(self.steps)}
        write_model(self.trainee.model, self.trainee.arguments, folder / files.MODEL, origin)
        if self.ema is not None:
            write_model(self.ema.module, self.trainee.arguments, folder / files.EMA, origin)
        state: dict[str, Any] = {"steps": self.steps, "system": self.system.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.system.scaler is not None:
            state["scaler"] = self.system.scaler.state_dict()
        files.write_state(folder / files.STATE, state)
        files.drop_old_checkpoints(self.folder, self.config.keep)

    def _load(self, folder: Path) -> None:
        path = folder / files.STATE
        state = files.read_state(path)
        try:
            self.system.load_state_dict(state["system"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            if self.system.scaler is not None:
                self.system.scaler.load_state_dict(state["scaler"])
            self.steps = state["steps"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: is not of this run: {error}") from error


def device_of(name: str, rank: int) -> torch.device:
    """A run's device; of "auto" the process's CUDA device where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        cuda = torch.cuda.is_available()
        return torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _check_folder(config: TrainingConfig, folder: Path, newest: Path | None, resume: bool) -> None:
    if newest is None:
        return
    if not resume:
        raise ValueError(f"folder: {folder} holds a run; resume (--resume) goes on with it")
    before = read_config(folder / CONFIG)
    different = first_difference(config, before)
    if different is not None:
        now, then = getattr(config, different), getattr(before, different)
        raise ValueError(f"{different}: expected {then!r}, as in the run that is to go on, got {now!r}")


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by the first interrupt or request to terminate; a second interrupt is one as always."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals are the main thread's
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
