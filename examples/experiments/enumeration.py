"""SPIN by enumeration: policies over so few answers that expectations are sums. The loss is the package's own.

A policy is its log-probs [prompts, answers] in float64; prompts are equally likely. `data` and `opponent` are such
tables, too.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from megatron_spin.spin.objective import AnswerLogps
from megatron_spin.spin.pairwise import Spin


def random_policy(prompts: int, answers: int, *, seed: int, scale: float = 1.0) -> Tensor:
    """Log-probs [prompts, answers] of normal logits with standard deviation ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(prompts, answers, generator=generator, dtype=torch.float64)).log_softmax(-1)


def answer_logps(policy: Tensor, opponent: Tensor, prompts: Tensor, answers: Tensor) -> AnswerLogps:
    """Log-probs of ``answers`` [n, r] (indices) to ``prompts`` [n] under both tables; every answer has one token."""
    rows = prompts[:, None]
    return AnswerLogps(
        policy=policy[rows, answers],
        reference=opponent[rows, answers],
        lengths=torch.ones(answers.shape, dtype=policy.dtype),
        identical=answers == answers[:, :1],
    )


def all_answers(prompts: int, answers: int, r: int) -> Tensor:
    """Every prompt with every choice of r answers, [n, 1 + r] indices, in the order of the tables."""
    return torch.cartesian_prod(torch.arange(prompts), *[torch.arange(answers)] * r)


def spin_objective(
    policy: Tensor,
    *,
    opponent: Tensor,
    data: Tensor,
    beta: float,
    loss: str = "logistic",
    generated: Tensor | None = None,
) -> Tensor:
    """Equation 4.7 without sampling: the mean of the loss over real ~ data and generated ~ opponent; a scalar.

    Args:
        generated: the distribution of the generated answers; default: the opponent.
    """
    num_prompts, num_answers = policy.shape
    chosen = all_answers(num_prompts, num_answers, 2)
    prompts, real, other = chosen.T
    weights = data.exp()[prompts, real] * (opponent if generated is None else generated).exp()[prompts, other]
    losses = Spin(beta=beta, loss=loss)(answer_logps(policy, opponent, prompts, chosen[:, 1:])).loss
    return (weights * losses).sum() / len(policy)


def pairs_objective(policy: Tensor, pairs: Tensor, *, opponent: Tensor, beta: float, loss: str = "logistic") -> Tensor:
    """Equation 4.7 as it is trained: the mean over given pairs.

    Args:
        pairs: [n, 3] indices: prompt, real answer, generated answer.
    """
    return Spin(beta=beta, loss=loss)(answer_logps(policy, opponent, pairs[:, 0], pairs[:, 1:])).loss.mean()


