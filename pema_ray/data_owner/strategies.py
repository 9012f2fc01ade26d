"""How training processes share the work: plain DDP, accelerate or DeepSpeed, behind one small protocol. Knows no Ray.

Whichever is chosen, gradients are averaged over processes, parameters are float32, and the optimiser is Adam; the
state that a checkpoint needs comes out, and goes in, by parameter name.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from pema_ray.config import TrainConfig
from pema_ray.data_owner.objectives import JointObjective
from pema_ray.errors import UserError

Losses = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]  # what `JointObjective.forward` takes
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Place:
    """Where this process stands among the training processes; they have met already (`torch.distributed`)."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        return self.rank == 0


class Strategy(Protocol):
    """An objective wrapped for all processes, with its optimiser."""

    def learn(self, part: Part, last: bool) -> Losses:
        """Add these rows' gradients; the `last` rows of a batch exchange them. The losses come back detached."""
        ...

    def step(self, learning_rate: float, clip: float | None) -> None:
        """Clip the gradient's norm, move the parameters, forget the gradients."""
        ...

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """`<parameter>.<moment>` and `step`, whole, on the CPU; every process must ask."""
        ...

    def load_optimizer_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what `optimizer_state` gave."""
        ...


def make_strategy(config: TrainConfig, place: Place, objective: JointObjective) -> Strategy:
    """The configured strategy around an objective that lies on the place's device."""
    kinds = {"ddp": _DataParallel, "accelerate": _Accelerated, "deepspeed": _DeepSpeed}
    return kinds[config.strategy](config, place, objective)


class _DataParallel:
    """torch's DistributedDataParallel; a single process needs none."""

    def __init__(self, config: TrainConfig, place: Place, objective: JointObjective) -> None:
        self._named = _trained(objective)
        self._optimizer: Any = torch.optim.Adam(self._named.values(), lr=config.learning_rate)
        self._module: Any = objective
        if place.world > 1:  # the frozen head is a buffer of every process's own: it need not be sent round
            devices = [place.device] if place.device.type == "cuda" else None
            self._module = DistributedDataParallel(objective, device_ids=devices, broadcast_buffers=False)

    def learn(self, part: Part, last: bool) -> Losses:
        with nullcontext() if last else self._alone():
            losses = self._module(*part)
            self._backward(losses[0])
        return tuple(loss.detach() for loss in losses)

    def _alone(self) -> Any:
        """Gradients stay in this process for now."""
        return self._module.no_sync() if isinstance(self._module, DistributedDataParallel) else nullcontext()

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float, clip: float | None) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self._named.values()), clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self._named.items():
            if held := self._optimizer.state.get(parameter):
                found |= {f"{name}.{moment}": held[moment].cpu() for moment in _MOMENTS}
                found["step"] = torch.as_tensor(held["step"]).cpu()
        return found

    def load_optimizer_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._named.items() if state else ():
            moments = {moment: state[f"{name}.{moment}"].to(parameter.device, copy=True) for moment in _MOMENTS}
            self._optimizer.state[parameter] = {"step": state["step"].clone(), **moments}


class _Accelerated(_DataParallel):
    """Hugging Face accelerate over the processes that have met already."""

    def __init__(self, config: TrainConfig, place: Place, objective: JointObjective) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        self._named = _trained(objective)
        options = DistributedDataParallelKwargs(broadcast_buffers=False)
        self._accelerator = Accelerator(cpu=place.device.type == "cpu", kwargs_handlers=[options])
        if self._accelerator.num_processes != place.world:
            raise UserError(
                f"train.strategy=accelerate: {place.world} workers, but accelerate counts "
                f"{self._accelerator.num_processes}. Is an ACCELERATE_* variable set in the workers' environment?"
            )
        optimizer = torch.optim.Adam(self._named.values(), lr=config.learning_rate)
        self._module, wrapped = self._accelerator.prepare(objective, optimizer)
        self._optimizer = wrapped.optimizer

    def _backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)


class _DeepSpeed:
    """DeepSpeed's engine, its ZeRO stage from the configuration."""

    def __init__(self, config: TrainConfig, place: Place, objective: JointObjective) -> None:
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(f"train.strategy=deepspeed: deepspeed cannot be imported: {error}.") from None
        self._named = _trained(objective)
        adapter = objective.adapter.config
        self._hidden, self._looks_back, self._device = adapter.hidden_size, adapter.looks_back, place.device
        settings = {
            "train_micro_batch_size_per_gpu": max(1, config.batch_size // place.world // config.accumulate),
            "gradient_accumulation_steps": config.accumulate,
            "gradient_clipping": config.clip or 0.0,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
        }
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed(dist_backend="nccl" if place.device.type == "cuda" else "gloo")
        optimizer = torch.optim.Adam(self._named.values(), lr=config.learning_rate)
        named: Any = list(self._named.values())  # typed as a module there, documented as parameters
        made = deepspeed.initialize(model=objective, optimizer=optimizer, model_parameters=named, config=settings)
        self._engine: Any = made[0]

    def learn(self, part: Part, last: bool) -> Losses:
        self._engine.set_gradient_accumulation_boundary(last)
        losses = self._engine(*part)
        self._engine.backward(losses[0], scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the part; nothing moves before the boundary
        return tuple(loss.detach() for loss in losses)

    def step(self, learning_rate: float, clip: float | None) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        found = {}
        for name, parameter in self._named.items():
            for moment in _MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, moment)
                if whole is not None:
                    found[f"{name}.{moment}"] = whole.detach().cpu().clone()
        if found:
            found["step"] = next(iter(self._engine.optimizer.optimizer.state.values()))["step"].cpu().clone()
        return found

    def load_optimizer_state(self, state: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not state:
            return
        # ZeRO has places for the moments only after a first step: one that moves nothing.
        nothing = torch.zeros(1, self._hidden, device=self._device)
        token = nothing[:, 0].long()
        self.learn((nothing, token, nothing[:, 0], token if self._looks_back else None), last=True)
        self.step(0.0, None)
        for name, parameter in self._named.items():
            for moment in _MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{name}.{moment}"].to(parameter.device), moment)
        for held in self._engine.optimizer.optimizer.state.values():
            held["step"] = state["step"].clone()


def _trained(objective: JointObjective) -> dict[str, torch.nn.Parameter]:
    named = objective.adapter.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}
