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

from pema_ray.config import PLMConfig
from pema_ray.line import BlockingPLM
from pema_ray.line.tokenizer import PLMTokenizer
from pema_ray.plm_owner import EngineConfig, LoadedPLM, LocalPLM, load_plm

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in a shell's background: the tests of Ctrl-C need it
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None
)
settings.load_profile("tests")

ARCHITECTURES = (
    "opt",
    "opt_without_final_norm",
    "gpt2",
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "cohere",
    "granite",
    "mamba",
    "jamba",
    "granite_hybrid",
    "qwen3_next",
)
MAX_POSITIONS = 96
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


def random_model(architecture: str, vocab_size: int, seed: int = 0):
    """Two layers of random weights, large enough that norms, scales and positions all matter; exact in bfloat16."""
    import transformers as t

    common = {
        "vocab_size": vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    opt = {
        **common,
        "init_std": 0.2,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "dropout": 0.0,
    }
    modern = {
        **common,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": MAX_POSITIONS,
    }
    without_head_size = {name: value for name, value in modern.items() if name != "head_dim"}
    mamba2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1}
    delta_rule = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    configs = {
        "opt": lambda: t.OPTConfig(**opt, word_embed_proj_dim=32),
        "opt_without_final_norm": lambda: t.OPTConfig(**opt, word_embed_proj_dim=16, do_layer_norm_before=False),
        "gpt2": lambda: t.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=MAX_POSITIONS),
        "llama": lambda: t.LlamaConfig(**modern, tie_word_embeddings=False),
        "qwen2": lambda: t.Qwen2Config(**modern, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**modern),
        "gemma": lambda: t.GemmaConfig(**modern),
        "gemma2": lambda: t.Gemma2Config(**modern, final_logit_softcapping=5.0, sliding_window=12),
        "cohere": lambda: t.CohereConfig(**without_head_size, logit_scale=0.25),
        "granite": lambda: t.GraniteConfig(**without_head_size, logits_scaling=4.0),
        "mamba": lambda: t.MambaConfig(
            **common,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            time_step_rank=4,
            max_position_embeddings=MAX_POSITIONS,
        ),
        "jamba": lambda: t.JambaConfig(
            **without_head_size,
            **experts,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
        ),
        "granite_hybrid": lambda: t.GraniteMoeHybridConfig(
            **without_head_size,
            **mamba2,
            layer_types=["mamba", "attention"],
            num_local_experts=2,
            num_experts_per_tok=1,
            shared_intermediate_size=32,
        ),
        "qwen3_next": lambda: t.Qwen3NextConfig(
            **modern, **delta_rule, **experts, moe_intermediate_size=16, shared_expert_intermediate_size=16
        ),
        "qwen3_5": lambda: t.Qwen3_5TextConfig(**modern, **delta_rule),
        "falcon_h1": lambda: t.FalconH1Config(**without_head_size, **mamba2, mamba_d_ssm=64),
        "lfm2": lambda: t.Lfm2Config(**without_head_size, layer_types=["conv", "full_attention"]),
        "bamba": lambda: t.BambaConfig(**without_head_size, **mamba2, attn_layer_indices=[1]),
    }
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(configs[architecture]())
    with torch.no_grad():
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                for parameter in module.parameters(recurse=False):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


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
