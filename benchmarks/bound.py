"""How fast the same work can be on a CPU: DPO of a Llama in plain PyTorch, written by hand.

A bound to compare with, not a trainer: one process, fp32, no checkpoints. Nothing is padded: the sequences of a step
form one row of tokens, and attention runs per sequence. With --layout shared the prompt of a pair is computed once for
both answers. Only the positions that predict a response token reach the head. Where autograd would keep or copy large
tensors there is a function with a backward of its own.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.workload import Pair, measurement, model_directory, read_steps, write_json

BETA = 0.1
LEARNING_RATE = 1e-6
CLIP_GRAD = 1.0
HEAD_CHUNK = 512
"""Positions whose logits are computed at once: 8 MB at 4,096 tokens, which stays in the cache."""

# ----------------------------------------------------------------------------------------------------------- the batch


@dataclasses.dataclass(frozen=True)
class Segment:
    """One causal sequence: where its tokens lie in the row."""

    parts: tuple[slice, ...]
    """In order. The second answer of a pair that shares its prompt has two parts, the prompt and the answer."""
    first_own: int = 0
    """Positions before this one belong to another segment, which computes their output."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """The t tokens of a step in one row, of which n predict a response token."""

    ids: Tensor
    """[t] int64"""
    positions: Tensor
    """[t] int64: place within the sequence."""
    segments: list[Segment]
    predicting: Tensor
    """[n] int64: places in the row whose next token is a response token; a place may occur twice."""
    targets: Tensor
    """[n] int64: those response tokens."""
    answers: Tensor
    """[n] int64: the answer of each target; the chosen answers come first, the rejected ones after them."""
    num_answers: int


class Row:
    """A batch while it is put together."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.predicting: list[int] = []
        self.targets: list[int] = []
        self.answers: list[int] = []

    def append(self, ids: Sequence[int], *, position: int) -> slice:
        """Appends tokens that begin at ``position`` of their sequence; returns where they lie."""
        start = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        return slice(start, len(self.ids))

    def predict(self, places: Iterable[int], response: Sequence[int], answer: int) -> None:
        """Lets ``places`` predict the tokens of ``response``."""
        self.predicting += places
        self.targets += response
        self.answers += [answer] * len(response)

    def batch(self, num_answers: int) -> Batch:
        return Batch(
            ids=torch.tensor(self.ids),
            positions=torch.tensor(self.positions),
            segments=self.segments,
            predicting=torch.tensor(self.predicting),
            targets=torch.tensor(self.targets),
            answers=torch.tensor(self.answers),
            num_answers=num_answers,
        )


def pack(pairs: Sequence[Pair]) -> Batch:
    """Both sequences of each pair behind each other."""
    row = Row()
    for number, pair in enumerate(pairs):
        for answer, response in ((number, pair.chosen_ids), (number + len(pairs), pair.rejected_ids)):
            whole = row.append(pair.prompt_ids + response, position=0)
            row.segments.append(Segment((whole,)))
            first = whole.start + len(pair.prompt_ids)
            row.predict(range(first - 1, whole.stop - 1), response, answer)
    return row.batch(2 * len(pairs))


def pack_shared(pairs: Sequence[Pair]) -> Batch:
    """The prompt of each pair once, then its two answers."""
    row = Row()
    for number, pair in enumerate(pairs):
        length = len(pair.prompt_ids)
        prompt = row.append(pair.prompt_ids, position=0)
        chosen = row.append(pair.chosen_ids, position=length)
        rejected = row.append(pair.rejected_ids, position=length)
        row.segments.append(Segment((slice(prompt.start, chosen.stop),)))
        row.segments.append(Segment((prompt, rejected), first_own=length))
        # The last position of the prompt predicts the first token of either answer.
        row.predict([prompt.stop - 1, *range(chosen.start, chosen.stop - 1)], pair.chosen_ids, number)
        row.predict(
            [prompt.stop - 1, *range(rejected.start, rejected.stop - 1)], pair.rejected_ids, number + len(pairs)
        )
    return row.batch(2 * len(pairs))


LAYOUTS = {"packed": pack, "shared": pack_shared}


# --------------------------------------------------------------------------------------- functions with a backward


