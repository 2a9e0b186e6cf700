"""Train a small TopK autoencoder on one block of the embedded model, with its massive tokens and without them.

    python tests/benchmarks/autoencoder.py            # three minutes of processor time
    python tests/benchmarks/autoencoder.py --layer 20

Three arms, with the same seeds, steps and batch size: all tokens; all tokens, but centred and scaled by the mean and
the mean square of those that are not massive; without massive tokens (`melens.massive_tokens`). Each is judged on the
tokens of held-out texts that are not massive: the share of their variance that it explains, and the latents that none
of them uses. As in dictionary_learning the states have a mean square of 1, the decoder's rows a norm of 1.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import melens
from melens.analysis.statistics import mean_interval, with_interval
from melens.data.texts import cut_texts, read_text
from melens.models.loading import embedded_model_folder

N_TEXTS, N_HELD_OUT, N_TOKENS = 400, 80, 128
N_LATENTS, N_ACTIVE = 1_152, 32


class Arm(NamedTuple):
    """What an autoencoder is trained on, and whose mean and mean square its states are scaled by."""

    name: str
    trained: Tensor
    scaled_by: Tensor


class Autoencoder(nn.Module):
    """Of each state the `N_ACTIVE` largest latents are kept (Gao et al. 2024)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decoder = nn.Parameter(nn.functional.normalize(torch.randn(N_LATENTS, width), dim=-1))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.encoder_bias, self.decoder_bias = nn.Parameter(torch.zeros(N_LATENTS)), nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        latents = torch.relu((states - self.decoder_bias) @ self.encoder.mT + self.encoder_bias)
        largest, which = latents.topk(N_ACTIVE, dim=-1)
        latents = torch.zeros_like(latents).scatter(-1, which, largest)
        return latents @ self.decoder + self.decoder_bias, latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layer", 14), ("seeds", 3), ("steps", 300), ("batch", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    model = melens.load_model("smollm2-135m")
    keep = melens.massive_tokens(model)
    print(keep)
    texts = cut_texts(model, read_text(), n_texts=N_TEXTS, n_tokens=N_TOKENS)
    states = states_behind(texts, options.layer)
    trained, held_out = states[:-N_HELD_OUT].flatten(0, 1), states[-N_HELD_OUT:].flatten(0, 1)
    kept, judged = trained[keep(trained, options.layer)], held_out[keep(held_out, options.layer)]
    print(f"{len(trained) - len(kept)} of {len(trained):,} tokens are massive; {len(judged):,} others are judged")
    shown = Table("trained on", "variance explained", "dead latents")
    for arm in (
        Arm("all tokens", trained, trained),
        Arm("all tokens, scaled by those that are not massive", trained, kept),
        Arm("without massive tokens", kept, kept),
    ):
        found = torch.tensor([evaluated(arm, judged, seed, options) for seed in range(options.seeds)]).double()
        means = [(float(values.mean()), mean_interval(values.numpy())) for values in found.T]
        shown.add_row(arm.name, *(with_interval(*each, ".1%") for each in means))
    size = f"{N_LATENTS:,} latents of which {N_ACTIVE} are active, {options.steps} steps of {options.batch}"
    shown.title = f"Block {options.layer}, {size}, {options.seeds} seeds"
    Console(width=140).print(shown)


@torch.no_grad()
def states_behind(texts: Tensor, layer: int) -> Tensor:
    """Return the residual stream behind a block, `[text, pos, d]`."""
    network = AutoModelForCausalLM.from_pretrained(embedded_model_folder(), attn_implementation="sdpa").model
    network.layers, network.norm = network.layers[: layer + 1], nn.Identity()
    return torch.cat([network(batch, use_cache=False).last_hidden_state for batch in texts.split(16)])


def evaluated(arm: Arm, judged: Tensor, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Train an autoencoder; return the share of variance that it explains, and of latents that are dead."""
    torch.manual_seed(seed)
    mean = arm.scaled_by.mean(0)
    scale = (arm.scaled_by - mean).square().mean().sqrt()
    autoencoder = Autoencoder(arm.trained.shape[-1])
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=1e-3)
    for step in range(options.steps):
        batch = (arm.trained[torch.randint(len(arm.trained), (options.batch,))] - mean) / scale
        loss = (autoencoder(batch)[0] - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 50)
        optimizer.step()
        with torch.no_grad():
            autoencoder.decoder.copy_(nn.functional.normalize(autoencoder.decoder, dim=-1))
    return judge(autoencoder, (judged - mean) / scale)


@torch.no_grad()
def judge(autoencoder: Autoencoder, states: Tensor) -> tuple[float, float]:
    """Return the share of the states' variance that is explained, and the share of latents that none of them uses."""
    is_used, error = torch.zeros(N_LATENTS, dtype=torch.bool), 0.0
    for some in states.split(4_096):
        rebuilt, latents = autoencoder(some)
        error += float((rebuilt - some).square().sum())
        is_used |= (latents > 0).any(0)
    return 1 - error / float((states - states.mean(0)).square().sum()), float((~is_used).float().mean())


if __name__ == "__main__":
    main()
