"""What the tests share: a real tokenizer of a few hundred tokens, random models of two layers, one Ray cluster."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny_models import ARCHITECTURES, random_model

from pema_ray.line import BlockingPLM
from pema_ray.line.plm_config import PLMConfig
from pema_ray.line.tokenizer import PLMTokenizer
from pema_ray.plm_owner import EngineConfig, LoadedPLM, LocalPLM, load_plm

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background: the tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None
)
settings.load_profile("tests")

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
CORPUS = [
    "Rewrite each Bible verse in modern English.",
    "Old: And he said unto them, Go ye and tell the people what ye have seen.",
    "Modern: He said to them, Go and tell the people what you have seen.",
    "Translate this from English to German: The house is old and the garden is large.",
    "German: Das Haus ist alt und der Garten ist groß. Wilhelm I. war König von Preußen.",
    "Formal: I would be grateful for your answer. Informal: thx, gimme an answer!!",
] * 4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `architecture` runs once for each tiny model."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", ARCHITECTURES)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make soak` asks for many rounds of the tests that kill."""
    parser.addoption("--soak", type=int, default=0, help="rounds of tests/faults/test_kills.py, each at other moments")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an accelerator are collected everywhere and skip where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no accelerator here"))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Asynchronous tests run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def architectures() -> tuple[str, ...]:
    """Names of all tiny models."""
    return ARCHITECTURES


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of about 380 tokens, with BOS in front of every text and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=379,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_tokens(["<|endoftext|>"], special_tokens=True)  # Qwen's class adds it, whatever the file says
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def plm_tokenizer(tokenizer) -> PLMTokenizer:
    """The same, as stages and services use it."""
    return PLMTokenizer(tokenizer)


@pytest.fixture(scope="session")
def tiny_plm_folder(tokenizer, tmp_path_factory) -> Callable[[str], str]:
    """A saved tiny model of an architecture, with the tokenizer, as a hub snapshot would lie on disk."""

    @cache
    def make(architecture: str, seed: int = 0) -> str:
        folder = tmp_path_factory.mktemp(f"tiny-{architecture}")
        random_model(architecture, len(tokenizer), seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def tiny_plm(tiny_plm_folder) -> Callable[[str], LoadedPLM]:
    """A tiny model, loaded as a user's would be."""

    @cache
    def load(architecture: str) -> LoadedPLM:
        return load_plm(PLMConfig(name=tiny_plm_folder(architecture), dtype="float32", device="cpu", threads=1))

    return load


@pytest.fixture(scope="session")
def tiny_source(tiny_plm) -> Iterator[Callable[[str], BlockingPLM]]:
    """A PLM owner in this process over a tiny model, for callers without an event loop."""
    sources: dict[str, BlockingPLM] = {}

    def make(architecture: str) -> BlockingPLM:
        if architecture not in sources:
            sources[architecture] = BlockingPLM(LocalPLM(tiny_plm(architecture)))
        return sources[architecture]

    yield make
    for source in sources.values():
        source.end()


@pytest.fixture
async def tiny_client(tiny_plm, anyio_backend) -> AsyncIterator[Callable[..., LocalPLM]]:
    """A fresh PLM owner in this process over a shared tiny model, with settings of its engine."""
    clients: list[LocalPLM] = []

    def make(architecture: str, **settings) -> LocalPLM:
        clients.append(LocalPLM(tiny_plm(architecture), EngineConfig(**settings)))
        return clients[-1]

    yield make
    for client in clients:
        await client.end()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray cluster for the whole run, with a home of its own: nothing is written to the user's."""
    import ray

    folder = Path(tempfile.mkdtemp(prefix="pr", dir="/tmp"))  # Ray's socket paths must stay short
    (folder / "home").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        ray.init(
            num_cpus=4,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            _temp_dir=str(folder / "ray"),
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": {**threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}},
        )
        try:
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
