"""What is trained on what: a recipe with its data, its gates and how often the model is inspected; light to import."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from melens.training.recipe import Recipe

__all__ = ["QUANTIZED", "SPREAD", "TrainingPlan"]

SPREAD = (
    "A model that model.device_map or model.max_memory spreads over devices cannot be trained. Leave them out, or "
    "shard it over GPUs: accelerate launch --config_file conf/training/accelerate/fsdp2.yaml experiments/run.py ..."
)
QUANTIZED = "A quantised model cannot be trained, because its weights cannot change. Load it without model.quantize."


@dataclass(frozen=True)
class TrainingPlan:
    """A training but for its model and its mask.

    Attributes:
        recipe: hyperparameters.
        dataset, data_dir, columns, split, limit: as for `load_training_data`.
        chat: learn in the tokenizer's chat template; None does so if there is one.
        gate: kind of gated attention that is added; None for none.
        trace_every: inspect the model each so many steps, besides at the beginning and at the end; 0 not in between.
        trace_prompts: on how many prompts, of `pretrain` rows of the text that is held out.
        held_out: of `pretrain`, the share of documents for the validation loss.
        validation: of `pretrain`, another text for it, as `dataset`.
    """

    recipe: Recipe
    dataset: str
    data_dir: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    limit: int | None = None
    chat: bool | None = None
    gate: str | None = None
    trace_every: int = 0
    trace_prompts: int = 4
    held_out: float = 0.01
    validation: str | None = None

    def on_device(self, *, gpu: bool) -> TrainingPlan:
        """Choose the precision where the recipe leaves it to the machine: mixed on a GPU, else float32."""
        if self.recipe.precision != "auto":
            return self
        return replace(self, recipe=replace(self.recipe, precision="mixed" if gpu else "float32"))
