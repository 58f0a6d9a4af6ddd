"""Distill: a float teacher's soft output as the target of the network that is trained."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_lowbit.errors import ConfigError
from lightning_lowbit.modules.revert import revert
from lightning_lowbit.plugins.checkpoint import KEY, has_low_bit_keys, initialize_from
from lightning_lowbit.plugins.patching import Patches

__all__ = ["Distill", "soft_cross_entropy"]

LOGGED = "distill_loss"


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the mean of -sum_c p_c log q_c, with p and q the softmax of teacher / T and student / T.

    ReActNet's distributional loss (arXiv:2003.03488, sec. 4.3, in the form of its code): the Kullback-Leibler
    divergence of q from p plus the entropy of p, on which no weight depends. T^2 keeps the gradient's size while T
    varies (Hinton et al., arXiv:1503.02531).

    Args:
        student, teacher: logits or log-probabilities [N, classes, ...].
        temperature: T; above 1 it brings out what the teacher thinks of the wrong classes.
    Returns:
        scalar, at least float32; the mean goes over all axes but the classes.

    >>> soft_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, -5.0]]))  # log 2
    tensor(0.6931)
    """
    precise = torch.promote_types(student.dtype, torch.float32)
    p = F.softmax(teacher.to(precise) / temperature, dim=1)
    log_q = F.log_softmax(student.to(precise) / temperature, dim=1)
    return -(p * log_q).sum(dim=1).mean() * temperature**2


class Distill(Callback):
    """Train toward the output of a float teacher, without a change to the LightningModule.

    Wherever it stands in the list, beside QuantCallback or without: in every training step, what ``self(x)`` returns
    is compared with what the teacher returns for the same arguments. With several such calls in a step the mean of
    their losses counts; calls under ``torch.no_grad()`` do not. The loss is logged as "distill_loss".

    Args:
        teacher: a module that is called as the trained one is; it goes to its device and into eval mode, and is
            neither trained nor saved. Or the path of a float checkpoint, for a float copy of the trained module.
        weight: factor on the distillation loss.
        temperature: of both softmaxes.
        keep_loss: add the loss that training_step returns; without, only the teacher is followed (ReActNet).
    """

    def __init__(
        self,
        teacher: Any,  # nn.Module | str | Path: the command line would list every class of modules in its help
        weight: float = 1.0,
        temperature: float = 1.0,
        keep_loss: bool = False,
    ) -> None:
        if not isinstance(teacher, (nn.Module, str, Path)):
            raise ConfigError(
                f"Distill(teacher={type(teacher).__name__}): expected a torch module or the path of a float checkpoint."
            )
        for name, value in (("weight", weight), ("temperature", temperature)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"Distill({name}={value!r}): expected a finite number above 0.")
        self.teacher, self.weight, self.temperature, self.keep_loss = teacher, weight, temperature, keep_loss
        self._network: nn.Module | None = None  # the teacher of the fit that is on
        self._patches = Patches()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self._leave()
        if not pl_module.automatic_optimization:
            raise ConfigError(
                f"{type(pl_module).__name__}: Distill changes the loss that training_step returns, and under manual "
                "optimization nobody reads that. Set automatic_optimization = True, or add "
                "lightning_lowbit.callbacks.distill.soft_cross_entropy to the loss yourself."
            )
        before = pl_module.__dict__.get("training_step")

        def step(module: Any, *args: Any, **kwargs: Any) -> Any:
            original = functools.partial(type(module).training_step, module) if before is None else before
            return self._step(module, original, *args, **kwargs)

        # A plain function bound by partial, as the life cycle's: a deepcopy of the module rebinds it to the copy.
        patched = functools.partial(step, pl_module)
        # Lightning and calibration ask the step for its parameters.
        patched.__wrapped__ = pl_module.training_step  # type: ignore[attr-defined]
        self._patches.set(pl_module, "training_step", patched)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """All layers are built and on their device, and a checkpoint that is resumed has been read."""
        self._teacher_of(pl_module)

    def _teacher_of(self, module: Any) -> nn.Module:
        if self._network is None:
            if isinstance(self.teacher, nn.Module):
                _check_apart(self.teacher, module)
                network = self.teacher
            else:
                network = _float_copy(module, self.teacher)
            self._network = module.trainer.precision_plugin.convert_module(network.to(module.device).eval())
        return self._network

    def _step(self, module: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # calibration runs steps too
            return original(*args, **kwargs)
        losses: list[Tensor] = []
        teacher = self._teacher_of(module)  # a search for the learning rate trains before on_fit_start comes to us
        # Only for the step: under DistributedDataParallel the step itself runs inside a call of the module.
        hook = module.register_forward_hook(functools.partial(self._compare, teacher, losses), with_kwargs=True)
        try:
            result = original(*args, **kwargs)
        finally:
            hook.remove()
        own = result.get("loss") if isinstance(result, Mapping) else result
        if own is None:  # the user skips the batch, or Lightning says what is missing
            return result
        if not losses:
            raise ConfigError(
                f"{type(module).__name__}: its training_step returned a loss without calling self(...) with gradients, "
                "so there is no output to compare with the teacher's. Let forward return the logits and call it as "
                "self(x) in training_step."
            )
        distilled = torch.stack(losses).mean()
        if not module.trainer.barebones:
            module.log(LOGGED, distilled.detach())
        loss = self.weight * distilled + (own if self.keep_loss else 0.0)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _compare(
        self, teacher: nn.Module, losses: list[Tensor], module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Forward hook on the trained module, bound to its teacher and to the list that takes the loss."""
        if not torch.is_grad_enabled():
            return
        with torch.no_grad():
            soft = teacher(*args, **kwargs)
        if not (_is_logits(output) and _is_logits(soft) and output.shape == soft.shape):
            raise ConfigError(
                f"{type(module).__name__}: forward returns {_shape(output)}, the teacher "
                f"({type(teacher).__name__}) {_shape(soft)} for the same arguments. Expected two tensors of one "
                "shape [N, classes, ...] with at least 2 classes: let forward return the logits alone, and take a "
                "teacher with the same classes."
            )
        losses.append(soft_cross_entropy(output, soft, self.temperature))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        self._patches.undo()
        if self._network is not None:
            self._network.cpu()  # as Lightning does with the trained module
            self._network = None


def _float_copy(module: nn.Module, path: str | Path) -> nn.Module:
    """The float network that ``module`` was converted from, with the weights of a file."""
    network = copy.deepcopy(module)
    revert(network)
    given = f"Distill(teacher={str(path)!r})"
    try:
        initialize_from(path, network)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"init_from={str(path)!r}", given, 1)) from error
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if KEY in saved or has_low_bit_keys(saved):
        raise ConfigError(
            f"{given} was trained in low bits, and its weights without their grids are another network. Expected a "
            "float checkpoint; for a low-bit teacher pass the module that load_from_checkpoint returns."
        )
    return network


def _check_apart(teacher: nn.Module, module: nn.Module) -> None:
    """A teacher that is trained along teaches nothing."""
    trained = {id(parameter): name for name, parameter in module.named_parameters()}
    shared = [trained[id(parameter)] for parameter in teacher.parameters() if id(parameter) in trained]
    if shared:
        raise ConfigError(
            f"{shared[0]}: this parameter of {type(module).__name__} is the teacher's too ({len(shared)} such in all): "
            "it would be trained and quantized along. Pass Distill(copy.deepcopy(network)), taken from the float "
            "network, and keep it out of the LightningModule."
        )


def _is_logits(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1 and output.shape[1] > 1


def _shape(output: Any) -> str:
    return f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
