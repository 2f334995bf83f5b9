"""Fixtures that any test may use: the real checkpoints, and tiny ones made on the spot."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# A shell that runs the tests in the background has them ignore Ctrl-C, `nohup` a closed terminal, and their children
# with them: some test it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Commands that tests start share what they learn of configs, and write nothing to the user's own folder.
if "HEADSTART_CACHE" not in os.environ:
    os.environ["HEADSTART_CACHE"] = tempfile.mkdtemp(prefix="headstart-tests-")
    atexit.register(shutil.rmtree, os.environ["HEADSTART_CACHE"], ignore_errors=True)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real checkpoints, corpora and evaluation sets beside the repository."""
    if not (SHARED / "models").is_dir():
        pytest.skip("the real checkpoints are not here: ../shared/data is missing")
    return SHARED


@pytest.fixture(scope="session")
def real_models() -> Path:
    """The folder of really trained models that `make real` fetched."""
    folder = os.environ.get("HEADSTART_REAL")
    if not folder or not list(Path(folder).glob("*.gguf")):
        pytest.skip("the real models are not here: `make real` fetches 0.35 GB and runs this test")
    return Path(folder)


def make_llama(folder: Path, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """A real Llama of 20 tensors, saved by `save_pretrained` to `folder`; overrides are options of LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**options | overrides)).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture
def tiny_llama() -> Callable[..., Path]:
    """make(folder, seed=0, max_shard_size="5GB", **overrides of the config) -> folder."""
    return make_llama


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """A command that a test runs in this process sets the level and the handlers of our loggers."""
    loggers = [logging.getLogger(name) for name in ("zoo", "autoencoder", "diffusion", "baselines", "headstart")]
    before = [(logger.level, logger.handlers) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers = handlers
