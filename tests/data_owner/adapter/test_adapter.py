"""An adapter computes equation 4 in either space, and its folder loads only if complete and for its own PLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ModelCard

H, R = 16, 5
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def adapter_for(card: ModelCard, **changes) -> PemaAdapter:
    torch.manual_seed(0)
    settings = {"hidden_size": H, "rank": R, "plm_name": card.name, "fingerprint": card.fingerprint, "task": "verses"}
    adapter = PemaAdapter(AdapterConfig(**{**settings, **changes}))
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter.eval()


# ── arithmetic ──────────────────────────────────────────────────────────────


def test_a_fresh_adapter_has_three_maps_of_which_two_are_trained(card):
    adapter = PemaAdapter(AdapterConfig(H, R, card.name, card.fingerprint))
    assert {name: tuple(p.shape) for name, p in adapter.named_parameters()} == {
        "A": (R, H), "B_pd": (H, R), "B_rct": (H, R),
    }  # fmt: skip
    assert {name for name, p in adapter.named_parameters() if p.requires_grad} == {"A", "B_pd"}
    assert not adapter.B_pd.any() and adapter.A.abs().max() <= H**-0.5  # kaiming_uniform with a = √5


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("space", ["pre_norm", "post_norm"])
def test_log_probs_are_equation_4_with_the_norm_on_its_side(card, make_head, space: str, residual: bool):
    head, adapter = make_head(scale=0.5, softcap=4.0), adapter_for(card, space=space, residual=residual)
    f = torch.randn(7, H)
    x = head.norm(f) if space == "post_norm" else f
    h = x @ adapter.A.T @ adapter.B_pd.T + (x if residual else 0)
    expected = head.logits(h if space == "post_norm" else head.norm(h)).softmax(-1)
    log_p = adapter.log_probs(f, head)
    assert log_p.shape == (7, 40) and log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp(), expected)
    torch.testing.assert_close(adapter.enter(f, head), x)
    torch.testing.assert_close(adapter.leave(h, head), h if space == "post_norm" else head.norm(h))


def test_half_precision_keys_enter_as_float32(card, make_head):
    for space in ("pre_norm", "post_norm"):
        assert adapter_for(card, space=space).enter(torch.randn(3, H).half(), make_head()).dtype == torch.float32


@pytest.mark.parametrize("residual", [False, True])
def test_prediction_starts_from_reconstruction(card, residual: bool):
    adapter, f = adapter_for(card, residual=residual), torch.randn(6, H)
    Q = torch.linalg.qr(torch.randn(H, R)).Q
    adapter.start_from_reconstruction(Q.T, Q)
    assert torch.equal(adapter.B_rct, Q)
    torch.testing.assert_close(adapter.predict(f), f if residual else f @ Q @ Q.T)


def test_dropout_is_drawn_only_on_request(card):
    adapter, f = adapter_for(card, dropout=0.5), torch.randn(6, H)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(f, 0.5)
    torch.manual_seed(1)
    assert torch.equal(adapter.train().project(f, drop=True), dropped @ adapter.A.T)
    assert torch.equal(adapter.project(f), f @ adapter.A.T)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rank": H + 1}, "train.rank=17: the rank must lie between 1 and the PLM's hidden size 16"),
        ({"rank": 0}, "train.rank=0"),
        ({"kappa": -0.1}, "train.kappa=-0.1"),
        ({"kappa": 1.5}, "train.kappa=1.5"),
        ({"kappa": float("nan")}, "train.kappa=nan"),
    ],
)
def test_a_rank_above_h_and_a_kappa_outside_0_1_are_refused(card, change: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):
        adapter_for(card, **change)


# ── on disk ─────────────────────────────────────────────────────────────────


def test_what_was_saved_is_loaded_bit_for_bit(card, tmp_path: Path):
    saved = adapter_for(card, space="pre_norm", residual=True, dropout=0.1, kappa=0.4)
    folder = saved.save_pretrained(tmp_path / "deep" / "adapter")
    assert {path.name for path in folder.iterdir()} == FILES
    loaded = PemaAdapter.from_pretrained(folder, card)
    assert loaded.config == saved.config and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))
    readme = (folder / "README.md").read_text()
    assert card.fingerprint in readme and "verses" in readme and "pre-norm, residual" in readme


def test_the_adapter_of_another_plm_is_refused_and_both_are_named(card, tmp_path: Path):
    folder = adapter_for(card).save_pretrained(tmp_path)
    other_card = ModelCard("huge", "b" * 16, H, 40, 96, (1,))
    with pytest.raises(FingerprintMismatch) as caught:
        PemaAdapter.from_pretrained(folder, other_card)
    assert card.label in str(caught.value) and other_card.label in str(caught.value)
    assert PemaAdapter.from_pretrained(folder).config.plm_name == "tiny"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(card, tmp_path: Path, name: str):
    folder = adapter_for(card).save_pretrained(tmp_path / "adapter")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"not an adapter: .*{name}.* is missing"):
        PemaAdapter.from_pretrained(folder)
    with pytest.raises(UserError, match="not an adapter"):
        PemaAdapter.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", b""),
        ("adapter_config.json", b'{"format": "pema"'),
        ("adapter_config.json", b"\xff\xfe"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": 8}'),
        ("adapter_config.json", b'{"format": "pema", "rank": 5}'),
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", b"\xff" * 100),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line_about_its_folder(card, tmp_path: Path, name: str, content: bytes):
    folder = adapter_for(card).save_pretrained(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        PemaAdapter.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_weights_and_a_file_for_a_folder_are_refused(card, tmp_path: Path):
    folder = adapter_for(card).save_pretrained(tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged adapter"):
        PemaAdapter.from_pretrained(folder)
    with pytest.raises(UserError, match="is a file, expected a folder"):
        PemaAdapter.from_pretrained(weights)


def test_weights_that_do_not_fit_their_configuration_are_refused(card, tmp_path: Path):
    folder = adapter_for(card).save_pretrained(tmp_path)
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**described, "rank": R - 1}))
    with pytest.raises(UserError, match="the weights do not fit the configuration.*size mismatch for A") as caught:
        PemaAdapter.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    adapter_for(card).save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["B_pd"]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="Missing key.*B_pd"):
        PemaAdapter.from_pretrained(folder)


# ── checkpoints of the published code ───────────────────────────────────────


def published(path: Path, prefix: str = "", rank: int = R, hidden: int = H) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A checkpoint as the published code writes it: its LoRA layer's maps beside an unused linear layer."""
    draw = torch.Generator().manual_seed(rank)
    A, B = torch.randn(rank, hidden, generator=draw), torch.randn(hidden, rank, generator=draw)
    state = {"weight": torch.randn(hidden, hidden), "bias": torch.randn(hidden), "lora_A": A, "lora_B": B}
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    return path, A, B


