"""The training loop: a run directory from a configuration, interrupted and resumed at will."""

import contextlib
import math
from pathlib import Path

import torch
from torch import Tensor

from ear_model import signals
from ear_model.config import RunConfig, TrainConfig
from ear_model.data.batches import Batches, TrainingData
from ear_model.data.prefetch import Prefetcher
from ear_model.data.sources import load_training_data
from ear_model.devices import resolve_device
from ear_model.ear import EAR
from ear_model.errors import RunError, words_of
from ear_model.files import in_use, require_writable
from ear_model.model import masking
from ear_model.model.weights import load_into
from ear_model.run_dir import (
    METRICS_FILE,
    check_resumable,
    checkpoint_dir,
    checkpoint_steps,
    load_config,
    save_config,
    with_absolute_paths,
)
from ear_model.score_names import score_entry
from ear_model.training import checkpoint, distributed, graphs, optim
from ear_model.training.codebook import give_codebook
from ear_model.training.engine import Engine, compile_blocks
from ear_model.training.randomness import Randomness
from ear_model.training.run_log import RunLog, truncate_metrics, write_environment

DDP_GRAPHS = 4  # parts of the backbone whose gradients DDP exchanges one after another


class NonFiniteLossError(RunError):
    """The loss or its gradient became NaN or infinite; the same error on every process."""

    on_every_process = True


