"""Options of GradMem."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ...backbone import Backbone
from ...errors import GradmemError, require
from ...inner.meta_gradient import Order
from .chunked import ChunkedOptions
from .form import Form
from .keys_values import KeysValues
from .low_rank import LowRank, Placement

STARTED_OBJECTIVES = ("reconstruction", "attention", "answers")
"""What WRITE can descend with a start that is made from the context; see `write_objectives`."""
STARTS = {"vectors": ("learned", "pooled"), "keys_values": ("learned", "select", "match"), "lora": ("learned",)}
"""What each form of a memory can start with."""
NOT_STARTED = (
    "begin", "chunk_size", "chunk_mode", "gauss_newton_after", "n_ctrl", "projection", "read_lora", "write_head",
    "write_lora",
)  # fmt: skip
"""Options that need a learned start."""


@dataclass(frozen=True, kw_only=True)
class GradMemOptions(ChunkedOptions):
    """Options of `gradmem`."""

    memory: Literal["vectors", "keys_values", "lora"] = "vectors"
    """What a memory is: vectors before the input; keys_values, slots in the cache of every layer; or lora, a change of
    the model's weights by matrices of low rank."""
    n_mem: int = 8
    """Number of memory vectors, m; with keys_values, of slots in every layer. Not used with lora."""
    start: Literal["learned", "pooled", "select", "match"] = "learned"
    """What WRITE begins with: learned, the same for all contexts; or something of the context, which the model reads.
    With vectors that is pooled, hidden states of an inner layer, one vector for each run of neighbours. With
    keys_values it is the entries of the context's own key-value cache that count most (select), also moved until
    attention finds in them what it finds in the whole cache (match)."""
    layer: int = 12
    """With `start: pooled`: the layer whose input is pooled, and which reads the vectors first. Layers are counted from
    0, and those below see no memory."""
    budget: float | None = None
    """With `start: select` or `match`: the fraction of the cache that is kept. Default: n_mem entries for each head."""
    shared: bool = False
    """With `start: select` or `match`: whether all heads of all layers share one budget. If so, a query begins after
    the end of the context; if not, right after the memory."""
    lora_rank: int = 8
    """Rank of the matrices of a lora memory."""
    lora_alpha: float = 16.0
    """A lora memory changes the model by lora_alpha / lora_rank times the product of its matrices."""
    lora_placement: Placement = "between_layers"
    """Where a lora memory acts: between_layers, on the output of each layer; or target_modules, on linear modules."""
    lora_layers: str | int = "all"
    """Layers on which a lora memory acts: all, last_N, or their numbers such as 0,2."""
    lora_targets: str | None = None
    """Endings of the names of target modules, such as q_proj,v_proj; by default all linear modules of the layers."""
    begin: bool = True
    """With keys_values and lora, a learned vector before the tokens predicts the first one. Without it, as published,
    the first token of a context is never learned and the first one of a query is never predicted. No recipe does
    without it."""
    write_steps: int = 5
    """Default number of write steps K, taken on each chunk."""
    write_objective: str = "reconstruction"
    """What WRITE descends: reconstruction, the loss of reconstructing the context; or energy, a learned one, the mean
    over its tokens of a function of their last hidden states (no recipe uses it; the published code has it). With
    `start: select` or `match`: reconstruction; attention, what attention over the memory misses of that over the whole
    cache, layer by layer and without a pass through the model; answers, the KL divergence to the model with the whole
    context on its own answers to questions that fit any text; or several with commas between them, which are summed."""
    inner_lr: float = 1.0
    """Inner learning rate, on the mean token loss. Learned keys and values need larger ones; 10 is published. With
    `start: select` or `match`, keys and values are measured by their size, the root mean square of a head's."""
    learn_inner_lr: bool = False
    """Meta-learn inner learning rates that start from `inner_lr`: one for each memory vector, each head's keys and
    values in each layer, or each matrix. With `start: pooled` the rate of a vector is multiplied by one that is learned
    for each coordinate."""
    learn_momentum: bool = False
    """Descend with momentum. Momentum and inner learning rates are meta-learned for each of the `write_steps`; momentum
    starts from zero. Needs `learn_inner_lr` and `inner_optimizer: sgd`."""
    extra_step_decay: float = 0.5
    """How fast the inner learning rate and momentum fall after `write_steps`: the j-th further step on a chunk divides
    them by 1 + extra_step_decay * j. With 0, the constant rate of the paper, further steps overshoot."""
    gauss_newton_after: int | None = None
    """Take Gauss-Newton steps after so many steps of descent. Each costs several times as much and stores more, without
    training (see `gradmem.inner.gauss_newton`). With `order: second` a meta-gradient passes through all of them."""
    inner_optimizer: Literal["sgd", "adam", "published_adam"] = "sgd"
    """Update rule of the write steps. published_adam clamps gradients to 10, damps those under 1e-4, has no clips and
    counts as a constant in the meta-gradient. No recipe uses it; the published code has it."""
    clip_value: float | None = None
    """Largest absolute value of an element of the inner gradient. No recipe uses it; the published code has it."""
    clip_norm: float | None = None
    """Largest norm of the inner gradient of a sample and a tensor. No recipe uses it; the published code has it."""
    order: Order = "second"
    """How the meta-gradient passes through the write steps: second differentiates the inner gradients, first treats
    them as constants, none stops at each step."""
    last_k: int | None = None
    """With `order: second`: only the last k steps on a chunk are of second order, the earlier ones of first order.
    Gauss-Newton steps do not count."""
    projection: Literal["none", "proj", "per_sample"] = "none"
    """Linear map of the memory before it enters the model: none; proj, one that all samples share (with keys_values,
    one for the keys and one for the values of each layer); or per_sample, only with vectors, one that WRITE updates for
    each sample along with its memory. No recipe uses per_sample; the published code has it."""
    reconstruction: bool = False
    """Train on the write loss after the last step, which takes one more pass over the context. By default, as
    published, it is the loss before the last step."""
    write_lora: int = 0
    """Rank of LoRA adapters that are active in WRITE only; 0 for none."""
    read_lora: int = 0
    """Rank of LoRA adapters that are active in READ only; 0 for none."""
    freeze_backbone: bool = False
    """Train only what this method adds: memory and the vectors around it, projection, write head, inner learning rates,
    momentum and adapters."""
    freeze_embeddings: bool = False
    """Do not train the token embeddings, nor an output layer that shares their weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("inner_lr", "clip_value", "clip_norm", "lora_alpha"):
            value = getattr(self, name)
            require(name, value, value is None or value > 0, "positive")
        for name in ("extra_step_decay", "gauss_newton_after", "last_k", "write_lora", "read_lora"):
            value = getattr(self, name)
            require(name, value, value is None or value >= 0, "at least 0")
        fits = self.learn_inner_lr and self.inner_optimizer == "sgd" and self.write_steps > 0
        wanted = "used with learn_inner_lr, sgd and at least one write step"
        require("learn_momentum", self.learn_momentum, fits or not self.learn_momentum, wanted)
        require("lora_rank", self.lora_rank, self.lora_rank >= 1, "at least 1")
        self._check_form()

        self._check_objective()

    @property
    def objectives(self) -> list[str]:
        """Names of what WRITE descends the sum of."""
        return self.write_objective.split(",")

    def _check_objective(self) -> None:
        known = {"learned": ("reconstruction", "energy"), "pooled": ("reconstruction",)}.get(
            self.start, STARTED_OBJECTIVES
        )
        found, several = self.objectives, known == STARTED_OBJECTIVES
        good = set(found) <= set(known) and len(set(found)) == len(found) and (several or len(found) == 1)
        wanted = " or ".join(known) + (", or several with commas between them" if several else "")
        require("write_objective", self.write_objective, good, wanted)
        good = found == ["reconstruction"] or (not self.reconstruction and self.gauss_newton_after is None)
        wanted = "reconstruction with the options reconstruction and gauss_newton_after"
        require("write_objective", self.write_objective, good, wanted)

    def _check_form(self) -> None:
        """Refuse options that another form of the memory has."""
        every = [field.name for field in fields(self)]
        unused = {
            "vectors": ["begin", *(name for name in every if name.startswith("lora_"))],
            "keys_values": ["n_ctrl", *(name for name in every if name.startswith("lora_"))],
            "lora": ["n_mem", "n_ctrl", "projection"],
        }[self.memory]
        if self.start not in STARTS[self.memory]:
            unused = [*unused, "start"]
        for field in fields(self):
            default = getattr(self, field.name) == field.default
            if field.name in unused and not default:
                raise GradmemError(f"{field.name} is not used with `memory: {self.memory}`: leave it out")
            if field.name in NOT_STARTED and self.start != "learned" and not default:
                raise GradmemError(f"{field.name} is not used with `start: {self.start}`: leave it out")
        cached = self.start in ("select", "match")
        if self.shared and not cached:
            raise GradmemError("shared is used with `start: select` or `match`: leave it out")
        if self.start != "pooled" and self.layer != type(self).layer:
            raise GradmemError("layer is used with `start: pooled`: leave it out")
        require("layer", self.layer, self.layer >= 0, "at least 0")
        if self.budget is not None:
            fits = 0 < self.budget <= 1 and cached
            require(
                "budget", self.budget, fits, "a fraction above 0 and up to 1, with `start: select` or `start: match`"
            )
        if self.lora_targets is not None and self.lora_placement != "target_modules":
            raise GradmemError("lora_targets is used with `lora_placement: target_modules`")
        if self.memory == "keys_values" and self.projection == "per_sample":
            raise GradmemError("keys and values have no projection `per_sample`: take `proj` or `none`")

    def new_form(self, backbone: Backbone) -> Form | None:
        """Build the form of the memory; None for vectors, and for a backbone that no form fits."""
        if self.memory == "vectors" or not backbone.attends:
            return None
        if self.memory == "keys_values":
            return KeysValues(backbone, self.n_mem, self.begin, self.projection == "proj")
        return LowRank(
            backbone,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            placement=self.lora_placement,
            layers=self.lora_layers,
            targets=self.lora_targets,
            begin=self.begin,
        )
