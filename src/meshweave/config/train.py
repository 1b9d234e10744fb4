"""`train:` what may a run file say of the loop and the optimizer?"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from meshweave.config.fields import Strict

Beta = Annotated[float, Field(ge=0, lt=1)]


class CheckpointConfig(Strict):
    """When a run saves its state, from which `--resume` goes on."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    every: PositiveInt | None = 500
    """Steps from one checkpoint to the next, and one after the last step; null: none but that, those by the clock, and one when
    the run is asked to stop."""
    every_minutes: PositiveFloat | None = None
    """The same by the clock, as well."""
    keep: PositiveInt | None = 3
    """How many are kept, the newest ones; null keeps all."""
    asynchronous: Annotated[bool, Field(alias="async")] = True
    """Steps go on while a checkpoint is written; the ranks' memory (of the host) then holds a copy of parameters and optimizer
    state."""
    max_failures: PositiveInt = 3
    """So many saves in a row that fail end the run."""
    verify_on_load: bool = False
    """Compare checksums before a run goes on; sizes always are."""


class TrainConfig(Strict):
    """The loop and the optimizer (AdamW, linear warm-up, cosine decay)."""

    steps: PositiveInt
    batch_size: PositiveInt
    """Samples of one step, over all lanes and microbatches."""
    microbatches: PositiveInt = 1
    """Parts a step is worked in, one after the other; their gradients are added up."""
    pack: bool = False
    """Lay the samples of a lane's microbatch one behind the other in one sequence, each attending within itself, instead of in
    rows padded to the longest; sequences that are cut over `cp` or `tp` always are."""
    max_tokens: PositiveInt | None = None
    """Packed, in training: tokens that a lane's sequence of one microbatch may hold. A step that does not fit is refused; a
    sample that alone is longer counts as unreadable (`data.on_error`). Left out, sequences are as long as they come, but even."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate, reached in the last step of the warm-up. After it the rate falls along half a cosine, from the peak in
    the step that follows the warm-up towards `min_lr_ratio` of it at step number `steps`, which is one past the last."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The rate that the decay falls to, as a share of the peak."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the rate rises in equal parts: it is peak × (step + 1) / warmup_steps, steps counted from 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """Share of a matrix (any tensor of two or more dims) that an update takes away, times the learning rate; biases and norms
    have none, and what gets no gradient does not decay."""
    router_aux_loss: NonNegativeFloat | None = None
    """Models with experts: coefficient of the loss that keeps their load even (`model/routing.py` defines it; it is 1 where the
    load is even). Left out, the model's own `router_aux_loss_coef` if its config sets `output_router_logits`, else 0."""
    router_aux_scope: Literal["lane", "microbatch"] = "lane"
    """Tokens over which the load shall be even: one lane's microbatch, or all lanes of a microbatch."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Bound of the one global gradient norm over all modules: gradients are multiplied by bound / (norm + 1e-6) where that is
    below 1; null turns clipping off."""
    max_skipped_steps: PositiveInt = 10
    """A step whose loss or gradient is not finite makes no update, on any rank; so many in a row end the run."""
    log_every: PositiveInt = 10
    """Steps between log lines."""
    checkpoint: CheckpointConfig | None = CheckpointConfig()
    """Saved state; null saves none."""
    resume: Literal["auto"] | None = None
    """`auto`: go on from the newest whole checkpoint of the run folder if there is one, as `--resume` does, else start."""

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "TrainConfig":
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is more than steps={self.steps}; the peak would never be reached")
        return self