@pytest.mark.parametrize("prefix", ["", "module.adapter."])
def test_a_published_checkpoint_predicts_softmax_of_w_norm_of_ba_over_r(card, make_head, tmp_path: Path, prefix: str):
    path, A, B = published(tmp_path / "prediction.pt", prefix)
    head, f = make_head(), torch.randn(9, H)
    loaded = PemaAdapter.from_published(path, card)
    scaled = f @ A.T @ B.T / R
    normed = scaled / (scaled.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * head.norm_weight
    expected = (normed @ head.weight.T + head.bias).softmax(-1)
    torch.testing.assert_close(loaded.log_probs(f, head).exp(), expected)
    assert (loaded.config.space, loaded.config.rank, loaded.config.fingerprint) == ("pre_norm", R, card.fingerprint)


def test_a_published_reconstruction_gives_b_rct_and_survives_saving(card, make_head, tmp_path: Path):
    prediction, _, _ = published(tmp_path / "prediction.pt")
    draw = torch.randn(H, R)
    torch.save({"lora_A": torch.randn(R, H), "lora_B": draw}, tmp_path / "reconstruction.pt")
    loaded = PemaAdapter.from_published(prediction, card, tmp_path / "reconstruction.pt")
    torch.testing.assert_close(loaded.B_rct, draw / R)
    reloaded = PemaAdapter.from_pretrained(loaded.save_pretrained(tmp_path / "adapter"), card)
    f = torch.randn(3, H)
    assert torch.equal(reloaded.log_probs(f, make_head()), loaded.log_probs(f, make_head()))


@pytest.mark.parametrize(
    "content",
    [{"weight": torch.zeros(H, H)}, {}, [torch.zeros(2)], {3: torch.zeros(1)}, {"lora_A": 1, "lora_B": 2}],
    ids=["linear layer", "empty", "list", "numbered", "no tensors"],
)
def test_a_foreign_state_dict_is_refused(card, tmp_path: Path, content):
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="foreign.pt: not a published PEMA checkpoint"):
        PemaAdapter.from_published(tmp_path / "foreign.pt", card)


@pytest.mark.parametrize("content", [b"", b"plain text", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_state_dict_is_refused(card, tmp_path: Path, content: bytes):
    (tmp_path / "foreign.pt").write_bytes(content)
    with pytest.raises(UserError, match="foreign.pt: not a PyTorch state dict"):
        PemaAdapter.from_published(tmp_path / "foreign.pt", card)
    with pytest.raises(UserError, match="missing.pt: no such checkpoint"):
        PemaAdapter.from_published(tmp_path / "missing.pt", card)


def test_a_state_dict_that_carries_code_is_refused_and_not_run(card, tmp_path: Path):
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"lora_A": Hostile()}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="not a PyTorch state dict"):
        PemaAdapter.from_published(tmp_path / "foreign.pt", card)
    assert not marker.exists()


def test_a_published_checkpoint_of_another_hidden_size_is_refused(card, tmp_path: Path):
    path, _, _ = published(tmp_path / "wide.pt", hidden=H + 4)
    with pytest.raises(UserError, match=r"lora_A \(5, 20\).*do not fit tiny \(a{16}\), whose hidden size is 16"):
        PemaAdapter.from_published(path, card)
    torch.save({"lora_A": torch.zeros(R, H), "lora_B": torch.zeros(H, R + 1)}, tmp_path / "copy.pt")
    with pytest.raises(UserError, match="do not fit"):
        PemaAdapter.from_published(tmp_path / "copy.pt", card)