class RMSNorm(torch.autograd.Function):
    """x [t, h], weight [h] -> x / rms(x) * weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normalized = x * inverse
        ctx.save_for_backward(normalized, inverse, weight)
        return normalized * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normalized, inverse, weight = ctx.saved_tensors
        product = gradient * normalized
        along = (product @ weight).unsqueeze(1).div_(normalized.shape[-1])
        grad_x = (gradient * weight).sub_(normalized * along).mul_(inverse)
        return grad_x, product.sum(0), None


class SwiGLU(torch.autograd.Function):
    """[gate, up] [t, 2 f] -> silu(gate) * up [t, f]; keeps nothing but its input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad = torch.empty_like(gate_up)
        grad_gate, grad_up = grad.chunk(2, -1)
        torch.mul(functional.silu(gate), gradient, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=grad_gate)
        return grad


class RotaryAttention(torch.autograd.Function):
    """Rotates queries and keys, then attends within each segment: qkv [t, heads + 2 groups, d] -> [t, heads, d].

    A token's ``qkv`` holds the query heads, then the key groups, then the value groups; ``cos`` and ``sin`` are
    [t, 1, d / 2].
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, segments: Sequence[Segment], heads: int) -> Tensor:
        groups = (qkv.shape[1] - heads) // 2
        rotated = torch.empty_like(qkv[:, : heads + groups])
        rotate(qkv[:, : heads + groups], cos, sin, out=rotated)
        query, key, value = rotated[:, :heads], rotated[:, heads:], qkv[:, heads + groups :]
        output = torch.empty_like(query)
        saved = []
        for segment in segments:
            inputs = [gather(tensor, segment) for tensor in (query, key, value)]
            context, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, True)
            own = context[0].transpose(0, 1)[segment.first_own :]
            output[segment.parts[-1].stop - len(own) : segment.parts[-1].stop] = own
            saved.append((*inputs, context, logsumexp))
        ctx.saved, ctx.segments, ctx.tables = saved, segments, (cos, sin)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        tokens, heads, size = gradient.shape
        groups = ctx.saved[0][1].shape[1]
        grad_qkv = gradient.new_zeros(tokens, heads + 2 * groups, size)
        grad_rotated = gradient.new_zeros(tokens, heads + groups, size)
        targets = (grad_rotated[:, :heads], grad_rotated[:, heads:], grad_qkv[:, heads + groups :])
        for segment, saved in zip(ctx.segments, ctx.saved, strict=True):
            grad_context = gather(gradient, segment)
            if segment.first_own:
                grad_context[:, :, : segment.first_own] = 0
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(grad_context, *saved, 0.0, True)
            for target, grad in zip(targets, grads, strict=True):
                scatter_add(target, segment, grad)
        ctx.saved = None  # frees it before the next layer's backward allocates
        cos, sin = ctx.tables
        rotate(grad_rotated, cos, -sin, out=grad_qkv[:, : heads + groups])
        return grad_qkv, None, None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor) -> None:
    """Rotary embedding of x [t, n, d] into ``out``; with ``-sin`` it is its own backward."""
    first, second = x.chunk(2, -1)
    out_first, out_second = out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)


def gather(row: Tensor, segment: Segment) -> Tensor:
    """A segment's tokens of ``row`` [t, n, d] as [1, n, s, d]: a view if it has one part, else a copy."""
    parts = [row[part] for part in segment.parts]
    tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tokens.transpose(0, 1).unsqueeze(0)


def scatter_add(row: Tensor, segment: Segment, values: Tensor) -> None:
    """Adds values [1, n, s, d] to the segment's tokens of ``row`` [t, n, d]."""
    tokens = values[0].transpose(0, 1)
    start = 0
    for part in segment.parts:
        end = start + part.stop - part.start
        row[part] += tokens[start:end]
        start = end


