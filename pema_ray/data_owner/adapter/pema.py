"""The PEMA adapter: `h_rct = B_rct A x`, `h_pd = B_pd A x` (paper section 3.3). N rows, H hidden, R rank, V vocabulary.

x is the representation where the adapter acts (`space`: before or after the PLM's final norm). `B_rct` reconstructs x;
`B_pd` predicts the LM head's input for the next token.

Three extensions of published PEMA: attention over the sequence before the maps (`look_back_layers`, in `look_back`),
a local memory (`local_memory_width`, in `local_memory`), and a predicted λ (`predicts_lambda`, in `predicted_lambda`).

On disk a folder: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from pema_ray.data_owner.adapter.local_memory import LocalMemory, log_mixture
from pema_ray.data_owner.adapter.look_back import LookBack
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import LMHead, ModelCard
from pema_ray.runtime.files import atomic_file

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """An adapter's shape and its PLM."""

    hidden_size: int
    rank: int
    plm_name: str
    fingerprint: str
    space: Literal["pre_norm", "post_norm"] = "post_norm"
    """Whether `x` is the representation before or after the PLM's final norm."""
    residual: bool = False
    """`h_pd = x + B_pd A x`: a low-rank correction instead of a low-rank map."""
    dropout: float = 0.0
    kappa: float = 0.2
    task: str = ""
    look_back_layers: int = 0
    look_back_width: int = 256
    look_back_dropout: float = 0.0
    local_memory_width: int = 0
    predicts_lambda: bool = False
    prompt_from: int = 0
    """The first prompt position that it attends to."""
    scale: float = 1.0
    """s of `h = s B A x`; the published code trains with 1/r."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= self.hidden_size:
            raise UserError(
                f"train.rank={self.rank}: the rank must lie between 1 and the PLM's hidden size {self.hidden_size}."
            )
        if not 0 <= self.kappa <= 1:
            raise UserError(f"train.kappa={self.kappa}: κ must lie in [0, 1].")

    @property
    def looks_back(self) -> bool:
        """Whether it needs whole sequences."""
        return self.look_back_layers > 0 or self.local_memory_width > 0


class PemaAdapter(nn.Module):
    """Two low-rank maps with a shared down-projection; no bias, no activation.

    Attributes:
        A: `[R, H]`, B_pd: `[H, R]` (both trained); B_rct: `[H, R]` (stage 1's, frozen afterwards).
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.A = nn.Parameter(torch.empty(config.rank, config.hidden_size))
        self.B_pd = nn.Parameter(torch.zeros(config.hidden_size, config.rank))
        self.B_rct = nn.Parameter(torch.zeros(config.hidden_size, config.rank), requires_grad=False)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as published
        self.look_back: LookBack | None = None
        if config.look_back_layers:
            self.look_back = LookBack(
                config.hidden_size, config.look_back_layers, config.look_back_width, config.look_back_dropout
            )
        self.local_memory: LocalMemory | None = None
        if config.local_memory_width:
            self.local_memory = LocalMemory(config.hidden_size, config.local_memory_width, config.look_back_dropout)
        self.gate: nn.Linear | None = None
        if config.predicts_lambda:  # λ is one until `fit_gate` sets it, after training
            self.gate = nn.Linear(config.hidden_size, 1).requires_grad_(False)
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, 20.0)

    def start_from_reconstruction(self, A: torch.Tensor, B_rct: torch.Tensor) -> None:
        """Start prediction from stage 1's solution, so that PEMA starts as the PLM.

        With `residual`, x is added anyway, and `B_pd` starts at zero.

        Args:
            A, B_rct: with `B_rct A x` near x.
        """
        with torch.no_grad():
            self.A.copy_(A)
            self.B_rct.copy_(B_rct / self.config.scale)
            self.B_pd.copy_(torch.zeros_like(B_rct) if self.config.residual else self.B_rct)

    def enter(self, state_NH: torch.Tensor, head: LMHead) -> torch.Tensor:
        """Map stored representations to this adapter's space, `[N, H]` float32."""
        x = state_NH.float()
        return head.norm(x) if self.config.space == "post_norm" else x

    def leave(self, h_NH: torch.Tensor, head: LMHead) -> torch.Tensor:
        """Map from this adapter's space to the LM head's input, `[N, H]`."""
        return h_NH if self.config.space == "post_norm" else head.norm(h_NH)

    def project(self, x_NH: torch.Tensor, drop: bool = False) -> torch.Tensor:
        """`s A x`, `[N, R]`; `drop` applies the training dropout to the input."""
        down = F.linear(F.dropout(x_NH, self.config.dropout, training=drop), self.A)
        return down if self.config.scale == 1 else down * self.config.scale

    def predict(self, x_NH: torch.Tensor, drop: bool = False) -> torch.Tensor:
        """`h_pd [N, H]`."""
        h = F.linear(self.project(x_NH, drop), self.B_pd)
        return x_NH + h if self.config.residual else h

    def look(self, x_NH: torch.Tensor, target_N: torch.Tensor, example_N: torch.Tensor, head: LMHead) -> torch.Tensor:
        """Each row after attention to the earlier rows of its sequence, `[N, H]`; unchanged without look-back.

        Args:
            target_N: `[N]` int64, the token that follows each row.
            example_N: `[N]` int64, the sequence of each row; rows are grouped by it, in order.
        """
        if self.look_back is None:
            return x_NH
        x_BTH, target_BT, real_BT = _by_sequence(x_NH, target_N, example_N)
        return self.look_back(x_BTH, target_BT, head.weight)[real_BT]

    def recall(
        self, x_NH: torch.Tensor, target_N: torch.Tensor, example_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logarithms of the maps' share and of the local memory's probability of each row's target, `[N]` each.

        Arguments as in `look`; only for an adapter with a local memory.
        """
        assert self.local_memory is not None, "the adapter has a local memory"
        x_BTH, target_BT, real_BT = _by_sequence(x_NH, target_N, example_N)
        log_adapter_BT, log_memory_BT = self.local_memory(x_BTH, target_BT)
        return log_adapter_BT[real_BT], log_memory_BT[real_BT]

    def with_predicted_lambda(self, log_pema_NV: torch.Tensor, state_NH: torch.Tensor, head: LMHead) -> torch.Tensor:
        """`log(g P_PEMA + (1 - g) P_LM)` if λ is predicted; else `log P_PEMA`."""
        if self.gate is None:
            return log_pema_NV
        score = self.gate(self.enter(state_NH, head))
        log_plm = head.log_probs(head.norm(state_NH))
        return torch.logaddexp(log_pema_NV + F.logsigmoid(score), log_plm + F.logsigmoid(-score))

    def predicted_lambda(self, state_NH: torch.Tensor, head: LMHead) -> torch.Tensor:
        """`g` of `with_predicted_lambda`, float32 `[N]`; ones if λ is not predicted."""
        if self.gate is None:
            return torch.ones(len(state_NH), device=state_NH.device)
        return self.gate(self.enter(state_NH, head))[:, 0].sigmoid()

    def log_probs(
        self,
        state_NH: torch.Tensor,
        head: LMHead,
        sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        alone: bool = False,
    ) -> torch.Tensor:
        """float32 log P_PEMA `[N, V]` of representations as the PLM owner sends them (equation 4).

        Args:
            sequences: for an adapter that looks back, `(target_N, example_N, selected_N)`: the first two as `look`
                takes them; log P is that of the selected rows (bool) alone.
            alone: without the predicted λ.

        Raises:
            ValueError: the adapter looks back, and no sequences are given.
        """
        x = self.enter(state_NH, head)
        if sequences is None:
            if self.config.looks_back:
                raise ValueError("this adapter looks back: its rows need their sequences")
            log_p = head.log_probs(self.leave(self.predict(x), head))
            return log_p if alone else self.with_predicted_lambda(log_p, state_NH, head)
        target_N, example_N, selected_N = sequences
        attended = self.look(x, target_N, example_N, head)[selected_N]
        log_p = head.log_probs(self.leave(self.predict(attended), head))
        if self.local_memory is not None:
            log_p = log_mixture(x, log_p, self.local_memory, target_N, example_N, selected_N)
        return log_p if alone else self.with_predicted_lambda(log_p, state_NH[selected_N], head)

    # ── on disk ─────────────────────────────────────────────────────────────

    def save_pretrained(self, folder: str | Path, model_card: str | None = None) -> Path:
        """Write the adapter's folder. Weights are float32."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().float().cpu().contiguous() for name, t in self.state_dict().items()}
        described = {"format": "pema", "format_version": 1, **asdict(self.config)}
        with atomic_file(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary)
        with atomic_file(folder / CARD) as temporary:
            temporary.write_text(model_card or self.model_card(), encoding="utf-8")
        with atomic_file(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(described, indent=2) + "\n")
        return folder

    def model_card(self, figures: str = "") -> str:
        """The adapter's README: its settings, the PLM it needs, how to load it."""
        c = self.config
        looks = f", looks back through {c.look_back_layers} × {c.look_back_width}" if c.look_back_layers else ""
        looks += f", local memory of width {c.local_memory_width}" if c.local_memory_width else ""
        looks += ", predicts λ" if c.predicts_lambda else ""
        return (
            f"# PEMA adapter for {c.task or 'an unnamed task'}\n\n"
            f"- PLM: {c.plm_name}, fingerprint `{c.fingerprint}`. It works with no other.\n"
            f"- rank {c.rank}, hidden size {c.hidden_size}, {c.space.replace('_', '-')}"
            f"{', residual' if c.residual else ''}"
            f"{looks}, κ = {c.kappa}, dropout {c.dropout}\n\n{figures}"
            "```python\nfrom pema_ray.data_owner.adapter.pema import PemaAdapter\n\n"
            'adapter = PemaAdapter.from_pretrained("this/folder")\n```\n\n'
            "It holds what was learned from the data owner's text; treat it as you would treat that text.\n"
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, card: ModelCard | None = None) -> PemaAdapter:
        """Load an adapter, checking that it belongs to the PLM of `card` when one is given.

        Raises:
            FingerprintMismatch: it was trained for another PLM.
            UserError: the folder is incomplete or damaged.
        """
        folder = Path(folder)
        try:
            described = json.loads((folder / CONFIG).read_text())
            tensors = load_file(folder / WEIGHTS)
        except FileNotFoundError as error:
            raise UserError(f"{folder}: not an adapter: {error.filename or error} is missing. Run train.") from None
        except NotADirectoryError:
            raise UserError(f"{folder}: not an adapter: it is a file, expected a folder.") from None
        except (ValueError, SafetensorError) as error:  # broken JSON and broken UTF-8 are ValueErrors
            raise UserError(f"{folder}: damaged adapter: {error}.") from None
        if not isinstance(described, dict) or described.get("format") != "pema":
            raise UserError(f"{folder}: {CONFIG} does not describe a PEMA adapter.")
        names = {field.name for field in fields(AdapterConfig)}
        try:
            config = AdapterConfig(**{name: value for name, value in described.items() if name in names})
        except TypeError as error:
            raise UserError(f"{folder}: damaged adapter: {CONFIG}: {error}.") from None
        if card is not None and config.fingerprint != card.fingerprint:
            label = f"{config.plm_name} ({config.fingerprint})"
            raise FingerprintMismatch(f"The adapter {folder}", label, card.label)
        adapter = cls(config)
        try:
            adapter.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: the weights do not fit the configuration: {reason}") from None
        return adapter.eval()

    @classmethod
    def from_published(
        cls, prediction: str | Path, card: ModelCard, reconstruction: str | Path | None = None
    ) -> PemaAdapter:
        """Load checkpoints of the published code: `lora_A [R, H]`, `lora_B [H, R]`, product scaled by 1/R.

        Args:
            prediction: the stage-2 or stage-3 state dict.
            reconstruction: the stage-1 state dict, for `B_rct`; not needed to generate.

        Raises:
            UserError: a file is not such a checkpoint, or belongs to another hidden size.
        """
        A, B_pd = _read_published(Path(prediction), card)
        config = AdapterConfig(card.hidden_size, A.shape[0], card.name, card.fingerprint, space="pre_norm")
        adapter = cls(config)
        with torch.no_grad():
            adapter.A.copy_(A)
            adapter.B_pd.copy_(B_pd / config.rank)
            if reconstruction is not None:
                adapter.B_rct.copy_(_read_published(Path(reconstruction), card)[1] / config.rank)
        return adapter.eval()


def _by_sequence(
    x_NH: torch.Tensor, target_N: torch.Tensor, example_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as padded sequences: `x [B, T, H]`, targets `[B, T]`, and a mask of the real positions `[B, T]`."""
    lengths = torch.unique_consecutive(example_N, return_counts=True)[1]
    counts = lengths.tolist()
    x_BTH, target_BT = (pad_sequence(list(rows_N.split(counts)), batch_first=True) for rows_N in (x_NH, target_N))
    return x_BTH, target_BT, torch.arange(target_BT.shape[1], device=lengths.device) < lengths[:, None]


def _read_published(path: Path, card: ModelCard) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint.") from None
    except Exception as error:  # torch.load has no error of its own for a foreign file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a PyTorch state dict: {reason}") from None
    named = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {str(name).rsplit(".", 1)[-1]: value for name, value in named if isinstance(value, torch.Tensor)}
    if not {"lora_A", "lora_B"} <= tensors.keys():
        raise UserError(f"{path}: not a published PEMA checkpoint: it holds {', '.join(sorted(tensors)) or 'nothing'}.")
    A, B = tensors["lora_A"].float(), tensors["lora_B"].float()
    if A.ndim != 2 or B.shape != A.T.shape or A.shape[1] != card.hidden_size:
        raise UserError(
            f"{path}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit {card.label}, "
            f"whose hidden size is {card.hidden_size}."
        )
    return A, B
