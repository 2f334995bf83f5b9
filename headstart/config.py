"""What a command does, as one frozen dataclass per command.

The command line, the Python call, a YAML file (`--config`) and the key `config` of an output's headstart.json are four
ways to write the same object. In YAML and JSON the keys are the names of the options (`batch-size`), besides
`subcommand`; `set` is a mapping and `methods` a list of NAME or NAME:KEY=VALUE.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from zoo.errors import UserError, unknown
from zoo.options import bounds_problem, option


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """Base of all configurations. Raises UserError where a number is outside its bounds."""

    subcommand: ClassVar[str]

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if problem := bounds_problem(item, value):
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                raise UserError(f"--{_key(item.name)} {shown}: give {problem}")

    def to_record(self) -> dict[str, Any]:
        """JSON values under the names of the options; what is not set is left out."""
        values = {_key(item.name): _plain(getattr(self, item.name)) for item in dataclasses.fields(self)}
        known = {key: value for key, value in values.items() if value not in (None, {}, [])}
        return {"subcommand": self.subcommand, **known}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], where: str = "config") -> Self:
        """The inverse of `to_record`. UserError for an unknown or missing key, or a value of another type."""
        fields = {_key(item.name): item for item in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        values = {}
        for key, value in record.items():
            if key == "subcommand":
                continue
            if _key(key) not in fields:
                raise unknown(f"option of {cls.subcommand} in {where}", key, fields)
            name = fields[_key(key)].name
            values[name] = _typed(hints[name], value, f"{where}: {key}")
        missing = [key for key, item in fields.items() if item.name not in values and _required(item)]
        if missing:
            raise UserError(f"{where}: {cls.subcommand} needs the option {missing[0]!r}; add it")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CommandConfig):
    """`headstart generate`: initial weights for a target, as a checkpoint folder."""

    subcommand: ClassVar[str] = "generate"

    target: str | dict[str, Any]  # a config.json, its folder, a hub id, or a parsed config
    method: str
    out: str
    zoo: str | None = None  # without a zoo, `donor` is a checkpoint folder or a hub id
    donor: str | None = None
    model: str | None = None  # a trained pipeline or autoencoder: a folder or a hub id
    tokenizer: str | None = None  # else the target folder's, else the donors'
    set: dict[str, str] = field(default_factory=dict)  # options of the method
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None  # of the written tensors, else the target config's, else float32


@dataclass(frozen=True, kw_only=True)
class LoraConfig(CommandConfig):
    """`headstart lora`: an initial LoRA adapter, as an adapter folder."""

    subcommand: ClassVar[str] = "lora"

    base: str  # the model that is adapted: a folder or a hub id
    method: str
    rank: int
    out: str
    reference: str | None = None  # a folder, a hub id or analysis.json[#MODEL], for methods that follow another model
    alpha: float | None = option(None, above=0)  # lora_alpha; else the rank
    targets: tuple[str, ...] = ("all-linear",)  # names of the modules to adapt
    set: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None  # else float32 for the adapter, and the dtype on disk for a changed base


@dataclass(frozen=True, kw_only=True)
class CompareConfig(CommandConfig):
    """`headstart compare`: one target trained from several initialisations on the same data."""

    subcommand: ClassVar[str] = "compare"

    target: str | dict[str, Any]
    methods: tuple[str, ...]  # NAME or NAME:KEY=VALUE:…; `default` comes first if it is not among them
    corpus: str
    out: str
    zoo: str | None = None
    donor: str | None = None  # for methods that take one
    model: str | None = None
    tokenizer: str | None = None
    steps: int = option(300, least=1)  # training steps of each run
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = option((1e-3, 3e-3, 6e-3), above=0)  # learning rates, tuned per method
    default_scales: tuple[float, ...] = option((1.0, 2.0, 4.0), above=0)  # of the default's std, tuned with its rate
    tuning_seeds: int | None = option(None, least=1)  # tune on the first so many seeds, else on all
    batch_size: int = option(16, least=1)  # windows of text per step
    sequence: int = option(64, least=1)  # tokens per window
    windows: int = option(64, least=1)  # held-out windows at each measurement
    workers: int | None = option(None, least=1)  # processes of one thread, else chosen by the target's size
    keep_going: bool = False  # leave out methods that refuse the target, and report why
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("seeds", "lrs", "default_scales"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise UserError(f"--{_key(key)} {','.join(map(str, values))}: give different numbers")
        if 1.0 not in self.default_scales:
            raise UserError("--default-scales: include 1, the default as it is, such as 1,2,4")
        if self.tuning_seeds is not None and self.tuning_seeds > len(self.seeds):
            raise UserError(f"--tuning-seeds {self.tuning_seeds}: give at most {len(self.seeds)}, the number of seeds")


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig(CommandConfig):
    """`headstart analyze`: statistics of the weights of donors."""

    subcommand: ClassVar[str] = "analyze"

    out: str
    zoo: str | None = None
    donor: str | None = None  # without a zoo a folder or a hub id
    ranks: tuple[int, ...] = option((16, 64, 256), least=2)  # numbers of singular values by which layers are compared
    bootstraps: int = option(500, least=1)  # replicates behind each p-value of a fit
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CommandConfig):
    """`headstart evaluate`: lm-eval scores of a checkpoint or an adapter."""

    subcommand: ClassVar[str] = "evaluate"

    model: str  # a checkpoint or an adapter: a folder or a hub id
    tasks: tuple[str, ...]  # names that lm-eval knows, and JSONL files of questions
    out: str | None = None
    base: str | None = None  # the model that an adapter adapts, else the one that its config names
    limit: int | None = option(None, least=1)  # only the first questions of each task
    batch_size: int = option(16, least=1)
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class ZooAddConfig(CommandConfig):
    """`headstart zoo add`: checkpoints become donors of a zoo."""

    subcommand: ClassVar[str] = "zoo add"

    sources: tuple[str, ...]  # hub ids (id or id@revision) and folders
    zoo: str
    revision: str | None = None  # for hub ids without one
    shard: str = "0/1"  # I/N: only every N-th source, from number I


@dataclass(frozen=True, kw_only=True)
class ZooTrainConfig(CommandConfig):
    """`headstart zoo train`: the embedded zoo, trained on this machine."""

    subcommand: ClassVar[str] = "zoo train"

    zoo: str
    preset: str = "demo"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderConfig(CommandConfig):
    """`headstart train autoencoder`."""

    subcommand: ClassVar[str] = "train autoencoder"

    zoo: str
    out: str
    steps: int | None = option(None, least=1)  # else the default of the training
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class TrainDiffusionConfig(CommandConfig):
    """`headstart train diffusion`."""

    subcommand: ClassVar[str] = "train diffusion"

    zoo: str
    autoencoder: str
    out: str
    steps: int | None = option(None, least=1)
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class DemoConfig(CommandConfig):
    """`headstart demo`: everything on the embedded zoo."""

    subcommand: ClassVar[str] = "demo"

    out: str = "demo"
    quick: bool = False
    seed: int = 0


COMMANDS: dict[str, type[CommandConfig]] = {
    cls.subcommand: cls
    for cls in (
        GenerateConfig, LoraConfig, CompareConfig, AnalyzeConfig, EvaluateConfig, ZooAddConfig, ZooTrainConfig,
        TrainAutoencoderConfig, TrainDiffusionConfig, DemoConfig,
    )
}  # fmt: skip


def read_record(path: str | Path) -> dict[str, Any]:
    """The configuration in a headstart.json (under `config`), or a YAML or JSON file that is one, as a mapping.

    Raises UserError where there is no such file, or no mapping in it."""
    import yaml

    path = Path(path)
    path = path / "headstart.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a YAML file, a headstart.json or the folder that holds one")
    try:
        content = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: is neither YAML nor JSON ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no mapping of options; write one option a line, as KEY: VALUE")
    if "config" not in content and "versions" in content:
        raise UserError(f"{path}: records no configuration; it is from an older headstart, run its `command`")
    return content.get("config", content)


def config_of(record: Mapping[str, Any], where: str = "config") -> CommandConfig:
    """The configuration of whatever command a record names under `subcommand`. Raises UserError where it names none."""
    if record.get("subcommand") not in COMMANDS:
        raise unknown(f"subcommand in {where}", str(record.get("subcommand")), COMMANDS)
    return COMMANDS[record["subcommand"]].from_record(record, where)


def settings_of(words: typing.Iterable[str]) -> dict[str, str]:
    """["KEY=VALUE", …] as a mapping. Raises UserError where there is no `=`."""
    pairs = [word.partition("=") for word in words]
    for key, equals, value in pairs:
        if not equals:
            raise UserError(f"--set {key}{value}: write it as KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _key(name: str) -> str:
    return name.replace("_", "-")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type. A tuple may be written as a list, or as one string with commas."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [kind for kind in arguments if kind is not type(None)]
        nested = [kind for kind in kinds if isinstance(value, typing.get_origin(kind) or kind)]
        return _typed((nested or kinds)[0], value, where)
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(_typed(arguments[0], item.strip() if isinstance(item, str) else item, where) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: is {value!r}; give a mapping")
        return {str(key): _typed(arguments[1], inner, f"{where}.{key}") for key, inner in value.items()}
    if hint is Any:
        return value
    return _scalar(hint, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    wrong = UserError(f"{where}: is {value!r}; give one {kind.__name__}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise wrong
    if value is None or isinstance(value, list | Mapping) or (isinstance(value, bool) and kind is not str):
        raise wrong
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise wrong
    try:
        return kind(value)
    except ValueError:
        raise wrong from None
