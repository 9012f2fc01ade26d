"""The LM-head bundle: exact arithmetic, atomic on disk, and clear errors for damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.line import LMHead, LMHeadBundle, ModelCard
from pema_ray.line.lm_head import HeadSpec, fingerprint_of

H, V = 6, 11


def bundle(dtype: torch.dtype = torch.float32) -> LMHeadBundle:
    torch.manual_seed(0)
    tensors = {"weight": torch.randn(V, H), "bias": torch.randn(V), "norm_weight": torch.randn(H)}
    head = LMHead(HeadSpec("rms_norm", 1e-5, 2.0, 3.0), {name: t.to(dtype) for name, t in tensors.items()})
    return LMHeadBundle(ModelCard("m", "f" * 16, H, V, 96, (1, 5)), head, {"tokenizer.json": b"{}", "a": b"\x00\xff"})


def test_logits_are_softcap_of_scale_times_w_norm_f_plus_b():
    head, f = bundle().head, torch.randn(4, H) * 3
    normed = f / (f.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * head.norm_weight
    plain = (normed @ head.weight.T + head.bias) * 2.0
    torch.testing.assert_close(head.norm(f), normed)
    torch.testing.assert_close(head.logits(head.norm(f)), 3.0 * torch.tanh(plain / 3.0))
    torch.testing.assert_close(head.log_probs(head.norm(f)).exp().sum(-1), torch.ones(4))


def test_layer_norm_and_identity_norm_as_defined():
    weight, f = torch.randn(V, H), torch.randn(3, H)
    scale, shift = torch.randn(H), torch.randn(H)
    head = LMHead(HeadSpec("layer_norm", 0.1), {"weight": weight, "norm_weight": scale, "norm_bias": shift})
    centred = f - f.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * scale + shift
    torch.testing.assert_close(head.norm(f), expected)
    assert torch.equal(LMHead(HeadSpec("identity"), {"weight": weight}).norm(f), f)


def test_a_bfloat16_head_norms_in_float32_and_answers_in_float32():
    head, f = bundle(torch.bfloat16).head, torch.randn(4, H)
    assert head.logits(head.norm(f)).dtype == torch.float32
    assert head.norm(f).dtype == torch.float32
    assert head.norm(f.bfloat16()).dtype == torch.bfloat16


def test_a_head_has_no_trainable_parameter_and_needs_a_matrix():
    assert list(bundle().head.parameters()) == []
    for tensors in ({}, {"weight": torch.randn(V)}):
        with pytest.raises(ValueError, match=r"weight of shape \[V, H\]"):
            LMHead(HeadSpec("identity"), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_bundle_loads_bit_for_bit(dtype: torch.dtype, tmp_path: Path):
    saved = bundle(dtype)
    folder = saved.save(tmp_path / "deep" / "bundle")
    loaded = LMHeadBundle.load(folder)
    assert (loaded.card, loaded.head.spec) == (saved.card, saved.head.spec)
    assert loaded.tokenizer_files == saved.tokenizer_files
    assert set(loaded.head.state_dict()) == {"weight", "bias", "norm_weight"}
    for name, tensor in saved.head.state_dict().items():
        assert torch.equal(loaded.head.state_dict()[name], tensor) and loaded.head.dtype == dtype


def test_a_failed_save_leaves_the_old_bundle_and_no_litter(tmp_path: Path, monkeypatch):
    folder = bundle().save(tmp_path / "bundle")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pema_ray.line.lm_head.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        bundle().save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert LMHeadBundle.load(folder).card == bundle().card


def test_saving_again_replaces_the_folder(tmp_path: Path):
    folder = bundle().save(tmp_path / "bundle")
    (folder / "stray").write_text("x")
    bundle().save(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["bundle.json", "lm_head.safetensors", "tokenizer"]


@pytest.mark.parametrize("part", ["bundle.json", "lm_head.safetensors", "tokenizer"])
def test_a_missing_part_is_named(part: str, tmp_path: Path):
    folder = bundle().save(tmp_path / "bundle")
    (folder / part).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"not an LM-head bundle: .*{part} is missing. Run export-head"):
        LMHeadBundle.load(folder)


def test_a_missing_folder_and_a_file_are_no_bundles(tmp_path: Path):
    with pytest.raises(UserError, match="not an LM-head bundle"):
        LMHeadBundle.load(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="it is a file"):
        LMHeadBundle.load(tmp_path / "file")


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b"[]", b'{"format_version": 1}', b""])
def test_a_damaged_description_is_refused(damage: bytes, tmp_path: Path):
    folder = bundle().save(tmp_path / "bundle")
    (folder / "bundle.json").write_bytes(damage)
    with pytest.raises(UserError, match="damaged LM-head bundle|bundle format"):
        LMHeadBundle.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -4])
def test_truncated_tensors_are_refused(keep: int, tmp_path: Path):
    folder = bundle().save(tmp_path / "bundle")
    path = folder / "lm_head.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged LM-head bundle"):
        LMHeadBundle.load(folder)


def test_another_format_and_another_shape_are_refused(tmp_path: Path):
    folder = bundle().save(tmp_path / "bundle")
    description = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(description | {"format_version": 99}))
    with pytest.raises(UserError, match="bundle format 99, expected 1"):
        LMHeadBundle.load(folder)
    (folder / "bundle.json").write_text(json.dumps(description | {"card": description["card"] | {"vocab_size": 12}}))
    with pytest.raises(UserError, match=r"shape \(11, 6\), its card says \(12, 6\)"):
        LMHeadBundle.load(folder)
    (folder / "bundle.json").write_text(json.dumps(description | {"head": description["head"] | {"shear": 1}}))
    with pytest.raises(UserError, match="damaged LM-head bundle: bundle.json: .*shear"):
        LMHeadBundle.load(folder)


def test_a_fingerprint_sees_description_and_bits_but_not_the_format():
    weight = torch.randn(V, H).bfloat16()
    name = fingerprint_of({"a": 1, "b": 2}, weight, None)
    assert name == fingerprint_of({"b": 2, "a": 1}, weight.float())
    changed = weight.clone()
    changed[3, 2] += 1
    assert len({name, fingerprint_of({"a": 1, "b": 3}, weight), fingerprint_of({"a": 1, "b": 2}, changed)}) == 3