class TokenLogps(torch.autograd.Function):
    """Hidden states [n, h], head [v, h], targets [n] -> log-probs of the targets [n]; keeps the softmax [n, v]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        softmax = torch.empty(len(hidden), len(head))
        token_logps = torch.empty(len(hidden))
        for start in range(0, len(hidden), HEAD_CHUNK):
            rows = slice(start, start + HEAD_CHUNK)
            chunk = torch.mm(hidden[rows], head.t(), out=softmax[rows])
            chunk.sub_(chunk.amax(1, keepdim=True))
            chosen = chunk.gather(1, targets[rows, None])
            total = chunk.exp_().sum(1, keepdim=True)
            chunk.div_(total)
            token_logps[rows] = (chosen - total.log()).squeeze(1)
        ctx.save_for_backward(hidden, head, targets, softmax)
        return token_logps

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, head, targets, softmax = ctx.saved_tensors
        grad_logits = softmax.mul_(-gradient[:, None])
        grad_logits.scatter_add_(1, targets[:, None], gradient[:, None])
        return grad_logits @ head, grad_logits.t() @ hidden, None


# ----------------------------------------------------------------------------------------------------------- the model


class Layer(torch.nn.Module):
    """One transformer layer; linear layers that read the same input are one matrix."""

    def __init__(self, weights: dict[str, Tensor], prefix: str, *, heads: int, head_size: int, epsilon: float) -> None:
        super().__init__()

        def parameter(*names: str) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.cat([weights[f"{prefix}.{name}.weight"] for name in names]))

        self.attention_norm = parameter("input_layernorm")
        self.qkv = parameter("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.projection = parameter("self_attn.o_proj")
        self.mlp_norm = parameter("post_attention_layernorm")
        self.gate_up = parameter("mlp.gate_proj", "mlp.up_proj")
        self.down = parameter("mlp.down_proj")
        self.heads, self.head_size, self.epsilon = heads, head_size, epsilon

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Sequence[Segment]) -> Tensor:
        """x [t, h] -> [t, h]"""
        normalized = RMSNorm.apply(x, self.attention_norm, self.epsilon)
        qkv = functional.linear(normalized, self.qkv).view(len(x), -1, self.head_size)
        context = RotaryAttention.apply(qkv, cos, sin, segments, self.heads)
        x = x + functional.linear(context.view(len(x), -1), self.projection)
        normalized = RMSNorm.apply(x, self.mlp_norm, self.epsilon)
        activated = SwiGLU.apply(functional.linear(normalized, self.gate_up))
        return x + functional.linear(activated, self.down)


class Llama(torch.nn.Module):
    """A Llama without tied embeddings or RoPE scaling, from a Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        config = json.loads((directory / "config.json").read_text())
        weights = safetensors.torch.load_file(directory / "model.safetensors")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        self.epsilon = config["rms_norm_eps"]
        self.embedding = torch.nn.Parameter(weights["model.embed_tokens.weight"])
        layers = []
        for number in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{number}"
            layers.append(Layer(weights, prefix, heads=heads, head_size=hidden // heads, epsilon=self.epsilon))
        self.layers = torch.nn.ModuleList(layers)
        self.norm = torch.nn.Parameter(weights["model.norm.weight"])
        self.head = torch.nn.Parameter(weights["lm_head.weight"])
        exponents = torch.arange(0, hidden // heads, 2) / (hidden // heads)
        frequencies = config["rope_parameters"]["rope_theta"] ** -exponents
        angles = torch.outer(torch.arange(config["max_position_embeddings"]), frequencies)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, batch: Batch) -> Tensor:
        """Summed log-probs of each answer, [num_answers]."""
        cos, sin = self.cos[batch.positions].unsqueeze(1), self.sin[batch.positions].unsqueeze(1)
        x = functional.embedding(batch.ids, self.embedding)
        for layer in self.layers:
            x = layer(x, cos, sin, batch.segments)
        predicting = RMSNorm.apply(x[batch.predicting], self.norm, self.epsilon)
        token_logps = TokenLogps.apply(predicting, self.head, batch.targets)
        return torch.zeros(batch.num_answers).index_add(0, batch.answers, token_logps)


# -------------------------------------------------------------------------------------------------------- the training


def dpo_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """Mean DPO loss of the summed log-probs [chosen answers, then rejected answers]."""
    chosen, rejected = (policy - reference).chunk(2)
    return -functional.logsigmoid(BETA * (chosen - rejected)).mean()


def train(directory: Path, layout: str) -> tuple[list[float], float]:
    """Trains on every step of the workload; returns the seconds of each step and the first gradient norm."""
    pack_pairs = LAYOUTS[layout]
    steps = read_steps(directory)
    model = Llama(model_directory(directory))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    with torch.no_grad():
        references = [model(pack_pairs(pairs)) for pairs in steps]
    seconds, norms = [], []
    for number, (pairs, reference) in enumerate(zip(steps, references, strict=True), start=1):
        started = time.perf_counter()
        loss = dpo_loss(model(pack_pairs(pairs)), reference)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        seconds.append(time.perf_counter() - started)
        norms.append(norm.item())
        print(f"step {number} of {len(steps)}: loss {value:.6f}, {seconds[-1]:.3f} s", flush=True)
    return seconds, norms[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path, metavar="DIR", help="what benchmarks.prepare wrote")
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="measurement to write (JSON)")
    arguments = parser.parse_args()
    seconds, norm = train(arguments.workload, arguments.layout)
    versions = f"torch {torch.__version__}"
    write_json(arguments.out, measurement(arguments.workload, seconds=seconds, grad_norm=norm, versions=versions))


if __name__ == "__main__":
    main()
