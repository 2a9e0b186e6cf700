"""Every option of the command line with its type: what `conf/` composes is checked against this before anything slow.

What an option means, and its default, stand in `conf/`, whose comments `--help` prints. An option that is not here is
refused, wherever it was given; a new one needs a field here, and a line with a comment there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from experiments.runner.declaration import AS_TYPED, AtLeast2, ExperimentOptions, Node
from experiments.runner.registry import EXPERIMENTS
from melens.data.reading import check_source, file_text
from melens.data.tasks import OWN_PROMPTS, check_tasks, tasks_in
from melens.errors import MelensError
from melens.models.folders import checkpoint_folders, find_model
from melens.models.specs import (
    AttentionKind,
    Device,
    DeviceMap,
    Dtype,
    MaxMemory,
    ModelSpec,
    Quantize,
    known_models,
    spec_of,
)
from melens.training.recipe import Precision, Tracker
from melens.validation.types import (
    SELECTS,
    SITES,
    Count,
    Flag,
    Name,
    Number,
    Positive,
    Rate,
    Said,
    Select,
    Share,
    Site,
    Start,
    Whole,
    listed,
)

__all__ = ["AS_TYPED", "MaskOptions", "Options", "as_list", "options_of"]


def as_list(value: Any) -> Any:
    """Let one thing stand for a list of one."""
    return value if value is None or isinstance(value, list) else [value]


def _off(value: Any) -> Any:
    """Undo what YAML makes of off."""
    return "off" if value is False else value


def _word(value: Any) -> Any:
    """Undo what YAML makes of true and false."""
    return str(value).lower() if isinstance(value, bool) else value


def _names(value: Any) -> Any:
    """Take what YAML reads as a number for the name that it is: 128000."""
    return [str(one) if type(one) is int else one for one in as_list(value)] if value is not None else None


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise PydanticCustomError("no_pattern", "{why}", {"why": str(error)}) from None
    return pattern


def _existing(folder: str | None) -> str | None:
    if folder is not None and not os.path.isdir(os.path.expanduser(folder)):
        raise PydanticCustomError("no_folder", "there is no such folder")
    return folder


def _find(spec: ModelSpec) -> None:
    if spec.source == "hub":
        find_model(spec.hub_id or spec.name)


T = TypeVar("T")
OneOrMore = Annotated[list[T], Field(min_length=1)]
OptionalAtLeast2 = Annotated[AtLeast2 | None, Said("a whole number of at least 2, or null")]
OptionalCount = Annotated[Count | None, Said("a whole number of at least 1, or null")]
OptionalPositive = Annotated[Positive | None, Said("a number over 0, or null")]
OptionalNumber = Annotated[Number | None, Said("a number of at least 0, or null")]
OptionalShare = Annotated[Share | None, Said("a number over 0 and at most 1, or null")]
Text = Annotated[Name, AS_TYPED, Said("a text")]
OptionalText = Annotated[Name | None, AS_TYPED, Said("a text, or null")]
Pattern = Annotated[Name, AfterValidator(_compiles)]
Folder = Annotated[OptionalText, AfterValidator(_existing)]
Names = Annotated[OneOrMore[Name] | None, BeforeValidator(as_list), Said("a list of names, as [a,b], or null")]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32), Said("a whole number from 0 to 4294967295")]
"""As numpy takes it, which has the smallest range of the libraries that draw."""
Seeds = Annotated[OneOrMore[Seed], BeforeValidator(as_list), Said("a list of whole numbers, as [0,1]")]
AutoFlag = Annotated[Literal["auto"] | Flag, Said("auto, true or false")]


# --- Model, prompts and text ------------------------------------------------------------------------------------------


class ModelOptions(Node):
    """A model of the hub, of a folder, or the embedded one: fields of `melens.models.specs.ModelSpec`."""

    name: Text
    source: Literal["hub", "embedded"]
    hub_id: OptionalText
    family: OptionalText
    paper_me_layer: Annotated[Whole | None, Said("a block, or null")]
    device: Device
    dtype: Dtype
    quantize: Annotated[Quantize | None, Said("8bit, 4bit or null")]
    device_map: DeviceMap
    max_memory: MaxMemory
    offload_folder: OptionalText
    revision: OptionalText
    trust_remote_code: Flag

    @model_validator(mode="after")
    def _is_known(self) -> ModelOptions:
        if self.name == "???":
            raise MelensError("model=hub needs model.name: a hub id (org/model) or a local transformers folder.")
        spec = spec_of(self.name, self.model_dump(exclude={"name"}, exclude_unset=True))
        if not checkpoint_folders(self.name):  # which `Options` allows some experiments
            _find(spec)
        return self


class RandomModelOptions(ModelOptions):
    """A model with random weights, of any architecture and size."""

    source: Literal["random"]  # type: ignore[assignment]
    model_type: Name
    tokenizer: Annotated[Name | None, Said("bytes, a hub id, a folder, or null for none")]
    attention: Annotated[AttentionKind | None, Said("softpick, off_by_one, sigmoid or null")]
    seed: Seed
    config: Annotated[dict[str, Any], Said("fields of transformers' configuration by name")]


class PromptOptions(Node):
    file: OptionalText
    tasks: Names
    max_tokens: OptionalAtLeast2
    bos: Annotated[Literal["auto", "true", "false"], BeforeValidator(_word), Said("auto, true or false")]

    @model_validator(mode="after")
    def _can_be_read(self) -> PromptOptions:
        path = Path(os.path.expanduser(self.file or ""))
        if not path.exists():
            raise MelensError(f"There is no prompt file {self.file}.")
        if self.file is not None:
            file_text(path)
        if self.tasks is not None:
            check_tasks(self.tasks, tasks_in(OWN_PROMPTS if self.file is None else path))
        return self


class CriterionOptions(Node):
    """Fields of `melens.Criterion`."""

    min_abs: Number
    min_ratio: Number
    min_prompts: Rate
    trailing_blocks: Whole
    one_block: Number
    few_blocks: Whole


class DataOptions(Node):
    text: OptionalText
    split: Text
    column: Text
    n_texts: Count
    n_tokens: Annotated[int, Field(strict=True, ge=3), Said("a whole number of at least 3")]

    @model_validator(mode="after")
    def _can_be_read(self) -> DataOptions:
        if self.text is not None and check_source("data.text", self.text):
            file_text(Path(os.path.expanduser(self.text)), self.column)
        return self


# --- Masks ------------------------------------------------------------------------------------------------------------

_AnySelect = Select | Literal["saved"]
_AnyStart = Start | Literal["all_blocks"]
_Blocks = Literal["all", "first"] | OneOrMore[Whole]


class MaskOptions(Node):
    """Arguments of `melens.WeMask`, or lists of them: every combination is a mask of `exp=wemask`."""

    rate: Annotated[Rate | OneOrMore[Rate], Said("a number from 0 (no mask) to 1, or a list of them")]
    select: Annotated[_AnySelect | OneOrMore[_AnySelect], Said(f"{listed((*SELECTS, 'saved'))}, or a list of them")]
    site: Annotated[Site | OneOrMore[Site], Said(f"{listed(SITES)}, or a list of them")]
    start: Annotated[
        _AnyStart | OneOrMore[_AnyStart], Said("a block, me, me+1, me-2 and the like, or all_blocks, or a list of them")
    ]
    layers: Annotated[
        _Blocks | OneOrMore[_Blocks], Said("all, first or a list of blocks, as [12,13], or a list of those")
    ]
    positions: Annotated[
        Literal["first", "massive", "all", "every_call"] | OneOrMore[Whole],
        Said("first, massive, all, every_call or a list of positions, as [0,5]"),
    ]
    strength: Share
    seed: Annotated[Seed | OneOrMore[Seed], Said("a whole number from 0 to 4294967295, or a list of them")]


# --- What a model does ------------------------------------------------------------------------------------------------


class GenerateOptions(Node):
    prompt: Annotated[
        OneOrMore[Name] | Name | None, AS_TYPED, Said("a text that is not empty, a list of them, or null")
    ]
    max_new_tokens: Count
    chat: Flag
    thinking: AutoFlag
    sample: Flag
    temperature: Positive
    top_p: Share
    seeds: Seeds

    @model_validator(mode="after")
    def _thinks_in_chat(self) -> GenerateOptions:
        if self.thinking == "auto" or self.chat:
            return self
        raise MelensError(
            f"generate.thinking={str(self.thinking).lower()} is an option of the chat template, but generate.chat is "
            "false: give generate.chat=true, or leave generate.thinking at auto."
        )


class NeedleOptions(Node):
    lengths: Annotated[
        OneOrMore[Annotated[int, Field(strict=True, ge=64)]], Said("a list of whole numbers of at least 64 tokens")
    ]
    depths: Annotated[OneOrMore[Rate], Said("a list of numbers from 0 to 1")]


class BenchmarkOptions(Node):
    tasks: Names
    masks: Annotated[
        OneOrMore[Annotated[Name, BeforeValidator(_off)]] | None,
        BeforeValidator(as_list),
        Said("a list of presets, as [off,paper], or null"),
    ]
    table: Annotated[Literal[1, 2, 5, 6, 7] | None, Said("1, 2, 5, 6, 7 or null")]
    mode: Annotated[Literal["loglikelihood", "generate"] | None, Said("loglikelihood, generate or null")]
    layers: Annotated[Literal["auto"] | _Blocks, Said("auto, all, first or a list of blocks")]
    limit: OptionalCount
    seeds: Seeds
    data_dir: Folder
    chat: AutoFlag
    thinking: AutoFlag
    temperature: OptionalPositive
    top_p: OptionalShare
    max_new_tokens: Annotated[Literal["auto"] | Count, Said("a whole number of at least 1, or auto")]
    batch_size: Count
    judge: OptionalText
    needle: NeedleOptions

    @model_validator(mode="after")
    def _has_a_judge(self) -> BenchmarkOptions:
        if self.judge is not None:
            try:
                _find(spec_of(self.judge, {}))
            except MelensError as error:
                raise MelensError(f"benchmark.judge: {error}") from None
        return self


class DynamicsOptions(Node):
    """Which checkpoints of a training `exp=dynamics` measures."""

    revisions: Annotated[
        OneOrMore[Name] | None, BeforeValidator(_names), Said("a list of names, as [step0,step1000], or null")
    ]
    steps: Annotated[OneOrMore[Whole] | None, BeforeValidator(as_list), Said("a list of whole numbers, or null")]
    most: Annotated[Literal["all"] | AtLeast2, Said("a whole number of at least 2, or all")]
    pattern: Annotated[Pattern | None, AS_TYPED, Said("a regular expression, or null")]
    tokens_per_step: OptionalCount
    repos: Names


class LoraOptions(Node):
    """Fields of `melens.training.recipe.Lora`."""

    rank: Count
    alpha: Positive
    dropout: Annotated[Number, Field(lt=1), Said("a number from 0 to under 1")]


class TrainingOptions(Node):
    """What is learnt, and fields of `melens.training.recipe.Recipe`: null for what the paper says of them."""

    dataset: OptionalText
    data_dir: Folder
    columns: Annotated[dict[str, Name], Said("like {prompt: question, completion: solution}")]
    split: Text
    limit: OptionalCount
    chat: AutoFlag
    mask: Annotated[Name, BeforeValidator(_off), Said("a preset of conf/wemask, or off")]
    gate: Annotated[Literal["none", "headwise", "elementwise"], Said("none, headwise or elementwise")]
    peft: Annotated[Literal["none", "lora"], Said("none or lora")]
    lora: LoraOptions
    batch_size: OptionalCount
    micro_batch_size: OptionalCount
    lr: OptionalPositive
    epochs: OptionalPositive
    steps: OptionalCount
    warmup: Annotated[Number, Field(lt=1), Said("a share of the steps, from 0 to under 1")]
    weight_decay: OptionalNumber
    max_length: OptionalCount
    max_new_tokens: OptionalCount
    rollouts: OptionalAtLeast2
    temperature: Positive
    beta: OptionalNumber
    format_weight: Number
    precision: Precision
    gradient_checkpointing: Flag
    compile: Flag
    held_out: Annotated[Number, Field(gt=0, lt=1), Said("a number between 0 and 1")]
    validation: Annotated[Name | None, Said("a file, a folder, a hub id or null")]
    trace_every: Annotated[Whole | None, Said("a whole number, or null")]
    trace_prompts: OptionalCount
    log_every: Count
    save_every: Whole
    resume: Folder
    report_to: Tracker
    seed: Seeds
    trainer: Annotated[dict[str, Any], Said("fields of TRL's configuration by name")]


# --- Experiments ------------------------------------------------------------------------------------------------------


def _all_options() -> type[ExperimentOptions]:
    """Make the options of `exp=all`: those of several experiments in one run, each in a node of its name."""
    nodes: Any = {name: (experiment.options, ...) for name, experiment in EXPERIMENTS.items() if experiment.in_all}
    chosen = Annotated[
        OneOrMore[Literal[*nodes]],  # type: ignore[valid-type]
        BeforeValidator(as_list),
        Said(f"a list of at least one of {listed(list(nodes))}"),
    ]
    own: Any = {"name": (Literal["all"], ...), "keep": (Flag, ...), "experiments": (chosen, ...)}
    return create_model("AllOptions", __base__=ExperimentOptions, **own, **nodes)


if TYPE_CHECKING:
    AnyExperiment = ExperimentOptions
else:
    AnyExperiment = Union[(*(experiment.options for experiment in EXPERIMENTS.values()), _all_options())]


# --- All --------------------------------------------------------------------------------------------------------------


class Options(Node):
    """All options of one run.

    Attributes:
        given: what the user said, by option or config group (`wemask.rate`, `exp`), on the command line or by `scale=`;
            it wins over the presets of tables and masks also where it is what they say.
        typed: the names of those that stood on the command line.
        The others are the nodes and keys of `conf/config.yaml`.
    """

    model: Annotated[ModelOptions | RandomModelOptions, Field(discriminator="source")]
    exp: Annotated[AnyExperiment, Field(discriminator="name")]
    prompts: PromptOptions
    wemask: MaskOptions
    dynamics: DynamicsOptions
    criterion: CriterionOptions
    data: DataOptions
    generate: GenerateOptions
    benchmark: BenchmarkOptions
    training: TrainingOptions
    table: Annotated[Literal[1, 2, 3, 4, 6, 7] | None, Said("1, 2, 3, 4, 6 or 7 (5 is exp=benchmark's), or null")]
    max_batch_tokens: Count
    seed: Seed
    figures: Annotated[Literal["svg", "pdf", "png"] | None, Said("svg, pdf, png or null")]
    verbose: Flag
    given: Mapping[str, Any] = {}
    typed: Sequence[str] = ()

    @model_validator(mode="after")
    def _can_be_run(self) -> Options:
        name, chosen = self.given.get("model.name"), self.given.get("model")
        if name is not None and chosen != "hub":
            raise MelensError(f"model.name is for model=hub: give model=hub model.name={name}.")
        if name in known_models() and not os.path.exists(str(name)):
            raise MelensError(f"{name} has a file in conf/model, with options of its own: give model={name}.")
        reads_checkpoints = all(EXPERIMENTS[name].reads_checkpoints for name in self.experiments)
        if self.model.source == "hub" and checkpoint_folders(self.model.name) and not reads_checkpoints:
            find_model(self.model.name)  # which says what to give instead
        if self.figures:
            from melens.figures.saving import check_images  # plotly takes a third of a second

            check_images(f"figures={self.figures}")
        return self

    @property
    def experiments(self) -> dict[str, Any]:
        """The options of each experiment that is asked for, in order."""
        if self.exp.name == "all":
            chosen: Any = self.exp
            return {name: getattr(chosen, name) for name in chosen.experiments}
        return {self.exp.name: self.exp}

    @cached_property
    def requests(self) -> dict[str, Any]:
        """The request of each experiment that has one, by its name: presets and options put together, once.

        Raises:
            MelensError: an option that an experiment cannot have.
        """
        wanted = {name: EXPERIMENTS[name].request for name in self.experiments}
        return {name: request(self) for name, request in wanted.items() if request is not None}

    def changed(self, **nodes: Mapping[str, Any]) -> Options:
        """Return the options with others in some nodes, as if the user had given them."""
        values = {node: getattr(self, node).model_copy(update=dict(own)) for node, own in nodes.items()}
        given = {f"{node}.{key}": value for node, own in nodes.items() for key, value in own.items()}
        changed = self.model_copy(update=values | {"given": {**self.given, **given}})
        changed.__dict__.pop("requests", None)  # a copy keeps what was cached: the requests of before
        return changed

    def plain(self) -> dict[str, Any]:
        """Return the options as `conf/` has them, with what was given, ready for JSON."""
        return self.model_dump(exclude_unset=True)


def options_of(
    plain: Mapping[str, Any] | None = None, schema: type[BaseModel] = Options, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Yield every option by its dotted name: those of a configuration's model and experiment, or without one of all."""
    for name, field in schema.model_fields.items():
        kinds, by = (field.annotation, *get_args(field.annotation)), field.discriminator
        nodes = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        inside = (plain or {}).get(name)
        inside = inside if isinstance(inside, Mapping) else None
        for node in nodes:
            if inside is None or by is None or inside.get(by) in get_args(node.model_fields[str(by)].annotation):
                yield from options_of(inside, node, f"{prefix}{name}.")
        if not nodes and name not in ("given", "typed"):
            yield f"{prefix}{name}", field
