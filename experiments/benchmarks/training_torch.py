"""The seed recipe in PyTorch, as a process that takes steps when it is told to. It needs PyTorch and numpy alone.

    python training_torch.py '{"compile": false, "batch_size": 64, "context": 256, ...}'

"timed" steps are timed together, with one wait for the device at their end.
Started by `experiments.benchmarks.training`. Answers each line of its input, a number of steps, with one JSON line.
"""

import json
import math
import resource
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, rate
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_output = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.Dropout(rate))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).split(width, 2)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.rate)
        attended = self.attention_output(attended.transpose(1, 2).reshape(batch, time, width))
        x = x + functional.dropout(attended, self.rate)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """The seed model: learned positions, norms before the parts; the head is the embedding if it is tied."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        vocab_size, context, width = config["vocab_size"], config["context"], config["width"]
        self.embedding, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(
            *[Block(width, config["heads"], config["dropout"]) for _ in range(config["layers"])]
        )
        self.final_norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=not config["tied_head"])
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if config["tied_head"]:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens[:, :-1]) + self.positions.weight
        logits = self.head(self.final_norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def main() -> None:
    config = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Decoder(config).to(device)
    loss_of = model
    if config["compile"]:  # on a GPU with CUDA graphs, which is what makes small models fast there
        loss_of = torch.compile(model, mode="reduce-overhead" if device == "cuda" else "default")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=device == "cuda")
    tokens = torch.randint(config["vocab_size"], (config["batch_size"], config["context"] + 1), device=device)
    half = config["compute_type"] == "bfloat16"

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = loss_of(tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    for line in sys.stdin:
        seconds = []
        loss = torch.tensor(math.nan)
        for _ in range(max(1, int(line) // config["timed"])):
            started = time.perf_counter()
            for _ in range(config["timed"]):
                loss = step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / config["timed"])
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(0).ru_maxrss * 1024
        answer = {
            "seconds": seconds,
            "loss": loss.item(),
            "memory": memory,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads",
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
