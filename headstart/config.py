"""What a command does, as one frozen dataclass per command.

The command line, the Python call, a YAML file (`--config`) and the key `config` of an output's headstart.json are four
ways to write the same object. In YAML and JSON the keys are the names of the options (`batch-size`), besides
`subcommand`; `set` is a mapping and `methods` a list of NAME or NAME:KEY=VALUE.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from headstart.config_values import check_text, convert, setting_text, shown_value
from zoo.errors import UserError, unknown
from zoo.options import bounds_problem, option

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPE_NAMES = ("float32", "bfloat16", "float16")
DTYPE_ADVICE = "give --dtype float32, bfloat16 or float16"
CHOICES = {"device": DEVICES, "dtype": DTYPE_NAMES}
NAMES = (
    "target", "method", "methods", "out", "zoo", "donor", "model", "tokenizer", "base", "reference", "corpus", "tasks",
    "sources", "autoencoder", "preset", "revision", "name", "targets", "shard", "text",
)  # fmt: skip
MAPPINGS = ("set", "corpus")  # options that the command line takes as repeated KEY=VALUE, where they are mappings
POSITIONAL = ("sources", "name")  # options that the command line takes without a --name


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """Base of all configurations. Raises UserError for a value of another type, or outside its bounds or choices."""

    subcommand: ClassVar[str]

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = _normalized(item.name, getattr(self, item.name))
            value = convert(hints[item.name], value, f"--{option_key(item.name)}")
            object.__setattr__(self, item.name, value)
            if problem := bounds_problem(item, value):
                shown = ",".join(map(shown_value, value)) if isinstance(value, tuple) else shown_value(value)
                raise UserError(f"--{option_key(item.name)} {shown}: give {problem}")
            check_device_or_dtype(item.name, value)
            _check_texts(item.name, value)

    def to_record(self) -> dict[str, Any]:
        """JSON values under the names of the options. Options without a value are left out."""
        values = {option_key(item.name): getattr(self, item.name) for item in dataclasses.fields(self)}
        known = {key: value for key, value in values.items() if value not in (None, {}, ())}
        return {
            "subcommand": self.subcommand,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in known.items()},
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "config") -> Self:
        """The inverse of `to_record`. Raises UserError for an unknown or missing key, or a value of another type."""
        values = cls.converted(record, where)
        for item in dataclasses.fields(cls):
            if item.name not in values and is_required(item):
                raise UserError(f"{where}: {cls.subcommand} needs the option {option_key(item.name)!r}; add it")
        return cls(**values)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """From the values of the command line, by field name; None means not given."""
        return cls(**{name: value for name, value in options.items() if value is not None})

    @classmethod
    def converted(cls, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The values of a record by field name, each of its field's type."""
        fields = {option_key(item.name): item.name for item in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        values = {}
        for key, value in record.items():
            if key == "subcommand":
                continue
            name = fields.get(option_key(str(key)))
            if name is None:
                raise unknown(f"option of {cls.subcommand} in {where}", str(key), fields)
            values[name] = convert(hints[name], value, f"{where}: {key}")
            check_device_or_dtype(name, values[name])
        return values

    def to_command(self) -> str:
        """The command line of this configuration. Options at their defaults are left out."""
        words = ["headstart", *self.subcommand.split()]
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if is_required(item) or value != default_of(item):
                words += _option_words(item.name, value)
        return shlex.join(words)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CommandConfig):
    """`headstart generate`: initial weights for a target, as a checkpoint folder."""

    subcommand: ClassVar[str] = "generate"

    target: str | Path | dict[str, Any]  # a config.json, its folder, a hub id, or a parsed config
    method: str
    out: str | Path
    zoo: str | Path | None = None  # without a zoo, `donor` is a checkpoint folder or a hub id
    donor: str | None = None
    model: str | Path | None = None  # a trained pipeline or autoencoder: a folder or a hub id
    tokenizer: str | Path | None = None  # of the target; else the one in the target's folder, else that of the donors
    text: str | Path | None = None  # a sample of what the model will be trained on, for methods that take one
    set: Mapping[str, Any] = field(default_factory=dict)  # options of the method
    seed: int = 0
    device: str = "auto"  # a CUDA GPU if one is available, else the CPU
    dtype: str | None = None  # of the written tensors, else the target config's, else float32
    max_shard_size: str = "1GB"  # of the files of weights; a larger tensor has a file of its own