class Trainer:
    """One training run. ``step`` optimiser steps are done; :meth:`run` does the rest.

    On several processes (``distributed.process_group``) every one of them makes a Trainer and calls the same methods;
    the main one writes.

    Args:
        config: what to train.
        run_dir: where everything is written; must be new or empty, or a run to resume.
        resume: go on from the last checkpoint of ``run_dir``, written on any number of processes.
        device: "auto", "cpu", "cuda", ...
        preset: name of the preset that ``config`` was made of, for the record.

    Raises:
        ValueError: a directory in use, not writable or too full; a configuration that differs from the run's in more
            than ``run_dir.EXTENDING``; a number of processes that does not divide the batch.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, *, resume: bool = False, device: str = "auto", preset: str = ""
    ) -> None:
        config = with_absolute_paths(config)
        self.config, self.run_dir, self.preset = config, run_dir, preset
        train = config.train
        self._has_tau = "tau" in score_entry(config.model.score).train_options
        self.is_main = distributed.is_main()
        saved: checkpoint.Checkpoint | None = None
        with distributed.all_or_none():
            self.device = distributed.local_device(resolve_device(device))
            _check_processes(train)
            self._check_run_dir(resume)
            data = load_training_data(config)
            self._check_data(data)
            if resume and checkpoint_steps(run_dir):
                saved = checkpoint.load_checkpoint(run_dir)
                if saved.trainer_state["step"] > train.steps:
                    done = saved.trainer_state["step"]
                    raise ValueError(f"steps is {train.steps}; {run_dir} has done {done} steps already")
        # After the checks: nothing is drawn or written before they pass.
        torch.manual_seed(train.seed)
        self.model = EAR(config.model)
        if train.compile:
            compile_blocks(self.model.backbone)
        with distributed.all_or_none():
            if saved is not None:
                load_into(self.model, saved.weights, saved.path / "model.safetensors")
                if self.is_main and load_config(run_dir) != config:
                    save_config(run_dir, config)
            else:
                give_codebook(self.model, config)
                self._start_run_dir()
        self.model.to(self.device).train()
        self.use_bf16 = train.precision == "bf16" or (train.precision == "auto" and self.device.type == "cuda")
        has_dropout = config.model.dropout > 0 or config.model.attention_dropout > 0
        self.randomness = Randomness(self.device, train.seed, has_dropout=has_dropout)
        # With the weights in their place (FSDP's come and go), and before DDP: its hooks are made on another stream
        # than a capture's, and a capture that waits for them fails.
        self.engine = Engine(self.model, loss_chunks=train.loss_chunks, rows_per_noise=train.rows_per_noise)
        processes, part = distributed.world_size(), train.batch_size // train.accumulate
        if self.device.type == "cuda" and graphs.wanted(config):
            parts = 1 if processes == 1 else min(DDP_GRAPHS, config.model.depth)
            self.engine.capture(part // processes, use_bf16=self.use_bf16, parts=parts)
        self.replica = distributed.parallelise(self.model, train.parallel, use_bf16=self.use_bf16)
        self.optimizer = optim.make_optimizer(self.model, train)
        self.ema = optim.ExponentialMovingAverage(self.model, train.ema)
        self.batches = Batches(data, part, train.seed, distributed.rank(), processes)
        self._ahead: Prefetcher | None = None
        self._ahead_index = 0
        self.step = 0
        self.public: dict | None = None  # what a converted public checkpoint said and we don't use
        if saved is not None:
            self._restore(saved)
        if self.is_main:
            checkpoint.remove_leftovers(self.run_dir)
            truncate_metrics(self.run_dir, self.step)

    @property
    def where(self) -> str:
        """The device, and the processes where there are several."""
        processes = distributed.world_size()
        if processes == 1:
            return str(self.device)
        return f"{processes} processes on {self.device.type} ({self.config.train.parallel})"

    def _check_run_dir(self, resume: bool) -> None:
        if resume:
            check_resumable(self.run_dir, self.config)
        elif in_use(self.run_dir):
            raise ValueError(f"{self.run_dir} exists already; give a new --out, or --resume to go on with it")

    def _start_run_dir(self) -> None:
        if not self.is_main:
            return
        weight_bytes = sum(parameter.numel() * 4 for parameter in self.model.parameters())
        # Weights, average and two moments, of the checkpoint that is written and of the one before.
        require_writable(self.run_dir / METRICS_FILE, needed_bytes=2 * 4 * weight_bytes)
        save_config(self.run_dir, self.config)
        write_environment(self.run_dir, self.device, self.preset)

    def _check_data(self, data: TrainingData) -> None:
        model = self.config.model
        expected = (model.channels, model.image_size, model.image_size)
        if tuple(data.image_shape) != expected:
            raise ValueError(
                f"{self.config.data} has images of shape {tuple(data.image_shape)}; the model reads {expected}"
            )
        if data.num_classes > model.num_classes:
            raise ValueError(
                f"{self.config.data} has {data.num_classes} classes; the model knows {model.num_classes}"
            )

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        """Everything but the weights, which the model has before it is spread over the processes."""
        own = dict(self.model.named_parameters())
        self.ema.averages = {
            name: distributed.spread_like(saved.averages[name], own[name]) for name in self.ema.averages
        }
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        optimizer_state = saved.trainer_state["optimizer"]
        for index, moments in optimizer_state["state"].items():
            for key, value in moments.items():
                moments[key] = distributed.spread_like(value, parameters[index])
        self.optimizer.load_state_dict(optimizer_state)
        self.step = saved.trainer_state["step"]
        self.public = saved.trainer_state.get("public")
        self.randomness.restore(saved.trainer_state, self.step)

    def save(self) -> Path:
        """Write a checkpoint of the present step; the same files on any number of processes.

        To be called by all processes; the main one writes and the others go on.
        """
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            index: distributed.gather_to_main(moments) for index, moments in optimizer["state"].items()
        }
        state = {"optimizer": optimizer, "step": self.step, "public": self.public, **self.randomness.state()}
        weights = distributed.gather_to_main(dict(self.model.named_parameters()))
        averages = distributed.gather_to_main(self.ema.averages)
        if self.is_main:
            checkpoint.save_checkpoint(self.run_dir, self.step, self.model, averages, state, weights=weights)
        return checkpoint_dir(self.run_dir, self.step)

    def averaged_model(self) -> EAR:
        """A copy of the model with the averaged weights and the last step's tau, in eval mode; to be called by all
        processes."""
        # Random numbers for weights that are replaced must not be missing later.
        with torch.random.fork_rng(devices=[]):
            model = EAR(self.config.model).to(self.device)
        model.load_state_dict({name: distributed.whole(average) for name, average in self.ema.averages.items()})
        if self._has_tau:
            model.score.tau = self.model.score.tau
        return model.eval()

    def _next_batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Images and labels of this process's part of micro-batch ``index``, on the device."""
        if self.device.type != "cuda" and self.config.data == "digits":
            return self.batches[index]  # in memory: nothing to read ahead
        if self._ahead is None or self._ahead_index != index:
            self.stop_reading()
            self._ahead = Prefetcher(self.batches, index, self.device)
        self._ahead_index = index + 1
        return next(self._ahead)

    def stop_reading(self) -> None:
        """End the reader of batches; the next step starts another."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def train_step(self) -> tuple[Tensor, Tensor]:
        """One optimiser step. Returns loss and gradient norm as tensors on the device, without waiting for it.

        The loss is that of this process's images. Every process masks the same number of tokens of as many images, so
        the mean of the processes' losses and gradients is the loss and gradient of the whole batch.
        """
        train, model = self.config.train, self.config.model
        lr = optim.learning_rate(self.step, train)
        optim.set_learning_rate(self.optimizer, lr)
        if self._has_tau:
            self.model.score.tau = optim.tau(self.step, train)
        total = torch.zeros((), device=self.device)
        with self.engine.scope():
            for part in range(train.accumulate):
                images, labels = self._next_batch(self.step * train.accumulate + part)
                options = {"draws": self.randomness.of_images, **self.engine.options}
                if model.order == "masked":
                    options["num_masked"] = masking.draw_num_masked(
                        model.num_tokens, model.min_mask_ratio, model.masking, self.randomness.same_everywhere
                    )
                with distributed.accumulating(self.replica, last=part + 1 == train.accumulate):
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bf16):
                        loss = self.replica(images, labels, **options) / train.accumulate
                    loss.backward()
                total += loss.detach()
        norm = optim.clipped_step(self.optimizer, train.clip, self.ema, self.engine.copies)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm

    def run(self, *, quiet: bool = False) -> None:
        """Train to the last step, with checkpoints, metrics and a progress bar.

        Raises:
            NonFiniteLossError: at the step it names, on all processes; the last good checkpoint is kept.
            LostProcessError: another process died. RunError: a full disk; the last checkpoint is kept.
            Interrupted: a signal, after the step and its checkpoint (under ``signals.caught``).
        """
        with distributed.lost_process_errors(lambda: f"; training stopped, {self._kept()}"):
            try:
                with signals.deferred():
                    self._run(quiet)
            except OSError as error:
                raise RunError(f"{words_of(error)}; training stopped, {self._kept()}") from error
            finally:
                self.stop_reading()

    def _run(self, quiet: bool) -> None:
        train = self.config.train
        pending: list[tuple[Tensor, Tensor]] = []
        sign = distributed.StopSign()
        with contextlib.ExitStack() as stack:
            log = None
            if self.is_main:
                log = stack.enter_context(RunLog(self.run_dir, train, self.step, quiet=quiet, has_tau=self._has_tau))
            while self.step < train.steps:
                pending.append(self.train_step())
                stop = sign.seen(signals.received())
                save = bool(stop) or self.step % train.checkpoint_every == 0 or self.step == train.steps
                if not (save or self.step % train.log_every == 0):
                    continue
                loss, norm = self._read(pending)
                if log is not None:
                    log.record(self.step, loss, norm)
                pending.clear()
                if stop:
                    # No process ends before the main one has written: torchrun then ends the others.
                    with distributed.all_or_none():
                        self.save()
                    kept = f"stopped after step {self.step} of {train.steps}, its checkpoint is written"
                    raise signals.Interrupted(stop, f"{kept}; --resume goes on")
                if save:
                    self.save()

    def _kept(self) -> str:
        steps = checkpoint_steps(self.run_dir)
        return f"the checkpoint of step {steps[-1]} is kept" if steps else "there was no checkpoint yet"

    def _read(self, pending: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean loss and last gradient norm of the steps since the last call: the only wait for the device.

        The processes' losses are averaged here, all these steps in one exchange, so that all of them see the same.
        """
        values = distributed.mean(torch.stack([torch.stack(pair) for pair in pending])).tolist()
        first = self.step - len(values) + 1
        for offset, (loss, norm) in enumerate(values):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteLossError(
                    f"step {first + offset}: loss {loss}, gradient norm {norm}; training stopped, {self._kept()}"
                )
        return sum(loss for loss, _ in values) / len(values), values[-1][1]


def _check_processes(train: TrainConfig) -> None:
    if train.parallel == "fsdp" and train.loss_chunks > 1:
        raise ValueError(f"loss_chunks is {train.loss_chunks} and parallel is fsdp; use 1 with fsdp, or ddp")
    processes, part = distributed.world_size(), train.batch_size // train.accumulate
    if part % processes:
        split = f" in {train.accumulate} parts of {part}" if train.accumulate > 1 else ""
        raise ValueError(
            f"a batch of {train.batch_size} images{split} can't be divided among {processes} processes; "
            f"give a --train.batch-size that is a multiple of {processes * train.accumulate}"
        )