def draw_pairs(data: Tensor, opponent: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` rows of prompt, real answer and opponent's answer, as :func:`pairs_objective` takes them."""
    prompt = torch.randint(len(data), (count,), generator=generator)
    answers = [torch.multinomial(table.exp()[prompt], 1, generator=generator).squeeze(1) for table in (data, opponent)]
    return torch.stack([prompt, *answers], dim=1)


def sft_objective(policy: Tensor, *, data: Tensor) -> Tensor:
    """Expected negative log-likelihood of a real answer; a scalar."""
    return -(data.exp() * policy).sum() / len(policy)


def mean_margin(policy: Tensor, *, opponent: Tensor, data: Tensor, beta: float) -> float:
    """The margin's expectation over real ~ data and generated ~ opponent."""
    num_prompts, num_answers = policy.shape
    chosen = all_answers(num_prompts, num_answers, 2)
    prompts, real, generated = chosen.T
    weights = data.exp()[prompts, real] * opponent.exp()[prompts, generated]
    margins = Spin(beta=beta)(answer_logps(policy, opponent, prompts, chosen[:, 1:])).metrics["margin"]
    return (weights * margins).sum().item() / len(policy)


def divergence(data: Tensor, policy: Tensor) -> float:
    """KL(data || policy) in nats, averaged over prompts."""
    return (data.exp() * (data - policy)).sum().item() / len(policy)


def theorem_5_4(opponent: Tensor, data: Tensor, beta: float) -> Tensor:
    """``opponent * (data / opponent) ** (1 / beta)``, normalised, as log-probs."""
    return (opponent + (data - opponent) / beta).log_softmax(-1)


def error(policy: Tensor, data: Tensor) -> Tensor:
    """log(policy / data) of each answer minus its mean over the prompt's answers: zero only at the data."""
    ratio = policy - data
    return ratio - ratio.mean(-1, keepdim=True)


def minimise(objective: Callable[[], Tensor], parameters: Iterable[Tensor], *, iterations: int = 400) -> None:
    """L-BFGS on ``parameters``, in place, until its line search finds no improvement."""
    optimizer = torch.optim.LBFGS(
        list(parameters),
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-11,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)


def best_response(
    opponent: Tensor, data: Tensor, beta: float, loss: str = "logistic", generated: Tensor | None = None
) -> Tensor:
    """The policy after an exact iteration: the objective's minimiser over all policies."""
    logits = opponent.clone().requires_grad_()
    minimise(
        lambda: spin_objective(
            logits.log_softmax(-1), opponent=opponent, data=data, beta=beta, loss=loss, generated=generated
        ),
        [logits],
    )
    return logits.detach().log_softmax(-1)


def _descend(objective: Callable[[Tensor], Tensor], start: Tensor, *, rate: float, steps: int) -> list[Tensor]:
    logits, path = start.clone().requires_grad_(), [start]
    for _ in range(steps):
        (slope,) = torch.autograd.grad(objective(logits.log_softmax(-1)), logits)
        logits = (logits - rate * slope).detach().requires_grad_()
        path.append(logits.detach().log_softmax(-1))
    return path


def gradient_path(opponent: Tensor, data: Tensor, beta: float, *, rate: float, steps: int) -> list[Tensor]:
    """The ``steps + 1`` policies of one iteration by exact gradient descent on the logits, from the opponent on."""
    return _descend(
        lambda policy: spin_objective(policy, opponent=opponent, data=data, beta=beta), opponent, rate=rate, steps=steps
    )


def sft_path(start: Tensor, data: Tensor, *, rate: float, steps: int) -> list[Tensor]:
    """The same for SFT from ``start`` on."""
    return _descend(lambda policy: sft_objective(policy, data=data), start, rate=rate, steps=steps)


class EnumeratedLlama:
    """A Llama of transformers in float64, and every answer that it can give to a few prompts.

    Token 0 ends an answer; an answer that has not ended after ``longest`` tokens is cut off there. So the probabilities
    of the answers to a prompt sum to one, as those of a generator with a limit do.
    """

    def __init__(
        self,
        *,
        prompts: Sequence[Sequence[int]],
        vocabulary: int,
        longest: int,
        hidden: int = 16,
        scale: float = 0.3,
        seed: int = 0,
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            initializer_range=scale,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = LlamaForCausalLM(config).double()
        # transformers' RMSNorm computes in fp32, whatever the model's dtype is.
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__ == "LlamaRMSNorm":
                    setattr(module, name, torch.nn.RMSNorm(hidden, eps=config.rms_norm_eps, dtype=torch.float64))
        self.answers = [
            [*words, *end]
            for length in range(longest + 1)
            for words in itertools.product(range(1, vocabulary), repeat=length)
            for end in ([[0]] if length < longest else [[]])
        ]
        width = max(map(len, prompts)) + longest
        rows = [(prompt, answer) for prompt in prompts for answer in self.answers]
        self.input_ids = torch.tensor(
            [[*prompt, *answer, *[0] * (width - len(prompt) - len(answer))] for prompt, answer in rows]
        )
        self.response = torch.tensor(
            [[len(prompt) <= i < len(prompt) + len(answer) for i in range(width)] for prompt, answer in rows]
        )
        self.prompts = len(prompts)

    def parameters(self) -> list[Tensor]:
        """All of the model's parameters."""
        return list(self.model.parameters())

    def logps(self) -> Tensor:
        """Summed log-probs of every answer to every prompt, [prompts, answers]; differentiable."""
        logits = self.model(input_ids=self.input_ids, use_cache=False).logits[:, :-1]
        token_logps = logits.log_softmax(-1).gather(-1, self.input_ids[:, 1:, None]).squeeze(-1)
        return (token_logps * self.response[:, 1:]).sum(-1).view(self.prompts, -1)


def flat_gradient(value: Tensor, parameters: Iterable[Tensor], *, retain_graph: bool = False) -> Tensor:
    """The gradient of a scalar, all parameters in one vector."""
    return torch.cat(
        [gradient.flatten() for gradient in torch.autograd.grad(value, list(parameters), retain_graph=retain_graph)]
    )
