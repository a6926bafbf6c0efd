"""What GradMem descends with in WRITE: inner learning rates, momentum, and the order of the meta-gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ...inner.compiled import Graphs
from ...inner.meta_gradient import Order, Step, Strategy, descend
from ...inner.optimizers import OPTIMIZERS, Rates, Tensors, Update, heavy_ball
from .gradmem_options import GradMemOptions
from .method import Method

Shape = tuple[int, ...]


class InnerLoop(Method):
    """Base of GradMem methods: the write steps, for whatever tensors and whatever loss."""

    options: GradMemOptions
    compiles: bool = True
    """Whether the loss of WRITE can be compiled: it depends on its arguments alone and changes nothing in the model."""
    log_inner_lr: nn.Parameter | nn.ParameterDict | None
    """Logarithms of learned inner learning rates; with momentum, for each step."""
    momentum: nn.Parameter | None
    """Learned momentum of each step."""
    update: Update
    graphs: Graphs

    def _prepare_descent(self, own: GradMemOptions, shapes: dict[str, Shape] | Shape) -> None:
        """Create the parameters of the write steps, and say what of the backbone is trained.

        Parameters
        ----------
        own : GradMemOptions
        shapes : dict of tuple, or tuple
            Shapes of learned inner learning rates, by tensor; or of those of the one tensor `memory`.
        """
        self.options = own
        self.reconstruction = own.reconstruction
        self.update, self.graphs = OPTIMIZERS[own.inner_optimizer], {}
        self.backbone.requires_grad_(not own.freeze_backbone)
        if own.freeze_embeddings:
            self.backbone.model.get_input_embeddings().requires_grad_(False)
        self.log_inner_lr = self._new_log_rates(shapes) if own.learn_inner_lr else None
        zeros = torch.zeros(own.write_steps, dtype=torch.float32, device=self.device)
        self.momentum = nn.Parameter(zeros) if own.learn_momentum else None

    def _states(
        self,
        loss: Callable[..., Tensor],
        start: Tensors,
        steps: int,
        given: Sequence[Tensor],
        until: float | None,
        more: bool = False,
    ) -> Iterator[Step]:
        """Descend a loss as the options say; the arguments are those of `gradmem.inner.descend`."""
        own, constant = self.options, self._constant
        return descend(
            loss,
            start,
            self.update if self.momentum is None else heavy_ball(self._momentum),
            lambda step: self._rates(step, start),
            steps,
            given=given,
            order=self._order,
            last_k=own.last_k,
            strategy=self._strategy,
            graphs=self.graphs,
            more=more,
            clip_value=None if constant else own.clip_value,
            clip_norm=None if constant else own.clip_norm,
            until=until,
        )

    @property
    def _constant(self) -> bool:
        """Whether the meta-gradient takes the steps as constants, whatever `order` says."""
        return self.options.inner_optimizer == "published_adam"

    @property
    def _order(self) -> Order:
        return "first" if self._constant and self.options.order == "second" else self.options.order

    @property
    def _strategy(self) -> Strategy:
        return "unroll" if self.strategy == "compile" and not self.compiles else self.strategy

    def _forward_context(self) -> Callable[[], AbstractContextManager[None]]:
        """Choose how the backbone computes the write loss, by whether its gradient is differentiated again."""
        if not torch.is_grad_enabled() or self._order != "second":
            return self.backbone.training_attention
        return self.backbone.eager_attention if self._strategy == "compile" else self.backbone.double_backward

    def inner_lrs(self) -> list[float]:
        """Return the learned inner learning rates, or the shared one; with momentum, of each step."""
        learned = self._learned_rates().values()
        return [rate for own in learned for rate in own.exp().flatten().tolist()] or [self.options.inner_lr]

    def inner_parameters(self) -> list[nn.Parameter]:
        """Return the learned inner learning rates and momentum; see `Method.inner_parameters`."""
        return [*self._learned_rates().values(), *([] if self.momentum is None else [self.momentum])]

    def learned_of_steps(self, steps: int) -> Tensors:
        """Rates and momentum as the first `steps` steps take them, by name of their weight.

        Returns
        -------
        dict of Tensor
            One row for each step. Without learned momentum it is zero, and all steps start from one rate.
        """
        falls = [math.log(self._step_decay(step)) for step in range(steps)]
        moved = self.momentum is not None
        found = {"momentum": torch.stack([self._momentum(step) if moved else torch.zeros(()) for step in range(steps)])}
        for name, rates in self.named_parameters():
            if name.startswith("log_inner_lr"):
                own = [self._at(rates, step) if moved else rates for step in range(steps)]
                found[name] = torch.stack([rate + fall for rate, fall in zip(own, falls, strict=True)])
        return found

    def _step_decay(self, step: int) -> float:
        return 1 / (1 + self.options.extra_step_decay * max(0, step + 1 - self.write_steps))

    def _rates(self, step: int, names: Iterable[str]) -> Rates:
        factor = self._step_decay(step)
        rates: dict[str, float | Tensor] = dict.fromkeys(names, self.options.inner_lr * factor)
        for name, learned in self._learned_rates().items():
            log_rate = learned if self.momentum is None else self._at(learned, step)
            rates[name] = log_rate.exp().to(self.backbone.model.get_input_embeddings().weight.dtype) * factor
        return rates

    def _new_log_rates(self, shapes: dict[str, Shape] | Shape) -> nn.Parameter | nn.ParameterDict:
        value, steps = math.log(self.options.inner_lr), (self.write_steps,) if self.options.learn_momentum else ()

        def rates(shape: Shape) -> nn.Parameter:
            return nn.Parameter(torch.full((*steps, *shape), value, dtype=torch.float32, device=self.device))

        if isinstance(shapes, tuple):
            return rates(shapes)
        return nn.ParameterDict({name: rates(shape) for name, shape in shapes.items()})

    def _learned_rates(self) -> dict[str, nn.Parameter]:
        """The logarithms of learned inner learning rates, by tensor of the memory."""
        learned: Any = self.log_inner_lr
        if learned is None:
            return {}
        return {"memory": learned} if isinstance(learned, nn.Parameter) else dict(learned.items())

    def _momentum(self, step: int) -> Tensor:
        assert self.momentum is not None
        return self._at(self.momentum, step) * self._step_decay(step)

    def _at(self, learned: Tensor, step: int) -> Tensor:
        """Return what was learned for a step, or for the last step if there are further ones."""
        return learned[min(step, len(learned) - 1)]