@dataclass(frozen=True, kw_only=True)
class LoraConfig(CommandConfig):
    """`headstart lora`: an initial LoRA adapter, as an adapter folder."""

    subcommand: ClassVar[str] = "lora"

    base: str | Path  # the model that is adapted: a folder or a hub id
    method: str
    rank: int = option(least=1)
    out: str | Path
    reference: str | Path | None = None  # for methods that follow a model: a folder, a hub id or analysis.json[#MODEL]
    alpha: float | None = option(None, above=0)  # lora_alpha; else the rank
    targets: tuple[str, ...] = ("all-linear",)  # names of the modules to adapt
    set: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"  # a CUDA GPU if one is available, else the CPU
    dtype: str | None = None  # else float32 for the adapter, and the dtype on disk for a changed base

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise UserError("--targets: give module names with commas, or all-linear")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(CommandConfig):
    """`headstart compare`: one target, or LoRA adapters of one base, trained from several initialisations on the same
    data. Either `target` or `base` is given."""

    subcommand: ClassVar[str] = "compare"

    target: str | Path | dict[str, Any] | None = None
    base: str | Path | None = None  # the model that adapters adapt: a folder or a hub id
    rank: int | None = option(None, least=1)  # of the adapters
    reference: str | Path | None = None  # for LoRA methods that follow a model, as for `headstart lora`
    alpha: float | None = option(None, above=0)  # lora_alpha; else the rank
    targets: tuple[str, ...] = ()  # names of the modules to adapt; else all-linear
    methods: tuple[str, ...]  # NAME or NAME:KEY=VALUE:…; `default` comes first if it is not among them
    corpus: str | Path  # a text, JSON lines, Parquet or CSV file, a folder of such files, or a hub data set
    out: str | Path
    split: str | None = None  # of a data set, else train
    text_column: str | None = None  # of a data set, else text
    zoo: str | Path | None = None
    donor: str | None = None  # for methods that take one
    model: str | Path | None = None
    tokenizer: str | Path | None = None
    text: str | Path | None = None  # for methods that take one, else the beginning of the corpus
    steps: int = option(300, least=1)  # training steps of each run
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = option((1e-3, 3e-3, 6e-3), above=0)  # learning rates, tuned per method
    default_scales: tuple[float, ...] = option(
        (1.0, 2.0, 4.0), above=0
    )  # factors on the default initialisation's standard deviation, tuned with lr
    tuning_seeds: int | None = option(None, least=1)  # tune on the first N seeds, else on all
    batch_size: int = option(16, least=1)  # windows of text per step
    sequence: int = option(64, least=1)  # tokens per window
    windows: int = option(64, least=1)  # held-out windows at each measurement
    workers: int | None = option(None, least=1)  # processes of one thread, else chosen by the target's size
    keep_going: bool = False  # leave out methods that refuse the target, and report why
    device: str = "auto"  # a CUDA GPU if one is available, else the CPU
    dtype: str = "float32"  # of the products in training: bfloat16 is autocast, with weights in float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "float16":
            raise UserError("--dtype float16: gradients would need a scale; give float32 or bfloat16")
        if not self.methods:
            raise UserError("--methods: give one or more methods, such as default,row-column")
        self._check_what_is_trained()
        for key in ("seeds", "lrs", "default_scales"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise UserError(f"--{option_key(key)} {','.join(map(str, values))}: give one or more different numbers")
        if 1.0 not in self.default_scales:
            raise UserError("--default-scales: include 1, the default as it is, such as 1,2,4")
        if self.tuning_seeds is not None and self.tuning_seeds > len(self.seeds):
            raise UserError(f"--tuning-seeds {self.tuning_seeds}: give at most {len(self.seeds)}, the number of seeds")

    def _check_what_is_trained(self) -> None:
        """UserError where options of models and of adapters are mixed."""
        if self.target is None and self.base is None:
            raise UserError("nothing to train: give --target CONFIG for models, or --base MODEL --rank R for adapters")
        if self.target is not None and self.base is not None:
            raise UserError("--target and --base: give one of them, --target for models or --base for LoRA adapters")
        of_models, of_adapters = ("zoo", "donor", "model"), ("rank", "reference", "alpha", "targets")
        wrong, kind, needed = (
            (of_adapters, "LoRA adapters", "--base instead of --target")
            if self.base is None
            else (of_models, "models", "--target instead of --base")
        )
        given = next((key for key in wrong if getattr(self, key) not in (None, ())), None)
        if given is not None:
            raise UserError(f"--{given} {getattr(self, given)}: is for {kind}; leave it out, or give {needed}")
        if self.base is not None and self.rank is None:
            raise UserError(f"--base {self.base}: give --rank R as well, the rank of every pair A, B")
        if self.base is not None and self.default_scales not in ((1.0,), type(self).default_scales):
            raise UserError("--default-scales: is for models; leave it out, or give --target instead of --base")


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(CommandConfig):
    """`headstart analyze`: statistics of the weights of donors."""

    subcommand: ClassVar[str] = "analyze"

    out: str | Path
    zoo: str | Path | None = None
    donor: str | None = None  # without a zoo a folder or a hub id
    ranks: tuple[int, ...] = option((16, 64, 256), least=2)  # numbers of singular values by which layers are compared
    bootstraps: int = option(500, least=1)  # bootstrap samples for each p-value
    seed: int = 0
    device: str = "auto"  # a CUDA GPU if one is available, else the CPU

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ranks:
            raise UserError("--ranks: give one or more ranks, such as 16,64,256")
        if self.zoo is None and self.donor is None:
            raise UserError("nothing to analyze: give --zoo DIR, --donor FOLDER (or a hub id), or both")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CommandConfig):
    """`headstart evaluate`: lm-eval scores of a checkpoint or an adapter."""

    subcommand: ClassVar[str] = "evaluate"

    model: str | Path  # a checkpoint or an adapter: a folder or a hub id
    tasks: tuple[str, ...]  # names that lm-eval knows, and JSONL files of questions
    out: str | Path | None = None
    base: str | Path | None = None  # the model that an adapter adapts, else the one that its config names
    limit: int | None = option(None, least=1)  # only the first questions of each task
    batch_size: int = option(16, least=1)
    seed: int = 0
    device: str = "auto"  # a CUDA GPU if one is available, else the CPU
    dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise UserError("--tasks: give names that lm-eval knows, or JSONL files")


