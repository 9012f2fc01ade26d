"""What the gradient line gives away, measured as two attacks on real text.

- At the PLM owner: the label of each row, from the gradient of the loss with respect to its representation. Known are
  the head and the representations; the loss is that of the head alone, or of an unknown adapter.
- At the data owner: the key and value projections of the PLM's first layer, from `read_prefix` of single tokens, where
  the LM head's rows are the embeddings. With `engine.prefix_start: kept` there is nothing to ask.

N rows, H hidden, V vocabulary, m tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import torch
from _harness import Aim, device_of, options, show, write_results
from build_memory import PACKAGED, tiny_model

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.training.objectives import JointObjective
from pema_ray.errors import UserError
from pema_ray.line import ExtractBatch, LMHead, LMHeadBundle
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner import EngineConfig, LocalPLM
from pema_ray.plm_owner.model.load import LoadedPLM, load_plm
from pema_ray.tasks import Prompter, load_pairs, load_task

NAME = "gradient_leaks"
AIMS: dict[str, Aim] = {}


# ── labels ──────────────────────────────────────────────────────────────────


async def text_rows(client: LocalPLM, bundle: LMHeadBundle, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Representations `[N, H]` of the targets of real pairs, float32, and their labels `[N]`."""
    task = load_task("bible_modern")
    prompter = Prompter(bundle.tokenizer(), task, (), chat=False)
    examples = [
        prompter.encode_pair(p) for p in load_pairs(task, {}, {"train": pairs, "dev": 1, "test": 1}, 0)["train"]
    ]
    batch = ExtractBatch([[*e.prompt, *e.target] for e in examples], [len(e.prompt) - 1 for e in examples])
    end = bundle.card.eos_token_ids[0]
    return (await client.extract(batch)).float(), torch.tensor([t for e in examples for t in (*e.target, end)])


def gradients(
    bundle: LMHeadBundle, state_NH: torch.Tensor, label_N: torch.Tensor, rank: int, steps: int
) -> torch.Tensor:
    """`D [N, H]` of a residual adapter's loss, after so many steps of Adam on these rows; none: of the head alone."""
    card = bundle.card
    torch.manual_seed(0)
    adapter = PemaAdapter(AdapterConfig(card.hidden_size, rank, card.name, card.fingerprint, residual=True))
    torch.nn.init.zeros_(adapter.B_pd)
    objective = JointObjective(adapter, bundle.head, kappa=0.0)
    optimizer = torch.optim.Adam(adapter.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(state_NH, label_N)[0].backward()
        optimizer.step()
    leaf = state_NH.clone().requires_grad_()
    objective(leaf, label_N)[0].backward()
    assert leaf.grad is not None
    return leaf.grad


def labels_of(head: LMHead, state_NH: torch.Tensor, d_state_NH: torch.Tensor) -> torch.Tensor:
    """The label `[N]` whose loss under the head alone has the most similar gradient, by cosine.

    `D = Jᵀ(Wᵀp - W_y) / N`, with J of the final norm: so `Jᵀ W_y` points where `Jᵀ Wᵀ p - N D` does.
    """
    found = []
    for state, d in zip(state_NH.split(128), (d_state_NH * len(state_NH)).split(128), strict=True):
        leaf = state.clone().requires_grad_()
        normed = head.norm(leaf)
        expected_nH = head.log_probs(normed.detach()).exp() @ head.weight.float()
        (pulled_nH,) = torch.autograd.grad(normed, leaf, expected_nH, retain_graph=True)
        rest_nH = pulled_nH - d
        # J is symmetric up to the norm's weight: (Jᵀ w) · r = w · (J r), by a product in forward mode
        pushed_nH = torch.func.jvp(head.norm, (state,), (rest_nH,))[1]
        size_V = head.weight.float().norm(dim=1)
        found.append((pushed_nH @ head.weight.float().T / size_V).argmax(-1))
    return torch.cat(found)


# ── projections ─────────────────────────────────────────────────────────────


async def projections(client: LocalPLM, bundle: LMHeadBundle, tokens: int) -> torch.Tensor:
    """The first layer's projections to keys and values, its norm's weight in them, `[2 · G · D, H]`: least squares."""
    shape = (await client.describe()).prefix_shape
    assert shape is not None
    ids = torch.randperm(bundle.card.vocab_size, generator=torch.Generator().manual_seed(0))[:tokens].tolist()
    read = [(await client.read_prefix([token])).embeddings[0, : 2 * shape.heads * shape.head_size] for token in ids]
    embedded_mH = bundle.head.weight[torch.tensor(ids)].double()
    normed_mH = embedded_mH / (embedded_mH.square().mean(-1, keepdim=True) + bundle.head.spec.epsilon).sqrt()
    return torch.linalg.lstsq(normed_mH, torch.stack(read).double()).solution.T


def true_projections(plm: LoadedPLM) -> torch.Tensor:
    """The same from the weights of a Llama."""
    layer: Any = plm.model.model.layers[0]
    weight = torch.cat([layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight])
    return (weight * layer.input_layernorm.weight).detach().double()


async def measure(o: argparse.Namespace, config: PLMConfig) -> tuple[dict[str, float], dict[str, Any]]:
    plm = load_plm(config)
    client, kept = LocalPLM(plm), LocalPLM(plm, EngineConfig(prefix_start="kept"))
    bundle = await client.lm_head()
    state_NH, label_N = await text_rows(client, bundle, o.pairs)
    ratios: dict[str, float] = {}
    for steps in (0, o.steps):
        d_state_NH = gradients(bundle, state_NH, label_N, min(128, bundle.card.hidden_size), steps)
        for wire in (torch.float32, torch.bfloat16):
            found_N = labels_of(bundle.head, state_NH, d_state_NH.to(wire).float())
            of = "the head alone" if not steps else "a trained adapter"
            ratios[f"labels read from gradients of {of}, {str(wire)[6:]}"] = float((found_N == label_N).float().mean())
    truth = true_projections(plm)
    error = (await projections(client, bundle, o.tokens) - truth).norm() / truth.norm()
    ratios["error of the first layer's projections / their norm"] = float(error)
    refused = False
    try:
        await kept.read_prefix([5])
    except UserError:
        refused = True
    for one in (client, kept):
        await one.end()
    return ratios, {"rows": len(label_N), "tokens": o.tokens, "kept_refuses": refused, "smoke": o.smoke}


def main() -> None:
    parser = options("What the gradient line gives away: labels to the PLM owner, projections to the data owner.")
    parser.add_argument("--model", default=PACKAGED, help="as plm.name in a configuration; a Llama")
    parser.add_argument("--pairs", type=int, default=40, help="whose targets are read")
    parser.add_argument("--tokens", type=int, default=1200, help="whose keys and values are read; at least H")
    parser.add_argument("--steps", type=int, default=100, help="of the adapter's training")
    o = parser.parse_args()
    if o.smoke:
        o.pairs, o.tokens, o.steps = 2, 80, 2
    device = device_of(o)
    with tempfile.TemporaryDirectory(prefix=NAME) as scratch:
        name = tiny_model(Path(scratch)) if o.smoke else o.model
        config = PLMConfig(name=name, device=str(device), threads=o.threads)
        ratios, figures = asyncio.run(measure(o, config))
    write_results(NAME, ratios, AIMS, figures, o.results_dir)
    show("What the gradient line gives away", ratios, AIMS)


if __name__ == "__main__":
    main()
