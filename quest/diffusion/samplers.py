"""Schedulers that diffusers lacks: DDIM's for CIFAR-10, and those that correct a quantized denoiser's prediction.

The latter are PTQD's (He et al., arXiv:2305.10657). With e~ the quantized and e the full-precision prediction:

    x --denoiser--> e~ = (1 + k) e + residual --(e~ - bias) / (1 + k)--> estimate of e --DDIM or PLMS step--> next x

A method that changes sampling gives its pipeline such a scheduler, which `quest.quantization.checkpoint` saves. It
draws the same random numbers as its base class, so seeds stay paired.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

# `from_pretrained` looks up the base class of our schedulers in this module.
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from quest.diffusion.declared import SAMPLERS


class Correction(NamedTuple):
    """Statistics of the (guided) prediction's error e~ - e at every timestep of a sampler, by arXiv:2305.10657.

    timesteps [T] (int64), slope [T]: k of e~ - e = k e + residual, bias [T, C]: the residual's mean per latent channel,
    std [T]: the residual's standard deviation, r_squared [T]: share of the error's variance that k explains.
    """

    timesteps: Tensor
    slope: Tensor
    bias: Tensor
    std: Tensor
    r_squared: Tensor

    def at(self, timestep: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """slope [], bias [C, 1, 1] and std [] of one timestep. Raises ValueError for one without statistics."""
        rows = (self.timesteps == int(timestep)).nonzero().flatten()
        if not len(rows):
            raise ValueError(f"timestep {int(timestep)} has no statistics; known are {self.timesteps.tolist()}")
        return self.slope[rows[0]], self.bias[rows[0]][:, None, None], self.std[rows[0]]


class Corrected:
    """Base of the corrected schedulers. `correct` sets `correction`."""

    correction: Correction

    def save_pretrained(self, *args, **kwargs) -> None:
        """Raises ValueError: a scheduler's folder has no place for the correction."""
        raise ValueError(
            "save_pretrained: not of a corrected scheduler, whose statistics would be lost; write it with "
            "quest.save(pipe, path) and read it with quest.load(full_precision_pipe, path)"
        )

    def set_timesteps(self, *args, **kwargs) -> None:
        """Set the timesteps as the base class does. Raises ValueError for timesteps without statistics."""
        super().set_timesteps(*args, **kwargs)
        unknown = sorted(set(self.timesteps.tolist()) - set(self.correction.timesteps.tolist()), reverse=True)
        if unknown:
            raise ValueError(
                f"the sampler visits timesteps {unknown} without statistics; use the steps they were measured on: "
                f"{self.correction.timesteps.tolist()}"
            )

    def corrected(self, prediction: Tensor, timestep: Tensor | int) -> Tensor:
        """(e~ - bias) / (1 + k) (arXiv:2305.10657). prediction [B, C, h, w]."""
        slope, bias, _ = self.correction.at(timestep)
        return (prediction - bias.to(prediction)) / (1 + slope.to(prediction))


class CorrectedDDIMScheduler(Corrected, DDIMScheduler):
    """DDIM on the corrected prediction. It injects less noise, because quantization already added some."""

    def noise_share(self, timestep: Tensor | int, eta: float) -> float:
        """Standard deviation of the noise to inject over that of full precision (arXiv:2305.10657).

        Let s be the deviation of full precision and c the coefficient of the prediction in the DDIM step. Quantization
        noise of deviation q = std / (1 + k) enters the step as c q, so s_new^2 = max(0, s^2 - c^2 q^2). With eta = 0
        no noise is injected and the result is 1.
        """
        slope, _, std = self.correction.at(timestep)
        before = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        product = self.alphas_cumprod[int(timestep)]
        product_before = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        injected = eta**2 * self._get_variance(int(timestep), before)
        coefficient = (1 - product_before - injected).sqrt() - (product_before * (1 - product) / product).sqrt()
        absorbed = (coefficient * std / (1 + slope)) ** 2
        return float((1 - absorbed / injected).clamp(min=0).sqrt()) if injected > 0 else 1.0

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator=None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: {eta} is outside [0, 1]")
        prediction = self.corrected(model_output, timestep)
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            variance_noise = variance_noise * self.noise_share(timestep, eta)
        return super().step(
            prediction,
            timestep,
            sample,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
            variance_noise=variance_noise,
            return_dict=return_dict,
        )


class CorrectedPNDMScheduler(Corrected, PNDMScheduler):
    """PLMS on the corrected prediction. PLMS injects no noise, so there is no variance to reduce."""

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True):
        return super().step(self.corrected(model_output, timestep), timestep, sample, return_dict=return_dict)


CORRECTED = {DDIMScheduler: CorrectedDDIMScheduler, PNDMScheduler: CorrectedPNDMScheduler}


def correct(scheduler, correction: Correction):
    """The corrected version of a scheduler. Raises ValueError for one that `check_correctable` refuses."""
    check_correctable(scheduler)
    new = CORRECTED[type(scheduler)].from_config(scheduler.config)
    new.correction = correction
    return new


def check_correctable(scheduler) -> None:
    """Raise ValueError for a scheduler that cannot be corrected.

    Those are all but DDIM and PLMS, those of a denoiser that does not predict noise, and those that clip samples, where
    a step is not linear in the prediction.
    """
    if type(scheduler) not in CORRECTED:
        known = ", ".join(c.__name__ for c in CORRECTED)
        raise ValueError(f"scheduler: a {type(scheduler).__name__} cannot be corrected; valid: {known}")
    config = scheduler.config
    if config.prediction_type != "epsilon":
        raise ValueError(f"prediction_type: {config.prediction_type!r}; only 'epsilon' can be corrected")
    if config.get("clip_sample") or config.get("thresholding"):
        raise ValueError("clip_sample, thresholding: must be off, a corrected step is linear in the prediction")


