"""Trains the try-on model: all of a small one from nothing, or the self-attention of a published one.

A run is a folder: `latents/` (encoded pairs), `checkpoints/`, `loss.jsonl` (a line per step), `sheets/` (what the
averaged weights make of pictures that are not trained on) and at the end `export/`, in the published layout.
"""

from __future__ import annotations

import copy
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from tqdm import tqdm

from model.catvton import published
from model.catvton.attention import TryOnUNet
from model.catvton.export import export_weights, write_sheet
from model.catvton.latents import LatentPairs, prepare_latents
from model.catvton.objective import Exercise, Loss, exercise, loss
from model.catvton.optimizer import build_optimizer
from model.catvton.pairs import PairSource, open_source
from model.catvton.pipeline import CatVTONPipeline
from model.catvton.training_state import TrainingState, cut_log, has_state, load_state, log_step, save_state
from model.training_options import ATTENTION_ONLY, FROM_SCRATCH, Course, TrainingError, TrainingOptions
from model.weights import WeightsError

SHEET_ROWS = 8
LONGEST_WAIT = timedelta(days=7)  # of one process for another, e.g. while the first one encodes the pairs
FINAL_SHARE = 0.02  # of the learning rate, at the end of its decay
SMALL_UNET: dict[str, Any] = {  # 6.8 M parameters for latents of 12x16 with 32 channels
    "sample_size": 16,
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "block_out_channels": [96, 160],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,  # heads; diffusers misnames it
}


def run(options: TrainingOptions, course: Course) -> bool:
    """Train, and write the weights to `export/` in the folder of the run.

    SIGTERM ends it at the next step, after a checkpoint.

    Returns:
        Whether it came to its end; a run that was stopped can be resumed.
    Raises:
        TrainingError: an option, a file or the folder of the run does not fit; the text names it.
    """
    if has_state(course.output) and not course.resume:
        raise TrainingError(f"{course.output} holds a training already; resume it or name another folder")
    on_cpu = course.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and course.device == "cuda":
        raise TrainingError("there is no CUDA device")
    patient = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    accelerator = Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=[patient])
    if options.batch % accelerator.num_processes:
        raise TrainingError(f"batch must be a multiple of the {accelerator.num_processes} processes")
    pipeline = _build(options).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    source = open_source(options)
    course.output.mkdir(parents=True, exist_ok=True)
    with _termination() as stopped:
        folder = course.latents or course.output / "latents"
        with accelerator.main_process_first():
            latents = prepare_latents(source, pipeline, folder, readers=course.readers, stopped=stopped)
        if stopped():
            return False
        return _Training(options, course, accelerator, pipeline, source).run(latents, stopped)