@dataclass(frozen=True, kw_only=True)
class ZooAddConfig(CommandConfig):
    """`headstart zoo add`: checkpoints become donors of a zoo."""

    subcommand: ClassVar[str] = "zoo add"

    sources: tuple[str, ...]  # hub ids (id or id@revision) and folders
    zoo: str | Path
    revision: str | None = None  # for hub ids without one
    shard: str = "0/1"  # I/N: only every N-th source, from number I
    no_health: bool = False  # do not examine the donors

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UserError("nothing to add: give folders or hub ids")


@dataclass(frozen=True, kw_only=True)
class ZooMergeConfig(CommandConfig):
    """`headstart zoo merge`: the donors of several zoos become donors of one."""

    subcommand: ClassVar[str] = "zoo merge"

    sources: tuple[str, ...]  # folders of zoos
    zoo: str | Path

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UserError("nothing to merge: give folders of zoos")


@dataclass(frozen=True, kw_only=True)
class ZooTrainConfig(CommandConfig):
    """`headstart zoo train`: the embedded zoo, trained on this machine."""

    subcommand: ClassVar[str] = "zoo train"

    zoo: str | Path
    preset: str = "demo"
    corpus: Mapping[str, str] = field(default_factory=dict)  # {name: file or folder of text}, for specialists
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderConfig(CommandConfig):
    """`headstart train autoencoder`."""

    subcommand: ClassVar[str] = "train autoencoder"

    zoo: str | Path
    out: str | Path
    corpus: Mapping[str, str] = field(default_factory=dict)  # {donor, its text's name, or all: file or folder of text}
    steps: int | None = option(None, least=1)  # else the default of the training
    distill: bool = False  # minimise the distance to the donors' predictions instead of the loss on text
    seed: int = 0
    device: str = "auto"  # a CUDA GPU if one is available, else the CPU


@dataclass(frozen=True, kw_only=True)
class TrainDiffusionConfig(CommandConfig):
    """`headstart train diffusion`."""

    subcommand: ClassVar[str] = "train diffusion"

    zoo: str | Path
    autoencoder: str | Path
    out: str | Path
    corpus: Mapping[str, str] = field(default_factory=dict)  # {donor, its text's name, or all: file or folder of text}
    steps: int | None = option(None, least=1)
    seed: int = 0
    device: str = "auto"  # a CUDA GPU if one is available, else the CPU