def state(scheduler) -> dict[str, Tensor]:
    """The tensors of a corrected scheduler by name, for saving; empty for any other scheduler."""
    return dict(scheduler.correction._asdict()) if isinstance(scheduler, Corrected) else {}


def restore(scheduler, tensors: dict[str, Tensor]):
    """Correct `scheduler` with the tensors that `state` returned; without tensors it stays uncorrected.

    Raises ValueError if some of the tensors are missing, unknown, or not of each timestep.
    """
    if not tensors:
        return scheduler
    if tensors.keys() != set(Correction._fields):
        raise ValueError(
            f"the scheduler's statistics are {', '.join(tensors)}; needed: {', '.join(Correction._fields)}"
        )
    correction = Correction(**{k: torch.as_tensor(v) for k, v in tensors.items()})
    for name, value in correction._asdict().items():
        dimensions = 2 if name == "bias" else 1
        if value.ndim != dimensions or len(value) != len(correction.timesteps) or not value.isfinite().all():
            raise ValueError(
                f"the scheduler's statistic {name} is {value.dtype} {list(value.shape)}, not of each timestep"
            )
    return correct(scheduler, correction)


def trained_on(scheduler) -> dict:
    """What a scheduler says of the model it samples: the target of training, and betas at the ends and in the middle.

    A scheduler without betas says only the first.
    """
    config, betas = scheduler.config, getattr(scheduler, "betas", None)
    said = {name: config[name] for name in ("prediction_type", "num_train_timesteps") if name in config}
    if betas is not None:
        said["betas"] = [float(betas[i]) for i in (0, len(betas) // 2, -1)]
    return said


def differences(one: dict | None, other: dict | None) -> list[str]:
    """Where two of `trained_on` differ, in words; what only one of them says is no difference."""
    if not one or not other:
        return []
    shared = [name for name in one if name in other]
    close = {name: one[name] == other[name] for name in shared}
    if "betas" in shared:
        close["betas"] = all(
            math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one["betas"], other["betas"], strict=True)
        )
    return [f"{name} {one[name]}, not {other[name]}" for name in shared if not close[name]]


class QuadraticDDIMScheduler(DDIMScheduler):
    """DDIM whose timesteps lie closer together where there is less noise, as used for CIFAR-10.

    Timestep i of S is floor((i / (S - 1))^2 * 0.8 T), arXiv:2010.02502, appendix D.2, with the factor 0.8 of its
    released code. Small ones may coincide (i = 0 .. 3 of 100 are all 0); each is still one step. The last step ends at
    the image itself, so `set_alpha_to_one` stays true.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device = None) -> None:
        """Raises ValueError for less than 2 steps, more than the model was trained on, or a part of one."""
        if int(num_inference_steps) != num_inference_steps or not 2 <= num_inference_steps <= (
            self.config.num_train_timesteps
        ):
            raise ValueError(f"num_inference_steps: {num_inference_steps}; 2 to {self.config.num_train_timesteps}")
        self.num_inference_steps = num_inference_steps
        roots = np.linspace(0, np.sqrt(0.8 * self.config.num_train_timesteps), num_inference_steps)
        self.timesteps = torch.from_numpy((roots**2).astype(np.int64)[::-1].copy()).to(device)
        self._position = 0

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """One step of arXiv:2010.02502, equations 12 and 16. Steps are counted, since timesteps may coincide.

        Raises ValueError if `timestep` is not the next one; `set_timesteps` starts a new trajectory.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: {eta} is outside [0, 1]")
        place = self._position
        if place >= len(self.timesteps) or int(timestep) != int(self.timesteps[place]):
            raise ValueError(f"timestep {int(timestep)} is out of turn; call set_timesteps before each trajectory")
        self._position += 1
        last = place + 1 == len(self.timesteps)
        now = self.alphas_cumprod[self.timesteps[place].cpu()]
        then = self.final_alpha_cumprod if last else self.alphas_cumprod[self.timesteps[place + 1].cpu()]
        image = (sample - (1 - now).sqrt() * model_output) / now.sqrt()
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
        sample = then.sqrt() * image + (1 - then - sigma**2).clamp(min=0).sqrt() * model_output
        if eta > 0:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            sample = sample + sigma * noise
        return DDIMSchedulerOutput(sample, image) if return_dict else (sample, image)


def kind(sampler: str) -> type:
    """The class of a scheduler: of a name in SAMPLERS, or of its own name. Raises ValueError for any other name."""
    name = SAMPLERS.get(sampler, sampler)
    found = globals().get(name) or getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(f"sampler: {sampler!r} is not one of {', '.join(SAMPLERS)}, or a scheduler of diffusers")
    return found


def name_of(scheduler) -> str:
    """The name of the sampler that a scheduler is: in SAMPLERS, else of its class. Corrected ones have their base's."""
    own = next(base.__name__ for base in type(scheduler).__mro__ if not issubclass(base, Corrected))
    return next((name for name, class_name in SAMPLERS.items() if class_name == own), own)


def check(scheduler, sampler: str) -> None:
    """Raise ValueError where a scheduler is not the sampler that a model's protocol names."""
    if name_of(scheduler) != sampler or (sampler == "plms" and not scheduler.config.skip_prk_steps):
        raise ValueError(
            f"scheduler: a {type(scheduler).__name__} is not the sampler {sampler} of the model's protocol"
        )