class _Training:
    """One run, with everything it needs at hand."""

    def __init__(
        self,
        options: TrainingOptions,
        course: Course,
        accelerator: Accelerator,
        pipeline: CatVTONPipeline,
        source: PairSource,
    ) -> None:
        self.options, self.course, self.accelerator = options, course, accelerator
        self.pipeline, self.source = pipeline, source  # the pipeline has the averaged weights
        unet = copy.deepcopy(pipeline.unet)
        if accelerator.device.type == "cpu":
            unet.set_attn_processor(AttnProcessor())  # its backward pass is faster than that of the fused kernel
        unet.to(memory_format=torch.channels_last).train()
        trained = [name for name, _ in unet.named_parameters() if _is_trained(name, options)]
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name in trained)
        weights = {name: unet.get_parameter(name) for name in trained}
        self.unet, wrapped = accelerator.prepare(unet, build_optimizer(weights, options))
        average = {name: pipeline.unet.get_parameter(name).requires_grad_(False) for name in trained}
        self.state = TrainingState(0, weights, average, wrapped)

    def run(self, latents: LatentPairs, stopped: Callable[[], bool]) -> bool:
        """Every step that is left; whether it came to the end."""
        options, state, output = self.options, self.state, self.course.output
        if self.course.resume:
            load_state(output, state, options)
        self.accelerator.wait_for_everyone()
        is_main = self.accelerator.is_main_process
        earlier_s = cut_log(output, state.step) if is_main else 0.0
        start_s = time.monotonic()
        bar = tqdm(total=options.steps, initial=state.step, desc="training", unit="step", disable=not is_main)
        while state.step < options.steps:
            batch = exercise(latents, options, self.pipeline.scheduler, state.step, self.accelerator.device)
            rate = learning_rate(state.step, options)
            with _without_denormals():
                made = self._step(loss(self._share(batch), self._predict, options, self.pipeline.scheduler), rate)
            weighted, in_mask, ends = self._agree(made.weighted.item(), made.in_mask.item(), float(stopped()))
            bar.update()
            bar.set_postfix(loss=f"{weighted:.3f}", in_mask=f"{in_mask:.3f}", refresh=False)
            if is_main:
                seconds = round(earlier_s + time.monotonic() - start_s, 2)
                line = {"step": state.step, "loss": weighted, "in_mask": in_mask, "lr": rate, "seconds": seconds}
                log_step(output, line)
                self._keep(stopping=ends > 0)
            if ends:
                break
        bar.close()
        if is_main and state.step == options.steps:
            export_weights(self.pipeline, output / "export", options.variant)
        return state.step == options.steps

    def _share(self, batch: Exercise) -> Exercise:
        """This process's part of a batch."""
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return Exercise(**{name: tensor[mine] for name, tensor in vars(batch).items()})

    def _agree(self, *numbers: float) -> list[float]:
        """The mean of each number over the processes."""
        mine = torch.tensor(numbers, device=self.accelerator.device)
        mean: list[float] = self.accelerator.reduce(mine, "mean").tolist()
        return mean

    def _predict(self, unet_input: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        ordered = unet_input.contiguous(memory_format=torch.channels_last)
        narrow = self.options.dtype == "bfloat16"
        with torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=narrow):
            predicted: torch.Tensor = self.unet(ordered, timesteps, encoder_hidden_states=None, return_dict=False)[0]
        return predicted.float()

    def _step(self, made: Loss, rate: float) -> Loss:
        state = self.state
        if not made.weighted.isfinite():
            raise TrainingError(f"the loss of step {state.step + 1} is no number; the learning rate may be too high")
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        state.optimizer.zero_grad()
        self.accelerator.backward(made.weighted)
        self.accelerator.clip_grad_norm_(state.weights.values(), self.options.clip_norm)
        state.optimizer.step()
        state.step += 1
        kept = min(self.options.ema_decay, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            for name, average in state.average.items():
                average.lerp_(state.weights[name], 1 - kept)
        return made

    def _keep(self, *, stopping: bool) -> None:
        step, course = self.state.step, self.course
        last = step == self.options.steps
        if last or stopping or step % course.save_every == 0:
            save_state(course.output, self.state, self.options)
        if course.sample_every and (last or step % course.sample_every == 0):
            pairs = [self.source.sample(row) for row in range(SHEET_ROWS)]
            write_sheet(self.pipeline, pairs, course.output / "sheets" / f"step-{step:08d}.png")


def learning_rate(step: int, options: TrainingOptions) -> float:
    """AdamW's, of the step after `step` others: a linear rise, a plateau, a linear fall over the last part."""
    risen = min(1.0, (step + 1) / max(1, options.warmup_steps))
    left = (options.steps - step) / options.steps
    fallen = 1.0 if left > options.decay_share else max(FINAL_SHARE, left / options.decay_share)
    return options.learning_rate * risen * fallen


def _is_trained(name: str, options: TrainingOptions) -> bool:
    return options.method != ATTENTION_ONLY or ".attn1." in name


def _build(options: TrainingOptions) -> CatVTONPipeline:
    """The pipeline before its first step, float32 on the CPU."""
    try:
        if options.method == FROM_SCRATCH:
            pipeline = _build_new(options)
        else:
            pipeline = CatVTONPipeline.from_published(options.weights, options.variant)
        pipeline.check_settings(options.height, options.width, 1, "pil")
    except (OSError, TypeError, ValueError, WeightsError) as exc:
        raise TrainingError(str(exc)) from exc
    return pipeline


def _build_new(options: TrainingOptions) -> CatVTONPipeline:
    vae = load_vae(Path(options.vae)).to(memory_format=torch.channels_last)  # half the time on a CPU
    given = json.loads(Path(options.unet).read_text(encoding="utf-8")) if options.unet else SMALL_UNET
    latent_channels = vae.config.latent_channels
    channels = {"in_channels": 2 * latent_channels + 1, "out_channels": latent_channels}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        unet = TryOnUNet.from_config({**given, **channels})
    scheduler = {**published.SCHEDULER_CONFIG, "prediction_type": options.prediction_type}
    return CatVTONPipeline(vae, unet.eval(), DDIMScheduler.from_config(scheduler))


def load_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a folder with config.json and safetensors, float32 on the CPU, for evaluation.

    Raises:
        OSError, ValueError: it is not there or does not fit.
    """
    return AutoencoderKL.from_pretrained(str(folder), use_safetensors=True, local_files_only=True).eval()


@contextmanager
def _without_denormals() -> Iterator[None]:
    """Numbers next to zero become zero, which AdamW's moments are full of and which slow a CPU down."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)  # numpy warns of it


@contextmanager
def _termination() -> Iterator[Callable[[], bool]]:
    """A question that is answered with True after SIGTERM."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGTERM, before)