@dataclass(frozen=True, kw_only=True)
class DemoConfig(CommandConfig):
    """`headstart demo`: train, generate and compare on the embedded zoo."""

    subcommand: ClassVar[str] = "demo"

    out: str | Path = "demo"
    quick: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(CommandConfig):
    """`headstart methods`: the methods, or one of them with its options."""

    subcommand: ClassVar[str] = "methods"

    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class ZooListConfig(CommandConfig):
    """`headstart zoo list`: the donors of a zoo."""

    subcommand: ClassVar[str] = "zoo list"

    zoo: str | Path


@dataclass(frozen=True, kw_only=True)
class ZooVerifyConfig(CommandConfig):
    """`headstart zoo verify`: the bytes of a zoo compared with its manifest."""

    subcommand: ClassVar[str] = "zoo verify"

    zoo: str | Path


CONFIGS: dict[str, type[CommandConfig]] = {
    cls.subcommand: cls
    for cls in (
        GenerateConfig, LoraConfig, CompareConfig, AnalyzeConfig, EvaluateConfig, ZooAddConfig, ZooMergeConfig,
        ZooTrainConfig, ZooListConfig, ZooVerifyConfig, TrainAutoencoderConfig, TrainDiffusionConfig, DemoConfig,
        MethodsConfig,
    )
}  # fmt: skip


def config_of(record: Mapping[str, Any], where: str = "config") -> CommandConfig:
    """The configuration of the command that a record names under `subcommand`. Raises UserError where it names none."""
    subcommand = record.get("subcommand")
    if subcommand is None:
        raise UserError(f"{where}: names no command; add a line such as `subcommand: generate`")
    if not isinstance(subcommand, str) or subcommand not in CONFIGS:
        raise unknown(f"subcommand in {where}", str(subcommand), CONFIGS)
    return CONFIGS[subcommand].from_record(record, where)


def check_device_or_dtype(name: str, value: Any) -> None:
    """Raises UserError for a device or a dtype that is not among the known ones."""
    if name == "dtype" and value is not None and value not in DTYPE_NAMES:
        raise UserError(f"dtype {value!r} cannot be written; {DTYPE_ADVICE}")
    if name in CHOICES and value is not None and value not in CHOICES[name]:
        raise unknown(name, str(value), CHOICES[name])


def option_key(name: str) -> str:
    """The name of a field as an option writes it: batch-size of batch_size."""
    return name.replace("_", "-")


def is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def default_of(item: dataclasses.Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default


def _check_texts(name: str, value: Any) -> None:
    """UserError for text that no file, record or terminal can hold."""
    label, is_name = f"--{option_key(name)}", name in NAMES
    if name in MAPPINGS and isinstance(value, Mapping):
        for key, setting in value.items():
            check_text(label, key, is_name)
            check_text(f"{label} {key}", setting, is_name)
    for text in value if isinstance(value, tuple) else [value]:
        if isinstance(text, str):
            check_text(label, text, is_name)
    if name == "out" and isinstance(value, str) and os.path.abspath(value) == os.path.abspath(os.sep):
        raise UserError(f"--out {value}: is the root of the file system; give a folder in it")


def _normalized(name: str, value: Any) -> Any:
    """Paths as strings, lists as tuples and settings as text, so that equal configurations compare equal."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return tuple(_normalized(name, item) for item in value)
    if name == "set":
        return {key: setting_text(setting) for key, setting in value.items()}
    return value


def _option_words(name: str, value: Any) -> list[str]:
    """An option as words of a command line."""
    if name in MAPPINGS and isinstance(value, Mapping):
        return [word for key, setting in value.items() for word in (f"--{option_key(name)}", f"{key}={setting}")]
    if name in POSITIONAL:
        return [str(item) for item in (value if isinstance(value, tuple) else [value])]
    if isinstance(value, bool):
        return [f"--{option_key(name)}"]
    if isinstance(value, tuple):
        return [f"--{option_key(name)}", ",".join(map(str, value))]
    return [f"--{option_key(name)}", "config.json" if isinstance(value, dict) else str(value)]
